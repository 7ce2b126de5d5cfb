"""Properties over generated input, against independent float64 oracles."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import GitText2ActionWithPrompt as model_file
import ppo_git_with_prompt as ppo

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("repeatable")

finite = st.floats(-100, 100, width=32)
shapes = st.tuples(st.integers(1, 25), st.integers(1, 4))


def some(shape, elements=finite):
    return arrays(np.float64, shape, elements=elements)


flags = st.sampled_from([0.0, 1.0])


@given(st.data(), shapes, st.floats(0, 0.999), st.floats(0, 1))
def test_gae_is_the_sum_of_its_definition(data, shape, gamma, lam):
    """Every advantage as an explicit forward sum of discounted TD errors up to the episode's end."""
    reward, value, next_value = (data.draw(some(shape)) for _ in range(3))
    terminated = data.draw(some(shape, flags))
    done = np.maximum(terminated, data.draw(some(shape, flags)))
    expected = np.zeros(shape)
    for t, n in np.ndindex(*shape):
        weight = 1.0
        for k in range(t, len(reward)):
            target = reward[k, n] + gamma * (0.0 if terminated[k, n] else next_value[k, n])
            expected[t, n] += weight * (target - value[k, n])
            weight *= gamma * lam
            if done[k, n]:
                break
    advantage, returns = ppo.compute_gae(*map(torch.tensor, (reward, value, next_value, terminated, done)), gamma, lam)
    assert np.allclose(advantage, expected, atol=1e-8) and np.allclose(returns, expected + value, atol=1e-8)


@given(st.data(), shapes, st.floats(0, 0.999))
def test_rewards_are_divided_by_the_std_of_all_returns_so_far(data, shape, gamma):
    """The running variance equals numpy's over every discounted return seen, beside a prior of weight 1e-4."""
    reward, done = data.draw(some(shape)), data.draw(some(shape, flags))
    normalizer, seen, discounted = ppo.ReturnNormalizer(shape[1], gamma), [], np.zeros(shape[1])
    for step, ends in zip(reward, done):
        discounted = discounted * gamma * (1 - ends) + step
        seen += discounted.tolist()
        mean = sum(seen) / (len(seen) + 1e-4)
        variance = (1e-4 * (1 + mean**2) + np.square(np.array(seen) - mean).sum()) / (len(seen) + 1e-4)
        scaled = normalizer(torch.tensor(step), torch.tensor(ends)).numpy()
        assert np.allclose(scaled, step / np.sqrt(variance + 1e-8), rtol=1e-6, atol=1e-9)
        assert (np.sign(scaled) == np.sign(step)).all()


@given(st.integers(0, 2**31), st.integers(1, 300), st.sampled_from([0.0, 0.1, 0.5, 0.9]))
def test_dropout_masks_keep_the_expected_sum(seed, batch, share):
    """Only 0 and 1 / (1 - share) occur, the share of zeros is the asked one within five standard errors."""
    head = type("", (), {"device": torch.device("cpu")})()
    old, model_file.DROPOUT = model_file.DROPOUT, share
    torch.manual_seed(seed)
    mask = model_file.GitText2ActionWithPrompt.draw_dropout(head, batch).double().numpy()
    model_file.DROPOUT = old
    assert mask.shape == (batch, model_file.HEAD_SIZE)
    kept = mask > 0
    assert np.allclose(mask[kept], 1 / (1 - share))
    assert abs(kept.mean() - (1 - share)) <= 5 * np.sqrt(share * (1 - share) / mask.size) + 1e-12


@given(st.data(), st.integers(1, 4), st.integers(7, 30))
def test_answer_scores_are_the_products_of_word_probabilities(data, batch, vocabulary):
    logits = data.draw(arrays(np.float64, (batch, 2, vocabulary), elements=st.floats(-20, 20)))
    answers = [[0], [1], [2, 3], [2, 4], [5]]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = np.stack([np.prod([p[:, i, word] for i, word in enumerate(ids)], 0) for ids in answers], 1)
    expected /= expected.sum(1, keepdims=True)
    scores = model_file.score_answers(torch.tensor(logits).log_softmax(-1), answers)
    assert np.allclose(scores.exp(), expected, atol=1e-12)
    assert np.allclose(scores.exp().sum(1), 1)
