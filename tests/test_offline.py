"""The scripts that make what would otherwise be downloaded, at toy size."""

import functools

import numpy as np
import pytest
import torch
from conftest import TOY_SHAPE
from test_instructions import scene_of

from offline import make_git_tiny
from questions import describe
from support.checks import read_json, read_weights


def collect(tracks, num_frames):
    """Frames of noise with answers about random scenes."""
    frames = np.random.default_rng(tracks[0]).integers(0, 256, (num_frames, 96, 96, 3), dtype=np.uint8)
    return frames, [describe(*scene_of(seed)) for seed in range(num_frames)]


def test_git_tiny_learns_and_resumes_exactly(tmp_path, monkeypatch):
    """Interrupted in the second epoch, it ends in the same weights; the folder says what was learned."""
    toy = dict(TRAIN_FRAMES=48, VALIDATION_FRAMES=8, BATCH_SIZE=16, EPOCHS=3, SAVE_EVERY=2, collect=collect)
    toy |= {
        "make_model": functools.partial(make_git_tiny.make_model, **TOY_SHAPE),
        "train_step": make_git_tiny.train_step,
    }
    weights, train_step, losses = {}, make_git_tiny.train_step, []

    def interrupted(*args):
        losses.append(train_step(*args))
        if len(losses) == 5:
            raise KeyboardInterrupt
        return losses[-1]

    for name in ("alone", "hurt"):
        changes = toy | {"OUTPUT_DIR": str(tmp_path / name), "STATE": tmp_path / f"{name}.pt", "RESUME": False}
        if name == "hurt":
            changes["train_step"] = interrupted
        for constant, value in changes.items():
            monkeypatch.setattr(make_git_tiny, constant, value)
        if name == "hurt":
            with pytest.raises(KeyboardInterrupt):
                make_git_tiny.main()
            assert not (tmp_path / name).exists() and (tmp_path / "hurt.pt").exists()
            monkeypatch.setattr(make_git_tiny, "RESUME", True)
            monkeypatch.setattr(make_git_tiny, "train_step", train_step)
            torch.manual_seed(99)
        make_git_tiny.main()
        weights[name] = read_weights(tmp_path / name / "model.safetensors")
        assert not (tmp_path / f"{name}.pt").exists()
    assert all(torch.equal(p, weights["hurt"][name]) for name, p in weights["alone"].items())
    assert losses[-1] < losses[0]
    assert read_json(tmp_path / "alone" / "run.json")["constants"]["make_git_tiny.py"]["EPOCHS"] == 3
    assert "| next bend |" in (tmp_path / "alone" / "README.md").read_text()
