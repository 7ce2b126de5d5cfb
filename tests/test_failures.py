"""What goes wrong while a script runs: one line, the old output kept, no process left.

A run that is killed or fails, and is resumed, ends in the same numbers as one that was left alone.
"""

import multiprocessing
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import COLLECT, PPO, STAGE2, edit, toy_script
from toy_process import Toy, at_call, die, files, fill_the_disk, press_ctrl_c, rows, run, same

from support import run_files
from support.checks import BadInput, read_json
from support.run_files import ROOT

KILLED = -signal.SIGKILL


def collect(folder):
    edit(COLLECT, OUTPUT_DIR=str(folder), NUM_WORKERS=1).main()


@pytest.mark.parametrize("fault", ["worker", "parent", "ctrl-c", "disk"])
def test_stage_1_fails(fault, tmp_path):
    output = tmp_path / "CarRacing-Data"
    run_files.write_json(output / "run.json", {"script": f"{COLLECT}.py"})  # of an earlier run
    before, toy = files(output), Toy(collect, output)
    while not list(tmp_path.glob("CarRacing-Data.partial/validation/*.png")):
        assert toy.process.is_alive(), toy.end()
        time.sleep(0.05)
    pid = toy.process.pid
    happens = {
        "worker": psutil.Process(pid).children()[-1].kill,  # before it comes multiprocessing's resource tracker
        "parent": toy.process.kill,
        "ctrl-c": lambda: press_ctrl_c(pid),
        "disk": lambda: fill_the_disk(pid),
    }
    happens[fault]()
    code, said = toy.end()
    assert code == (KILLED if fault == "parent" else 1) and files(output) == before, said
    assert ("error: " in said) == (fault in ("worker", "disk")), said


def test_a_second_run_in_the_same_folder(toy_base, tmp_path, script):
    results = tmp_path / "results"
    with run_files.lock(results), pytest.raises(BadInput, match=str(results)):
        toy_script(PPO, tmp_path, MODEL=str(toy_base)).main()


def test_output_that_nobody_reads():
    code = "from support import checks; checks.run(lambda: print('x' * 1_000_000))"
    command = f'"{sys.executable}" -c "{code}" | head -c 1'
    reader = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert (reader.stdout, reader.stderr) == ("x", "")


def test_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert run_files.run_facts()["git_commit"] == "unknown"


def reinforce(root, base, resume=False, fault="", updates=8):
    """Stage 3 with a LoRA, instructions and throws; in the second update from now on a fault happens.

    Episodes of 30 decisions do not end where updates do.
    """
    toy = dict(TRAIN_LORA=True, CHANGE=0.1, THROWN=0.01, NUM_STEPS=24, MINIBATCH_SIZE=24, TOTAL_UPDATES=updates)
    ppo = toy_script(PPO, root, MODEL=str(base), RESUME=resume, **toy)

    def half_write():
        for name in ("state.pt.partial", "video_final.partial.mp4"):
            (root / "results" / name).write_text("half")
        die()

    faults = {
        "rollout": (30, ppo, "to_simulator", die),  # between two decisions
        "log": (2, run_files, "save_state", die),  # after the rows of the update, before its state
        "state": (2, run_files, "save_state", half_write),
        "worker": (30, ppo, "to_simulator", lambda: multiprocessing.active_children()[0].kill()),
        "ctrl-c": (30, ppo, "to_simulator", press_ctrl_c),
        "disk": (2, run_files, "save_state", fill_the_disk),
    }
    if fault:
        at_call(*faults[fault])
    ppo.main()


FAULTS = {"rollout": KILLED, "log": KILLED, "state": KILLED, "worker": 1, "ctrl-c": 1, "disk": 1}


def test_ppo_resumes_exactly(toy_base, tmp_path, script):
    """Starts that end badly and a last one, against one start; then it is made longer."""
    alone, hurt = tmp_path / "alone" / "results", tmp_path / "hurt" / "results"
    code, output = run(reinforce, alone.parent, toy_base)
    assert code == 0, output
    for done, (fault, expected) in enumerate(FAULTS.items(), 1):
        code, output = run(reinforce, hurt.parent, toy_base, done > 1, fault)
        assert code == expected and ("error: " in output) == (fault in ("worker", "disk")), output
        assert run_files.load_state(hurt / "state.pt")["update"] == done, fault
        assert bool(list(hurt.glob("*.partial*"))) == (fault == "state"), fault
    code, output = run(reinforce, hurt.parent, toy_base, True)
    assert code == 0, output
    for name in ("reward_log.csv", "update_log.csv", "eval_log.csv"):
        assert rows(hurt / name) == rows(alone / name), name
    weights = files(hurt / "policy")["policy.safetensors"]
    assert weights == files(alone / "policy")["policy.safetensors"] and len(rows(alone / "reward_log.csv")) > 5
    states = [run_files.load_state(results / "state.pt") for results in (alone, hurt)]
    assert same(*states)
    for part in ("lora_B", "policy_head.2"):
        assert any(p.abs().max() > 0 for name, p in states[0]["model"].items() if part in name)
    reinforce(hurt.parent, toy_base, resume=True, updates=9)
    assert rows(hurt / "update_log.csv")[:-1] == rows(alone / "update_log.csv")
    history = read_json(hurt / "run.json")["history"]
    assert len(history) == 7 and history[-1]["changed_afterwards"]["TOTAL_UPDATES"] == 8


def fine_tune(root, pipeline, resume, fault=""):
    """Stage 2 of the pipeline with outputs in `root`, to which something happens."""
    inputs = dict(BASE_MODEL=f"{pipeline}/git-toy", DATA_DIR=f"{pipeline}/CarRacing-Data")
    stage2 = toy_script(STAGE2, root, RESUME=resume, **inputs)
    faults = {
        "second epoch": (8, stage2.Trainer, "training_step", die),
        "checkpoint": (1, torch, "save", die),  # after the weights, before the optimizer's state
        "ctrl-c": (2, stage2.Trainer, "training_step", press_ctrl_c),
        "disk": (1, stage2, "save_adapter", lambda: fill_the_disk(size=10_000)),  # less than the weights
    }
    if fault:
        at_call(*faults[fault])
    stage2.main()


def test_fine_tuning_resumes_exactly(pipeline, tmp_path):
    """Starts that end badly and a last one, against the pipeline's; then a full disk at the very end.

    The adapter that is there stays whole until another one is.
    """
    shutil.copytree(pipeline.adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").write_text("old")

    def start(resume, fault, expected):
        before = files(tmp_path / "adapter")
        code, output = run(fine_tune, tmp_path, pipeline.root, resume, fault)
        assert code == expected and ("error: " in output) == (fault == "disk"), output
        assert (files(tmp_path / "adapter") == before) == bool(fault), output

    start(False, "second epoch", KILLED)
    start(True, "checkpoint", KILLED)
    start(True, "ctrl-c", 1)
    start(True, "", 0)
    assert rows(tmp_path / "results" / "lora_log.csv") == rows(pipeline.results / "lora_log.csv")
    ours, theirs = files(tmp_path / "adapter"), files(pipeline.adapter)
    for name in ("adapter_model.safetensors", "adapter_config.json", "task.json"):
        assert ours[name] == theirs[name], name
    start(True, "disk", 1)
