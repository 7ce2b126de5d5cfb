"""Drivers on tracks: what they score, films, the teacher's rules, golden outputs of what ships."""

import re
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from test_GitText2ActionWithPrompt import inputs

import car_racing_env
import evaluate
import film
import instructions
from benchmarks import drives
from car_racing_env import BRAKE, GAS, NO_OP
from GitText2ActionWithPrompt import ANSWERS, GitText2ActionWithPrompt, parse_answer
from road import STATE_SIZE
from support.run_files import ROOT
from targets import RACE, SIDE, Target
from teacher import Teacher, make_evaluation_env

BASE, ADAPTER, POLICY = "offline/git-tiny", "lora_git_caption_model_carllava", "results/published/policy"
GOLDEN_SPEEDS = ["forty", "fifty", "sixty-five", "seventy-five", "seventy-five", "fifty-five", "seventy-five"]
TOLD = ["", "Keep right.", "", "Drive slowly.", "Stop.", "", "Slow down.", "The left lane is closed."]
GOLDEN_ANSWERS = ["Accelerate", "Turn right", "Accelerate", "Brake", "Brake", "Brake", "Brake", "Brake"]


def test_results_do_not_depend_on_the_number_of_environments():
    """Three tracks, one and two at a time, and as in a film: the teacher, who forgets the bends when he is fast."""
    tracks, teacher, expected, asked = (100_000, 100_001, 100_005), evaluate.Teacher(), [], []

    def driver(frames, infos):
        asked.append(len(infos["state"]))
        return np.where(infos["state"][:, 0] > 0.9, ANSWERS["Accelerate"], teacher(frames, infos))

    for track in tracks:
        car = film.Drive(driver, track)
        while not car.end:
            car.step(car.decide()[0])
        expected.append({"track_seed": track, "return": pytest.approx(car.total), "end": car.end})
    decisions = len(asked)
    for num_envs in (1, 2):
        assert evaluate.evaluate(driver, tracks, num_envs) == expected
    assert sum(asked) == 3 * decisions  # asked only where a car still drives


def test_a_driver_reads_all_that_its_environments_tell(monkeypatch):
    """Three tracks in two of them that count decisions: from 0 on each track, though only a step tells it."""

    class Counted(gym.Wrapper):
        def reset(self, **kwargs):
            self.decision = 0
            return self.env.reset(**kwargs)

        def step(self, action):
            self.decision += 1
            *result, info = self.env.step(action)
            return *result, info | {"decision": self.decision}

    def driver(frames, infos):
        seen.extend(infos.get("decision", np.zeros(len(frames))))
        return np.full(len(frames), NO_OP)

    seen = []
    monkeypatch.setattr(car_racing_env, "MAX_FRAMES", 6)
    monkeypatch.setattr(evaluate, "make_evaluation_env", lambda skip: Counted(make_evaluation_env(skip)))
    evaluate.evaluate(driver, [0, 1, 2], num_envs=2)
    assert sorted(seen) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@torch.no_grad()
def test_the_heat_map_is_hugging_faces_attention(toy_model, frames):
    """Of the prompt's last token to the 4 x 4 patches, which follow the image's own first token."""
    attentions = toy_model.git(**inputs(toy_model, frames), output_attentions=True).attentions[-1]
    expected = attentions.mean(1)[:, -1, 1:17].reshape(3, 4, 4)
    assert torch.allclose(film.attention(toy_model, frames), expected, atol=1e-6)


def test_the_heat_map_reddens_what_is_looked_at():
    """The upper right one of 4 x 4 patches."""
    looks = np.zeros((4, 4), np.float32)
    looks[0, 3] = 0.2
    seen = film.overlay(np.zeros((400, 600, 3), np.uint8), looks)
    assert seen[20, 580].tolist() == [127, 20, 20] and not seen[150:].any() and not seen[:, :375].any()


def test_a_summary_by_hand():
    returns, ends = (400, 600, 910, 920), ("field", "time", "lap", "lap")
    summary = evaluate.summarize([{"return": x, "end": end} for x, end in zip(returns, ends)])
    assert (summary["laps_finished_percent"], summary["below_500_percent"]) == (50.0, 25.0)


@pytest.mark.parametrize(
    "forward, facing, target, may",
    [
        (30, 1, Target(speed=0.0), {BRAKE}),
        (16, 1, Target(speed=20.0), {GAS}),
        (70, 1, Target(side=SIDE), {BRAKE}),
        (47, 1, Target(side=SIDE), {0, 1, 2, BRAKE}),
        (0, 1, RACE, {GAS}),
        (90, 1, RACE, {BRAKE}),
        (20, -0.95, RACE, {0, 1, 2, GAS}),
    ],
)
def test_what_the_teacher_may_do_whatever_its_net_says(forward, facing, target, may):
    """In 500 states, with logits of a size that a trained net has."""
    torch.manual_seed(0)
    states, teacher = np.random.default_rng(0).uniform(-1, 1, (500, STATE_SIZE)).astype(np.float32), Teacher()
    states[:, 0], states[:, 1], states[:, 14] = forward / 50, 0, facing
    teacher.net[-1].weight.data *= 10
    done = set(teacher.act(states, target))
    assert done <= may and (len(done) > 1) == (len(may) > 1)


@pytest.mark.parametrize("name", ["middle", "slow left"])
def test_it_keeps_to_the_side_that_it_is_told(name):
    """In nearly all decisions, on a validation track: a third of its width around the middle, or the left half."""
    target = instructions.target(name)
    results = drives.drive(evaluate.Teacher(), [100_003], 150, {0: target})
    assert target.on_side(results["offset"][75:, 0]).mean() > 0.95


@pytest.fixture(scope="module")
def stretch():
    """Frames uint8 (8, 96, 96, 3) and actions of every 40th of the teacher's 281 first decisions, and their return."""
    car, frames, actions = film.Drive(evaluate.Teacher(), 100_000), [], []
    for _ in range(281):
        frames.append(car.obs), actions.append(car.decide()[0])
        car.step(actions[-1])
    return np.stack(frames[::40]), actions[::40], car.total


def test_teacher_base_and_adapter_answer_as_they_did(stretch):
    """The untaught base answers the question that it is asked; the adapter, under instructions, what to do."""
    assert stretch[1] == [GAS] * 5 + [BRAKE, GAS, GAS] and stretch[2] == pytest.approx(538.57, abs=0.01)
    base, adapter = map(GitText2ActionWithPrompt.from_pretrained, (BASE, ADAPTER))
    said = [f"the car drives at speed {speed}." for speed in GOLDEN_SPEEDS]
    assert base.ask(stretch[0], "How fast is the car?") == ["the car stands still.", *said]
    assert adapter.answer(stretch[0], TOLD) == GOLDEN_ANSWERS
    probabilities = adapter.encode(stretch[0])[1][3].exp().tolist()
    assert probabilities == pytest.approx([0.0, 0.8587, 0.0011, 0.1396, 0.0006], abs=1e-3)


@torch.no_grad()
def test_the_cards_load_what_they_describe_without_this_project(stretch, tmp_path):
    """The adapter's first block and the policy's last, run where only base, adapter and policy are."""
    code = "import numpy as np\nframe = np.load('frame.npy')\n"
    for name, block in ((BASE, None), (ADAPTER, 0), (POLICY, -1)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(ROOT / name)
        if block is not None:
            code += re.findall(r"```python\n(.*?)```", (ROOT / name / "README.md").read_text(), re.S)[block]
    np.save(tmp_path / "frame.npy", stretch[0][-1])
    command = [sys.executable, "-c", code + "print(*action_logits.tolist())"]
    said, logits = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.splitlines()
    model, frame = GitText2ActionWithPrompt.from_policy(ROOT / POLICY), stretch[0][-1:]
    assert parse_answer(said) == model.answer(frame)[0]
    assert [*map(float, logits.split())] == pytest.approx(model(frame)[0][0].tolist(), abs=1e-4)
