"""Make `offline/git-tiny/`: a small GIT that can see CarRacing and speak about it, but knows nothing of driving.

Reads offline/teacher.safetensors, which drives (with bursts of random actions) through the frames it learns from.
Writes offline/git-tiny/ in the Hub's file layout, with a model card. Each frame comes with several questions about the
scene ("How does the road bend?", "How fast is the car?"), answered from the simulator's state; never with actions.

    python -m offline.make_git_tiny      # 25 minutes on two CPU cores
"""

import contextlib
import json
import shutil
import string
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import (
    BertTokenizer,
    CLIPImageProcessor,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
)

import car_racing_env
import checks
import collect_captions
import git_forward
import GitText2ActionWithPrompt as model_file
import run_files

OUTPUT = Path(__file__).parent / "git-tiny"
SEED = 0

TRAIN_FRAMES = 48_000
VALIDATION_FRAMES = 2_000
FIRST_TRACK, FIRST_VALIDATION_TRACK = 50_000, 100_000  # track seeds
KEEP = 0.2  # share of decisions that become frames: neighbours look alike
BURST_START, BURST_LONGEST = 0.06, 8  # stronger than in the captions: the eyes should know every situation
NUM_WORKERS = 2

IMAGE_SIZE, PATCH_SIZE, WIDTH, VISION_LAYERS, TEXT_LAYERS, HEADS = 96, 12, 128, 4, 3, 4
INITIALIZER_RANGE = WIDTH**-0.5  # the default 0.02 leaves so narrow a model at the class prior for epochs

EPOCHS = 3
BATCH_SIZE = 128  # frames
QUESTIONS_PER_FRAME = 4
LEARNING_RATE = 1e-3  # peak of a one-cycle schedule
WEIGHT_DECAY = 0.05

NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
).split()


def signed(value, step, largest=12):
    """ "left three" for about -3 * step, "middle" near zero."""
    n = min(round(abs(value) / step), largest)
    return "middle" if n == 0 else f"{'left' if value < 0 else 'right'} {NUMBERS[n]}"


def count(value, step):
    return NUMBERS[int(np.clip(round(value / step), 0, 20))]


def describe(state, track, tile):
    """Questions about the scene and their answers, from privileged state and the road around the car."""
    turn = lambda a, b: np.angle(np.exp(-1j * (track[(tile + b) % len(track), 1] - track[(tile + a) % len(track), 1])))  # noqa: E731
    points = state[15:].reshape(-1, 2) * 20  # right, forward
    grass = 4 - int(state[8:12].sum())
    return {
        "Where on the road is the car?": signed(state[12] * car_racing_env.stock.TRACK_WIDTH, 0.75),
        "How is the car pointed?": signed(np.degrees(np.arctan2(state[13], state[14])), 4.0),
        "How fast is the car?": count(state[0] * 50, 4.0),
        "How is the car turning?": signed(-state[2] * 3, 0.2),
        "How does the car slide?": signed(state[1] * 20, 1.0),
        "How are the wheels steered?": signed(-state[3] * 0.4, 0.05),
        "How fast are the wheels?": count(state[6] * 100, 10.0),
        "Is the car on the grass?": NUMBERS[grass],
        "How does the road bend?": signed(np.degrees(turn(0, 4)), 7.0),
        "How does the road bend next?": signed(np.degrees(turn(4, 8)), 7.0),
        "How does the road bend far ahead?": signed(np.degrees(turn(8, 12)), 7.0),
        "Where does the road go?": signed(points[2, 0], 0.8),
        "Where does the road go next?": signed(points[5, 0], 1.5),
        "Where does the road go far ahead?": signed(points[8, 0], 3.0),
    }


def start_worker(constants):
    """Give a spawned process the parent's constants and one thread."""
    checks.end_with_the_parent()
    checks.set_constants(constants)
    torch.set_num_threads(1)


def drive(track_seed):
    """One episode: frames uint8 (n, 96, 96, 3) and their answers."""
    rng = np.random.default_rng(track_seed)
    env = car_racing_env.make_env(car_racing_env.FRAME_SKIP, draw=False)
    env = collect_captions.RandomBursts(env, track_seed, BURST_START, BURST_LONGEST)
    env = collect_captions.PrivilegedState(env, collect_captions.TILES_AHEAD)
    teacher = collect_captions.load_teacher()
    _, info = env.reset(seed=track_seed)
    frames, answers, end = [], [], ""
    stuck = 0
    while not end and stuck < 60:
        state = torch.from_numpy(info["state"])
        _, _, terminated, truncated, info = env.step(int(teacher(state[None])[0].argmax()))
        end = car_racing_env.episode_end(terminated, truncated, info)
        stuck = 0 if info["state"][8:12].any() else stuck + 1
        if rng.random() < KEEP:
            frames.append(env.unwrapped.draw())
            answers.append(describe(info["state"], env.track, env.tile))
    return np.stack(frames), answers


def collect(first_track, num_frames):
    """The first `num_frames` frames of tracks from `first_track` on, uint8 (N, 96, 96, 3), and a dict of answers for each."""
    frames, answers = [], []
    tracks = range(first_track, first_track + 10_000)
    constants = checks.constants_of(__name__, "car_racing_env", "collect_captions")
    with (
        contextlib.closing(
            collect_captions.run_jobs(drive, tracks, NUM_WORKERS, start_worker, (constants,))
        ) as episodes,
        tqdm(total=num_frames, mininterval=5) as bar,
    ):
        for episode, said in episodes:
            frames.append(episode), answers.extend(said)
            bar.update(len(said))
            if len(answers) >= num_frames:
                break
    return np.concatenate(frames)[:num_frames], answers[:num_frames]


def make_processor(answers):
    """WordPiece over the questions' and answers' words, the task's and some others, and the whole alphabet."""
    texts = [
        *answers[0],
        *(a for row in answers for a in row.values()),
        *NUMBERS,
        model_file.PROMPT,
        *model_file.ANSWERS,
    ]
    texts += [
        "describe the weather like a poet ; please say what you see now and then answer with one word . which way to drive on"
    ]
    pieces = sorted({w for t in texts for w in t.lower().replace("?", " ?").split()})
    letters = string.ascii_lowercase + string.digits
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *string.punctuation,
        *letters,
        *(f"##{c}" for c in letters),
    ]
    vocabulary += [p for p in pieces if p not in vocabulary]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}, model_max_length=64)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return GitProcessor(CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False), tokenizer)


def make_model(tokenizer):
    vision = dict(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=VISION_LAYERS, num_attention_heads=HEADS,
        image_size=IMAGE_SIZE, patch_size=PATCH_SIZE, initializer_range=INITIALIZER_RANGE,
    )  # fmt: skip
    return GitForCausalLM(
        GitConfig(
            vision_config=vision, vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=4 * WIDTH,
            num_hidden_layers=TEXT_LAYERS, num_attention_heads=HEADS, max_position_embeddings=64,
            initializer_range=INITIALIZER_RANGE, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.cls_token_id, eos_token_id=tokenizer.sep_token_id,
        )
    )  # fmt: skip


def tokenize(tokenizer, answers):
    """Rows `[CLS] question answer [SEP]` as int64 (frames, questions, T) and labels with -100 on all but the answer."""
    questions = list(answers[0])
    length = max(len(tokenizer(q, add_special_tokens=False).input_ids) for q in questions) + 4
    tokens = np.full((len(answers), len(questions), length), tokenizer.pad_token_id)
    labels = np.full(tokens.shape, -100)
    cache = {}
    for i, row in enumerate(answers):
        for j, (question, answer) in enumerate(row.items()):
            if (question, answer) not in cache:
                prompt = model_file.prompt_ids(tokenizer, question)
                cache[question, answer] = prompt, tokenizer(answer, add_special_tokens=False).input_ids
            prompt, ids = cache[question, answer]
            ids = [*ids, tokenizer.sep_token_id]
            tokens[i, j, : len(prompt) + len(ids)] = prompt + ids
            labels[i, j, len(prompt) : len(prompt) + len(ids)] = ids
    return torch.from_numpy(tokens), torch.from_numpy(labels)


def answer_logits(model, frames, tokens):
    """Logits (B * Q, T, vocabulary) of Q texts (B, Q, T) on each of B frames, the image rows computed once."""
    q = tokens.shape[1]
    weights = model.weights()
    image = git_forward.encode_image(weights, model_file.resize(frames, model.processor.image_processor))
    _, cache = git_forward.decode(weights, image)
    cache = [(key.repeat_interleave(q, 0), value.repeat_interleave(q, 0)) for key, value in cache]
    text = git_forward.embed(weights, tokens.flatten(0, 1))
    mask = git_forward.prefix_mask(image.shape[1], text.shape[1], image.device)[image.shape[1] :]
    return git_forward.linear(git_forward.decode(weights, text, mask, cache)[0], *weights.lm_head)


def main():
    torch.manual_seed(SEED)
    began = time.time()
    print(
        f"{TRAIN_FRAMES:,} frames, {EPOCHS} epochs, {checks.duration(1300)}; replaces {OUTPUT}/ at the end, the shipped one comes "
        "back with: git checkout offline/git-tiny"
    )
    frames, answers = collect(FIRST_TRACK, TRAIN_FRAMES)
    val_frames, val_answers = collect(FIRST_VALIDATION_TRACK, VALIDATION_FRAMES)
    processor = make_processor(answers)
    tokens, labels = tokenize(processor.tokenizer, answers)
    val_tokens, val_labels = tokenize(processor.tokenizer, val_answers)
    model = model_file.GitText2ActionWithPrompt(make_model(processor.tokenizer), processor)
    git = model.git.requires_grad_(True)
    print(f"{sum(p.numel() for p in git.parameters()):,} parameters, {len(processor.tokenizer)} words")
    optimizer = torch.optim.AdamW(git.parameters(), weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * (len(frames) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=0.1)
    frames = torch.from_numpy(frames)
    bar = tqdm(total=steps, mininterval=10)
    for epoch in range(EPOCHS):
        losses = []
        for rows in torch.randperm(len(frames)).split(BATCH_SIZE)[: len(frames) // BATCH_SIZE]:
            pick = torch.rand(len(rows), tokens.shape[1]).argsort(1)[:, :QUESTIONS_PER_FRAME]
            text, label = tokens[rows[:, None], pick], labels[rows[:, None], pick]
            logits = answer_logits(model, frames[rows], text)
            loss = F.cross_entropy(
                logits[:, :-1].flatten(0, 1), label.flatten(0, 1)[:, 1:].flatten(), ignore_index=-100
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(git.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            bar.update()
            bar.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}")
        accuracy, val_loss = evaluate(model, torch.from_numpy(val_frames), val_tokens, val_labels, list(answers[0]))
        print(
            f"\nepoch {epoch + 1} loss {np.mean(losses):.4f} validation {val_loss:.4f} {json.dumps(accuracy)}",
            flush=True,
        )
    partial = OUTPUT.with_name(OUTPUT.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    git.save_pretrained(partial)
    processor.save_pretrained(partial)
    (partial / "README.md").write_text(card(np.mean(losses), val_loss, accuracy, time.time() - began))
    run_files.replace_folder(partial, OUTPUT)
    print(f"wrote {OUTPUT} in {time.time() - began:.0f} s; next: python train_git_lora_carllava_style.py")


def card(loss, val_loss, accuracy, seconds):
    rows = "\n".join(f"| {question} | {share:.1%} |" for question, share in accuracy.items())
    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
---
# git-tiny

A GIT (image encoder + text decoder) of 1.5M parameters for Gymnasium's CarRacing: {IMAGE_SIZE} x {IMAGE_SIZE} pixels, patches of {PATCH_SIZE},
width {WIDTH}, {VISION_LAYERS} vision and {TEXT_LAYERS} text layers, a WordPiece vocabulary of its own. It answers questions about the scene, which were
answered from the simulator's state while training; it was never shown an action.

Made by `python -m offline.make_git_tiny` (seed {SEED}, {TRAIN_FRAMES:,} frames of tracks from {FIRST_TRACK:,}, {EPOCHS} epochs, {QUESTIONS_PER_FRAME} questions per frame, {seconds:.0f} s
on two CPU cores). Cross-entropy per answer token {loss:.3f}, on {VALIDATION_FRAMES:,} frames of held-out tracks {val_loss:.3f}. Wholly right answers there:

| question | right |
|---|---|
{rows}
"""


@torch.no_grad()
def evaluate(model, frames, tokens, labels, questions):
    """Share of wholly right answers per question, and the mean loss, on held-out tracks."""
    right, losses = [], []
    for rows in torch.arange(len(frames)).split(BATCH_SIZE):
        logits = answer_logits(model, frames[rows], tokens[rows])[:, :-1]
        label = labels[rows].flatten(0, 1)[:, 1:]
        losses.append(F.cross_entropy(logits.flatten(0, 1), label.flatten(), ignore_index=-100).item())
        right.append(((logits.argmax(-1) == label) | (label == -100)).all(-1).view(len(rows), -1))
    right = torch.cat(right).float().mean(0)
    return {q: round(r.item(), 3) for q, r in zip(questions, right)}, float(np.mean(losses))


if __name__ == "__main__":
    checks.run(main)
