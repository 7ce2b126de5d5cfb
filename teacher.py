"""The trained policy that drives stage 1: it reads the simulator's state instead of pictures.

Reads offline/teacher.safetensors, made by `python -m offline.train_teacher`. Beside the state it is given a target
(targets.py): a speed, a side of the road, standing still, or none, when it races.
"""

import gymnasium as gym
import numpy as np
import torch
from torch import nn

from car_racing_env import BRAKE, FRAME_SKIP, GAS, LEFT, RIGHT, make_env
from road import STATE_SIZE, encode_state, read_state
from support.checks import BadInput, check_shapes, read_weights
from support.run_files import ROOT
from targets import RACE, SIDE, SPEED_SCALE, TARGET_SIZE, Target

TEACHER = "offline/teacher.safetensors"
GAS_GOVERNOR = 20.0  # added to the logit of gas, at most; taken from the brake's where the car faces backwards
BRAKE_GOVERNOR = 60.0  # added to that of the brake; 20 was too little against a net that had learned to coast on at 40
TOLERATED = 2.0  # units per second above the speed asked for that are not braked away: coasting does not get slower
BACKWARDS = -0.7  # cosine of the heading against the road below which a car faces the wrong way
CRAWL = 4.0  # units per second: slower is standing
RACE_LIMIT = 85.0  # units per second: it needs no more, and who copies it must see it brake (LOG.md)
CRUISE = 45.0  # units per second, at most, when told a side and no speed: a racing line needs the whole road
SIDE_GOVERNOR = 20.0  # added to the logits of right and left, at most
SHARPNESS = 10.0  # of its tanh, per radian between the car's heading and the point it aims at
DAMPING = 0.1  # seconds: a car that already turns there is steered less


class PrivilegedState(gym.Wrapper):
    """Add `info["state"]`, what the simulator knows: `road.encode_state`, float32 (STATE_SIZE,)."""

    def reset(self, *, seed=None, options=None):
        obs, info = self.env.reset(seed=seed, options=options)
        return obs, info | {"state": encode_state(self)}

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated, truncated, info | {"state": encode_state(self)}


def mlp(inputs, outputs):
    """Two hidden layers: the teacher's, and in its training the critic's."""
    hidden_size = 192
    return nn.Sequential(
        nn.Linear(inputs, hidden_size),
        nn.Tanh(),
        nn.Linear(hidden_size, hidden_size),
        nn.Tanh(),
        nn.Linear(hidden_size, outputs),
    )


def governors(state_and_target):
    """What is added to the net's logits, float32 (B, 5): numpy, as torch takes several times as long for one car.

    Under a target speed it is brake and no gas when too fast or told to stand, gas when too slow. A policy that races
    already takes millions of decisions to find out that it could be slow. Told no speed the car is held to RACE_LIMIT,
    told a side to CRUISE; it is given gas when it stands, and does not brake while it faces the wrong way: it would
    stand there for good, steering. Told a side it is steered at a point of it two to three tiles ahead (`pursuit`): the
    net alone swings around the middle of the road, within a third of its width three quarters of the time.
    """
    car, target = read_state(state_and_target), state_and_target[:, STATE_SIZE:]
    has_speed, speed, stop, has_side, side = target.T  # as Target.encode says
    limit = np.where(has_speed > 0, SPEED_SCALE * speed, np.where(has_side > 0, CRUISE, RACE_LIMIT))
    excess = car.forward - limit
    push = -np.tanh(0.4 * excess) * (1 - stop)
    push = np.where(has_speed > 0, push, np.minimum(push, 0))  # told no speed it is held back only, not driven
    lost = (car.cos_heading < BACKWARDS) * (1 - has_speed)
    stands = (np.hypot(car.forward, car.right) < CRAWL) * (1 - has_speed)
    too_fast = np.maximum(np.tanh(0.4 * (excess - TOLERATED)), 0) * (1 - stop) + stop
    added = np.zeros((len(target), 5), np.float32)
    added[:, RIGHT] = SIDE_GOVERNOR * has_side * pursuit(car, SIDE * side) * (car.forward > CRAWL)
    added[:, LEFT] = -added[:, RIGHT]
    added[:, GAS] = GAS_GOVERNOR * (push + stands) - BRAKE_GOVERNOR * stop
    added[:, BRAKE] = BRAKE_GOVERNOR * too_fast - GAS_GOVERNOR * lost
    return added


def pursuit(car, side):
    """How much further right the cars should turn to drive at the offsets `side` (B,), from -1 to 1: (B,).

    Pure pursuit (Coulter 1992, CMU-RI-TR-92-01).
    """
    (near_right, near_forward), (far_right, far_forward) = car.ahead[:, 1].T, car.ahead[:, 2].T
    right, forward = far_right - near_right, far_forward - near_forward
    scale = side / np.maximum(np.hypot(right, forward), 1e-6)
    aim_right = (near_right + far_right) / 2 + forward * scale
    aim_forward = (near_forward + far_forward) / 2 - right * scale
    angle = np.arctan2(aim_right, np.maximum(aim_forward, 0.5))
    return np.tanh(SHARPNESS * (angle + DAMPING * car.yaw_rate))


class Teacher(nn.Module):
    """An MLP from state and target (B, STATE_SIZE + TARGET_SIZE) to logits of the simulator's actions (B, 5).

    `governors` add to them.
    """

    def __init__(self):
        super().__init__()
        self.net = mlp(STATE_SIZE + TARGET_SIZE, 5)

    def forward(self, state_and_target):
        return self.net(state_and_target) + torch.from_numpy(governors(state_and_target.numpy()))

    @torch.no_grad()
    def act(self, states, targets=RACE):
        """The simulator's actions, int64 numpy (B,), for states float32 numpy (B, STATE_SIZE).

        `targets` is one `Target` for all, or a list with one for each; a single state is repeated for them.
        """
        targets = [targets] * len(states) if isinstance(targets, Target) else targets
        inputs = np.empty((len(targets), STATE_SIZE + TARGET_SIZE), np.float32)
        inputs[:, :STATE_SIZE], inputs[:, STATE_SIZE:] = states, [target.encode() for target in targets]
        return self(torch.from_numpy(inputs)).argmax(1).numpy()


def load_teacher(path=TEACHER):
    """The teacher from its safetensors file, ready to act."""
    path, remedy = ROOT / path, "restore it with git checkout, or run python -m offline.train_teacher"
    if not path.exists():
        raise BadInput(f"no teacher in {path}: {remedy}")
    teacher, weights = Teacher(), read_weights(path)
    check_shapes(path, weights, teacher.state_dict(), remedy)
    teacher.load_state_dict(weights)
    return teacher.eval().requires_grad_(False)


def make_evaluation_env(frame_skip=FRAME_SKIP, **kwargs):
    """The plain task with the privileged state in `info`, which only the teacher and measurements read."""
    return PrivilegedState(make_env(frame_skip, **kwargs))
