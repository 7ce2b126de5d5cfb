"""The README and docs/ give the numbers of the files that they name, link to what exists, and their code runs."""

import re
import subprocess
import sys

import pytest

from offline import fill_tables
from support.checks import read_json
from support.run_files import ROOT, file_hash

PAGES = {page.stem: page for page in fill_tables.PAGES}
README = PAGES["README"].read_text()


@pytest.mark.parametrize("name", PAGES)
def test_the_tables_hold_the_numbers_of_the_files(name):
    """And a wrong number in any table of scores and shares is found."""
    text = PAGES[name].read_text()
    assert fill_tables.filled(text) == text
    if name in ("README", "results", "language", "ablations"):
        damaged = re.sub(r"(?<=[\[ ])\d+\.\d(?=( %| ± [\d.]+)[^|\n]*\|)", "0.1", text)
        assert damaged != text and fill_tables.filled(damaged) == text


def test_every_table_that_is_filled_stands_on_a_page(monkeypatch):
    """A heading that was changed would leave its table as it is, right or wrong."""
    headings, pages = set(), "".join(page.read_text() for page in PAGES.values())
    for name in ("fill", "replace"):
        monkeypatch.setattr(fill_tables, name, lambda heading, _, text: headings.add(heading) or text)
    fill_tables.filled("")
    assert len(headings) > 10 and [heading for heading in headings if f"\n{heading}" not in pages] == []


def test_the_scores_are_those_of_the_policy_that_ships():
    policy = file_hash(ROOT / "results/published/policy/policy.safetensors")
    measured = [read_json(path) for path in ROOT.glob("results/published/*/eval_policy.json")]
    assert len(measured) == 3 and {facts["weights_hash"] for facts in measured} == {policy}


def test_links_lead_somewhere():
    for page in PAGES.values():
        links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
        assert [link for link in links if not (page.parent / link).exists()] == [], page


def test_the_code_of_the_readme_prints_what_it_says():
    code, printed = re.search(r"```python\n([^`]*)```\n\n```\n([^`]*)```", README).groups()
    code = f"import torch; torch.set_num_threads(1)\n{code}"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, printed), run.stderr
