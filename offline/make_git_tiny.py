"""Make `offline/git-tiny/`: a small GIT that can see CarRacing and speak about it, but knows nothing of driving.

Reads offline/teacher.safetensors, which drives (with bursts of random actions) through the frames it learns from.
Writes offline/git-tiny/ in the Hub's file layout, with a model card and run.json. Each frame comes with several questions
about the scene ("How does the road bend?", "How fast is the car?"), answered from the simulator's state; never with actions.

    python -m offline.make_git_tiny      # some 25 minutes on two CPU cores; the shipped one: git checkout offline/git-tiny
"""

import functools
import json
import shutil
import string
import time
from pathlib import Path

import numpy as np
import torch
from gymnasium.envs.box2d.car_racing import TRACK_WIDTH
from torch.nn import functional as F
from tqdm import tqdm
from transformers import BertTokenizer, CLIPImageProcessor, GitConfig, GitForCausalLM, GitProcessor

import car_racing_env
import GitText2ActionWithPrompt as model_file
from fast import git_forward
from GitText2ActionWithPrompt import ANSWERS, PROMPT, GitText2ActionWithPrompt
from support import cards, checks, processes, run_files
from support.run_files import ROOT
from teacher import TEACHER, PrivilegedState, RandomBursts, load_teacher

SHIPPED = "offline/git-tiny"  # in git, so it may be replaced
OUTPUT_DIR = SHIPPED
SEED = 0

TRAIN_FRAMES = 48_000
VALIDATION_FRAMES = 2_000
TRAIN_TRACKS = range(50_000, 60_000)
VALIDATION_TRACKS = range(100_000, 110_000)
KEEP = 0.2  # share of decisions that become frames: neighbours look alike
BURST_START = 0.06  # stronger bursts than in the captions: the eyes should know every situation
BURST_LONGEST = 8  # decisions
STUCK_LIMIT = 60  # decisions with all wheels on grass that end an episode
NUM_WORKERS = 2

IMAGE_SIZE = 96
PATCH_SIZE = 12
WIDTH = 128
VISION_LAYERS = 4
TEXT_LAYERS = 3
HEADS = 4

EPOCHS = 3
BATCH_SIZE = 128  # frames
QUESTIONS_PER_FRAME = 4
LEARNING_RATE = 1e-3  # peak of a one-cycle schedule
WEIGHT_DECAY = 0.05
MAX_GRAD_NORM = 1.0

NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
).split()
OTHER_WORDS = "describe the weather like a poet ; please say what you see now and then answer with one word . which way to drive on"


def signed(value, step, largest=12):
    """ "left three" for about -3 * step, "middle" near zero."""
    n = min(round(abs(value) / step), largest)
    return "middle" if n == 0 else f"{'left' if value < 0 else 'right'} {NUMBERS[n]}"


def count(value, step):
    """ "three" for about 3 * step."""
    return NUMBERS[int(np.clip(round(value / step), 0, 20))]


def describe(state, track, tile):
    """Questions about the scene and their answers, from privileged state and the road around the car."""

    def turn(start, end):
        """Degrees by which the road turns to the right between two of the next tiles."""
        before, after = (track[(tile + i) % len(track), 1] for i in (start, end))
        return np.degrees(np.angle(np.exp(-1j * (after - before))))

    points = state[15:].reshape(-1, 2) * 20  # right, forward
    grass = 4 - int(state[8:12].sum())
    return {
        "Where on the road is the car?": signed(state[12] * TRACK_WIDTH, 0.75),
        "How is the car pointed?": signed(np.degrees(np.arctan2(state[13], state[14])), 4.0),
        "How fast is the car?": count(state[0] * 50, 4.0),
        "How is the car turning?": signed(-state[2] * 3, 0.2),
        "How does the car slide?": signed(state[1] * 20, 1.0),
        "How are the wheels steered?": signed(-state[3] * 0.4, 0.05),
        "How fast are the wheels?": count(state[6] * 100, 10.0),
        "Is the car on the grass?": NUMBERS[grass],
        "How does the road bend?": signed(turn(0, 4), 7.0),
        "How does the road bend next?": signed(turn(4, 8), 7.0),
        "How does the road bend far ahead?": signed(turn(8, 12), 7.0),
        "Where does the road go?": signed(points[2, 0], 0.8),
        "Where does the road go next?": signed(points[5, 0], 1.5),
        "Where does the road go far ahead?": signed(points[8, 0], 3.0),
    }


@functools.cache
def load_driver():
    """The teacher, once in each process."""
    torch.set_num_threads(1)
    return load_teacher()


def drive(track_seed, keep, burst_start, burst_longest, stuck_limit):
    """One episode: frames uint8 (n, 96, 96, 3) and a dict of answers for each."""
    teacher, rng = load_driver(), np.random.default_rng(track_seed)
    env = car_racing_env.make_env(draw=False)
    env = PrivilegedState(RandomBursts(env, track_seed, burst_start, burst_longest))
    _, info = env.reset(seed=track_seed)
    frames, answers, end, stuck = [], [], "", 0
    while not end and stuck < stuck_limit:
        action = int(teacher(torch.from_numpy(info["state"])[None]).argmax())
        _, _, terminated, truncated, info = env.step(action)
        end = car_racing_env.episode_end(terminated, truncated, info)
        stuck = 0 if info["state"][8:12].any() else stuck + 1
        if rng.random() < keep:
            frames.append(env.unwrapped.draw())
            answers.append(describe(info["state"], env.track, env.tile))
    return np.stack(frames), answers


def collect(tracks, num_frames):
    """The first `num_frames` frames of `tracks`, uint8 (N, 96, 96, 3), and a dict of answers for each."""
    frames, answers = [], []
    job = functools.partial(
        drive, keep=KEEP, burst_start=BURST_START, burst_longest=BURST_LONGEST, stuck_limit=STUCK_LIMIT
    )
    with (
        processes.workers(NUM_WORKERS) as run_jobs,
        tqdm(total=num_frames, unit="frame", mininterval=5) as bar,
    ):
        for new_frames, new_answers in run_jobs(job, tracks):
            frames.append(new_frames)
            answers.extend(new_answers)
            bar.update(len(new_answers))
            if len(answers) >= num_frames:
                break
    return np.concatenate(frames)[:num_frames], answers[:num_frames]


def make_processor(answers):
    """WordPiece over the questions' and answers' words, the task's and some others, and the whole alphabet."""
    texts = [*answers[0], *(answer for row in answers for answer in row.values())]
    texts += [*NUMBERS, PROMPT, *ANSWERS, OTHER_WORDS]
    words = sorted({word for text in texts for word in text.lower().replace("?", " ?").split()})
    letters = string.ascii_lowercase + string.digits
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.punctuation, *letters]
    vocabulary += [f"##{letter}" for letter in letters]
    vocabulary += [word for word in words if word not in vocabulary]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}, model_max_length=64)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return GitProcessor(CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False), tokenizer)


def make_model(
    tokenizer, patch_size=PATCH_SIZE, width=WIDTH, vision_layers=VISION_LAYERS, text_layers=TEXT_LAYERS, heads=HEADS
):
    """An untrained `GitForCausalLM` with the tokenizer's words."""
    # the library's default range, 0.02, leaves so narrow a model at the class prior for epochs
    both = dict(
        hidden_size=width, intermediate_size=4 * width, num_attention_heads=heads, initializer_range=width**-0.5
    )
    vision = dict(num_hidden_layers=vision_layers, image_size=IMAGE_SIZE, patch_size=patch_size, **both)
    ids = {"pad": tokenizer.pad_token_id, "bos": tokenizer.cls_token_id, "eos": tokenizer.sep_token_id}
    return GitForCausalLM(
        GitConfig(
            vision_config=vision,
            vocab_size=len(tokenizer),
            num_hidden_layers=text_layers,
            max_position_embeddings=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **both,
            **{f"{name}_token_id": number for name, number in ids.items()},
        )
    )


def tokenize(tokenizer, answers):
    """Rows `[CLS] question answer [SEP]` as int64 (frames, questions, T), and labels with -100 on all but the answer."""
    questions = list(answers[0])
    prompts = [model_file.prompt_ids(tokenizer, question) for question in questions]
    endings = {answer: None for row in answers for answer in row.values()}
    for answer in endings:
        endings[answer] = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.sep_token_id]
    length = max(map(len, prompts)) + 3
    tokens = np.full((len(answers), len(questions), length), tokenizer.pad_token_id)
    labels = np.full(tokens.shape, -100)
    for i, row in enumerate(answers):
        for j, (prompt, answer) in enumerate(zip(prompts, row.values())):
            end = len(prompt) + len(endings[answer])
            tokens[i, j, :end] = prompt + endings[answer]
            labels[i, j, len(prompt) : end] = endings[answer]
    return torch.from_numpy(tokens), torch.from_numpy(labels)


def answer_logits(model, frames, tokens):
    """Logits (B * Q, T, vocabulary) of Q texts (B, Q, T) on each of B frames, the image rows computed once."""
    questions, image_processor = tokens.shape[1], model.processor.image_processor
    weights = git_forward.collect(model.git, image_processor)  # anew at each step, so that gradients flow into them
    image = git_forward.encode_image(weights, model_file.resize(frames, image_processor))
    _, cache = git_forward.decode(weights, image)
    cache = [(key.repeat_interleave(questions, 0), value.repeat_interleave(questions, 0)) for key, value in cache]
    text = git_forward.embed(weights, tokens.flatten(0, 1))
    mask = git_forward.prefix_mask(image.shape[1], text.shape[1], image.device)[image.shape[1] :]
    return git_forward.linear(git_forward.decode(weights, text, mask, cache)[0], *weights.lm_head)


def answer_loss(logits, labels):
    """Cross-entropy per answer token of logits (B * Q, T, vocabulary) and labels (B, Q, T)."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[..., 1:].flatten(), ignore_index=-100)


def train_epoch(model, optimizer, schedule, frames, tokens, labels):
    """Each frame once, with QUESTIONS_PER_FRAME of its questions; returns the mean loss."""
    losses, steps = [], len(frames) // BATCH_SIZE
    bar = tqdm(torch.randperm(len(frames)).split(BATCH_SIZE)[:steps], mininterval=10)
    for rows in bar:
        pick = torch.rand(len(rows), tokens.shape[1]).argsort(1)[:, :QUESTIONS_PER_FRAME]
        text, label = tokens[rows[:, None], pick], labels[rows[:, None], pick]
        loss = answer_loss(answer_logits(model, frames[rows], text), label)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.git.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}")
    return float(np.mean(losses))


@torch.no_grad()
def evaluate(model, frames, tokens, labels, questions):
    """Share of wholly right answers per question, and the mean loss, on held-out tracks."""
    right, losses = [], []
    for rows in torch.arange(len(frames)).split(BATCH_SIZE):
        logits, label = answer_logits(model, frames[rows], tokens[rows]), labels[rows]
        losses.append(answer_loss(logits, label).item())
        said, label = logits[:, :-1].argmax(-1), label.flatten(0, 1)[:, 1:]
        right.append(((said == label) | (label == -100)).all(-1).view(len(rows), -1))
    shares = torch.cat(right).float().mean(0).tolist()
    return {question: round(share, 3) for question, share in zip(questions, shares)}, float(np.mean(losses))


def save(model, run, loss, validation_loss, accuracy):
    """Write OUTPUT_DIR: weights, processor, card and run.json."""
    output = ROOT / OUTPUT_DIR
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.git.save_pretrained(partial)
    model.processor.save_pretrained(partial)
    facts = {
        "parameters": sum(p.numel() for p in model.git.parameters()),
        "words": len(model.processor.tokenizer),
        "shape": f"{IMAGE_SIZE} x {IMAGE_SIZE} pixels, patches of {PATCH_SIZE}, width {WIDTH}, {VISION_LAYERS} vision and "
        f"{TEXT_LAYERS} text layers, a WordPiece vocabulary of its own",
        "made": f"seed {SEED}, {TRAIN_FRAMES:,} frames of tracks from {TRAIN_TRACKS[0]:,}, {EPOCHS} epochs, "
        f"{QUESTIONS_PER_FRAME} questions per frame",
        "loss": loss,
        "validation_loss": validation_loss,
    }
    (partial / "README.md").write_text(cards.base_card(facts, accuracy))
    run_files.write_run(partial, run)
    run_files.replace_folder(partial, output)


def main():
    began = time.time()
    torch.manual_seed(SEED)
    if OUTPUT_DIR != SHIPPED:
        run_files.check_own(ROOT / OUTPUT_DIR, Path(__file__).name)
    run = run_files.describe_run(
        globals(), vars(model_file), vars(car_racing_env), teacher_hash=run_files.file_hash(ROOT / TEACHER)
    )
    print(
        f"{TRAIN_FRAMES:,} frames, {EPOCHS} epochs, some 25 minutes on two CPU cores with the default constants; replaces "
        f"{OUTPUT_DIR}/ at the end (the shipped one comes back with: git checkout {SHIPPED})"
    )
    frames, answers = collect(TRAIN_TRACKS, TRAIN_FRAMES)
    validation_frames, validation_answers = collect(VALIDATION_TRACKS, VALIDATION_FRAMES)
    processor = make_processor(answers)
    train = torch.from_numpy(frames), *tokenize(processor.tokenizer, answers)
    validation = torch.from_numpy(validation_frames), *tokenize(processor.tokenizer, validation_answers)
    model = GitText2ActionWithPrompt(make_model(processor.tokenizer), processor)
    print(f"{sum(p.numel() for p in model.git.parameters()):,} parameters, {len(processor.tokenizer)} words")
    optimizer = torch.optim.AdamW(model.git.parameters(), weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * (len(frames) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=0.1)
    for epoch in range(1, EPOCHS + 1):
        loss = train_epoch(model, optimizer, schedule, *train)
        accuracy, validation_loss = evaluate(model, *validation, list(answers[0]))
        print(f"epoch {epoch} loss {loss:.4f} validation {validation_loss:.4f} {json.dumps(accuracy)}", flush=True)
    save(model, run, loss, validation_loss, accuracy)
    print(
        f"wrote {OUTPUT_DIR}/ in {time.time() - began:.0f} s; next: python collect_captions.py, then "
        "python train_git_lora_carllava_style.py"
    )


if __name__ == "__main__":
    checks.run(main)
