"""`evaluate.py` and a PPO update with gymnasium 0.29.1 and its CarRacing-v2, not part of the default run.

Installs it into a virtual environment, runs both there and here, and writes tests/gymnasium_0_29.json if the returns, the
reward log and the losses are the same.

    python tests/gymnasium_0_29.py
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "tests" / "gymnasium_0_29.json"
INSTEAD = ["gymnasium==0.29.1", "Box2D", "pygame-ce"]  # its box2d extra wants a compiler
TRACKS = 3


def drive_and_train():
    """What evaluate.py and ppo_git_with_prompt.py give with the gymnasium of this process, printed as json."""
    sys.path.insert(0, str(ROOT))
    import csv

    import gymnasium

    import evaluate
    import ppo_git_with_prompt as ppo

    with tempfile.TemporaryDirectory() as folder:
        evaluate.RESULTS_DIR, evaluate.POLICY = folder, "results/published/policy"
        evaluate.DRIVER, evaluate.FIRST_TRACK, evaluate.NUM_TRACKS, evaluate.VIDEO = "policy", 100_000, TRACKS, False
        evaluate.main()
        driven = json.loads((Path(folder) / "eval_policy.json").read_text())
        ppo.RESULTS_DIR, ppo.NUM_ENVS, ppo.NUM_STEPS, ppo.MINIBATCH_SIZE = folder, 3, 400, 200
        ppo.TOTAL_UPDATES, ppo.WARMUP_UPDATES, ppo.EVALUATIONS, ppo.VIDEO_EVERY = 2, 1, 1, 10**9
        ppo.EVAL_TRACKS = range(100_000, 100_001)
        ppo.main()
        rows = list(csv.DictReader((Path(folder) / "reward_log.csv").open()))
        updates = list(csv.DictReader((Path(folder) / "update_log.csv").open()))
    result = {
        "gymnasium": gymnasium.__version__,
        "env_id": driven["env_id"],
        "returns": driven["returns"],
        "laps_finished_percent": driven["laps_finished_percent"],
        "episodes": [list(row.values()) for row in rows],
        "losses": [[row[name] for name in ("policy_loss", "value_loss", "kl_to_answers")] for row in updates],
    }
    print("RESULT", json.dumps(result))


def run(python):
    finished = subprocess.run(
        [python, __file__, "here"],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    if finished.returncode:
        raise SystemExit(finished.stdout)
    return json.loads(re.search(r"^RESULT (.*)$", finished.stdout, re.M).group(1))


def main():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [line.split("#")[0].strip() for line in lines if line and not line.startswith(("#", "gymnasium"))]
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder) / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *pins, *INSTEAD], check=True)
        old, new = run(python), run(sys.executable)
    same = {key: old[key] == new[key] for key in ("returns", "laps_finished_percent", "episodes", "losses")}
    print(json.dumps(old | {"same": same}, indent=1))
    if not all(same.values()):
        raise SystemExit(f"with {new['gymnasium']}: {json.dumps(new)}")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True, stdout=subprocess.PIPE
    ).stdout.strip()
    OUTPUT.write_text(json.dumps(old | {"the same with": new["gymnasium"], "git_commit": commit}, indent=1) + "\n")


if __name__ == "__main__":
    drive_and_train() if "here" in sys.argv else main()
