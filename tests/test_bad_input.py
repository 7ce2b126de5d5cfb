"""Bad input: BadInput names it and nothing on disk changes; hostile files run nothing."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import toy_lora
from conftest import TOY_PPO
from safetensors.torch import load_file, save_file
from toy_process import files

from GitText2ActionWithPrompt import GitText2ActionWithPrompt
from support.checkpoints import load_base
from support.checks import BadInput
from support.run_files import load_state
from teacher import load_teacher

COLLECT, STAGE2, PPO, EVALUATE = "collect_captions", "train_git_lora_carllava_style", "ppo_git_with_prompt", "evaluate"
RESUME = "ppo_git_with_prompt "  # continued
ADAPTER, BASE = "adapter/adapter_model.safetensors", "git-toy/model.safetensors"
POLICY, POLICY_FACTS = "results/policy/policy.safetensors", "results/policy/policy.json"


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


TASK = {"prompt": "Why?", "answers": ["Fly"], "frame_skip": 4}
HELD_OUT = '{"instruction": "slow", "split": "taught", "sentence": "Please go slowly here.", "text": "Brake"}'
CASES = [  # script, a constant of it, what is spoiled and how, what the message names
    (COLLECT, {"POLICY": "no/policy"}, "", nothing, "no/policy"),
    (COLLECT, {"ANSWER_BY": "nobody"}, "", nothing, "ANSWER_BY"),
    (STAGE2, {}, "CarRacing-Data/train", remove, "CarRacing-Data/train"),
    (STAGE2, {}, "CarRacing-Data/train/metadata.jsonl", cut, "metadata.jsonl"),
    (STAGE2, {}, "CarRacing-Data/train/metadata.jsonl", replace('"Accelerate"', '"Fly"'), "metadata.jsonl"),
    (
        STAGE2,
        {},
        "CarRacing-Data/train/metadata.jsonl",
        replace('"told": [{', f'"told": [{HELD_OUT}, {{'),
        "instructions.py",
    ),
    (STAGE2, {}, "CarRacing-Data/task.json", remove, "task.json"),
    *((STAGE2, {}, "CarRacing-Data/task.json", edit(**{name: x}), name) for name, x in TASK.items()),
    (STAGE2, {"MIN_FRAMES": 1000}, "", nothing, "MIN_FRAMES"),
    (STAGE2, {"BATCH_SIZE": 1000}, "", nothing, "BATCH_SIZE"),
    (STAGE2, {"RESUME": True}, "", nothing, "run.json"),
    (STAGE2, {"BASE_MODEL": "no/such-model"}, "", nothing, "no/such-model"),
    (STAGE2, {}, BASE, lose_a_tensor, "git-toy"),
    (STAGE2, {}, "git-toy/processor_config.json", replace('"height": 96', '"height": 48'), "git-toy"),
    (STAGE2, {}, "git-toy/config.json", edit(model_type="bert"), "git-toy"),
    (PPO, {"MODEL": "no/adapter"}, "", nothing, "no/adapter"),
    (PPO, {"EVAL_TRACKS": range(99_990, 100_010)}, "", nothing, "EVAL_TRACKS"),
    (PPO, {}, "adapter/task.json", edit(base_fingerprint="0"), "base_fingerprint"),
    *((PPO, {}, "adapter/task.json", edit(**{name: x}), name) for name, x in TASK.items()),
    *((PPO, {}, ADAPTER, spoil, "adapter") for spoil in (remove, cut, set_nan, lose_a_tensor)),
    (RESUME, {"LEARNING_RATE": 1e-3}, "", nothing, "LEARNING_RATE"),
    (RESUME, {}, "results/run.json", replace('"lap_bonus": 100.0', '"lap_bonus": 1.0'), "REWARDS"),
    *((RESUME, {}, "results/state.pt", spoil, "state.pt") for spoil in (remove, cut)),
    (RESUME, {}, POLICY, cut, "policy"),
    (EVALUATE, {}, "results/policy", remove, "results/policy"),
    (EVALUATE, {"DRIVER": "teacher", "INSTRUCTION": "fly"}, "", nothing, "INSTRUCTION"),
    (EVALUATE, {"INSTRUCTION": "left " * 60}, "", nothing, "prompt of"),
    *((EVALUATE, {}, POLICY_FACTS, edit(**{name: x}), name) for name, x in TASK.items()),
    (EVALUATE, {}, POLICY_FACTS, edit(adapter_hash="0"), "adapter_hash"),
    *((EVALUATE, {}, POLICY, spoil, POLICY) for spoil in (cut, set_nan, lose_a_tensor)),
]


@pytest.mark.parametrize("name, constant, file, spoil, named", CASES)
def test_bad_input_is_named_and_changes_nothing(name, constant, file, spoil, named, pipeline, tmp_path, script):
    root = shutil.copytree(pipeline.root, tmp_path / "run", ignore=shutil.ignore_patterns("*.mp4", "checkpoints"))
    shutil.copytree(pipeline.base, root / "git-toy")
    for path in root.rglob("*.json"):
        replace(str(pipeline.base), str(root / "git-toy"))(path)
        replace(str(pipeline.root), str(root))(path)
    data, adapter, results, base = (str(root / x) for x in ("CarRacing-Data", "adapter", "results", "git-toy"))
    good = {
        COLLECT: dict(OUTPUT_DIR=data),
        STAGE2: dict(BASE_MODEL=base, DATA_DIR=data, OUTPUT_DIR=adapter, RESULTS_DIR=results, MIN_FRAMES=1,
                     CHECKPOINT_DIR=str(root / "checkpoints"), BATCH_SIZE=16),
        PPO: TOY_PPO | dict(MODEL=adapter, RESULTS_DIR=results),
        EVALUATE: dict(POLICY=f"{results}/policy", RESULTS_DIR=results, NUM_TRACKS=1),
    }  # fmt: skip
    good[RESUME] = good[PPO] | dict(RESUME=True, NUM_STEPS=60, MINIBATCH_SIZE=60, INSTRUCTED_ENVS=1)
    good[RESUME] |= dict(TOTAL_UPDATES=3, EVAL_TRACKS=range(100_000, 100_001))
    script("car_racing_env", MAX_FRAMES=60)  # as in the pipeline
    spoil(root / file)
    before, history = files(root), {"results/run.json": "may tell of the attempt"}
    with pytest.raises(BadInput, match=named) as caught:
        script(name.strip(), **good[name] | constant).main()
    assert "\n" not in str(caught.value) and files(root) | history == before | history


def test_answers_that_one_pass_cannot_score(toy_base, script):
    answers = {"Go": 3, "Turn": 2, "Turn left": 0, "Left": 1, "Brake": 4}
    model_file = script("GitText2ActionWithPrompt", ANSWERS=answers)
    with pytest.raises(BadInput, match="ANSWERS"):
        model_file.GitText2ActionWithPrompt.from_pretrained(toy_base)


class Touch:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def bomb(tmp_path):
    """The bytes of a hostile pickle; what it would create is not there in the end."""
    path = tmp_path / "was_run"
    payload = pickle.dumps(Touch(path))
    pickle.loads(payload)
    path.unlink()  # it works
    yield payload
    assert not path.exists()


def test_pickles_in_place_of_weights(bomb, pipeline, tmp_path):
    model = GitText2ActionWithPrompt
    cases = [  # a folder, the weights in it, a name that a library falls back to, who opens it
        (pipeline.adapter, "adapter_model.safetensors", "adapter_model.bin", model.from_pretrained),
        (pipeline.results / "policy", "policy.safetensors", "policy.bin", model.from_policy),
        (pipeline.base, "model.safetensors", "pytorch_model.bin", lambda folder: load_base(str(folder))),
        (pipeline.base, "teacher", "teacher.pt", lambda folder: load_teacher(folder / "teacher")),
        (pipeline.base, "state.pt", "state.pkl", lambda folder: load_state(folder / "state.pt")),
    ]
    for number, (folder, weights, fallback, load) in enumerate(cases):
        folder = shutil.copytree(folder, tmp_path / str(number))
        (folder / weights).unlink(missing_ok=True)
        for name in (fallback, weights):
            (folder / name).write_bytes(bomb)
            with pytest.raises(BadInput, match=str(folder)):
                load(folder)


def test_pickles_in_a_trainers_checkpoint(bomb, toy_base, tmp_path, script):
    toy_lora.toy_lora(tmp_path, toy_base, EPOCHS=2).main()
    first, last = sorted((tmp_path / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    shutil.rmtree(last)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        before = (first / name).read_bytes()
        (first / name).write_bytes(bomb)
        with pytest.raises(BadInput, match=first.name):
            toy_lora.toy_lora(tmp_path, toy_base, EPOCHS=2, RESUME=True).main()
        (first / name).write_bytes(before)
