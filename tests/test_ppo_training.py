"""Whole toy runs of PPO: what moves while the value warms up, the average, the first loss."""

import copy

import numpy as np
import pytest
import torch
from test_GitText2ActionWithPrompt import randomize
from test_ppo_git_with_prompt import make_accelerator, make_batch, make_toys

import ppo_git_with_prompt as ppo
from GitText2ActionWithPrompt import GitText2ActionWithPrompt


def train(model, envs, state=None, **arguments):
    """Everything that `train` yields; its tensors go on changing, so they are copied."""
    arguments = {"total_updates": 5, "num_steps": 6, "k_epochs": 2} | arguments
    return [*map(copy.deepcopy, ppo.train(model, envs, make_accelerator(), state, **arguments))]


@pytest.fixture(scope="module")
def run(toy_base):
    """Five updates with a LoRA, of which three warm up."""
    torch.manual_seed(0)
    model = GitText2ActionWithPrompt.from_pretrained(toy_base)
    model.add_lora(2, 4)
    return train(model, [make_toys()])


def test_while_the_value_warms_up_nothing_else_moves(run):
    """And the learning rate falls to a tenth."""
    rates = [diagnostics["learning_rate"] for _, _, diagnostics, _ in run[1:]]
    assert rates == pytest.approx(np.linspace(1, 0.1, 5) * ppo.LEARNING_RATE)
    for kind, first in (("value_head", 1), ("policy_head", 4), ("lora_B", 4)):
        for number in range(1, 6):
            before, after = (run[i][3]["model"] for i in (number - 1, number))
            moved = any(not torch.equal(p, before[name]) for name, p in after.items() if kind in name)
            assert moved == (number >= first), (kind, number)


def test_the_average_is_the_weighted_sum_of_all_updates(run):
    """Each update's weights count EMA_DECAY of those of the next; the initial ones have what is left."""
    states = [state for *_, state in run]
    weights = [ppo.EMA_DECAY**5, *((1 - ppo.EMA_DECAY) * ppo.EMA_DECAY**k for k in (4, 3, 2, 1, 0))]
    for name, average in states[-1]["average"].items():
        expected = sum(w * state["model"][name].double() for w, state in zip(weights, states, strict=True))
        assert torch.allclose(average.double(), expected, atol=1e-6)


def test_the_first_value_loss_by_hand(toy_model):
    """Every action pays 2 and the value starts at 0, so the returns are known; nothing is normalised."""
    arguments = dict(total_updates=1, num_steps=3, k_epochs=1, normalize_return=False, gamma=0.5)
    _, (_, _, diagnostics, _) = train(toy_model, [make_toys((99, 99), pay=(2,) * 5)], **arguments)
    decay = 0.5 * ppo.GAE_LAMBDA
    returns = 2 * np.array([1 + decay + decay**2, 1 + decay, 1])
    assert diagnostics["value_loss"] == pytest.approx(0.5 * np.square(returns).mean())


def after_updates(model, start, batch, **arguments):
    """Value loss, distance from the prior and weights after 20 epochs on one batch, by the optimiser of a run."""
    model.load_trained(start, "")
    torch.manual_seed(0)
    ppo.update(model, ppo.make_optimizer(model), batch, make_accelerator(), k_epochs=20, **arguments)
    return measure(model, batch) | {"weights": copy.deepcopy(model.trained_parameters())}


def measure(model, batch):
    _, terms = ppo.compute_loss(model, batch, batch["advantage"].mean(), False)
    return {name: terms[name].item() for name in ("value_loss", "kl_to_prior")}


def test_which_way_an_update_goes(toy_model, monkeypatch):
    """The value towards the returns, the policy towards the prior if KL_COEF says so; an advantage of all is none."""
    randomize(toy_model, "_head.")
    batch, start = make_batch(toy_model), copy.deepcopy(toy_model.trained_parameters())
    same, more = (batch | {"advantage": torch.full((40,), x)} for x in (0.0, 100.0))
    before = measure(toy_model, batch)
    assert after_updates(toy_model, start, batch, warming_up=True)["value_loss"] < 0.9 * before["value_loss"]
    monkeypatch.setattr(ppo, "KL_COEF", 10.0)
    assert after_updates(toy_model, start, same)["kl_to_prior"] < 0.9 * before["kl_to_prior"]
    monkeypatch.setattr(ppo, "KL_COEF", 0.0)
    one, other = (after_updates(toy_model, start, x)["weights"] for x in (same, more))
    assert all(torch.allclose(p, other[name], atol=1e-4) for name, p in one.items())
