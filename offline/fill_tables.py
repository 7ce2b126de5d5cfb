"""Write the numbers of results/published/ and benchmarks/ into the tables of README.md and docs/.

The tests ask that it changes none. Reads their files and the tables' first cells, which say what a row is about: a new
row is a name typed there. The only prose it touches is the run of means in docs/results.md.

    python -m offline.fill_tables      # a second
"""

import re

import numpy as np

from benchmarks import ablations, controls, from_nothing, obedience, runs, seeds
from offline.publish import ROUNDS
from support import checks, run_files
from support.checks import read_json
from support.run_files import ROOT, read_log

PUBLISHED, BENCHMARKS = ROOT / "results" / "published", ROOT / "benchmarks"
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
SCORE = re.compile(r"\[[^]]*±[^]]*\]\((?:\.\./)?results/published/([\w/]+\.json)\)(?:, laps \d+ %, min -?\d+)?")
SPLITS = ("held_out", "validation", "test")
CONTROLS = {  # rows of the README, and their arms
    "control: git-tiny, all weights trained, in words": "words",
    "the same, told numbers instead of sentences": "numbers",
    "control: its image encoder, five classes, told nothing": "classes",
    "PPO alone: Stable-Baselines3's `CnnPolicy`": "CnnPolicy",
}
MEANS = re.compile(r"(\[eval_log\.csv\]\(\S+\)\): )\d+\.\d(?:[ \n]->[ \n]\d+\.\d)*")


def score(facts):
    return f"{facts['mean']:.1f} ± {facts['std']:.1f}"


def percent(share):
    return f"{100 * float(share):.1f} %"


def fill(heading, cells, text):
    """The page with new cells in the table whose first line begins with `heading`, if it has one.

    `cells` returns those of a row, but for its first one, or None to leave it, from its first cell.
    """
    start = text.find(heading)
    if start < 0:
        return text
    end = text.find("\n\n", start)
    lines = text[start:end].split("\n")
    for i, line in enumerate(lines[2:], 2):
        name = line.split("|")[1].strip()
        new = cells(name)
        lines[i] = line if new is None else f"| {' | '.join([name, *new])} |"
    return text[:start] + "\n".join(lines) + text[end:]


def fill_scores(text):
    """Every score that is a link to the file it comes from."""

    def link(match):
        facts, old = read_json(PUBLISHED / match[1]), match[0]
        where = old[old.index("](") : old.index(")") + 1]
        more = ", laps {laps_finished_percent:.0f} %, min {min:.0f}".format(**facts) if ", laps" in old else ""
        return f"[{score(facts)}{where}{more}"

    return SCORE.sub(link, text)


def fill_gains(text):
    """What PPO adds to a track's return: mean and standard error over the tracks."""
    peers = {"the policy before it": "before_ppo", "the answers alone": "answers"}

    def returns(split, name):
        return read_json(PUBLISHED / split / f"eval_{name}.json")["returns"]

    def cells(name):
        if name.endswith("ten seeds"):
            ten = np.mean([row["returns"] for row in runs.load(seeds.OUTPUT).values()], 0)
            pairs = [(ten, returns("test", "before_ppo"))]
        else:
            pairs = [(returns(split, "policy"), returns(split, peers[name])) for split in SPLITS]
        gains = ["{:.1f} ± {:.1f}".format(*runs.paired(*pair)) for pair in pairs]
        return [""] * (len(SPLITS) - len(gains)) + gains

    return fill("| PPO minus", cells, text)


def fill_training(text):
    means = [float(row["mean"]) for row in read_log(PUBLISHED / "eval_log.csv") if row["driver"] == "policy"]
    text = MEANS.sub(lambda match: match[1] + " -> ".join(f"{mean:.1f}" for mean in means), text)
    epochs = {}
    for folder in ("", *ROUNDS):
        rows = read_log(PUBLISHED / folder / "lora_log.csv")[1:]
        name = folder.replace("_", " ")  # "1", "second round", "fifth round, 2"
        epochs |= {name if name and len(rows) == 1 else f"{name}, {row['epoch']}".lstrip(", "): row for row in rows}

    def losses(name):
        row = epochs[name]
        return [*(f"{float(row[x]):.3f}" for x in ("average_loss", "validation_loss")), percent(row["exact_match"])]

    return fill("| epoch |", losses, text)


def fill_obedience(text):
    measured = read_json(BENCHMARKS / "obedience.json")
    rows = {
        (driver, x["group"], x["instruction"]): x["obeyed"]
        for driver in measured
        for x in measured[driver]["rows"]
        if "obeyed" in x
    }
    groups = {name: group for group, name in obedience.GROUPS.items()}
    groups |= {"told nothing, judged as if told": "nothing"}
    drivers = ("answers", "policy", "teacher")[: 3 if "| teacher |" in text else 2]

    def means(name):
        each = [[x for key, x in rows.items() if key[:2] == (driver, groups[name])] for driver in drivers]
        return [percent(np.mean(obeyed)) if obeyed else "" for obeyed in each]

    def shares(name):
        not_taught, teachers = ("new", "new") if name in obedience.NEW else ("held_out", "taught")
        columns = [(driver, group) for driver in ("answers", "policy") for group in ("taught", not_taught)]
        columns += [("policy", "nothing"), ("teacher", teachers)]
        return [percent(rows[*column, name]) if (*column, name) in rows else "" for column in columns]

    return fill("| instruction |", shares, fill("| obeyed, share", means, text))


def fill_contradictions(text):
    rows = {
        x["instruction"]: x
        for x in read_json(BENCHMARKS / "obedience.json")["policy"]["rows"]
        if x["group"] == "contradictory"
    }

    def obeyed(names):
        row, pair = rows[names.replace(", ", " + ")], names.split(", ")
        shares = [percent(row[f"obeyed_{name}"]) for name in pair]
        return [*shares, f"{row['mean_speed']:.0f}", f"{row['mean_offset']:.1f}"]

    return fill("| told | first obeyed", obeyed, text)


def fill_learned(text):
    """Exact answers by kind of instruction."""
    (row,) = read_log(PUBLISHED / ROUNDS[-1] / "validation.csv")
    return fill(
        "| kind |", lambda kind: [percent(row[f"exact_{kind}_{split}"]) for split in ("taught", "held_out")], text
    )


def fill_benchmarks(text):
    recovery, prompts = (read_json(BENCHMARKS / f"{name}.json") for name in ("recovery", "prompts"))
    shifts, agreement = read_json(BENCHMARKS / "shifts.json")["shifts"], read_json(BENCHMARKS / "agreement.json")

    def came_back(angles):
        policy, teacher = (recovery[driver][angles.removeprefix("all of ")] for driver in ("policy", "teacher"))
        shares = (policy["came_back"], policy["by_short_cut"], teacher["came_back"], teacher["by_short_cut"])
        return [str(policy["drives"]), *map(percent, (*shares, policy["coasting"]))]

    def lost(group):
        rows = [prompts[driver]["groups"][group] for driver in ("answers", "policy")]
        cells = [(f"{x['mean']:.1f}", f"{x['loss']:.1f} ± {x['loss_standard_error']:.1f}") for x in rows]
        return [str(rows[0]["sentences"]), *cells[0], *cells[1]]

    def shifted(name):
        drivers = next(shifts[word] for word in re.findall(r"\w+", name) if word in shifts)
        return [score(drivers["answers"]), score(drivers["policy"])]

    def agreed(answer):
        rows = [agreement[when][answer] for when in ("before_ppo", "after_ppo")]
        return [f"{rows[0]['decisions']:,}", *(percent(row["agreement"]) for row in rows)]

    text = fill("| turned by", came_back, text)
    text = fill("| asked |", lost, text)
    text = fill("| picture |", shifted, text)
    changed = "\n".join(f"| {change} | {count} |" for change, count in agreement["changes"].items())
    text = re.sub(
        r"(\| the model says -> the policy does \| decisions \|\n\|[-|]*\n)[^\n]*(?:\n\|[^\n]*)*", rf"\1{changed}", text
    )
    return fill("| the model says | decisions", agreed, text)


def fill_rounds(text):
    """One round of captions beside those of the model that ships: exact answers, and what is obeyed after PPO."""
    folders = PUBLISHED / "one_round", PUBLISHED / ROUNDS[-1]
    logs = [read_log(folder / "lora_log.csv")[-1] for folder in folders]
    exact = {"exact answers to the plain question": "exact_match", "to questions about the scene": "exact_scene"}
    drives = read_json(folders[0] / "ppo.json")["obeyed"], read_json(BENCHMARKS / "obedience.json")["policy"]["rows"]
    groups = {name: group for group, name in obedience.GROUPS.items()}

    def cells(name):
        if name in exact:
            return [percent(log[exact[name]]) for log in logs]
        if name not in groups:
            return None
        return [percent(np.mean([x["obeyed"] for x in rows if x["group"] == groups[name]])) for rows in drives]

    return fill("| one round and six |", cells, text)


def fill_from_nothing(text):
    """Minutes of each script, what its policy scores and, where that was measured, obeys."""
    folder = PUBLISHED / "from_nothing"
    columns = "amd_cb1ac85", "amd_0efb9bf", "slower_cb1ac85", "slower_5d2d434"
    made = [read_json(folder / f"{name}.json") for name in columns]
    drives = read_json(folder / "amd_obedience.json")["policy"]["rows"]
    groups = {x: y for y, x in obedience.GROUPS.items()}

    def cells(name):
        if name in from_nothing.SCRIPTS:
            return [f"{x['seconds'][name] / 60:.1f}" if name in x["seconds"] else "" for x in made]
        if name in groups:
            return ["", percent(np.mean([x["obeyed"] for x in drives if x["group"] == groups[name]])), "", ""]
        if name == "all but evaluate":
            return [f"{sum(x['seconds'][script] for script in from_nothing.SCRIPTS[:-1]) / 60:.1f}" for x in made]
        text = "{}, laps {laps_finished_percent:.0f} %, min {min:.0f}"
        return [text.format(score(x), **x) if "mean" in x else "" for x in made]

    return fill("| from nothing |", cells, text)


def fill_speed(text):
    claims = read_json(BENCHMARKS / "results.json")

    def ratio(name):
        lowest, highest = claims[name]["ratio_range"]
        return [f"{claims[name]['median_ratio']:.2f}", f"{lowest:.2f} to {highest:.2f}"]

    return fill("| measured in turns |", ratio, text)


def fill_limits(text):
    rows = read_json(BENCHMARKS / "limits.json")
    parts = rows["drawn frame"]["parts_ms"]

    def cells(name):
        if name in parts:
            return [f"{parts[name]:.2f}", "", ""]
        return [f"{rows[name][x]:.2f}" for x in ("ms", "limit_ms", "times_the_limit")]

    return fill("| on one core |", cells, text)


def fill_processes(text):
    rows = read_json(BENCHMARKS / "torchrun.json")

    def cells(processes):
        row = rows[processes]
        laps = "laps {laps_finished_percent:.0f} %, min {min:.0f}".format(**row)
        return [str(row["total_updates"]), f"{row['frames_per_second']:.0f}", f"{score(row)}, {laps}"]

    return fill("| processes |", cells, text)


def fill_page(text):
    rows = {
        str(row["sessions"]): [*map(str, row.values())][1:] for row in read_json(BENCHMARKS / "page.json")["together"]
    }
    return fill("| visitors", rows.get, text)


def replace(heading, table, text):
    """The page with `table` in the place of the first one in the section `heading`, if it has both."""
    section = re.compile(rf"(^{heading}\n(?:(?!#|\|).*\n)*)(?:\|.*\n)+", re.MULTILINE)
    return section.sub(lambda match: f"{match[1]}{table}\n", text)


def over_seeds(rows):
    """What runs by seed say together: their number, mean and interval, the worst one, bad drives, laps."""
    told = seeds.summarize(rows)
    mean = "{mean} ({interval[0]} to {interval[1]})" if len(rows) > 1 else "{mean}"
    shares = (f"{told[name]:.1f} %" for name in ("below_500_percent", "laps_finished_percent"))
    return [str(len(rows)), mean.format(**told), f"{min(told['seeds'].values()):.1f}", *shares]


def fill_runs(text):
    """The tables that their benchmarks write, each below its heading, and what several seeds say together."""
    text = replace("## Whole runs", ablations.table(ablations.OUTPUT / "fifth_round"), text)
    text = replace("## Half runs", ablations.table(ablations.OUTPUT / "first_model"), text)
    found = controls.load_runs()
    several = {"PPO": runs.load(seeds.OUTPUT)} | {name: found.get(arm, {}) for name, arm in CONTROLS.items()}
    text = replace("## Ten seeds", seeds.table(several["PPO"]), text)
    text = fill("| 100 test tracks |", lambda name: over_seeds(several[name]) if several[name] else None, text)
    return replace("## What words add", controls.table(found), text)


def filled(text):
    """A page's text with its tables filled anew."""
    for fill_some in (
        fill_scores, fill_gains, fill_training, fill_obedience, fill_contradictions, fill_learned, fill_benchmarks,
        fill_rounds, fill_from_nothing, fill_speed, fill_limits, fill_processes, fill_page, fill_runs,
        fill_scores_of_readme,
    ):  # fmt: skip
        text = fill_some(text)
    return text


def fill_scores_of_readme(text):
    """Rows of docs/results.md without the links, for a page that has none."""
    if SCORE.search(text):
        return text
    rows = [line.split("|") for line in fill_scores((ROOT / "docs" / "results.md").read_text()).splitlines()]
    plain = {
        row[1].strip(): [re.sub(r"\[(.*?)\].*", r"\1", cell).strip() for cell in row[2:-1]]
        for row in rows
        if len(row) > 2
    }
    return fill("| driver | held out", plain.get, text)


def main():
    for page in PAGES:
        before = page.read_text()
        after = filled(before)
        if after != before:
            run_files.write_file(page, after.encode())
            print(page.relative_to(ROOT))


if __name__ == "__main__":
    checks.run(main)
