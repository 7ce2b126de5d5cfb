"""What the measured drives say: who came back, who obeyed, by drives that are known."""

from types import SimpleNamespace

import numpy as np
import pytest

import evaluate
from benchmarks import drives, obedience, recovery
from instructions import SIDE, Target


def test_a_drive_is_told_and_turned():
    """Two cars with gas until they are told to stop after 40 decisions, the second turned round at that moment."""
    words = SimpleNamespace(answer=lambda frames, told: ["Brake" if told else "Accelerate"] * len(frames))
    results = drives.drive(evaluate.Answers(words), [3, 3], 120, {40: "Stop."}, [0.0, np.pi], 40)
    speed, along = results["speed"], results["along"]
    assert (speed[39] > 20).all() and (speed[-1] < 2).all()
    assert along[38:40] == pytest.approx(speed[38:40], rel=0.1)
    assert along[41, 1] == pytest.approx(-speed[41, 1], rel=0.1) and along[41, 0] > 20
    assert 10 < drives.travelled(along)[39, 0] < 40
    assert obedience.judge(Target(speed=0.0), results, 40)[0].tolist() == (speed[115:] < 2).all(0).tolist()


def test_only_progress_along_the_road_after_the_turn_counts(monkeypatch):
    monkeypatch.setattr(recovery, "WHEN", 2)
    tile = 3.5 * 50 / 2  # units per second that make a tile in a decision
    along = np.array([[9, 0, 0], [9, 0, 0], [-8, 8, 8], [8, 8, 8], [14, -9, 0]]) * tile
    driving = np.ones((5, 3), bool)
    driving[3:, 2] = False
    assert recovery.came_back({"along": along, "driving": driving}).tolist() == [False, True, False]


def test_obedience_is_judged_after_the_grace_and_while_it_drives():
    """Three cars, told something at decision 50: it obeys; too fast for half of what is judged; it leaves the field."""
    driving, left_field, speed = np.ones((215, 3), bool), np.zeros((215, 3), bool), np.full((215, 3), 30.0)
    speed[:175], speed[195:, 1] = 60.0, 60.0  # before and within the grace of 125 decisions, and later
    driving[200:, 2], left_field[200:, 2] = False, True
    results = {"speed": speed, "along": speed, "offset": np.full((215, 3), SIDE), "on_road": np.ones((215, 3), bool)}
    judged = obedience.judge(Target(30.0, SIDE), results | {"driving": driving, "left_field": left_field}, 50)
    assert judged.tolist() == [[1, 0, 0], [1, 0.5, 0], [1, 1, 0]]  # obeyed, at the speed, on the side
