"""A toy GIT, scripts with edited constants, and what the whole pipeline makes at toy size."""

import os
import re
import shutil
import sys
import types
from types import SimpleNamespace

# before the libraries are imported, and for the processes that tests start
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
os.environ |= {"OMP_WAIT_POLICY": "passive"}  # beside other work threads that spin take minutes for seconds

import pytest
import torch

from GitText2ActionWithPrompt import GitText2ActionWithPrompt
from offline import make_git_tiny
from support.run_files import ROOT

TOY_SHAPE = dict(PATCH_SIZE=24, WIDTH=32, VISION_LAYERS=1, TEXT_LAYERS=2, HEADS=2)
COLLECT, STAGE2, PPO = "collect_captions", "train_git_lora_carllava_style", "ppo_git_with_prompt"


def toy_constants(root):
    """Each script's constants at toy size; what it reads and writes is in the folder `root`."""
    data, adapter, results = (f"{root}/{name}" for name in ("CarRacing-Data", "adapter", "results"))
    return {
        "car_racing_env": dict(MAX_FRAMES=60),
        COLLECT: dict(OUTPUT_DIR=data, TRAIN_FRAMES=96, VALIDATION_FRAMES=32, NUM_WORKERS=1),
        STAGE2: dict(
            BASE_MODEL=f"{root}/git-toy", DATA_DIR=data, OUTPUT_DIR=adapter, RESULTS_DIR=results,
            CHECKPOINT_DIR=f"{root}/checkpoints", MIN_FRAMES=1, EPOCHS=2, BATCH_SIZE=16, LORA_RANK=4,
        ),
        PPO: dict(
            MODEL=adapter, RESULTS_DIR=results, NUM_ENVS=2,  TORCH_THREADS=1, NUM_STEPS=60,
            MINIBATCH_SIZE=60, TOTAL_UPDATES=3, WARMUP_UPDATES=1, EVALUATIONS=1, EVAL_TRACKS=range(100_000, 100_001),
        ),
        "evaluate": dict(DRIVER="policy", POLICY=f"{results}/policy", RESULTS_DIR=results, NUM_TRACKS=2, NUM_ENVS=2),
    }  # fmt: skip


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


def toy_script(name, root, **changes):
    """A script with its toy constants but for `changes`, among modules that drive as short episodes as it does."""
    torch.set_num_threads(1)  # the number of threads decides the last bits
    constants = toy_constants(root)
    for module in ("car_racing_env", "teacher", "film", "evaluate"):
        edit(module, **constants.get(module, {}))
    return edit(name, **constants[name] | changes)


@pytest.fixture
def script():
    """`script(name, CONSTANT=value)` is `edit` for the length of a test, as is everything that is edited in it."""
    before = dict(sys.modules)
    yield edit
    for name in [name for name, module in sys.modules.items() if before.get(name) not in (None, module)]:
        sys.modules[name] = before[name]


def make_toy_base(folder, seed=0):
    """A GIT of 16 patches and width 32, untrained, saved in the Hub's layout."""
    torch.manual_seed(seed)
    processor = make_git_tiny.make_processor()
    shape = {name.lower(): x for name, x in TOY_SHAPE.items()}
    make_git_tiny.make_model(processor.tokenizer, **shape).save_pretrained(folder)
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


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory, toy_base):
    """What the four scripts wrote, run in sequence in one folder."""
    root = tmp_path_factory.mktemp("pipeline")
    folders = {"base": "git-toy", "data": "CarRacing-Data", "adapter": "adapter", "results": "results"}
    made = SimpleNamespace(root=root, **{name: root / folder for name, folder in folders.items()})
    shutil.copytree(toy_base, made.base)
    before = dict(sys.modules)
    for name in (COLLECT, STAGE2, PPO, "evaluate"):
        made.evaluate = toy_script(name, root)
        made.evaluate.main()
    sys.modules.update({name: before[name] for name in sys.modules.keys() & before.keys()})
    return made
