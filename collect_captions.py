"""Stage 1: a trained policy drives, and each frame it sees becomes an image with answers in words.

Reads offline/teacher.safetensors and, if POLICY names one, an adapter or a PPO policy. Writes CarRacing-Data/, an
imagefolder dataset: train/ and validation/ (other tracks), each with metadata.jsonl; a dataset card, a contact sheet,
task.json and run.json.

    python collect_captions.py      # 2 to 6 minutes on two CPU cores: 47,000 frames

The driver is told other things while it drives, does random things now and then, and is thrown about. Whatever it
really does, each frame is labelled with what the teacher would do plainly ("text"), under what it is told and under
several other instructions ("told": dreamed labels, so that no shortcut past the words exists), and with some questions
about the scene ("asked").

Then: python train_git_lora_carllava_style.py
"""

import contextlib
import functools
import json
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import car_racing_env
import GitText2ActionWithPrompt as model_file
import instructions
import perturbations
import questions
import targets
import teacher as teacher_file
from car_racing_env import FRAME_SKIP, TRAIN_TRACKS, VALIDATION
from GitText2ActionWithPrompt import ANSWERS, PROMPT, GitText2ActionWithPrompt, answer_of, to_simulator
from perturbations import RandomBursts, Throws
from road import read_state
from support import cards, checks, plots, processes, run_files
from support.checkpoints import TASK_FILE
from support.run_files import ROOT
from targets import RACE, STANDING
from teacher import TEACHER, PrivilegedState, load_teacher

# who drives: "teacher", or the folder of a PPO policy such as "results/policy", or of an adapter, whose most probable
# answer drives
POLICY = "teacher"
ANSWER_BY = "teacher"  # who answers: "teacher" (with another one driving: DAgger), or "policy", the driver itself
OUTPUT_DIR = "CarRacing-Data"

TRAIN_FRAMES = 45_000
VALIDATION_FRAMES = 2_000
VALIDATION_TRACKS = VALIDATION
KEEP = 0.25  # share of decisions that are written: neighbours look alike, and only what is written is drawn
BURST_START = 0.025  # chance per decision that random actions take over, so that recoveries are in the data
BURST_LONGEST = 7  # decisions
THROWN = 0.009  # chance per decision, and at the start, that the car is thrown about, so that coming back is seen
SPED_UP = 0.3  # share of the throws that only make it fast; the others turn it
TOLD_SHARE = 0.45  # of the time the driver follows an instruction
CHANGE = 0.008  # chance per decision that it is told something else; three times as often while it is told to stop
DREAMED = 4  # instructions under which each frame is labelled, whoever drives (action dreaming, arXiv 2503.09594)
VARIED = 0.5  # share of these in the training split that are said as somebody else might say them
ASKED = 2  # questions about the scene that each frame carries
STUCK_LIMIT = 150  # frames below walking pace, though not told to stand, after which an episode is dropped
NUM_WORKERS = 2  # processes


@functools.cache
def load_drivers(policy):
    """The teacher, and the model that drives instead of it or None; once in each process."""
    torch.set_num_threads(1)
    if policy == "teacher":
        return load_teacher(), None
    if (ROOT / policy / TASK_FILE).exists():  # an adapter: its answers drive, whatever LANGUAGE_PRIOR is for PPO
        return load_teacher(), GitText2ActionWithPrompt.from_pretrained(policy, language_prior=1.0)
    return load_teacher(), GitText2ActionWithPrompt.from_policy(policy)


def answer_for(action, car):
    """The answer that says the simulator's `action`; `car`, the `State` in which it is taken, is for finer answers."""
    return answer_of(action)


def make_collecting_env(track_seed):
    """The plain task without pictures, in which the driver is told things, does random ones, and is thrown about."""
    env = Throws(car_racing_env.make_env(draw=False), THROWN, THROWN, SPED_UP)
    env = car_racing_env.Instructed(env, functools.partial(instructions.draw, share=TOLD_SHARE), CHANGE)
    return PrivilegedState(RandomBursts(env, track_seed, BURST_START, BURST_LONGEST))


def dream(driving, split, rng):
    """DREAMED things that the driver of a frame could have been told: a list of `instructions.Told`.

    The first is what it was told, `driving`, if anything: where an instruction leads, the answers under it are needed.
    """
    told = []
    varied = VARIED if split == "taught" else 0.0
    for i in range(DREAMED):
        phrasings = "held_out" if split == "both" and i % 2 else "taught"
        if i == 0 and driving.name:
            told.append(instructions.say(driving.name, rng, phrasings, varied))
        else:
            told.append(instructions.draw(rng, phrasings, varied_share=varied))
    return told


def decide(model, frame, sentences):
    """What the model does in a frame when told each of some sentences: the simulator's actions."""
    logits, _ = model(np.stack([frame] * len(sentences)), sentences)
    return to_simulator(logits.argmax(1))


@torch.no_grad()
def collect_episode(track_seed, split="taught", policy=POLICY, answer_by=ANSWER_BY):
    """Drive one track; returns the frames kept and their metadata rows, nothing if the car got stuck.

    `split` says which phrasings are used: "taught", some of them varied, or "both" in turn, as they are. Everything
    random comes from the track seed, so the dataset does not depend on the number of workers.
    """
    teacher, model = load_drivers(policy)
    rng = np.random.default_rng([track_seed, 4])
    with contextlib.closing(make_collecting_env(track_seed)) as env:
        base = env.unwrapped
        _, info = env.reset(seed=track_seed)
        frames, rows, slow, end = [], [], 0, ""
        while not end:
            driving = env.get_wrapper_attr("told")
            kept = rng.random() < KEEP
            frame = base.draw() if kept or model else None
            told = dream(driving, split, rng) if kept else []
            state, car = info["state"], read_state(info["state"])
            plain, action, *dreamed = teacher.act(state[None], [RACE, driving.target, *(x.target for x in told)])
            if model:
                action = decide(model, frame, [driving.sentence])[0]
                if kept and answer_by == "policy":
                    plain, *dreamed = decide(model, frame, ["", *(x.sentence for x in told)])
            if kept:
                number = car_racing_env.frame_number(env)
                row = {"file_name": f"{track_seed:06d}_{number:04d}.png", "text": answer_for(plain, car)}
                row |= {"prompt": PROMPT, "action": int(plain), "track_seed": track_seed, "frame": number}
                row["told"] = [
                    {"instruction": x.name, "split": x.split, "sentence": x.sentence, "text": answer_for(dreamt, car)}
                    for x, dreamt in zip(told, dreamed)
                ]
                row["asked"] = questions.draw(rng, questions.describe(car, env.get_wrapper_attr("road")), ASKED)
                rows.append(row)
                frames.append(frame)
            _, _, terminated, truncated, info = env.step(int(action))
            end = car_racing_env.episode_end(terminated, truncated, info)
            moving = base.car.hull.linearVelocity.length > STANDING or base.t < 1 or driving.target.speed == 0
            slow = 0 if moving else slow + FRAME_SKIP
            if slow >= STUCK_LIMIT:
                return [], []
    return frames, rows


def collect_split(run_jobs, folder, tracks, num_frames):
    """Fill a split's folder with frames and metadata.jsonl; returns the rows and how many episodes got stuck."""
    folder.mkdir(parents=True)
    rows = []
    stuck = 0
    split = "both" if folder.name == "validation" else "taught"
    collect = functools.partial(collect_episode, split=split, policy=POLICY, answer_by=ANSWER_BY)
    with tqdm(total=num_frames, desc=folder.name, unit="frame", mininterval=1) as bar:
        for frames, new_rows in run_jobs(collect, tracks):
            stuck += not frames
            for frame, row in list(zip(frames, new_rows))[: num_frames - len(rows)]:
                Image.fromarray(frame).save(folder / row["file_name"])
                rows.append(row)
            bar.update(len(rows) - bar.n)
            bar.set_postfix(stuck=stuck)
            if len(rows) == num_frames:
                break
        else:
            raise checks.BadInput(
                f"{len(tracks)} tracks gave {len(rows)} frames for {folder.name}/: raise KEEP or ask for fewer"
            )
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows, stuck


def contact_sheet(rows, folder, path):
    """A picture of evenly spread frames of every answer, each with its answer written below."""
    columns = 8
    lines = [[row for row in rows if row["text"] == answer] for answer in ANSWERS]
    chosen = [row for line in lines if line for row in plots.spread(line, columns)]
    frames = [np.asarray(Image.open(folder / row["file_name"])) for row in chosen]
    captions = [f"{row['text']}  (track {row['track_seed']}, frame {row['frame']})" for row in chosen]
    plots.draw_sheet(frames, captions, path, columns)


def table(counts):
    """Counts per answer and split, as a Markdown table."""
    lines = ["| answer | train | validation |", "|---|---|---|"]
    for answer in ANSWERS:
        shares = (f"{c[answer]:,} ({c[answer] / c.total():.1%})" for c in (counts["train"], counts["validation"]))
        lines.append(f"| {answer} | {' | '.join(shares)} |")
    return "\n".join(lines)


def main():
    began = time.time()
    if ANSWER_BY not in ("teacher", "policy"):
        raise checks.BadInput(f"ANSWER_BY = {ANSWER_BY!r} in collect_captions.py: use 'teacher' or 'policy'")
    if min(VALIDATION_TRACKS) < TRAIN_TRACKS:
        raise checks.BadInput(
            f"VALIDATION_TRACKS = {VALIDATION_TRACKS} in collect_captions.py: validation tracks start at {TRAIN_TRACKS}"
        )
    instructions.check_phrasings()
    output = run_files.check_own(ROOT / OUTPUT_DIR, Path(__file__).name)
    load_drivers(POLICY)  # what is missing fails here, not in a worker
    facts = {"teacher_hash": run_files.file_hash(ROOT / TEACHER)}
    facts |= {"instructions": instructions.digest(), "questions": questions.digest()}
    weights = sorted((ROOT / POLICY).glob("*.safetensors"))  # none where the teacher drives
    facts |= {f"driver_{path.stem}_hash": run_files.file_hash(path) for path in weights}
    modules = (model_file, car_racing_env, perturbations, targets, teacher_file)
    run = run_files.describe_run(globals(), *map(vars, modules), **facts)
    print(
        f"{POLICY} drives, {ANSWER_BY} answers: {TRAIN_FRAMES:,} + {VALIDATION_FRAMES:,} frames to {OUTPUT_DIR}/, 2 to "
        "6 minutes for 47,000 of the teacher's on two CPU cores; the shipped sample: git checkout CarRacing-Data"
    )
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with processes.workers(NUM_WORKERS) as run_jobs:
        splits = {  # validation first: it is short, and a mistake shows early
            "validation": collect_split(run_jobs, partial / "validation", VALIDATION_TRACKS, VALIDATION_FRAMES),
            "train": collect_split(run_jobs, partial / "train", range(TRAIN_TRACKS), TRAIN_FRAMES),
        }
    counts = {split: Counter(row["text"] for row in rows) for split, (rows, _) in splits.items()}
    contact_sheet(splits["train"][0], partial / "train", partial / "contact_sheet.png")
    facts = {
        "prompt": PROMPT, "driver": POLICY, "answer_by": ANSWER_BY, "frame_skip": FRAME_SKIP, "folder": OUTPUT_DIR,
        "burst_start": BURST_START, "burst_longest": BURST_LONGEST, "dreamed": DREAMED, "asked": ASKED,
    }  # fmt: skip
    stuck = {split: stuck for split, (_, stuck) in splits.items()}
    (partial / "README.md").write_text(cards.dataset_card(facts, counts, stuck, table(counts)))
    run_files.write_json(partial / TASK_FILE, model_file.task())
    run_files.write_run(partial, run)
    run_files.replace_folder(partial, output)
    print(f"{table(counts)}\nwrote {OUTPUT_DIR}/ in {time.time() - began:.0f} s")
    print(f'next: python train_git_lora_carllava_style.py, with DATA_DIR = "{OUTPUT_DIR}"')


if __name__ == "__main__":
    checks.run(main)
