"""Where the car is on the road, and putting it elsewhere.

Reads and writes nothing.
"""

import gymnasium as gym
import numpy as np
from gymnasium.envs.box2d.car_racing import TRACK_DETAIL_STEP


class Road:
    """Where on the road the car of an environment is: `look` sets the attributes anew.

    `tile` is the index of the nearest one in `track` (N, 4: alpha, heading, x, y), followed along the road, as tracks pass
    close to themselves; `offset` the distance from the middle, right positive; `heading` the road's; `travelled` the
    tiles' lengths driven along the road since `look` was first called, backwards negative.
    """

    def __init__(self, env):
        self.hull, self.track = env.unwrapped.car.hull, np.array(env.unwrapped.track)
        self.tile, self.travelled, self.along = None, 0.0, None
        self.look()

    def look(self):
        length, before, along_before = len(self.track), self.tile, self.along
        near = np.arange(length) if before is None else np.arange(before - 8, before + 17) % length
        position = np.array(self.hull.position)
        self.tile = int(near[np.square(self.track[near, 2:] - position).sum(1).argmin()])
        _, self.heading, x, y = self.track[self.tile]
        sin, cos = np.sin(self.heading), np.cos(self.heading)
        self.offset = (position[0] - x) * cos + (position[1] - y) * sin
        self.along = (-(position[0] - x) * sin + (position[1] - y) * cos) / TRACK_DETAIL_STEP
        if before is not None:
            tiles = (self.tile - before + length // 2) % length - length // 2
            self.travelled += tiles + self.along - along_before


class FollowRoad(gym.Wrapper):
    """Keep `road`, where on it the car is, up to date: it looks once after each decision, for all wrappers around it."""

    def reset(self, *, seed=None, options=None):
        obs, info = self.env.reset(seed=seed, options=options)
        self.road = Road(self)
        return obs, info

    def step(self, action):
        result = self.env.step(action)
        self.road.look()
        return result


def move_car(car, turn, shift=(0.0, 0.0), velocity=None):
    """Turn the car about its hull's centre by `turn` radians, counterclockwise, and shift it: a rigid motion of hull and wheels.

    Their velocities turn along, or become `velocity`, with wheels that roll at that speed.
    """
    centre, rotation = (
        np.array(car.hull.position),
        np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]),
    )
    for body in (car.hull, *car.wheels):
        body.position = tuple(map(float, centre + rotation @ (np.array(body.position) - centre) + shift))
        body.angle = float(body.angle + turn)
        moving = rotation @ np.array(body.linearVelocity) if velocity is None else velocity
        body.linearVelocity = tuple(map(float, moving))
        if velocity is not None:
            body.angularVelocity = 0.0
    if velocity is not None:
        forward = float(np.dot(velocity, (-np.sin(car.hull.angle), np.cos(car.hull.angle))))
        for wheel in car.wheels:
            wheel.omega = forward / wheel.wheel_rad
