"""Stage 2: LoRA teaches a GIT base to answer "What should the vehicle do in this scenario?" in words.

Reads a GIT base (BASE_MODEL) and CarRacing-Data/ of stage 1. Writes lora_git_caption_model_carllava/ (PEFT adapter,
processor, card, task.json), and results/: lora_log.csv (a row per epoch), lora_loss.png, lora_confusion.png.

    python train_git_lora_carllava_style.py      # 10 minutes on two CPU cores

Expect an average loss of 0.46 falling to 0.05 and 93 to 95 % exact answers on the validation tracks. Only the answer's tokens are
supervised: `[CLS] prompt answer [SEP]`, with labels -100 on prompt and padding.

Then: python ppo_git_with_prompt.py
"""

import functools
import json
import os
import pickle
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from PIL import Image
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

import car_racing_env
import checks
import draw_results
import git_forward
import GitText2ActionWithPrompt as model_file
import run_files
from run_files import ROOT

BASE_MODEL = "offline/git-tiny"  # any GIT checkpoint; for the Hub's: "microsoft/git-base"
DATA_DIR = "CarRacing-Data"
OUTPUT_DIR = "lora_git_caption_model_carllava"
RESULTS_DIR = "results"
CHECKPOINT_DIR = "results/lora_checkpoints"  # the Trainer's, one per epoch; resumed from if RESUME
RESUME = False
SEED = 0
MIN_FRAMES = 1_000  # fewer training frames are the shipped sample, not a dataset
MACRO_MIN_FRAMES = 30  # the macro recall leaves out actions with fewer validation frames

LORA_RANK = 32
LORA_ALPHA = 64
LORA_DROPOUT = 0.0
EPOCHS = 4
BATCH_SIZE = 128  # 16 for microsoft/git-base on one GPU
LEARNING_RATE = 2e-3  # 1e-4 for microsoft/git-base: a pretrained base wants far less
WEIGHT_DECAY = 0.0
WARMUP = 0.05  # share of the steps, then a cosine to zero

REFERENCE_LOSS = (8.59, 8.06)  # the reference README's first and last epoch


class Captions(torch.utils.data.Dataset):
    """One split of an imagefolder dataset: (frame uint8 (96, 96, 3), answer index in the order of ANSWERS)."""

    def __init__(self, folder):
        self.folder = Path(folder)
        metadata = self.folder / "metadata.jsonl"
        if not metadata.exists():
            raise checks.BadInput(f"no captions in {self.folder}: run collect_captions.py first")
        self.rows, answers = [], list(model_file.ANSWERS)
        for number, line in enumerate(metadata.read_bytes().splitlines(), 1):
            try:
                row = json.loads(line)
                name, text, prompt = str(row["file_name"]), row["text"], row["prompt"]
            except (ValueError, KeyError, TypeError) as error:
                raise checks.BadInput(
                    f"{metadata}:{number} is no caption row ({error!r}): rerun collect_captions.py"
                ) from None
            if text not in answers:
                raise checks.BadInput(
                    f"{metadata}:{number}: unknown answer {text!r}: rerun collect_captions.py, or put it into ANSWERS"
                )
            if prompt != model_file.PROMPT:
                raise checks.BadInput(
                    f"{metadata}:{number}: prompt {prompt!r} is not PROMPT: rerun collect_captions.py"
                )
            if not (self.folder / name).resolve().is_relative_to(self.folder.resolve()):
                raise checks.BadInput(
                    f"{metadata}:{number}: {name!r} leaves the dataset's folder: rerun collect_captions.py"
                )
            self.check_image(name)
            self.rows.append((name, answers.index(text)))
        if not self.rows:
            raise checks.BadInput(f"{metadata} has no rows: rerun collect_captions.py")

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        name, answer = self.rows[index]
        with Image.open(self.folder / name, formats=["PNG"]) as image:
            return np.asarray(image.convert("RGB")), answer

    def check_image(self, name):
        """Whether the file is whole and of the others' size, without decoding it: 0.1 ms."""
        try:
            with Image.open(self.folder / name, formats=["PNG"]) as image:
                size = image.size
                image.verify()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise checks.BadInput(f"cannot read {self.folder / name} ({error}): rerun collect_captions.py") from None
        self.size = getattr(self, "size", size)
        if size != self.size:
            raise checks.BadInput(
                f"{self.folder / name} is {size[0]} x {size[1]}, others {self.size[0]} x {self.size[1]}: rerun "
                "collect_captions.py"
            )


class Collator:
    """Frames and answer indices -> pixel_values, input_ids, labels."""

    def __init__(self, processor):
        tokenizer = processor.tokenizer
        self.image_processor = processor.image_processor
        prompt = model_file.prompt_ids(tokenizer)
        answers = [[*ids, tokenizer.sep_token_id] for ids in model_file.answer_ids(tokenizer)]
        length = len(prompt) + max(map(len, answers))
        pad = lambda ids, value: ids + [value] * (length - len(ids))  # noqa: E731
        self.input_ids = torch.tensor([pad(prompt + ids, tokenizer.pad_token_id) for ids in answers])
        self.labels = torch.tensor([pad([-100] * len(prompt) + ids, -100) for ids in answers])

    def __call__(self, rows):
        frames, answers = zip(*rows)
        answers = torch.tensor(answers)
        return {
            "pixel_values": model_file.preprocess(np.stack(frames), self.image_processor),
            "input_ids": self.input_ids[answers],
            "labels": self.labels[answers],
        }


def multiply_once(git):
    """Let each LoRA layer of a PEFT model multiply by W + scaling B A instead of by W, A and B in turn: a fifth faster.

    The same function and gradients as PEFT's as long as LORA_DROPOUT is 0; saving and merging do not notice.
    """

    def forward(layer, x):
        weight = layer.base_layer.weight + layer.get_delta_weight("default")
        return git_forward.linear(x, weight, layer.base_layer.bias)

    for layer in git.modules():
        if isinstance(layer, LoraLinear):
            layer.forward = functools.partial(forward, layer)


@torch.no_grad()
def validate(model, data, batch_size):
    """What the answers are worth on held-out tracks.

    Returns metrics and the confusion matrix, int64 (5, 6): teacher's answer by generated answer, the last column for
    words that are no answer.
    """
    collate, answers = Collator(model.processor), list(model_file.ANSWERS)
    first_words, last = torch.tensor([ids[0] for ids in model.answers]), len(model.prompt) - 1
    confusion = np.zeros((len(answers), len(answers) + 1), dtype=np.int64)
    loss, first_token_loss, tokens = 0.0, 0.0, 0
    for indices in torch.arange(len(data)).split(batch_size):
        rows = [data[i] for i in indices]
        batch = {key: x.to(model.device) for key, x in collate(rows).items()}
        labels, truth = batch["labels"][:, 1:], torch.tensor([answer for _, answer in rows])
        logits = model.git(pixel_values=batch["pixel_values"], input_ids=batch["input_ids"]).logits
        logits = logits[:, -batch["labels"].shape[1] :]  # the text rows
        loss += F.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
        ).item()
        tokens += (labels != -100).sum().item()
        first_token_loss += F.cross_entropy(logits[:, last].cpu(), first_words[truth], reduction="sum").item()
        said = model.answer(np.stack([frame for frame, _ in rows]))
        for text, true in zip(said, truth.tolist()):
            confusion[true, answers.index(text) if text in answers else -1] += 1
    counts = confusion.sum(1)
    share = counts[counts > 0] / counts.sum()
    recall = np.where(counts > 0, confusion.diagonal() / np.maximum(counts, 1), np.nan)
    frequent = recall[counts >= MACRO_MIN_FRAMES]
    # entropy and shares of first words, so that they compare with the first token's cross-entropy
    words = np.array([counts[(first_words == w).numpy()].sum() for w in first_words.unique()]) / counts.sum()
    words = words[words > 0]
    metrics = {
        "validation_loss": loss / tokens,
        "first_token_loss": first_token_loss / len(data),
        "first_token_entropy": float(-(words * np.log(words)).sum()),
        "exact_match": float(np.trace(confusion) / counts.sum()),
        "majority_share": float(share.max()),
        "macro_recall": float(frequent.mean()) if len(frequent) else np.nan,
    }
    for i, answer in enumerate(answers):
        metrics[f"recall_{answer.lower().replace(' ', '_')}"] = float(recall[i])
        metrics[f"count_{answer.lower().replace(' ', '_')}"] = int(counts[i])
    return metrics, confusion


class AnswerTrainer(Trainer):
    """The Trainer with the loss on its bar; one that is not finite ends the run before it spoils the adapter."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise checks.BadInput(
                "the LoRA loss is not finite: lower LEARNING_RATE in train_git_lora_carllava_style.py; the last adapter "
                "and the checkpoints are kept"
            )
        for callback in self.callback_handler.callbacks:
            if getattr(callback, "training_bar", None) is not None:
                callback.training_bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        return loss


class EpochReport(TrainerCallback):
    """After every epoch: validate, print a row, append it to lora_log.csv and redraw the graphs."""

    def __init__(self, model, data, results):
        self.model, self.data, self.results, self.metrics = model, data, results, None
        self.began = time.time()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in (logs or {}) or not state.is_world_process_zero:
            return
        self.model.eval()
        self.metrics, confusion = validate(self.model, self.data, args.per_device_eval_batch_size)
        self.model.train()
        row = {
            "epoch": round(state.epoch),
            "average_loss": logs["loss"],
            **self.metrics,
            "seconds": time.time() - self.began,
        }
        # a resumed run repeats an epoch
        log = run_files.Log(self.results / "lora_log.csv", key="epoch", keep_until=row["epoch"] - 1 or None)
        log.write(row)
        recalls = "  ".join(
            f"{a} {confusion[i, i] / max(confusion[i].sum(), 1):.2f} of {confusion[i].sum()}"
            for i, a in enumerate(model_file.ANSWERS)
        )
        print(
            f"\nepoch {row['epoch']}: average loss {row['average_loss']:.4f}, validation {row['validation_loss']:.4f}; "
            f"first token {row['first_token_loss']:.3f} (entropy {row['first_token_entropy']:.3f}); exact "
            f"{row['exact_match']:.1%} (majority {row['majority_share']:.1%}); recall {recalls}",
            flush=True,
        )
        draw_results.draw_lora_loss(self.results)
        draw_results.draw_confusion(confusion, self.results / "lora_confusion.png")


def run_identity(base_fingerprint):
    """What a resumed run must share with the one that it continues."""
    data = ROOT / DATA_DIR / "train" / "metadata.jsonl"
    return {
        "base": base_fingerprint, "data": run_files.file_hash(data), "rank": LORA_RANK, "alpha": LORA_ALPHA,
        "dropout": LORA_DROPOUT, "epochs": EPOCHS, "batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE,
        "seed": SEED, "processes": int(os.environ.get("WORLD_SIZE", 1)), "prompt": model_file.PROMPT,
    }  # fmt: skip


def prepare_checkpoints(folder, identity, first_process):
    """The checkpoint to resume from, None for a fresh start, which clears what an earlier run left there."""
    checkpoint = last_complete_checkpoint(folder) if RESUME else None
    if checkpoint:
        saved = checks.read_json(folder / "identity.json")
        for name, ours in identity.items():
            if saved.get(name) != ours:
                raise checks.BadInput(
                    f"{folder} is of a run with {name} = {saved.get(name)!r}, now {ours!r}: put it back, or set RESUME to "
                    "False to start anew"
                )
        return checkpoint
    if first_process:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        run_files.write_json(folder / "identity.json", identity)
    return None


def last_complete_checkpoint(folder):
    """The newest of the Trainer's checkpoints whose trainer_state.json parses, or None; the first process writes that last."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    for checkpoint in checkpoints:
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
            return str(checkpoint)
        except (OSError, json.JSONDecodeError):
            print(f"{checkpoint.name} is not complete: the one before is used")
    print(f"RESUME = True, but {folder} has no complete checkpoint: starts from the beginning")
    return None


def card(metrics, trainable, total):
    rows = "\n".join(
        f"| {name} | {value:.4f} |" if isinstance(value, float) else f"| {name} | {value} |"
        for name, value in metrics.items()
        if value == value  # an action that does not occur has no recall
    )
    return f"""---
base_model: {BASE_MODEL}
library_name: peft
pipeline_tag: image-text-to-text
---
# A LoRA that answers "{model_file.PROMPT}"

Trained by `train_git_lora_carllava_style.py` on `{DATA_DIR}/` with base `{BASE_MODEL}`: rank {LORA_RANK}, {EPOCHS} epochs, batch
{BATCH_SIZE}, learning rate {LEARNING_RATE}, {trainable:,} of {total:,} parameters trained; frame skip {car_racing_env.FRAME_SKIP}. Constants, commit, versions
and time are in `run.json`. It answers one of {", ".join(model_file.ANSWERS)}.

| on the validation tracks | |
|---|---|
{rows}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoProcessor

base = AutoModelForCausalLM.from_pretrained("{BASE_MODEL}")
processor = AutoProcessor.from_pretrained("{OUTPUT_DIR}")
model = PeftModel.from_pretrained(base, "{OUTPUT_DIR}").eval()
prompt = processor.tokenizer("{model_file.PROMPT}", return_tensors="pt").input_ids[:, :-1]  # no [SEP]: the answer follows
pixels = processor(images=frame, return_tensors="pt").pixel_values  # frame: PIL image or uint8 (96, 96, 3)
words = model.generate(pixel_values=pixels, input_ids=prompt, max_new_tokens=6)
print(processor.tokenizer.decode(words[0, prompt.shape[1] :], skip_special_tokens=True))
```
"""


def main():
    checks.check_constants(
        globals(), MIN_FRAMES=(int, 1, None), LORA_RANK=(int, 1, None), LORA_ALPHA=(float, 0, None),
        LORA_DROPOUT=(float, 0, 0.99), EPOCHS=(int, 1, None), BATCH_SIZE=(int, 1, None), LEARNING_RATE=(float, 0, 1),
        WEIGHT_DECAY=(float, 0, 1), WARMUP=(float, 0, 1), SEED=(int, 0, None), RESUME=(bool, None, None),
        MACRO_MIN_FRAMES=(int, 1, None), BASE_MODEL=(str, None, None), DATA_DIR=(str, None, None),
        OUTPUT_DIR=(str, None, None), RESULTS_DIR=(str, None, None), CHECKPOINT_DIR=(str, None, None),
    )  # fmt: skip
    began, facts = time.time(), run_files.run_facts() | {"frame_skip": car_racing_env.FRAME_SKIP}
    set_seed(SEED)
    train, validation = (Captions(ROOT / DATA_DIR / split) for split in ("train", "validation"))
    if len(train) < MIN_FRAMES:
        raise checks.BadInput(
            f"{DATA_DIR}/ has {len(train)} training frames, only the shipped sample: run collect_captions.py first"
        )
    car_racing_env.check_frame_skip(DATA_DIR, checks.read_json(ROOT / DATA_DIR / "run.json"))
    if len(train) < BATCH_SIZE * int(os.environ.get("WORLD_SIZE", 1)):
        raise checks.BadInput(
            f"BATCH_SIZE = {BATCH_SIZE} in train_git_lora_carllava_style.py, but {DATA_DIR}/ has {len(train)} training "
            "frames: lower it"
        )
    if torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ and model_file.device().type == "cuda":
        raise checks.BadInput(
            "several GPUs: start with torchrun --standalone --nproc_per_node=<GPUs>, or hide all but one"
        )
    git, processor = model_file.load_base(BASE_MODEL)
    base_fingerprint = model_file.fingerprint(git)
    first_process = int(os.environ.get("RANK", 0)) == 0  # torchrun's
    identity = run_identity(base_fingerprint)
    facts["data_hash"] = identity["data"]
    output, results = checks.replaceable(OUTPUT_DIR), ROOT / RESULTS_DIR
    for folder in (output.parent, results):
        run_files.check_writable(folder)
    checkpoint = prepare_checkpoints(ROOT / CHECKPOINT_DIR, identity, first_process)
    config = LoraConfig(
        r=LORA_RANK, lora_alpha=LORA_ALPHA, lora_dropout=LORA_DROPOUT, target_modules=model_file.LORA_TARGETS
    )
    git = get_peft_model(git, config)
    if not LORA_DROPOUT:
        multiply_once(git)
    trainable, total = git.get_nb_trainable_parameters()
    if first_process:
        print(
            f"LoRA on {BASE_MODEL}: {trainable:,} of {total:,} parameters ({trainable / total:.1%}) train for {EPOCHS} "
            f"epochs on {len(train):,} frames, {len(validation):,} for validation; writes {OUTPUT_DIR}/ and {RESULTS_DIR}/, "
            f"{checks.duration(0.0038 * EPOCHS * len(train))} for git-tiny"
        )
    model = model_file.GitText2ActionWithPrompt(git, processor)
    report = EpochReport(model, validation, results)
    trainer = AnswerTrainer(
        git,
        TrainingArguments(
            output_dir=str(ROOT / CHECKPOINT_DIR),
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=BATCH_SIZE,
            per_device_eval_batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            lr_scheduler_type="cosine",
            warmup_steps=WARMUP,
            logging_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=2,
            use_cpu=model_file.device().type == "cpu",
            bf16=model_file.device().type == "cuda",
            remove_unused_columns=False,
            dataloader_drop_last=True,
            report_to="none",
            seed=SEED,
            ddp_timeout=6 * 3600,  # seconds: the others wait while the first process validates
        ),
        data_collator=Collator(processor),
        train_dataset=train,
        callbacks=[report],
    )
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except (pickle.UnpicklingError, EOFError) as error:  # the Trainer loads its files with weights_only=True
        if checkpoint is None:
            raise
        raise checks.BadInput(
            f"cannot read {checkpoint} ({(str(error) or repr(error)).splitlines()[0]}): remove it to resume from the one "
            "before, or set RESUME to False to start anew"
        ) from None
    if not trainer.is_world_process_zero():
        return
    if report.metrics is None:  # resumed after the last epoch
        report.metrics, _ = validate(model.eval(), validation, BATCH_SIZE)
    if output.exists():
        print(f"replaces {OUTPUT_DIR}/; the shipped adapter comes back with: git checkout {OUTPUT_DIR}")
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    git.peft_config["default"].base_model_name_or_path = BASE_MODEL
    git.save_pretrained(partial)
    processor.save_pretrained(partial)
    (partial / "README.md").write_text(card(report.metrics, trainable, total))
    task = {
        "base_model": BASE_MODEL, "base_fingerprint": base_fingerprint, "prompt": model_file.PROMPT,
        "answers": list(model_file.ANSWERS), "frame_skip": car_racing_env.FRAME_SKIP,
    }  # fmt: skip
    run_files.write_json(partial / model_file.TASK_FILE, task)
    run_files.write_run(partial, [sys.modules[__name__], model_file, car_racing_env], began, facts)
    run_files.replace_folder(partial, output)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(
        f"average loss {losses[0]:.2f} -> {losses[-1]:.2f}; the reference printed "
        f"{REFERENCE_LOSS[0]} -> {REFERENCE_LOSS[1]} (different vocabulary and label mask)\n"
        f"wrote {OUTPUT_DIR}/ in {time.time() - began:.0f} s; next: python ppo_git_with_prompt.py"
    )


if __name__ == "__main__":
    checks.run(main)
