"""What stage 2 supervises, trains and measures."""

import numpy as np
import pytest
import torch
from test_GitText2ActionWithPrompt import randomize
from torch.nn import functional as F
from toy_lora import write_data

import train_git_lora_carllava_style as stage2
from GitText2ActionWithPrompt import ANSWERS, PROMPT, GitText2ActionWithPrompt


@pytest.fixture
def data(tmp_path):
    """Ten frames of noise, every answer twice in their order."""
    write_data(tmp_path)
    return stage2.Captions(tmp_path / "validation")


def test_only_the_answer_is_supervised(toy_model, data):
    """Against the tokenizer and a cross-entropy by hand."""
    tokenizer = toy_model.processor.tokenizer
    batch = stage2.Collator(toy_model.processor)([data[i] for i in range(5)])
    for ids, labels, answer in zip(batch["input_ids"], batch["labels"], ANSWERS):
        assert tokenizer.decode(labels[labels != -100]) == f"{answer.lower()} [SEP]"
        assert torch.equal(labels[labels != -100], ids[labels != -100])
        text = tokenizer.decode(ids[ids != tokenizer.pad_token_id]).replace(" ?", "?")
        assert text == f"[CLS] {PROMPT.lower()} {answer.lower()} [SEP]"
    outputs = toy_model.git(**batch)
    shifted = outputs.logits[:, -batch["labels"].shape[1] : -1].double().flatten(0, 1)
    expected = F.cross_entropy(shifted, batch["labels"][:, 1:].flatten(), ignore_index=-100).item()
    assert outputs.loss.item() == pytest.approx(expected, rel=1e-5)


def test_validation_counts_what_the_model_says(toy_base, data):
    """And it reads the weights as they are now."""
    said = iter(["Coast", "Brake", "Turn left", "Turn left", "nonsense", *ANSWERS])

    class Scripted(GitText2ActionWithPrompt):
        def answer(self, frames):
            return [next(said) for _ in frames]

    model = Scripted.from_pretrained(toy_base)
    randomize(model.git, "value.weight", "output.weight")
    metrics, confusion = stage2.validate(model, data, batch_size=4)
    wrong = confusion - np.eye(5, 6, dtype=np.int64) * [2, 1, 2, 1, 1, 0]
    assert {(i, j): n for (i, j), n in np.ndenumerate(wrong) if n} == {(1, 4): 1, (3, 2): 1, (4, 5): 1}
    batch = stage2.Collator(model.processor)([data[i] for i in range(10)])
    assert metrics["validation_loss"] == pytest.approx(model.git(**batch).loss.item(), rel=1e-5)
    frames = np.stack([data[0][0]])
    states = model.git.git(**model.inputs(frames)).last_hidden_state[:, -1]
    assert torch.allclose(model.features(frames), states, atol=1e-5)


def test_summary_of_a_known_confusion():
    """Rows: teacher's Coast, Accelerate, Turn left, Turn right, Brake; both turns begin with the same word."""
    confusion = np.zeros((5, 6), dtype=np.int64)
    confusion[1, 1], confusion[1, 2], confusion[2, 2], confusion[2, 5], confusion[3, 2] = 45, 5, 20, 10, 20
    metrics = stage2.summarize(confusion, np.array([7, 8, 9, 9, 6]))
    expected = {
        "exact_match": 65 / 100, "majority_share": 50 / 100, "first_token_entropy": np.log(2), "count_turn_left": 30,
        "recall_accelerate": 45 / 50, "recall_turn_left": 20 / 30, "recall_turn_right": 0.0, "recall_brake": np.nan,
        "macro_recall": (45 / 50 + 20 / 30) / 2,  # 20 frames of Turn right are too few
    }  # fmt: skip
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, nan_ok=True)
