"""FastCarRacing against Gymnasium's class, the answers' effects and the training wrappers."""

import dataclasses

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.box2d.car_racing import CarRacing

from car_racing_env import REWARDS, TRAIN_TRACKS, FrameSkip, TrainingRewards, episode_end, make_env, make_training_env
from evaluate import Teacher
from fast.car_racing import FastCarRacing
from GitText2ActionWithPrompt import ANSWERS, to_simulator
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
    fast = PrivilegedState(FrameSkip(gym.wrappers.TimeLimit(FastCarRacing(continuous=False), limit), skip))
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
    actions = np.random.default_rng(0).choice(5, p=[0.05, 0.15, 0.15, 0.6, 0.05], size=300)
    env, other = make_training_env(3, FLAT), make_training_env(99, FLAT)
    obs, info = env.reset()
    for action in actions[:decisions]:
        obs, *_ = env.step(action)
    other.resume_from = env.snapshot()
    resumed, resumed_info = other.reset()
    assert np.array_equal(resumed, obs) and resumed_info["track_seed"] == info["track_seed"]
    episodes = 1
    for action in actions[decisions:]:
        expected, got = env.step(action), other.step(action)
        assert np.array_equal(expected[0], got[0]) and expected[1:] == got[1:] and env.snapshot() == other.snapshot()
        if expected[2] or expected[3]:
            expected, got, episodes = env.reset(), other.reset(), episodes + 1
            assert np.array_equal(expected[0], got[0]) and expected[1] == got[1]
    assert episodes > 1
