"""The README and docs/ give the numbers of the files they name; what git holds and what installation reads."""

import ast
import json
import re
import subprocess
import sys

import numpy as np

from benchmarks import ablations, obedience
from support.run_files import ROOT, read_log

PUBLISHED, BENCHMARKS = ROOT / "results" / "published", ROOT / "benchmarks"
README = (ROOT / "README.md").read_text()
RESULTS, LANGUAGE, ABLATIONS = (
    (ROOT / "docs" / f"{name}.md").read_text() for name in ("results", "language", "ablations")
)
COMES_WITH = {"PIL": "pillow", "pygame": "gymnasium", "huggingface_hub": "transformers"}
SCORE = re.compile(r"\[(-?[\d.]+ ± [\d.]+)\]\(\.\./results/published/([\w/]+\.json)\)(?:, laps (\d+) %, min (-?\d+))?")


def read(path):
    return json.loads(path.read_text())


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
    found = SCORE.findall(RESULTS)
    for text, file, laps, worst in found:
        facts = read(PUBLISHED / file)
        assert text == score(facts), file
        assert not laps or (laps, worst) == (f"{facts['laps_finished_percent']:.0f}", f"{facts['min']:.0f}"), file
    rows = [[SCORE.sub(r"\1", cell) for cell in row] for row in table(RESULTS, "| driver | held out")]
    assert all(row in rows for row in table(README, "| driver | held out")) and len(found) >= 7


def test_paired_differences_and_the_run():
    for place in ("held_out", "test"):
        policy, answers = (read(PUBLISHED / place / f"eval_{name}.json") for name in ("policy", "answers"))
        difference = np.subtract(policy["returns"], answers["returns"])
        assert policy["seeds"] == answers["seeds"]
        assert f"{difference.mean():.1f} ± {difference.std(ddof=1) / len(difference) ** 0.5:.1f}" in RESULTS
    means = [float(row["mean"]) for row in read_log(PUBLISHED / "eval_log.csv") if row["driver"] == "policy"]
    assert " -> ".join(f"{mean:.1f}" for mean in means) in RESULTS
    rounds = [read_log(PUBLISHED / path)[1:] for path in ("lora_log.csv", "second_round/lora_log.csv")]
    epochs = [("second round" if second else row["epoch"], row) for second in (0, 1) for row in rounds[second]]
    for cells, (name, row) in zip(table(RESULTS, "| epoch |"), epochs, strict=True):
        losses = [f"{float(row[loss]):.3f}" for loss in ("average_loss", "validation_loss")]
        assert cells == [name, *losses, percent(row["exact_match"])]
    for kind, *shares in table(LANGUAGE, "| kind |"):
        names = [f"exact_{kind}_{split}" for split in ("taught", "held_out")]
        assert shares == [percent(row[name]) if row.get(name) else "" for name in names], kind


def test_obedience():
    measured = read(BENCHMARKS / "obedience.json")

    def mean(driver, group):
        obeyed = [row["obeyed"] for row in measured[driver]["rows"] if row["group"] == group]
        return percent(np.mean(obeyed)) if obeyed else ""

    groups = {name: group for group, name in obedience.GROUPS.items()} | {"told nothing, judged as if told": "nothing"}
    groups |= {"told to stop, then to drive on": "changed"}
    for name, *cells in table(LANGUAGE, "| obeyed, share"):
        assert cells == [mean(driver, groups[name]) for driver in ("answers", "policy", "teacher")], name
    for name, *cells in table(README, "| obeyed, share"):
        assert cells == [mean(driver, groups[name]) for driver in ("answers", "policy")], name
    rows = {(driver, row["group"], row["instruction"]): row for driver in measured for row in measured[driver]["rows"]}
    columns = ("answers", "taught"), ("answers", "held_out"), ("policy", "taught"), ("policy", "held_out")
    for name, *cells in table(LANGUAGE, "| instruction |"):
        for cell, (driver, group) in zip(cells, (*columns, ("policy", "nothing"), ("teacher", "taught"))):
            group = "new" if (driver, "new", name) in rows and group not in ("nothing", "taught") else group
            group = "new" if driver == "teacher" and (driver, "taught", name) not in rows else group
            row = rows.get((driver, group, name))
            assert cell == (percent(row["obeyed"]) if row else ""), (name, driver, group)
    for names, *cells in table(LANGUAGE, "| told |"):
        row = rows["policy", "contradictory", names.replace(", ", " + ")]
        shares = [percent(row[f"obeyed_{name}"]) for name in names.split(", ")]
        assert cells == [*shares, f"{row['mean_speed']:.0f}", f"{row['mean_offset']:.1f}"]


def test_recovery_prompts_pictures_and_agreement():
    measured = read(BENCHMARKS / "recovery.json")
    for angles, drives, *cells in table(RESULTS, "| turned by"):
        policy, teacher = measured["policy"][angles], measured["teacher"][angles]
        assert drives == str(policy["drives"])
        assert cells == [percent(x) for x in (policy["came_back"], teacher["came_back"], policy["coasting"])], angles
    measured = read(BENCHMARKS / "prompts.json")
    for group, sentences, *cells in table(LANGUAGE, "| asked |"):
        rows = [measured[driver]["groups"][group] for driver in ("answers", "policy")]
        assert sentences == str(rows[0]["sentences"])
        losses = [[f"{row['mean']:.1f}", f"{row['loss']:.1f} ± {row['loss_standard_error']:.1f}"] for row in rows]
        assert cells == losses[0] + losses[1], group
    shifts = read(BENCHMARKS / "shifts.json")["shifts"].values()
    for cells, row in zip(table(LANGUAGE, "| picture"), shifts, strict=True):
        assert cells[1:] == [score(row["answers"]), score(row["policy"])]
    facts = read(BENCHMARKS / "agreement.json")
    for answer, decisions, *shares in table(LANGUAGE, "| the model says | decisions"):
        assert decisions == f"{facts['after_ppo'][answer]['decisions']:,}"
        assert shares == [percent(facts[when][answer]["agreement"]) for when in ("before_ppo", "after_ppo")]
    assert {name: int(count) for name, count in table(LANGUAGE, "| the model says ->")} == facts["changes"]


def test_ablations_and_speed():
    assert ablations.table() in ABLATIONS
    medians = {f"{row['median_ratio']:g}" for row in read(BENCHMARKS / "results.json").values()}
    assert {ratio for row in table(RESULTS, "| what | compared with") for ratio in row[2].split(" / ")} <= medians


def test_the_page_costs():
    measured = read(BENCHMARKS / "page.json")
    for cells, row in zip(table(RESULTS, "| visitors"), measured["together"], strict=True):
        assert cells == [str(x) for x in row.values()]
    latency, soak = measured["latency_ms"], measured["soak"]
    assert latency["of"] == 50 and f"median {latency['median']} ms, worst {latency['worst']} ms" in RESULTS
    for number in (soak["memory_mb"][0], soak["memory_mb"][-1]):
        assert f"{number} MB" in RESULTS
    assert f"{soak['threads_before']} threads before and {soak['threads_after']} after" in RESULTS


def test_one_page_whose_python_runs():
    """The block that is followed by what it prints."""
    assert README.count("\n") <= 150 and len(README.split()) <= 1500
    code, printed = re.search(r"```python\n([^`]*)```\n\n```\n([^`]*)```", README).groups()
    code = f"import torch; torch.set_num_threads(1)\n{code}"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, printed), run.stderr


def git_files():
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    return [path for path in map(ROOT.joinpath, listed.stdout.split("\n")) if path.is_file()]


def test_what_is_imported_is_required_within_limits():
    files = [ROOT / name for name in ("requirements.txt", "requirements-demo.txt")]
    lines = [line for file in files for line in file.read_text().splitlines() if line[:2] != "-r"]
    limits = dict(re.match(r"([\w-]+)(?:\[\w+\])?(\S+)", line).groups() for line in lines)
    assert all(re.fullmatch(r">=[\d.]+,<[\d.]+|==[\d.]+", x) for x in limits.values()) and limits["torch"][:2] == "=="
    sources = [path for path in git_files() if path.suffix == ".py" and path.parent.name not in ("tests", "benchmarks")]
    nodes = [node for path in sources for node in ast.walk(ast.parse(path.read_text()))]
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    own = {path.stem for path in sources} | {path.parent.name for path in sources}
    foreign = {name.split(".")[0] for name in imported} - own - sys.stdlib_module_names
    assert {COMES_WITH.get(name, name) for name in foreign} <= limits.keys() and len(foreign) > 8


def test_git_holds_weights_and_no_pickles():
    weights = ["offline/teacher", "offline/git-tiny/model", "lora_git_caption_model_carllava/adapter_model"]
    assert {ROOT / f"{name}.safetensors" for name in [*weights, "results/published/policy/policy"]} <= set(git_files())
    for path in git_files():
        assert path.suffix not in (".pt", ".pth", ".pkl", ".bin") and path.stat().st_size < 10e6, path
