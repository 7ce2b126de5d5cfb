"""From nothing to a driver: teacher, git-tiny, captions, LoRA and PPO, each by its script as it is, one after another.

Writes results/from_nothing.json as each script ends: its seconds, and at the end the policy's score on 100 validation
tracks. An interrupted run goes on with the script that it was in, from its start; to begin anew remove the file.
What ships is replaced (git checkout offline CarRacing-Data lora_git_caption_model_carllava).

    python -m benchmarks.from_nothing      # 40 to 120 minutes on two CPU cores
"""

import subprocess
import sys
import time

from support import checks, run_files
from support.run_files import ROOT

SCRIPTS = (
    "offline.train_teacher",
    "offline.make_git_tiny",
    "collect_captions",
    "train_git_lora_carllava_style",
    "ppo_git_with_prompt",
    "evaluate",
)
OUTPUT = "results/from_nothing.json"
SCORE = "results/eval_policy_100000.json"  # of the last script


def main():
    output = ROOT / OUTPUT
    now = run_files.run_facts()
    made = checks.read_json(output) if output.exists() else now | {"seconds": {}}
    begun_by = made["git_commit"]
    if "mean" in made or begun_by.rstrip("+") != now["git_commit"].rstrip("+"):  # the scripts change what git knows
        raise checks.BadInput(f"{OUTPUT} is of a finished run, or of commit {begun_by}: remove it to begin anew")
    for script in SCRIPTS:
        if script in made["seconds"]:
            continue
        began = time.time()
        if subprocess.run([sys.executable, "-m", script], cwd=ROOT).returncode:
            raise checks.BadInput(f"{script} ended with an error, see above; this script goes on with it")
        made["seconds"][script] = round(time.time() - began)
        run_files.write_json(output, made)
    score = checks.read_json(ROOT / SCORE)
    names = ("mean", "std", "min", "laps_finished_percent", "returns")
    made |= {"minutes": round(sum(made["seconds"].values()) / 60, 1)} | {name: score[name] for name in names}
    run_files.write_json(output, made)
    print(f"{made['mean']:.1f} ± {made['std']:.1f} after {made['minutes']} minutes; wrote {OUTPUT}")


if __name__ == "__main__":
    checks.run(main)
