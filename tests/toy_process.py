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
import time

import torch

from support import checks, run_files

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["ppo_git_with_prompt", "train_git_lora_carllava_style", "collect_captions"])


def begin(output, function, args):
    """In the new process: `function(*args)` as a script's `main`, its output to the connection `output`, in ASCII."""
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # back to Python's own
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    output.close()
    sys.stdout, sys.stderr = (open(stream, "w", 1, encoding="ascii", closefd=False) for stream in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as while SDL has a display open; simulators inherit it
    checks.run(lambda: function(*args))


class Toy:
    """A running `function(*args)`; its output goes to a pipe, as a full disk must not silence it."""

    def __init__(self, function, *args):
        self.reader, writer = context.Pipe(duplex=False)
        self.process = context.Process(target=begin, args=(writer, function, args))
        self.process.start()
        atexit.register(self.process.kill)  # whatever a failed test left
        writer.close()

    def end(self):
        """Wait for the end, of its workers too; returns the exit code (negative: a signal) and the output."""
        self.process.join(120)
        with contextlib.suppress(ProcessLookupError):
            for _ in range(100):
                os.killpg(self.process.pid, 0)  # workers notice within seconds that their parent is gone
                time.sleep(0.1)
            raise AssertionError("processes are left")
        with open(self.reader.fileno(), closefd=False) as pipe:
            code, output = self.process.exitcode, pipe.read()
        assert code < 0 or ("Traceback" not in output and output.count("\nerror: ") <= 1), output
        return code, output


def run(function, *args, code=0, error=False):
    """`function(*args)` in a process of its own, which must end with `code`, an `error` with one line that says so."""
    ended, output = Toy(function, *args).end()
    assert (ended, "error: " in output) == (code, error), output


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def press_ctrl_c(process=0):
    """In this process's terminal, or in that of another one's id."""
    os.killpg(process, signal.SIGINT)


def fill_the_disk(process=0, size=1):
    """From now on no file of this process, or of the one with this id, can grow beyond `size` bytes."""
    resource.prlimit(process, resource.RLIMIT_FSIZE, (size, size))


def at_call(number, holder, name, event):
    """Let `event()` happen before the `number`th call of the function `name` of a module or class."""
    function, calls = getattr(holder, name), itertools.count(1)

    def watched(*args, **kwargs):
        if next(calls) == number:
            event()
        return function(*args, **kwargs)

    setattr(holder, name, watched)


def files(folder):
    """The content of every file in a folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows(path):
    """A log without the columns that a clock fills."""
    clock = ("decisions_per_second", "update_share", "seconds")
    return [{name: x for name, x in row.items() if name not in clock} for row in run_files.read_log(path)]


def same(a, b):
    """Whether two states are equal to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
