"""What every script does to its input and output: one clear line for what the user can mend, files that appear whole.

Reads and writes what it is told to; every script imports it.
"""

import errno
import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file


class BadInput(ValueError):
    """Something the user can mend: the message names the file or constant and the remedy. Scripts end with that line."""


def run(main):
    """Run a script; what the user can mend, a full disk included, ends it with one line instead of a traceback."""
    try:
        main()
    except BadInput as error:
        raise SystemExit(f"error: {error}") from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EDQUOT, errno.EFBIG):
            raise
        raise SystemExit(
            f"error: {error}: make room or choose another folder; what was written before is kept"
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


def write_file(path, content):
    """Write bytes so that the file appears whole or not at all."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def file_hash(path):
    """A short hash of a file's bytes."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
