"""The model's path against what a tutorial writes with transformers: processor per frame, `GitForCausalLM`, `generate`.

Reads offline/git-tiny, the adapter and CarRacing-Data/. Writes its claims to benchmarks/results.json. git-base size means
`GitConfig()` with random weights. Outputs are checked to be equal before they are timed.

    python -m benchmarks.model      # 5 minutes
"""

import copy
import functools

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import GitConfig, GitForCausalLM

import collect_captions
import evaluate
import GitText2ActionWithPrompt as model_file
import train_git_lora_carllava_style as stage2
from benchmarks import compare

BATCHES = (8, 1)
LORA_BATCH = 32  # of the shipped sample


def load_frames(count):
    """Frames of the dataset's sample, uint8 (count, 96, 96, 3)."""
    data = stage2.Captions(collect_captions.ROOT / stage2.DATA_DIR / "train")
    return np.stack([data[i][0] for i in range(count)])


def pixel_values(processor, frames):
    return torch.cat([processor(images=frame, return_tensors="pt").pixel_values for frame in frames])


def tutorial_forward(git, processor, frames, prompt):
    """Hidden state of the last prompt token and the words' logits there, by the library's own calls."""
    ids = torch.tensor(prompt).expand(len(frames), -1)
    output = git(pixel_values=pixel_values(processor, frames), input_ids=ids, output_hidden_states=True)
    return output.hidden_states[-1][:, -1], output.logits[:, -1]


def compare_forward(name, git, model, frames, repeats, **note):
    prompt = model.prompt + model.shared_word
    theirs = tutorial_forward(git, model.processor, frames, model.prompt)[0]
    difference = (model.encode(frames)[0] - theirs).abs().max().item()
    assert difference < 1e-4, f"{name}: outputs differ by {difference}"

    def peer():
        for _ in range(repeats):
            tutorial_forward(git, model.processor, frames, prompt)
        return repeats * len(frames)

    def ours():
        for _ in range(repeats):
            model(frames)
        return repeats * len(frames)

    compare.alternate(name, "frame", peer, ours, largest_difference=difference, **note)


def compare_answer(name, git, model, frames):
    prompt = torch.tensor(model.prompt).expand(len(frames), -1)

    def peer():
        return git.generate(
            pixel_values=pixel_values(model.processor, frames), input_ids=prompt, do_sample=False,
            max_new_tokens=model_file.MAX_ANSWER_TOKENS,
        )  # fmt: skip

    words = model.processor.tokenizer.batch_decode(peer()[:, prompt.shape[1] :], skip_special_tokens=True)
    assert [model_file.parse_answer(text) for text in words] == model.answer(frames)
    repeats = 80 // len(frames)

    def do(work):
        for _ in range(repeats):
            work()
        return repeats * len(frames)

    compare.alternate(name, "frame", functools.partial(do, peer), lambda: do(lambda: model.answer(frames)))


def git_of_base_size(image_size):
    """git-base's configuration, its 30,522 words included, with random weights."""
    torch.manual_seed(0)
    return GitForCausalLM(GitConfig(vision_config={"image_size": image_size})).eval()


def compare_lora_epoch(model):
    """Forward and backward of LoRA over the same batches, ours with the batched preprocessing, theirs per sample."""
    rows = stage2.Captions(collect_captions.ROOT / stage2.DATA_DIR / "train")
    rows = [rows[i] for i in range(LORA_BATCH)]
    git, processor = model_file.load_base(stage2.BASE_MODEL)
    lora = LoraConfig(r=stage2.LORA_RANK, lora_alpha=stage2.LORA_ALPHA, target_modules=model_file.LORA_TARGETS)
    git = get_peft_model(git, lora).train()
    collate, tokenizer = stage2.Collator(processor), processor.tokenizer
    answers = list(model_file.ANSWERS)

    def step(batch):
        git(**batch).loss.backward()
        return LORA_BATCH

    @torch.enable_grad()
    def peer():
        texts = [model_file.PROMPT + " " + answers[answer] for _, answer in rows]
        features = [processor(images=frame, text=text, return_tensors="pt") for (frame, _), text in zip(rows, texts)]
        padded = tokenizer.pad([{"input_ids": f["input_ids"][0]} for f in features], return_tensors="pt")
        labels = padded.input_ids.masked_fill(padded.attention_mask == 0, -100)
        pixels = torch.cat([f["pixel_values"] for f in features])
        return step({"pixel_values": pixels, **padded, "labels": labels})

    @torch.enable_grad()
    def ours():
        return step(collate(rows))

    compare.alternate("LoRA step: ours vs processor per sample", "sample", peer, ours)


@torch.no_grad()
def main():
    model = evaluate.load_answerer(evaluate.ADAPTER)
    # the peer: the same weights in the library's own class, not touched by ours
    git, _ = model_file.load_base(model_file.read_task(collect_captions.ROOT / evaluate.ADAPTER)["base_model"])
    git = model_file.PeftModel.from_pretrained(git, collect_captions.ROOT / evaluate.ADAPTER).merge_and_unload().eval()
    for batch in BATCHES:
        frames = load_frames(batch)
        compare_forward(f"policy forward, git-tiny, batch {batch}", git, model, frames, 80 // batch)
        compare_answer(f"answer, git-tiny, batch {batch}, vs generate", git, model, frames)
    compare_lora_epoch(model)

    processor = copy.deepcopy(model.processor)
    processor.image_processor.size = {"height": 224, "width": 224}
    large = git_of_base_size(224)
    at_224, at_96 = (
        model_file.GitText2ActionWithPrompt(copy.deepcopy(git), p)
        for git, p in ((large, processor), (git_of_base_size(96), model.processor))
    )
    for ours in (at_224, at_96):
        model_file.fold_quick_gelu(ours.git)
    frames = load_frames(8)
    resized = np.stack([np.asarray(Image.fromarray(frame).resize((224, 224))) for frame in frames])
    compare_forward("policy forward, git-base size, 224 px, batch 1", large, at_224, resized[:1], 1)
    for batch in BATCHES:

        def peer(frames=resized[:batch]):
            tutorial_forward(large, processor, frames, model.prompt)
            return len(frames)

        def ours(frames=frames[:batch]):
            at_96(frames)
            return len(frames)

        name = f"policy forward, git-base size, batch {batch}: ours at 96 px vs the tutorial at 224 px"
        compare.alternate(name, "frame", peer, ours, note="another input, so not the same output")


if __name__ == "__main__":
    main()
