"""One table of bad input over the scripts and the model class: one line that names it, and nothing changed on disk."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import car_racing_env
import checks
import collect_captions
import evaluate
import GitText2ActionWithPrompt as model_file
import ppo_git_with_prompt as ppo
import train_git_lora_carllava_style as stage2


def edit_json(name, **changes):
    """Change (or with None remove) keys of a json file."""

    def spoil(root):
        facts = json.loads((root / name).read_text()) | changes
        (root / name).write_text(json.dumps({k: v for k, v in facts.items() if v is not None}))

    return spoil


def edit_row(**changes):
    """Change keys of the training split's first row."""

    def spoil(root):
        path = root / "data/train/metadata.jsonl"
        first, *others = path.read_text().splitlines()
        path.write_text("\n".join([json.dumps(json.loads(first) | changes), *others]) + "\n")

    return spoil


def write(name, text):
    return lambda root: (root / name).write_text(text)


def write_bytes(name, content):
    return lambda root: (root / name).write_bytes(content)


def cut(name, size):
    """Keep only the first bytes of a file, or of the first file that matches."""
    return lambda root: (lambda path: path.write_bytes(path.read_bytes()[:size]))(next(root.glob(name)))


def remove(name):
    return lambda root: shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()


def drop_weight(name):
    """Save a safetensors file again without its first tensor."""

    def spoil(root):
        weights = load_file(root / name)
        weights.pop(min(weights))
        save_file(weights, root / name)

    return spoil


def other_format(root):
    """A picture of another format under a PNG's name: Pillow would start a program to read some."""
    path = next((root / "data/train").glob("*.png"))
    Image.open(path).save(path, format="EPS")


def torch_file(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def resize_image(root):
    path = next((root / "data/train").glob("*.png"))
    Image.open(path).resize((64, 64)).save(path)


def frames(*shape, dtype=torch.uint8):
    """A script whose `main` asks the model about such frames."""

    def main():
        facts = json.loads((Path(ppo.ADAPTER) / "task.json").read_text())
        model_file.GitText2ActionWithPrompt.from_pretrained(facts["base_model"])(torch.zeros(shape, dtype=dtype))

    return main


def nothing(root):
    pass


REMEDY = re.compile(r"(?<![\w/.])(rerun|run|restore|put|set|use|lower|must|choose)\b(?!\.)")
CASES = [
    # who fails, constants, what is spoiled, what the line says
    (collect_captions, {"POLICY": "no/policy"}, nothing, "no policy in .*no/policy.*run ppo_git_with_prompt.py first"),
    (collect_captions, {"TEACHER": "no.safetensors"}, nothing, "no teacher in .*no.safetensors"),
    (collect_captions, {"TEACHER": "README.md"}, nothing, "cannot read .*README.md"),
    (collect_captions, {"ANSWER_BY": "nobody"}, nothing, "ANSWER_BY = 'nobody'"),
    (collect_captions, {"OUTPUT_DIR": ""}, nothing, "OUTPUT_DIR = '' is replaced as a whole: use a folder"),
    (stage2, {"OUTPUT_DIR": "results"}, nothing, "OUTPUT_DIR = 'results' is replaced as a whole: use a folder"),
    (ppo, {}, edit_json("adapter/adapter_config.json", peft_type=None), "adapter_config.json is damaged"),
    (collect_captions, {"KEEP": 0.0}, nothing, "KEEP = 0.0 .*must lie in"),
    (collect_captions, {"TRAIN_FRAMES": "many"}, nothing, "TRAIN_FRAMES = 'many' .*type int"),
    (collect_captions, {"FIRST_VALIDATION_TRACK": 5}, nothing, "FIRST_VALIDATION_TRACK = 5"),
    (stage2, {}, remove("data/train"), "no captions in .*run collect_captions.py first"),
    (stage2, {}, write("data/train/metadata.jsonl", ""), "metadata.jsonl has no rows"),
    (stage2, {}, write("data/train/metadata.jsonl", "{oops\n"), "metadata.jsonl:1 is no caption row"),
    (stage2, {}, edit_row(text="Fly"), "metadata.jsonl:1: unknown answer 'Fly'"),
    (stage2, {}, edit_row(prompt="Why?"), "prompt 'Why\\?' is not PROMPT"),
    (stage2, {}, edit_row(file_name="../../results/run.json"), "leaves the dataset's folder"),
    (stage2, {}, edit_row(file_name="/etc/passwd"), "leaves the dataset's folder"),
    (stage2, {}, edit_row(file_name="no.png"), "cannot read .*no.png"),
    (stage2, {}, cut("data/train/*.png", 200), "cannot read .*png.*rerun collect_captions.py"),
    (stage2, {}, resize_image, "is 64 x 64, others 96 x 96|is 96 x 96, others 64 x 64"),
    (stage2, {}, remove("data/run.json"), "cannot read .*run.json"),
    (stage2, {}, edit_json("data/run.json", frame_skip=4), "FRAME_SKIP = 4"),
    (stage2, {"MIN_FRAMES": 1000}, nothing, "only the shipped sample: run collect_captions.py"),
    (stage2, {"BASE_MODEL": "no/such-model"}, nothing, "BASE_MODEL 'no/such-model'"),
    (stage2, {"EPOCHS": 0}, nothing, "EPOCHS = 0"),
    (stage2, {"LEARNING_RATE": "1e-3"}, nothing, "LEARNING_RATE = '1e-3' .*type float"),
    (stage2, {"BATCH_SIZE": 1000}, nothing, "BATCH_SIZE = 1000 .*96 training frames: lower it"),
    (stage2, {"DATA_DIR": 3}, nothing, "DATA_DIR = 3 .*type str"),
    (stage2, {}, write_bytes("data/train/metadata.jsonl", b"\xff\xfe\n"), "metadata.jsonl:1 is no caption row"),
    (stage2, {}, edit_row(file_name=7), "cannot read .*/7 "),
    (stage2, {}, other_format, "cannot read .*png.*rerun collect_captions.py"),
    (stage2, {}, edit_json("data/run.json", frame_skip=None), "FRAME_SKIP = None, .*rerun the stages"),
    (ppo, {"ADAPTER": "no/adapter"}, nothing, "no adapter in .*run train_git_lora_carllava_style.py first"),
    (ppo, {}, write("adapter/task.json", "{"), "cannot read .*task.json"),
    (ppo, {}, edit_json("adapter/task.json", base_fingerprint=None), "lacks base_fingerprint"),
    (ppo, {}, edit_json("adapter/task.json", base_fingerprint="0"), "was trained on another base"),
    (ppo, {}, edit_json("adapter/task.json", prompt="Why?"), "was trained with prompt 'Why\\?'"),
    (ppo, {}, edit_json("adapter/task.json", answers=["Fly"]), "was trained with answers"),
    (ppo, {}, edit_json("adapter/task.json", frame_skip=4), "FRAME_SKIP = 4"),
    (ppo, {}, cut("adapter/adapter_model.safetensors", 100), "cannot read .*adapter_model.safetensors"),
    (ppo, {"NUM_ENVS": 1}, nothing, "NUM_ENVS = 1"),
    (ppo, {"K_EPOCHS": 2.5}, nothing, "K_EPOCHS = 2.5 .*type int"),
    (ppo, {"GAMMA": 1.0}, nothing, "GAMMA = 1.0"),
    (ppo, {"TOTAL_UPDATES": -1}, nothing, "TOTAL_UPDATES = -1"),
    (ppo, {}, remove("adapter/adapter_config.json"), "adapter_config.json is damaged .*rerun"),
    (ppo, {}, edit_json("adapter/adapter_config.json", r=7), "adapter_config.json is damaged or does not fit"),
    (ppo, {}, drop_weight("adapter/adapter_model.safetensors"), "adapter_model.safetensors does not fit .*rerun"),
    (ppo, {"EVAL_TRACKS": range(0)}, nothing, "EVAL_TRACKS .*is empty"),
    (ppo, {"STD_WEIGHT": -1.0}, nothing, "STD_WEIGHT = -1.0"),
    (ppo, {"ADAPTER": None}, nothing, "ADAPTER = None .*type str"),
    (ppo, {"RESUME": True}, write_bytes("results/state.pt", torch_file(torch.zeros(2))), "cannot read .*state.pt"),
    (ppo, {"RESUME": True, "NUM_ENVS": 4}, nothing, "num_envs = 2, now 4"),
    (ppo, {"RESUME": True, "SEED": 9}, nothing, "seed = 0, now 9"),
    (ppo, {"RESUME": True}, remove("results/state.pt"), "has a run's logs but no state.pt: restore it"),
    (ppo, {"RESUME": True}, cut("results/state.pt", 1000), "cannot read .*state.pt"),
    (evaluate, {"DRIVER": "nobody"}, nothing, "DRIVER = 'nobody'"),
    (evaluate, {"NUM_TRACKS": 0}, nothing, "NUM_TRACKS = 0"),
    (evaluate, {}, remove("results/policy"), "no policy in .*run ppo_git_with_prompt.py first"),
    (evaluate, {}, edit_json("results/policy/policy.json", frame_skip=4), "FRAME_SKIP = 4"),
    (evaluate, {}, edit_json("results/policy/policy.json", head_size=None), "head_size None"),
    (evaluate, {}, edit_json("results/policy/policy.json", base_model=None), "policy.json lacks base_model"),
    (evaluate, {}, edit_json("results/policy/policy.json", adapter_hash="0"), "was trained on another adapter"),
    (evaluate, {}, drop_weight("results/policy/policy.safetensors"), "does not fit this model .policy_head.0.bias"),
    (evaluate, {"VIDEO": "yes"}, nothing, "VIDEO = 'yes' .*type bool"),
    (evaluate, {}, cut("results/policy/policy.safetensors", 100), "cannot read .*policy.safetensors"),
    (frames(2, 96, 96, 3, dtype=torch.float32), {}, nothing, "frames must be uint8"),
    (frames(96, 96, 3), {}, nothing, "frames must be uint8"),
    (frames(1, 3, 96, 96), {}, nothing, "frames must be uint8"),
    (car_racing_env, {"FRAME_SKIP": 0}, nothing, "FRAME_SKIP = 0 in car_racing_env.py"),
    (car_racing_env, {"PENALTY_RAMP": 2.0}, nothing, "PENALTY_RAMP = 2.0"),
    (model_file, {"HEAD_SIZE": 0}, nothing, "HEAD_SIZE = 0 in GitText2ActionWithPrompt.py"),
    (model_file, {"DROPOUT": 1.5}, nothing, "DROPOUT = 1.5"),
    (model_file, {"DEVICE": "gpu"}, nothing, "DEVICE = 'gpu'"),
    (model_file, {"DEVICE": "cuda"}, nothing, "DEVICE = 'cuda' .*no GPU"),
    (model_file, {"ANSWERS": {"Go": 3, "Turn": 2, "Turn left": 2, "Left": 1, "Brake": 4}}, nothing, "cannot be scored"),
]


@pytest.mark.parametrize("who, changes, spoil, message", CASES, ids=[case[3][:40] for case in CASES])
def test_bad_input_is_named_and_changes_nothing(
    who, changes, spoil, message, pipeline, tmp_path, constants, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    root = tmp_path / "run"
    shutil.copytree(pipeline.data, root / "data")
    shutil.copytree(pipeline.adapter, root / "adapter")
    shutil.copytree(pipeline.results, root / "results", ignore=shutil.ignore_patterns("*.mp4", "tensorboard"))
    edit_policy = edit_json("results/policy/policy.json", adapter=str(root / "adapter"))
    edit_policy(root)
    data, adapter, results = str(root / "data"), str(root / "adapter"), str(root / "results")
    constants(collect_captions, OUTPUT_DIR=data, TRAIN_FRAMES=10, VALIDATION_FRAMES=10)
    constants(
        stage2, BASE_MODEL=str(pipeline.base), DATA_DIR=data, OUTPUT_DIR=adapter, RESULTS_DIR=results, MIN_FRAMES=1,
        CHECKPOINT_DIR=str(root / "checkpoints"), BATCH_SIZE=16,
    )  # fmt: skip
    constants(ppo, ADAPTER=adapter, RESULTS_DIR=results, NUM_ENVS=2, NUM_STEPS=10)
    constants(evaluate, DRIVER="policy", POLICY=f"{results}/policy", ADAPTER=adapter, RESULTS_DIR=results, NUM_TRACKS=1)
    spoil(root)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    module = model_file if callable(who) else who
    main = (
        who if callable(who) else getattr(who, "main", evaluate.main if who is car_racing_env else frames(1, 96, 96, 3))
    )
    constants(module, **changes)
    with pytest.raises(checks.BadInput, match=message) as caught:
        main()
    assert "\n" not in str(caught.value) and REMEDY.search(str(caught.value)), caught.value
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
