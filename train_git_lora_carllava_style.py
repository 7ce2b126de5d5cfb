"""Stage 2: LoRA teaches a GIT to answer "What should the vehicle do in this scenario?", also under instructions.

Reads a GIT base (BASE_MODEL) and CarRacing-Data/ of stage 1. Writes lora_git_caption_model_carllava/ (PEFT adapter,
processor, card, task.json, run.json), and results/: lora_log.csv (a row per epoch), lora_loss.png, lora_confusion.png
and .csv.

    python train_git_lora_carllava_style.py      # 8 to 25 minutes on two CPU cores; then python ppo_git_with_prompt.py

Each frame is read once with several texts (captions.py): the plain question in several wordings, the question under
some of the instructions it was labelled for, and a question about the scene, so that seeing is not forgotten, or about
the instruction, so that what is wanted is understood before it is done. Exact answers are reported for the plain
question, by instruction (taught phrasings and others) and for the questions about the scene, before and after.
"""

import collections
import functools
import pickle
import shutil
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

import car_racing_env
import GitText2ActionWithPrompt as model_file
import instructions
import questions
from captions import Captions, Collator, all_texts, draw_texts, measured_texts
from fast import git_forward
from GitText2ActionWithPrompt import ANSWERS, LORA_TARGETS, GitText2ActionWithPrompt
from support import cards, checkpoints, checks, plots, processes, run_files
from support.run_files import ROOT

BASE_MODEL = "offline/git-tiny"  # any GIT checkpoint; for the Hub's: "microsoft/git-base"
ADAPTER = ""  # an adapter of this script that learns on, and keeps its rank; "": a new one begins
DATA_DIR = "CarRacing-Data"
MORE_DATA = ()  # further folders of stage 1, for training only: of frames where the model drove ("CarRacing-Data-2",)
OUTPUT_DIR = "lora_git_caption_model_carllava"
RESULTS_DIR = "results"
CHECKPOINT_DIR = "results/lora_checkpoints"  # the Trainer's, one per epoch; resumed from if RESUME
RESUME = False
SEED = 0
MIN_FRAMES = 1_000  # fewer training frames are the shipped sample, not a dataset

LORA_RANK = 32
LORA_ALPHA = 64
EPOCHS = 3
WISHES = 0.5  # share of the questions about the scene in whose place WISH_QUESTION is asked
REWORDED = 0.4  # share of the plain texts that ask in other words; half that share of those under an instruction
BATCH_SIZE = 128  # 16 for microsoft/git-base on one GPU
LEARNING_RATE = 2e-3  # 1e-4 for microsoft/git-base: a pretrained base wants far less
WEIGHT_DECAY = 0.0
WARMUP = 0.05  # share of the steps, then a cosine to zero
MAX_GRAD_NORM = 1.0

MAY_CHANGE = {"RESUME", "DATA_DIR", "MORE_DATA", "OUTPUT_DIR", "RESULTS_DIR", "CHECKPOINT_DIR", "MIN_FRAMES"}


class EpochReport(TrainerCallback):
    """After every epoch, and before the first: validate, print a row, append it to lora_log.csv and redraw the graphs.

    A loss that is not finite ends the run before a checkpoint holds what it spoilt.
    """

    def __init__(self, model, data, results, run):
        self.model, self.data, self.results, self.run = model, data, results, run
        self.metrics = None

    def on_log(self, args, state, control, logs, **kwargs):
        if not np.isfinite(logs.get("loss", 0)):
            raise checks.BadInput("the LoRA loss is not finite: lower LEARNING_RATE; adapter and checkpoints are kept")
        if "loss" in logs and state.is_world_process_zero:
            self.report(round(state.epoch), logs["loss"])

    def report(self, epoch, average_loss):
        self.metrics, confusion = validate(self.model, self.data, BATCH_SIZE)
        seconds = run_files.until_now(self.run)["seconds"]
        row = {"epoch": epoch, "average_loss": average_loss, **self.metrics, "seconds": seconds}
        log = self.results / "lora_log.csv"
        run_files.Log(log, key="epoch", keep_until=epoch - 1).write(row)  # a resumed run repeats an epoch
        names = [f"exact_{kind}_taught" for kind in instructions.KINDS]
        told = [self.metrics[name] for name in names if name in self.metrics] or [np.nan]
        trained = f"epoch {epoch}: average loss {average_loss:.4f}" if epoch else "before training"
        tqdm.write(
            f"{trained}, validation {row['validation_loss']:.4f}, exact answers "
            f"{row['exact_match']:.1%} (the commonest one: {row['majority_share']:.1%}), under instructions "
            f"{np.mean(told):.1%}, wishes {row.get('exact_wish_taught', np.nan):.1%}, about the scene "
            f"{row.get('exact_scene', np.nan):.1%}"
        )
        run_files.write_run(ROOT / CHECKPOINT_DIR, self.run)
        plots.draw_lora_loss(self.results)
        plots.draw_confusion(confusion, list(ANSWERS), self.results / "lora_confusion.png")


@torch.no_grad()
def validate(model, data, batch_size):
    """What the answers are worth on held-out tracks: metrics, and the confusion matrix, int64 (5, 6).

    That is the teacher's answer by the generated answer to the plain question, the last column for words that are no
    answer. `exact_KIND_SPLIT` are exact answers under a kind of instruction, in taught or held-out phrasings, but for
    each frame's first one, which are `exact_first_told`; `exact_wish_SPLIT` those to WISH_QUESTION, `exact_scene` those
    to the questions about the scene, `exact_scene_ABOUT` to each of them. The loss is over `all_texts`, another mixture
    than training's: compare it between epochs only.
    """
    model.prepare()  # the answers are those of the weights as they are now
    collate = Collator(model.processor, all_texts)
    answers = list(ANSWERS)
    confusion = np.zeros((len(answers), len(answers) + 1), dtype=np.int64)
    loss = 0.0
    exact = collections.defaultdict(list)
    for indices in torch.arange(len(data)).split(batch_size):
        samples = [data[i] for i in indices]
        frames, rows = zip(*samples)
        batch = {key: x.to(model.device) for key, x in collate(samples).items()}
        with model.autocast():
            logits = git_forward.read_texts(model.weights, batch["pixel_values"], batch["input_ids"]).float()
        loss += git_forward.text_loss(logits, batch["labels"]).item() * len(samples)
        for text, row in zip(model.answer(np.stack(frames)), rows):
            confusion[row["answer"], answers.index(text) if text in answers else -1] += 1
        for row, right in zip(rows, git_forward.exactly_right(logits, batch["labels"]).tolist()):
            for (names, _), correct in zip(measured_texts(row), right):
                for name in names:
                    exact[name].append(correct)
    shares = {name: float(np.mean(correct)) for name, correct in sorted(exact.items())}
    return {"validation_loss": loss / len(data)} | summarize(confusion) | shares, confusion


def summarize(confusion):
    """Exact match, the share of the commonest answer (exact without looking), and each answer's recall."""
    counts, total = confusion.sum(1), confusion.sum()
    metrics = {"exact_match": float(np.trace(confusion) / total), "majority_share": float(counts.max() / total)}
    recalls = np.where(counts > 0, confusion.diagonal() / np.maximum(counts, 1), np.nan)
    return metrics | {f"recall_{answer.lower().replace(' ', '_')}": float(x) for answer, x in zip(ANSWERS, recalls)}


def training_folders():
    """The datasets whose training split is learned."""
    return [ROOT / folder for folder in (DATA_DIR, *MORE_DATA)]


def load_data():
    """The two splits, of frames that were collected for this task."""
    folders = training_folders()
    for folder in folders:
        task = checks.read_json(folder / checkpoints.TASK_FILE, "run collect_captions.py first")
        checks.check_same(f"{folder}/", task, model_file.task(), "put it back, or rerun collect_captions.py")
        labelled = checks.read_json(folder / "run.json", "run collect_captions.py first").get("inputs", {})
        said = {"instructions": instructions.digest(), "questions": questions.digest()}
        remedy = "put phrasings.py, instructions.py and questions.py back, or rerun collect_captions.py"
        checks.check_same(f"{folder}/", labelled, said, remedy)
    train = Captions(*(folder / "train" for folder in folders))
    validation = Captions(ROOT / DATA_DIR / "validation")
    own = sum(row["file"].parent.parent == folders[0] for row in train.rows)  # without MORE_DATA
    if own < max(MIN_FRAMES, BATCH_SIZE):
        remedy = "run collect_captions.py first, or lower MIN_FRAMES and BATCH_SIZE"
        raise checks.BadInput(f"{DATA_DIR}/ has {own} training frames, a sample: {remedy}")
    for split in (train, validation):  # each frame of a split is read with as many texts
        if len({(len(row["told"]), len(row["asked"])) for row in split.rows}) > 1:
            raise checks.BadInput(f"{DATA_DIR}/ or MORE_DATA has frames of several settings: rerun collect_captions.py")
    told = {(x["instruction"], x["sentence"]) for row in train.rows for x in row["told"]}
    if held_out := sorted(sentence for name, sentence in told if instructions.is_held_out(name, sentence)):
        remedy = "which phrasings.py holds out: rerun collect_captions.py"
        raise checks.BadInput(f"{DATA_DIR}/ or MORE_DATA says {held_out[0]!r}, {remedy}")
    return train, validation


def load_model():
    """BASE_MODEL with the LoRA to train, read by the fast pass; its processor; what the adapter is made for."""
    git, processor = checkpoints.load_base(BASE_MODEL)
    facts = model_file.task() | {"base_model": BASE_MODEL, "base_fingerprint": checkpoints.fingerprint(git)}
    git = git_forward.train_by_this_pass(git, processor.image_processor)
    if ADAPTER:
        made_for = checks.read_json(ROOT / ADAPTER / checkpoints.TASK_FILE)
        checks.check_same(f"{ADAPTER}/", made_for, facts, "put it back, or name another ADAPTER")
        git = checkpoints.attach_adapter(git, ROOT / ADAPTER, trainable=True)
    else:
        git = get_peft_model(git, LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=LORA_TARGETS))
    checkpoints.check_lora(git)
    return git, processor, facts


def make_trainer(git, processor, data, report):
    """Transformers' Trainer with this script's constants; a checkpoint per epoch in CHECKPOINT_DIR."""
    texts = functools.partial(draw_texts, reworded=REWORDED, wishes=WISHES)
    device = model_file.device()
    arguments = TrainingArguments(
        output_dir=str(ROOT / CHECKPOINT_DIR),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        lr_scheduler_type="cosine",
        warmup_steps=WARMUP,  # below 1 it is a share of all steps
        max_grad_norm=MAX_GRAD_NORM,
        logging_strategy="epoch",
        logging_nan_inf_filter=False,
        save_strategy="epoch",
        save_total_limit=2,
        use_cpu=device.type == "cpu",
        bf16=git_forward.multiplies_bfloat16(device),
        remove_unused_columns=False,
        dataloader_drop_last=True,
        report_to="none",
        seed=SEED,
        ddp_timeout=6 * 3600,  # seconds: the others wait while the first process validates
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # of several it would copy the model onto each, without its pass
    return Trainer(git, arguments, data_collator=Collator(processor, texts), train_dataset=data, callbacks=[report])


def save_adapter(folder, git, processor, facts, metrics, run):
    """Replace the adapter's folder as a whole: PEFT's files, the processor, task.json, card and run.json."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    git.peft_config["default"].base_model_name_or_path = BASE_MODEL
    git.save_pretrained(partial)
    processor.save_pretrained(partial)
    run_files.write_json(partial / checkpoints.TASK_FILE, facts)
    data = ", ".join(f"`{data}/`" for data in (DATA_DIR, *MORE_DATA))
    data += f", from the adapter in `{ADAPTER}/`," if ADAPTER else ""
    shown = {"folder": OUTPUT_DIR, "data": data, "rank": git.peft_config["default"].r}
    card = cards.adapter_card(facts | shown, metrics)
    (partial / "README.md").write_text(card)
    run_files.write_run(partial, run)
    run_files.replace_folder(partial, folder)


def main():
    rank, world_size = processes.join_torchrun()
    script = Path(__file__).name
    checkpoint_dir = ROOT / CHECKPOINT_DIR
    checkpoint = None
    set_seed(SEED)
    train, validation = load_data()
    git, processor, facts = load_model()
    data_hash = " ".join(run_files.file_hash(folder / "train/metadata.jsonl") for folder in training_folders())
    inputs = {"processes": world_size, "data_hash": data_hash, "instructions": instructions.digest()} | facts
    inputs |= {"bfloat16": git_forward.multiplies_bfloat16(model_file.device())}
    inputs |= {"adapter_hash": run_files.file_hash(ROOT / ADAPTER / "adapter_model.safetensors") if ADAPTER else ""}
    run = run_files.describe_run(globals(), vars(model_file), vars(car_racing_env), **inputs)
    model = GitText2ActionWithPrompt(git, processor)
    results = run_files.check_writable(ROOT / RESULTS_DIR)
    output = run_files.check_own(ROOT / OUTPUT_DIR, script, results, checkpoint_dir)
    if RESUME:
        run = run_files.continue_run(checkpoint_dir, run, MAY_CHANGE)
        checkpoint = checkpoints.last_complete_checkpoint(checkpoint_dir)
    elif rank == 0:
        run_files.clear(checkpoint_dir, script, results, output)
        run_files.write_run(checkpoint_dir, run)
    if rank == 0:
        trained, total = git.get_nb_trainable_parameters()
        size = f"{trained:,} of {total:,} parameters"
        print(f"LoRA on {BASE_MODEL}: {size} train for {EPOCHS} epochs on {len(train):,} frames")
        said = [model_file.PROMPT, *sorted(instructions.taught_sentences()), *sum(questions.QUESTIONS.values(), ())]
        if unknown := model_file.unknown_words(processor.tokenizer, " ".join(said)):
            print(
                f"{BASE_MODEL} reads letter by letter: {', '.join(unknown)}; python -m offline.make_git_tiny teaches it"
            )
    report = EpochReport(model, validation, results, run)
    trainer = make_trainer(git, processor, train, report)
    if rank == 0 and not checkpoint:
        report.report(0, float("nan"))
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except (pickle.UnpicklingError, EOFError) as error:  # the Trainer loads its files with weights_only=True
        reason = (str(error) or repr(error)).splitlines()[0]
        raise checks.BadInput(f"cannot read {checkpoint} ({reason}): remove it, or set RESUME to False") from None
    if rank == 0:
        metrics = report.metrics or validate(model, validation, BATCH_SIZE)[0]  # resumed after the last epoch
        save_adapter(output, git, processor, facts, metrics, run)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        before_after = f"{losses[0]:.2f} -> {losses[-1]:.2f}"
        print(f"average loss {before_after}; wrote {OUTPUT_DIR}/")
        print(f'next: python ppo_git_with_prompt.py, with MODEL = "{OUTPUT_DIR}"')


if __name__ == "__main__":
    checks.run(main)
