"""What stage 2 supervises, measures and refuses."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch.nn import functional as F

import checks
import GitText2ActionWithPrompt as model_file
import train_git_lora_carllava_style as stage2


def write_split(folder, texts, prompt=None):
    folder.mkdir(parents=True)
    for i in range(len(texts)):
        Image.fromarray(np.full((96, 96, 3), 7 * i, dtype=np.uint8)).save(folder / f"{i}.png")
    rows = [
        {"file_name": f"{i}.png", "text": text, "prompt": prompt or model_file.PROMPT} for i, text in enumerate(texts)
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_only_the_answer_is_supervised(toy_model, tmp_path):
    data = stage2.Captions(write_split(tmp_path / "train", list(model_file.ANSWERS)))
    batch = stage2.Collator(toy_model.processor)([data[i] for i in range(5)])
    tokenizer = toy_model.processor.tokenizer
    for ids, labels, answer in zip(batch["input_ids"], batch["labels"], model_file.ANSWERS):
        supervised = ids[labels != -100].tolist()
        assert supervised == labels[labels != -100].tolist()
        assert tokenizer.decode(supervised) == f"{answer.lower()} [SEP]"
        text = tokenizer.decode([i for i in ids if i != tokenizer.pad_token_id])
        assert text.replace(" ?", "?") == f"[CLS] {model_file.PROMPT.lower()} {answer.lower()} [SEP]"
    outputs = toy_model.git(**batch)
    text = batch["labels"].shape[1]
    shifted = outputs.logits[:, -text:-1].double()
    expected = F.cross_entropy(shifted.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    assert outputs.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_validation_counts_what_the_model_says(toy_model, tmp_path, monkeypatch):
    data = stage2.Captions(write_split(tmp_path / "v", ["Accelerate"] * 3 + ["Turn left"] * 2))
    said = iter(["Accelerate", "Accelerate", "Turn left", "Turn left", "nonsense"])
    monkeypatch.setattr(toy_model, "answer", lambda frames: [next(said) for _ in frames])
    monkeypatch.setattr(stage2, "MACRO_MIN_FRAMES", 3)
    metrics, confusion = stage2.validate(toy_model, data, batch_size=2)
    assert metrics["exact_match"] == pytest.approx(3 / 5) and metrics["majority_share"] == pytest.approx(3 / 5)
    assert metrics["recall_accelerate"] == pytest.approx(2 / 3) and metrics["recall_turn_left"] == 0.5
    assert metrics["macro_recall"] == metrics["recall_accelerate"]  # two frames of "Turn left" are too few
    assert metrics["count_turn_left"] == 2 and np.isnan(metrics["recall_brake"])
    assert confusion[2].tolist() == [0, 0, 1, 0, 0, 1]
    assert metrics["first_token_entropy"] == pytest.approx(-(0.6 * np.log(0.6) + 0.4 * np.log(0.4)))


def parts_with_lora(module):
    names = [name for name, _ in module.named_parameters() if "lora_A" in name]
    return {name.split("base_model.model.")[1].split(".lora_")[0] for name in names}


def test_lora_reaches_every_part(toy_model, toy_base):
    git, _ = model_file.load_base(str(toy_base))
    parts = parts_with_lora(get_peft_model(git, LoraConfig(r=2, target_modules=model_file.LORA_TARGETS)))
    for part in ("git.image_encoder.", "git.encoder.layer.", "git.visual_projection.", "output"):
        assert any(name.startswith(part) for name in parts), part
    assert "git.encoder.layer.0.attention.self.query" in parts
    toy_model.add_lora(rank=2, alpha=2)  # PPO's: the features do not pass the word layer
    assert parts_with_lora(toy_model) == parts - {"output"}


def test_multiplying_once_is_peft(toy_base):
    """Loss and gradients of PEFT's own layers, with B no longer zero."""
    frames = torch.randint(0, 256, (4, 96, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    results = []
    for change in (lambda git: None, stage2.multiply_once):
        torch.manual_seed(0)
        git, processor = model_file.load_base(str(toy_base))
        config = LoraConfig(r=3, lora_alpha=5, target_modules=model_file.LORA_TARGETS, init_lora_weights=False)
        git = get_peft_model(git, config)
        change(git)
        loss = git(**stage2.Collator(processor)(list(zip(frames.numpy(), range(4))))).loss
        loss.backward()
        results.append([loss.detach()] + [p.grad for p in git.parameters() if p.requires_grad])
    assert len(results[0]) > 20
    for theirs, ours in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_sample_is_refused(tmp_path, constants):
    for split in ("train", "validation"):
        write_split(tmp_path / split, ["Brake", "Accelerate"])
    constants(stage2, DATA_DIR=str(tmp_path))
    with pytest.raises(checks.BadInput, match="only the shipped sample: run collect_captions.py"):
        stage2.main()
    (tmp_path / "run.json").write_text('{"frame_skip": 4}')
    constants(stage2, MIN_FRAMES=1)
    with pytest.raises(checks.BadInput, match="FRAME_SKIP = 4"):
        stage2.main()


def test_loss_ignores_padding(toy_model):
    """A longer padding of the same row leaves the loss as it is."""
    frames = torch.zeros(1, 96, 96, 3, dtype=torch.uint8)
    batch = stage2.Collator(toy_model.processor)([(frames[0].numpy(), 0)])
    longer = {
        "pixel_values": batch["pixel_values"],
        "input_ids": F.pad(batch["input_ids"], (0, 3), value=toy_model.processor.tokenizer.pad_token_id),
        "labels": F.pad(batch["labels"], (0, 3), value=-100),
    }
    assert toy_model.git(**longer).loss.item() == pytest.approx(toy_model.git(**batch).loss.item(), rel=1e-5)
