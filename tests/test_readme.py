"""The README and docs/ give the numbers of the files that they name, link to what exists, and their code runs."""

import re
import subprocess
import sys

import numpy as np

from benchmarks import ablations, obedience
from support.checks import read_json
from support.run_files import ROOT, read_log

PUBLISHED, BENCHMARKS = ROOT / "results" / "published", ROOT / "benchmarks"
PAGES = {page.stem: page for page in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}
README, RESULTS, LANGUAGE, ABLATIONS = (PAGES[x].read_text() for x in ("README", "results", "language", "ablations"))
ROUNDS = ("second_round", "third_round", "fourth_round")  # of captions, after the first
SCORE = re.compile(r"\[(-?[\d.]+ ± [\d.]+)\]\(\.\./results/published/([\w/]+\.json)\)(?:, laps (\d+) %, min (-?\d+))?")


def score(facts):
    return f"{facts['mean']:.1f} ± {facts['std']:.1f}"


def percent(share):
    return f"{100 * float(share):.1f} %"


def table(page, heading):
    """The rows of the table that begins with `heading`, each a list of cells."""
    lines = page[page.index(heading) :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_scores():
    """Every linked score; the README's rows are the same without the links."""
    for text, file, laps, worst in SCORE.findall(RESULTS):
        facts = read_json(PUBLISHED / file)
        assert text == score(facts), file
        assert not laps or (laps, worst) == (f"{facts['laps_finished_percent']:.0f}", f"{facts['min']:.0f}"), file
    rows = [[SCORE.sub(r"\1", cell) for cell in row] for row in table(RESULTS, "| driver | held out")]
    assert all(row in rows for row in table(README, "| driver | held out")) and len(SCORE.findall(RESULTS)) >= 7


def test_the_training_runs():
    means = [float(row["mean"]) for row in read_log(PUBLISHED / "eval_log.csv") if row["driver"] == "policy"]
    assert " -> ".join(f"{mean:.1f}" for mean in means) in RESULTS
    rounds = [read_log(PUBLISHED / place / "lora_log.csv")[1:] for place in (".", *ROUNDS)]
    for (_, *cells), row in zip(table(RESULTS, "| epoch |"), sum(rounds, []), strict=True):
        losses = [f"{float(row[loss]):.3f}" for loss in ("average_loss", "validation_loss")]
        assert cells == [*losses, percent(row["exact_match"])]


def test_obedience():
    measured = read_json(BENCHMARKS / "obedience.json")
    rows = {(driver, x["group"], x["instruction"]): x for driver in measured for x in measured[driver]["rows"]}
    groups = {name: group for group, name in obedience.GROUPS.items()}
    groups |= {"told nothing, judged as if told": "nothing", "told to stop, then to drive on": "changed"}
    for page, drivers in ((LANGUAGE, ("answers", "policy", "teacher")), (README, ("answers", "policy"))):
        for name, *cells in table(page, "| obeyed, share"):
            each = [[x["obeyed"] for key, x in rows.items() if key[:2] == (y, groups[name])] for y in drivers]
            assert cells == [percent(np.mean(obeyed)) if obeyed else "" for obeyed in each], name
    for name, *cells in table(LANGUAGE, "| instruction |"):
        new = (name not in obedience.CASES["taught"]) and "new"
        columns = [(driver, group) for driver in ("answers", "policy") for group in ("taught", new or "held_out")]
        found = [
            rows.get((*column, name)) for column in (*columns, ("policy", "nothing"), ("teacher", new or "taught"))
        ]
        assert cells == [percent(row["obeyed"]) if row else "" for row in found], name


def test_recovery_prompts_pictures_and_agreement():
    measured = read_json(BENCHMARKS / "recovery.json")
    for angles, *cells in table(RESULTS, "| turned by"):
        policy, teacher = (measured[driver][angles.removeprefix("all of ")] for driver in ("policy", "teacher"))
        shares = map(percent, (policy["came_back"], teacher["came_back"], policy["coasting"]))
        assert cells == [str(policy["drives"]), *shares], angles
    measured = read_json(BENCHMARKS / "prompts.json")
    for group, sentences, *cells in table(LANGUAGE, "| asked |"):
        rows = [measured[driver]["groups"][group] for driver in ("answers", "policy")]
        losses = [(f"{x['mean']:.1f}", f"{x['loss']:.1f} ± {x['loss_standard_error']:.1f}") for x in rows]
        assert sentences == str(rows[0]["sentences"]) and cells == [*losses[0], *losses[1]], group
    shifts = read_json(BENCHMARKS / "shifts.json")["shifts"].values()
    for (_, *cells), row in zip(table(LANGUAGE, "| picture"), shifts, strict=True):
        assert cells == [score(row["answers"]), score(row["policy"])]
    facts = read_json(BENCHMARKS / "agreement.json")
    for answer, _, *cells in table(LANGUAGE, "| the model says | decisions"):
        assert cells == [percent(facts[when][answer]["agreement"]) for when in ("before_ppo", "after_ppo")]


def test_ablations_speed_and_page():
    assert ablations.table() in ABLATIONS
    medians = {f"{row['median_ratio']:g}" for row in read_json(BENCHMARKS / "results.json").values()}
    assert {ratio for *_, ratio in table(RESULTS, "| what | compared with")} <= medians
    together = read_json(BENCHMARKS / "page.json")["together"]
    assert table(RESULTS, "| visitors") == [[*map(str, row.values())] for row in together]


def test_links_lead_somewhere():
    for page in PAGES.values():
        links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
        assert [link for link in links if not (page.parent / link).exists()] == [], page


def test_the_code_of_the_readme_prints_what_it_says():
    code, printed = re.search(r"```python\n([^`]*)```\n\n```\n([^`]*)```", README).groups()
    code = f"import torch; torch.set_num_threads(1)\n{code}"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, printed), run.stderr
