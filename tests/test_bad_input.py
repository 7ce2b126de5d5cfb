"""Bad input: BadInput names it and nothing on disk changes; hostile files run nothing."""

import shutil
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from conftest import COLLECT, PPO, STAGE2, toy_script
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from toy_process import files

import instructions
import questions
from captions import Captions, Collator
from GitText2ActionWithPrompt import answer_ids
from phrasings import INSTRUCTIONS, sentences
from road import read_state
from support.checkpoints import check_lora
from support.checks import BadInput
from targets import SIDE, Target
from teacher import load_teacher, make_evaluation_env

EVALUATE = "evaluate"
METADATA, VALIDATION = (f"CarRacing-Data/{split}/metadata.jsonl" for split in ("train", "validation"))
DATA_TASK = "CarRacing-Data/task.json"
BASE, ADAPTER, ADAPTER_TASK = "git-toy/model.safetensors", "adapter/adapter_model.safetensors", "adapter/task.json"
POLICY, POLICY_FACTS = "results/policy/policy.safetensors", "results/policy/policy.json"
BOMB = b"csys\nexit\n(tR."  # a pickle that calls sys.exit() where it is executed


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def replace(old, new, count=-1):
    return lambda path: path.write_text(path.read_text().replace(old, new, count))


def spoil_a_tensor(change, path):
    weights = load_file(path)
    change(weights, min(weights))
    save_file(weights, path)


def fill(content):
    return lambda path: path.write_bytes(content)


def bomb_as(name):
    """In place of the file, under a name that a library falls back to."""
    return lambda path: bomb(path.rename(path.with_name(name)))


damage, bomb, lose_a_tensor = fill(b"{"), fill(BOMB), partial(spoil_a_tensor, dict.pop)
make_nan = partial(spoil_a_tensor, lambda weights, name: weights[name].fill_(torch.nan))
HURT = (remove, damage, bomb, lose_a_tensor, make_nan)
TASK = {"prompt": ("What", "Why"), "answers": ("Coast", "Fly"), "frame_skip": ('"frame_skip": 2', '"frame_skip": 4')}
TASK["actions"] = ("  2,\n  1,", "  1,\n  2,")  # mirrored
ANOTHER_BASE = replace('base_fingerprint": "', 'base_fingerprint": "0')
HELD_OUT = '{"instruction": "slow", "split": "taught", "sentence": "I want to go gently.", "text": "Brake"}'
CONSTANTS = [  # script, what its user sets, what the message names
    *((script, {name: "no/such"}, "no/such") for script, name in ((COLLECT, "POLICY"), (STAGE2, "ADAPTER"))),
    *((script, {name: "no/such"}, "no/such") for script, name in ((STAGE2, "BASE_MODEL"), (PPO, "MODEL"))),
    (COLLECT, {"ANSWER_BY": "nobody"}, "ANSWER_BY"),
    (COLLECT, {"VALIDATION_TRACKS": range(0, 5)}, "VALIDATION_TRACKS"),
    *((STAGE2, {name: 1000}, name) for name in ("MIN_FRAMES", "BATCH_SIZE")),
    (STAGE2, {"MIN_FRAMES": 100, "MORE_DATA": ("CarRacing-Data",)}, "96 training frames"),
    (PPO, {"EVAL_TRACKS": range(99_990, 100_010)}, "EVAL_TRACKS"),
    (PPO, {"RESULTS_DIR": "ROOT/adapter"}, "ROOT/adapter"),
    *((script, {"RESUME": True, "LEARNING_RATE": 1e-3}, "LEARNING_RATE") for script in (STAGE2, PPO)),
    (EVALUATE, {"DRIVER": "teacher", "INSTRUCTION": "fly"}, "INSTRUCTION"),
    (EVALUATE, {"INSTRUCTION": "left " * 60}, "prompt"),
]
# what is replaced as a whole holds files of nobody knows whom, another script's, or another output
for stage, constant in ((COLLECT, "OUTPUT_DIR"), (STAGE2, "OUTPUT_DIR"), (STAGE2, "CHECKPOINT_DIR")):
    CONSTANTS += [(stage, {constant: x}, x) for x in ("ROOT", "ROOT/results", "ROOT/results/policy")]
for replaced, other in (("OUTPUT_DIR", "RESULTS_DIR"), ("CHECKPOINT_DIR", "OUTPUT_DIR")):
    CONSTANTS.append((STAGE2, {replaced: "ROOT/adapter", other: "ROOT/adapter/inside"}, "ROOT/adapter"))
FILES = [  # script, what its user sets, what is spoiled and how, what the message names
    (STAGE2, {}, "CarRacing-Data/train", remove, "CarRacing-Data/train"),
    (STAGE2, {}, METADATA, damage, "metadata.jsonl"),
    (STAGE2, {}, METADATA, replace('"Accelerate"', '"Fly"'), "metadata.jsonl"),
    (STAGE2, {}, VALIDATION, replace('"told": [{', f'"told": [{HELD_OUT}, {{', 1), "settings"),
    (STAGE2, {}, "CarRacing-Data/run.json", replace('"instructions": "', '"instructions": "0'), "instructions"),
    (STAGE2, {}, "CarRacing-Data/run.json", replace('"questions": "', '"questions": "0'), "questions"),
    (STAGE2, {}, METADATA, replace('"told": [{', f'"told": [{HELD_OUT}, {{'), "phrasings.py"),
    *((STAGE2, {}, BASE, spoil, "git-toy") for spoil in (lose_a_tensor, bomb, bomb_as("pytorch_model.bin"))),
    (STAGE2, {}, "git-toy/processor_config.json", replace('"height": 96', '"height": 48'), "git-toy"),
    (STAGE2, {}, "git-toy/config.json", replace('"git"', '"bert"'), "git-toy"),
    (STAGE2, {"ADAPTER": "ROOT/adapter"}, ADAPTER_TASK, ANOTHER_BASE, "base_fingerprint"),
    (STAGE2, {"RESUME": True}, "checkpoints", remove, "run.json"),
    (STAGE2, {"RESUME": True}, "checkpoints/checkpoint-12/optimizer.pt", bomb, "checkpoint-12"),
    (PPO, {}, ADAPTER_TASK, ANOTHER_BASE, "base_fingerprint"),
    *((PPO, {}, ADAPTER, spoil, "adapter/adapter_") for spoil in (*HURT, bomb_as("adapter_model.bin"))),
    (PPO, {"RESUME": True}, "results/run.json", replace('"lap_bonus": 100.0', '"lap_bonus": 1.0'), "REWARDS"),
    *((PPO, {"RESUME": True}, "results/state.pt", spoil, "state.pt") for spoil in (remove, damage, bomb)),
    (EVALUATE, {}, "results/policy", remove, "results/policy"),
    (EVALUATE, {}, POLICY_FACTS, replace('adapter_hash": "', 'adapter_hash": "0'), "adapter_hash"),
    (EVALUATE, {}, POLICY_FACTS, ANOTHER_BASE, "base_fingerprint"),
    *((EVALUATE, {}, POLICY, spoil, POLICY) for spoil in HURT),
]
for stage, path in ((STAGE2, DATA_TASK), (PPO, ADAPTER_TASK), (EVALUATE, POLICY_FACTS)):
    FILES += [(stage, {}, path, replace(*words), name) for name, words in TASK.items()]
NOTHING = "", lambda path: None  # no file is spoiled
CASES = [*((script, changes, *NOTHING, named) for script, changes, named in CONSTANTS), *FILES]


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


def test_what_the_model_refuses_leaves_the_checkpoints(pipeline, tmp_path, script):
    root = shutil.copytree(pipeline.root, tmp_path / "run", ignore=shutil.ignore_patterns("*.mp4"))
    inputs = dict(BASE_MODEL=str(pipeline.base), DATA_DIR=str(pipeline.data))
    stage2, before = toy_script(STAGE2, root, **inputs), files(root)
    stage2.GitText2ActionWithPrompt = Mock(side_effect=BadInput("ANSWERS"))
    with pytest.raises(BadInput, match="ANSWERS"):
        stage2.main()
    assert list(root.glob("checkpoints/checkpoint-*")) and files(root) == before


@pytest.mark.parametrize("unread", [{"lora_dropout": 0.1}, {"use_dora": True}, {"target_modules": ["word_embeddings"]}])
def test_a_lora_that_the_pass_does_not_compute(toy_model, unread):
    config = LoraConfig(**{"r": 2, "target_modules": ["query"]} | unread)
    with pytest.raises(BadInput, match="LoRA"):
        check_lora(get_peft_model(toy_model.git, config))


def test_a_frame_that_is_missing(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "000001_0002.png", "text": "Brake"}')
    with pytest.raises(BadInput, match="000001_0002.png"):
        Captions(tmp_path)[0]


def test_a_sentence_longer_than_the_model(toy_model, frames):
    with pytest.raises(BadInput, match="tokens"):
        Collator(toy_model.processor, lambda row: [("left " * 70, "", "Coast")])([(frames[0].numpy(), {})])


def test_a_sentence_that_is_taught_and_held_out(monkeypatch):
    """But for a small word."""
    slow = INSTRUCTIONS["slow"]._replace(held_out=("Please drive slowly here.",))
    monkeypatch.setitem(INSTRUCTIONS, "slow", slow)
    monkeypatch.setattr(instructions, "held_out_sentences", instructions.held_out_sentences.__wrapped__)
    with pytest.raises(BadInput, match="drive slowly"):
        instructions.check_phrasings()


def test_a_stop_at_a_side(monkeypatch):
    monkeypatch.setattr(instructions, "COMBINATIONS", {"stop left"})
    with pytest.raises(BadInput, match="stop left"):
        instructions.check_phrasings()
    monkeypatch.setitem(INSTRUCTIONS, "park", INSTRUCTIONS["stop"]._replace(target=Target(0.0, -SIDE)))
    with pytest.raises(BadInput, match="park"):
        instructions.check_phrasings()


@pytest.mark.parametrize("taught", [("Crawl",), ("Crawl. Creep",), sentences("Crawl. Creep")])
def test_a_phrasing_without_its_mark(monkeypatch, taught):
    monkeypatch.setitem(INSTRUCTIONS, "crawl", INSTRUCTIONS["slow"]._replace(taught=taught))
    with pytest.raises(BadInput, match="Cr"):
        instructions.check_phrasings()


def test_a_teacher_of_another_size(tmp_path):
    save_file({"net.0.weight": torch.zeros(192, 46)}, tmp_path / "teacher.safetensors")
    with pytest.raises(BadInput, match="teacher.safetensors .* net.0.weight"):
        load_teacher(tmp_path / "teacher.safetensors")


def test_a_question_without_an_answer_and_an_answer_without_a_question(monkeypatch):
    env = make_evaluation_env()
    _, info = env.reset(seed=0)
    without_speed = {about: asked for about, asked in questions.QUESTIONS.items() if about != "speed"}
    for about, known in (("edge", questions.QUESTIONS | {"edge": ("Is it near?",)}), ("speed", without_speed)):
        monkeypatch.setattr(questions, "QUESTIONS", known)
        with pytest.raises(BadInput, match=about):
            questions.describe(read_state(info["state"]), env.get_wrapper_attr("road"))


def test_answers_that_one_pass_cannot_score(toy_model):
    with pytest.raises(BadInput, match="ANSWERS"):
        answer_ids(toy_model.processor.tokenizer, ("Go", "Turn", "Turn left", "Left", "Brake"))
