"""The changes of docs/customise.md, applied to a copy of the sources exactly as they are written there.

The copy runs once with all of them, by `main` below: the stages at toy size, the third as the document's own sweep.
"""

import collections
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import TALKING, edit, make_toy_base

import evaluate
import film
import GitText2ActionWithPrompt as model_file
import instructions
import ppo_git_with_prompt as ppo
from car_racing_env import REWARDS, make_env, make_training_env
from support import checkpoints
from support.checks import read_json
from support.run_files import ROOT, write_json

DOCUMENT = (ROOT / "docs" / "customise.md").read_text()


def apply_edits(folder):
    """Every hunk of the document's diff blocks; its old lines must be in the named source exactly once."""
    hunks = re.findall(r"^@@ (\S+)\n((?:[ +-].*\n)+)", DOCUMENT, flags=re.M)
    assert len(hunks) == DOCUMENT.count("\n@@ ") >= 5
    for name, hunk in hunks:
        old, new = ("".join(re.findall(rf"^[{kinds}](.*\n)", hunk, flags=re.M)) for kinds in (" -", " +"))
        source = "\n" + (folder / name).read_text()
        assert source.count("\n" + old) == 1, f"{name} does not have these lines once:\n{old}"
        (folder / name).write_text(source.replace("\n" + old, "\n" + new)[1:])


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("customised")
    for name in ("fast", "support", "offline", "tests", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    apply_edits(folder)
    command = [sys.executable, str(folder / "tests" / "test_customise.py")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(folder / "tests")])}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return read_json(folder / "seen.json")


def test_a_reward_term(seen):
    less, speed = np.array(seen["reward"]).T
    assert speed.min() < 60 and speed.max() > 80
    np.testing.assert_allclose(less, 0.1 * np.maximum(0, speed - 70), atol=1e-4)


def test_another_input_of_the_heads(seen):
    shown, speed = np.array(seen["shown_speed"]).T
    assert speed.min() < 5 and speed.max() > 80
    np.testing.assert_allclose(shown, speed, atol=5)
    assert set(seen["feature_sizes"]) == {seen["hidden_size"] + 1}
    np.testing.assert_allclose(seen["loaded_logits"], seen["saved_logits"], atol=1e-5)


def test_another_question(seen):
    assert set(seen["questions"]) == {"which way should the car drive now?"}


def test_a_sixth_answer(seen):
    assert seen["captions"]["Ahead 3"] > 10 and seen["captions"]["Accelerate 3"] > 10
    assert np.shape(seen["saved_logits"]) == (5, 6) and seen["to_simulator"] == [0, 3, 2, 1, 4, 3]


def test_another_base(seen):
    assert set(seen["base_models"]) == {"microsoft/git-base"} and len(set(seen["fingerprints"])) == 1


def test_another_instruction(seen):
    held_out = {"Could you crawl?", "Please drive as slowly as you can."}
    assert set(seen["crawled"]) & set(seen["crawl"]) and not held_out & set(seen["crawled"])  # the others are varied


def push(env, speed):
    """The first decision of an episode at about `speed`; returns frame, reward and the speed after it."""
    env.reset(seed=0)
    hull = env.unwrapped.car.hull
    hull.linearVelocity = speed * hull.GetWorldVector((0, 1))
    obs, reward, *_ = env.step(0)
    return obs, reward, hull.linearVelocity.length


def reward_facts():
    """What decisions at several speeds pay less for the new term, and the speed after each."""
    envs = [make_training_env(0, rewards) for rewards in (REWARDS, dataclasses.replace(REWARDS, speed_penalty=0.0))]
    pairs = [[push(env, speed) for env in envs] for speed in (40, 80, 120)]
    return {"reward": [(without - with_term, speed) for (_, with_term, speed), (_, without, _) in pairs]}


def model_facts(model):
    """Outputs before and after saving; the last feature as a speed beside the simulator's."""
    frames, _, speeds = zip(*(push(make_env(), speed) for speed in (0, 20, 40, 80, 120)))
    frames, envs = np.stack(frames), ppo.make_envs(seed=0, num_envs=1)
    _, data, *_ = ppo.rollout(envs, ppo.observe(*envs.reset()), model, num_steps=1)
    envs.close()
    model.save_policy(ROOT / "results/policy")
    loaded = model_file.GitText2ActionWithPrompt.from_policy(ROOT / "results/policy")
    next(film.drive(evaluate.Policy(loaded), track_seed=100_000))
    facts = {"saved_logits": model(frames)[0].tolist(), "loaded_logits": loaded(frames)[0].tolist()}
    features, _ = model.encode(frames)
    facts |= {"shown_speed": list(zip((50 * features[:, -1]).tolist(), speeds)), "hidden_size": model.feature_size - 1}
    model.add_lora(rank=2, alpha=4)
    return facts | {"feature_sizes": [x.shape[-1] for x in (features, data["features"], model.features(frames))]}


def main():
    torch.set_num_threads(1)
    base = make_toy_base(ROOT / "microsoft/git-base", seed=1)
    edit("collect_captions", TRAIN_FRAMES=128, VALIDATION_FRAMES=32, NUM_WORKERS=1, **TALKING).main()
    edit("train_git_lora_carllava_style", MIN_FRAMES=1, EPOCHS=1, LORA_RANK=4).main()
    sweep, names = re.search(r"```python\n(.*?)```", DOCUMENT, flags=re.S).group(1), {}
    exec(sweep.replace("total_updates=12", "total_updates=1, num_steps=16"), names)
    model = names["model"]
    facts = model_facts(model) | reward_facts()
    captions = [json.loads(line) for line in (ROOT / "CarRacing-Data/train/metadata.jsonl").read_text().splitlines()]
    adapter = read_json(ROOT / "lora_git_caption_model_carllava/task.json")
    policy = read_json(ROOT / "results/policy/policy.json")
    asked = model.processor.tokenizer.decode(model.prompt[1:])
    told = [told for row in captions for told in row["told"] if told["instruction"] == "crawl"]
    facts |= {
        "crawl": instructions.INSTRUCTIONS["crawl"].taught,
        "crawled": [x["sentence"] for x in told],
        "questions": [x.lower() for x in (captions[0]["prompt"], adapter["prompt"], policy["prompt"], asked)],
        "captions": collections.Counter(f"{row['text']} {row['action']}" for row in captions),
        "to_simulator": model_file.to_simulator(torch.arange(6)).tolist(),
        "base_models": [adapter["base_model"], policy["base_model"]],
        "fingerprints": [adapter["base_fingerprint"], checkpoints.fingerprint(checkpoints.load_base(base)[0])],
    }
    write_json(ROOT / "seen.json", facts)


if __name__ == "__main__":
    main()
