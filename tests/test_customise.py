"""The changes of docs/customise.md, all applied to a copy of the sources, where `customised_` functions are tests."""

import collections
import dataclasses
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import COLLECT, STAGE2, edit, make_toy_base

import car_racing_env
import evaluate
import GitText2ActionWithPrompt as model_file
import ppo_git_with_prompt as ppo
from car_racing_env import REWARDS, make_training_env
from phrasings import INSTRUCTIONS
from support.checks import read_json
from support.run_files import ROOT, read_log

DOCUMENT = (ROOT / "docs" / "customise.md").read_text()
SWEPT = ROOT / "results" / "gamma_0.98"


def apply_edits(folder):
    """Every hunk of the document's diff blocks; its old lines must be in the named source exactly once."""
    hunks = re.findall(r"^@@ (\S+)\n((?:[ +-].*\n)+)", DOCUMENT, flags=re.M)
    assert len(hunks) == DOCUMENT.count("\n@@ ") >= 5
    for name, hunk in hunks:
        old, new = ("".join(re.findall(rf"^[{kinds}](.*\n)", hunk, flags=re.M)) for kinds in (" -", " +"))
        source = "\n" + (folder / name).read_text()
        assert source.count("\n" + old) == 1, f"{name} does not have these lines once:\n{old}"
        (folder / name).write_text(source.replace("\n" + old, "\n" + new)[1:])


def test_the_documented_changes_work(tmp_path):
    for name in ("fast", "support", "offline", "tests", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
        shutil.copy(path, tmp_path)
    apply_edits(tmp_path)
    command = [sys.executable, "-m", "pytest", "-o", "python_functions=customised_*", "tests/test_customise.py"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:]


@pytest.fixture(scope="session")
def model():
    """The policy that the document's sweep made last, after stages 1 and 2."""
    torch.set_num_threads(1)
    make_toy_base(ROOT / "microsoft/git-base", seed=1)
    edit(COLLECT, TRAIN_FRAMES=128, VALIDATION_FRAMES=32, NUM_WORKERS=1, DREAMED=4).main()
    edit(STAGE2, MIN_FRAMES=1, EPOCHS=1, LORA_RANK=4).main()
    toy = {"NUM_ENVS": 2, "NUM_STEPS": 16, "K_EPOCHS": 1, "EVALUATIONS": 1, "EVAL_TRACKS": range(100_000, 100_001)}
    vars(ppo).update(toy)
    car_racing_env.MAX_FRAMES = 40
    exec(re.search(r"```python\n(.*?)```", DOCUMENT, flags=re.S).group(1), {})
    return model_file.GitText2ActionWithPrompt.from_policy(SWEPT / "policy")


def push(env, speed):
    """The first decision of an episode at about `speed`; returns frame, reward and the speed after it."""
    env.reset(seed=0)
    hull = env.unwrapped.car.hull
    hull.linearVelocity = speed * hull.GetWorldVector((0, 1))
    obs, reward, *_ = env.step(0)
    return obs, reward, hull.linearVelocity.length


def customised_reward_and_input_of_the_heads(model):
    """Above 70 a decision costs; the last feature is the speed, which a saved policy and a LoRA see, too."""
    both, frames, speeds = (REWARDS, dataclasses.replace(REWARDS, speed_penalty=0.0)), [], []
    for pushed in (0, 20, 40, 80, 120):
        (frame, with_term, speed), (_, without, _) = (push(make_training_env(0, rewards), pushed) for rewards in both)
        assert without - with_term == pytest.approx(0.1 * max(0, speed - 70), abs=1e-4)
        frames.append(frame), speeds.append(speed)
    model.save_policy(ROOT / "results/policy")
    frames, loaded = np.stack(frames), model_file.GitText2ActionWithPrompt.from_policy(ROOT / "results/policy")
    features, _ = model.encode(frames)
    np.testing.assert_allclose(50 * features[:, -1], speeds, atol=5)
    assert torch.allclose(model(frames)[0], loaded(frames)[0], atol=1e-5)
    loaded.add_lora(rank=2, alpha=4)
    assert torch.equal(loaded.features(frames)[:, -1], features[:, -1]) and max(speeds) > 70


def customised_question_base_answers_and_instruction(model):
    """Another question to another base; a sixth answer; a new instruction is said, but not as it is held out."""
    rows = [*map(json.loads, (ROOT / "CarRacing-Data/train/metadata.jsonl").read_text().splitlines())]
    made = [read_json(ROOT / x) for x in ("lora_git_caption_model_carllava/task.json", SWEPT / "policy/policy.json")]
    questions = {rows[0]["prompt"], *(facts["prompt"] for facts in made)}
    assert questions == {"Which way should the car drive now?"} == {model.question}
    assert {facts["base_model"] for facts in made} == {"microsoft/git-base"}
    answers = collections.Counter((row["text"], row["action"]) for row in rows)
    assert answers["Ahead", 3] > 10 and answers["Accelerate", 3] > 10
    taken = [model_file.answer_of(3, probabilities) for probabilities in ([0, 0.1, 0, 0, 0, 0.9], None)]
    assert taken == ["Ahead", "Accelerate"]
    assert len(model.answers) == 6 and model_file.to_simulator(torch.arange(6)).tolist() == [0, 3, 2, 1, 4, 3]
    said = {x["sentence"] for row in rows for x in row["told"] if x["instruction"] == "crawl"}
    crawl = INSTRUCTIONS["crawl"]
    assert said & set(crawl.taught) and not said & set(crawl.held_out)


def customised_a_driver_of_ones_own_steers_to_the_grey():
    frames = np.full((3, 96, 96, 3), (100, 200, 100), np.uint8)
    frames[0, :, :30], frames[1, :, 60:], frames[2, :, 40:56] = 105, 105, 105
    actions = evaluate.DRIVERS["grey"]()(frames, {})
    assert actions.tolist() == [model_file.ANSWERS[answer] for answer in ("Turn left", "Turn right", "Accelerate")]


def customised_a_sweep_runs_with_the_constants_that_its_run_json_names(model):
    """As many decisions and as large a head; under another discount the first update has another loss."""
    made = [read_json(SWEPT.with_name(f"gamma_{gamma}") / "run.json")["constants"] for gamma in ("0.95", "0.98")]
    assert [constants["ppo_git_with_prompt.py"]["GAMMA"] for constants in made] == [0.95, 0.98]
    assert {constants["GitText2ActionWithPrompt.py"]["HEAD_SIZE"] for constants in made} == {128} == {model.head_size}
    updates, others = (read_log(SWEPT.with_name(f"gamma_{gamma}") / "update_log.csv") for gamma in ("0.98", "0.95"))
    assert [int(row["env_frames"]) for row in updates] == [64 * (1 + i) for i in range(12)]
    assert round(float(updates[0]["decisions_per_second"]) * float(updates[0]["seconds"])) == 32  # 2 x 16
    assert updates[0]["value_loss"] != others[0]["value_loss"]
