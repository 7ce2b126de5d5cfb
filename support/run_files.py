"""What a run leaves behind: files that appear whole, CSV logs that a resumed run continues, and `run.json`."""

import csv
import dataclasses
import fcntl
import hashlib
import io
import json
import os
import pickle
import platform
import re
import shutil
import subprocess
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import Box2D
import torch
from tqdm import tqdm

from support.checks import BadInput, read_json

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "peft", "gymnasium", "numpy", "numba", "pygame-ce")


def write_file(path, content):
    """Write bytes so that the file appears whole or not at all."""
    partial = Path(f"{path}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def add_to_json(path, parts):
    """Put `parts` into a json file, begun if it is not there; returns all that it holds."""
    whole = (read_json(path) if path.exists() else {}) | parts
    write_json(path, whole)
    return whole


def write_json(path, facts):
    """Write a json file, and the folder it lies in."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_file(path, (json.dumps(facts, indent=1) + "\n").encode())


def facts_hash(facts):
    """A short hash of what json can hold; the order of its keys counts."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def file_hash(path):
    """A short hash of a file's bytes."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


# folders


def check_writable(folder):
    """Make a folder and fail as writing its files would, before the work that fills it."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
    return folder


def made_by(folder):
    """The script that a folder's run.json names, None without one."""
    facts = folder / "run.json"
    return read_json(facts, "remove it, or name another folder").get("script") if facts.exists() else None


def check_own(folder, script, *others):
    """Raise BadInput if `folder` holds files, but by its run.json not those of `script`, or holds one of `others`.

    Only such folders may be replaced or cleared, with whatever else lies in them. Returns the folder, a link's target.
    """
    folder = folder.resolve()
    if any(other.resolve().is_relative_to(folder) for other in others):
        raise BadInput(f"{folder}/ is replaced as a whole: put no other output there")
    if folder.exists() and any(folder.iterdir()):
        if made_by(folder) != script:
            raise BadInput(f"{folder}/ holds files that {script} did not make and would replace: name another folder")
    return folder


def clear(folder, script, *others):
    """Empty a folder that `script` made and that holds none of `others`, or make it."""
    folder = check_own(folder, script, *others)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def replace_folder(partial, folder):
    """Put a finished folder in the place of another one, which is only removed when the new one is there."""
    old = Path(tempfile.mkdtemp(".old", folder.name, folder.parent))  # of a name that nobody has given a copy
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def lock(folder):
    """Hold a folder as long as the returned file is open; a killed process lets go by itself."""
    file = (check_writable(folder) / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadInput(f"another run is writing {folder}/: wait for it, or set RESULTS_DIR to another folder") from None
    return file


# logs


class Log:
    """A CSV file that grows by one flushed row at a time.

    `keep_until` continues an earlier run's file: its rows whose `key`, the count of updates or epochs, is larger are
    dropped.
    """

    def __init__(self, path, *, key="update", keep_until=None):
        rows = read_log(path) if keep_until is not None else []
        kept = [row for row in rows if int(row[key]) <= keep_until]
        self.path, self.fields = path, list(kept[0]) if kept else None
        text = io.StringIO()
        if kept:
            writer = csv.DictWriter(text, self.fields)
            writer.writeheader()
            writer.writerows(kept)
            write_file(path, text.getvalue().encode())
        else:
            path.unlink(missing_ok=True)

    def write(self, row):
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.fields or list(row))
            if self.fields is None:
                self.fields = list(row)
                writer.writeheader()
            writer.writerow({key: float(f"{x:.6g}") if isinstance(x, float) else x for key, x in row.items()})


def read_log(path):
    """The whole rows of a CSV log as dicts of strings; [] if it is not there."""
    if not path.exists():
        return []
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if None not in row.values()]  # a full disk cuts the last row short


class RunLogs:
    """What a PPO run writes while it trains: three CSV logs, run.json and, if TensorBoard is installed, its scalars.

    `state`, of a run that continues, says after which update. Without it the logs, state and videos of an earlier run
    in `folder` are deleted; its policy and graphs stay until they are replaced. A context manager: it holds the folder,
    so that no other run writes there, and brings run.json up to date when it ends. BadInput if another script's files
    lie there.
    """

    def __init__(self, folder, run, state=None):
        if any((folder / name).exists() for name in ("run.json", "state.pt", "tensorboard")):
            if made_by(folder) != run["script"]:
                raise BadInput(f"{folder}/ holds files that {run['script']} did not make: name another RESULTS_DIR")
        self.folder, self.run, self.lock = folder, run, lock(folder)
        write_run(folder, run)
        if not state:
            (folder / "state.pt").unlink(missing_ok=True)
            shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        for pattern in ("video_episode_*", "video_final*"):
            for video in folder.glob(f"{pattern}.partial*" if state else pattern):  # partial: it was killed
                video.unlink()
        last_update = state["update"] if state else None
        names = ("reward", "update", "eval")
        self.rewards, self.updates, self.evaluations = (
            Log(folder / f"{name}_log.csv", keep_until=last_update) for name in names
        )
        frames = [int(row["env_frames"]) for row in read_log(self.updates.path)]
        self.writer = tensorboard(folder / "tensorboard", max(frames, default=0))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        write_run(self.folder, self.run)
        if self.writer:
            self.writer.close()
        self.lock.close()

    def episode(self, row):
        """A finished episode; of one under instructions the return says little and gets a name of its own."""
        self.rewards.write(row)
        told = "_told" if row["told"] else ""
        self._scalars({f"charts/episodic_{name}{told}": row[name] for name in ("return", "length")}, row)

    def update(self, row):
        """A finished update."""
        self.updates.write(row)
        write_run(self.folder, self.run)
        self._scalars({f"losses/{name}": x for name, x in row.items() if name not in ("update", "env_frames")}, row)

    def evaluation(self, row):
        """An evaluation on the validation tracks."""
        self.evaluations.write(row)
        tqdm.write("update {update}, {driver}: {mean:.1f} ± {std:.1f} on the validation tracks".format(**row))
        self._scalars({f"eval/{row['driver']}_return": row["mean"]}, row)

    def _scalars(self, scalars, row):
        for name, x in scalars.items() if self.writer else ():
            self.writer.add_scalar(name, x, row["env_frames"])


def tensorboard(folder, last_frame):
    """TensorBoard's writer, None where it is not installed; what was written after `last_frame` is hidden."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder, purge_step=last_frame + 1)


# the state of a training run


def save_state(path, state):
    """Replace the resumable state at once, so that a kill at any moment leaves a whole one."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_file(path, buffer.getvalue())


def load_state(path):
    """What `save_state` wrote; BadInput if it is missing or damaged. Nothing in it is executed."""
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except (OSError, RuntimeError, EOFError, TypeError, ValueError, pickle.UnpicklingError) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise BadInput(f"cannot read {path} ({reason}): restore it, or set RESUME to False to start anew") from None


# run.json


def run_facts():
    """Git commit ("unknown" without git, with "+" if the tree has changes), library versions and machine."""

    def git(*args):
        return subprocess.run(["git", *args], capture_output=True, text=True, cwd=ROOT).stdout.strip()

    try:
        commit = git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except OSError:
        commit = ""
    versions = {"python": platform.python_version(), "Box2D": Box2D.__version__}  # it has several names on PyPI
    return {
        "git_commit": commit or "unknown",
        "versions": versions | {name: version(name) for name in PACKAGES},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
    }


def constants_of(*namespaces):
    """The UPPER_CASE constants of modules, given as `vars(module)`, as json holds them: {file name: {name: value}}."""

    def plain(value):
        if dataclasses.is_dataclass(value):
            return dataclasses.asdict(value)
        return str(value) if isinstance(value, range) else list(value) if isinstance(value, tuple) else value

    constants = {
        Path(namespace["__file__"]).name: {
            name: plain(value)
            for name, value in namespace.items()
            if name.isupper() and isinstance(plain(value), (int, float, str, list, dict))
        }
        for namespace in namespaces
    }
    # with lists and strings where json has no tuples, no numbers as keys, no functions or classes
    return json.loads(json.dumps(constants, default=lambda x: re.sub(" at 0x[0-9a-f]+", "", str(x))))


def describe_run(*namespaces, **facts):
    """What `run.json` says of a run: script, constants of the modules that it uses, `facts`, commit, versions, machine.

    `namespaces` are the `globals()` of the script and `vars()` of the modules; `facts` are its inputs, such as the hash
    of the adapter that it starts from.
    """
    script = Path(namespaces[0]["__file__"]).name
    run = {"script": script, "constants": constants_of(*namespaces), "inputs": facts, **run_facts()}
    return run | {"began": time.time(), "seconds": 0.0}


def continue_run(folder, run, may_change):
    """The description `run` of a resumed run with that of the run in `folder` as its history; see `continue_from`."""
    saved = read_json(Path(folder) / "run.json", "set RESUME to False to start anew")
    return continue_from(f"{folder}/", saved, run, may_change)


def continue_from(where, saved, run, may_change):
    """The description `run` of a resumed run with `saved`, that of the run it continues, as its history.

    The constants that `may_change` may differ, each change is kept there; anything else that differs is BadInput, which
    says `where` the run lies.
    """

    def settings(run):
        files = reversed(run.get("constants", {}).values())  # the script is the first, and wins over its modules
        return {name: x for constants in files for name, x in constants.items()}

    before, now = (settings(x) | x.get("inputs", {}) for x in (saved, run))
    changed = {name: before.get(name) for name in before | now if before.get(name) != now.get(name)}
    for name in changed.keys() - may_change:
        raise BadInput(
            f"{where} is of a run with {name} = {before.get(name)!r}, now {now.get(name)!r}: put it back, or set "
            "RESUME to False to start anew"
        )
    earlier = {"git_commit": saved["git_commit"], "seconds": saved["seconds"], "changed_afterwards": changed}
    return run | {"seconds": saved["seconds"], "history": [*saved.get("history", []), earlier]}


def until_now(run):
    """A run's description with the seconds until now, those of the runs that it continues included."""
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run["began"]))
    return run | {"began": began, "seconds": round(run["seconds"] + time.time() - run["began"])}


def write_run(folder, run):
    """Write `run.json` with the seconds until now."""
    write_json(Path(folder) / "run.json", until_now(run))
