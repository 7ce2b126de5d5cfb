"""The simulator's speed against Gymnasium's own class and, if it is installed, EnvPool.

Reads offline/teacher.safetensors. Writes its claims to benchmarks/results.json. The drive is the teacher's with random
bursts, recorded once and replayed by everyone, so that all draw the same scenes; resets are not timed.

    pip install envpool                 # optional
    python -m benchmarks.simulator      # 3 minutes
"""

import multiprocessing
import time

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.box2d.car_racing import CarRacing

import car_racing_env
import collect_captions
from benchmarks import compare

TRACKS = range(8)
IDENTICAL_TRACKS, IDENTICAL_FRAMES = range(1000, 1020), 500  # 10,000 frames on 20 tracks
FRAMES = 100  # a round and process
START = 60  # first timed frame: the 50 before zoom in


def record_drive(track, frames):
    """The simulator actions, one a frame, of the teacher with random bursts on one track."""
    env = collect_captions.RandomBursts(car_racing_env.make_env(1, draw=False), track, 0.04, 7)
    env = collect_captions.PrivilegedState(env, collect_captions.TILES_AHEAD)
    teacher = collect_captions.load_teacher()
    _, info = env.reset(seed=track)
    actions, done = [], False
    while len(actions) < frames and not done:
        if len(actions) % car_racing_env.FRAME_SKIP == 0:
            choice = int(teacher(torch.from_numpy(info["state"])[None]).argmax())
        _, _, terminated, truncated, info = env.step(choice)
        actions.append(info["action"])
        done = terminated or truncated
    return actions


def stock_env():
    return gym.wrappers.TimeLimit(CarRacing(continuous=False), car_racing_env.MAX_FRAMES)


class PlainSkip(gym.Wrapper):
    """Frame skip as it is usually written: every frame is drawn, the last one returned."""

    def step(self, action):
        total = 0.0
        for _ in range(car_racing_env.FRAME_SKIP):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += reward
            if terminated or truncated:
                break
        return obs, total, terminated, truncated, info


def timed_drive(env, skip, drives):
    """A round: FRAMES frames of the next track from frame START on; `seconds` holds the time of its steps alone."""
    state = {"track": 0}

    def round_():
        track = state["track"] % len(drives)
        state["track"] += 1
        env.reset(seed=track)
        actions = drives[track][::skip]
        for action in actions[: START // skip]:
            env.step(action)
        began = time.perf_counter()
        for action in actions[START // skip : (START + FRAMES) // skip]:
            env.step(action)
        return 1e3 * (time.perf_counter() - began) / FRAMES

    return round_


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
    round_ = timed_drive(make(), skip, drives)
    while pipe.recv():
        pipe.send(round_())


def two_workers(make, skip, drives):
    """Two processes that step at the same time; a round's cost is the mean ms per frame and process, over two."""
    pipes = []
    for _ in range(2):
        ours, theirs = multiprocessing.Pipe()
        multiprocessing.Process(target=worker, args=(make, skip, drives, theirs), daemon=True).start()
        pipes.append(ours)

    def round_():
        for pipe in pipes:
            pipe.send(True)
        return float(np.mean([pipe.recv() for pipe in pipes])) / 2

    return round_


def plain_skip_env():
    return PlainSkip(stock_env())


def skip_env():
    return car_racing_env.make_env(car_racing_env.FRAME_SKIP)


def envpool_rounds():
    """EnvPool's C++ CarRacing, two environments on two threads, the same action repeat; None if it is not installed."""
    try:
        import envpool
    except ImportError:
        return None
    envs = envpool.make_gymnasium("CarRacing-v3", num_envs=2, num_threads=2, seed=0)
    envs.reset()
    for _ in range(START):
        envs.step(np.tile(np.float32([0, 0.2, 0]), (2, 1)))
    state = {"t": 0}

    def round_():
        began = time.perf_counter()
        for _ in range(FRAMES):
            steer = 0.6 * ((state["t"] // 10) % 3 - 1)
            state["t"] += 1
            envs.step(np.tile(np.float32([steer, 0.2, 0]), (2, 1)))
        return 1e3 * (time.perf_counter() - began) / (2 * FRAMES)

    return round_


def rounds(peer, ours):
    """Costs of ROUNDS alternating rounds after one to warm up."""
    pairs = [(peer(), ours()) for _ in range(compare.ROUNDS + 1)]
    return zip(*pairs[1:])


def main():
    torch.set_num_threads(1)
    skip = car_racing_env.FRAME_SKIP
    drives = [record_drive(track, START + FRAMES) for track in TRACKS]
    held = [[actions[i - i % skip] for i in range(len(actions))] for actions in drives]  # one action a decision
    peer, ours = rounds(timed_drive(stock_env(), 1, drives), timed_drive(car_racing_env.make_env(1), 1, drives))
    identical = check_identity()
    compare.record(
        "drawn frame: FastCarRacing vs Gymnasium CarRacing", "ms_per_frame", peer, ours, identical_frames=identical
    )
    ours_round = two_workers(skip_env, skip, held)
    peer, ours = rounds(two_workers(plain_skip_env, skip, held), ours_round)
    compare.record("frame, skip 2, two workers: ours vs Gymnasium with a plain skip", "ms_per_frame", peer, ours)
    envpool_round = envpool_rounds()
    if envpool_round:
        peer, ours = rounds(envpool_round, ours_round)
        compare.record(
            "frame, skip 2, two workers: ours vs EnvPool CarRacing-v3", "ms_per_frame", peer, ours,
            note="EnvPool: C++, two threads, continuous actions, other pixels, every frame drawn; steering swings left and right",
        )  # fmt: skip


if __name__ == "__main__":
    main()
