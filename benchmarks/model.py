"""The model's path against what a tutorial writes with transformers: processor per frame, `GitForCausalLM`, `generate`.

Reads offline/git-tiny, the adapter and CarRacing-Data/. Writes its claims to benchmarks/results.json. git-base size means
`GitConfig()` with random weights. Outputs are checked to be equal before they are timed.

    python -m benchmarks.model      # 5 minutes
"""

import copy
import functools
import tempfile

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import GitConfig, GitForCausalLM, Trainer, TrainingArguments

import evaluate
import GitText2ActionWithPrompt as model_file
import run_files
import train_git_lora_carllava_style as stage2
from benchmarks import compare

BATCHES = (8, 1)
LORA_BATCH = 32


def load_frames(count):
    """Frames of the dataset's sample, uint8 (count, 96, 96, 3)."""
    data = stage2.Captions(run_files.ROOT / stage2.DATA_DIR / "train")
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
    assert difference < 1e-5, f"{name}: outputs differ by {difference}"

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


class PerSample(torch.utils.data.Dataset):
    """Captions as a tutorial feeds them: the processor on every sample, labels from the padded text."""

    def __init__(self, captions, processor):
        self.captions, self.processor = captions, processor
        self.texts = [model_file.PROMPT + " " + answer for answer in model_file.ANSWERS]
        self.length = max(len(ids) for ids in processor.tokenizer(self.texts).input_ids)

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, index):
        frame, answer = self.captions[index]
        row = self.processor(
            images=frame, text=self.texts[answer], padding="max_length", max_length=self.length, return_tensors="pt"
        )
        labels = row["input_ids"].masked_fill(row["attention_mask"] == 0, -100)
        return {key: x[0] for key, x in {**row, "labels": labels}.items()}


@torch.enable_grad()
def compare_lora_epoch():
    """One epoch of `Trainer` over the shipped sample, with the same LoRA."""
    captions = stage2.Captions(run_files.ROOT / stage2.DATA_DIR / "train")

    def trainer(ours):
        torch.manual_seed(0)
        git, processor = model_file.load_base(stage2.BASE_MODEL)
        config = LoraConfig(r=stage2.LORA_RANK, lora_alpha=stage2.LORA_ALPHA, target_modules=model_file.LORA_TARGETS)
        git = get_peft_model(git, config)
        if ours:
            stage2.multiply_once(git)
        arguments = TrainingArguments(
            num_train_epochs=1, per_device_train_batch_size=LORA_BATCH, learning_rate=stage2.LEARNING_RATE,
            use_cpu=True, remove_unused_columns=False, report_to="none", save_strategy="no", disable_tqdm=True,
            output_dir=tempfile.mkdtemp(),
        )  # fmt: skip
        data, collator = (captions, stage2.Collator(processor)) if ours else (PerSample(captions, processor), None)
        return Trainer(git, arguments, data_collator=collator, train_dataset=data)

    def epoch(trainer):
        trainer.train()
        return len(captions)

    peer, ours = trainer(False), trainer(True)
    compare.alternate(
        "LoRA epoch: ours vs Trainer with the processor per sample", "sample",
        lambda: epoch(peer), lambda: epoch(ours),
    )  # fmt: skip


@torch.no_grad()
def main():
    model = evaluate.load_answerer(evaluate.ADAPTER)
    # the peer: the same weights in the library's own class, not touched by ours
    git, _ = model_file.load_base(model_file.read_task(run_files.ROOT / evaluate.ADAPTER)["base_model"])
    git = model_file.PeftModel.from_pretrained(git, run_files.ROOT / evaluate.ADAPTER).merge_and_unload().eval()
    for batch in BATCHES:
        frames = load_frames(batch)
        compare_forward(f"policy forward, git-tiny, batch {batch}", git, model, frames, 80 // batch)
        compare_answer(f"answer, git-tiny, batch {batch}, vs generate", git, model, frames)
    compare_lora_epoch()

    processor = copy.deepcopy(model.processor)
    processor.image_processor.size = {"height": 224, "width": 224}
    large = git_of_base_size(224)
    at_224, at_96 = (
        model_file.GitText2ActionWithPrompt(copy.deepcopy(git), p)
        for git, p in ((large, processor), (git_of_base_size(96), model.processor))
    )
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
