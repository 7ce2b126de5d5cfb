"""The README and docs/ give the numbers of the files they name; what git holds and what installation reads."""

import ast
import json
import re
import subprocess
import sys

import numpy as np

from benchmarks import ablations
from support.run_files import ROOT, read_log

PUBLISHED, BENCHMARKS = ROOT / "results" / "published", ROOT / "benchmarks"
README, RESULTS, ABLATIONS = ((ROOT / p).read_text() for p in ("README.md", "docs/results.md", "docs/ablations.md"))
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
    for text, file, laps, worst in SCORE.findall(RESULTS + ABLATIONS):
        facts = read(PUBLISHED / file)
        assert text == score(facts), file
        assert not laps or (laps, worst) == (f"{facts['laps_finished_percent']:.0f}", f"{facts['min']:.0f}"), file
    rows = [[SCORE.sub(r"\1", cell) for cell in row] for row in table(RESULTS, "| driver | held out")]
    assert all(row in rows for row in table(README, "| driver | held out")) and len(rows) > 10


def test_seeds_and_paired_differences():
    policies = ["held_out/eval_policy", "held_out/eval_policy_seed1", "held_out/eval_policy_seed2", "test/eval_policy"]
    runs = [read(PUBLISHED / f"{name}.json") for name in (*policies, "rebuilt/held_out/eval_policy")]
    places = ["held_out"] * 3 + ["test", "rebuilt/held_out"]
    for row, run, place in zip(table(RESULTS, "| policy | tracks"), runs, places, strict=True):
        answers = read(PUBLISHED / place / "eval_answers.json")
        difference = np.subtract(run["returns"], answers["returns"])
        assert run["seeds"] == answers["seeds"]
        assert row[2] == f"{difference.mean():.1f} ± {difference.std(ddof=1) / len(difference) ** 0.5:.1f}", row
    means = [run["mean"] for run in runs[:3]]
    assert f"three seeds ± std over seeds | {np.mean(means):.1f} ± {np.std(means, ddof=1):.1f} |" in RESULTS


def test_runs_and_epochs():
    for name, *cells in table(RESULTS, "| run | start"):
        rows = read_log(PUBLISHED / re.search(r"published/(.*eval_log.csv)", name)[1])
        means = [float(row["mean"]) for row in rows if row["driver"] == "policy"]
        assert cells == [f"{mean:.1f}" for mean in (*means, max(means))], name
    for cells, row in zip(table(RESULTS, "| epoch |"), read_log(PUBLISHED / "lora_log.csv"), strict=True):
        losses = [f"{float(row[name]):.3f}" for name in ("average_loss", "validation_loss")]
        assert cells == [row["epoch"], *losses, percent(row["exact_match"])]


def test_what_the_words_do():
    prompts = read(BENCHMARKS / "prompts.json")["prompts"].values()
    for cells, row in zip(table(ABLATIONS, "| prompt"), prompts, strict=True):
        shares = [percent(row[name]) for name in ("exact_answers", "unparsable_share")]
        assert cells == [f'"{row["prompt"]}"', *shares, score(row["answers"]), score(row["policy"])]
    shifts = read(BENCHMARKS / "shifts.json")["shifts"].values()
    for cells, row in zip(table(ABLATIONS, "| picture"), shifts, strict=True):
        assert cells[1:] == [score(row["answers"]), score(row["policy"])]
    facts = read(BENCHMARKS / "agreement.json")
    for answer, decisions, *shares in table(ABLATIONS, "| the model says | decisions"):
        assert decisions == f"{facts['after_ppo'][answer]['decisions']:,}"
        assert shares == [percent(facts[when][answer]["agreement"]) for when in ("before_ppo", "after_ppo")]
    assert {name: int(count) for name, count in table(ABLATIONS, "| the model says ->")} == facts["changes"]
    nearest = read(BENCHMARKS / "contradiction.json")["nearest"]
    for cells, row in zip(table(ABLATIONS, "| validation frames"), nearest, strict=True):
        shares = [percent(row[name]) for name in ("contradictions", "adapter_errors")]
        assert cells == [f"{row['pairs']:,}", str(row["largest_difference_in_grey_levels"]), *shares]


def test_ablations_and_speed():
    assert ablations.table() in ABLATIONS
    medians = {f"{row['median_ratio']:g}" for row in read(BENCHMARKS / "results.json").values()}
    assert {ratio for row in table(RESULTS, "| what | compared with") for ratio in row[2].split(" / ")} <= medians


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
    lines = (ROOT / "requirements.txt").read_text().splitlines()
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
