"""The model class against Hugging Face's own forward and generate, and its files."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GitConfig, GitForCausalLM

import checks
import GitText2ActionWithPrompt as model_file
from offline import make_git_tiny


def test_preprocess_equals_the_processor(toy_model, frames):
    processor = toy_model.processor.image_processor
    theirs = processor(images=list(frames.numpy()), return_tensors="pt").pixel_values
    assert torch.allclose(model_file.preprocess(frames, processor), theirs, atol=1e-6)


@pytest.mark.parametrize(
    "bad",
    [
        torch.zeros(2, 96, 96, 3),
        torch.zeros(96, 96, 3, dtype=torch.uint8),
        torch.zeros(1, 3, 96, 96, dtype=torch.uint8),
    ],
)
def test_bad_frames_are_named(toy_model, bad):
    with pytest.raises(checks.BadInput, match="frames must be uint8"):
        toy_model(bad)


def test_fingerprint_sees_every_weight(toy_base):
    git, _ = model_file.load_base(toy_base)
    prints = {model_file.fingerprint(git)}
    for p in git.parameters():
        p.data.view(-1)[-1] += 1e-3
        prints.add(model_file.fingerprint(git))
    assert len(prints) == 1 + len([*git.parameters()])
    assert model_file.fingerprint(model_file.load_base(toy_base)[0]) in prints


@pytest.fixture
def hugging_face(toy_base):
    """The same weights in Hugging Face's own class, as it loads them."""
    return GitForCausalLM.from_pretrained(toy_base).eval()


def whole_answer_scores(git, model, frames):
    """Oracle: each answer's log-likelihood by Hugging Face's forward over prompt + whole answer, one at a time."""
    pixels = model_file.preprocess(frames, model.processor.image_processor)
    scores = []
    for answer in model.answers:
        tokens = torch.tensor(model.prompt + answer).expand(len(frames), -1)
        logits = git(input_ids=tokens, pixel_values=pixels).logits[:, -tokens.shape[1] :].double().log_softmax(-1)
        first = len(model.prompt) - 1
        scores.append(sum(logits[:, first + i, word] for i, word in enumerate(answer)))
    return torch.stack(scores, 1).log_softmax(1)


@torch.no_grad()
def test_one_pass_equals_hugging_face(toy_model, hugging_face, frames):
    pixels = model_file.preprocess(frames, toy_model.processor.image_processor)
    prompt = torch.tensor(toy_model.prompt).expand(3, -1)
    states = hugging_face.git(input_ids=prompt, pixel_values=pixels).last_hidden_state
    assert torch.allclose(toy_model.features(frames), states[:, -1], atol=1e-5)
    assert torch.allclose(toy_model.encode(frames)[0], states[:, -1], atol=1e-5)
    assert torch.allclose(
        toy_model.answer_log_probs(frames).double(), whole_answer_scores(hugging_face, toy_model, frames), atol=1e-5
    )


@torch.no_grad()
def test_attention_equals_hugging_face(toy_model, hugging_face, frames):
    pixels = model_file.preprocess(frames, toy_model.processor.image_processor)
    prompt = torch.tensor(toy_model.prompt).expand(3, -1)
    theirs = hugging_face(input_ids=prompt, pixel_values=pixels, output_attentions=True).attentions[-1]
    n = toy_model.git.config.vision_config.image_size // toy_model.git.config.vision_config.patch_size
    expected = theirs.mean(1)[:, -1, 1 : 1 + n * n].reshape(3, n, n)
    assert torch.allclose(toy_model.attention(frames), expected, atol=1e-6)


def test_answer_equals_generate(toy_model, hugging_face, frames):
    tokenizer = toy_model.processor.tokenizer
    pixels = model_file.preprocess(frames, toy_model.processor.image_processor)
    prompt = torch.tensor(toy_model.prompt).expand(3, -1)
    words = hugging_face.generate(
        pixel_values=pixels, input_ids=prompt, max_new_tokens=model_file.MAX_ANSWER_TOKENS, do_sample=False
    )
    theirs = tokenizer.batch_decode(words[:, prompt.shape[1] :], skip_special_tokens=True)
    assert toy_model.answer(frames) == [model_file.parse_answer(text) or text for text in theirs]


@torch.no_grad()
def test_an_untrained_head_says_what_the_words_say(toy_model, frames, constants):
    logits, value = toy_model(frames)
    p = toy_model.answer_log_probs(frames).exp()
    assert torch.allclose(logits.softmax(1), 0.98 * p + 0.02 / 5, atol=1e-6)
    assert torch.equal(value, torch.zeros(3))
    constants(model_file, LANGUAGE_PRIOR=0.0)
    assert torch.equal(toy_model(frames)[0], torch.zeros(3, 5))


def test_dropout_masks_are_scaled_and_used(toy_model, frames):
    torch.manual_seed(0)
    masks = toy_model.draw_dropout(4000)
    assert masks.unique().tolist() == [0.0, pytest.approx(1 / 0.9)]
    assert masks.mean().item() == pytest.approx(1, abs=0.01)
    features, scores = toy_model.encode(frames)
    torch.nn.init.ones_(toy_model.policy_head[2].weight)
    with_masks = toy_model.head(features, scores, masks[:3])[0]
    assert not torch.allclose(with_masks, toy_model.head(features, scores)[0])
    by_hand = toy_model.prior(scores) + toy_model.policy_head[2](toy_model.policy_head[:2](features) * masks[:3])
    assert torch.equal(with_masks, by_hand)


@torch.no_grad()
def test_a_fresh_lora_leaves_the_answerer_as_it_is(toy_model, frames):
    features, scores = toy_model.encode(frames)
    toy_model.add_lora(rank=2, alpha=4)
    assert torch.allclose(toy_model.encode(frames)[0], features, atol=1e-6)
    for name, p in toy_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    new_features, new_scores = toy_model.encode(frames)
    assert not torch.allclose(new_features, features, atol=1e-2)
    assert torch.allclose(new_scores, scores, atol=1e-6)


@pytest.mark.parametrize("lora", [False, True])
def test_policy_files_round_trip(toy_model, toy_base, frames, tmp_path, lora):
    if lora:
        toy_model.add_lora(rank=2, alpha=4)
    for name, p in toy_model.named_parameters():
        if "_head." in name or "lora_" in name:
            torch.nn.init.normal_(p, std=0.1)
    facts = {"base_model": str(toy_base), "adapter": "", "adapter_hash": "", "frame_skip": 2} | (
        {"lora_rank": 2, "lora_alpha": 4} if lora else {}
    )
    toy_model.save_policy(tmp_path, **facts)
    loaded = model_file.GitText2ActionWithPrompt.from_policy(tmp_path)
    for mine, theirs in zip(toy_model(frames), loaded(frames)):
        assert torch.allclose(mine, theirs, atol=1e-6)
    assert not any(p.requires_grad for p in loaded.git.parameters())
    if lora:
        toy_model.git.peft_config["default"].lora_alpha = 16
        with pytest.raises(checks.BadInput, match="LoRA of alpha 4"):
            toy_model.load_policy(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "policy.json", "policy.safetensors"]


def test_a_policy_that_does_not_fit_is_refused(toy_model, toy_base, tmp_path):
    toy_model.save_policy(tmp_path, base_model=str(toy_base), adapter="", adapter_hash="", frame_skip=2)
    weights = load_file(tmp_path / "policy.safetensors")
    del weights["value_head.0.bias"]
    save_file(weights, tmp_path / "policy.safetensors")
    with pytest.raises(checks.BadInput, match="value_head.0.bias"):
        model_file.GitText2ActionWithPrompt.from_policy(tmp_path)
    facts = json.loads((tmp_path / "policy.json").read_text()) | {"head_size": 7}
    (tmp_path / "policy.json").write_text(json.dumps(facts))
    with pytest.raises(checks.BadInput, match="head_size 7"):
        model_file.GitText2ActionWithPrompt.from_policy(tmp_path)
    with pytest.raises(checks.BadInput, match="run ppo_git_with_prompt.py first"):
        model_file.GitText2ActionWithPrompt.from_policy(tmp_path / "nowhere")


def test_an_adapter_of_another_base_is_refused(pipeline, tmp_path, constants):
    constants(make_git_tiny, PATCH_SIZE=24, WIDTH=32, VISION_LAYERS=1, TEXT_LAYERS=2, HEADS=2)
    torch.manual_seed(1)
    processor = make_git_tiny.make_processor([{"How fast is the car?": "zero"}])
    make_git_tiny.make_model(processor.tokenizer).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(checks.BadInput, match="trained on another base"):
        model_file.GitText2ActionWithPrompt.from_pretrained(str(tmp_path), pipeline.adapter)
    with pytest.raises(checks.BadInput, match="run train_git_lora_carllava_style.py first"):
        model_file.read_task(tmp_path)


def test_unscorable_answers_are_named(toy_model, constants):
    constants(model_file, ANSWERS={"Coast": 0, "Go on then": 3, "Turn left": 2, "Turn right": 1, "Brake": 4})
    with pytest.raises(checks.BadInput, match="Go on then"):
        model_file.GitText2ActionWithPrompt(toy_model.git, toy_model.processor)


@torch.no_grad()
def test_a_full_size_git_goes_the_same_way(toy_model, frames):
    """git-base's configuration with random weights: 224 pixels, width 768, 30,522 words."""
    torch.manual_seed(0)
    git = GitForCausalLM(GitConfig()).eval()
    processor = toy_model.processor
    processor.image_processor.size = {"height": 224, "width": 224}
    model = model_file.GitText2ActionWithPrompt(git, processor)
    logits, value = model(frames[:1])
    assert logits.shape == (1, 5) and value.shape == (1,)
    assert torch.allclose(
        model.answer_log_probs(frames[:1]).double(), whole_answer_scores(model.git, model, frames[:1]), atol=1e-4
    )
