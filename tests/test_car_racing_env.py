"""FastCarRacing against Gymnasium's own class, the frame skip, the training wrapper and the action map."""

import functools

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.box2d.car_racing import CarRacing

import car_racing_env
import collect_captions
import GitText2ActionWithPrompt as model_file

SETTINGS = dict(
    tracks=100_000,
    reward_clip=10.0,
    grass_limit=50,
    grass_penalty=10.0,
    miss_penalty=10.0,
    penalty_ramp=0.0,
    lap_bonus=100.0,
)


def stock_steps(env, action, skip):
    """Gymnasium's class behind a plain frame skip: every frame drawn, the last one returned."""
    total = 0.0
    for _ in range(skip):
        obs, reward, terminated, truncated, info = env.step(action)
        total += reward
        if terminated or truncated:
            break
    return obs, total, terminated, truncated, info


def assert_same(fast, stock):
    assert np.array_equal(fast[0], stock[0])
    assert fast[1] == pytest.approx(stock[1], abs=1e-12)
    assert fast[2:4] == stock[2:4]
    assert fast[4].get("lap_finished") == stock[4].get("lap_finished")


@pytest.mark.parametrize("skip", [1, 2, 3, 4])
def test_identical_to_stock_over_a_lap(skip):
    """The teacher drives with random bursts until the lap or the time ends."""
    stock = gym.wrappers.TimeLimit(CarRacing(continuous=False), 1000)
    fast = collect_captions.PrivilegedState(car_racing_env.make_env(skip), collect_captions.TILES_AHEAD)
    teacher, rng = collect_captions.load_teacher(), np.random.default_rng(skip)
    obs, info = fast.reset(seed=skip)
    assert np.array_equal(obs, stock.reset(seed=skip)[0])
    done, steps = False, 0
    while not done:
        action = int(teacher(torch.from_numpy(info["state"])[None]).argmax())
        action = int(rng.integers(5)) if rng.random() < 0.05 else action
        step = fast.step(action)
        assert_same(step, stock_steps(stock, action, skip))
        info, done, steps = step[4], step[2] or step[3], steps + 1
    assert steps * skip > 300 and fast.unwrapped.tile_visited_count > 100


@pytest.mark.parametrize("skip, action, end", [(2, 3, "field"), (3, 0, "time")])
def test_identical_to_stock_at_other_ends(skip, action, end):
    """Full gas off the field, and standing still to frame 1000, which falls inside a skip of 3."""
    stock, fast = gym.wrappers.TimeLimit(CarRacing(continuous=False), 1000), car_racing_env.make_env(skip)
    assert np.array_equal(fast.reset(seed=0)[0], stock.reset(seed=0)[0])
    ended = ""
    while not ended:
        step = fast.step(action)
        assert_same(step, stock_steps(stock, action, skip))
        ended = car_racing_env.episode_end(*step[2:5])
    assert ended == end


def test_identical_when_randomised_and_for_the_viewer():
    kwargs = dict(domain_randomize=True, render_mode="rgb_array", continuous=False)
    stock, fast = CarRacing(**kwargs), car_racing_env.FastCarRacing(**kwargs)
    assert np.array_equal(fast.reset(seed=5)[0], stock.reset(seed=5)[0])
    for action in [3] * 40 + [2] * 20:
        assert_same(fast.step(action), stock.step(action))
    assert np.array_equal(fast.render(), stock.render())


@pytest.mark.parametrize("answer, sign", [("Turn left", 1), ("Turn right", -1), ("Coast", 0)])
def test_answers_steer_the_right_way(answer, sign):
    env = car_racing_env.make_env(2, draw=False)
    env.reset(seed=0)
    for _ in range(10):
        env.step(model_file.ANSWERS[answer])
    assert np.sign(np.round(env.unwrapped.car.wheels[0].joint.angle, 3)) == sign


@pytest.mark.parametrize("answer, moves", [("Accelerate", True), ("Brake", False)])
def test_answers_move_the_car(answer, moves):
    env = car_racing_env.make_env(2, draw=False)
    env.reset(seed=0)
    for _ in range(20):
        env.step(model_file.ANSWERS[answer])
    assert (env.unwrapped.car.hull.linearVelocity.length > 5) == moves


def test_training_rewards_end_on_grass_and_log_the_track():
    env = car_racing_env.make_training_env(3, 2, draw=False, **SETTINGS)
    _, info = env.reset()
    rewards, done, steps = [], False, 0
    while not done:  # full gas leaves the road at the first bend
        _, reward, terminated, truncated, end = env.step(3)
        rewards.append(reward)
        done, steps = terminated or truncated, steps + 1
    assert terminated and not truncated and end["end"] == "grass"
    assert rewards[-1] < -9 and max(rewards) <= 10
    assert end["track_seed"] == info["track_seed"] < 100_000
    assert end["episode_length"] == 2 * steps

    plain = car_racing_env.make_env(2, draw=False)
    plain.reset(seed=info["track_seed"])
    replayed = sum(plain.step(3)[1] for _ in range(steps))
    assert replayed == pytest.approx(end["episode_return"])


def test_a_tile_left_behind_costs():
    """Drive on, jump the car over some tiles: each counts once."""
    env = car_racing_env.make_training_env(0, 2, draw=False, **SETTINGS)
    env.reset()
    for _ in range(30):
        env.step(3)
    track = env.unwrapped.track
    _, heading, x, y = track[env.front + 6]
    for body in [env.unwrapped.car.hull, *env.unwrapped.car.wheels]:
        body.position, body.angle = (x, y), heading
    total = sum(env.step(0)[1] for _ in range(3))
    assert env.missed >= 3 and total < -10 * env.missed + 20


def test_penalties_grow_over_the_first_part_of_the_lap():
    """The same drive off the road costs its share of the lap so far, the whole penalty without a ramp."""
    last = {}
    for ramp in (0.0, 0.25, 1e9):
        env = car_racing_env.make_training_env(
            3, 2, draw=False, **SETTINGS | {"penalty_ramp": ramp, "miss_penalty": 0.0}
        )
        env.reset()
        terminated = False
        while not terminated:
            _, last[ramp], terminated, *_ = env.step(3)
    share = env.unwrapped.tile_visited_count / (0.25 * len(env.unwrapped.track))
    assert 0 < share < 1
    assert last[1e9] - last[0.0] == pytest.approx(SETTINGS["grass_penalty"])
    assert last[1e9] - last[0.25] == pytest.approx(share * SETTINGS["grass_penalty"])


@pytest.mark.parametrize("decisions", [0, 1, 70])
def test_a_snapshot_resumes_to_the_same_pixels_rewards_and_tracks(decisions):
    actions = np.random.default_rng(0).choice(5, p=[0.05, 0.15, 0.15, 0.6, 0.05], size=400)
    env = car_racing_env.make_training_env(3, 2, **SETTINGS)
    obs, info = env.reset()
    for action in actions[:decisions]:
        obs, *_ = env.step(action)
    other = car_racing_env.make_training_env(99, 2, **SETTINGS)
    other.resume_from = env.snapshot()
    resumed, resumed_info = other.reset()
    assert np.array_equal(resumed, obs) and resumed_info["track_seed"] == info["track_seed"]
    ended = False
    for action in actions[decisions:]:
        expected, got = env.step(action), other.step(action)
        assert np.array_equal(expected[0], got[0]) and expected[1:] == got[1:]
        ended = ended or expected[2]
        if expected[2] or expected[3]:
            expected, got = env.reset(), other.reset()
            assert np.array_equal(expected[0], got[0]) and expected[1] == got[1]
    assert ended


def test_workers_from_spawn_draw_different_tracks_and_repeat():
    make = functools.partial(car_racing_env.make_training_env, frame_skip=2, **SETTINGS)
    seen = []
    for _ in range(2):
        envs = gym.vector.AsyncVectorEnv(
            [functools.partial(make, seed) for seed in (1, 2)],
            context="spawn",
            autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,
        )
        frames, info = envs.reset()
        frames, *_ = envs.step(np.array([3, 3]))
        seen.append((frames.copy(), info["track_seed"]))
        envs.close()
    assert len(set(seen[0][1])) == 2
    assert np.array_equal(seen[0][0], seen[1][0]) and np.array_equal(seen[0][1], seen[1][1])


def test_evaluation_environment_has_no_training_parts():
    env = car_racing_env.make_env(2)
    while env is not env.unwrapped:
        assert not isinstance(env, car_racing_env.TrainingRewards)
        env = env.env
