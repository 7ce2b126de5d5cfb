"""What an episode becomes, driven by the teacher or by a policy."""

import numpy as np
import torch
from torch import nn

from collect_captions import Settings, collect_episode
from GitText2ActionWithPrompt import ANSWERS, PROMPT
from instructions import INSTRUCTIONS, RACE, is_held_out, target
from questions import QUESTIONS, describe
from teacher import load_teacher, make_evaluation_env

QUIET = Settings(keep=0.05, burst_start=0.0, thrown=0.0, told_share=0.0, dreamed=4, asked=2)


@torch.no_grad()
def assert_captions(frames, rows, driven=None):
    """Each kept frame is the simulator's and its answer the teacher's, on track 7 driven by him or by one action."""
    env, teacher, kept = make_evaluation_env(2), load_teacher(), {row["frame"]: row for row in rows}
    assert len(kept) == len(frames) and len({row["text"] for row in rows}) > 1
    obs, info = env.reset(seed=7)
    for number in range(0, max(kept) + 1, 2):
        said = int(teacher.act(info["state"][None])[0])
        if number in kept:
            row, frame = kept.pop(number), frames.pop(0)
            assert row["action"] == said == ANSWERS[row["text"]] and (row["prompt"], row["track_seed"]) == (PROMPT, 7)
            assert np.array_equal(frame, obs)
            told, asked = describe(info["state"], env.get_wrapper_attr("road")), row["asked"]
            assert all(told[x["about"]] == x["text"] and x["question"] in QUESTIONS[x["about"]] for x in asked)
            targets = [RACE if x["instruction"] == "garbled" else target(x["instruction"]) for x in row["told"]]
            assert [ANSWERS[x["text"]] for x in row["told"]] == teacher.act(info["state"][None], targets).tolist()
            assert len(asked) == QUIET.asked and len(targets) == QUIET.dreamed
        obs, *_, info = env.step(said if driven is None else driven)
    assert not kept


def test_an_episode_is_what_the_simulator_draws_and_the_teacher_does():
    assert_captions(*collect_episode(7, QUIET))


def test_a_policy_drives_and_the_teacher_answers(toy_model, tmp_path):
    """DAgger: the policy only accelerates, off the field; the teacher says where it would have turned."""
    nn.init.constant_(toy_model.policy_head[2].bias[1], 100.0)
    toy_model.save_policy(tmp_path / "gas")
    driven = QUIET._replace(policy=str(tmp_path / "gas"), keep=0.2)
    frames, rows = collect_episode(7, driven)
    assert_captions(frames, rows, driven=ANSWERS["Accelerate"])
    assert {row["text"] for row in collect_episode(7, driven._replace(answer_by="policy"))[1]} == {"Accelerate"}
    nn.init.constant_(toy_model.policy_head[2].bias[4], 200.0)
    toy_model.save_policy(tmp_path / "brake")
    assert collect_episode(7, driven._replace(policy=str(tmp_path / "brake"))) == ([], [])  # stuck


def test_an_episode_under_instructions_repeats():
    """With everything that is random in it; taught and other phrasings in turn where they are measured."""
    (frames, rows), again = (collect_episode(11, Settings(keep=0.1, told_share=0.5), "both") for _ in range(2))
    assert np.array_equal(again[0], frames) and again[1] == rows and len(rows) > 10
    for told in (told for row in rows for told in row["told"] if told["instruction"] in INSTRUCTIONS):
        assert is_held_out(told["instruction"], told["sentence"]) == (told["split"] == "held_out")


def test_what_the_driver_is_told_is_labelled_first():
    """One instruction all the way: every frame has it, in phrasings of its own, before what is only dreamed."""
    _, rows = collect_episode(7, QUIET._replace(keep=0.1, told_share=1.0, change=0.0))
    first, second = ({row["told"][i]["instruction"] for row in rows} for i in (0, 1))
    assert len(first) == 1 and len(second) > 5 and len({row["told"][0]["sentence"] for row in rows}) > 5
