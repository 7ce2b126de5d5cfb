"""The simulator's speed against Gymnasium's own class and, if it is installed, EnvPool.

Reads offline/teacher.safetensors. Writes its claims to benchmarks/results.json. The drive is the teacher's with random
bursts, recorded once and replayed by everyone, so that all draw the same scenes; resets are not timed.

    pip install envpool                 # optional
    python -m benchmarks.simulator      # 3 minutes
"""

import itertools
import multiprocessing
import time

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.box2d.car_racing import CarRacing

import car_racing_env
from benchmarks import compare
from car_racing_env import FRAME_SKIP, MAX_FRAMES
from perturbations import RandomBursts
from support import checks
from teacher import PrivilegedState, load_teacher

TRACKS = range(8)
IDENTICAL_TRACKS, IDENTICAL_FRAMES = range(1000, 1020), 500  # 10,000 frames on 20 tracks
FRAMES = 100  # a round and process
START = 60  # first timed frame: the 50 before zoom in


def record_drive(track, frames):
    """The simulator actions, one a frame, of the teacher with random bursts on one track."""
    env = PrivilegedState(RandomBursts(car_racing_env.make_env(1, draw=False), track, 0.04, 7))
    teacher = load_teacher()
    _, info = env.reset(seed=track)
    actions, done = [], False
    while len(actions) < frames and not done:
        if len(actions) % FRAME_SKIP == 0:
            choice = int(teacher.act(info["state"][None])[0])
        _, _, terminated, truncated, info = env.step(choice)
        actions.append(info["action"])
        done = terminated or truncated
    return actions


class PlainSkip(gym.Wrapper):
    """Frame skip as it is usually written: every frame is drawn, the last one returned."""

    def step(self, action):
        total = 0.0
        for _ in range(FRAME_SKIP):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += reward
            if terminated or truncated:
                break
        return obs, total, terminated, truncated, info


def stock_env():
    return gym.wrappers.TimeLimit(CarRacing(continuous=False), MAX_FRAMES)


def plain_skip_env():
    return PlainSkip(stock_env())


def timed_drive(env, skip, drives):
    """Rounds of FRAMES frames from frame START on, a track each; yields the ms a frame of the steps alone."""
    for track in itertools.cycle(range(len(drives))):
        env.reset(seed=track)
        actions = drives[track][::skip]
        for action in actions[: START // skip]:
            env.step(action)
        began = time.perf_counter()
        for action in actions[START // skip : (START + FRAMES) // skip]:
            env.step(action)
        yield 1e3 * (time.perf_counter() - began) / FRAMES


def check_identity():
    """Every pixel of 10,000 frames on 20 tracks against the stock class; raises if one differs."""
    fast, stock, frames = car_racing_env.make_env(1), stock_env(), 0
    for track in IDENTICAL_TRACKS:
        same = [np.array_equal(fast.reset(seed=track)[0], stock.reset(seed=track)[0])]
        for action in record_drive(track, IDENTICAL_FRAMES - 1):
            same.append(np.array_equal(fast.step(action)[0], stock.step(action)[0]))
        frames += len(same)
        if not all(same):
            raise AssertionError(f"track {track}: {len(same) - sum(same)} of {len(same)} frames differ")
    print(f"{frames:,} frames on {len(IDENTICAL_TRACKS)} tracks are pixel-identical", flush=True)
    return frames


def worker(make, skip, drives, pipe):
    """A process that does a round whenever it is asked."""
    rounds = timed_drive(make(), skip, drives)
    while pipe.recv():
        pipe.send(next(rounds))


def two_workers(make, skip, drives):
    """Rounds of two processes at the same time; yields half the mean of their ms a frame, as they make two at once."""
    pipes = []
    for _ in range(2):
        ours, theirs = multiprocessing.Pipe()
        multiprocessing.Process(target=worker, args=(make, skip, drives, theirs), daemon=True).start()
        pipes.append(ours)
    while True:
        for pipe in pipes:
            pipe.send(True)
        yield float(np.mean([pipe.recv() for pipe in pipes])) / 2


def two_of_envpool(envpool):
    """Rounds of EnvPool's C++ CarRacing, two environments on two threads, which repeat no action."""
    envs = envpool.make_gymnasium("CarRacing-v3", num_envs=2, num_threads=2, seed=0)
    envs.reset()
    for _ in range(START):
        envs.step(np.tile(np.float32([0, 0.2, 0]), (2, 1)))
    for start in itertools.count(0, FRAMES):
        began = time.perf_counter()
        for t in range(start, start + FRAMES):
            steer = 0.6 * ((t // 10) % 3 - 1)
            envs.step(np.tile(np.float32([steer, 0.2, 0]), (2, 1)))
        yield 1e3 * (time.perf_counter() - began) / (2 * FRAMES)


def in_turns(peer, ours):
    """Costs of ROUNDS alternating rounds after one to warm up."""
    pairs = [(next(peer), next(ours)) for _ in range(compare.ROUNDS + 1)]
    return zip(*pairs[1:])


def main():
    torch.set_num_threads(1)
    drives = [record_drive(track, START + FRAMES) for track in TRACKS]
    costs = in_turns(timed_drive(stock_env(), 1, drives), timed_drive(car_racing_env.make_env(1), 1, drives))
    identical = check_identity()
    compare.record(
        "drawn frame: FastCarRacing vs Gymnasium CarRacing", "ms_per_frame", *costs, identical_frames=identical
    )
    ours = two_workers(car_racing_env.make_env, FRAME_SKIP, drives)
    costs = in_turns(two_workers(plain_skip_env, FRAME_SKIP, drives), ours)
    compare.record("frame, skip 2, two workers: ours vs Gymnasium with a plain skip", "ms_per_frame", *costs)
    try:
        import envpool
    except ImportError:
        return
    note = f"EnvPool {envpool.__version__}: C++, two threads, continuous actions, other pixels, every frame drawn; "
    note += "steering swings left and right"
    costs = in_turns(two_of_envpool(envpool), ours)
    compare.record("frame, skip 2, two workers: ours vs EnvPool CarRacing-v3", "ms_per_frame", *costs, note=note)


if __name__ == "__main__":
    checks.run(main)
