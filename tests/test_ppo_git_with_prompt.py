"""PPO's pure parts against independent float64 oracles, and `rollout`, `update` and `train` in toy environments."""

import copy
import functools
import threading

import gymnasium as gym
import numpy as np
import pytest
import torch
from test_GitText2ActionWithPrompt import randomize

import ppo_git_with_prompt as ppo
from GitText2ActionWithPrompt import device, to_simulator
from support import processes
from support.checks import BadInput

make_accelerator = functools.partial(processes.make_accelerator, device())


@pytest.mark.parametrize("steps, gamma, lam", [(1, 0.98, 0.95), (50, 0.98, 0.95), (50, 0.999, 1.0), (50, 0.9, 0.0)])
def test_gae_is_the_sum_of_its_definition(steps, gamma, lam):
    """Every advantage as an explicit forward sum of discounted TD errors up to the episode's end."""
    rng = np.random.default_rng(0)
    reward, value, next_value = rng.normal(size=(3, steps, 9))
    terminated, truncated = rng.choice([0.0, 1.0], (2, steps, 9), p=[0.9, 0.1])
    done, expected = np.maximum(terminated, truncated), np.zeros((steps, 9))
    for t, n in np.ndindex(steps, 9):
        weight = 1.0
        for k in range(t, len(reward)):
            target = reward[k, n] + gamma * (0.0 if terminated[k, n] else next_value[k, n])
            expected[t, n] += weight * (target - value[k, n])
            weight *= gamma * lam
            if done[k, n]:
                break
    advantage, returns = ppo.compute_gae(*map(torch.tensor, (reward, value, next_value, terminated, done)), gamma, lam)
    assert np.allclose(advantage, expected, atol=1e-8) and np.allclose(returns, expected + value, atol=1e-8)


def test_ppo_loss_by_hand():
    rng = np.random.default_rng(0)
    logits, value, returns, advantage = rng.normal(size=(6, 5)), *rng.normal(size=(3, 6))
    action, old = rng.integers(5, size=6), rng.normal(-1.5, 0.4, size=6)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    ratio = p[range(6), action] / np.exp(old)
    terms = ppo.ppo_losses(*map(torch.tensor, (logits, value, action, old, advantage, returns)), 0.2)
    assert {name: x.item() for name, x in terms.items()} == pytest.approx({
        "policy_loss": -np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage).mean(),
        "value_loss": 0.5 * ((value - returns) ** 2).mean(),
        "entropy": -(p * np.log(p)).sum(1).mean(),
        "approx_kl": (ratio - 1 - np.log(ratio)).mean(),
        "clipfrac": (np.abs(ratio - 1) > 0.2).mean(),
    })  # fmt: skip


class Toy(gym.Env):
    """Noise as frames; an action pays its simulator's index; episodes of `length` steps end or are cut off.

    Step t is told the t-th sentence of `says`, then the first again.
    """

    observation_space, action_space = gym.spaces.Box(0, 255, (96, 96, 3), np.uint8), gym.spaces.Discrete(5)
    episode = -1

    def __init__(self, number, length, truncates, pay=(0, 1, 2, 3, 4), says=("",)):
        self.number, self.length, self.truncates, self.pay, self.says = number, length, truncates, pay, says

    def see(self, **info):
        rng = np.random.default_rng([self.number, self.episode, self.t])
        return rng.integers(0, 256, (96, 96, 3), np.uint8), info | {"instruction": self.says[self.t % len(self.says)]}

    def reset(self, *, seed=None, options=None):
        self.episode, self.t = self.episode + 1, 0
        return self.see()

    def step(self, action):
        self.t += 1
        end = self.t == self.length
        summary = {"episode_summary": {"track_seed": 100 * self.number + self.episode, "length": self.t}} if end else {}
        frame, info = self.see(**summary)
        return frame, self.pay[action], end and not self.truncates, end and self.truncates, info

    def snapshot(self):
        """What a resumed run would need; nothing here is resumed."""


def make_toys(lengths=(4, 3), **kwargs):
    """Two toys; the first one's episodes are cut off, the second one's end."""
    toys = [functools.partial(Toy, i, length, i == 0, **kwargs) for i, length in enumerate(lengths)]
    return gym.vector.SyncVectorEnv(toys, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)


def test_return_normalizer_equals_gymnasium():
    """One environment whose episodes end, and two that go on, through Gymnasium's own wrappers."""
    one = gym.wrappers.NormalizeReward(Toy(0, 7, False), 0.99, 1e-8)
    two = gym.wrappers.vector.NormalizeReward(make_toys((999, 999)), 0.99, 1e-8)
    for env, size in ((one, 1), (two, 2)):
        ours, _ = ppo.ReturnNormalizer(size, 0.99), env.reset()
        for actions in np.random.default_rng(0).integers(5, size=(100, size)):
            _, expected, ended, *_ = env.step(actions if size == 2 else actions[0])
            scaled = ours(torch.tensor(actions), torch.tensor(ended))
            assert scaled.tolist() == pytest.approx(np.atleast_1d(expected), rel=1e-5)
            if size == 1 and ended:
                env.unwrapped.reset()


@pytest.mark.parametrize("lora", [False, True])
@torch.no_grad()
def test_a_rollout_holds_what_was_seen_done_and_paid(toy_model, lora):
    """Against single environments that take the same actions, one frame at a time; a LoRA needs the frames again."""
    if lora:
        toy_model.add_lora(2, 4)
    randomize(toy_model, "_head.", "lora_B")
    says, num_steps, ended, cut = ("Stop.", "Stop.", "Keep left."), 10, [], 0
    envs = make_toys(says=says)
    (following, _), data, episodes, _ = ppo.rollout(envs, ppo.observe(*envs.reset()), None, toy_model, num_steps)
    for n, env in enumerate((Toy(0, 4, True, says=says), Toy(1, 3, False, says=says))):
        frame, info = env.reset()
        for t in range(num_steps):
            step, told = {name: x[t, n] for name, x in data.items()}, info["instruction"]
            assert not lora or (np.array_equal(step["frames"], frame) and step["instructions"] == told)
            features, scores = toy_model.encode(frame[None], told)
            logits, value = toy_model.head(features, scores, step["dropout"][None])
            log_prob = logits.log_softmax(1)[0, step["action"]]
            frame, reward, terminated, truncated, info = env.step(to_simulator(step["action"]))
            next_value = torch.tensor(0.0) if terminated else toy_model(frame[None], told)[1][0]
            expected = {"features": features[0], "answer_log_probs": scores[0], "log_prob": log_prob, "value": value[0]}
            for name, x in (expected | {"next_value": next_value}).items():
                assert torch.allclose(step[name], x, atol=1e-5), name
            done = terminated or truncated or info["instruction"] != told
            assert (step["reward"], step["terminated"], step["done"]) == (reward, terminated, done)
            cut += done
            if terminated or truncated:
                ended.append((t, info["episode_summary"]))
                frame, info = env.reset()
        assert np.array_equal(following[n], frame)
    assert cut > len(ended)
    assert sorted(episodes, key=str) == sorted(ended, key=str) and len(ended) == 2 + 3
    assert data["dropout"].unique().tolist() == [0.0, pytest.approx(1 / 0.9)]
    assert (data["dropout"] == 0).float().mean() == pytest.approx(0.1, abs=0.02)  # five standard deviations


def make_batch(model, size=40):
    """Decisions of a rollout in toys; of the actions 4 is the better one."""
    envs = make_toys()
    _, data, *_ = ppo.rollout(envs, ppo.observe(*envs.reset()), None, model, size // 2)
    batch = {name: x.reshape(-1, *x.shape[2:]) for name, x in data.items()}
    return batch | {"advantage": (batch["action"] == 4).float(), "returns": torch.linspace(0, 1, size)}


def test_an_interrupt_does_not_wait_for_the_other_rollouts(monkeypatch):
    driving, noticed, driven = threading.Event(), threading.Event(), []

    def rollout(worker, *_, **__):
        if worker == "interrupted" and driving.wait(10):
            raise KeyboardInterrupt
        driving.set()
        driven.append(noticed.wait(3))

    monkeypatch.setattr(ppo, "rollout", rollout)
    with pytest.raises(KeyboardInterrupt):
        ppo.rollouts(["interrupted", "driving"], [None] * 2, [None] * 2, None, 1)
    assert not driven
    noticed.set()


def test_an_update_learns_the_better_action_and_needs_the_stored_masks(toy_model, monkeypatch):
    """The ratio is 1 before the first step; re-drawn dropout would move it. Losses that are no number stop the run.

    Gradients are clipped: to nothing, nothing moves.
    """
    randomize(toy_model, "_head.")
    batch, heads = make_batch(toy_model), [p for n, p in toy_model.named_parameters() if "_head." in n]
    optimizer = torch.optim.Adam(heads, lr=1e-2)
    with pytest.raises(AssertionError):
        ppo.update(toy_model, optimizer, batch | {"dropout": toy_model.draw_dropout(40)}, make_accelerator())
    with pytest.raises(BadInput, match="LEARNING_RATE"):
        ppo.update(toy_model, optimizer, batch | {"returns": torch.full((40,), torch.nan)}, make_accelerator())
    before = toy_model.head(batch["features"], batch["answer_log_probs"])[0].softmax(1)[:, 4].mean()
    with monkeypatch.context() as patch:
        patch.setattr(ppo, "MAX_GRAD_NORM", 0.0)
        ppo.update(toy_model, optimizer, batch, make_accelerator(), k_epochs=1)
    assert toy_model.head(batch["features"], batch["answer_log_probs"])[0].softmax(1)[:, 4].mean() == before
    diagnostics = ppo.update(toy_model, optimizer, batch, make_accelerator(), k_epochs=1)
    assert abs(diagnostics["approx_kl"]) < 1e-6 and diagnostics["clipfrac"] == 0
    assert toy_model.head(batch["features"], batch["answer_log_probs"])[0].softmax(1)[:, 4].mean() > before


def test_a_lora_that_trains_learns_with_the_heads(toy_model):
    toy_model.add_lora(2, 4)
    randomize(toy_model, "lora_B", "_head.")
    before = copy.deepcopy(toy_model.trained_parameters())
    optimizer = ppo.make_optimizer(toy_model)
    ppo.update(toy_model, optimizer, make_batch(toy_model, 20), make_accelerator(), k_epochs=1)
    assert not any(torch.equal(before[name], p) for name, p in toy_model.trained_parameters().items())
