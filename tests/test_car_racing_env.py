"""FastCarRacing against Gymnasium's class, the answers' effects and the training wrappers."""

import dataclasses
import gc

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.box2d.car_racing import CarRacing

import instructions
from car_racing_env import REWARDS, TRAIN_TRACKS, FrameSkip, TrainingRewards, episode_end, make_env, make_training_env
from evaluate import Teacher
from fast.car_racing import FastCarRacing
from GitText2ActionWithPrompt import ANSWERS, to_simulator
from instructions import RACE, SIDE, Target, Told
from perturbations import Throws
from road import FollowRoad, Road, move_car
from teacher import PrivilegedState

ACCELERATE = ANSWERS["Accelerate"]
FLAT = dataclasses.replace(REWARDS, grass_penalty=10.0, miss_penalty=10.0, penalty_ramp=0.0)  # penalties in full


@pytest.mark.parametrize(
    "skip, limit, driver, end",
    [
        (1, 300, "erratic", "time"), (2, 1000, "teacher", "lap"), (3, 301, "erratic", "time"),
        (4, 300, "erratic", "time"), (2, 1000, "full gas", "field"), (3, 100, "parked", "time"),
    ],
)  # fmt: skip
def test_identical_to_stock(skip, limit, driver, end):
    """Frame by frame to every kind of end; frames 100 and 301 fall inside a skip of 3."""
    stock = gym.wrappers.TimeLimit(CarRacing(continuous=False), limit)
    fast = FrameSkip(gym.wrappers.TimeLimit(FastCarRacing(continuous=False), limit), skip)
    fast = PrivilegedState(FollowRoad(fast))
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
    kwargs = dict(domain_randomize=True, render_mode="rgb_array", continuous=False)
    stock, fast = CarRacing(**kwargs), FastCarRacing(**kwargs)
    assert np.array_equal(fast.reset(seed=5)[0], stock.reset(seed=5)[0])
    for action in [ACCELERATE] * 40 + [ANSWERS["Turn left"]] * 20:
        assert np.array_equal(fast.step(action)[0], stock.step(action)[0])
    assert np.array_equal(fast.render(), stock.render())


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers_steer_the_right_way(answer):
    env = make_env(2, draw=False)
    env.reset(seed=0)
    (action,) = to_simulator(torch.tensor([list(ANSWERS).index(answer)]))
    for _ in range(20):
        env.step(action)
    sign = {"Turn left": 1, "Turn right": -1}.get(answer, 0)
    assert np.sign(np.round(env.unwrapped.car.wheels[0].joint.angle, 3)) == sign
    assert (env.unwrapped.car.hull.linearVelocity.length > 5) == (answer == "Accelerate")


def test_an_early_stop_on_grass_costs_its_share_of_the_lap_so_far():
    """Full gas leaves the road at the first bend."""
    last = {}
    for ramp in (0.0, 0.25, 1e9):
        rewards = dataclasses.replace(FLAT, penalty_ramp=ramp, miss_penalty=0.0, clip=2.0)
        env, rewards_seen, terminated = make_training_env(3, rewards, 2, draw=False), [], False
        env.reset()
        while not terminated:
            _, reward, terminated, _, info = env.step(ACCELERATE)
            rewards_seen.append(reward)
        assert info["episode_summary"]["end"] == "grass" and info["episode_summary"]["length"] == 2 * len(rewards_seen)
        assert info["episode_summary"]["track_seed"] < TRAIN_TRACKS and max(rewards_seen) == 2.0
        last[ramp] = reward
    share = env.unwrapped.tile_visited_count / (0.25 * len(env.unwrapped.track))
    assert 0 < share < 1
    assert last[1e9] - last[0.0] == pytest.approx(FLAT.grass_penalty)
    assert last[1e9] - last[0.25] == pytest.approx(share * FLAT.grass_penalty)


def test_a_finished_lap_pays_the_bonus():
    """Of no length, so that the first tile finishes it."""
    env = make_training_env(3, FLAT, 2, draw=False)
    env.unwrapped.lap_complete_percent = 0.0
    env.reset()
    _, reward, terminated, _, info = env.step(0)
    assert terminated and info["episode_summary"]["end"] == "lap"
    assert reward == pytest.approx(info["episode_summary"]["return"] + FLAT.lap_bonus)


def test_a_tile_left_behind_costs():
    """Drive on, jump the car over some tiles: each counts once."""
    env = TrainingRewards(make_env(2, draw=False), 0, FLAT)
    env.reset()
    assert min(env.step(ACCELERATE)[1] for _ in range(30)) > -1
    _, heading, x, y = env.unwrapped.track[env.furthest_tile + 6]
    for body in [env.unwrapped.car.hull, *env.unwrapped.car.wheels]:
        body.position, body.angle = (x, y), heading
    total = sum(env.step(0)[1] for _ in range(3))
    assert env.missed_tiles >= 3 and -10 * env.missed_tiles < total < -10 * env.missed_tiles + 20


@pytest.mark.parametrize("decisions", [0, 1, 70])
def test_a_snapshot_resumes_to_the_same_pixels_rewards_and_tracks(decisions):
    """Instructions and throws too."""
    actions = np.random.default_rng(0).choice(5, p=[0.05, 0.15, 0.15, 0.6, 0.05], size=300)
    random = dict(draw_instruction=instructions.draw, change=0.05, thrown=0.02)
    rewards = dataclasses.replace(FLAT, thrown_grace=0)  # so that episodes end
    env, other = make_training_env(3, rewards, **random), make_training_env(99, rewards, **random)
    obs, info = env.reset()
    for action in actions[:decisions]:
        obs, *_ = env.step(action)
    other.resume_from = env.snapshot()
    resumed, resumed_info = other.reset()
    assert np.array_equal(resumed, obs) and resumed_info["track_seed"] == info["track_seed"]
    assert resumed_info["instruction"] == env.get_wrapper_attr("told").sentence
    episodes = 1
    for action in actions[decisions:]:
        expected, got = env.step(action), other.step(action)
        assert np.array_equal(expected[0], got[0]) and expected[1:] == got[1:] and env.snapshot() == other.snapshot()
        if expected[2] or expected[3]:
            expected, got, episodes = env.reset(), other.reset(), episodes + 1
            assert np.array_equal(expected[0], got[0]) and expected[1] == got[1]
    assert episodes > 1


@pytest.fixture
def moving():
    """The plain task after a second of full gas, and its car."""
    env = make_env(2, draw=False)
    env.reset(seed=3)
    for _ in range(25):
        env.step(ACCELERATE)
    return env, env.unwrapped.car


def test_moving_the_car_is_a_rigid_motion(moving):
    """Hull and wheels keep their places; the next step hardly notices."""
    env, car = moving

    def shape():
        turn = car.hull.GetLocalPoint
        bodies = (car.hull, *car.wheels)
        velocity = [car.hull.GetLocalVector(body.linearVelocity) for body in bodies]
        return np.array([[*turn(body.position), body.angle - car.hull.angle] for body in bodies]), np.array(velocity)

    before, speed, place = shape(), car.hull.linearVelocity.length, np.array(car.hull.position)
    move_car(car, 2.5, (3.0, -1.0))
    for ours, theirs in zip(shape(), before):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    np.testing.assert_allclose(np.array(car.hull.position), place + (3.0, -1.0), atol=1e-4)
    env.step(0)
    assert speed > 20 and abs(car.hull.linearVelocity.length - speed) < 1
    move_car(car, 0.0, velocity=np.array([0.0, 10.0]))
    assert all(body.linearVelocity.y == 10 and body.angularVelocity == 0 for body in (car.hull, *car.wheels))


def test_the_road_is_followed(moving):
    """Tiles driven along it are those that the speed along it makes; backwards they count down; the offset is signed."""
    env, car = moving
    road = Road(env)
    start, total = road.travelled, 0.0
    for _ in range(25):
        env.step(ACCELERATE)
        road.look()
        velocity = np.array(car.hull.linearVelocity)
        total += velocity @ (-np.sin(road.heading), np.cos(road.heading)) * 2 / 50 / 3.5
    assert start == 0 and road.travelled == pytest.approx(total, rel=0.05) and total > 8
    right = np.array([np.cos(road.heading), np.sin(road.heading)])
    offset = road.offset
    move_car(car, np.pi, 2 * right)
    road.look()
    assert road.offset - offset == pytest.approx(2, abs=0.1)
    before = road.travelled
    for _ in range(10):
        env.step(0)
        road.look()
    assert road.travelled < before - 2


def test_throws_repeat_and_reach_everywhere():
    """From the seed alone: turned any way, on the road and beside it, at any speed."""
    seen = []
    for seed in range(120):
        twice = []
        for _ in range(2):
            env = Throws(make_env(2, draw=False), 1.0, 0.0)
            env.reset(seed=seed % 2)
            env.rng, env.due = np.random.default_rng(seed), True
            env.step(0)
            road, hull = Road(env), env.unwrapped.car.hull
            angle = np.angle(np.exp(1j * (hull.angle - road.heading)))
            twice.append([angle, road.offset, hull.linearVelocity.length])
        assert twice[0] == twice[1]
        seen.append(twice[0])
    angle, offset, speed = np.array(seen).T
    assert angle.min() < -2 and angle.max() > 2 and offset.min() < -5 and offset.max() > 5
    assert speed.max() > 90 and np.quantile(speed, 0.2) < 20


def test_what_a_throw_costs_is_not_charged():
    """On the verge beside the start: without a throw the episode ends after a second, with one after its grace."""
    lengths = {}
    for chance, grace in ((0.0, 60), (1.0, 60), (1.0, 0)):
        rewards = dataclasses.replace(FLAT, grass_limit=50, thrown_grace=grace)
        env = TrainingRewards(Throws(make_env(2, draw=False), 0.0, 0.0), 3, rewards)
        env.reset()
        env.env.due, env.env.throw = chance > 0, lambda: True  # turned
        road, terminated, paid = Road(env), False, []
        move_car(env.unwrapped.car, 0.0, 15 * np.array([np.cos(road.heading), np.sin(road.heading)]))
        env.furthest_tile = env.unwrapped.tile_visited_count + 4  # five tiles are behind
        while not terminated:
            _, reward, terminated, _, info = env.step(0)
            paid.append(reward)
        lengths[chance, grace] = info["episode_summary"]["length"], paid[0] > -10
    assert lengths == {(0.0, 60): (50, False), (1.0, 60): (62, True), (1.0, 0): (50, False)}


def told_env(target, **rewards):
    """A training environment under one target, after some gas."""
    rewards = dataclasses.replace(FLAT, **rewards)
    told = Told("slow", "taught", "Drive slowly.", target)
    env = make_training_env(3, rewards, 2, draw=False, draw_instruction=lambda rng: told, change=0.1)
    env.reset()
    for _ in range(20):
        env.step(ACCELERATE)
    return env


def test_an_instruction_pays_in_place_of_the_tiles():
    """A speed that is kept, whatever the tiles say; a side costs beside them; progress counts along the road."""
    env = told_env(Target(30.0, SIDE), speed_kept=3.0, side_left=0.5, progress=0.25)
    road = Road(env)
    _, reward, _, _, info = env.step(ACCELERATE)
    road.look()
    speed = road.travelled * 3.5 * 50 / 2
    expected = 3 * (1 - (abs(speed - 30) / 80) ** 0.5) - 0.5 * abs(road.offset - SIDE) / 6 + 0.25 * road.travelled
    assert reward == pytest.approx(expected, abs=0.02)
    assert info["instruction"] == "Drive slowly." and info["kind"] == "slow"
    assert info["obeyed"] == (abs(env.unwrapped.car.hull.linearVelocity.length - 30) <= 5 and road.offset > 0)
    plain, told = (told_env(target, side_left=2.0, progress=0.0) for target in (RACE, Target(side=3.0)))
    road = Road(told)
    difference = plain.step(ACCELERATE)[1] - told.step(ACCELERATE)[1]
    road.look()
    assert difference == pytest.approx(2 * (3 - road.offset) / 6, abs=0.01)


def test_a_closed_simulator_leaves_nothing_behind():
    def objects_after_a_visit():
        env = make_env(draw=False)
        env.reset(seed=1)
        env.step(ACCELERATE)
        env.close()
        del env
        gc.collect()
        return len(gc.get_objects())

    before = [objects_after_a_visit() for _ in range(2)][1]
    assert objects_after_a_visit() < before + 50  # a track has some 300 tiles
