"""What an episode becomes, driven by the teacher or by a policy."""

import numpy as np
import torch
from torch import nn

from collect_captions import collect_episode
from GitText2ActionWithPrompt import ANSWERS, PROMPT
from teacher import load_teacher, make_evaluation_env

QUIET = dict(policy="teacher", answer_by="teacher", keep=0.05, burst_start=0.0, burst_longest=7, stuck_limit=100)


@torch.no_grad()
def assert_captions(frames, rows, driven=None):
    """Each kept frame is the simulator's and its answer the teacher's, on track 7 driven by him or by one action."""
    env, teacher, kept = make_evaluation_env(2), load_teacher(), {row["frame"]: row for row in rows}
    assert len(kept) == len(frames) and len({row["text"] for row in rows}) > 1
    obs, info = env.reset(seed=7)
    for number in range(0, max(kept) + 1, 2):
        said = int(teacher(torch.from_numpy(info["state"])[None]).argmax())
        if number in kept:
            row, frame = kept.pop(number), frames.pop(0)
            assert row["action"] == said == ANSWERS[row["text"]] and (row["prompt"], row["track_seed"]) == (PROMPT, 7)
            assert np.array_equal(frame, obs)
        obs, *_, info = env.step(said if driven is None else driven)
    assert not kept


def test_an_episode_repeats_and_is_what_the_simulator_draws_and_the_teacher_does():
    frames, rows = collect_episode(7, **QUIET)
    again = collect_episode(7, **QUIET)
    assert np.array_equal(again[0], frames) and again[1] == rows
    assert_captions(frames, rows)


def test_a_policy_drives_and_the_teacher_answers(toy_model, tmp_path):
    """DAgger: the policy only accelerates, off the field; the teacher says where it would have turned."""
    nn.init.constant_(toy_model.policy_head[2].bias[1], 100.0)
    toy_model.save_policy(tmp_path / "gas")
    driven = QUIET | dict(policy=str(tmp_path / "gas"), keep=0.2)
    frames, rows = collect_episode(7, **driven)
    assert_captions(frames, rows, driven=ANSWERS["Accelerate"])
    assert {row["text"] for row in collect_episode(7, **driven | {"answer_by": "policy"})[1]} == {"Accelerate"}
    nn.init.constant_(toy_model.policy_head[2].bias[4], 200.0)
    toy_model.save_policy(tmp_path / "brake")
    assert collect_episode(7, **driven | {"policy": str(tmp_path / "brake")}) == ([], [])  # stuck
