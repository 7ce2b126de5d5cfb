"""Ten seeds: the interval of their mean, and what is said of them together."""

import numpy as np
import pytest

from benchmarks import seeds


def test_the_interval_counts_seeds_and_tracks_as_draws():
    """Where both add up, the variance of the mean is the sum of that of the seeds' means and that of the tracks' means."""
    rng = np.random.default_rng(0)
    run, track = rng.normal(0, 10, 12), rng.normal(900, 30, 100)
    low, high = seeds.interval(run[:, None] + track)
    deviation = (run.var() / len(run) + track.var() / len(track)) ** 0.5
    assert (high - low) / (2 * 1.96 * deviation) == pytest.approx(1, abs=0.05)
    assert (low + high) / 2 == pytest.approx(run.mean() + track.mean(), abs=1)


def test_runs_together():
    rows = {seed: {"seed": seed, "mean": 900.0 + seed, "laps_finished_percent": 90.0 + seed} for seed in range(2)}
    for seed, row in rows.items():
        row["returns"] = [900.0 + seed] * 99 + [400.0 + 200 * seed]
    told = seeds.summarize(rows)
    assert told["mean"] == 896.5 and told["seeds"] == {0: 900.0, 1: 901.0} and told["worst_percent"] == [400.0, 600.0]
    assert told["below_500_percent"] == 0.5 and told["laps_finished_percent"] == 90.5
