"""Stage 2: LoRA teaches a GIT base to answer "What should the vehicle do in this scenario?" in words.

Reads a GIT base (BASE_MODEL) and CarRacing-Data/ of stage 1. Writes lora_git_caption_model_carllava/ (PEFT adapter,
processor, card, task.json, run.json), and results/: lora_log.csv (a row per epoch), lora_loss.png, lora_confusion.png.

    python train_git_lora_carllava_style.py      # 10 to 30 minutes on two CPU cores

Expect an average loss of 0.46 falling to 0.05 and 93 to 95 % exact answers on the validation tracks. Only the answer's
tokens are supervised: `[CLS] prompt answer [SEP]`, with labels -100 on prompt and padding.

Then: python ppo_git_with_prompt.py
"""

import json
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

import car_racing_env
import GitText2ActionWithPrompt as model_file
from fast.lora import multiply_once
from GitText2ActionWithPrompt import ANSWERS, LORA_TARGETS, GitText2ActionWithPrompt
from support import cards, checkpoints, checks, plots, processes, run_files
from support.run_files import ROOT

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

MAY_CHANGE = {"RESUME", "DATA_DIR", "OUTPUT_DIR", "RESULTS_DIR", "CHECKPOINT_DIR", "MIN_FRAMES", "MACRO_MIN_FRAMES"}


class Captions(torch.utils.data.Dataset):
    """One split of an imagefolder dataset: (frame uint8 (96, 96, 3), answer index in the order of ANSWERS)."""

    def __init__(self, folder):
        self.folder, metadata, answers = Path(folder), Path(folder) / "metadata.jsonl", list(ANSWERS)
        if not metadata.exists():
            raise checks.BadInput(f"no captions in {folder}/: run collect_captions.py first")
        try:
            rows = [json.loads(line) for line in metadata.read_text().splitlines()]
            self.rows = [(Path(row["file_name"]).name, answers.index(row["text"])) for row in rows]
        except (ValueError, KeyError, TypeError) as error:
            raise checks.BadInput(f"{metadata} is damaged ({error!r}): rerun collect_captions.py") from None

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        name, answer = self.rows[index]
        with Image.open(self.folder / name, formats=["PNG"]) as image:
            return np.asarray(image.convert("RGB")), answer


class Collator:
    """Frames and answer indices -> pixel_values, input_ids, labels."""

    def __init__(self, processor):
        tokenizer = processor.tokenizer
        self.image_processor = processor.image_processor
        prompt = model_file.prompt_ids(tokenizer)
        answers = [[*ids, tokenizer.sep_token_id] for ids in model_file.answer_ids(tokenizer)]
        input_ids = [torch.tensor(prompt + ids) for ids in answers]
        labels = [torch.tensor([-100] * len(prompt) + ids) for ids in answers]
        self.input_ids = pad_sequence(input_ids, batch_first=True, padding_value=tokenizer.pad_token_id)
        self.labels = pad_sequence(labels, batch_first=True, padding_value=-100)

    def __call__(self, rows):
        frames, answers = zip(*rows)
        answers = torch.tensor(answers)
        return {
            "pixel_values": model_file.preprocess(np.stack(frames), self.image_processor),
            "input_ids": self.input_ids[answers],
            "labels": self.labels[answers],
        }


class AnswerTrainer(Trainer):
    """The Trainer; a loss that is not finite ends the run before it spoils the adapter."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise checks.BadInput(
                "the LoRA loss is not finite: lower LEARNING_RATE in train_git_lora_carllava_style.py; the last adapter "
                "and the checkpoints are kept"
            )
        return loss


class EpochReport(TrainerCallback):
    """After every epoch: validate, print a row, append it to lora_log.csv and redraw the graphs."""

    def __init__(self, model, data, results):
        self.model, self.data, self.results, self.metrics, self.began = model, data, results, None, time.time()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in (logs or {}) or not state.is_world_process_zero:
            return
        epoch = round(state.epoch)
        self.metrics, confusion = validate(self.model, self.data, BATCH_SIZE)
        row = {"epoch": epoch, "average_loss": logs["loss"], **self.metrics, "seconds": time.time() - self.began}
        log = run_files.Log(
            self.results / "lora_log.csv", key="epoch", keep_until=epoch - 1
        )  # a resumed run repeats one
        log.write(row)
        tqdm.write(
            f"epoch {epoch}: average loss {row['average_loss']:.4f}, validation {row['validation_loss']:.4f}, exact answers "
            f"{row['exact_match']:.1%} (the commonest one: {row['majority_share']:.1%})"
        )
        plots.draw_lora_loss(self.results)
        plots.draw_confusion(confusion, list(ANSWERS), self.results / "lora_confusion.png")


@torch.no_grad()
def validate(model, data, batch_size):
    """What the answers are worth on held-out tracks.

    Returns metrics and the confusion matrix, int64 (5, 6): teacher's answer by generated answer, the last column for
    words that are no answer.
    """
    model.git.eval()
    model.prepare()  # the answers are those of the weights as they are now
    collate, answers = Collator(model.processor), list(ANSWERS)
    first_words, last = torch.tensor([ids[0] for ids in model.answers]), len(model.prompt) - 1
    confusion = np.zeros((len(answers), len(answers) + 1), dtype=np.int64)
    loss, first_token_loss, tokens = 0.0, 0.0, 0
    for indices in torch.arange(len(data)).split(batch_size):
        rows = [data[i] for i in indices]
        batch = {key: x.to(model.device) for key, x in collate(rows).items()}
        labels, truth = batch.pop("labels")[:, 1:], torch.tensor([answer for _, answer in rows])
        logits = model.git(**batch).logits[:, -batch["input_ids"].shape[1] :]  # the text rows
        loss += F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum").item()
        tokens += (labels != -100).sum().item()
        first_token_loss += F.cross_entropy(logits[:, last].cpu(), first_words[truth], reduction="sum").item()
        for text, true in zip(model.answer(np.stack([frame for frame, _ in rows])), truth.tolist()):
            confusion[true, answers.index(text) if text in answers else -1] += 1
    model.git.train()
    losses = {"validation_loss": loss / tokens, "first_token_loss": first_token_loss / len(data)}
    return losses | summarize(confusion, first_words.numpy()), confusion


def summarize(confusion, first_words):
    """Exact match, the majority's share, the entropy of the answers' first words, recall and count of each answer."""
    counts, total = confusion.sum(1), confusion.sum()
    words = np.array([counts[first_words == word].sum() for word in np.unique(first_words)]) / total
    words = words[words > 0]
    recall = np.where(counts > 0, confusion.diagonal() / np.maximum(counts, 1), np.nan)
    frequent = recall[counts >= MACRO_MIN_FRAMES]
    metrics = {
        "first_token_entropy": float(-(words * np.log(words)).sum()),  # what first_token_loss is without looking
        "exact_match": float(np.trace(confusion) / total),
        "majority_share": float(counts.max() / total),
        "macro_recall": float(frequent.mean()) if len(frequent) else np.nan,
    }
    for i, answer in enumerate(ANSWERS):
        name = answer.lower().replace(" ", "_")
        metrics |= {f"recall_{name}": float(recall[i]), f"count_{name}": int(counts[i])}
    return metrics


def load_data():
    """The two splits, of frames that were collected for this task."""
    train, validation = (Captions(ROOT / DATA_DIR / split) for split in ("train", "validation"))
    if len(train) < max(MIN_FRAMES, BATCH_SIZE):
        remedy = "run collect_captions.py first, or lower MIN_FRAMES and BATCH_SIZE"
        raise checks.BadInput(f"{DATA_DIR}/ has {len(train)} training frames, a sample: {remedy}")
    task = checks.read_json(ROOT / DATA_DIR / checkpoints.TASK_FILE)
    checks.check_same(f"{DATA_DIR}/", task, model_file.task(), "put it back, or rerun collect_captions.py")
    return train, validation


def make_trainer(git, processor, data, report):
    """Transformers' Trainer with this script's constants; a checkpoint per epoch in CHECKPOINT_DIR."""
    on_cpu = model_file.device().type == "cpu"
    arguments = TrainingArguments(
        output_dir=str(ROOT / CHECKPOINT_DIR),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        lr_scheduler_type="cosine",
        warmup_steps=WARMUP,
        logging_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        use_cpu=on_cpu,
        bf16=not on_cpu,
        remove_unused_columns=False,
        dataloader_drop_last=True,
        report_to="none",
        seed=SEED,
        ddp_timeout=6 * 3600,  # seconds: the others wait while the first process validates
    )
    return AnswerTrainer(git, arguments, data_collator=Collator(processor), train_dataset=data, callbacks=[report])


def save_adapter(folder, git, processor, facts, metrics, run):
    """Replace the adapter's folder as a whole: PEFT's files, the processor, task.json, card and run.json."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    git.peft_config["default"].base_model_name_or_path = BASE_MODEL
    git.save_pretrained(partial)
    processor.save_pretrained(partial)
    run_files.write_json(partial / checkpoints.TASK_FILE, facts)
    card = cards.adapter_card(facts | {"folder": OUTPUT_DIR, "data": DATA_DIR, "rank": LORA_RANK}, metrics)
    (partial / "README.md").write_text(card)
    run_files.write_run(partial, run)
    run_files.replace_folder(partial, folder)


def main():
    rank, world_size = processes.join_torchrun()
    script, checkpoint_dir, checkpoint = Path(__file__).name, ROOT / CHECKPOINT_DIR, None
    set_seed(SEED)
    train, validation = load_data()
    git, processor = checkpoints.load_base(BASE_MODEL)
    facts = model_file.task() | {"base_model": BASE_MODEL, "base_fingerprint": checkpoints.fingerprint(git)}
    data_hash = run_files.file_hash(ROOT / DATA_DIR / "train" / "metadata.jsonl")
    modules = globals(), vars(model_file), vars(car_racing_env)
    run = run_files.describe_run(*modules, processes=world_size, data_hash=data_hash, **facts)
    results = run_files.check_writable(ROOT / RESULTS_DIR)
    output = run_files.check_own(ROOT / OUTPUT_DIR, script, results, checkpoint_dir)
    if RESUME:
        run = run_files.continue_run(checkpoint_dir, run, MAY_CHANGE)
        checkpoint = checkpoints.last_complete_checkpoint(checkpoint_dir)
    elif rank == 0:
        run_files.clear(checkpoint_dir, script, results, output)
        run_files.write_run(checkpoint_dir, run)
    lora = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, lora_dropout=LORA_DROPOUT, target_modules=LORA_TARGETS)
    git = multiply_once(get_peft_model(git, lora))
    if rank == 0:
        trainable, total = git.get_nb_trainable_parameters()
        print(
            f"LoRA on {BASE_MODEL}: {trainable:,} of {total:,} parameters train for {EPOCHS} epochs on {len(train):,} frames"
        )
    model = GitText2ActionWithPrompt(git, processor)
    report = EpochReport(model, validation, results)
    trainer = make_trainer(git, processor, train, report)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except (pickle.UnpicklingError, EOFError) as error:  # the Trainer loads its files with weights_only=True
        reason = (str(error) or repr(error)).splitlines()[0]
        raise checks.BadInput(f"cannot read {checkpoint} ({reason}): remove it, or set RESUME to False") from None
    if rank == 0:
        metrics = report.metrics or validate(model, validation, BATCH_SIZE)[0]  # resumed after the last epoch
        save_adapter(output, git, processor, facts, metrics, run)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        print(
            f"average loss {losses[0]:.2f} -> {losses[-1]:.2f}; wrote {OUTPUT_DIR}/; next: python ppo_git_with_prompt.py"
        )


if __name__ == "__main__":
    checks.run(main)
