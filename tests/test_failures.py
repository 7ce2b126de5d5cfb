"""What goes wrong while a script runs: one line, the old output kept, no process left.

A run that is killed or fails, and is resumed, ends in the same numbers as one that was left alone.
"""

import multiprocessing
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from unittest import mock
from unittest.mock import Mock

import psutil
import pytest
import torch
from conftest import COLLECT, PPO, STAGE2, TOY_SHAPE, edit, toy_script
from toy_process import Toy, at_call, die, files, fill_the_disk, press_ctrl_c, rows, run, same

import instructions
from offline import train_teacher
from support import checks, run_files
from support.checks import BadInput, read_json
from support.run_files import ROOT
from teacher import load_teacher

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


def test_a_second_run_in_the_same_folder_where_git_is_missing(toy_base, tmp_path, script, monkeypatch):
    monkeypatch.setenv("PATH", "")
    results = tmp_path / "results"
    with run_files.lock(results), pytest.raises(BadInput, match=str(results)):
        toy_script(PPO, tmp_path, MODEL=str(toy_base)).main()


def test_output_that_nobody_reads():
    code = "from support import checks; checks.run(lambda: print('x' * 1_000_000))"
    command = f'"{sys.executable}" -c "{code}" | head -c 1'
    reader = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert (reader.stdout, reader.stderr) == ("x", "")


def test_a_full_disk_is_one_line_also_where_torch_writes():
    with pytest.raises(SystemExit, match="error: cannot write"):
        checks.run(lambda: torch.save(torch.ones(100_000), "/dev/full"))


def reinforce(root, base, resume=False, fault="", updates=8):
    """Stage 3 with a LoRA, instructions and throws, episodes that do not end where updates do, and perhaps a fault."""
    toy = dict(TRAIN_LORA=True, CHANGE=0.1, THROWN=0.01, NUM_STEPS=24, MINIBATCH_SIZE=24, TOTAL_UPDATES=updates)
    ppo = toy_script(PPO, root, MODEL=str(base), RESUME=resume, **toy)
    faults = {
        "rollout": (60, ppo, "to_simulator", die),  # between two decisions
        "log": (2, run_files, "save_state", die),  # after the rows of the update, before its state
        "worker": (60, ppo, "to_simulator", lambda: multiprocessing.active_children()[0].kill()),
        "ctrl-c": (60, ppo, "to_simulator", press_ctrl_c),
        "disk": (2, run_files, "save_state", fill_the_disk),
    }
    if fault:
        at_call(*faults[fault])
    if fault == "disk":  # of which TensorBoard's own thread tells in a traceback
        run_files.tensorboard = lambda *_: None
    ppo.main()


def test_ppo_resumes_exactly(toy_base, tmp_path, script):
    """Starts that end badly and a last one, against one start; then it is made longer."""
    alone, hurt = tmp_path / "alone" / "results", tmp_path / "hurt" / "results"
    run(reinforce, alone.parent, toy_base)
    hurt.mkdir(parents=True)
    (hurt / "video_final.mp4").write_text("of the run before")
    for done, fault in enumerate(("rollout", "log", "worker", "ctrl-c", "disk"), 1):
        code, error = KILLED if fault in ("rollout", "log") else 1, fault in ("worker", "disk")
        run(reinforce, hurt.parent, toy_base, done > 1, fault, code=code, error=error)
        assert run_files.load_state(hurt / "state.pt")["update"] == done, fault
        assert not (hurt / "video_final.mp4").exists()
    (hurt / "video_episode_200.partial.mp4").write_text("half")  # as if killed while it was filmed
    run(reinforce, hurt.parent, toy_base, True)
    assert not list(hurt.glob("*.partial*"))
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
    assert len(history) == 6 and history[-1]["changed_afterwards"]["TOTAL_UPDATES"] == 8
    described = read_json(hurt / "run.json")
    described["inputs"]["device"] = "another"
    run_files.write_json(hurt / "run.json", described)
    with pytest.raises(BadInput, match="device"):
        reinforce(hurt.parent, toy_base, resume=True, updates=9)


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
    """Against the pipeline's; then a full disk. The adapter that is there stays whole until another one is."""
    shutil.copytree(pipeline.adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").write_text("old")

    def start(resume, fault, code):
        before = files(tmp_path / "adapter")
        run(fine_tune, tmp_path, pipeline.root, resume, fault, code=code, error=fault == "disk")
        assert (files(tmp_path / "adapter") == before) == bool(fault), fault

    start(False, "second epoch", KILLED)
    start(True, "checkpoint", KILLED)
    start(True, "ctrl-c", 1)
    start(True, "", 0)
    assert rows(tmp_path / "results" / "lora_log.csv") == rows(pipeline.results / "lora_log.csv")
    ours, theirs = files(tmp_path / "adapter"), files(pipeline.adapter)
    for name in ("adapter_model.safetensors", "adapter_config.json", "task.json"):
        assert ours[name] == theirs[name], name
    start(True, "disk", 1)


def test_git_tiny_learns_and_resumes_exactly(script, tmp_path):
    """Interrupted in the second of its epochs at toy size, and while it is saved, it ends in the same weights."""

    def make(name, **constants):
        toy = dict(TRAIN_FRAMES=48, VALIDATION_FRAMES=8, BATCH_SIZE=16, EPOCHS=3, SAVE_EVERY=2, **TOY_SHAPE)
        module = script("offline/make_git_tiny", OUTPUT_DIR=str(tmp_path / name), **toy, **constants)
        module.STATE = tmp_path / f"{name}.pt"
        module.processes = Mock(workers=lambda number: nullcontext(map))  # the frames come from this process
        return module

    for resume, call, function in ((False, 6, "train_step"), (True, 1, "save")):
        interrupted = make("hurt", RESUME=resume)
        at_call(call, interrupted, function, Mock(side_effect=KeyboardInterrupt))
        torch.manual_seed(99)
        with pytest.raises(KeyboardInterrupt):
            interrupted.main()
        losses = run_files.load_state(interrupted.STATE)["losses"]
        assert losses[3] < losses[0] and [path.name for path in tmp_path.iterdir()] == ["hurt.pt"]
    fewer = mock.patch.object(instructions, "held_out_sentences", lambda: {"crawl"})
    with fewer, pytest.raises(BadInput, match="words"):
        make("hurt", RESUME=True).main()
    make("hurt", RESUME=True).main()
    make("alone").main()
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("alone", "hurt")]
    assert weights[0] == weights[1]
    for left_out in ("WISHES", "FITS"):
        make(left_out, **{left_out: 0}).main()


def test_the_teachers_training_is_logged_and_goes_on(tmp_path):
    toy = dict(NUM_WORKERS=1, ENVS_PER_WORKER=2, NUM_STEPS=32, MINIBATCH_SIZE=32, EVAL_EVERY=1)
    toy["OUTPUT_DIR"] = str(tmp_path)
    for updates, resume in ((2, False), (3, True)):
        toy |= dict(TOTAL_UPDATES=updates, RESUME=resume, EVAL_TRACKS=range(100_000, 100_001))
        with mock.patch.multiple(train_teacher, **toy):
            train_teacher.main()
    assert [row["update"] for row in rows(tmp_path / "teacher_log.csv")] == ["1", "2", "3"]
    assert load_teacher(tmp_path / "teacher.safetensors")
