"""FastCarRacing against Gymnasium's class, and the training wrappers."""

import dataclasses
import gc

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.box2d.car_racing import CarRacing

import car_racing_env
from car_racing_env import REWARDS, TRAIN_TRACKS, TrainingRewards, episode_end, make_env, make_training_env
from evaluate import Teacher
from fast.car_racing import FastCarRacing
from GitText2ActionWithPrompt import ANSWERS
from instructions import Told
from perturbations import Throws
from road import move_car
from targets import RACE, SIDE, Target
from teacher import make_evaluation_env

ACCELERATE = ANSWERS["Accelerate"]
FLAT = dataclasses.replace(REWARDS, grass_penalty=10.0, miss_penalty=10.0, penalty_ramp=0.0)  # penalties in full


@pytest.mark.parametrize(
    "skip, limit, driver, end",
    [(1, 300, "erratic", "time"), (2, 1000, "teacher", "lap"), (3, 301, "erratic", "time"),
     (2, 1000, "full gas", "field"), (3, 100, "parked", "time")],
)  # fmt: skip
def test_identical_to_stock(skip, limit, driver, end, monkeypatch):
    """Frame by frame to every kind of end; frames 100 and 301 fall inside a skip of 3."""
    stock = gym.wrappers.TimeLimit(CarRacing(continuous=False), limit)
    monkeypatch.setattr(car_racing_env, "MAX_FRAMES", limit)
    fast = make_evaluation_env(skip)
    teacher, rng, ended = Teacher(), np.random.default_rng(skip), ""
    obs, info = fast.reset(seed=8)
    assert np.array_equal(obs, stock.reset(seed=8)[0])
    while not ended:
        action = {"full gas": ACCELERATE, "parked": 0}.get(driver, teacher(None, {"state": info["state"][None]})[0])
        if driver == "erratic" and rng.random() < 0.05:
            action = rng.integers(5)
        obs, reward, *ending = fast.step(action)
        ended, info, total = episode_end(*ending), ending[-1], 0.0
        for _ in range(skip):
            expected, paid, *stock_ending = stock.step(action)
            total += paid
            if stock_ending[0] or stock_ending[1]:
                break
        assert np.array_equal(obs, expected) and reward == pytest.approx(total, abs=1e-12)
        assert ended == episode_end(*stock_ending)
    assert ended == end


def test_identical_when_randomised_and_for_the_viewer():
    """While another one is drawn on the same surfaces, in turns."""
    kwargs = dict(domain_randomize=True, render_mode="rgb_array", continuous=False)
    stock, fast, another = CarRacing(**kwargs), FastCarRacing(**kwargs), FastCarRacing(**kwargs)
    assert np.array_equal(fast.reset(seed=5)[0], stock.reset(seed=5)[0])
    another.reset(seed=6)
    for action in [ACCELERATE] * 40 + [ANSWERS["Turn left"]] * 20:
        another.step(action)
        assert np.array_equal(fast.step(action)[0], stock.step(action)[0])
    assert np.array_equal(fast.render(), stock.render())


def after_gas(env, decisions=25):
    """A fresh episode after some gas."""
    env.reset(seed=3)
    for _ in range(decisions):
        env.step(ACCELERATE)
    return env


def drive_on(env, action):
    """The rewards of one action until the episode ends, and what is said of it then."""
    rewards, ended = [], False
    while not ended:
        _, reward, *endings, info = env.step(action)
        rewards.append(reward)
        ended = any(endings)
    return rewards, info["episode_summary"]


def test_an_early_stop_on_grass_costs_its_share_of_the_lap_so_far():
    """Full gas leaves the road at the first bend; the way there pays at most the clip."""
    last = {}
    for ramp in (0.0, 0.25, 1e9):
        rewards = dataclasses.replace(FLAT, penalty_ramp=ramp, miss_penalty=0.0, clip=2.0)
        env = make_training_env(3, rewards, 2, draw=False)
        env.reset()
        paid, summary = drive_on(env, ACCELERATE)
        assert max(paid) == 2.0 and (summary["end"], summary["length"]) == ("grass", 2 * len(paid))
        assert summary["training_return"] == pytest.approx(sum(paid))
        last[ramp] = paid[-1]
    tiles, track = env.unwrapped.tile_visited_count, env.unwrapped.track
    assert summary["return"] == pytest.approx(1000 * tiles / len(track) - 0.1 * summary["length"])  # the task's own
    env.unwrapped.reset(seed=summary["track_seed"])
    assert env.unwrapped.track == track and summary["track_seed"] < TRAIN_TRACKS
    share = tiles / (0.25 * len(track))
    assert 0 < share < 1
    assert last[1e9] - last[0.0] == pytest.approx(FLAT.grass_penalty)
    assert last[1e9] - last[0.25] == pytest.approx(share * FLAT.grass_penalty)


def test_a_finished_lap_pays_the_bonus():
    """Of no length, so that the first tile finishes it."""
    env = make_training_env(3, FLAT, 2, draw=False)
    env.unwrapped.lap_complete_percent = 0.0
    env.reset()
    (paid,), summary = drive_on(env, 0)
    assert summary["end"] == "lap" and paid == pytest.approx(summary["return"] + FLAT.lap_bonus)


@pytest.mark.parametrize("tiles", [6, 50])
def test_a_tile_left_behind_costs(tiles):
    """Jump over some tiles: each counts once, 30 at most at a time."""
    env = after_gas(TrainingRewards(make_env(2, draw=False), 0, FLAT))
    assert env.missed_tiles == 0
    _, heading, x, y = env.unwrapped.track[env.furthest_tile + tiles]
    car = env.unwrapped.car
    move_car(car, heading - car.hull.angle, np.array([x, y]) - car.hull.position, np.zeros(2))
    total = sum(env.step(0)[1] for _ in range(3))
    assert tiles - 3 <= env.missed_tiles <= tiles
    charged = 10 * min(env.missed_tiles, 30)
    assert -charged < total < -charged + 20


def test_throws_reach_everywhere():
    """Turned any way, on the road and beside it, at any speed."""
    env, seen = Throws(make_env(2, draw=False), at_start=1.0), []
    for seed in range(120):
        env.reset(seed=seed)
        env.step(0)
        road, hull = env.get_wrapper_attr("road"), env.unwrapped.car.hull
        seen.append([np.angle(np.exp(1j * (hull.angle - road.heading))), road.offset, hull.linearVelocity.length])
    angle, offset, speed = np.array(seen).T
    assert angle.min() < -2 and angle.max() > 2 and offset.min() < -5 and offset.max() > 5
    assert speed.max() > 90 and np.quantile(speed, 0.2) < 20


@pytest.mark.parametrize("thrown, grace, length", [(False, 60, 50), (True, 60, 62), (True, 0, 50)])
def test_what_a_throw_costs_is_not_charged(thrown, grace, length):
    """On the verge beside the start: without a throw the episode ends after a second, with one after its grace."""
    rewards = dataclasses.replace(FLAT, grass_limit=50, thrown_grace=grace)
    env = TrainingRewards(Throws(make_env(2, draw=False)), 3, rewards)
    env.reset()
    env.env.due, env.env.throw = thrown, lambda: True  # turned
    road = env.get_wrapper_attr("road")
    move_car(env.unwrapped.car, 0.0, 15 * np.array([np.cos(road.heading), np.sin(road.heading)]))
    env.furthest_tile = env.unwrapped.tile_visited_count + 4  # five tiles are behind
    paid, summary = drive_on(env, 0)
    assert summary["length"] == length and (paid[0] > -10) == (length > 50)


def test_an_instruction_pays_in_place_of_the_tiles():
    """A speed that is kept, whatever the tiles say; a side costs beside them; progress counts along the road."""

    def told_env(target, **rewards):
        told, rewards = Told("slow", "taught", "Drive slowly.", target), dataclasses.replace(FLAT, **rewards)
        env = make_training_env(3, rewards, 2, draw=False, draw_instruction=lambda rng: told, change=0.1)
        return after_gas(env), env.get_wrapper_attr("road")

    env, road = told_env(Target(30.0, SIDE), speed_kept=3.0, side_left=0.5, progress=0.25)
    before = road.travelled
    _, reward, _, _, info = env.step(ACCELERATE)
    tiles = road.travelled - before
    expected = 3 * (1 - (abs(tiles * 3.5 * 50 / 2 - 30) / 80) ** 0.5) - 0.5 * abs(road.offset - SIDE) / 6 + 0.25 * tiles
    assert reward == pytest.approx(expected, abs=0.02) and info["instruction"] == "Drive slowly."
    assert info["obeyed"] == (abs(env.unwrapped.car.hull.linearVelocity.length - 30) <= 5 and road.offset > 0)
    (plain, _), (told, road) = (told_env(x, side_left=2.0, progress=0.0) for x in (RACE, Target(side=3.0)))
    difference = plain.step(ACCELERATE)[1] - told.step(ACCELERATE)[1]
    assert difference == pytest.approx(2 * (3 - road.offset) / 6, abs=0.01)
    for target, cost in ((Target(30.0), 0), (Target(side=3.0), 500)):  # of five tiles left behind
        charged, free = (told_env(target, miss_penalty=x)[0] for x in (100.0, 0.0))
        for env in (charged, free):
            env.env.furthest_tile = env.unwrapped.tile_visited_count + 4
        assert free.step(0)[1] - charged.step(0)[1] == pytest.approx(cost, abs=0.01)


def test_a_closed_simulator_leaves_nothing_behind():
    objects = []
    for _ in range(3):
        env = make_env(draw=False)
        env.reset(seed=1)
        env.close()
        del env
        gc.collect()
        objects.append(len(gc.get_objects()))
    assert objects[2] < objects[1] + 50  # a track has some 300 tiles
