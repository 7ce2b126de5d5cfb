"""A toy GIT and what each stage makes of it, each script run once through its `main()` at toy constants."""

import os
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries are imported, and for the processes that tests start

import pytest
import torch

import collect_captions
import evaluate
import GitText2ActionWithPrompt as model_file
import ppo_git_with_prompt as ppo
import train_git_lora_carllava_style as stage2
from offline import make_git_tiny


def set_constants(module, **constants):
    """Assign a script's constants; returns the old ones."""
    old = {name: getattr(module, name) for name in constants}
    for name, value in constants.items():
        setattr(module, name, value)
    return old


@pytest.fixture
def constants(monkeypatch):
    """`constants(module, NAME=value, ...)` for the length of a test."""

    def set_for_test(module, **values):
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)

    return set_for_test


def make_toy_base(folder):
    """A GIT of 16 patches and width 32, untrained, saved in the Hub's layout."""
    old = set_constants(make_git_tiny, PATCH_SIZE=24, WIDTH=32, VISION_LAYERS=1, TEXT_LAYERS=2, HEADS=2)
    torch.manual_seed(0)
    processor = make_git_tiny.make_processor([{"How fast is the car?": "zero"}])
    make_git_tiny.make_model(processor.tokenizer).save_pretrained(folder)
    processor.save_pretrained(folder)
    set_constants(make_git_tiny, **old)
    return folder


@pytest.fixture(scope="session")
def toy_base(tmp_path_factory):
    return make_toy_base(tmp_path_factory.mktemp("toy") / "git-toy")


@pytest.fixture
def toy_model(toy_base):
    torch.manual_seed(0)
    return model_file.GitText2ActionWithPrompt.from_pretrained(str(toy_base))


@pytest.fixture
def frames():
    return torch.randint(0, 256, (3, 96, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def run_pipeline(root, toy_base):
    """The scripts in sequence in the folder `root`; returns the folders they wrote."""
    torch.set_num_threads(2)  # a PPO run sets its own, and the number of threads decides the last bits
    made = SimpleNamespace(
        data=root / "CarRacing-Data", adapter=root / "adapter", results=root / "results", base=toy_base, root=root
    )
    results = str(made.results)
    old = [
        (m, set_constants(m, **values))
        for m, values in (
            (collect_captions, dict(OUTPUT_DIR=str(made.data), TRAIN_FRAMES=96, VALIDATION_FRAMES=32)),
            (stage2, dict(
                BASE_MODEL=str(toy_base), DATA_DIR=str(made.data), OUTPUT_DIR=str(made.adapter), RESULTS_DIR=results,
                CHECKPOINT_DIR=str(root / "checkpoints"), MIN_FRAMES=1, EPOCHS=2, BATCH_SIZE=16, LORA_RANK=4,
            )),
            (ppo, dict(
                ADAPTER=str(made.adapter), RESULTS_DIR=results, NUM_ENVS=2, NUM_STEPS=120, TOTAL_UPDATES=3, EVALUATIONS=1,
                MINIBATCH_SIZE=60, WARMUP_UPDATES=1, EVAL_TRACKS=range(100_000, 100_001), VIDEO_EVERY=1000,
            )),
            (evaluate, dict(
                DRIVER="policy", POLICY=f"{results}/policy", ADAPTER=str(made.adapter), RESULTS_DIR=results, NUM_TRACKS=2,
                NUM_ENVS=2,
            )),
        )
    ]  # fmt: skip
    for script in (collect_captions, stage2, ppo, evaluate):
        script.main()
    for module, values in old:
        set_constants(module, **values)
    return made


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory, toy_base):
    """The folders of one run of the scripts."""
    return run_pipeline(tmp_path_factory.mktemp("pipeline"), toy_base)
