"""The files that installation reads, and what importing a script does."""

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
