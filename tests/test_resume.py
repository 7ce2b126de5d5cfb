"""A run killed at any moment and resumed ends in the same numbers as one that was left alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import toy_lora
import toy_ppo

import run_files

CLOCK = ("decisions_per_second", "update_share", "seconds")


def run(script, folder, base, resume="", kill="", *more):
    command = [sys.executable, Path(script.__file__), folder, base, resume, kill, *more]
    with (Path(folder) / "stderr").open("w") as stderr:
        process = subprocess.Popen(command, start_new_session=True, stderr=stderr)
        process.wait(timeout=120)
    for _ in range(50):  # the workers notice within seconds
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return process.returncode
        time.sleep(0.2)
    raise AssertionError("orphan processes are left")


def assert_same_run(folder, alone):
    assert len(run_files.read_log(folder / "reward_log.csv")) > 10
    for name in ("reward_log.csv", "eval_log.csv", "policy/policy.safetensors", "policy/policy.json"):
        assert (folder / name).read_bytes() == (alone / name).read_bytes(), name
    ours, theirs = (
        [{k: v for k, v in row.items() if k not in CLOCK} for row in run_files.read_log(f / "update_log.csv")]
        for f in (folder, alone)
    )
    assert ours == theirs and len(ours) == 4
    ours, theirs = (torch.load(f / "state.pt", weights_only=True) for f in (folder, alone))
    assert all(torch.equal(ours["model"][name], p) for name, p in theirs["model"].items())
    assert ours["processes"][0]["episodes"] == theirs["processes"][0]["episodes"]
    assert torch.equal(ours["processes"][0]["rng"]["cpu"], theirs["processes"][0]["rng"]["cpu"])


@pytest.fixture(scope="module")
def uninterrupted(toy_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert run(toy_ppo, folder, toy_base) == 0
    return folder


@pytest.mark.parametrize("kill", [*toy_ppo.KILLS, *toy_ppo.FAILURES])
def test_killed_and_resumed_equals_uninterrupted(kill, uninterrupted, toy_base, tmp_path):
    code = run(toy_ppo, tmp_path, toy_base, kill=kill)
    if kill in toy_ppo.FAILURES:
        *_, last = (tmp_path / "stderr").read_text().splitlines()
        assert code == 1 and last.startswith("error: ") and toy_ppo.FAILURES[kill] in last
        assert "Traceback" not in (tmp_path / "stderr").read_text()
        assert not list(tmp_path.glob("*.partial"))
    else:
        assert code == -signal.SIGKILL
    assert run(toy_ppo, tmp_path, toy_base, resume="yes") == 0
    assert_same_run(tmp_path, uninterrupted)


def test_a_run_that_trains_lora_resumes_too(toy_base, tmp_path):
    """And one killed before its first update starts from the beginning."""
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    for folder in (alone, killed):
        folder.mkdir()
    assert run(toy_ppo, alone, toy_base, "", "", "lora") == 0
    assert run(toy_ppo, killed, toy_base, "yes", "log", "lora") == -signal.SIGKILL
    assert run(toy_ppo, killed, toy_base, "yes", "", "lora") == 0
    assert_same_run(killed, alone)
    assert any("lora_B" in name for name in torch.load(killed / "state.pt", weights_only=True)["model"])


@pytest.fixture(scope="module")
def uninterrupted_lora(toy_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted_lora")
    assert run(toy_lora, folder, toy_base) == 0
    return folder


@pytest.mark.parametrize("kill", toy_lora.KILLS)
def test_killed_fine_tuning_ends_in_the_same_adapter(kill, uninterrupted_lora, toy_base, tmp_path):
    assert run(toy_lora, tmp_path, toy_base, kill=kill) == -signal.SIGKILL
    assert not (tmp_path / "adapter").exists()
    assert run(toy_lora, tmp_path, toy_base, resume="yes") == 0
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (uninterrupted_lora / name).read_bytes()
    ours, theirs = (run_files.read_log(f / "results" / "lora_log.csv") for f in (tmp_path, uninterrupted_lora))
    assert [row["epoch"] for row in ours] == ["1", "2", "3"]
    assert [row | {"seconds": ""} for row in ours] == [row | {"seconds": ""} for row in theirs]
