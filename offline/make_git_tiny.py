"""Make `offline/git-tiny/`: a small GIT that can see CarRacing and speak about it, but knows nothing of driving.

Reads offline/teacher.safetensors, which drives, under changing targets and thrown about, through the frames it learns
from. Writes offline/git-tiny/ in the Hub's file layout, with a model card and run.json. Each frame comes with several
questions about the scene (questions.py), answered in sentences from the simulator's state; never with actions. Beside
them it learns to say in the simplest words what somebody wants, by the taught sentences of phrasings.py, and whether
that is how the car drives: a model that has read a book knows that left is not right. What to do about it, it does not
know.

    python -m offline.make_git_tiny      # 12 to 40 minutes on two CPU cores, 3 on a GPU and 16 cores

The shipped one comes back with: git checkout offline/git-tiny
"""

import contextlib
import functools
import re
import shutil
import string
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import BertTokenizer, CLIPImageProcessor, GitConfig, GitForCausalLM, GitProcessor

import car_racing_env
import GitText2ActionWithPrompt as model_file
import instructions
import perturbations
import questions
import targets
import teacher as teacher_file
from fast import git_forward
from GitText2ActionWithPrompt import ANSWERS, PROMPT, GitText2ActionWithPrompt
from instructions import draw_target
from perturbations import RandomBursts, Throws
from questions import OFFSET_PACE, SPEED_STEP, describe
from road import read_state
from support import cards, checks, processes, run_files
from support.run_files import ROOT
from targets import Target
from teacher import TEACHER, PrivilegedState, load_teacher

OUTPUT_DIR = "offline/git-tiny"
STATE = ROOT / "offline" / "git_tiny_state.pt"  # not in git: from which an interrupted run goes on
RESUME = False
SEED = 0

TRAIN_FRAMES = 48_000
VALIDATION_FRAMES = 2_000
TRAIN_TRACKS = range(50_000, 60_000)
VALIDATION_TRACKS = range(100_000, 110_000)
KEEP = 0.2  # share of decisions that become frames: neighbours look alike
BURST_START = 0.06  # stronger bursts than in the captions: the eyes should know every situation
BURST_LONGEST = 8  # decisions
THROWN = 0.012  # chance per decision, and at the start, that the car is thrown about
SPED_UP = 0.3  # share of the throws that only make it fast; if few turn it, it does not see that it drives backwards
TOLD_SHARE = 0.5  # of the time it drives under a target
CHANGE = 0.01  # chance per decision that the target changes
STUCK_LIMIT = 60  # decisions with all wheels on grass that end an episode
FIT_QUESTION = "Is it as I want it?"  # asked after an instruction; words and picture answer it
FIT_SPEED, FIT_SIDE = 2.6, 1.2  # units per second and units beside what is wanted that are no complaint
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
# for each frame of the last epoch; from the start and with all the weight they kept it from learning to read the speed
# (LOG.md)
WISHES = 1  # instructions after which it is asked what is wanted
FITS = 2  # instructions after which it is asked whether the car drives so
WISH_WEIGHT = 0.5  # of the loss of either beside that of the scene
VARIED = 0.5  # share of these that are said as somebody else might say them
LEARNING_RATE = 1e-3  # peak of a one-cycle schedule
WEIGHT_DECAY = 0.05
MAX_GRAD_NORM = 1.0
SAVE_EVERY = 100  # steps


@functools.cache
def load_driver():
    """The teacher, once in each process."""
    torch.set_num_threads(1)
    return load_teacher()


def drive(track_seed):
    """One episode: a list of frames uint8 (96, 96, 3), a dict of answers for each, and its speed and offset."""
    teacher, rng = load_driver(), np.random.default_rng([track_seed, 4])
    env = Throws(car_racing_env.make_env(draw=False), THROWN, THROWN, SPED_UP)
    env = car_racing_env.Instructed(env, functools.partial(draw_target, share=TOLD_SHARE), CHANGE)
    with contextlib.closing(PrivilegedState(RandomBursts(env, track_seed, BURST_START, BURST_LONGEST))) as env:
        _, info = env.reset(seed=track_seed)
        frames, answers, motion, end, stuck = [], [], [], "", 0
        while not end and stuck < STUCK_LIMIT:
            target = env.get_wrapper_attr("told").target
            _, _, terminated, truncated, info = env.step(teacher.act(info["state"][None], target)[0])
            end = car_racing_env.episode_end(terminated, truncated, info)
            car = read_state(info["state"])
            stuck = 0 if car.wheels_on_road.any() else stuck + 1
            if rng.random() < KEEP:
                frames.append(env.unwrapped.draw())
                answers.append(describe(car, env.get_wrapper_attr("road")))
                motion.append((car.forward, car.offset))
    return frames, answers, motion


def collect(tracks, num_frames):
    """The first frames of `tracks`, uint8 (N, 96, 96, 3), a dict of answers for each, its speed and offset."""
    frames, answers, motion = [], [], []
    with processes.workers(NUM_WORKERS) as run_jobs, tqdm(total=num_frames, unit="frame", mininterval=5) as bar:
        for new_frames, new_answers, new_motion in run_jobs(drive, tracks):
            frames.extend(new_frames)
            answers.extend(new_answers)
            motion.extend(new_motion)
            bar.update(len(new_answers))
            if len(answers) >= num_frames:
                break
        else:
            raise checks.BadInput(f"{tracks} gave {len(answers)} frames: raise KEEP, name more tracks or ask for fewer")
    return np.stack(frames[:num_frames]), answers[:num_frames], motion[:num_frames]


def words_of(texts):
    """The words and punctuation marks of some texts, as the tokenizer will see them."""
    return {word for text in texts for word in re.findall(r"\w+|[^\w\s]", text.lower())}


def fit(target, speed, offset):
    """The answer to FIT_QUESTION under a target; `speed` and `offset` count in the steps of questions.py."""
    said = []
    offset = OFFSET_PACE * round(offset / OFFSET_PACE)
    speed = max(SPEED_STEP * round(speed / SPEED_STEP), 0)
    if target.side is not None and abs(offset - target.side) > FIT_SIDE:
        said.append(f"The car is too far {'right' if offset > target.side else 'left'}.")
    if target.speed is not None and abs(speed - target.speed) > FIT_SPEED:
        said.append(f"The car is too {'fast' if speed > target.speed else 'slow'}.")
    return " ".join(said) or "Yes."


def make_processor(answers=()):
    """WordPiece over the words of questions, answers, instructions and task, and the whole alphabet.

    `answers` are dicts of answers as `describe` returns them: what else they contain.
    """
    texts = [wording for wordings in questions.QUESTIONS.values() for wording in wordings]
    texts += {answer for row in answers for answer in row.values()}
    texts += [questions.number(n) for n in range(101)]
    texts += sorted(instructions.taught_sentences() | instructions.held_out_sentences()) + [PROMPT, *ANSWERS]
    texts += [instructions.WISH_QUESTION, instructions.wish("garbled"), FIT_QUESTION]
    texts += [fit(Target(30.0, 0.0), speed, side) for speed, side in ((0, -9), (99, 9), (30, 0))]
    letters = string.ascii_lowercase + string.digits
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.punctuation, *letters]
    vocabulary += [f"##{letter}" for letter in letters]
    vocabulary += sorted(words_of(texts) - set(vocabulary))
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


class Texts:
    """The rows `[CLS] question answer [SEP]` of frames and questions; answers are numbers of a table."""

    def __init__(self, tokenizer, answers):
        self.pad, self.about = tokenizer.pad_token_id, list(answers[0])
        table = {answer: None for row in answers for answer in row.values()}
        numbers = {answer: i for i, answer in enumerate(table)}
        self.endings = [model_file.ending_ids(tokenizer, answer) for answer in table]
        self.prompts = [
            [model_file.prompt_ids(tokenizer, "", wording) for wording in questions.QUESTIONS[key]]
            for key in self.about
        ]
        self.counts = torch.tensor([*map(len, self.prompts)])
        self.answers = np.array([[numbers[row[key]] for key in self.about] for row in answers])

    def draw_wordings(self, asked):
        """A random wording, by its index, for each of the questions `asked`, int64 (B, Q)."""
        return (torch.rand(asked.shape) * self.counts[asked]).long()

    def __call__(self, frames, asked, wordings):
        """Token ids and labels int64 (B, Q, T): of `frames` (B,) the questions `asked` (B, Q) in `wordings` (B, Q).

        Labels are -100 on all but the answer.
        """
        rows = [
            (self.prompts[q][w], self.endings[self.answers[frame, q]])
            for frame, qs, ws in zip(frames.tolist(), asked.tolist(), wordings.tolist())
            for q, w in zip(qs, ws)
        ]
        return [x.view(*asked.shape, -1) for x in git_forward.pad_texts(rows, self.pad)]


def told_texts(tokenizer, question, told, answers):
    """Token ids and labels int64 (N, T) of a question after each of N instructions (`instructions.draw`)."""
    prompts = [model_file.prompt_ids(tokenizer, x.sentence, question) for x in told]
    endings = [model_file.ending_ids(tokenizer, text) for text in answers]
    return git_forward.pad_texts([*zip(prompts, endings, strict=True)], tokenizer.pad_token_id)


def wishes(tokenizer, told):
    """Token ids and labels int64 (N, T): what is wanted by each of N instructions."""
    return told_texts(tokenizer, instructions.WISH_QUESTION, told, [instructions.wish(x.name) for x in told])


def fits(tokenizer, told, motion):
    """Token ids and labels int64 (N, T): whether speed and offset, `motion` (N, 2), are as instructed."""
    answers = [fit(x.target, *moves) for x, moves in zip(told, motion, strict=True)]
    return told_texts(tokenizer, FIT_QUESTION, told, answers)


def read(model, frames, tokens):
    """Logits (B, Q, T, vocabulary) of texts (B, Q, T) on frames uint8 (B, 96, 96, 3), with gradients."""
    weights = git_forward.collect(model.git, model.processor.image_processor)
    return git_forward.read_texts(weights, model.pixels(frames), tokens.to(model.device))


def batches(num_frames, first_step):
    """Steps from `first_step` on, each with its frames, int64 (BATCH_SIZE,); every epoch is shuffled anew."""
    per_epoch = num_frames // BATCH_SIZE
    for step in range(first_step, EPOCHS * per_epoch):
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(num_frames, generator=torch.Generator().manual_seed(1000 * SEED + epoch))
        yield step, order[place * BATCH_SIZE : (place + 1) * BATCH_SIZE]


def train_step(model, optimizer, schedule, frames, texts, motion, rows, told):
    """One step on the frames `rows`; returns the loss.

    With QUESTIONS_PER_FRAME of the questions of each in any wording. After the instructions `told`, if there are any,
    it is asked WISHES times for each frame what is wanted, FITS times whether the car drives so.
    """
    asked = torch.rand(len(rows), len(texts.about)).argsort(1)[:, :QUESTIONS_PER_FRAME]
    parts, counts = [texts(rows, asked, texts.draw_wordings(asked))], [QUESTIONS_PER_FRAME]
    if told:
        tokenizer, wished, moves = model.processor.tokenizer, WISHES * len(rows), motion[rows].repeat(FITS, 0)
        if WISHES:
            parts.append(wishes(tokenizer, told[:wished])), counts.append(WISHES)
        if FITS:
            parts.append(fits(tokenizer, told[wished:], moves)), counts.append(FITS)
    longest = max(tokens.shape[-1] for tokens, _ in parts)

    def padded(x, value):
        return F.pad(x, (0, longest - x.shape[-1]), value=value).view(len(rows), -1, longest)

    tokens = torch.cat([padded(x, texts.pad) for x, _ in parts], 1)
    labels = torch.cat([padded(x, -100) for _, x in parts], 1)
    with git_forward.mixed_precision(model.device):
        logits = read(model, frames[rows], tokens)  # the frames are seen once, whatever is asked
    loss, *others = map(git_forward.text_loss, logits.split(counts, 1), labels.split(counts, 1))
    for other in others:
        loss = loss + WISH_WEIGHT * other
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.git.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    schedule.step()
    return loss.item()


@torch.no_grad()
def evaluate(model, frames, texts, motion):
    """Shares of wholly right answers, by question and to WISH_QUESTION and FIT_QUESTION; and the mean loss."""
    right, losses = [], []
    for rows in torch.arange(len(frames)).split(BATCH_SIZE):
        asked = torch.arange(len(texts.about)).expand(len(rows), -1)
        tokens, labels = texts(rows, asked, texts.draw_wordings(asked))
        logits = read(model, frames[rows], tokens)
        losses.append(git_forward.text_loss(logits, labels).item())
        right.append(git_forward.exactly_right(logits, labels))
    shares = dict(zip(texts.about, torch.cat(right).float().mean(0).tolist()))
    for split, phrasings in (("taught", "taught phrasings"), ("held_out", "phrasings never taught")):
        rng, moves = np.random.default_rng(0), motion[:BATCH_SIZE].repeat(QUESTIONS_PER_FRAME, 0)
        told, tokenizer = [instructions.draw(rng, split) for _ in moves], model.processor.tokenizer
        for name, said in (("wish", wishes(tokenizer, told)), ("fit", fits(tokenizer, told, moves))):
            tokens, labels = (x.unflatten(0, (-1, QUESTIONS_PER_FRAME)) for x in said)
            right = git_forward.exactly_right(read(model, frames[: len(tokens)], tokens), labels)
            shares[f"{name}, {phrasings}"] = right.float().mean().item()
    return {key: round(share, 3) for key, share in shares.items()}, float(np.mean(losses))


def save(model, output, run, loss, validation_loss, accuracy):
    """Write the folder `output`: weights, processor, card and run.json."""
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.git.save_pretrained(partial)
    model.processor.save_pretrained(partial)
    facts = {
        "parameters": sum(p.numel() for p in model.git.parameters()),
        "words": len(model.processor.tokenizer),
        "shape": f"{IMAGE_SIZE} x {IMAGE_SIZE} pixels, patches of {PATCH_SIZE}, width {WIDTH}, {VISION_LAYERS} vision "
        f"and {TEXT_LAYERS} text layers, a WordPiece vocabulary of its own",
        "made": f"seed {SEED}, {TRAIN_FRAMES:,} frames of tracks from {TRAIN_TRACKS[0]:,}, {EPOCHS} epochs, "
        f"{QUESTIONS_PER_FRAME} questions per frame, {WISHES} wishes and {FITS} comparisons with them for each of "
        "the last epoch's",
        "loss": loss,
        "validation_loss": validation_loss,
    }
    (partial / "README.md").write_text(cards.base_card(facts, accuracy))
    run_files.write_run(partial, run)
    run_files.replace_folder(partial, output)


def main():
    began = time.time()
    torch.manual_seed(SEED)
    instructions.check_phrasings()
    output = run_files.check_own(ROOT / OUTPUT_DIR, Path(__file__).name)
    run = run_files.describe_run(
        globals(), *map(vars, (model_file, car_racing_env, perturbations, targets, teacher_file)),
        teacher_hash=run_files.file_hash(ROOT / TEACHER), instructions=instructions.digest(),
        questions=questions.digest(), bfloat16=git_forward.multiplies_bfloat16(model_file.device()),
    )  # fmt: skip
    if RESUME:
        state = run_files.load_state(STATE)
        run = run_files.continue_from(STATE, state["run"], run, {"RESUME"})
    print(
        f"{TRAIN_FRAMES:,} frames, {EPOCHS} epochs, 12 to 40 minutes on two CPU cores with the default constants; "
        f"replaces {OUTPUT_DIR}/ at the end (the shipped one comes back with: git checkout offline/git-tiny)"
    )
    frames, answers, motion = collect(TRAIN_TRACKS, TRAIN_FRAMES)
    validation_frames, validation_answers, validation_motion = collect(VALIDATION_TRACKS, VALIDATION_FRAMES)
    processor = make_processor(answers)
    words = run_files.facts_hash(sorted(processor.tokenizer.get_vocab().items()))
    train = torch.from_numpy(frames), Texts(processor.tokenizer, answers), np.array(motion)
    validation_texts = Texts(processor.tokenizer, validation_answers)
    validation = torch.from_numpy(validation_frames), validation_texts, np.array(validation_motion)
    model = GitText2ActionWithPrompt(make_model(processor.tokenizer).to(model_file.device()), processor)
    print(f"{sum(p.numel() for p in model.git.parameters()):,} parameters, {len(processor.tokenizer)} words")
    optimizer = torch.optim.AdamW(model.git.parameters(), weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * (len(frames) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=0.1)
    parts, first = {"git": model.git, "optimizer": optimizer, "schedule": schedule}, 0
    losses, scores = [], {}
    if RESUME:
        checks.check_same(STATE, state, {"words": words}, "put them back, or set RESUME to False")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        first, losses, scores = state["step"], state["losses"], state["scores"]
        torch.set_rng_state(state["rng"])
    for step, rows in (bar := tqdm(batches(len(frames), first), initial=first, total=steps, mininterval=10)):
        rng, last_epoch = np.random.default_rng([SEED, step]), step >= steps - steps // EPOCHS
        count = BATCH_SIZE * (WISHES + FITS) if last_epoch else 0
        told = [instructions.draw(rng, varied_share=VARIED) for _ in range(count)]
        losses.append(train_step(model, optimizer, schedule, *train, rows, told))
        bar.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}")
        if (step + 1) % (steps // EPOCHS) == 0:
            accuracy, validation_loss = evaluate(model, *validation)
            loss = float(np.mean(losses[-(steps // EPOCHS) :]))
            scores = {"loss": loss, "validation_loss": validation_loss, "accuracy": accuracy}
            tqdm.write(f"epoch {(step + 1) * EPOCHS // steps}: {scores}")
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"step": step + 1, "losses": losses, "scores": scores, "rng": torch.get_rng_state()}
            state |= {"words": words, "run": run_files.until_now(run)}
            run_files.save_state(STATE, state)
    save(model, output, run, **scores)
    STATE.unlink(missing_ok=True)
    print(
        f"wrote {OUTPUT_DIR}/ in {time.time() - began:.0f} s; next: python collect_captions.py, then "
        "python train_git_lora_carllava_style.py"
    )


if __name__ == "__main__":
    checks.run(main)
