"""The scripts that make what would otherwise be downloaded, at toy size."""

import numpy as np
import pytest
import torch
from conftest import TOY_SHAPE
from test_instructions import scene_of

from questions import describe
from support.checks import read_json, read_weights


def collect(tracks, num_frames):
    """Frames of noise with answers about random scenes, and their speeds and offsets."""
    frames = np.random.default_rng(tracks[0]).integers(0, 256, (num_frames, 96, 96, 3), dtype=np.uint8)
    scenes = [scene_of(seed) for seed in range(num_frames)]
    return frames, [describe(*scene) for scene in scenes], [(state[0] * 50, state[12] * 6) for state, _ in scenes]


@pytest.fixture
def make(script, tmp_path):
    """`make(name, ...)` is the script at toy size that writes the folder `name`."""

    def edited(name, **constants):
        toy = dict(TRAIN_FRAMES=48, VALIDATION_FRAMES=8, BATCH_SIZE=16, WISHES=32, FITS=16, EPOCHS=3, SAVE_EVERY=2)
        module = script("offline/make_git_tiny", OUTPUT_DIR=str(tmp_path / name), **TOY_SHAPE, **toy, **constants)
        module.STATE, module.collect = tmp_path / f"{name}.pt", collect
        return module

    return edited


def test_git_tiny_learns_and_resumes_exactly(make, tmp_path):
    """Interrupted in the second epoch, it ends in the same weights; the folder says what was learned."""
    interrupted, losses = make("hurt"), []
    train_step = interrupted.train_step

    def until_ctrl_c(*args):
        losses.append(train_step(*args))
        if len(losses) == 5:
            raise KeyboardInterrupt
        return losses[-1]

    interrupted.train_step = until_ctrl_c
    with pytest.raises(KeyboardInterrupt):
        interrupted.main()
    assert losses[-1] < losses[0]
    assert [path.name for path in tmp_path.iterdir()] == ["hurt.pt"]
    torch.manual_seed(99)
    make("hurt", RESUME=True).main()
    make("alone").main()
    alone, hurt = (read_weights(tmp_path / name / "model.safetensors") for name in ("alone", "hurt"))
    assert all(torch.equal(p, hurt[name]) for name, p in alone.items())
    assert not list(tmp_path.glob("*.pt"))
    assert read_json(tmp_path / "alone" / "run.json")["constants"]["make_git_tiny.py"]["EPOCHS"] == 3
    assert "| next bend |" in (tmp_path / "alone" / "README.md").read_text()
