"""Teacher parts (being built)."""

from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.box2d import car_racing as stock
from safetensors.torch import load_file
from torch import nn

import car_racing_env

TILES_AHEAD = 12  # track points the teacher sees; the camera shows about 10


class PrivilegedState(gym.Wrapper):
    """Replace the frame by what the simulator knows, float32 (15 + 2 * tiles_ahead,), roughly in [-1, 1].

    Car: forward and sideways speed, yaw rate, steering angle, four wheel speeds, four wheels on the road, offset from
    the middle of the road, sine and cosine of the heading against the road; then the next `tiles_ahead` points of the
    road in the car's frame. Neither time nor progress: nothing that the camera cannot show.
    """

    def __init__(self, env, tiles_ahead):
        super().__init__(env)
        self.tiles_ahead = tiles_ahead
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (15 + 2 * tiles_ahead,), np.float32)

    def reset(self, *, seed=None, options=None):
        _, info = self.env.reset(seed=seed, options=options)
        self.track = np.array(self.unwrapped.track)  # (N, 4): alpha, heading, x, y
        self.tile = 0
        return self.state(), info

    def step(self, action):
        _, reward, terminated, truncated, info = self.env.step(action)
        return self.state(), reward, terminated, truncated, info

    def state(self):
        car = self.unwrapped.car
        hull = car.hull
        sin, cos = np.sin(hull.angle), np.cos(hull.angle)
        to_car = np.array([[cos, -sin], [sin, cos]])  # columns: the car's right and forward
        position = np.array(hull.position)
        near = np.arange(self.tile - 8, self.tile + 17) % len(self.track)
        self.tile = int(near[np.square(self.track[near, 2:] - position).sum(1).argmin()])
        _, heading, x, y = self.track[self.tile]
        ahead = (self.tile + 1 + np.arange(self.tiles_ahead)) % len(self.track)
        offset = (position[0] - x) * np.cos(heading) + (position[1] - y) * np.sin(heading)
        right, forward = np.array(hull.linearVelocity) @ to_car
        return np.array(
            [
                forward / 50,
                right / 20,
                hull.angularVelocity / 3,
                car.wheels[0].joint.angle / 0.4,
                *(wheel.omega / 100 for wheel in car.wheels),
                *(bool(wheel.tiles) for wheel in car.wheels),
                offset / stock.TRACK_WIDTH,
                np.sin(heading - hull.angle),
                np.cos(heading - hull.angle),
                *((self.track[ahead, 2:] - position) @ to_car / 20).ravel(),
            ],
            dtype=np.float32,
        )


class RandomBursts(gym.Wrapper):
    """Now and then take over for 1 to `longest` decisions of random actions, so that recoveries are seen.

    Each decision starts a burst with probability `start`. `info["action"]` is the action that was really taken.
    """

    def __init__(self, env, seed, start, longest):
        super().__init__(env)
        self.rng, self.start, self.longest, self.left = np.random.default_rng(seed), start, longest, 0

    def reset(self, *, seed=None, options=None):
        self.left = 0
        return self.env.reset(seed=seed, options=options)

    def step(self, action):
        if not self.left and self.rng.random() < self.start:
            self.left = int(self.rng.integers(1, self.longest + 1))
            self.burst = int(self.rng.integers(5))
        if self.left:
            self.left -= 1
            action = self.burst
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated, truncated, info | {"action": action}


class Teacher(nn.Module):
    """The trained policy: an MLP from privileged state (B, S) to logits over the simulator's five actions (B, 5)."""

    def __init__(self, state_size, hidden_size=128):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(state_size, hidden_size), nn.Tanh(), nn.Linear(hidden_size, hidden_size), nn.Tanh(),
            nn.Linear(hidden_size, 5),
        )  # fmt: skip

    def forward(self, state):
        return self.net(state)
