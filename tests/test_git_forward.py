"""The forward pass's own parts; that it equals Hugging Face's is in test_GitText2ActionWithPrompt.py."""

import copy

import pytest
import torch
from torch.nn import functional as F

import git_forward

only_onednn = pytest.mark.skipif(not git_forward.ONEDNN, reason="this processor takes torch's own linear map")


def tensors(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("activation", [None, F.silu, F.gelu, torch.tanh])
@pytest.mark.parametrize("shape", [(1, 1, 16), (3, 7, 16)])
def test_linear_is_torch_s(activation, shape):
    x, weight, bias = tensors(shape, (24, 16), (24,))
    expected = F.linear(x.double(), weight.double(), bias.double())
    expected = activation(expected) if activation else expected
    with torch.no_grad():
        assert torch.allclose(git_forward.linear(x, weight, bias, activation).double(), expected, atol=1e-5)
    assert torch.allclose(git_forward.linear(x, weight, bias, activation).double(), expected, atol=1e-5)


@pytest.mark.parametrize("frozen", [(), ("x",), ("weight",), ("bias",), ("x", "weight"), ("x", "bias")])
def test_gradients_are_torch_s(frozen):
    mine, theirs = ({n: t for n, t in zip(("x", "weight", "bias"), tensors((3, 7, 16), (24, 16), (24,)))} for _ in "ab")
    for one in (mine, theirs):
        for name in frozen:
            one[name].requires_grad_(False)
    git_forward.linear(**mine, activation=F.gelu).square().sum().backward()
    F.gelu(F.linear(*(t.double() for t in theirs.values()))).square().sum().backward()
    for name in mine:
        if name in frozen:
            assert mine[name].grad is None
        else:
            assert torch.allclose(mine[name].grad, theirs[name].grad, rtol=1e-4, atol=1e-4)


@only_onednn
@torch.no_grad()
def test_both_libraries_give_the_same_features(toy_model, frames, monkeypatch):
    features, scores = toy_model.encode(frames)
    monkeypatch.setattr(git_forward, "ONEDNN", False)
    toy_model._collected.clear()
    for mine, theirs in zip((features, scores), toy_model.encode(frames)):
        assert torch.allclose(mine, theirs, atol=1e-5)


@torch.no_grad()
def test_weights_are_collected_anew_when_they_change(toy_model, frames):
    first = toy_model.weights()
    assert toy_model.weights() is first
    copied = copy.deepcopy(toy_model)
    assert torch.equal(copied.features(frames), toy_model.features(frames))
    toy_model.to("cpu")
    assert toy_model.weights() is not first
    before = toy_model.features(frames)
    toy_model.git.git.encoder.layer[0].attention.self.value.weight *= 3  # in `qkv` a copy
    assert not torch.allclose(toy_model.features(frames), before, atol=1e-2)


def test_a_lora_is_part_of_its_layer_s_weight(toy_model, frames):
    """Against PEFT's own forward, and every LoRA weight gets a gradient."""
    toy_model.add_lora(rank=2, alpha=4)
    for name, p in toy_model.git.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    pixels = toy_model.processor.image_processor(images=list(frames.numpy()), return_tensors="pt").pixel_values
    prompt = torch.tensor(toy_model.prompt).expand(3, -1)
    theirs = toy_model.git.get_base_model().git(input_ids=prompt, pixel_values=pixels).last_hidden_state[:, -1]
    mine = toy_model.features(frames)
    assert torch.allclose(mine, theirs, atol=1e-5)

    def gradients(features):
        toy_model.zero_grad()
        features.square().sum().backward()
        return {
            n: p.grad.clone() for n, p in toy_model.git.named_parameters() if p.requires_grad and p.grad is not None
        }

    mine, theirs = gradients(mine), gradients(theirs)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.allclose(mine[name], theirs[name], rtol=1e-3, atol=1e-4), name


@torch.no_grad()
def test_the_way_of_a_gpu_in_bfloat16(toy_model, frames, monkeypatch):
    """On CUDA the same pass runs under autocast; here on a CPU, float32 results within bfloat16's digits."""
    features, scores = toy_model.encode(frames)
    words = toy_model.answer(frames)
    monkeypatch.setattr(git_forward, "ONEDNN", False)
    monkeypatch.setattr(toy_model, "_autocast", lambda: torch.autocast("cpu", torch.bfloat16))
    toy_model._collected.clear()
    rough_features, rough_scores = toy_model.encode(frames)
    assert rough_features.dtype == rough_scores.dtype == torch.float32
    assert not torch.equal(rough_features, features)
    assert torch.allclose(rough_features, features, atol=0.05) and torch.allclose(rough_scores, scores, atol=0.05)
    assert len(toy_model.answer(frames)) == len(words)


def test_gradients_reach_the_pixels(toy_model, frames, monkeypatch):
    """Through packed matrices too, as a saliency map wants them."""
    pixels = frames.permute(0, 3, 1, 2).float().requires_grad_()
    weights = toy_model.weights()
    git_forward.encode_image(weights, pixels).square().sum().backward()
    by_onednn, pixels.grad = pixels.grad, None
    plain = git_forward.collect(toy_model.git, toy_model.processor.image_processor)
    monkeypatch.setattr(git_forward, "ONEDNN", False)
    git_forward.encode_image(plain, pixels).square().sum().backward()
    assert torch.allclose(by_onednn, pixels.grad, rtol=1e-3, atol=1e-4) and by_onednn.abs().max() > 0
