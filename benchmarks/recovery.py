"""Turned round in mid-drive: who comes back?

The car of a driver on its lap is turned by any angle, its velocity with it. It has come back when it is 15 tiles
further along the road's direction within 440 frames; newly visited tiles would not tell, as a car that drives the wrong
way visits new ones, too. Some come back to another stretch of the road, the far side of a hairpin, which the picture
shows as well: these short cuts, that cost the lap, are counted by themselves too. Beside it the same drives of a car
that only coasts after the turn: turned by less than 90 degrees it often rolls on far enough. Writes
benchmarks/recovery.json, a part for each driver.

    python -m benchmarks.recovery      # 2 to 8 minutes a driver on two CPU cores
"""

import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import evaluate
from benchmarks import drives
from car_racing_env import FRAME_SKIP, HELD_OUT
from support import checks, run_files

DRIVER = "teacher"  # one of evaluate.py, whose constants say which model
TRACKS = HELD_OUT
ROUNDS = 2  # drives on each track, of other angles
WHEN = 75  # decisions before the turn
FRAMES = 440
TILES = 15
NUM_ENVS = 20
OUTPUT = Path(__file__).with_suffix(".json")


class Coasting:
    """A driver until its car is turned, then nobody."""

    def __init__(self, driver):
        self.driver, self.told = driver, "drive"

    def __call__(self, frames, infos):
        return self.driver(frames, infos) if self.told == "drive" else np.zeros(len(frames), np.int64)


def came_back(results):
    """Whether each car came TILES further within FRAMES of the turn, and by a short cut: bool (N,) each."""
    tiles, short_cuts = (results[name][WHEN:] - results[name][WHEN - 1] for name in ("travelled", "short_cuts"))
    further = (tiles >= TILES) & results["driving"][WHEN:]
    took_short_cut = short_cuts[further.argmax(0), np.arange(further.shape[1])] > 0
    return further.any(0), further.any(0) & took_short_cut


def main():
    began, facts = time.time(), evaluate.describe(DRIVER, TRACKS)
    torch.set_num_threads(evaluate.TORCH_THREADS)
    driver, rng = evaluate.DRIVERS[DRIVER](), np.random.default_rng(0)
    angles, back, by_short_cut, rolled, still = [], [], [], [], []
    jobs = [track for _ in range(ROUNDS) for track in TRACKS]
    for start in tqdm(range(0, len(jobs), NUM_ENVS), unit=f"{NUM_ENVS} drives"):
        tracks = jobs[start : start + NUM_ENVS]
        turns = rng.uniform(-np.pi, np.pi, len(tracks))
        decisions = WHEN + FRAMES // FRAME_SKIP
        results = drives.drive(driver, tracks, decisions, {}, turns, WHEN)
        angles += np.degrees(abs(turns)).tolist()
        for outcomes, outcome in zip((back, by_short_cut), came_back(results)):
            outcomes += outcome.tolist()
        control = drives.drive(Coasting(driver), tracks, decisions, {WHEN: "coast"}, turns, WHEN)
        rolled += came_back(control)[0].tolist()
        still += results["driving"][WHEN].tolist()
    angles, back, by_short_cut, rolled = (np.array(x)[still] for x in (angles, back, by_short_cut, rolled))
    row = {}
    for low, high in ((0, 45), (45, 90), (90, 135), (135, 180), (0, 90), (90, 180)):
        group = (angles >= low) & (angles < high)
        outcomes = {"came_back": back, "by_short_cut": by_short_cut, "coasting": rolled}
        shares = {name: round(float(x[group].mean()), 3) for name, x in outcomes.items()}
        row[f"{low}-{high} degrees"] = {"drives": int(group.sum())} | shares
        print(f"{low}-{high} degrees, {group.sum()} drives: {shares}")
    run_files.add_to_json(OUTPUT, {DRIVER: row | facts | {"seconds": round(time.time() - began)}})


if __name__ == "__main__":
    checks.run(main)
