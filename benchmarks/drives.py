"""Drives that are measured: what the car did, decision by decision, told something or turned round in mid-drive."""

import copy
import functools
from concurrent.futures import ThreadPoolExecutor

import gymnasium as gym
import numpy as np

import evaluate
from car_racing_env import make_env
from road import move_car, read_state
from support import processes
from teacher import PrivilegedState


class TurnedRound(gym.Wrapper):
    """Turn the car by `angle` radians before decision `when`, its velocity with it: a rigid motion.

    `info` has `travelled` and `short_cuts` of the `Road` that it is on.
    """

    def __init__(self, env, angle, when):
        super().__init__(env)
        self.angle, self.when = angle, when

    def reset(self, *, seed=None, options=None):
        self.decision = 0
        return self.env.reset(seed=seed, options=options)

    def step(self, action):
        if self.decision == self.when and self.angle:
            move_car(self.unwrapped.car, self.angle)
        self.decision += 1
        obs, reward, terminated, truncated, info = self.env.step(action)
        road = self.get_wrapper_attr("road")
        way = {"travelled": road.travelled, "short_cuts": road.short_cuts}
        return obs, reward, terminated, truncated, info | way


def make_probe(angle, when):
    """The plain task with the privileged state in `info`, the car turned round once."""
    return PrivilegedState(TurnedRound(make_env(), angle, when))


def drive(driver, tracks, decisions, says, angles=None, when=0):
    """One drive on each of the N `tracks`, side by side; returns a dict of arrays (decisions, N).

    `says` maps decisions to what the driver is told from then on, one for all or a list with one for each. Cars are
    turned by `angles`, radians, before decision `when`. `speed` and `along` (the road) in units per second, `offset` in
    units, `on_road`, `travelled` (tiles' lengths along the road) and `short_cuts` so far, `driving` (False once the
    episode has ended) and `left_field` (True from when it ended there on).
    """
    angles = [0.0] * len(tracks) if angles is None else angles

    makers, count = [functools.partial(make_probe, angle, when) for angle in angles], evaluate.NUM_WORKERS

    def share(first, envs):
        told = {decision: x[first::count] if isinstance(x, list) else x for decision, x in says.items()}
        return drive_all(copy.copy(driver), envs, tracks[first::count], decisions, told)

    with ThreadPoolExecutor(count) as pool, processes.simulators(makers, "DISABLED", count) as workers:
        shares = list(pool.map(share, range(count), workers))
    results = {name: np.empty((decisions, len(tracks)), x.dtype) for name, x in shares[0].items()}
    for name, result in results.items():
        for first, part in enumerate(shares):
            result[:, first::count] = part[name]
    return results


def drive_all(driver, envs, tracks, decisions, says):
    """`drive` in the environments of one worker; `driver` is told, and changed by it."""
    rows, driving, left_field = [], np.ones(len(tracks), dtype=bool), np.zeros(len(tracks), dtype=bool)
    frames, infos = envs.reset(seed=list(tracks))
    for decision in range(decisions):
        if decision in says:
            evaluate.tell(driver, says[decision])
        frames, _, terminated, truncated, infos = envs.step(driver(frames, infos))
        done = terminated | truncated
        left_field = left_field | (driving & terminated & ~infos.get("lap_finished", np.ones(len(tracks), dtype=bool)))
        ways = {name: infos[name] for name in ("travelled", "short_cuts")}
        rows.append(measure(infos["state"]) | ways | {"driving": driving, "left_field": left_field})
        driving = driving & ~done
        if done.any():  # it idles
            frames, infos = envs.restart(tracks, done, infos)
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def measure(states):
    """What privileged states (N, STATE_SIZE) say of speed, offset and road: a dict of arrays (N,)."""
    cars = read_state(states)
    return {
        "speed": np.hypot(cars.forward, cars.right),
        "along": cars.forward * cars.cos_heading - cars.right * cars.sin_heading,
        "offset": cars.offset,
        "on_road": cars.wheels_on_road.any(1),
    }
