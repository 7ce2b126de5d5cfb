"""The model and its fast pass against Hugging Face's own forward, gradients and generate, and the policy's files."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from fast import git_forward
from GitText2ActionWithPrompt import LORA_TARGETS, PROMPT, GitText2ActionWithPrompt, prompt_ids, resize

ONEDNN = pytest.param(True, marks=pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN here"))
TOKENS = torch.arange(5, 26).reshape(3, 7)


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


def run(weights, pixels, rows=None):
    """States of image and text, or of some `rows` of them, and the text's logits."""
    image = git_forward.encode_image(weights, pixels)
    x = torch.cat([image, git_forward.embed(weights, TOKENS)], 1)
    mask = git_forward.prefix_mask(image.shape[1], TOKENS.shape[1], x.device)
    states, _ = git_forward.decode(weights, x, mask, rows=rows)
    return states, git_forward.linear(states[:, -TOKENS.shape[1] :], *weights.lm_head)


@pytest.mark.parametrize("onednn", [False, ONEDNN])
@torch.no_grad()
def test_the_pass_is_hugging_faces(onednn, random_model, frames):
    """All rows, and some of each image's alone; up to float32's rounding, which differs between processors by some 2e-5."""
    git, processor = random_model.git, random_model.processor.image_processor
    output = git(**inputs(random_model, frames) | {"input_ids": TOKENS}, output_hidden_states=True)
    weights, pixels = git_forward.prepare(git, processor, onednn=onednn), resize(frames, processor)
    assert weights.lm_head[0].is_mkldnn == onednn
    states, logits = run(weights, pixels)
    assert torch.allclose(states, output.hidden_states[-1], atol=1e-4)
    assert torch.allclose(logits, output.logits[:, -7:], atol=1e-4)
    rows = torch.tensor([[3, 20], [17, 18], [23, 0]])
    chosen = torch.stack([states[i, row] for i, row in enumerate(rows)])
    assert torch.allclose(run(weights, pixels, rows)[0], chosen, atol=1e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_training_on_several_texts_is_hugging_faces(lora, random_model, frames):
    """Loss, gradients and what is exactly right, by a forward of its own for each text; padding changes nothing.

    Of every weight, as the making of git-tiny trains them, and of every LoRA weight, as PEFT computes them.
    """
    git, tokenizer = random_model.git.requires_grad_(True), random_model.processor.tokenizer
    if lora:  # in place; the others are frozen
        get_peft_model(git, LoraConfig(r=3, lora_alpha=5, target_modules=LORA_TARGETS, init_lora_weights=False))
    prompts = [[prompt_ids(tokenizer, "", "How fast is the car?"), prompt_ids(tokenizer, "Stop.")]] * 3
    answers = [[[60 + i, 61], [62, 63, 64 + i]] for i in range(3)]
    tokens, labels = (torch.full((3, 2, 25), pad) for pad in (tokenizer.pad_token_id, -100))
    losses, right = [], []
    for i, j in ((i, j) for i in range(3) for j in range(2)):
        prompt, answer = prompts[i][j], answers[i][j]
        text = torch.tensor([prompt + answer])
        tokens[i, j, : text.shape[1]] = text
        labels[i, j, len(prompt) : text.shape[1]] = torch.tensor(answer)
        logits = git(**inputs(random_model, frames[i : i + 1]) | {"input_ids": text}).logits[0, -text.shape[1] :]
        logits = logits[len(prompt) - 1 : -1]
        losses.append(F.cross_entropy(logits, torch.tensor(answer)))
        right.append(logits.argmax(-1).tolist() == answer)
    trained, pixels = [p for p in git.parameters() if p.requires_grad], random_model.pixels(frames)
    theirs = [torch.stack(losses).mean()]
    theirs += torch.autograd.grad(theirs[0], trained)
    git_forward.train_by_this_pass(git, random_model.processor.image_processor)
    output = git(pixel_values=pixels, input_ids=tokens, labels=labels)
    ours = [output["loss"], *torch.autograd.grad(output["loss"], trained)]
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(ours, theirs)) and len(trained) > 30
    labels[0, 1][labels[0, 1] != -100] = output["logits"][0, 1].argmax(-1)[:-1][labels[0, 1, 1:] != -100]
    right[1] = True
    assert git_forward.exactly_right(output["logits"], labels).flatten().tolist() == right


@torch.no_grad()
def test_one_pass_equals_hugging_face(toy_model, frames):
    """Features, and each whole answer's log-likelihood by a forward over prompt + answer, one at a time."""
    features, scores = toy_model.encode(frames)
    states = toy_model.git.git(**inputs(toy_model, frames)).last_hidden_state
    assert torch.allclose(features, states[:, -1], atol=1e-5)
    assert torch.allclose(toy_model.features(frames), states[:, -1], atol=1e-5)
    told = ["", "Keep left.", "Please drive at speed thirty-five."]
    for one, several in zip(
        zip(*(toy_model(frames[i : i + 1], said) for i, said in enumerate(told))), toy_model(frames, told)
    ):
        assert torch.allclose(torch.cat(one), several, atol=1e-5)
    spoken = inputs(toy_model, frames[1:2], f"{told[1]} {PROMPT}")
    assert torch.allclose(
        toy_model.features(frames, told)[1], toy_model.git.git(**spoken).last_hidden_state[0, -1], atol=1e-5
    )
    pixels, expected = inputs(toy_model, frames)["pixel_values"], []
    for answer in toy_model.answers:
        tokens = torch.tensor(toy_model.prompt + answer).expand(3, -1)
        words = toy_model.git(input_ids=tokens, pixel_values=pixels).logits[:, -len(answer) - 1 :].log_softmax(-1)
        expected.append(sum(words[:, i, word] for i, word in enumerate(answer)))
    assert torch.allclose(scores, torch.stack(expected, 1).log_softmax(1), atol=1e-5)


@pytest.mark.parametrize("question", [PROMPT, "How fast is the car?"])
def test_asking_equals_generate(random_model, frames, question):
    asked = inputs(random_model, frames, question)
    words = random_model.git.generate(**asked, max_new_tokens=16, do_sample=False)[:, asked["input_ids"].shape[1] :]
    theirs = random_model.processor.tokenizer.batch_decode(words, skip_special_tokens=True)
    assert random_model.ask(frames, question) == [text.replace(" - ", "-") for text in theirs]
    told = ["", "Please drive at speed thirty-five.", "Keep left."]
    alone = [random_model.ask(frames[i : i + 1], question, said)[0] for i, said in enumerate(told)]
    assert random_model.ask(frames, question, told) == alone != theirs


@torch.no_grad()
def test_an_untrained_head_says_what_the_words_say(toy_model, toy_base, frames):
    logits, value = toy_model(frames)
    p = toy_model.encode(frames)[1].exp()
    assert torch.allclose(logits.softmax(1), 0.98 * p + 0.02 / 5, atol=1e-6)
    assert torch.equal(value, torch.zeros(3))
    plain = GitText2ActionWithPrompt.from_pretrained(toy_base, language_prior=0.0)
    assert torch.equal(plain(frames)[0], torch.zeros(3, 5))


def test_a_fresh_lora_trains_the_features_and_leaves_the_answers(toy_model, frames):
    """The rollout's features, without gradients, are the same."""
    features, scores = toy_model.encode(frames)
    toy_model.add_lora(rank=2, alpha=4)
    assert torch.allclose(toy_model.features(frames), features, atol=1e-5)
    randomize(toy_model, "lora_B")
    mine = toy_model.features(frames)
    assert mine.requires_grad and not torch.allclose(mine, features, atol=1e-2)
    with torch.no_grad():
        new_features, new_scores = toy_model.encode(frames)
    assert torch.allclose(new_features, mine, atol=1e-6) and torch.allclose(new_scores, scores, atol=1e-6)


def test_policy_files_round_trip(toy_base, frames, tmp_path):
    model = GitText2ActionWithPrompt.from_pretrained(toy_base, language_prior=0.5, prior_floor=0.1, head_size=32)
    model.add_lora(rank=2, alpha=4)
    randomize(model, "_head.", "lora_")
    model.save_policy(tmp_path)
    loaded = GitText2ActionWithPrompt.from_policy(tmp_path)
    for mine, theirs in zip(model(frames), loaded(frames)):
        assert torch.allclose(mine, theirs, atol=1e-6)
    assert not any(p.requires_grad for p in loaded.git.parameters())
