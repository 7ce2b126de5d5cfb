"""What goes wrong while a script runs: one line, the old output kept, no process left, no foreign folder cleared.

A run that is killed or fails, and is resumed, ends in the same numbers as one that was left alone.
"""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import toy_lora
from toy_process import RESUMED, Toy, error_line, files, ppo_main, rows, run, run_script, toy_ppo

from support import checks, run_files
from support.checks import BadInput
from support.run_files import ROOT, write_json

STAGE2, KILLED = "train_git_lora_carllava_style", -signal.SIGKILL


def old_output(folder, script):
    """A folder as `script` left it earlier."""
    write_json(folder / "run.json", {"script": f"{script}.py"})
    (folder / "old").write_text("precious")
    return folder


@pytest.mark.parametrize(
    "name, folder, constants, faults",
    [
        ("collect_captions", "OUTPUT_DIR", dict(NUM_WORKERS=1), ("worker", "parent", "ctrl-c", "disk")),
        ("evaluate", "RESULTS_DIR", dict(DRIVER="teacher", NUM_TRACKS=2, VIDEO=False), ("worker", "ctrl-c", "disk")),
    ],
)
def test_a_script_fails(name, folder, constants, faults, tmp_path):
    """All faults at once, each in a run of its own."""
    outputs = {fault: old_output(tmp_path / fault, name) for fault in faults}
    toys = {fault: Toy(run_script, name, constants | {folder: str(outputs[fault])}) for fault in faults}
    for fault, toy in toys.items():
        before = files(outputs[fault])
        toy.wait_for(lambda: "0%" in toy.output and toy.workers())  # noqa: B023
        toy.fail(fault)
        code, output = toy.end()
        assert code == (KILLED if fault == "parent" else 1), output
        assert files(outputs[fault]) == before
        if fault in ("worker", "disk"):
            error_line(output)
        if fault == "ctrl-c":
            assert "Traceback" not in output, output


def run_long(folder, base):
    toy_ppo(folder, base, ppo_git_with_prompt=dict(TOTAL_UPDATES=100_000)).main()


def test_a_second_run_in_the_same_folder(toy_base, tmp_path, script):
    """It ends; a killed run does not hold the folder, and what it left half written goes."""
    first = Toy(run_long, tmp_path, toy_base)
    first.wait_for((tmp_path / "state.pt").exists)
    with pytest.raises(BadInput, match=str(tmp_path)):
        run_long(tmp_path, toy_base)
    first.fail("parent")
    first.end()
    for name in ("video_final.partial.mp4", "reward_curve.png.partial", "state.pt.partial"):
        (tmp_path / name).write_text("half")
    (tmp_path / "adapter.partial").mkdir()  # of stage 2, whose OUTPUT_DIR may be anywhere
    toy_ppo(tmp_path, toy_base, ppo_git_with_prompt=dict(TOTAL_UPDATES=0)).main()
    assert [path.name for path in tmp_path.glob("*.partial*") if path.is_file()] == []


def test_output_that_nobody_reads(tmp_path):
    """`python evaluate.py | head -c 1`: neither a traceback nor a simulator that is said to have died."""
    constants = dict(DRIVER="random", NUM_TRACKS=1, NUM_ENVS=1, RESULTS_DIR=str(tmp_path), VIDEO=False)
    code = f"from toy_process import checks, run_script; checks.run(lambda: run_script('evaluate', {constants!r}))"
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-u", "-c", code]
    evaluation = subprocess.Popen(command, env=os.environ | paths, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    evaluation.stdout.read(1)
    evaluation.stdout.close()
    _, output = evaluation.communicate(timeout=120)
    assert b"Traceback" not in output and b"error" not in output, output


def test_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert run_files.run_facts()["git_commit"] == "unknown"


CLEARED = [("collect_captions", "OUTPUT_DIR"), (STAGE2, "CHECKPOINT_DIR"), (STAGE2, "OUTPUT_DIR")]
CARELESS = [(*place, name) for place in CLEARED for name in ("", "results", "results/published", "file")]


@pytest.mark.parametrize("name, constant, folder", CARELESS)
def test_a_folder_that_is_not_the_scripts_own(name, constant, folder, toy_base, tmp_path, script):
    """In something like a checkout: nothing is deleted."""
    checkout = tmp_path / "checkout"
    for file in (".git/HEAD", "results/published/policy/policy.json", "file"):
        (checkout / file).parent.mkdir(parents=True, exist_ok=True)
        (checkout / file).write_text("precious")
    write_json(checkout / "results" / "run.json", {"script": "ppo_git_with_prompt.py"})
    before, edits = files(checkout), {constant: str(checkout / folder)}
    module = toy_lora.toy_lora(tmp_path, toy_base, **edits) if name == STAGE2 else script(name, **edits)
    with pytest.raises(SystemExit, match=str(checkout / folder)):
        checks.run(module.main)
    assert files(checkout) == before


PAIRS = [("OUTPUT_DIR", "RESULTS_DIR"), ("CHECKPOINT_DIR", "OUTPUT_DIR"), ("CHECKPOINT_DIR", "RESULTS_DIR")]


@pytest.mark.parametrize("inside", ["", "inside"])
@pytest.mark.parametrize("replaced, other", PAIRS)
def test_stage_2_wants_three_folders(replaced, other, inside, toy_base, tmp_path, script):
    """What is replaced as a whole may not hold another output."""
    folder = old_output(tmp_path / "adapter", STAGE2)
    before = files(folder)
    with pytest.raises(BadInput, match=f"{replaced}|{folder}"):
        toy_lora.toy_lora(tmp_path, toy_base, **{replaced: str(folder), other: str(folder / inside)}).main()
    assert files(folder) == before


def same(a, b):
    """Whether two states are equal to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def load(folder):
    return torch.load(folder / "state.pt", weights_only=True)


FAULTS = {"rollout": KILLED, "log": KILLED, "state": KILLED, "worker": 1, "ctrl-c": 1, "disk": 1}


def test_ppo_resumes_exactly(toy_base, tmp_path, script):
    """Starts that end badly and a last one, against one start, with a LoRA, instructions and throws; then it is made longer."""
    alone, hurt = tmp_path / "alone", tmp_path / "hurt"
    code, output = run(ppo_main, alone, toy_base)
    assert code == 0, output
    for done, (fault, expected) in enumerate(FAULTS.items(), 1):
        code, output = run(ppo_main, hurt, toy_base, "yes", fault)
        assert code == expected and (code == KILLED or "Traceback" not in output), output
        assert load(hurt)["update"] == done, fault
        assert bool(list(hurt.glob("*.partial*"))) == (fault == "state"), fault
        if fault in ("worker", "disk"):
            error_line(output)
    code, output = run(ppo_main, hurt, toy_base, "yes")
    assert code == 0 and not list(hurt.glob("*.partial*")), output
    for name in ("reward_log.csv", "update_log.csv", "eval_log.csv"):
        assert rows(hurt / name) == rows(alone / name), name
    assert len(rows(alone / "reward_log.csv")) > 5 and files(hurt / "policy").keys() == files(alone / "policy").keys()
    for name in ("policy.safetensors", "policy.json"):
        assert (hurt / "policy" / name).read_bytes() == (alone / "policy" / name).read_bytes(), name
    state = load(alone)
    assert same(load(hurt), state)
    for part in ("lora_B", "policy_head.2"):
        assert any(p.abs().max() > 0 for name, p in state["model"].items() if part in name)
    toy_ppo(hurt, toy_base, ppo_git_with_prompt=RESUMED | dict(RESUME=True, TOTAL_UPDATES=9)).main()
    assert rows(hurt / "update_log.csv")[:8] == rows(alone / "update_log.csv") and load(hurt)["update"] == 9
    history = json.loads((hurt / "run.json").read_text())["history"]
    assert len(history) == 7 and history[-1]["changed_afterwards"]["TOTAL_UPDATES"] == 8


def test_fine_tuning_resumes_exactly(toy_base, tmp_path, script):
    """Killed in the second epoch, killed while a checkpoint is written, interrupted; then a full disk at the very end.

    The adapter that is there stays whole until another one is.
    """
    alone, hurt = tmp_path / "alone", tmp_path / "hurt"
    code, output = run(toy_lora.main, alone, toy_base)
    assert code == 0, output
    adapter = shutil.copytree(alone / "adapter", hurt / "adapter")
    (adapter / "README.md").write_text("old")
    for fault, expected in (("step", KILLED), ("checkpoint", KILLED), ("ctrl-c", 1)):
        before = files(adapter)
        code, output = run(toy_lora.main, hurt, toy_base, fault != "step", fault)
        assert code == expected and (code == KILLED or "Traceback" not in output), output
        assert files(adapter) == before
    with pytest.raises(BadInput, match="LEARNING_RATE"):
        toy_lora.toy_lora(hurt, toy_base, RESUME=True, LEARNING_RATE=1e-3).main()
    code, output = run(toy_lora.main, hurt, toy_base, "yes")
    assert code == 0, output
    log = rows(hurt / "results" / "lora_log.csv")
    assert [row["epoch"] for row in log] == ["0", "1", "2", "3"] and log == rows(alone / "results" / "lora_log.csv")
    before = files(adapter)
    code, output = run(toy_lora.main, hurt, toy_base, "yes", "disk")
    assert code == 1 and files(adapter) == before
    for name in ("adapter_model.safetensors", "adapter_config.json", "task.json"):
        assert (adapter / name).read_bytes() == (alone / "adapter" / name).read_bytes()
    error_line(output)
