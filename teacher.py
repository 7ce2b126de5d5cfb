"""The trained policy that drives stage 1: it reads the simulator's state instead of pictures.

Reads offline/teacher.safetensors, made by `python -m offline.train_teacher`. Beside the state it is given a target
(targets.py): a speed, a side of the road, standing still, or none, when it races.
"""

import gymnasium as gym
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from car_racing_env import FRAME_SKIP, make_env
from road import STATE_SIZE, encode_state, read_state
from support.checks import BadInput, read_weights
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
    """Two hidden layers."""
    hidden_size = 192
    return nn.Sequential(
        nn.Linear(inputs, hidden_size),
        nn.Tanh(),
        nn.Linear(hidden_size, hidden_size),
        nn.Tanh(),
        nn.Linear(hidden_size, outputs),
    )


class Teacher(nn.Module):
    """An MLP from state and target (B, STATE_SIZE + TARGET_SIZE) to logits of the simulator's actions (B, 5).

    Under a target speed a governor adds to them: brake and no gas when too fast or told to stand, gas when too slow. A
    policy that races already takes millions of decisions to find out that it could be slow. Told no speed it is held to
    RACE_LIMIT, told a side to CRUISE; it gives gas when it stands, and does not brake while it faces the wrong way: it
    would stand there for good, steering. Told a side another governor steers at a point of it two to three tiles ahead
    (pure pursuit, Coulter 1992, CMU-RI-TR-92-01): the net alone swings around the middle of the road, within a third of
    its width three quarters of the time.
    """

    def __init__(self):
        super().__init__()
        self.net = mlp(STATE_SIZE + TARGET_SIZE, 5)

    def forward(self, state_and_target):
        car, target = read_state(state_and_target), state_and_target[:, STATE_SIZE:]
        has_speed, speed, stop, has_side, side = target.T  # as Target.encode says
        limit = torch.where(has_speed > 0, SPEED_SCALE * speed, torch.where(has_side > 0, CRUISE, RACE_LIMIT))
        excess = car.forward - limit
        push = -torch.tanh(0.4 * excess) * (1 - stop)
        push = torch.where(has_speed > 0, push, push.clamp(max=0))  # told no speed it is held back only, not driven
        lost = (car.cos_heading < BACKWARDS) * (1 - has_speed)
        stands = (torch.hypot(car.forward, car.right) < CRAWL) * (1 - has_speed)
        gas = GAS_GOVERNOR * (push + stands) - BRAKE_GOVERNOR * stop
        too_fast = torch.tanh(0.4 * (excess - TOLERATED)).clamp(min=0) * (1 - stop) + stop
        brake = BRAKE_GOVERNOR * too_fast - GAS_GOVERNOR * lost
        right = SIDE_GOVERNOR * has_side * self.pursuit(car, SIDE * side) * (car.forward > CRAWL)
        zero = torch.zeros_like(right)
        return self.net(state_and_target) + torch.stack([zero, right, -right, gas, brake], 1)

    def pursuit(self, car, side):
        """How much further right the car should turn to drive at the offset `side` (B,), from -1 to 1: (B,)."""
        near, far = car.ahead[:, 1], car.ahead[:, 2]
        along = F.normalize(far - near, dim=1)
        to_the_right = torch.stack([along[:, 1], -along[:, 0]], 1) * side[:, None]
        right, forward = ((near + far) / 2 + to_the_right).unbind(1)
        angle = torch.atan2(right, forward.clamp(min=0.5))
        return torch.tanh(SHARPNESS * (angle + DAMPING * car.yaw_rate))

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
