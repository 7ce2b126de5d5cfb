"""Functions in processes of their own that a test kills, interrupts or lets run out of disk.

Each starts from a server that has imported the scripts, and leads a process group as a command in a terminal does.
"""

import atexit
import contextlib
import itertools
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
from conftest import edit

from support import checks, run_files

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["ppo_git_with_prompt", "train_git_lora_carllava_style", "collect_captions"])

TOY_SIZE = dict(
    NUM_ENVS=2, TORCH_THREADS=1, NUM_STEPS=24, TOTAL_UPDATES=8, WARMUP_UPDATES=1, EVALUATIONS=1, MINIBATCH_SIZE=24,
    EVAL_TRACKS=range(100_000, 100_001),
)  # fmt: skip


def run_script(name, constants):
    """A script's `main` with other constants."""
    edit(name, **constants).main()


def fill_the_disk(process=0, size=1):
    """From now on no file of this process, or of the one with this id, can grow beyond `size` bytes."""
    resource.prlimit(process, resource.RLIMIT_FSIZE, (size, size))


def begin(output, function, args):
    """In the new process: `function(*args)` as a script's `main`, its output to the connection `output`, in ASCII."""
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # back to Python's own
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    output.close()
    sys.stdout, sys.stderr = (open(stream, "w", 1, encoding="ascii", closefd=False) for stream in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    checks.run(lambda: function(*args))


class Toy:
    """A running `function(*args)` and its `output` so far."""

    def __init__(self, function, *args):
        self.output, (self.reader, writer) = "", context.Pipe(duplex=False)
        self.process = context.Process(target=begin, args=(writer, function, args))
        self.process.start()
        atexit.register(self.process.kill)  # whatever a failed test left
        writer.close()
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()

    def read(self):
        while chunk := os.read(self.reader.fileno(), 65536):
            self.output += chunk.decode()

    def workers(self):
        """Its child processes."""
        children = psutil.Process(self.process.pid).children()
        return [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]

    def wait_for(self, condition):
        """Wait until `condition()` holds."""
        while not condition():
            assert self.process.is_alive(), self.output
            time.sleep(0.05)

    def fail(self, fault):
        """Let something go wrong: "worker" or "parent" (killed), "ctrl-c" (as a terminal sends it) or "disk"."""
        pid = self.process.pid
        if fault == "worker":
            self.workers()[0].kill()
        if fault == "parent":
            os.kill(pid, signal.SIGKILL)
        if fault == "ctrl-c":
            os.killpg(pid, signal.SIGINT)
        if fault == "disk":
            fill_the_disk(pid)

    def end(self):
        """Wait for the end, of its workers too; returns the exit code (negative: a signal) and the output."""
        self.process.join(120)
        with contextlib.suppress(ProcessLookupError):
            for _ in range(100):
                os.killpg(self.process.pid, 0)  # workers notice within seconds that their parent is gone
                time.sleep(0.1)
            raise AssertionError("processes are left")
        self.thread.join(10)
        return self.process.exitcode, self.output


def run(function, *args):
    """`function(*args)` in a process of its own: exit code and output."""
    return Toy(function, *args).end()


def error_line(output):
    """The only line of an output that starts with "error: ", which ends it."""
    assert "Traceback" not in output, output
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and output.rstrip().endswith(lines[0]), output
    return lines[0]


def files(folder):
    """The content of every file in a folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows(path):
    """A log without the columns that a clock fills."""
    clock = ("decisions_per_second", "update_share", "seconds")
    return [{name: x for name, x in row.items() if name not in clock} for row in run_files.read_log(path)]


def toy_ppo(folder, base, **edits):
    """The PPO script at toy size; episodes of 30 frames do not end where updates do. `edits` are constants by file."""
    toy = {"car_racing_env": dict(MAX_FRAMES=30)}
    toy["ppo_git_with_prompt"] = TOY_SIZE | dict(MODEL=str(base), RESULTS_DIR=str(folder))
    for name in ("car_racing_env", "GitText2ActionWithPrompt", "teacher", "film", "evaluate", "ppo_git_with_prompt"):
        module = edit(name, **toy.get(name, {}) | edits.get(name, {}))
    module.car_racing_env.make_env().reset(seed=0)  # loads what numba compiled, for all processes that are forked later
    return module


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(number, function, instead=die):
    """`function`, but its `number`th call kills the process, or calls `instead`."""
    calls = itertools.count(1)
    return lambda *args, **kwargs: (instead if next(calls) == number else function)(*args, **kwargs)


def inject(fault, ppo, resume):
    """Arrange a fault in the second update of this start.

    "rollout" (killed between two decisions), "log" (killed when the update's row is written and its state is not),
    "state" (killed while the state is written), "worker" (a simulator is killed), "ctrl-c", "disk" (full at the state).
    """
    rollout, save_state, log_update = ppo.rollout, run_files.save_state, run_files.RunLogs.update

    def hurt_rollout(envs, *args, **kwargs):
        if fault == "rollout":
            envs.step = at_call(20, envs.step)
        if fault == "worker":
            envs.processes[0].kill()
        if fault == "ctrl-c":
            os.killpg(0, signal.SIGINT)
        return rollout(envs, *args, **kwargs)

    def hurt_save(path, state):
        if fault == "state":
            Path(f"{path}.partial").write_text("half")
            die()
        if fault == "disk":
            fill_the_disk()
        save_state(path, state)

    ppo.rollout = at_call(2, rollout, hurt_rollout)
    second = 2 if resume else 3  # the first start saves before training too
    run_files.save_state = at_call(second, save_state, hurt_save)
    if fault == "log":
        run_files.RunLogs.update = at_call(2, log_update, lambda *args: (log_update(*args), die()))


RESUMED = dict(TRAIN_LORA=True, INSTRUCTED_ENVS=1, CHANGE=0.1, THROWN=0.01)


def ppo_main(folder, base, resume="", fault=""):
    """A toy PPO run to which `fault` happens; `resume` continues it if there is a state."""
    resume = bool(resume) and (Path(folder) / "state.pt").exists()
    ppo = toy_ppo(folder, base, ppo_git_with_prompt=RESUMED | dict(RESUME=resume))
    inject(fault, ppo, resume)
    ppo.main()
