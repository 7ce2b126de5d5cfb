"""Twenty kills at random moments: not part of the test suite, its last result is in stress_resume.json.

Each toy PPO run is killed with SIGKILL after a random time, again and again until it ends by itself, and must end in the
numbers of the run that was left alone.

    python tests/stress_resume.py      # 8 minutes on two CPU cores
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from conftest import make_toy_base  # noqa: E402

import run_files  # noqa: E402

SEED = 0
KILLS = 20
SCRIPT = ROOT / "tests" / "toy_ppo.py"
OUTPUT = ROOT / "tests" / "stress_resume.json"


def run(folder, base, kill_after=None):
    """One start, resuming what is there; True if it ended by itself."""
    command = [sys.executable, SCRIPT, folder, base, "yes", ""]  # with nothing to resume it starts from the beginning
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(kill_after)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode in (0, -signal.SIGKILL), process.returncode
    return process.returncode == 0


def main():
    rng = random.Random(SEED)
    with tempfile.TemporaryDirectory() as root:
        base, alone = Path(root) / "base", Path(root) / "alone"
        make_toy_base(base)
        alone.mkdir()
        began = time.time()
        assert run(alone, base)
        duration = time.time() - began
        kills, runs = [], 0
        while len(kills) < KILLS:
            folder = Path(root) / "killed"
            folder.mkdir()
            runs += 1
            while True:
                after = rng.uniform(0.1 * duration, 1.05 * duration)
                if len(kills) == KILLS or run(folder, base, after):
                    break
                kills.append(round(after, 2))
            run(folder, base) if len(kills) == KILLS else None
            for name in ("reward_log.csv", "policy/policy.safetensors"):
                assert (folder / name).read_bytes() == (alone / name).read_bytes(), (name, kills)
            ours, theirs = (torch.load(f / "state.pt", weights_only=True)["model"] for f in (folder, alone))
            assert all(torch.equal(ours[name], p) for name, p in theirs.items()), kills
            shutil.rmtree(folder)
            print(f"{len(kills)} kills, {runs} runs: the same", flush=True)
    facts = {"seed": SEED, "kills_after_seconds": kills, "runs": runs, "same_numbers": True}
    OUTPUT.write_text(json.dumps(facts | run_files.run_facts(), indent=1) + "\n")


if __name__ == "__main__":
    main()
