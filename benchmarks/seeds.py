"""Ten runs of the default PPO, seeds 0 to 9, each final policy on the same hundred tracks that nothing was chosen on.

Writes benchmarks/seeds/seed<n>.json as each run ends, and skips those that are there: stop and start at will. Those of
the adapter that ships are there; for another one, or other constants, name another OUTPUT. Prints the mean with its
interval, each seed, the worst drives, and the environment frames that all of it stands on.

    python -m benchmarks.seeds      # 11 to 17 minutes a seed on two CPU cores
"""

import functools
from pathlib import Path

import numpy as np
from safetensors import safe_open

import ppo_git_with_prompt as ppo
from benchmarks import runs
from car_racing_env import FRAME_SKIP, TEST
from GitText2ActionWithPrompt import GitText2ActionWithPrompt
from offline import train_teacher
from support import checks
from support.run_files import ROOT
from teacher import TEACHER

OUTPUT = Path(__file__).parent / "seeds"
SEEDS = range(10)
TRACKS = TEST
RESAMPLES = 10_000
STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % quantile, by seeds, which is degrees of freedom + 1
# frames that the teacher before was trained on: git-tiny and the first four rounds of captions saw its drives
EARLIER_TEACHER = 300 * 16_384 * FRAME_SKIP
# of each set of captions of the adapter that ships: frames kept, and of which share of the decisions
QUARTER, HALF = (47_000, 42_000, 24_000), (22_000, 22_000, 22_000, 30_500, 30_500)
CAPTIONS = [*((kept, 0.25) for kept in QUARTER), *((kept, 0.5) for kept in HALF)]


def interval(returns):
    """95 % bounds of the mean of returns (seeds, tracks); nan of a single seed.

    Seeds and tracks are resampled with replacement, each by itself: the pigeonhole bootstrap (Owen 2007, doi
    10.1214/07-AOAS122). Resampling the pairs alone would take the seeds' share of the spread for noise of the tracks:
    too narrow. So is resampling a few seeds; of up to five it is Student's t of their means, on these tracks.
    """
    seeds, tracks = returns.shape
    if seeds < 2:
        return np.full(2, np.nan)
    if seeds in STUDENT_T:
        means = returns.mean(1)
        return means.mean() + np.array([-1, 1]) * STUDENT_T[seeds] * means.std(ddof=1) / seeds**0.5
    rng = np.random.default_rng(0)
    means = [
        returns[rng.integers(seeds, size=seeds)][:, rng.integers(tracks, size=tracks)].mean() for _ in range(RESAMPLES)
    ]
    return np.quantile(means, [0.025, 0.975])


def summarize(rows):
    """What the runs say together: a dict."""
    returns = np.array([row["returns"] for row in rows.values()])
    low, high = interval(returns)
    worst = np.sort(returns.ravel())[: max(1, returns.size // 100)]
    return {
        "mean": round(float(returns.mean()), 1),
        "interval": [round(float(low), 1), round(float(high), 1)],
        "seeds": {seed: row["mean"] for seed, row in rows.items()},
        "worst_percent": worst.tolist(),
        "below_500_percent": round(float(np.mean([row["below_500_percent"] for row in rows.values()])), 2),
        "laps_finished_percent": round(float(np.mean([row["laps_finished_percent"] for row in rows.values()])), 1),
    }


def table(rows):
    """The runs as a Markdown table."""
    lines = ["| seed | mean ± std | laps | worst track |", "|---|---|---|---|"]
    for seed, row in rows.items():
        laps = f"{row['laps_finished_percent']:.0f} %"
        lines.append(f"| {seed} | {row['mean']:.1f} ± {row['std']:.1f} | {laps} | {row['min']:.0f} |")
    return "\n".join(lines)


def frames():
    """Environment frames that the runs stand on, by what they were for; those of dropped episodes are not counted."""
    with safe_open(ROOT / TEACHER, "np") as file:
        teacher = int(file.metadata()["update"])
    base = checks.read_json(ROOT / "offline/git-tiny/run.json")["constants"]["make_git_tiny.py"]
    captions = sum(kept / share for kept, share in CAPTIONS)
    decisions = train_teacher.NUM_WORKERS * train_teacher.ENVS_PER_WORKER * train_teacher.NUM_STEPS  # an update
    return {
        "teacher": teacher * decisions * FRAME_SKIP,
        "the teacher before": EARLIER_TEACHER,
        "git-tiny": round((base["TRAIN_FRAMES"] + base["VALIDATION_FRAMES"]) / base["KEEP"]) * FRAME_SKIP,
        "captions": round(captions) * FRAME_SKIP,
        "PPO, each run": runs.FRAMES,
    }


def run(seed):
    """The default run, and its averaged policy on TRACKS."""
    make = functools.partial(GitText2ActionWithPrompt.from_pretrained, ppo.MODEL)
    return runs.run(make, seed, TRACKS, evaluations=ppo.EVALUATIONS)[0]


def main():
    model = GitText2ActionWithPrompt.from_pretrained(ppo.MODEL).source
    for seed in SEEDS:
        path, tracks = OUTPUT / f"seed{seed}.json", [TRACKS[0], TRACKS[-1]]
        runs.once(path, functools.partial(run, seed), model=model, tracks=tracks)
    rows = runs.load(OUTPUT)
    print(table(rows))
    for name, value in (summarize(rows) | {"frames": frames()}).items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    checks.run(main)
