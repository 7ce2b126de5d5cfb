"""The trained policy that drives stage 1: it reads the simulator's state instead of pictures.

Reads offline/teacher.safetensors, made by `python -m offline.train_teacher`. Beside the state it is given a target
(instructions.py): a speed, a side of the road, standing still, or none, when it races.
"""

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.box2d.car_racing import TRACK_WIDTH
from torch import nn
from torch.nn import functional as F

from car_racing_env import FRAME_SKIP, make_env
from instructions import RACE, SIDE, TARGET_SIZE, Target
from support.checks import BadInput, read_weights
from support.run_files import ROOT

TEACHER = "offline/teacher.safetensors"
TILES_AHEAD = 12  # track points the teacher sees; the camera shows about 10
STATE_SIZE = 15 + 2 * TILES_AHEAD
GAS_GOVERNOR = 20.0  # added to the logit of gas, at most
BRAKE_GOVERNOR = 60.0  # added to that of the brake; by 20 the net had learned to coast on at 40 whatever it was told
TOLERATED = 2.0  # units per second above the speed asked for that are not braked away: coasting does not get slower
BACKWARDS = -0.9  # cosine of the heading against the road below which a car faces the wrong way
CRAWL = 4.0  # units per second: slower is standing
RACE_LIMIT = 80.0  # units per second: it needs no more, and who copies it must see it brake (LOG.md)
CRUISE = 45.0  # units per second, at most, when told a side and no speed: a racing line needs the whole road
SIDE_GOVERNOR = 20.0  # added to the logits of right and left, at most
SHARPNESS = 10.0  # of it, per radian between the car's heading and the point it aims at
DAMPING = 0.1  # seconds: a car that already turns there is steered less


class PrivilegedState(gym.Wrapper):
    """Add `info["state"]`: what the simulator knows, float32 (STATE_SIZE,), roughly in [-1, 1].

    Car: forward and sideways speed, yaw rate, steering angle, four wheel speeds, four wheels on the road, offset from
    the middle of the road, sine and cosine of the heading against the road; then the next TILES_AHEAD points of the
    road in the car's frame. Neither time nor progress: nothing that the camera cannot show.
    """

    def reset(self, *, seed=None, options=None):
        obs, info = self.env.reset(seed=seed, options=options)
        return obs, info | {"state": self.state()}

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated, truncated, info | {"state": self.state()}

    def state(self):
        """The privileged state of this moment."""
        car, road = self.unwrapped.car, self.get_wrapper_attr("road")
        hull = car.hull
        sin, cos = np.sin(hull.angle), np.cos(hull.angle)
        to_car = np.array([[cos, -sin], [sin, cos]])  # columns: the car's right and forward
        ahead = (road.tile + 1 + np.arange(TILES_AHEAD)) % len(road.track)
        right, forward = np.array(hull.linearVelocity) @ to_car
        return np.array(
            [
                forward / 50,
                right / 20,
                hull.angularVelocity / 3,
                car.wheels[0].joint.angle / 0.4,
                *(wheel.omega / 100 for wheel in car.wheels),
                *(bool(wheel.tiles) for wheel in car.wheels),
                road.offset / TRACK_WIDTH,
                np.sin(road.heading - hull.angle),
                np.cos(road.heading - hull.angle),
                *((road.track[ahead, 2:] - np.array(hull.position)) @ to_car / 20).ravel(),
            ],
            dtype=np.float32,
        )


def mlp(inputs, outputs, hidden_size=192):
    """Two hidden layers."""
    return nn.Sequential(
        nn.Linear(inputs, hidden_size),
        nn.Tanh(),
        nn.Linear(hidden_size, hidden_size),
        nn.Tanh(),
        nn.Linear(hidden_size, outputs),
    )


class Teacher(nn.Module):
    """An MLP from privileged state and target (B, STATE_SIZE + TARGET_SIZE) to logits over the simulator's actions (B, 5).

    Under a target speed a governor adds to them: brake and no gas when too fast or told to stand, gas when too slow. A policy
    that races already takes millions of decisions to find out that it could be slow. Told no speed it is held to RACE_LIMIT,
    told a side to CRUISE; it gives gas when it stands, and does not brake while it faces the wrong way: it would stand there
    for good, steering. Told a side another governor steers at a point of it two tiles ahead (pure pursuit, Coulter 1992,
    CMU-RI-TR-92-01): the net alone swings around the middle of the road, within a third of its width three quarters of the time.
    """

    def __init__(self):
        super().__init__()
        self.net = mlp(STATE_SIZE + TARGET_SIZE, 5)

    def forward(self, state_and_target):
        speed = state_and_target[:, 0]  # forward; speeds are in units of 50 here
        told, target, stop, side = state_and_target[:, STATE_SIZE : STATE_SIZE + 4].T
        limit = torch.where(told > 0, target, torch.where(side > 0, CRUISE, RACE_LIMIT) / 50)
        excess = speed - limit
        push = -torch.tanh(20 * excess) * (1 - stop)
        push = torch.where(told > 0, push, push.clamp(max=0))  # told no speed it is held back only, not driven
        lost = (state_and_target[:, 14] < BACKWARDS) * (1 - told)
        stands = (torch.hypot(50 * speed, 20 * state_and_target[:, 1]) < CRAWL) * (1 - told)
        gas = GAS_GOVERNOR * (push + stands) - BRAKE_GOVERNOR * stop
        too_fast = torch.tanh(20 * (excess - TOLERATED / 50)).clamp(min=0) * (1 - stop) + stop
        brake = BRAKE_GOVERNOR * too_fast - GAS_GOVERNOR * lost
        zero = torch.zeros_like(speed)
        right = SIDE_GOVERNOR * side * self.pursuit(state_and_target) * (speed > CRAWL / 50)
        return self.net(state_and_target) + torch.stack([zero, right, -right, gas, brake], 1)

    def pursuit(self, state_and_target):
        """How much further right the car should turn for its side of the road, from -1 to 1: (B,)."""
        near, far = (20 * state_and_target[:, 17:21]).unflatten(1, (2, 2)).unbind(1)  # the second and third point ahead
        along = F.normalize(far - near, dim=1)
        to_the_right = torch.stack([along[:, 1], -along[:, 0]], 1) * SIDE * state_and_target[:, STATE_SIZE + 4, None]
        right, forward = ((near + far) / 2 + to_the_right).unbind(1)
        angle, yaw_rate = torch.atan2(right, forward.clamp(min=0.5)), 3 * state_and_target[:, 2]  # left is positive
        return torch.tanh(SHARPNESS * (angle + DAMPING * yaw_rate))

    @torch.no_grad()
    def act(self, states, targets=RACE):
        """The simulator's actions, int64 numpy (B,), for states float32 numpy (B, STATE_SIZE).

        `targets` is one `Target` for all, or a list with one for each; a single state is repeated for them.
        """
        targets = [targets] * len(states) if isinstance(targets, Target) else targets
        encoded = np.stack([target.encode() for target in targets])
        states = np.broadcast_to(states, (len(encoded), states.shape[1]))
        return self(torch.from_numpy(np.concatenate([states, encoded], 1))).argmax(1).numpy()


def load_teacher(path=TEACHER):
    """The teacher from its safetensors file, ready to act."""
    path = ROOT / path
    if not path.exists():
        raise BadInput(f"no teacher in {path}: restore it with git checkout, or run python -m offline.train_teacher")
    teacher = Teacher()
    teacher.load_state_dict(read_weights(path))
    return teacher.eval().requires_grad_(False)


def make_evaluation_env(frame_skip=FRAME_SKIP, **kwargs):
    """The plain task with the privileged state in `info`, which only the teacher and measurements read."""
    return PrivilegedState(make_env(frame_skip, **kwargs))
