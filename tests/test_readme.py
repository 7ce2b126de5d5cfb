"""The README's numbers are those of the files it names."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import run_files
from benchmarks import ablations

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
FINDINGS = (ROOT / "benchmarks" / "README.md").read_text()
CELLS = re.findall(
    r"\[([\d.-]+) ± ([\d.]+)\]\(results/published/([\w./]+\.json)\), laps (\d+) %, min ([\d-]+) \|", README
)


def test_there_are_cells_to_check():
    assert len(CELLS) >= 10


@pytest.mark.parametrize("mean, std, file, laps, worst", CELLS)
def test_driver_table(mean, std, file, laps, worst):
    facts = json.loads((ROOT / "results" / "published" / file).read_text())
    assert (mean, std) == (f"{facts['mean']:.1f}", f"{facts['std']:.1f}")
    assert (laps, worst) == (f"{facts['laps_finished_percent']:.0f}", f"{facts['min']:.0f}")


def test_prompt_table():
    results = json.loads((ROOT / "benchmarks" / "prompts.json").read_text())["prompts"]
    for row in results.values():
        scores = " | ".join(f"{row[name]['mean']:.1f} ± {row[name]['std']:.1f}" for name in ("answers", "policy"))
        cells = f"| {row['exact_answers']:.1%} | {row['unparsable_share']:.1%} | ".replace("%", " %")
        assert f'| "{row["prompt"]}" {cells}{scores} |' in FINDINGS


def test_shift_table():
    results = json.loads((ROOT / "benchmarks" / "shifts.json").read_text())["shifts"]
    for name, row in results.items():
        scores = " | ".join(f"{row[name]['mean']:.1f} ± {row[name]['std']:.1f}" for name in ("answers", "policy"))
        assert f"| {scores} |" in FINDINGS, name


def test_agreement_table():
    facts = json.loads((ROOT / "benchmarks" / "agreement.json").read_text())
    before, after, changes = facts["before_ppo"], facts["after_ppo"], facts["changes"]
    for answer, row in after.items():
        cells = (f"{x['agreement']:.1%}".replace("%", " %") for x in (before[answer], row))
        assert f"| {answer} | {row['decisions']:,} | {' | '.join(cells)} |" in FINDINGS
    brakes = sum(count for name, count in changes.items() if name.endswith("-> Brake"))
    assert f"Of the {sum(changes.values())} others {brakes} brake" in " ".join(FINDINGS.split())
    assert f"{after['all']['agreement']:.1%} of its decisions".replace("%", " %") in " ".join(README.split())


def test_contradiction_table():
    for row in json.loads((ROOT / "benchmarks" / "contradiction.json").read_text())["nearest"]:
        shares = f"{row['contradictions']:.1%} | {row['adapter_errors']:.1%}".replace("%", " %")
        assert f"| {row['pairs']:,} | {row['largest_difference_in_grey_levels']} | {shares} |" in FINDINGS


def test_performance_table():
    """LoRA's loss per epoch, and PPO's greedy score before and after each quarter."""
    published = ROOT / "results" / "published"
    losses = [""] + [f"{float(row['average_loss']):.3f}" for row in run_files.read_log(published / "lora_log.csv")]
    policy = [row for row in run_files.read_log(published / "eval_log.csv") if row["driver"] == "policy"]
    for epoch, (loss, row) in enumerate(zip(losses, policy, strict=True)):
        cells = f"| {epoch or 'start'} | {loss} | {float(row['mean']):.1f} ± {float(row['std']):.1f} |".replace(
            "|  |", "| |"
        )
        assert cells in README


def test_seeds_and_paired_differences():
    """Means over the training seeds, and points a track above the answers alone with their standard error."""
    published = ROOT / "results" / "published"
    read = lambda name: json.loads((published / name).read_text())  # noqa: E731
    names = ["eval_policy", "eval_policy_seed1", "eval_policy_seed2"]
    runs, text = [read(f"held_out/{name}.json") for name in names], " ".join(README.split())
    means = [run["mean"] for run in runs]
    assert f"their mean is {np.mean(means):.1f} ± {np.std(means, ddof=1):.1f}" in text
    pairs = [(run, read("held_out/eval_answers.json")) for run in runs]
    pairs.append((read("test/eval_policy.json"), read("test/eval_answers.json")))
    for run, answers in pairs:
        assert run["seeds"] == answers["seeds"]
        difference = np.subtract(run["returns"], answers["returns"])
        assert f"{difference.mean():.1f} ± {difference.std(ddof=1) / len(difference) ** 0.5:.1f}" in text


def test_rebuilt():
    text = " ".join(README.split())
    for place in ("validation", "held_out"):
        for driver in ("answers", "policy"):
            facts = json.loads((ROOT / f"results/published/rebuilt/{place}/eval_{driver}.json").read_text())
            assert f"{facts['mean']:.1f} ± {facts['std']:.1f}" in text, (place, driver)


def test_ablation_table():
    assert ablations.table() in README


def test_speed_table():
    """Each ratio in the table is one of the benchmarks' medians."""
    results = json.loads((ROOT / "benchmarks" / "results.json").read_text())
    medians = {f"{row['median_ratio']:g}" for row in results.values()}
    table = FINDINGS[FINDINGS.index("| times as fast |") :].split("\n\n")[0].splitlines()[2:]
    assert len(table) > 8
    for line in table:
        for ratio in line.split("|")[-2].split("/"):
            assert ratio.strip() in medians, line


@pytest.mark.parametrize("page", ["README.md", "LOG.md", "benchmarks/README.md", "offline/README.md"])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)\s#]+)\)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(target).exists(), target
