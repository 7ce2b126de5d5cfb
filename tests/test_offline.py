"""git-tiny's making at toy size, of frames of noise."""

import functools
import signal

import numpy as np
import pytest
import torch
from conftest import TOY_SHAPE
from test_instructions import scene_of
from toy_process import at_call

from questions import describe
from support.checks import read_weights
from support.run_files import load_state


def collect(tracks, num_frames):
    """Frames of noise with answers about random scenes, and their speeds and offsets."""
    frames = np.random.default_rng(tracks[0]).integers(0, 256, (num_frames, 96, 96, 3), dtype=np.uint8)
    scenes = [scene_of(seed) for seed in range(num_frames)]
    return frames, [describe(*scene) for scene in scenes], [(state[0] * 50, state[12] * 6) for state, _ in scenes]


def test_git_tiny_learns_and_resumes_exactly(script, tmp_path):
    """Interrupted in the second epoch, it ends in the same weights."""

    def make(name, **constants):
        toy = dict(TRAIN_FRAMES=48, VALIDATION_FRAMES=8, BATCH_SIZE=16, WISHES=32, FITS=16, EPOCHS=3, SAVE_EVERY=2)
        module = script("offline/make_git_tiny", OUTPUT_DIR=str(tmp_path / name), **TOY_SHAPE, **toy, **constants)
        module.STATE, module.collect = tmp_path / f"{name}.pt", collect
        return module

    interrupted = make("hurt")
    at_call(6, interrupted, "train_step", functools.partial(signal.raise_signal, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        interrupted.main()
    losses = load_state(interrupted.STATE)["losses"]
    assert losses[-1] < losses[0] and [path.name for path in tmp_path.iterdir()] == ["hurt.pt"]
    torch.manual_seed(99)
    make("hurt", RESUME=True).main()
    make("alone").main()
    alone, hurt = (read_weights(tmp_path / name / "model.safetensors") for name in ("alone", "hurt"))
    assert all(torch.equal(p, hurt[name]) for name, p in alone.items())
