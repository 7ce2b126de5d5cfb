"""A toy GIT, scripts with edited constants, and what the whole pipeline makes at toy size."""

import os
import re
import sys
import types
from types import SimpleNamespace

# before the libraries are imported, and for the processes that tests start
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import pytest
import torch

from GitText2ActionWithPrompt import GitText2ActionWithPrompt
from offline import make_git_tiny
from support.run_files import ROOT

TOY_SHAPE = dict(patch_size=24, width=32, vision_layers=1, text_layers=2, heads=2)
TALKING = dict(THROWN=0.003, TOLD_SHARE=0.5, DREAMED=4, ASKED=2)  # stage 1 under instructions
TOY_PPO = dict(NUM_ENVS=2, TORCH_THREADS=1, TOTAL_UPDATES=2, EVALUATIONS=1, WARMUP_UPDATES=1, VIDEO_EVERY=1000)


def edit(name, **constants):
    """A script as its user edits it: its source with other constants, executed as a module of its own.

    It takes the original's place in sys.modules, so that functions of it can be sent to other processes.
    """
    path = ROOT / f"{name}.py"
    source = path.read_text()
    for constant, value in constants.items():
        line = f"{constant} = {value!r}"
        source, count = re.subn(rf"^{constant} = .*$", lambda _: line, source, flags=re.M)  # noqa: B023
        assert count == 1, f"{name}.py has {count} lines that assign {constant}"
    module = types.ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module
    exec(compile(source, str(path), "exec"), vars(module))
    return module


@pytest.fixture
def script():
    """`script(name, CONSTANT=value)` is `edit` for the length of a test."""
    before = dict(sys.modules)
    yield edit
    for name in [name for name, module in sys.modules.items() if before.get(name) not in (None, module)]:
        sys.modules[name] = before[name]


def make_toy_base(folder, seed=0):
    """A GIT of 16 patches and width 32, untrained, saved in the Hub's layout."""
    torch.manual_seed(seed)
    processor = make_git_tiny.make_processor()
    make_git_tiny.make_model(processor.tokenizer, **TOY_SHAPE).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def toy_base(tmp_path_factory):
    return make_toy_base(tmp_path_factory.mktemp("toy") / "git-toy")


@pytest.fixture
def toy_model(toy_base):
    torch.manual_seed(0)
    return GitText2ActionWithPrompt.from_pretrained(toy_base)


@pytest.fixture
def frames():
    return torch.randint(0, 256, (3, 96, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def run_pipeline(root, toy_base):
    """The four scripts in sequence in the folder `root`; returns the folders they wrote."""
    torch.set_num_threads(1)  # the number of threads decides the last bits
    made = SimpleNamespace(
        data=root / "CarRacing-Data", adapter=root / "adapter", results=root / "results", base=toy_base, root=root
    )
    data, adapter, results = str(made.data), str(made.adapter), str(made.results)
    before = dict(sys.modules)
    edit("car_racing_env", MAX_FRAMES=60)  # short evaluations and films
    for name in ("teacher", "film"):
        edit(name)
    made.evaluate = edit("evaluate")
    edit("collect_captions", OUTPUT_DIR=data, TRAIN_FRAMES=96, VALIDATION_FRAMES=32, NUM_WORKERS=1, **TALKING).main()
    edit(
        "train_git_lora_carllava_style", BASE_MODEL=str(toy_base), DATA_DIR=data, OUTPUT_DIR=adapter,
        RESULTS_DIR=results, CHECKPOINT_DIR=str(root / "checkpoints"), MIN_FRAMES=1, EPOCHS=2, BATCH_SIZE=16,
        LORA_RANK=4, REWORDED=0.5,
    ).main()  # fmt: skip
    edit(
        "ppo_git_with_prompt", **TOY_PPO | dict(TOTAL_UPDATES=3), MODEL=adapter, RESULTS_DIR=results, NUM_STEPS=60,
        MINIBATCH_SIZE=60, INSTRUCTED_ENVS=1, EVAL_TRACKS=range(100_000, 100_001),
    ).main()  # fmt: skip
    edit("evaluate", DRIVER="policy", POLICY=f"{results}/policy", RESULTS_DIR=results, NUM_TRACKS=2, NUM_ENVS=2).main()
    sys.modules.update({name: before[name] for name in sys.modules.keys() & before.keys()})
    return made


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory, toy_base):
    """The folders of one run of the scripts."""
    return run_pipeline(tmp_path_factory.mktemp("pipeline"), toy_base)
