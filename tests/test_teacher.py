"""The rules that the teacher keeps whatever its net says. Its drives are in test_evaluate.py."""

import numpy as np
import pytest
import torch

from instructions import RACE, SIDE, TARGET_SIZE, Target
from teacher import STATE_SIZE, Teacher

GAS, BRAKE = 3, 4  # the simulator's actions


@pytest.mark.parametrize(
    ("forward", "facing", "target", "always", "never"),
    [
        (30, 1, Target(speed=0.0), {BRAKE}, ()),
        (24, 1, Target(speed=20.0), {BRAKE}, ()),
        (16, 1, Target(20.0, -SIDE), {GAS}, ()),
        (70, 1, Target(side=SIDE), {BRAKE}, ()),
        (47, 1, Target(side=SIDE), (), {GAS}),
        (3, 1, Target(side=SIDE), {GAS}, ()),
        (0, 1, RACE, {GAS}, ()),
        (80, 1, RACE, {BRAKE}, ()),
        (20, -0.95, RACE, (), {BRAKE}),
    ],
)
def test_what_the_teacher_always_does(forward, facing, target, always, never):
    """Whatever its net would rather do: 50 nets with logits of a size that a trained one has."""
    torch.manual_seed(0)
    states = np.random.default_rng(0).uniform(-1, 1, (50, STATE_SIZE)).astype(np.float32)
    states[:, 0], states[:, 1], states[:, 14] = forward / 50, 0, facing
    done = set()
    for state in states:
        teacher = Teacher()
        teacher.net[-1].weight.data *= 5
        done.add(int(teacher.act(state[None], target)[0]))
    assert done == set(always) if always else done.isdisjoint(never) and len(done) > 1


def test_a_racing_teacher_is_its_net():
    states = np.random.default_rng(0).uniform(0.2, 1, (50, STATE_SIZE)).astype(np.float32)
    teacher, told = Teacher(), np.broadcast_to(RACE.encode(), (50, TARGET_SIZE))
    logits = teacher.net(torch.from_numpy(np.concatenate([states, told], 1)))
    assert teacher.act(states).tolist() == logits.argmax(1).tolist()
