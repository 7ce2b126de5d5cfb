"""Drive a fixed set of tracks with any driver and write what it scored.

Reads a driver: nothing ("random"), offline/teacher.safetensors ("teacher"), the fine-tuned adapter ("answers": it says
words, the words drive) or a PPO policy ("policy"). Writes RESULTS_DIR/eval_<driver>_<first track>.json, the instruction
in its name if there is one, and, with VIDEO, a video. Their names do not say POLICY, MODEL and NUM_TRACKS: a run with
another one replaces them, unless RESULTS_DIR is another one, too. The task is the plain one: no training rewards, no
early stop, 1000 frames at most.

    python evaluate.py      # 100 tracks of the PPO policy: 1 to 4 minutes on two CPU cores
"""

import collections
import functools
import re
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import film
import instructions
from car_racing_env import ENV_ID, FRAME_SKIP, NO_OP, episode_end
from GitText2ActionWithPrompt import ANSWERS, GitText2ActionWithPrompt, to_simulator
from phrasings import COMBINATIONS, HELD_OUT_COMBINATIONS, INSTRUCTIONS
from support import checks, processes, run_files
from support.run_files import ROOT
from targets import RACE
from teacher import TEACHER, load_teacher, make_evaluation_env

DRIVER = "policy"  # "random", "teacher", "answers" or "policy"
INSTRUCTION = ""  # in force for the whole drive: "Keep left."; the teacher takes a name of phrasings.py: "left"
FIRST_TRACK = 100_000  # of VALIDATION; of HELD_OUT 100_200, of TEST 201_000 (car_racing_env.py)
NUM_TRACKS = 100
NUM_ENVS = 10  # simulated side by side
NUM_WORKERS = 2  # processes that share them, and threads that ask the driver
# one thread: two are 3 % faster on idle cores, but wait for each other on busy ones and lose a factor of five
TORCH_THREADS = 1
MODEL = "lora_git_caption_model_carllava"  # for "answers": an adapter or a base
POLICY = "results/policy"  # for "policy"
RESULTS_DIR = "results"
VIDEO = True  # also film the first track
HEAT_MAP = False  # in the film: lay over the picture what the prompt's last token attends to
SEED = 0  # of the random driver


class Random:
    """Random actions, whatever it is told, drawn from the state: the same in any thread and company."""

    told = ""

    def __init__(self, seed):
        self.seed = seed

    def __call__(self, frames, infos):
        return np.array([zlib.crc32(state.tobytes(), self.seed) % 5 for state in infos["state"]])


class Teacher:
    """The collecting policy; it reads the simulator's state from `infos`.

    `told` is a `Target`, or one for each frame.
    """

    told = RACE

    def __init__(self):
        self.teacher = load_teacher()

    def __call__(self, frames, infos):
        return self.teacher.act(infos["state"], self.told)


class Answers:
    """The model's generated words; what cannot be parsed is counted and driven as no-op.

    `told` is the instruction, "" for none, or one for each frame.
    """

    told = ""

    def __init__(self, model):
        self.model, self.words, self.unparsable = model, 0, 0
        self.counting = threading.Lock()  # threads share a driver

    def __call__(self, frames, infos):
        return self.act(self.model.answer(frames, self.told))

    def act(self, texts):
        """The simulator's actions for generated words."""
        with self.counting:
            self.words += len(texts)
            self.unparsable += sum(text not in ANSWERS for text in texts)
        return np.array([ANSWERS.get(text, NO_OP) for text in texts])

    def explain(self, frames, infos):
        """Actions, the words, and the probabilities of the five answers, (N, 5)."""
        texts = self.model.answer(frames, self.told)
        return self.act(texts), texts, self.model.encode(frames, self.told)[1].exp()


class Policy:
    """The most probable action of a model with its policy head. `told` is the instruction, or one for each frame."""

    told = ""

    def __init__(self, model):
        self.model = model

    def __call__(self, frames, infos):
        return to_simulator(self.probabilities(frames).argmax(1))

    @torch.no_grad()
    def probabilities(self, frames):
        return self.model(frames, self.told)[0].softmax(-1)

    def explain(self, frames, infos):
        """Actions, the model's words, and the probabilities of the five actions, (N, 5)."""
        probabilities = self.probabilities(frames)
        return to_simulator(probabilities.argmax(1)), self.model.answer(frames, self.told), probabilities


def named_target(name):
    """The `Target` of the instruction `name`; BadInput if there is none of that name."""
    names = {*INSTRUCTIONS, *COMBINATIONS, *HELD_OUT_COMBINATIONS}
    if name not in names:
        raise checks.BadInput(
            f"INSTRUCTION = {name!r} in evaluate.py: the teacher reads no words, use one of {', '.join(sorted(names))}"
        )
    return instructions.target(name)


DRIVERS = {
    "random": lambda: Random(SEED),
    "teacher": Teacher,
    "answers": lambda: Answers(GitText2ActionWithPrompt.from_pretrained(MODEL)),
    "policy": lambda: Policy(GitText2ActionWithPrompt.from_policy(POLICY)),
}


def tell(driver, told):
    """Set what a driver is told from now on; BadInput for one that takes no instruction."""
    if not hasattr(driver, "told"):
        raise checks.BadInput(f"{type(driver).__name__} has no attribute `told`: this driver takes no instruction")
    driver.told = told


def evaluate(driver, tracks, num_envs=None, frame_skip=FRAME_SKIP):
    """Drive each track once; returns a list of `{"track_seed", "return", "end"}` in the order of `tracks`.

    `driver` maps frames uint8 (N, 96, 96, 3) and the environments' infos, arrays of N, to N simulator actions; it is
    asked only for environments that still drive, by NUM_WORKERS threads at once, each for a share of the tracks: it
    must keep nothing from one decision to the next. `num_envs` None are NUM_ENVS.
    """
    tracks, num_envs = list(tracks), num_envs or NUM_ENVS
    num_workers = min(NUM_WORKERS, num_envs, len(tracks))
    shares = [tracks[i::num_workers] for i in range(num_workers)]
    makers = [functools.partial(make_evaluation_env, frame_skip)] * min(num_envs, len(tracks))
    scores, bar = {}, tqdm(total=len(tracks), unit="track", leave=False)

    def report(result):
        scores[result["track_seed"]] = result
        bar.update()
        bar.set_postfix(mean=f"{np.mean([r['return'] for r in [*scores.values()]]):.1f}")

    with ThreadPoolExecutor(num_workers) as pool, processes.simulators(makers, "DISABLED", num_workers) as workers, bar:
        list(pool.map(functools.partial(drive_all, driver, report), workers, shares))
    return [scores[track] for track in tracks]


def drive_all(driver, report, envs, tracks):
    """Drive each of `tracks` once in the environments of one worker, and `report` each result."""
    waiting = collections.deque(tracks)
    num_envs = envs.num_envs
    current = [waiting.popleft() for _ in range(num_envs)]
    driving = np.ones(num_envs, dtype=bool)
    returns = np.zeros(num_envs)
    obs, infos = envs.reset(seed=current)
    while driving.any():
        actions = np.zeros(num_envs, dtype=np.int64)
        actions[driving] = driver(obs[driving], {name: x[driving] for name, x in infos.items()})
        obs, rewards, terminated, truncated, infos = envs.step(actions)
        returns += rewards
        done = terminated | truncated
        if not done.any():
            continue
        for i in np.flatnonzero(done & driving):
            lap_finished = bool(infos.get("lap_finished", np.zeros(num_envs))[i])
            end = episode_end(terminated[i], truncated[i], {"lap_finished": lap_finished})
            report({"track_seed": current[i], "return": float(returns[i]), "end": end})
            driving[i], returns[i] = bool(waiting), 0.0
            current[i] = waiting.popleft() if waiting else current[i]  # without one left it idles on its last one
        obs, infos = envs.restart(current, done, infos)


def summarize(results):
    """Mean, std, median, extremes, laps and failures of `evaluate`'s list."""
    returns = np.array([r["return"] for r in results])
    return {
        "mean": round(float(returns.mean()), 2),
        "std": round(float(returns.std()), 2),
        "median": round(float(np.median(returns)), 2),
        "min": round(float(returns.min()), 2),
        "max": round(float(returns.max()), 2),
        "laps_finished_percent": round(100 * float(np.mean([r["end"] == "lap" for r in results])), 1),
        "below_500_percent": round(100 * float((returns < 500).mean()), 1),
    }


def score(driver, tracks):
    """The summary of `driver` on `tracks`."""
    return summarize(evaluate(driver, tracks))


def describe(name, tracks):
    """What a measurement notes of a driver of DRIVERS and of its tracks: a dict; a base has no hash."""
    facts = {"tracks": [tracks[0], tracks[-1]]}
    files = {
        "teacher": TEACHER,
        "answers": f"{MODEL}/adapter_model.safetensors",
        "policy": f"{POLICY}/policy.safetensors",
    }
    if name in files:
        weights = Path(files[name])
        facts["folder"] = str(weights.parent)
        if (ROOT / weights).exists():
            facts["weights_hash"] = run_files.file_hash(ROOT / weights)
    return facts | run_files.run_facts()


def main():
    began = time.time()
    torch.set_num_threads(TORCH_THREADS)
    if DRIVER not in DRIVERS:
        raise checks.BadInput(f"DRIVER = {DRIVER!r} in evaluate.py: use one of {', '.join(DRIVERS)}")
    driver = DRIVERS[DRIVER]()
    if INSTRUCTION:
        tell(driver, named_target(INSTRUCTION) if DRIVER == "teacher" else INSTRUCTION)
    results_dir = run_files.check_writable(ROOT / RESULTS_DIR)
    tracks = range(FIRST_TRACK, FIRST_TRACK + NUM_TRACKS)
    facts = {
        "driver": DRIVER,
        "instruction": INSTRUCTION,
        "env_id": ENV_ID,
        "frame_skip": FRAME_SKIP,
    } | describe(DRIVER, tracks)
    print(f"{DRIVER} drives tracks {FIRST_TRACK} to {tracks[-1]} of {ENV_ID}, some 2 seconds each on two CPU cores")
    results = evaluate(driver, tracks)
    summary = summarize(results)
    if DRIVER == "answers":
        summary |= {"unparsable_answers": driver.unparsable, "answers": driver.words}
    lists = {
        "returns": [round(r["return"], 2) for r in results],
        "ends": [r["end"] for r in results],
    }
    facts |= summary | {"seconds": round(time.time() - began, 1)} | lists
    name = "_".join([DRIVER, str(FIRST_TRACK), *re.findall(r"\w+", INSTRUCTION.lower())])
    name = name.encode()[:200].decode(errors="ignore")  # a file's name has 255 bytes at most
    run_files.write_json(results_dir / f"eval_{name}.json", facts)
    print("{mean:.1f} ± {std:.1f}, min {min:.0f}, {laps_finished_percent:.0f} % laps".format(**summary))
    print(f"wrote {RESULTS_DIR}/eval_{name}.json")
    if VIDEO:
        film.record_video(driver, tracks[0], results_dir / f"video_{name}.mp4", HEAT_MAP)
        print(f"wrote {RESULTS_DIR}/video_{name}.mp4")
    print("next: another DRIVER or FIRST_TRACK here, or a policy as POLICY in collect_captions.py")


if __name__ == "__main__":
    checks.run(main)
