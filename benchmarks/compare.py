"""Run a peer and us alternately in one process and keep the median ratio in results.json."""

import time
from pathlib import Path

import numpy as np

from support import run_files

RESULTS = Path(__file__).parent / "results.json"
ROUNDS = 7


def alternate(claim, unit, peer, ours, **note):
    """Time both in turns, ROUNDS times after one round to warm up.

    `peer` and `ours` are functions that do one round of work and return how many `unit`s they did.
    """
    times = {peer: [], ours: []}
    for number in range(ROUNDS + 1):
        for work in (peer, ours):
            began = time.perf_counter()
            units = work()
            if number:
                times[work].append(1e3 * (time.perf_counter() - began) / units)
    record(claim, f"ms_per_{unit}", times[peer], times[ours], **note)


def record(claim, measure, peer, ours, **note):
    """Write one claim: the median of the rounds' ratios, their range, both medians, machine, versions and commit.

    `peer` and `ours` are lists, one cost a round: time or memory, less is better.
    """
    ratios = np.array(peer) / np.array(ours)
    row = {
        "median_ratio": round(float(np.median(ratios)), 2),
        "ratio_range": [round(float(ratios.min()), 2), round(float(ratios.max()), 2)],
        f"peer_{measure}": round(float(np.median(peer)), 3),
        f"ours_{measure}": round(float(np.median(ours)), 3),
        **note,
        **run_files.run_facts(),
    }
    run_files.add_to_json(RESULTS, {claim: row})
    print(f"{claim}: {row['median_ratio']}x {row['ratio_range']}", flush=True)
