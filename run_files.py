"""What a run leaves behind: files that appear whole, CSV logs that a resumed run continues, and `run.json`.

Writes what it is told to; every script imports it.
"""

import csv
import hashlib
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent


def write_file(path, content):
    """Write bytes so that the file appears whole or not at all."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path, facts):
    """Write a json file, and the folder it lies in."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_file(path, (json.dumps(facts, indent=1) + "\n").encode())


def replace_folder(partial, folder):
    """Put a finished folder in the place of another one, which is only removed when the new one is there."""
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def check_writable(folder):
    """Make a folder and fail as writing its files would, before the work that fills it."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def file_hash(path):
    """A short hash of a file's bytes."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


class Log:
    """A CSV file that grows by one flushed row at a time.

    `keep_until` continues an earlier run's file: its rows whose `key`, the count of updates or epochs, is larger are dropped.
    """

    def __init__(self, path, *, key="update", keep_until=None):
        rows = read_log(path) if keep_until is not None else []
        kept = [row for row in rows if int(row[key]) <= keep_until]
        self.path, self.fields = path, list(kept[0]) if kept else None
        if not kept:
            path.unlink(missing_ok=True)
            return
        partial = path.with_name(path.name + ".partial")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.fields)
            writer.writeheader()
            writer.writerows(kept)
        partial.replace(path)

    def write(self, row):
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.fields or list(row))
            if self.fields is None:
                self.fields = list(row)
                writer.writeheader()
            writer.writerow({key: round(x, 6) if isinstance(x, float) else x for key, x in row.items()})


def read_log(path):
    """The whole rows of a CSV log as dicts of strings; [] if it is not there."""
    if not path.exists():
        return []
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if None not in row.values()]  # a full disk cuts the last row short


def run_facts():
    """Git commit (with "+" if the tree has changes), library versions and machine of this run."""

    def git(*args):
        return subprocess.run(["git", *args], capture_output=True, text=True, cwd=ROOT).stdout.strip()

    packages = ["torch", "transformers", "peft", "gymnasium", "numpy", "numba", "pygame-ce"]
    return {
        "git_commit": git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else ""),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
    }


def write_run(folder, modules, began, facts):
    """Write `run.json`: the constants of the script and of the modules it rests on, `facts`, and the seconds since `began`.

    `modules` has the script first; `facts` are those of `run_facts()` at the start, and whatever else the script knows.
    """
    constants = {
        Path(module.__file__).name: {
            name: str(value) if isinstance(value, range) else value
            for name, value in vars(module).items()
            if name.isupper() and isinstance(value, (int, float, str, list, tuple, range, dict))
        }
        for module in modules
    }
    script, *others = constants.items()
    run = {"script": script[0], "constants": script[1], **dict(others), **facts}
    write_json(Path(folder) / "run.json", run | {"seconds": round(time.time() - began, 1)})
