"""Which driver obeys? Each instruction, in taught and in other words, in mid-drive on tracks held out.

A drive is plain for WHEN decisions, then the driver is told something; whether it obeyed is judged by targets.py. The
tracks hear the phrasings in turn, those of a combination at random. In some drives it is told to stop and later to
drive on, in others two things that contradict each other. Writes benchmarks/obedience.json, a part for each driver, and
obedience.png.

    python -m benchmarks.obedience      # 10 minutes a driver on two CPU cores
"""

import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import evaluate
import instructions
from benchmarks import drives
from car_racing_env import FPS, FRAME_SKIP, HELD_OUT
from phrasings import HELD_OUT_COMBINATIONS, HELD_OUT_SPEEDS, INSTRUCTIONS
from support import checks, plots, run_files
from support.plots import plt

DRIVER = "teacher"  # one of evaluate.py, whose constants say which model
TRACKS = HELD_OUT[:20]
WHEN = 50  # decisions before it is told something
TOLD = 300  # decisions after it
PAUSE = 125  # decisions between "stop" and "drive on"
COMBINATIONS = ("slow left", "slow middle", "speed thirty right", "speed forty left")  # of the taught ones
OUTPUT = Path(__file__).with_suffix(".json")
GROUPS = {
    "taught": "taught phrasings",
    "held_out": "phrasings never taught",
    "new": "speeds and combinations never taught",
    "nothing": "told nothing",
    "changed": "told to stop, then to drive on",
    "contradictory": "told two things that contradict each other",
}

NAMES = [name for name in INSTRUCTIONS if not name.startswith("speed ") and name != "chatter"]
NAMES += [f"speed {word}" for word in ("ten", "fifteen", "twenty", "thirty", "thirty-five", "forty", "fifty")]  # of 13
NEW = [*(f"speed {word}" for word in HELD_OUT_SPEEDS), *sorted(HELD_OUT_COMBINATIONS)]
CASES = {  # group: names of the instructions
    "taught": [*NAMES, *COMBINATIONS],
    "held_out": [*NAMES, *COMBINATIONS],
    "new": NEW,
    "nothing": [*NAMES, *COMBINATIONS, *NEW],  # the control: told nothing, judged as if told
}
CONTRADICTIONS = [
    ("left", "right"),
    ("right", "left"),
    ("slow", "race"),
    ("race", "slow"),
    ("stop", "race"),
    ("race", "stop"),
]


def judged_from(target, when):
    """The first decision that is judged."""
    return when + round(target.grace() * FPS / FRAME_SKIP)


def judge(target, results, when):
    """For each drive: obeyed, and the shares of decisions at the speed and on the side asked for; arrays (N,).

    The decisions after the grace and before the episode's end count. Who leaves the field obeys nothing.
    """
    start, judged = judged_from(target, when), []
    for i in range(results["speed"].shape[1]):
        rows = results["driving"][:, i].copy()
        rows[:start] = False
        speed, offset, on_road, along = (results[name][rows, i] for name in ("speed", "offset", "on_road", "along"))
        if results["left_field"][-1, i] or not rows.any():
            judged.append([0.0] * 3)
        else:
            obeyed = target.obeyed(speed, offset, on_road, along.mean())
            judged.append([obeyed, target.at_speed(speed).mean(), target.on_side(offset).mean()])
    return np.array(judged, dtype=float).T


def sentences(name, group, count):
    """A phrasing for each track: the first of the split, the second, and so on; of a combination any."""
    rng = np.random.default_rng(0)
    split = "held_out" if group == "held_out" else "taught"
    if name in INSTRUCTIONS:
        phrasings = getattr(INSTRUCTIONS[name], split)
        return [phrasings[i % len(phrasings)] for i in range(count)]
    return [instructions.phrase(name, rng, split) for _ in range(count)]


def measure(results, name, group):
    """A row of what was obeyed of the instruction `name`."""
    target = instructions.target(name)
    obeyed, at_speed, on_side = judge(target, results, WHEN)
    row = {"instruction": name, "group": group, "drives": len(TRACKS), "obeyed": round(float(obeyed.mean()), 3)}
    if target.speed is not None:
        row["at_speed"] = round(float(at_speed.mean()), 3)
    if target.side is not None:
        row["on_side"] = round(float(on_side.mean()), 3)
    return row | means(results, judged_from(target, WHEN))


def measure_groups(driver, groups, say):
    """A row for each case of `groups`; `say(name, group)` is what the driver is told, but in the group "nothing"."""

    def drive(says):
        return drives.drive(driver, TRACKS, WHEN + TOLD, says)

    rows, told_nothing = [], drive({}) if "nothing" in groups else None
    cases = [(group, name) for group in groups for name in CASES[group]]
    for group, name in tqdm(cases):
        results = told_nothing if group == "nothing" else drive({WHEN: say(name, group)})
        rows.append(measure(results, name, group))
        tqdm.write(str(rows[-1]))
    return rows


def means(results, start):
    """Mean speed and offset from decision `start` on."""
    driving = results["driving"][start:]
    return {f"mean_{name}": round(float(results[name][start:][driving].mean()), 2) for name in ("speed", "offset")}


def measure_change(driver, stop, race):
    """The row of drives that stop and go on: obeyed if both are."""
    later = WHEN + PAUSE
    results = drives.drive(driver, TRACKS, later + TOLD, {WHEN: stop, later: race})
    stopped = judge(instructions.target("stop"), {name: x[:later] for name, x in results.items()}, WHEN)[0]
    raced = judge(instructions.target("race"), results, later)[0]
    row = {"instruction": "stop, later race", "group": "changed", "drives": len(TRACKS)}
    shares = {"obeyed": stopped * raced, "stopped": stopped, "raced": raced}
    return row | {name: round(float(share.mean()), 3) for name, share in shares.items()}


def measure_contradiction(driver, names):
    """The row of drives that are told two things in one breath: which of them is obeyed?"""
    said = [" ".join(pair) for pair in zip(*(sentences(name, "taught", len(TRACKS)) for name in names))]
    results = drives.drive(driver, TRACKS, WHEN + TOLD, {WHEN: said})
    row = {"instruction": " + ".join(names), "group": "contradictory", "drives": len(TRACKS)}
    for name in names:
        row[f"obeyed_{name}"] = round(float(judge(instructions.target(name), results, WHEN)[0].mean()), 3)
    return row | means(results, judged_from(instructions.target("race"), WHEN))


def draw(measured, path):
    """Share of obeyed drives by instruction and driver; how fast and where the policy drove, beside targets."""
    figure, (shares, speeds, offsets) = plt.subplots(
        1, 3, figsize=(12, 6.5), sharey=True, layout="constrained", width_ratios=(3, 1, 1)
    )
    drivers = {"answers": "tab:green", "policy": "tab:orange", "teacher": "tab:blue"}
    markers = {"taught": "o", "held_out": "s", "new": "^", "nothing": "x"}
    known = CASES["nothing"]  # a driver measured earlier may have been told something else
    parts = {
        driver: [row for row in measured[driver]["rows"] if row["instruction"] in known]
        for driver in drivers
        if driver in measured
    }
    names = list(dict.fromkeys(row["instruction"] for part in parts.values() for row in part))
    for i, (driver, color) in enumerate(drivers.items()):
        for group, marker in markers.items():
            rows = [row for row in parts.get(driver, []) if row["group"] == group]
            if not rows or (group == "nothing" and driver != "policy"):
                continue
            looks = {"marker": marker, "color": color, "s": 28, "facecolors": "none" if group == "held_out" else color}
            looks |= {"color": "tab:gray", "facecolors": "tab:gray"} if group == "nothing" else {}
            places = [names.index(row["instruction"]) + 0.22 * (i - 1) for row in rows]
            shares.scatter([100 * row["obeyed"] for row in rows], places, label=f"{driver}, {GROUPS[group]}", **looks)
            if driver == "policy" and group != "nothing":
                speeds.scatter([row["mean_speed"] for row in rows], places, **looks)
                offsets.scatter([row["mean_offset"] for row in rows], places, **looks)
    for place, name in enumerate(names):
        target = instructions.target(name)
        for axes, asked in ((speeds, target.speed), (offsets, target.side)):
            if asked is not None:
                axes.plot(asked, place, "k|", markersize=14)
    shares.set(title="Which driver obeys", xlabel="% of the drives that obeyed", xlim=(-3, 103))
    speeds.set(title="The policy's speed", xlabel="mean (|: asked for)")
    offsets.set(title="Its place on the road", xlabel="mean offset (units)", xlim=(-6.7, 6.7))
    shares.set_yticks(range(len(names)), names, fontsize=8)
    shares.invert_yaxis()
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncol=4)
    for axes in (shares, speeds, offsets):
        axes.grid(alpha=0.3)
    plots.save(figure, path)


def main():
    began, facts = time.time(), evaluate.describe(DRIVER, TRACKS)
    torch.set_num_threads(evaluate.TORCH_THREADS)
    driver, reads = evaluate.DRIVERS[DRIVER](), DRIVER != "teacher"  # it knows targets, no phrasings

    def say(name, group="taught"):
        return sentences(name, group, len(TRACKS)) if reads else instructions.target(name)

    groups = [group for group in CASES if reads or group != "held_out"]
    rows = measure_groups(driver, groups, say)
    rows.append(measure_change(driver, say("stop"), say("race")))
    rows += [measure_contradiction(driver, names) for names in CONTRADICTIONS if reads]
    for group in [*groups, "changed"]:
        print(f"{group}: {np.mean([row['obeyed'] for row in rows if row['group'] == group]):.1%} obeyed")
    measured = {"rows": rows} | facts | {"seconds": round(time.time() - began)}
    measured = run_files.add_to_json(OUTPUT, {DRIVER: measured})
    draw(measured, OUTPUT.with_suffix(".png"))


if __name__ == "__main__":
    checks.run(main)
