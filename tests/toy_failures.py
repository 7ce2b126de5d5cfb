"""A stage at toy size in a process of its own, and something goes wrong: `python toy_failures.py SCRIPT ROOT BASE FAILURE`.

SCRIPT: "collect", "fine-tune" or "evaluate". FAILURE: "worker" (a worker process is killed), "parent" (this one is), "ctrl-c" (SIGINT to all
processes of the group, as a terminal sends it), "disk" (no file can grow further), or "nan" (the loss is).
"""

import os
import resource
import signal
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import toy_lora  # noqa: E402
from toy_ppo import die, die_at_call  # noqa: E402

import checks  # noqa: E402
import collect_captions  # noqa: E402
import evaluate  # noqa: E402
import train_git_lora_carllava_style as stage2  # noqa: E402


def collect(root, base):
    collect_captions.OUTPUT_DIR, collect_captions.VALIDATION_FRAMES = str(root / "output"), 32
    return collect_captions


def fine_tune(root, base):
    toy_lora.write_data(root / "data")
    stage2.BASE_MODEL, stage2.DATA_DIR, stage2.OUTPUT_DIR = base, str(root / "data"), str(root / "output")
    stage2.RESULTS_DIR, stage2.CHECKPOINT_DIR = str(root / "results"), str(root / "checkpoints")
    stage2.MIN_FRAMES, stage2.EPOCHS, stage2.BATCH_SIZE = 1, 1000, 8
    return stage2


def drive(root, base):
    evaluate.DRIVER, evaluate.RESULTS_DIR, evaluate.NUM_ENVS = "teacher", str(root / "output"), 2
    evaluate.NUM_TRACKS = 1 if sys.argv[4] == "disk" else 100
    return evaluate


def fail_later(failure, script):
    """Arrange that the failure happens a moment after the work has begun."""

    def children():
        listed = Path(f"/proc/{os.getpid()}/task").glob("*/children")
        return [int(pid) for path in listed for pid in path.read_text().split()]

    def kill_a_worker():
        for pid in children():
            if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                return os.kill(pid, signal.SIGKILL)

    def fill_the_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, 4_000))

    if failure == "disk":
        fill_the_disk()
    elif failure == "nan":
        step = script.Trainer.training_step
        script.Trainer.training_step = die_at_call(3, step, lambda *args: step(*args) * float("nan"))
    else:
        happen = {"worker": kill_a_worker, "parent": die, "ctrl-c": lambda: os.killpg(0, signal.SIGINT)}[failure]
        bar = script.tqdm if hasattr(script, "tqdm") else script.Collator
        once = []

        def begun(*args, **kwargs):
            once or (once.append(1), threading.Timer(2, happen).start())
            return bar(*args, **kwargs)

        setattr(script, bar.__name__, begun)


def main(script, root, base, failure):
    script = {"collect": collect, "fine-tune": fine_tune, "evaluate": drive}[script](Path(root), base)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
    fail_later(failure, script)
    checks.run(script.main)


if __name__ == "__main__":
    main(*sys.argv[1:])
