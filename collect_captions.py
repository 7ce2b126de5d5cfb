"""Stage 1: a trained policy drives, and each frame it sees becomes an image with an answer in words.

Reads offline/teacher.safetensors (or a PPO policy of stage 3). Writes CarRacing-Data/, an imagefolder dataset: train/ and
validation/ (other tracks), each with metadata.jsonl; a dataset card, a contact sheet and run.json.

    python collect_captions.py      # 1 minute on two CPU cores

Then: python train_git_lora_carllava_style.py
"""

import contextlib
import itertools
import json
import multiprocessing
import shutil
import signal
import sys
import time
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.box2d import car_racing as stock
from PIL import Image, ImageDraw
from torch import nn
from tqdm import tqdm

import car_racing_env
import checks
import GitText2ActionWithPrompt as model_file
import run_files
from run_files import ROOT

TEACHER = "offline/teacher.safetensors"
TILES_AHEAD = 12  # track points the teacher sees; the camera shows about 10

POLICY = "teacher"  # who drives: "teacher", or a PPO policy's folder such as "results/policy"
ANSWER_BY = "teacher"  # who answers: "teacher" (with a PPO policy driving: DAgger), or "policy", the driver itself
OUTPUT_DIR = "CarRacing-Data"

TRAIN_FRAMES = 40_000
VALIDATION_FRAMES = 2_000
FIRST_TRACK = 0  # training tracks: seeds from here up, below 100,000
FIRST_VALIDATION_TRACK = 100_000  # validation tracks: seeds from here up, to 100,099
KEEP = 0.25  # share of decisions that are written: neighbours look alike, and only what is written is drawn
BURST_START = 0.04  # chance per decision that random actions take over, so that recoveries are in the data
BURST_LONGEST = 7  # decisions
STUCK_LIMIT = 100  # frames below walking pace after which an episode counts as stuck and is dropped
NUM_WORKERS = 2  # processes


class PrivilegedState(gym.Wrapper):
    """Add `info["state"]`: what the simulator knows, float32 (15 + 2 * tiles_ahead,), roughly in [-1, 1].

    Car: forward and sideways speed, yaw rate, steering angle, four wheel speeds, four wheels on the road, offset from
    the middle of the road, sine and cosine of the heading against the road; then the next `tiles_ahead` points of the
    road in the car's frame. Neither time nor progress: nothing that the camera cannot show.
    """

    def __init__(self, env, tiles_ahead):
        super().__init__(env)
        self.tiles_ahead = tiles_ahead

    def reset(self, *, seed=None, options=None):
        obs, info = self.env.reset(seed=seed, options=options)
        self.track = np.array(self.unwrapped.track)  # (N, 4): alpha, heading, x, y
        self.tile = None  # the nearest one, followed along the road: tracks can pass close to themselves
        return obs, info | {"state": self.state()}

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated, truncated, info | {"state": self.state()}

    def state(self):
        """The privileged state of this moment."""
        car = self.unwrapped.car
        hull = car.hull
        sin, cos = np.sin(hull.angle), np.cos(hull.angle)
        to_car = np.array([[cos, -sin], [sin, cos]])  # columns: the car's right and forward
        position = np.array(hull.position)
        near = np.arange(len(self.track)) if self.tile is None else np.arange(self.tile - 8, self.tile + 17)
        near %= len(self.track)
        self.tile = int(near[np.square(self.track[near, 2:] - position).sum(1).argmin()])
        _, heading, x, y = self.track[self.tile]
        ahead = (self.tile + 1 + np.arange(self.tiles_ahead)) % len(self.track)
        offset = (position[0] - x) * np.cos(heading) + (position[1] - y) * np.sin(heading)
        right, forward = np.array(hull.linearVelocity) @ to_car
        return np.array(
            [
                forward / 50,
                right / 20,
                hull.angularVelocity / 3,
                car.wheels[0].joint.angle / 0.4,
                *(wheel.omega / 100 for wheel in car.wheels),
                *(bool(wheel.tiles) for wheel in car.wheels),
                offset / stock.TRACK_WIDTH,
                np.sin(heading - hull.angle),
                np.cos(heading - hull.angle),
                *((self.track[ahead, 2:] - position) @ to_car / 20).ravel(),
            ],
            dtype=np.float32,
        )


class RandomBursts(gym.Wrapper):
    """Now and then take over for 1 to `longest` decisions of random actions, so that recoveries are seen.

    Each decision starts a burst with probability `start`. `info["action"]` is the action that was really taken.
    """

    def __init__(self, env, seed, start, longest):
        super().__init__(env)
        self.rng, self.start, self.longest, self.left = np.random.default_rng(seed), start, longest, 0

    def reset(self, *, seed=None, options=None):
        self.left = 0
        return self.env.reset(seed=seed, options=options)

    def step(self, action):
        if not self.left and self.rng.random() < self.start:
            self.left = int(self.rng.integers(1, self.longest + 1))
            self.burst = int(self.rng.integers(5))
        if self.left:
            self.left -= 1
            action = self.burst
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated, truncated, info | {"action": action}


class Teacher(nn.Module):
    """The trained policy: an MLP from privileged state (B, S) to logits over the simulator's five actions (B, 5)."""

    def __init__(self, state_size, hidden_size=128):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(state_size, hidden_size), nn.Tanh(), nn.Linear(hidden_size, hidden_size), nn.Tanh(),
            nn.Linear(hidden_size, 5),
        )  # fmt: skip

    def forward(self, state):
        return self.net(state)


def load_teacher(path=None):
    """The teacher from its safetensors file, ready to act."""
    path = ROOT / (path or TEACHER)
    if not path.exists():
        raise checks.BadInput(
            f"no teacher in {path}: restore it with git checkout, or run python -m offline.train_teacher"
        )
    weights = checks.read_weights(path)
    teacher = Teacher(weights["net.0.weight"].shape[1], weights["net.0.weight"].shape[0])
    teacher.load_state_dict(weights)
    return teacher.eval().requires_grad_(False)


def start_worker(constants):
    """Give a spawned process the parent's constants, one thread and the drivers."""
    checks.end_with_the_parent()
    checks.set_constants(constants)
    torch.set_num_threads(1)
    load_drivers()


def load_drivers():
    """Load who answers and, unless the teacher also drives, who drives."""
    global answerer, policy
    answerer, policy = load_teacher(), None
    if POLICY != "teacher":
        policy = model_file.GitText2ActionWithPrompt.from_policy(ROOT / POLICY)
        car_racing_env.check_frame_skip(POLICY, checks.read_json(ROOT / POLICY / "policy.json"))


@torch.no_grad()
def collect_episode(job):
    """Drive one track and write its kept frames: `(track_seed, folder)` -> metadata rows, [] if the car got stuck.

    Everything random comes from the track seed, so the dataset does not depend on the number of workers.
    """
    track_seed, folder = job
    rng = np.random.default_rng(track_seed)
    env = car_racing_env.make_env(car_racing_env.FRAME_SKIP, draw=False)
    env = PrivilegedState(RandomBursts(env, track_seed, BURST_START, BURST_LONGEST), TILES_AHEAD)
    base = env.unwrapped
    to_answer = {action: answer for answer, action in model_file.ANSWERS.items()}
    _, info = env.reset(seed=track_seed)
    rows, frames, slow, end = [], [], 0, ""
    while not end and slow < STUCK_LIMIT:
        keep = rng.random() < KEEP
        frame = base.draw() if keep or policy else None
        action = said = int(answerer(torch.from_numpy(info["state"])[None]).argmax())
        if policy:
            action = list(model_file.ANSWERS.values())[int(policy(frame[None])[0].argmax())]
            said = said if ANSWER_BY == "teacher" else action
        if keep:
            frames.append(frame)
            name = f"{track_seed:06d}_{round(base.t * stock.FPS) - 1:04d}.png"
            rows.append({"file_name": name, "text": to_answer[said], "prompt": model_file.PROMPT, "action": said,
                         "track_seed": track_seed, "frame": round(base.t * stock.FPS) - 1})  # fmt: skip
        _, _, terminated, truncated, info = env.step(action)
        end = car_racing_env.episode_end(terminated, truncated, info)
        moving = base.car.hull.linearVelocity.length > 2 or base.t < 1
        slow = 0 if moving else slow + car_racing_env.FRAME_SKIP
    if slow >= STUCK_LIMIT:
        return []
    for row, frame in zip(rows, frames):
        Image.fromarray(frame).save(Path(folder) / row["file_name"])
    return rows


def run_jobs(function, jobs, num_workers, initializer=None, initargs=()):
    """Yield `function(job)` of each job in order, from spawned processes that stay 2 * `num_workers` jobs ahead.

    Closing the generator ends them. A process that dies raises BrokenProcessPool; with `Pool.imap` the wait would be endless.
    Ctrl-C, which a terminal sends to all processes, is left to this one.
    """
    jobs = iter(jobs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, initializer, initargs) as pool:
        try:
            on_ctrl_c = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the processes, started now, inherit it
            try:
                ahead = deque(pool.submit(function, job) for job in itertools.islice(jobs, 2 * num_workers))
            finally:
                signal.signal(signal.SIGINT, on_ctrl_c)
            while ahead:
                yield ahead.popleft().result()
                ahead.extend(pool.submit(function, job) for job in itertools.islice(jobs, 1))
        finally:
            for process in (pool._processes or {}).values():  # from Python 3.14 on: pool.terminate_workers()
                process.terminate()


def collect_split(folder, first_track, tracks, num_frames):
    """Fill one split's folder with `num_frames` frames and its metadata.jsonl; returns the rows and stuck episodes."""
    folder.mkdir(parents=True)
    rows, stuck = [], 0
    jobs = ((track, str(folder)) for track in range(first_track, first_track + tracks))
    constants = checks.constants_of(__name__, "car_racing_env", "GitText2ActionWithPrompt")
    with (
        contextlib.closing(run_jobs(collect_episode, jobs, NUM_WORKERS, start_worker, (constants,))) as episodes,
        tqdm(total=num_frames, desc=folder.name, unit="frame", mininterval=1) as bar,
    ):
        for episode in episodes:
            stuck += not episode
            rows += episode
            bar.update(min(len(episode), num_frames - bar.n))
            bar.set_postfix(stuck=stuck)
            if len(rows) >= num_frames:
                break
        else:
            raise checks.BadInput(
                f"{tracks} tracks gave {len(rows)} frames for {folder.name}/: raise KEEP or ask for fewer"
            )
    rows = rows[:num_frames]
    needed = {row["file_name"] for row in rows}
    for path in folder.glob("*.png"):  # of the last episodes, begun but not needed
        if path.name not in needed:
            path.unlink()
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows, stuck


def contact_sheet(rows, folder, path, columns=8):
    """A picture of evenly spread frames of every answer, each with its answer written below."""
    scale, height = 2, 96 * 2 + 18
    chosen = []
    for answer in sorted({row["text"] for row in rows}, key=list(model_file.ANSWERS).index):
        said = [row for row in rows if row["text"] == answer]
        chosen.append([said[i] for i in np.linspace(0, len(said) - 1, min(columns, len(said))).astype(int)])
    sheet = Image.new("RGB", (columns * (96 * scale + 4), len(chosen) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for y, line in enumerate(chosen):
        for x, row in enumerate(line):
            with Image.open(folder / row["file_name"]) as frame:
                sheet.paste(frame.resize((96 * scale, 96 * scale), Image.NEAREST), (x * (96 * scale + 4), y * height))
            draw.text((x * (96 * scale + 4) + 2, y * height + 96 * scale + 3), f"{row['text']}  (track {row['track_seed']}, frame {row['frame']})", "black")  # fmt: skip
    sheet.save(path)


def main():
    car_racing_env.check_constants()
    checks.check_constants(
        globals(), TRAIN_FRAMES=(int, 1, None), VALIDATION_FRAMES=(int, 1, None), FIRST_TRACK=(int, 0, 99_999),
        FIRST_VALIDATION_TRACK=(int, 100_000, 100_099), KEEP=(float, 0.001, 1), BURST_START=(float, 0, 1),
        BURST_LONGEST=(int, 1, None), STUCK_LIMIT=(int, 1, None), NUM_WORKERS=(int, 1, None), POLICY=(str, None, None),
        TEACHER=(str, None, None), OUTPUT_DIR=(str, None, None),
    )  # fmt: skip
    if ANSWER_BY not in ("teacher", "policy"):
        raise checks.BadInput(f"ANSWER_BY = {ANSWER_BY!r} in collect_captions.py: use 'teacher' or 'policy'")
    began, facts = time.time(), run_files.run_facts() | {"frame_skip": car_racing_env.FRAME_SKIP}
    output = checks.replaceable(OUTPUT_DIR)
    partial = output.with_name(output.name + ".partial")
    load_drivers()  # what is missing fails here, not in a worker
    facts["teacher_hash"] = run_files.file_hash(ROOT / TEACHER)
    driver = "the teacher" if POLICY == "teacher" else f"the policy in {POLICY}/"
    print(f"{driver} drives, {ANSWER_BY} answers: {TRAIN_FRAMES:,} + {VALIDATION_FRAMES:,} frames to {OUTPUT_DIR}/, "
          f"{checks.duration(0.0014 * (TRAIN_FRAMES + VALIDATION_FRAMES))}")  # fmt: skip
    if output.exists():
        print(
            f"replaces what is in {OUTPUT_DIR}/ when done; the shipped sample comes back with: git checkout {OUTPUT_DIR}"
        )
    shutil.rmtree(partial, ignore_errors=True)
    # validation first: it is short, and a mistake shows early
    splits = {
        "validation": collect_split(
            partial / "validation", FIRST_VALIDATION_TRACK, 100_100 - FIRST_VALIDATION_TRACK, VALIDATION_FRAMES
        ),
        "train": collect_split(partial / "train", FIRST_TRACK, 100_000 - FIRST_TRACK, TRAIN_FRAMES),
    }
    counts = {split: Counter(row["text"] for row in rows) for split, (rows, _) in splits.items()}
    contact_sheet(splits["train"][0], partial / "train", partial / "contact_sheet.png")
    (partial / "README.md").write_text(card(counts, {split: stuck for split, (_, stuck) in splits.items()}))
    run_files.write_run(partial, [sys.modules[__name__], model_file, car_racing_env], began, facts)
    run_files.replace_folder(partial, output)
    print(table(counts))
    print(f"wrote {OUTPUT_DIR}/ in {time.time() - began:.0f} s; next: python train_git_lora_carllava_style.py")


def table(counts):
    """Counts per answer and split, as a Markdown table."""
    lines = ["| answer | train | validation |", "|---|---|---|"]
    for answer in model_file.ANSWERS:
        shares = (f"{c[answer]:,} ({c[answer] / c.total():.1%})" for c in (counts["train"], counts["validation"]))
        lines.append(f"| {answer} | {' | '.join(shares)} |")
    return "\n".join(lines)


def card(counts, stuck):
    return f"""---
task_categories: [visual-question-answering]
configs:
- config_name: default
  data_files:
  - split: train
    path: train/**
  - split: validation
    path: validation/**
---
# CarRacing captions

{counts["train"].total():,} training and {counts["validation"].total():,} validation frames of Gymnasium's CarRacing (uint8 RGB, 96 x 96),
each with the answer to "{model_file.PROMPT}". Driver: `{POLICY}`, answers by: {ANSWER_BY}, frame skip {car_racing_env.FRAME_SKIP},
random bursts of 1-{BURST_LONGEST} decisions (start {BURST_START:.0%}). The splits share no track.

{table(counts)}

Episodes dropped because the car was stuck: {stuck["train"]} training, {stuck["validation"]} validation.
Columns: `file_name`, `text` (the answer), `prompt`, `action` (the simulator's index), `track_seed`, `frame`.

```python
datasets.load_dataset("imagefolder", data_dir="{OUTPUT_DIR}")
```

Made by `collect_captions.py`; its constants, versions and commit are in `run.json`.
"""


if __name__ == "__main__":
    checks.run(main)
