"""The files that installation reads, and what importing a script does."""

import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["collect_captions", "train_git_lora_carllava_style", "ppo_git_with_prompt", "evaluate"]


def test_environment_yml():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == "carllava-rl"
    assert any(re.fullmatch(r"python=3\.1[0-3]", str(d)) for d in environment["dependencies"])
    assert {"pip": ["-r requirements.txt"]} in environment["dependencies"]


def test_requirements_pin_what_must_be_pinned():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert "torch==2.13.0" in lines
    assert any(line.startswith("transformers>=5.18,<6") for line in lines)
    assert any(line.startswith("gymnasium[box2d]") for line in lines)


def test_importing_defines_and_does_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(SCRIPTS)}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert list(tmp_path.iterdir()) == []


def test_bad_input_ends_a_script_with_one_line(tmp_path):
    script = (ROOT / "train_git_lora_carllava_style.py").read_text()
    copy = tmp_path / "stage2.py"
    copy.write_text(script.replace('DATA_DIR = "CarRacing-Data"', f"DATA_DIR = {str(tmp_path)!r}"))
    done = subprocess.run(
        [sys.executable, str(copy)], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stdout == ""
    assert (
        done.stderr.strip().splitlines()[-1] == f"error: no captions in {tmp_path}/train: run collect_captions.py first"
    )
    assert "Traceback" not in done.stderr
