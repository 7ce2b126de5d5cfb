"""What every script does with its input: one clear line for what the user can mend.

Reads what it is told to; every script imports it.
"""

import errno
import importlib
import inspect
import json
import multiprocessing
import os
import re
import sys
import threading
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from run_files import ROOT

CANNOT_WRITE = {errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EDQUOT, errno.EFBIG}


class BadInput(ValueError):
    """Something the user can mend: the message names the file or constant and the remedy. Scripts end with that line."""


def run(main):
    """Run a script; what the user can mend, a full disk included, ends it with one line instead of a traceback."""
    try:
        main()
    except BadInput as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped by Ctrl-C; what was written before is kept") from None
    except BrokenProcessPool:
        raise SystemExit(
            "error: a worker process ended (killed, or out of memory?): start again, with fewer NUM_WORKERS if it recurs"
        ) from None
    except (OSError, SafetensorError, RuntimeError) as error:
        code = re.search(r"os error (\d+)", str(error))  # safetensors has the number in its text only
        number = int(code[1]) if code else getattr(error, "errno", None)
        in_torch_save = re.search("PytorchStreamWriter|unexpected pos", str(error))
        if number not in CANNOT_WRITE and not in_torch_save:
            raise
        raise SystemExit(
            f"error: cannot write ({str(error).splitlines()[0]}): make room or choose another folder; what was written "
            "before is kept"
        ) from None


def duration(seconds):
    """How long two CPU cores take, for a script's first line; the caller's `seconds` are measured ones, scaled."""
    return f"about {max(1, round(seconds / 60))} min on two CPU cores"


def check_constants(script, **ranges):
    """Fail early if a script's constants are of another type or out of range, naming the constant.

    `script` is its `globals()`; each range is (type, low, high) with both ends allowed, None for no bound.
    """
    for name, (kind, low, high) in ranges.items():
        value = script[name]
        number = kind is float and type(value) is int
        if type(value) is not kind and not number:
            wrong = f"it must be of type {kind.__name__}"
        elif (low is not None and value < low) or (high is not None and value > high):
            wrong = f"it must lie in [{'-inf' if low is None else low}, {'inf' if high is None else high}]"
        else:
            continue
        raise BadInput(f"{name} = {value!r} in {Path(script['__file__']).name}: {wrong}")


def constants_of(*names):
    """The UPPER_CASE constants of modules by name, for `set_constants` in a spawned process, which imports the files anew."""
    return {
        name: {key: x for key, x in vars(sys.modules[name]).items() if key.isupper() and not inspect.ismodule(x)}
        for name in names
    }


def set_constants(constants):
    """Assign what `constants_of` returned in another process."""
    for name, values in constants.items():
        vars(importlib.import_module(name)).update(values)


def end_with_the_parent():
    """In a worker process: end when the parent is killed. An executor's processes would wait for jobs for ever."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def replaceable(output_dir):
    """The folder that OUTPUT_DIR means, a link's target; BadInput if replacing it whole would take more than its output."""
    output = (ROOT / output_dir).resolve()
    if ROOT.is_relative_to(output) or (output / "published").exists():
        raise BadInput(f"OUTPUT_DIR = {output_dir!r} is replaced as a whole: use a folder of its own")
    return output


def read_json(path):
    """A json file's content; BadInput names the file if it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read {path} ({error}): restore it, or run the script that writes it again") from None


def read_weights(path):
    """A safetensors file's tensors by name; BadInput names the file if it is missing or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"cannot read {path} ({error}): restore it, or run the script that writes it again") from None
