"""The weights that ship, each against a golden output."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import car_racing_env
import collect_captions
import evaluate
import GitText2ActionWithPrompt as model_file
import run_files

GOLDEN_RETURN = 535.30
GOLDEN_ACTIONS = [3, 3, 3, 3, 3, 2, 3, 3]
GOLDEN_SCENE = {
    "How fast is the car?": ["zero", "ten", "twelve", "sixteen", "sixteen", "seventeen", "fourteen", "sixteen"],
    "How does the road bend?": ["middle"] * 8,
}
GOLDEN_ANSWERS = ["Accelerate"] * 5 + ["Turn left", "Accelerate", "Turn right"]
GOLDEN_PROBABILITIES = [0.0001, 0.6802, 0.3195, 0.0, 0.0002]  # of the third frame

GOLDEN_POLICY_RETURN = 127.06  # of the first 100 decisions on validation track 100,000

ADAPTER = run_files.ROOT / "lora_git_caption_model_carllava"
POLICY = run_files.ROOT / "results" / "published" / "policy"


@pytest.fixture(scope="module")
def stretch():
    """Every 40th decision of the teacher's first 280 on validation track 100,000: frames uint8 (8, 96, 96, 3), states, return."""
    env = collect_captions.PrivilegedState(car_racing_env.make_env(2), collect_captions.TILES_AHEAD)
    teacher = collect_captions.load_teacher()
    obs, info = env.reset(seed=100_000)
    frames, states, total = [], [], 0.0
    for i in range(281):
        state = torch.from_numpy(info["state"])
        if i % 40 == 0:
            frames.append(obs), states.append(state)
        obs, reward, _, _, info = env.step(int(teacher(state[None]).argmax()))
        total += reward
    return np.stack(frames), torch.stack(states), total


def test_teacher(stretch):
    _, states, total = stretch
    assert total == pytest.approx(GOLDEN_RETURN, abs=0.01)
    assert collect_captions.load_teacher()(states).argmax(1).tolist() == GOLDEN_ACTIONS


def test_git_tiny_describes(stretch):
    """The untaught base answers the question that it is asked."""
    git, processor = model_file.load_base("offline/git-tiny")
    model = model_file.GitText2ActionWithPrompt(git.eval(), processor)
    said = {}
    for question in ("How fast is the car?", "How does the road bend?"):
        model.prompt = model_file.prompt_ids(processor.tokenizer, question)
        said[question] = model.answer(stretch[0])
    assert said == GOLDEN_SCENE


def test_adapter_answers(stretch):
    model = evaluate.load_answerer(str(ADAPTER))
    assert model.answer(stretch[0]) == GOLDEN_ANSWERS
    assert model.answer_log_probs(stretch[0])[2].exp().tolist() == pytest.approx(GOLDEN_PROBABILITIES, abs=1e-3)


def test_policy_drives():
    """A tile pays 3.6: another machine's rounding may cost a tile, a worse policy costs more."""
    driver = evaluate.Policy(model_file.GitText2ActionWithPrompt.from_policy(POLICY))
    env = car_racing_env.make_env(2)
    obs, _ = env.reset(seed=100_000)
    total = 0.0
    for _ in range(100):
        obs, reward, *_ = env.step(driver(obs[None], {})[0])
        total += reward
    assert total == pytest.approx(GOLDEN_POLICY_RETURN, abs=4)


def test_the_cards_load_what_they_describe_without_this_project(stretch, tmp_path):
    """The cards' own lines, run where only base, adapter and policy are."""
    for name in ("offline/git-tiny", ADAPTER.name, "results/published/policy"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(run_files.ROOT / name)
    np.save(tmp_path / "frame.npy", stretch[0][-1])
    start = "import numpy as np\nframe = np.load('frame.npy')\n"
    end = "print(action_logits.tolist(), sum('GitText2' in name for name in __import__('sys').modules))\n"
    adapter_code = re.findall(r"```python\n(.*?)```", (ADAPTER / "README.md").read_text(), re.S)[0]
    policy_code = re.findall(r"```python\n(.*?)```", (POLICY / "README.md").read_text(), re.S)[1]
    said, logits = (
        subprocess.run(
            [sys.executable, "-c", start + code], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout
        for code in (adapter_code, policy_code + end)
    )
    model = model_file.GitText2ActionWithPrompt.from_policy(POLICY)
    assert model_file.parse_answer(said) == model.answer(stretch[0][-1:])[0]
    logits, project_modules = logits.rsplit(maxsplit=1)
    with torch.no_grad():
        expected = model(stretch[0][-1:])[0][0].tolist()
    assert json.loads(logits) == pytest.approx(expected, abs=1e-4) and project_modules == "0"
