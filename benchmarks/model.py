"""The model's path against what a tutorial writes with transformers: processor per frame, `GitForCausalLM`, `generate`.

Reads offline/git-tiny, the adapter and CarRacing-Data/. Writes its claims to benchmarks/results.json. git-base size
means `GitConfig()` with random weights. Of one size, passes and answers are checked to be equal before they are timed.

    python -m benchmarks.model      # 5 minutes
"""

import copy
import tempfile

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import GitConfig, GitForCausalLM, Trainer, TrainingArguments

import evaluate
import GitText2ActionWithPrompt as model_file
import train_git_lora_carllava_style as stage2
from benchmarks import compare
from captions import Captions, Collator
from fast import git_forward
from GitText2ActionWithPrompt import ANSWERS, PROMPT, GitText2ActionWithPrompt, prompt_ids
from support import checkpoints, checks
from support.run_files import ROOT

BATCHES = (8, 1)
LORA_BATCH = 32
SAMPLE = 180  # frames, as many as are in git


def load_frames(count):
    """Frames of the dataset's sample, uint8 (count, 96, 96, 3)."""
    data = Captions(ROOT / stage2.DATA_DIR / "train")
    return np.stack([data[i][0] for i in range(count)])


def pixel_values(processor, frames):
    """Frames as a tutorial preprocesses them, one by one."""
    return torch.cat([processor(images=frame, return_tensors="pt").pixel_values for frame in frames])


def tutorial_forward(git, processor, frames, prompt):
    """Hidden state of the last prompt token (B, hidden) by the library's own calls, the words' logits on the way."""
    ids = torch.tensor(prompt).expand(len(frames), -1)
    output = git(pixel_values=pixel_values(processor, frames), input_ids=ids, output_hidden_states=True)
    return output.hidden_states[-1][:, -1]


def tutorial_answer(git, processor, frames, prompt):
    """Generated answers by the library's own calls."""
    words = git.generate(
        pixel_values=pixel_values(processor, frames),
        input_ids=torch.tensor(prompt).expand(len(frames), -1),
        do_sample=False,
        max_new_tokens=model_file.MAX_ANSWER_TOKENS,
    )
    texts = processor.tokenizer.batch_decode(words[:, len(prompt) :], skip_special_tokens=True)
    return [model_file.parse_answer(text) or text for text in texts]


def repeat(times, frames, work, *args):
    """A round for `compare.alternate`: `work(*args)` so many times; it returns how many frames that were."""

    def round_():
        for _ in range(times):
            work(*args)
        return times * len(frames)

    return round_


def compare_forward(name, git, model, frames, times, **note):
    """Our forward against the tutorial's, after their features were found equal."""
    theirs = tutorial_forward(git, model.processor, frames, prompt_ids(model.processor.tokenizer))
    difference = (model.encode(frames)[0] - theirs).abs().max().item()
    assert difference < 1e-5, f"{name}: outputs differ by {difference}"
    prompt = prompt_ids(model.processor.tokenizer) + model.shared_word
    peer = repeat(times, frames, tutorial_forward, git, model.processor, frames, prompt)
    ours = repeat(times, frames, model, frames)
    compare.alternate(name, "frame", peer, ours, largest_difference=difference, **note)


def compare_answer(name, git, model, frames, times):
    """Our answers against `generate`, after they were found equal."""
    question = git, model.processor, frames, prompt_ids(model.processor.tokenizer)
    assert tutorial_answer(*question) == model.answer(frames)
    peer, ours = repeat(times, frames, tutorial_answer, *question), repeat(times, frames, model.answer, frames)
    compare.alternate(name, "frame", peer, ours)


def git_of_base_size(image_size):
    """git-base's configuration, its 30,522 words included, with random weights."""
    torch.manual_seed(0)
    git = GitForCausalLM(GitConfig(vision_config={"image_size": image_size})).eval()
    git.git.image_encoder.config._attn_implementation = "sdpa"  # as `load_base` has it: the peer's faster one
    return git


class PerSample(torch.utils.data.Dataset):
    """Captions as a tutorial feeds them: the processor on every sample, labels from the padded text."""

    def __init__(self, captions, processor):
        self.captions, self.processor = captions, processor
        self.texts = [PROMPT + " " + answer for answer in ANSWERS]
        self.length = max(len(ids) for ids in processor.tokenizer(self.texts).input_ids)

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, index):
        frame, row = self.captions[index]
        answer = row["answer"]
        row = self.processor(
            images=frame, text=self.texts[answer], padding="max_length", max_length=self.length, return_tensors="pt"
        )
        labels = row["input_ids"].masked_fill(row["attention_mask"] == 0, -100)
        return {key: x[0] for key, x in {**row, "labels": labels}.items()}


def plain_text(row):
    """The one text of a frame that the peer reads too."""
    return [("", PROMPT, row["text"])]


def make_trainer(captions, ours, folder):
    """The Trainer with the same LoRA, fed by stage 2's collator or by a tutorial's processor per sample."""
    torch.manual_seed(0)
    git, processor = checkpoints.load_base(stage2.BASE_MODEL)
    config = LoraConfig(r=stage2.LORA_RANK, lora_alpha=stage2.LORA_ALPHA, target_modules=model_file.LORA_TARGETS)
    arguments = TrainingArguments(
        output_dir=folder,
        num_train_epochs=1,
        per_device_train_batch_size=LORA_BATCH,
        learning_rate=stage2.LEARNING_RATE,
        use_cpu=True,
        bf16=ours and git_forward.BFLOAT16,  # as in stage 2
        remove_unused_columns=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    data, collator = (captions, Collator(processor, plain_text)) if ours else (PerSample(captions, processor), None)
    git = git_forward.train_by_this_pass(git, processor.image_processor) if ours else git
    return Trainer(get_peft_model(git, config), arguments, data_collator=collator, train_dataset=data)


def compare_lora_epoch():
    """One epoch over as many frames as the sample of the dataset has."""
    data = torch.utils.data.Subset(Captions(ROOT / stage2.DATA_DIR / "train"), range(SAMPLE))
    with tempfile.TemporaryDirectory() as folder:
        peer, ours = (repeat(1, data, make_trainer(data, ours, folder).train) for ours in (False, True))
        compare.alternate("LoRA epoch: ours vs Trainer with the processor per sample", "sample", peer, ours)


@torch.no_grad()
def compare_tiny():
    """The fine-tuned model against the same merged weights in the library's own class."""
    model = GitText2ActionWithPrompt.from_pretrained(evaluate.MODEL)
    git, _, _ = checkpoints.load_git(evaluate.MODEL, model_file.task())
    for batch in BATCHES:
        frames = load_frames(batch)
        compare_forward(f"policy forward, git-tiny, batch {batch}", git.eval(), model, frames, 80 // batch)
        compare_answer(f"answer, git-tiny, batch {batch}, vs generate", git.eval(), model, frames, 80 // batch)
        told = repeat(80 // batch, frames, model, frames, "Please keep to the left.")
        plain = repeat(80 // batch, frames, model, frames)
        compare.alternate(
            f"policy forward, git-tiny, batch {batch}: plain vs under an instruction", "frame", told, plain
        )


@torch.no_grad()
def compare_base_size():
    """A model of git-base's size: at its own 224 pixels, and ours at the simulator's 96."""
    _, processor = checkpoints.load_base(stage2.BASE_MODEL)
    processor_224 = copy.deepcopy(processor)
    processor_224.image_processor.size = {"height": 224, "width": 224}
    git_224 = git_of_base_size(224)
    model_224 = GitText2ActionWithPrompt(git_224, processor_224)
    model_96 = GitText2ActionWithPrompt(git_of_base_size(96), processor)
    frames = load_frames(8)
    resized = np.stack([np.asarray(Image.fromarray(frame).resize((224, 224))) for frame in frames])
    compare_forward("policy forward, git-base size, 224 px, batch 1", git_224, model_224, resized[:1], 1)
    for batch in BATCHES:
        prompt = prompt_ids(model_96.processor.tokenizer)
        peer = repeat(1, frames[:batch], tutorial_forward, git_224, processor_224, resized[:batch], prompt)
        ours = repeat(1, frames[:batch], model_96, frames[:batch])
        name = f"policy forward, git-base size, batch {batch}: ours at 96 px vs the tutorial at 224 px"
        compare.alternate(name, "frame", peer, ours, note="another input, so not the same output")


def main():
    compare_tiny()
    compare_lora_epoch()
    compare_base_size()


if __name__ == "__main__":
    checks.run(main)
