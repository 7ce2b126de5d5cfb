"""Where the car is on the road, what else the simulator knows of it, and putting it elsewhere.

Reads and writes nothing. Units are the simulator's: of length Box2D's metre, of which the road is 13.3 wide; seconds;
radians.
"""

import math
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.envs.box2d.car_racing import TRACK_DETAIL_STEP, TRACK_WIDTH

TILES_AHEAD = 12  # points of the road in a state; the camera shows about 10 of a straight one before the car
STATE_SIZE = 15 + 2 * TILES_AHEAD
BEHIND, AHEAD = 8, 16  # tiles on either side of the nearest one, among which the next nearest is looked for


class Road:
    """Where on the road the car of an environment is: `look` sets the attributes anew.

    `tile` is the index of the nearest one in `track` (N, 4: alpha, heading, x, y), followed along the road, as tracks
    pass close to themselves; a car beside the road and twice as close to another stretch of it took a short cut, of
    which there were `short_cuts`, and is followed there. `offset` is the distance from the middle, right positive;
    `heading` the road's, `along` how far past the tile it is, in tiles; `travelled` the tiles' lengths driven along the
    road since `look` was first called, backwards negative, short cuts not counted.
    """

    def __init__(self, env):
        self.hull, self.track = env.unwrapped.car.hull, np.array(env.unwrapped.track)
        # twice round, so that any stretch of the track is a slice
        self.x, self.y = np.concatenate([self.track, self.track])[:, 2:].T.copy()
        self.tile, self.travelled, self.along, self.short_cuts = None, 0.0, None, 0
        self.look()

    def look(self):
        length, before, along_before = len(self.track), self.tile, self.along
        position = self.hull.position
        around = (0, length) if before is None else ((before - BEHIND) % length, BEHIND + 1 + AHEAD)
        self.tile, distance = self._nearest(position, *around)
        if distance > 2 * TRACK_WIDTH:
            tile, distance_there = self._nearest(position, 0, length)
            if distance_there < distance / 2:
                self.tile, before, self.short_cuts = tile, None, self.short_cuts + 1
        _, self.heading, x, y = self.track[self.tile].tolist()
        sin, cos = math.sin(self.heading), math.cos(self.heading)
        self.offset = (position.x - x) * cos + (position.y - y) * sin
        self.along = (-(position.x - x) * sin + (position.y - y) * cos) / TRACK_DETAIL_STEP
        if before is not None:
            tiles = (self.tile - before + length // 2) % length - length // 2
            self.travelled += tiles + self.along - along_before

    def _nearest(self, position, first, count):
        """Which of `count` tiles from `first` on is the nearest, and how far away its middle is."""
        tiles = slice(first, first + count)
        x, y = self.x[tiles] - position.x, self.y[tiles] - position.y
        squares = x * x + y * y
        nearest = int(squares.argmin())
        return (first + nearest) % len(self.track), math.sqrt(squares[nearest])


class State(NamedTuple):
    """What the simulator knows of cars, read from their encoded states (..., STATE_SIZE), numpy or torch."""

    forward: Any  # speed along the car, (...)
    right: Any  # and across it, (...)
    yaw_rate: Any  # left is positive, (...)
    steering: Any  # of the front wheels, left is positive, (...)
    wheel_speeds: Any  # radians per second, (..., 4), the rear ones last
    wheels_on_road: Any  # 0 or 1, (..., 4)
    offset: Any  # from the middle of the road, right is positive, (...)
    sin_heading: Any  # of the road's direction against the car's, left is positive, (...)
    cos_heading: Any  # (...)
    ahead: Any  # the next points of the road in the car's frame, right and forward, (..., TILES_AHEAD, 2)


def encode_state(env):
    """The car's `State` of this moment as the teacher reads it, float32 (STATE_SIZE,), roughly in [-1, 1].

    Neither time nor progress. The camera shows a little less: the last points, and those behind a turned car, lie
    outside.
    """
    car, road = env.unwrapped.car, env.get_wrapper_attr("road")
    hull, angle, velocity, position = car.hull, car.hull.angle, car.hull.linearVelocity, car.hull.position
    sin, cos = math.sin(angle), math.cos(angle)  # the car's right is (cos, sin), its forward (-sin, cos)
    ahead = slice(road.tile + 1, road.tile + 1 + TILES_AHEAD)
    x, y = road.x[ahead] - position.x, road.y[ahead] - position.y
    state = np.empty(STATE_SIZE, np.float32)
    state[:15] = (
        (velocity.y * cos - velocity.x * sin) / 50,
        (velocity.x * cos + velocity.y * sin) / 20,
        hull.angularVelocity / 3,
        car.wheels[0].joint.angle / 0.4,
        *(wheel.omega / 100 for wheel in car.wheels),
        *(bool(wheel.tiles) for wheel in car.wheels),
        road.offset / TRACK_WIDTH,
        math.sin(road.heading - angle),
        math.cos(road.heading - angle),
    )
    state[15::2], state[16::2] = (x * cos + y * sin) / 20, (y * cos - x * sin) / 20
    return state


def read_state(states):
    """The `State` that `encode_state` encoded, of one or several (..., STATE_SIZE)."""
    return State(
        forward=50 * states[..., 0],
        right=20 * states[..., 1],
        yaw_rate=3 * states[..., 2],
        steering=0.4 * states[..., 3],
        wheel_speeds=100 * states[..., 4:8],
        wheels_on_road=states[..., 8:12],
        offset=TRACK_WIDTH * states[..., 12],
        sin_heading=states[..., 13],
        cos_heading=states[..., 14],
        ahead=20 * states[..., 15:STATE_SIZE].reshape(*states.shape[:-1], TILES_AHEAD, 2),
    )


class FollowRoad(gym.Wrapper):
    """Keep `road`, where on it the car is, up to date: it looks once after each decision, for all wrappers."""

    def reset(self, *, seed=None, options=None):
        obs, info = self.env.reset(seed=seed, options=options)
        self.road = Road(self)
        return obs, info

    def step(self, action):
        result = self.env.step(action)
        self.road.look()
        return result


def move_car(car, turn, shift=(0.0, 0.0), velocity=None):
    """Turn car and wheels by `turn` radians about the hull's centre, counterclockwise, and shift them.

    Their velocities turn along, or become `velocity`, with wheels that roll at that speed.
    """
    centre = np.array(car.hull.position)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
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
