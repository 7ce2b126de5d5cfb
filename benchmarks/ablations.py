"""Which part does it? Whole PPO runs with one thing changed, scored on the validation tracks.

Writes benchmarks/ablations/<name>_seed<n>.json as each run ends, and skips those that are there: stop and start at
will. At the end it prints `table()`. The discount per frame and the frames per update are the same in every run, and
the frames in all but "half as many frames". At another frame skip what is per decision stays so: GAE_LAMBDA, the
clipped reward, the chances of throws and of another instruction. In fifth_round/ are runs on the adapter before the
one that ships, in first_model/ runs of 150,000 frames on the first model, whose last weights were scored.

    python -m benchmarks.ablations      # 10 minutes a run on two CPU cores, TRAIN_LORA 85 to 115
"""

import dataclasses
import functools
from pathlib import Path

import ppo_git_with_prompt as ppo
import train_git_lora_carllava_style as stage2
from benchmarks import runs
from car_racing_env import FRAME_SKIP, REWARDS, VALIDATION
from GitText2ActionWithPrompt import GitText2ActionWithPrompt
from support import checks

OUTPUT = Path(__file__).parent / "ablations"
SEEDS = (1, 2)
TRACKS = VALIDATION
CHANGES = {  # name: what `run` changes
    "as it is": {},
    "no return normalisation": {"train": {"normalize_return": False}},
    "hidden layer of 32, no dropout": {"head": {"head_size": 32, "dropout": 0.0}},
    "no clipped rewards": {"rewards": {"clip": 1e9}},
    "K_EPOCHS = 1": {"train": {"k_epochs": 1}},
    "LANGUAGE_PRIOR = 0": {"head": {"language_prior": 0.0}},
    "base without the adapter, LANGUAGE_PRIOR = 0": {"model": stage2.BASE_MODEL, "head": {"language_prior": 0.0}},
    "half as many frames": {"share": 0.5},
    "penalties from the start": {"rewards": {"penalty_ramp": 0.0}},
    "FRAME_SKIP = 1": {"frame_skip": 1},  # the adapter was taught at 2
    "FRAME_SKIP = 4": {"frame_skip": 4},
    "TRAIN_LORA": {"lora": True},  # five passes backward through the model
}


def load(changes):
    """The model of one run, with fresh heads."""
    model = GitText2ActionWithPrompt.from_pretrained(changes.get("model", ppo.MODEL), **changes.get("head", {}))
    if changes.get("lora"):
        model.add_lora(ppo.LORA_RANK, ppo.LORA_ALPHA)
    return model


def run(changes, seed):
    """One PPO run; returns its settings and the scores of its averaged policy on TRACKS."""
    rewards = dataclasses.replace(REWARDS, **changes.get("rewards", {}))
    world = {"envs": {"rewards": rewards}, "frame_skip": changes.get("frame_skip", FRAME_SKIP)}
    world["frames"] = round(changes.get("share", 1) * runs.FRAMES)
    facts, _ = runs.run(functools.partial(load, changes), seed, TRACKS, **world, **changes.get("train", {}))
    return {"changes": changes} | facts


def table(folder):
    """The runs in `folder` as a Markdown table, and for each seed the difference to "as it is"."""
    found = {name: runs.load(folder, f"{name}_") for name in CHANGES}
    seeds = " | ".join(f"seed {seed}" for seed in SEEDS)
    lines = [
        f"| change | {seeds} | mean ± std over seeds | difference from as it is, each seed |",
        "|---" * (len(SEEDS) + 3) + "|",
    ]
    for name, rows in found.items():
        if not rows:
            continue
        each = [f"{rows[seed]['mean']:.1f} ± {rows[seed]['std']:.1f}" if seed in rows else "" for seed in SEEDS]
        means = [row["mean"] for row in rows.values()]
        both = [seed for seed in SEEDS if seed in rows and seed in found["as it is"] and name != "as it is"]
        minus = ", ".join(f"{rows[seed]['mean'] - found['as it is'][seed]['mean']:+.1f}" for seed in both)
        lines.append(f"| {name} | {' | '.join(each)} | {runs.over_seeds(means)} | {minus} |")
    return "\n".join(lines)


def main():
    for name, changes in CHANGES.items():
        model = GitText2ActionWithPrompt.from_pretrained(changes.get("model", ppo.MODEL)).source
        model |= {"lora_rank": ppo.LORA_RANK, "lora_alpha": ppo.LORA_ALPHA} if changes.get("lora") else {}
        for seed in SEEDS:
            path = OUTPUT / f"{name}_seed{seed}.json"
            tracks = [TRACKS[0], TRACKS[-1]]
            runs.once(path, functools.partial(run, changes, seed), model=model, changes=changes, tracks=tracks)
    print(table(OUTPUT))


if __name__ == "__main__":
    checks.run(main)
