"""Bad input: BadInput names it and nothing on disk changes; hostile files run nothing."""

import json
import pickle
import shutil

import pytest
from conftest import COLLECT, PPO, STAGE2, toy_script
from safetensors.torch import load_file, save_file
from toy_process import files

from support.checks import BadInput

EVALUATE = "evaluate"
METADATA, DATA_TASK = "CarRacing-Data/train/metadata.jsonl", "CarRacing-Data/task.json"
BASE, ADAPTER, ADAPTER_TASK = "git-toy/model.safetensors", "adapter/adapter_model.safetensors", "adapter/task.json"
POLICY, POLICY_FACTS = "results/policy/policy.safetensors", "results/policy/policy.json"
BOMB = b"csys\nexit\n(tR."  # a pickle that calls sys.exit() where it is executed


def nothing(path):
    pass


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:100])


def edit(**changes):
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def replace(old, new):
    return lambda path: path.write_text(path.read_text().replace(old, new))


def lose_a_tensor(path):
    weights = load_file(path)
    del weights[min(weights)]
    save_file(weights, path)


def set_nan(path):
    weights = load_file(path)
    weights[min(weights)][0] = float("nan")
    save_file(weights, path)


def bomb(path):
    path.write_bytes(BOMB)


def bomb_as(name):
    """In place of the file, under a name that a library falls back to."""
    return lambda path: bomb(path.rename(path.with_name(name)))


def bomb_first(path):
    """In the Trainer's first checkpoint, when the last one is not complete."""
    (path.parents[1] / "checkpoint-12" / "trainer_state.json").unlink()
    bomb(path)


TASK = {"prompt": "Why?", "answers": ["Fly"], "frame_skip": 4}
HELD_OUT = '{"instruction": "slow", "split": "taught", "sentence": "Please go slowly here.", "text": "Brake"}'
TRAINER_FILES = [f"checkpoints/checkpoint-6/{name}" for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")]
HURT = (cut, set_nan, lose_a_tensor)
CLEARED = [(COLLECT, "OUTPUT_DIR"), (STAGE2, "OUTPUT_DIR"), (STAGE2, "CHECKPOINT_DIR")]
PAIRS = [("OUTPUT_DIR", "RESULTS_DIR"), ("CHECKPOINT_DIR", "OUTPUT_DIR"), ("CHECKPOINT_DIR", "RESULTS_DIR")]
CASES = [  # script, constants of it, what is spoiled and how, what the message names
    (COLLECT, {"POLICY": "no/policy"}, "", nothing, "no/policy"),
    (COLLECT, {"ANSWER_BY": "nobody"}, "", nothing, "ANSWER_BY"),
    (STAGE2, {}, "CarRacing-Data/train", remove, "CarRacing-Data/train"),
    (STAGE2, {}, METADATA, cut, "metadata.jsonl"),
    (STAGE2, {}, METADATA, replace('"Accelerate"', '"Fly"'), "metadata.jsonl"),
    (STAGE2, {}, METADATA, replace('"told": [{', f'"told": [{HELD_OUT}, {{'), "instructions.py"),
    (STAGE2, {}, DATA_TASK, remove, "task.json"),
    *((STAGE2, {}, DATA_TASK, edit(**{name: x}), name) for name, x in TASK.items()),
    (STAGE2, {"MIN_FRAMES": 1000}, "", nothing, "MIN_FRAMES"),
    (STAGE2, {"BATCH_SIZE": 1000}, "", nothing, "BATCH_SIZE"),
    (STAGE2, {"BASE_MODEL": "no/such-model"}, "", nothing, "no/such-model"),
    *((STAGE2, {}, BASE, spoil, "git-toy") for spoil in (lose_a_tensor, bomb, bomb_as("pytorch_model.bin"))),
    (STAGE2, {}, "git-toy/processor_config.json", replace('"height": 96', '"height": 48'), "git-toy"),
    (STAGE2, {}, "git-toy/config.json", edit(model_type="bert"), "git-toy"),
    (STAGE2, {"ADAPTER": "no/adapter"}, "", nothing, "no/adapter"),
    (STAGE2, {"ADAPTER": "ROOT/adapter"}, ADAPTER_TASK, edit(base_fingerprint="0"), "base_fingerprint"),
    (STAGE2, {"ADAPTER": "ROOT/adapter"}, ADAPTER, bomb_as("adapter_model.bin"), "adapter"),
    (STAGE2, {"MORE_DATA": ("no/captions",)}, "", nothing, "no/captions"),
    (STAGE2, {"RESUME": True}, "checkpoints", remove, "run.json"),
    (STAGE2, {"RESUME": True, "LEARNING_RATE": 1e-3}, "", nothing, "LEARNING_RATE"),
    *((STAGE2, {"RESUME": True}, name, bomb_first, "checkpoint-6") for name in TRAINER_FILES),
    (PPO, {"MODEL": "no/adapter"}, "", nothing, "no/adapter"),
    (PPO, {"EVAL_TRACKS": range(99_990, 100_010)}, "", nothing, "EVAL_TRACKS"),
    (PPO, {}, ADAPTER_TASK, edit(base_fingerprint="0"), "base_fingerprint"),
    *((PPO, {}, ADAPTER_TASK, edit(**{name: x}), name) for name, x in TASK.items()),
    *((PPO, {}, ADAPTER, spoil, "adapter") for spoil in (*HURT, remove, bomb, bomb_as("adapter_model.bin"))),
    (PPO, {"RESUME": True, "LEARNING_RATE": 1e-3}, "", nothing, "LEARNING_RATE"),
    (PPO, {"RESUME": True}, "results/run.json", replace('"lap_bonus": 100.0', '"lap_bonus": 1.0'), "REWARDS"),
    *((PPO, {"RESUME": True}, "results/state.pt", spoil, "state.pt") for spoil in (remove, cut, bomb)),
    (EVALUATE, {}, "results/policy", remove, "results/policy"),
    (EVALUATE, {"DRIVER": "teacher", "INSTRUCTION": "fly"}, "", nothing, "INSTRUCTION"),
    (EVALUATE, {"INSTRUCTION": "left " * 60}, "", nothing, "prompt"),
    *((EVALUATE, {}, POLICY_FACTS, edit(**{name: x}), name) for name, x in TASK.items()),
    (EVALUATE, {}, POLICY_FACTS, edit(adapter_hash="0"), "adapter_hash"),
    *((EVALUATE, {}, POLICY, spoil, POLICY) for spoil in (*HURT, bomb)),
]
# what is replaced as a whole holds files of nobody knows whom, another script's, or another output
for stage, constant in CLEARED:
    for folder in ("ROOT", "ROOT/results", "ROOT/results/policy"):
        CASES.append((stage, {constant: folder}, "", nothing, folder))
for replaced, other in PAIRS:
    for place in ("ROOT/adapter", "ROOT/adapter/inside"):
        CASES.append((STAGE2, {replaced: "ROOT/adapter", other: place}, "", nothing, "ROOT/adapter"))


@pytest.mark.parametrize("name, changes, file, spoil, named", CASES)
def test_bad_input_is_named_and_changes_nothing(name, changes, file, spoil, named, pipeline, tmp_path, script):
    root = shutil.copytree(pipeline.root, tmp_path / "run", ignore=shutil.ignore_patterns("*.mp4"))
    for path in root.rglob("*.json"):
        replace(str(pipeline.root), str(root))(path)
    spoil(root / file)
    before, history = files(root), {"results/run.json": "may tell of the attempt"}
    changes = {constant: x.replace("ROOT", str(root)) if isinstance(x, str) else x for constant, x in changes.items()}
    with pytest.raises(BadInput, match=named.replace("ROOT", str(root))) as caught:
        toy_script(name, root, **changes).main()
    assert "\n" not in str(caught.value) and files(root) | history == before | history


def test_the_bomb_works():
    with pytest.raises(SystemExit):
        pickle.loads(BOMB)


def test_answers_that_one_pass_cannot_score(toy_base, script):
    answers = {"Go": 3, "Turn": 2, "Turn left": 0, "Left": 1, "Brake": 4}
    model_file = script("GitText2ActionWithPrompt", ANSWERS=answers)
    with pytest.raises(BadInput, match="ANSWERS"):
        model_file.GitText2ActionWithPrompt.from_pretrained(toy_base)
