"""How a script ends: one clear line for what its user can fix.

Every script's `main` runs inside `run`; whatever is wrong with its input is raised as `BadInput` where it is noticed.
"""

import errno
import json
import os
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

CANNOT_WRITE = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST
}  # fmt: skip
TORCH_CANNOT_WRITE = ("inline_container.cc", "iostream error")  # in the RuntimeError of a torch.save on a full disk


class BadInput(ValueError):
    """Something the user can fix: the message names the file or constant and the remedy."""


def run(main):
    """Run a script's `main`; what its user can fix ends it with one line instead of a traceback."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that has no "±" prints "?"
    try:
        main()
        sys.stdout.flush()
    except BadInput as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(
            "stopped by Ctrl-C; what was written before is kept; a script that has RESUME goes on with RESUME = True"
        ) from None
    except BrokenPipeError:  # the reader of our output, as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except BrokenProcessPool:
        raise SystemExit(
            "error: a worker process ended (killed, or out of memory?): start again, with fewer NUM_WORKERS if it "
            "recurs"
        ) from None
    except (OSError, RuntimeError, SafetensorError) as error:
        if not about_writing(error):
            raise
        raise SystemExit(
            f"error: cannot write ({error}): make room on the disk (or in /dev/shm, where processes share memory), or "
            "name another folder; what was written before is kept"
        ) from None


def about_writing(error):
    """Whether a file could not be written; a SafetensorError is about that, as `read_weights` catches the others."""
    if isinstance(error, OSError):
        return error.errno in CANNOT_WRITE
    return isinstance(error, SafetensorError) or any(sign in str(error) for sign in TORCH_CANNOT_WRITE)


def check_same(artifact, saved, ours, remedy):
    """Raise BadInput naming the first of the facts `ours` with which `artifact` was not made.

    `saved` and `ours` are dicts; `artifact` names the file or folder that `saved` was read from.
    """
    for name, value in ours.items():
        if saved.get(name) != value:
            raise BadInput(f"{artifact} was made with {name} = {saved.get(name)!r}, now it is {value!r}: {remedy}")


def check_shapes(file, weights, ours, remedy):
    """Raise BadInput if tensors `weights` of a file have other names or shapes than `ours`, both dicts by name."""
    saved, now = ({name: tuple(p.shape) for name, p in tensors.items()} for tensors in (weights, ours))
    check_same(file, saved, dict.fromkeys(saved) | now, remedy)


def read_json(path, remedy="restore it, or run the script that writes it again"):
    """A json file's object; BadInput names the file if it is missing or damaged."""
    try:
        return dict(json.loads(Path(path).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f"cannot read {path} ({error}): {remedy}") from None


def read_weights(path):
    """A safetensors file's tensors by name; BadInput names the file if it is missing, damaged or not finite."""
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"cannot read {path} ({error}): restore it, or run the script that writes it again") from None
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise BadInput(f"{path} holds numbers that are not finite: restore it, or run the script that writes it again")
    return weights
