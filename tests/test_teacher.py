"""The rules that the teacher keeps whatever its net says. Its drives are in test_evaluate.py."""

import numpy as np
import pytest
import torch

import evaluate
import instructions
from benchmarks import drives
from instructions import RACE, SIDE, Target
from teacher import STATE_SIZE, Teacher

GAS, BRAKE = 3, 4  # the simulator's actions


@pytest.mark.parametrize(
    ("forward", "facing", "target", "always", "never"),
    [
        (30, 1, Target(speed=0.0), {BRAKE}, ()),
        (24, 1, Target(speed=20.0), {BRAKE}, ()),
        (16, 1, Target(speed=20.0), {GAS}, ()),
        (70, 1, Target(side=SIDE), {BRAKE}, ()),
        (47, 1, Target(side=SIDE), (), {GAS}),
        (3, 1, Target(side=SIDE), {GAS}, ()),
        (0, 1, RACE, {GAS}, ()),
        (85, 1, RACE, {BRAKE}, ()),
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


@pytest.mark.parametrize("name", ["middle", "slow left"])
def test_it_keeps_to_the_side_that_it_is_told(name):
    """In nearly all decisions, on a validation track: a third of its width around the middle, or the left half."""
    target = instructions.target(name)
    results = drives.drive(evaluate.Teacher(), [100_003], 150, {0: target})
    assert target.on_side(results["offset"][75:, 0]).mean() > 0.95
