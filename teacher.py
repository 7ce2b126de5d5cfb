"""The trained policy that drives stage 1: it reads the simulator's state instead of pictures.

Reads offline/teacher.safetensors, made by `python -m offline.train_teacher`. Also here: that state, and the random bursts
that push a driver off its line so that its recoveries are seen.
"""

import gymnasium as gym
import numpy as np
from gymnasium.envs.box2d.car_racing import TRACK_WIDTH
from torch import nn

from car_racing_env import FRAME_SKIP, make_env
from support.checks import BadInput, read_weights
from support.run_files import ROOT

TEACHER = "offline/teacher.safetensors"
TILES_AHEAD = 12  # track points the teacher sees; the camera shows about 10
STATE_SIZE = 15 + 2 * TILES_AHEAD


class PrivilegedState(gym.Wrapper):
    """Add `info["state"]`: what the simulator knows, float32 (STATE_SIZE,), roughly in [-1, 1].

    Car: forward and sideways speed, yaw rate, steering angle, four wheel speeds, four wheels on the road, offset from
    the middle of the road, sine and cosine of the heading against the road; then the next TILES_AHEAD points of the
    road in the car's frame. Neither time nor progress: nothing that the camera cannot show.
    """

    def reset(self, *, seed=None, options=None):
        obs, info = self.env.reset(seed=seed, options=options)
        self.track = np.array(self.unwrapped.track)  # (N, 4): alpha, heading, x, y
        self.tile = None  # the nearest one, followed along the road: tracks can pass close to themselves
        return obs, info | {"state": self.state()}

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated, truncated, info | {"state": self.state()}

    def state(self):
        """The privileged state of this moment."""
        car = self.unwrapped.car
        hull = car.hull
        sin, cos = np.sin(hull.angle), np.cos(hull.angle)
        to_car = np.array([[cos, -sin], [sin, cos]])  # columns: the car's right and forward
        position = np.array(hull.position)
        near = np.arange(len(self.track)) if self.tile is None else np.arange(self.tile - 8, self.tile + 17)
        near %= len(self.track)
        self.tile = int(near[np.square(self.track[near, 2:] - position).sum(1).argmin()])
        _, heading, x, y = self.track[self.tile]
        ahead = (self.tile + 1 + np.arange(TILES_AHEAD)) % len(self.track)
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
                offset / TRACK_WIDTH,
                np.sin(heading - hull.angle),
                np.cos(heading - hull.angle),
                *((self.track[ahead, 2:] - position) @ to_car / 20).ravel(),
            ],
            dtype=np.float32,
        )


class RandomBursts(gym.Wrapper):
    """Now and then take over for 1 to `longest` decisions with one random action, so that recoveries are seen.

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
    """An MLP from privileged state (B, STATE_SIZE) to logits over the simulator's five actions (B, 5)."""

    def __init__(self, state_size=STATE_SIZE, hidden_size=128):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(state_size, hidden_size),
            nn.Tanh(),
            nn.Linear(hidden_size, hidden_size),
            nn.Tanh(),
            nn.Linear(hidden_size, 5),
        )

    def forward(self, state):
        return self.net(state)


def load_teacher(path=TEACHER):
    """The teacher from its safetensors file, ready to act."""
    path = ROOT / path
    if not path.exists():
        raise BadInput(f"no teacher in {path}: restore it with git checkout, or run python -m offline.train_teacher")
    weights = read_weights(path)
    teacher = Teacher(weights["net.0.weight"].shape[1], weights["net.0.weight"].shape[0])
    teacher.load_state_dict(weights)
    return teacher.eval().requires_grad_(False)


def make_evaluation_env(frame_skip=FRAME_SKIP, **kwargs):
    """The plain task with the privileged state in `info`, which only the teacher reads."""
    return PrivilegedState(make_env(frame_skip, **kwargs))
