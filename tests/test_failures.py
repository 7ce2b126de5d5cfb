"""What goes wrong in stages 1 and 2 and in an evaluation: one line, the old output kept, no process left.

PPO's own failures, after which it also resumes, are in test_resume.py and test_ppo_git_with_prompt.py.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time

import pytest
import torch
import toy_failures

import checks
import collect_captions
import evaluate
import ppo_git_with_prompt as ppo
import run_files
import train_git_lora_carllava_style as stage2

CASES = {
    ("collect", "worker"): "error: a worker process ended",
    ("collect", "parent"): "",
    ("collect", "ctrl-c"): "stopped by Ctrl-C",
    ("collect", "disk"): "error: cannot write .*File too large",
    ("fine-tune", "ctrl-c"): "stopped by Ctrl-C",
    ("fine-tune", "disk"): "error: cannot write",
    ("fine-tune", "nan"): "error: the LoRA loss is not finite: lower LEARNING_RATE",
    ("evaluate", "worker"): "error: a simulator's process ended",
    ("evaluate", "ctrl-c"): "stopped by Ctrl-C",
    ("evaluate", "disk"): "error: cannot write",
}


@pytest.mark.parametrize("script, failure", CASES)
def test_one_line_and_the_old_output_stays(script, failure, toy_base, tmp_path):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "old").write_text("kept")
    command = [sys.executable, toy_failures.__file__, script, tmp_path, toy_base, failure]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    _, output = process.communicate(timeout=90)
    last = [line for line in output.splitlines() if line.strip()][-1]
    assert process.returncode == (-signal.SIGKILL if failure == "parent" else 1), output
    assert re.search(CASES[script, failure], last), output
    assert "Traceback" not in output
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["old"]
    for _ in range(50):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.2)
    raise AssertionError("orphan processes are left")


@pytest.mark.parametrize("script", [collect_captions, stage2, ppo, evaluate])
def test_a_folder_that_cannot_be_written_is_found_before_the_work(script, pipeline, constants, tmp_path, capsys):
    """A file in the folder's place: root, as which tests may run, can write to read-only ones."""
    (tmp_path / "file").write_text("")
    blocked = str(tmp_path / "file" / "results")
    constants(collect_captions, OUTPUT_DIR=blocked)
    constants(stage2, BASE_MODEL=str(pipeline.base), DATA_DIR=str(pipeline.data), MIN_FRAMES=1, BATCH_SIZE=8)
    constants(stage2, RESULTS_DIR=blocked, OUTPUT_DIR=str(tmp_path / "adapter"), CHECKPOINT_DIR=str(tmp_path / "c"))
    constants(ppo, ADAPTER=str(pipeline.adapter), RESULTS_DIR=blocked, NUM_ENVS=2)
    constants(evaluate, DRIVER="teacher", RESULTS_DIR=blocked)
    began = time.time()
    with pytest.raises(SystemExit, match="error: cannot write .*choose another folder"):
        checks.run(script.main)
    assert time.time() - began < 30 and (tmp_path / "file").read_text() == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become a user who may not write")
def test_a_read_only_folder():
    code = """
import os, pathlib, sys
import checks, run_files
os.seteuid(65534)
checks.run(lambda: run_files.check_writable(pathlib.Path(sys.argv[1])))
"""
    with tempfile.TemporaryDirectory() as folder:
        for mode, returncode, message in ((0o777, 0, ""), (0o755, 1, "error: cannot write .*Permission denied")):
            os.chmod(folder, mode)
            command = [sys.executable, "-c", code, folder]
            finished = subprocess.run(command, cwd=run_files.ROOT, stderr=subprocess.PIPE, text=True)
            assert finished.returncode == returncode and re.search(message, finished.stderr), finished.stderr


def test_only_checkpoints_that_parse_are_resumed_from(tmp_path, capsys):
    for step, state in ((10, "{}"), (20, "{}"), (30, '{"epoch": 3')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert stage2.last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-20")
    assert "checkpoint-30 is not complete: the one before is used" in capsys.readouterr().out
    for step in (10, 20):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").unlink()
    assert stage2.last_complete_checkpoint(tmp_path) is None
    assert "starts from the beginning" in capsys.readouterr().out


def test_an_interrupted_replacement_keeps_the_folder(tmp_path):
    """`replace_folder` killed between its two renames: the next call finds the new folder missing and the old one whole."""
    for name in ("adapter.old", "adapter.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    run_files.replace_folder(tmp_path / "adapter.partial", tmp_path / "adapter")
    assert (tmp_path / "adapter" / "weights").read_text() == "adapter.partial"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    with pytest.raises(FileNotFoundError):  # no new folder: the old one outlives it
        run_files.replace_folder(tmp_path / "none.partial", tmp_path / "adapter")
    assert (tmp_path / "adapter.old" / "weights").read_text() == "adapter.partial"


@pytest.mark.parametrize(
    "message, ends_in_one_line",
    [
        ("[enforce fail at inline_container.cc] . unexpected pos 640 vs 598", True),  # torch.save on a full disk
        ("Error while serializing: I/O error: No space left on device (os error 28)", True),
        ("No such file or directory (os error 2)", False),
    ],
)
def test_what_counts_as_a_full_disk(message, ends_in_one_line):
    def main():
        raise RuntimeError(message)

    with pytest.raises(SystemExit if ends_in_one_line else RuntimeError):
        checks.run(main)


def test_answers_follow_a_fused_optimizer(toy_model, frames):
    """The Trainer's fused AdamW does not raise the parameters' version: `train` and `eval` drop the collected weights."""
    toy_model.add_lora(2, 4)
    toy_model.has_lora = False  # the answers are those of the model with its LoRA, as in stage 2
    lora = [p for name, p in toy_model.named_parameters() if "lora_" in name]
    before = toy_model.answer_log_probs(frames)
    optimizer = torch.optim.AdamW(lora, lr=0.5, fused=True)
    for p in lora:
        p.grad = torch.ones_like(p)
    toy_model.train()
    optimizer.step(), optimizer.step()
    toy_model.eval()
    assert not torch.allclose(toy_model.answer_log_probs(frames), before)
