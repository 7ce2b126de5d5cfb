"""What an episode becomes, driven by the teacher or by a policy, and what stage 2 supervises and measures of it."""

import numpy as np
import pytest
import torch
from conftest import COLLECT
from test_GitText2ActionWithPrompt import inputs, randomize
from torch import nn
from torch.nn import functional as F

import captions
import train_git_lora_carllava_style as stage2
from GitText2ActionWithPrompt import ANSWERS, PROMPT, GitText2ActionWithPrompt, to_simulator
from instructions import WISH_QUESTION, is_held_out, target
from phrasings import INSTRUCTIONS, WORDINGS
from questions import QUESTIONS, describe
from road import read_state
from targets import RACE
from teacher import load_teacher, make_evaluation_env

WISHES = {"Keep left.": "Keep left.", "Speed thirty.": "Drive at speed thirty."}
QUIET = dict(KEEP=0.05, BURST_START=0.0, THROWN=0.0, TOLD_SHARE=0.0, DREAMED=4, ASKED=2)


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
            told, asked = describe(read_state(info["state"]), env.get_wrapper_attr("road")), row["asked"]
            assert all(told[x["about"]] == x["text"] and x["question"] in QUESTIONS[x["about"]] for x in asked)
            targets = [RACE if x["instruction"] == "garbled" else target(x["instruction"]) for x in row["told"]]
            assert [ANSWERS[x["text"]] for x in row["told"]] == teacher.act(info["state"][None], targets).tolist()
            assert len(asked) == QUIET["ASKED"] and len(targets) == QUIET["DREAMED"]
        obs, *_, info = env.step(said if driven is None else driven)
    assert not kept


def test_an_episode_is_what_the_simulator_draws_and_the_teacher_does(script):
    assert_captions(*script(COLLECT, **QUIET).collect_episode(7))


def test_a_policy_drives_and_the_teacher_answers(toy_model, tmp_path, script):
    """DAgger: the policy only accelerates, off the field; the teacher says where it would have turned."""
    nn.init.constant_(toy_model.policy_head[2].bias[1], 100.0)
    toy_model.save_policy(tmp_path / "gas")
    collect = script(COLLECT, **QUIET | {"KEEP": 0.2}).collect_episode
    frames, rows = collect(7, policy=tmp_path / "gas")
    assert_captions(frames, rows, driven=ANSWERS["Accelerate"])
    assert {row["text"] for row in collect(7, policy=tmp_path / "gas", answer_by="policy")[1]} == {"Accelerate"}
    nn.init.constant_(toy_model.policy_head[2].bias[4], 200.0)
    toy_model.save_policy(tmp_path / "brake")
    assert collect(7, policy=tmp_path / "brake") == ([], [])  # stuck


def test_an_adapter_drives_by_its_answers_whatever_the_prior(pipeline, script, monkeypatch):
    monkeypatch.setattr("GitText2ActionWithPrompt.LANGUAGE_PRIOR", 0.0)
    collect = script(COLLECT)
    teacher, model = collect.load_drivers(str(pipeline.adapter))
    frames = np.random.default_rng(0).integers(0, 256, (20, 96, 96, 3), dtype=np.uint8)
    answers = to_simulator(model.encode(frames)[1].argmax(1))
    assert answers.any() and [collect.decide(model, frame, [""])[0] for frame in frames] == answers.tolist()


def test_an_episode_under_an_instruction_repeats(script):
    """Every frame has what is said all the way, in phrasings of its own, before what is dreamed; splits in turn."""
    told_one_thing = script(COLLECT, KEEP=0.1, TOLD_SHARE=1.0, CHANGE=0.0)
    (frames, rows), again = (told_one_thing.collect_episode(11, "both") for _ in range(2))
    assert np.array_equal(again[0], frames) and again[1] == rows
    first, second = ({row["told"][i]["instruction"] for row in rows} for i in (0, 1))
    assert len(first) == 1 and len(second) > 5 and len({row["told"][0]["sentence"] for row in rows}) > 5
    for told in (told for row in rows for told in row["told"] if told["instruction"] in INSTRUCTIONS):
        assert is_held_out(told["instruction"], told["sentence"]) == (told["split"] == "held_out")
    changing = script(COLLECT, KEEP=0.1, TOLD_SHARE=1.0, CHANGE=0.2).collect_episode(11)[1]
    assert len({row["told"][0]["instruction"] for row in changing}) > 1


@pytest.mark.parametrize("disturbed", [{"BURST_START": 1.0}, {"THROWN": 1.0}])
def test_bursts_and_throws_disturb_an_episode(script, disturbed):
    quiet, other = (script(COLLECT, **QUIET | change).collect_episode(7)[0] for change in ({}, disturbed))
    assert min(len(quiet), len(other)) > 10 and not np.array_equal(other[:10], quiet[:10])


@pytest.fixture
def data():
    """Ten frames of noise, all answers but the first in turn, under two instructions and with a question."""
    rng, answers, samples = np.random.default_rng(0), list(ANSWERS), []
    asked = {"about": "grass", "question": "Is the car on the grass?", "text": "One wheel is on the grass."}
    for answer in (1 + i % 4 for i in range(10)):
        left = {"instruction": "left", "split": "taught", "sentence": "Keep left.", "text": answers[answer]}
        fast = {"instruction": "speed thirty", "split": "held_out", "sentence": "Speed thirty."}
        row = {"text": answers[answer], "answer": answer, "asked": [asked]}
        row["told"] = [left, fast | {"text": answers[answer - 1]}]
        samples.append((rng.integers(0, 256, (96, 96, 3), dtype=np.uint8), row))
    return samples


def test_only_the_answer_is_supervised(toy_model, data):
    """The plain question, two instructions with their wishes, a question about the scene: against the tokenizer."""
    tokenizer = toy_model.processor.tokenizer
    batch = captions.Collator(toy_model.processor, captions.all_texts)(data)
    assert batch["input_ids"].shape[:2] == (10, 6) and batch["pixel_values"].max() > 1
    for (_, row), texts, labels in zip(data, batch["input_ids"], batch["labels"]):
        expected = [(PROMPT, row["text"])]
        for told, (said, wish) in zip(row["told"], WISHES.items()):
            expected += [(f"{said} {PROMPT}", told["text"]), (f"{said} What do I want?", wish)]
        expected.append((row["asked"][0]["question"], row["asked"][0]["text"]))
        for ids, label, (prompt, answer) in zip(texts, labels, expected):
            supervised = label != -100
            assert label[supervised].tolist() == ids[supervised].tolist() == tokenizer(answer).input_ids[1:]
            assert ids[(ids != tokenizer.pad_token_id) & ~supervised].tolist() == tokenizer(prompt).input_ids[:-1]


def test_training_texts_vary_in_wording_and_keep_their_answers(data):
    torch.manual_seed(0)
    row = data[0][1]
    texts = [text for _ in range(1000) for text in captions.draw_texts(row, reworded=0.5, wishes=0.5)]
    assert {(told, answer) for told, question, answer in texts if question == WISH_QUESTION} == {*WISHES.items()}
    told = {(told, answer) for told, question, answer in texts if told and question != WISH_QUESTION}
    assert told == {(x["sentence"], x["text"]) for x in row["told"]}
    plain = [question for told, question, _ in texts if not told and question != row["asked"][0]["question"]]
    assert set(plain) == {PROMPT, *WORDINGS} and 0.4 < plain.count(PROMPT) / len(plain) < 0.7
    assert len(texts) == 1000 * 4


def test_validation_counts_what_the_model_says(toy_base, data):
    """And it reads the weights as they are now: losses by Hugging Face's forward; exact is the end, said at once."""
    _, accelerate, left, right, brake, *_ = ANSWERS
    said = iter([accelerate, brake, left, "nonsense", accelerate, left, right, brake, left, left])

    class Scripted(GitText2ActionWithPrompt):
        def answer(self, frames):
            return [next(said) for _ in frames]

    model, losses = Scripted.from_pretrained(toy_base), []
    randomize(model.git, "value.weight", "output.weight")
    model.git.output.bias[model.processor.tokenizer.sep_token_id] = 10
    for i, (_, row) in enumerate(data):
        row["told"][0]["text"] = "" if i < 3 else "Brake"
        about = "speed" if i < 5 else "far bend"
        row["asked"] = [{"about": about, "question": "How fast?", "text": "" if i < 4 else "Fast."}]
    metrics, confusion = stage2.validate(model, data, batch_size=4)
    counts = {place: count for place, count in np.ndenumerate(confusion) if count}
    assert counts == {(1, 1): 2, (1, 2): 1, (2, 2): 2, (2, 4): 1, (3, 2): 1, (3, 3): 1, (4, 4): 1, (4, 5): 1}
    for frame, row in data:
        for told, question, answer in captions.all_texts(row):
            asked = inputs(model, torch.tensor(frame)[None], f"{told} {question}")
            words = torch.tensor(model.processor.tokenizer(answer).input_ids[1:])
            asked["input_ids"] = torch.cat([asked["input_ids"], words[None]], 1)
            losses.append(F.cross_entropy(model.git(**asked).logits[0, -len(words) - 1 : -1], words).item())
    expected = {"validation_loss": np.mean(losses), "exact_match": 0.6, "majority_share": 0.3, "recall_coast": np.nan}
    expected |= {"recall_accelerate": 2 / 3, "recall_turn_left": 2 / 3, "recall_turn_right": 0.5, "recall_brake": 0.5}
    expected |= {"exact_first_told": 0.3, "exact_speed_held_out": 0, "exact_wish_taught": 0, "exact_wish_held_out": 0}
    expected |= {"exact_scene": 0.4, "exact_scene_speed": 0.8, "exact_scene_far_bend": 0}
    assert metrics == pytest.approx(expected, rel=1e-4, nan_ok=True)
