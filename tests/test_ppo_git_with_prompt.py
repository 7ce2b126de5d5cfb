"""PPO's pure parts against independent float64 oracles, and the loop at toy size."""

import copy
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from accelerate import Accelerator

import checks
import GitText2ActionWithPrompt as model_file
import ppo_git_with_prompt as ppo
import run_files


def test_ppo_loss_by_hand():
    rng = np.random.default_rng(0)
    logits, value, returns, advantage = rng.normal(size=(6, 5)), *rng.normal(size=(3, 6))
    action, old = rng.integers(5, size=6), rng.normal(-1.5, 0.4, size=6)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    ratio = p[range(6), action] / np.exp(old)
    surrogate = np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage).mean()
    entropy = -(p * np.log(p)).sum(1).mean()
    terms = ppo.ppo_losses(*map(torch.tensor, (logits, value, action, old, advantage, returns)), 0.2)
    assert terms["policy_loss"].item() == pytest.approx(-surrogate)
    assert terms["value_loss"].item() == pytest.approx(0.5 * ((value - returns) ** 2).mean())
    assert terms["entropy"].item() == pytest.approx(entropy)
    assert terms["approx_kl"].item() == pytest.approx((ratio - 1 - np.log(ratio)).mean())
    assert terms["clipfrac"].item() == pytest.approx((np.abs(ratio - 1) > 0.2).mean())


def test_return_normalizer_equals_gymnasium():
    """One environment's rewards through Gymnasium's own wrapper."""

    class Scripted(gym.Env):
        observation_space, action_space = gym.spaces.Discrete(1), gym.spaces.Discrete(1)

        def reset(self, seed=None, options=None):
            return 0, {}

        def step(self, action):
            reward, end = script[self.t]
            self.t += 1
            return 0, reward, bool(end), False, {}

    rng = np.random.default_rng(0)
    script = list(zip(rng.normal(2, 3, size=200), rng.random(200) < 0.05))
    env = Scripted()
    env.t = 0
    theirs = gym.wrappers.NormalizeReward(env, gamma=0.99, epsilon=1e-8)
    theirs.reset()
    ours = ppo.ReturnNormalizer(1, 0.99)
    for reward, end in script:
        expected = theirs.step(0)[1]
        got = ours(torch.tensor([reward]), torch.tensor([float(end)])).item()
        assert got == pytest.approx(float(expected), rel=1e-6)
    resumed = ppo.ReturnNormalizer(1, 0.99)
    resumed.load_state_dict(ours.state_dict())
    step = torch.tensor([1.0]), torch.tensor([0.0])
    assert resumed(*step) == ours(*step)


def test_ratio_needs_the_stored_masks(toy_model, frames):
    """With a full-scale last layer, re-drawn dropout moves the policy before the first step; stored masks do not."""
    torch.nn.init.orthogonal_(toy_model.policy_head[2].weight)
    with torch.no_grad():
        features, scores = toy_model.encode(frames)
        dropout = toy_model.draw_dropout(3)
        log_probs = toy_model.head(features, scores, dropout)[0].log_softmax(-1)
    batch = {"features": features, "answer_log_probs": scores, "dropout": dropout, "action": torch.tensor([1, 2, 3])}
    batch["log_prob"] = log_probs.gather(1, batch["action"][:, None])[:, 0]
    ppo.check_ratio(toy_model, batch)
    with pytest.raises(RuntimeError, match="ratio is off"):
        ppo.check_ratio(toy_model, batch | {"dropout": toy_model.draw_dropout(3)})


def learning_batch(model, frames):
    with torch.no_grad():
        features, scores = model.encode(frames)
        dropout = model.draw_dropout(len(frames))
        logits, value = model.head(features, scores, dropout)
    action = torch.arange(len(frames)) % 5
    return {
        "features": features, "answer_log_probs": scores, "dropout": dropout, "action": action, "value": value,
        "log_prob": logits.log_softmax(-1).gather(1, action[:, None])[:, 0], "advantage": (action == 1).float(),
        "returns": torch.ones(len(frames)),
    }  # fmt: skip


def test_update_learns_the_better_action_and_warmup_only_the_value(toy_model, constants):
    frames = torch.randint(0, 256, (40, 96, 96, 3), dtype=torch.uint8)
    constants(ppo, MINIBATCH_SIZE=20)
    batch = learning_batch(toy_model, frames)
    optimizer = torch.optim.Adam([p for n, p in toy_model.named_parameters() if "_head." in n], lr=1e-2)
    before = {n: p.clone() for n, p in toy_model.named_parameters()}
    ppo.update_policy(toy_model, optimizer, batch, True, Accelerator(cpu=True))
    changed = {n for n, p in toy_model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all(n.startswith("value_head") for n in changed)
    p_before = toy_model.head(batch["features"], batch["answer_log_probs"])[0].softmax(1)[:, 1].mean()
    ppo.update_policy(toy_model, optimizer, batch, False, Accelerator(cpu=True))
    p_after = toy_model.head(batch["features"], batch["answer_log_probs"])[0].softmax(1)[:, 1].mean()
    assert p_after > p_before


def test_microbatches_add_up_to_the_minibatch(toy_model, constants):
    toy_model.add_lora(2, 4)
    for name, p in toy_model.named_parameters():
        if "lora_B" in name or name == "policy_head.2.weight":
            torch.nn.init.normal_(p, std=0.1)
    frames = torch.randint(0, 256, (20, 96, 96, 3), dtype=torch.uint8)
    batch = learning_batch(toy_model, frames) | {"frames": frames, "returns": torch.randn(20)}
    constants(ppo, TRAIN_LORA=True, MINIBATCH_SIZE=20, K_EPOCHS=2)
    results = []
    for size in (20, 7):
        constants(ppo, MICROBATCH_SIZE=size)
        model = copy.deepcopy(toy_model)
        parameters = [p for n, p in model.named_parameters() if "lora_" in n]
        torch.manual_seed(0)
        diagnostics = ppo.update_policy(model, torch.optim.SGD(parameters, lr=1.0), batch, False, Accelerator(cpu=True))
        results.append((parameters, diagnostics))
    (whole, diagnostics), (parts, diagnostics_of_parts) = results
    assert diagnostics_of_parts == pytest.approx(diagnostics, rel=1e-4, abs=1e-6)
    for before, p, q in zip((p for n, p in toy_model.named_parameters() if "lora_" in n), whole, parts):
        assert not torch.equal(before, p) and torch.allclose(p, q, atol=1e-5)


def test_not_a_number_stops_the_run(toy_model, constants):
    batch = learning_batch(toy_model, torch.randint(0, 256, (5, 96, 96, 3), dtype=torch.uint8))
    batch["returns"][0] = float("nan")
    optimizer = torch.optim.Adam(toy_model.value_head.parameters())
    with pytest.raises(checks.BadInput, match="LEARNING_RATE"):
        ppo.update_policy(toy_model, optimizer, batch, False, Accelerator(cpu=True))


@pytest.fixture
def toy_run(constants, toy_base, tmp_path):
    constants(
        ppo, ADAPTER="", BASE_WITHOUT_ADAPTER=str(toy_base), RESULTS_DIR=str(tmp_path), NUM_ENVS=2, NUM_STEPS=30,
        TOTAL_UPDATES=2, EVALUATIONS=1, MINIBATCH_SIZE=30, WARMUP_UPDATES=1, EVAL_TRACKS=range(100_000, 100_001),
    )  # fmt: skip
    # evaluation and filming are tested elsewhere: here they would only cost time
    constants(ppo.evaluate, evaluate=lambda act, tracks, envs: [{"return": 0.0, "end": "time"} for _ in tracks])
    constants(ppo.evaluate, record_video=lambda driver, track, path: 0.0)
    return functools.partial(constants, ppo), tmp_path


@pytest.mark.parametrize("train_lora", [False, True])
def test_a_run_writes_everything_and_resumes(toy_run, train_lora):
    set_constants, folder = toy_run
    set_constants(TRAIN_LORA=train_lora)
    ppo.main()
    names = {path.name for path in folder.iterdir()}  # no reward_log.csv yet: no episode ends in so few decisions
    assert {"update_log.csv", "eval_log.csv", "reward_curve.png", "ppo_losses.png", "ppo_diagnostics.png"} <= names
    assert {"state.pt", "run.json", "policy"} <= names
    assert [row["update"] for row in run_files.read_log(folder / "update_log.csv")] == ["1", "2"]
    assert float(run_files.read_log(folder / "update_log.csv")[0]["approx_kl"]) < 1e-6
    first = (folder / "update_log.csv").read_text()
    set_constants(RESUME=True, TOTAL_UPDATES=3)
    ppo.main()
    log = run_files.read_log(folder / "update_log.csv")
    assert [row["update"] for row in log] == ["1", "2", "3"]
    assert (folder / "update_log.csv").read_text().startswith(first)
    assert json.loads((folder / "policy" / "policy.json").read_text())["prompt"] == model_file.PROMPT


def test_ctrl_c_keeps_what_was_written(toy_base, tmp_path):
    """A real SIGINT to the whole process group, as a terminal sends it, after the first update."""
    code = f"""
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
import ppo_git_with_prompt as ppo
ppo.ADAPTER, ppo.BASE_WITHOUT_ADAPTER, ppo.RESULTS_DIR = "", {str(toy_base)!r}, {str(tmp_path)!r}
ppo.NUM_ENVS, ppo.NUM_STEPS, ppo.EVAL_TRACKS = 2, 20, range(100_000, 100_001)
ppo.evaluate.evaluate = lambda act, tracks, envs: [{{"return": 0.0, "end": "time"}} for _ in tracks]
ppo.main()
"""
    root = Path(ppo.__file__).parent
    run = subprocess.Popen(
        [sys.executable, "-c", code], cwd=root, start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    while len(run_files.read_log(tmp_path / "update_log.csv")) < 2 and run.poll() is None:
        time.sleep(0.2)
    os.killpg(run.pid, signal.SIGINT)
    _, output = run.communicate(timeout=60)
    assert run.returncode == 1 and "stopped by Ctrl-C" in output and "Traceback" not in output
    with pytest.raises(ProcessLookupError):  # nothing of the group is left
        os.killpg(run.pid, 0)
    assert len(run_files.read_log(tmp_path / "update_log.csv")) >= 2
    for name in ("state.pt", "policy/policy.safetensors", "reward_curve.png", "run.json"):
        assert (tmp_path / name).exists()
