"""The README's numbers are those of the files it names."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import ablations

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
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
        assert f'| "{row["prompt"]}" {cells}{scores} |' in README


def test_shift_table():
    results = json.loads((ROOT / "benchmarks" / "shifts.json").read_text())["shifts"]
    for name, row in results.items():
        scores = " | ".join(f"{row[name]['mean']:.1f} ± {row[name]['std']:.1f}" for name in ("answers", "policy"))
        assert f"| {scores} |" in README, name


def test_agreement():
    facts = json.loads((ROOT / "benchmarks" / "agreement.json").read_text())
    after, changes = facts["after_ppo"], facts["changes"]
    brakes = sum(count for name, count in changes.items() if name.endswith("-> Brake"))
    text = " ".join(README.split())
    assert (
        f"{after['all']['agreement']:.1%}".replace("%", " %") + f" of the {after['all']['decisions']:,} decisions"
        in text
    )
    assert f"Of the {sum(changes.values())} others {brakes} brake" in text


def test_ablation_table():
    assert ablations.table() in README


def test_speed_table():
    """Each ratio in the table is one of the benchmarks' medians."""
    results = json.loads((ROOT / "benchmarks" / "results.json").read_text())
    medians = {f"{row['median_ratio']:g}" for row in results.values()}
    table = README[README.index("| times as fast |") :].split("\n\n")[0].splitlines()[2:]
    assert len(table) > 8
    for line in table:
        for ratio in line.split("|")[-2].split("/"):
            assert ratio.strip() in medians, line


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:|#)([^)\s]+)\)", README):
        assert (ROOT / target).exists(), target
