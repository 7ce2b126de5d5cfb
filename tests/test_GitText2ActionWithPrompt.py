"""The model and its fast pass against Hugging Face's own forward, gradients and generate, and the policy's files."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from fast import git_forward
from GitText2ActionWithPrompt import LORA_TARGETS, PROMPT, GitText2ActionWithPrompt, prompt_ids, unknown_words
from instructions import taught_sentences

ONEDNN = pytest.param(True, marks=pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN here"))


def inputs(model, frames, question=PROMPT):
    """What Hugging Face's forward wants: the processor's pixels, and `[CLS] question`."""
    pixels = model.processor.image_processor(images=list(frames.numpy()), return_tensors="pt").pixel_values
    tokens = torch.tensor(prompt_ids(model.processor.tokenizer, "", question))
    return {"pixel_values": pixels, "input_ids": tokens.expand(len(frames), -1)}


def randomize(model, *kinds):
    """Fill what starts at zero, so that it acts."""
    for name, p in model.named_parameters():
        if any(kind in name for kind in kinds):
            nn.init.normal_(p, std=0.1)


@pytest.fixture
def random_model(toy_model):
    """Its weights, biases and norms are all random."""
    torch.manual_seed(0)
    for p in toy_model.git.parameters():
        p.data += 0.1 * torch.randn_like(p)
    toy_model.prepare()
    return toy_model


@pytest.mark.parametrize("onednn", [False, ONEDNN])
@torch.no_grad()
def test_the_pass_is_hugging_faces(onednn, random_model, frames):
    """Features and whole answers' log-likelihoods, up to float32's rounding, by processor some 2e-5."""
    model, git, told = random_model, random_model.git, ["", "Keep left.", "Please drive at speed thirty-five."]
    model.weights = git_forward.prepare(git, model.processor.image_processor, onednn=onednn)
    assert model.weights.lm_head[0].is_mkldnn == onednn
    for i, (features, scores) in enumerate(zip(*model.encode(frames, told))):
        asked, expected = inputs(model, frames[i : i + 1], f"{told[i]} {PROMPT}"), []
        state = git.git(**asked).last_hidden_state[0, -1]
        assert torch.allclose(features[: len(state)], state, atol=1e-4)
        for answer in model.answers:
            whole = torch.cat([asked["input_ids"], torch.tensor([answer])], 1)
            words = git(**asked | {"input_ids": whole}).logits[0, -len(answer) - 1 :].log_softmax(-1)
            expected.append(sum(words[j, word] for j, word in enumerate(answer)))
        assert torch.allclose(scores, torch.stack(expected).log_softmax(0), atol=1e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_training_on_several_texts_is_hugging_faces(lora, random_model, frames, monkeypatch):
    """Loss and gradients of every weight (git-tiny) or LoRA weight, by a forward of its own for each text."""
    git, tokenizer = random_model.git.requires_grad_(True), random_model.processor.tokenizer
    if lora:  # in place; the others are frozen
        get_peft_model(git, LoraConfig(r=3, lora_alpha=5, target_modules=LORA_TARGETS, init_lora_weights=False))
    texts, losses = [], []
    for i in range(3):
        texts.append((prompt_ids(tokenizer, "", "How fast is the car?"), [60 + i, 61]))
        texts.append((prompt_ids(tokenizer, "Stop."), [62, 63, 64 + i]))
    for i, (prompt, answer) in enumerate(texts):
        asked = inputs(random_model, frames[i // 2][None]) | {"input_ids": torch.tensor([prompt + answer])}
        logits = git(**asked).logits[0, -len(answer) - 1 : -1]
        losses.append(F.cross_entropy(logits, torch.tensor(answer)))
    trained, loss = [p for p in git.parameters() if p.requires_grad], torch.stack(losses).mean()
    theirs = [loss, *torch.autograd.grad(loss, trained)]
    git_forward.train_by_this_pass(git, random_model.processor.image_processor)
    tokens, labels = (x.unflatten(0, (3, 2)) for x in git_forward.pad_texts(texts, tokenizer.pad_token_id))
    loss = git(pixel_values=random_model.pixels(frames), input_ids=tokens, labels=labels)["loss"]
    ours = [loss, *torch.autograd.grad(loss, trained)]
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(ours, theirs)) and len(trained) > 30
    monkeypatch.setattr(git_forward, "BFLOAT16", True)  # as if the processor could multiply it
    with git_forward.mixed_precision(random_model.device):
        loss = git(pixel_values=random_model.pixels(frames), input_ids=tokens, labels=labels)["loss"]
        weights = git_forward.collect(git, random_model.processor.image_processor)
        image = git_forward.encode_image(weights, random_model.pixels(frames))
    rounded = [loss, *torch.autograd.grad(loss, trained)]
    assert all((a - b).norm() <= 0.05 * b.norm() + 1e-3 for a, b in zip(rounded, theirs))
    assert image.dtype == torch.float32 and not torch.equal(loss, ours[0])


def test_asking_equals_generate(random_model, frames):
    """Under an instruction each, too, which make prompts of different lengths."""
    question, told = "How fast is the car?", ["", "Please drive at speed thirty-five.", "Keep left."]
    asked = inputs(random_model, frames, question)
    words = random_model.git.generate(**asked, max_new_tokens=16, do_sample=False)[:, asked["input_ids"].shape[1] :]
    theirs = random_model.processor.tokenizer.batch_decode(words, skip_special_tokens=True)
    assert random_model.ask(frames, question) == [text.replace(" - ", "-") for text in theirs]
    alone = [random_model.ask(frames[i : i + 1], question, said)[0] for i, said in enumerate(told)]
    assert random_model.ask(frames, question, told) == alone != theirs


def test_a_policy_begins_as_the_words_and_its_fresh_lora_trains_the_features_alone(toy_base, frames, tmp_path):
    """The rollout's features, without gradients, are the same; so are those of the saved policy."""
    model = GitText2ActionWithPrompt.from_pretrained(toy_base, language_prior=0.5, prior_floor=0.1, head_size=32)
    features, scores = model.encode(frames)
    logits, value = model.head(features, scores)
    prior = 0.5 * torch.log(0.9 * scores.exp() + 0.1 / scores.shape[1])
    assert torch.allclose(logits, prior, atol=1e-6) and not value.any()
    model.add_lora(rank=2, alpha=4)
    assert torch.allclose(model.features(frames), features, atol=1e-5)
    randomize(model, "_head.", "lora_B")
    mine, (new_features, new_scores) = model.features(frames), model.encode(frames)
    assert mine.requires_grad and not torch.allclose(mine, features, atol=1e-2)
    assert torch.allclose(new_features, mine, atol=1e-6) and torch.allclose(new_scores, scores, atol=1e-6)
    model.save_policy(tmp_path)
    loaded = GitText2ActionWithPrompt.from_policy(tmp_path)
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(model(frames), loaded(frames)))
    assert not any(p.requires_grad for p in loaded.git.parameters())


def test_words_that_the_base_does_not_know(toy_model):
    """Numbers are said in words; "to" is known, the rest of "tower" spelled; another alphabet has no letters."""
    tokenizer = toy_model.processor.tokenizer
    assert unknown_words(tokenizer, "Crawl to a tower at 20, please: тихо!") == ["crawl", "tower", "тихо"]
    assert not unknown_words(tokenizer, " ".join([PROMPT, *taught_sentences()]))
