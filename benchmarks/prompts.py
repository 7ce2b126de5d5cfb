"""Asked in other words, or told what means nothing: does it still race?

The plain question in ten wordings that were never taught, an empty question, and the plain question after garbled words
and after sentences about other things. What each costs is paired with the plain question on the same tracks. Writes
benchmarks/prompts.json, a part for each driver.

    python -m benchmarks.prompts      # 10 minutes on two CPU cores
"""

import time
from pathlib import Path

import numpy as np
import torch

import evaluate
import instructions
from benchmarks import runs
from car_racing_env import HELD_OUT
from GitText2ActionWithPrompt import PROMPT
from phrasings import HELD_OUT_WORDINGS, INSTRUCTIONS
from support import checks, run_files

DRIVERS = ("answers", "policy")  # of evaluate.py, whose constants say which model
TRACKS = HELD_OUT[:20]
SENTENCES = 2  # garbled ones, and irrelevant ones
OUTPUT = Path(__file__).with_suffix(".json")


def cases():
    """(group, instruction, question) of everything that is said, the plain question first."""
    rng = np.random.default_rng(0)
    return [
        ("plain", "", PROMPT),
        *(("wordings never taught", "", wording) for wording in HELD_OUT_WORDINGS),
        *(("garbled", instructions.garbled(rng), PROMPT) for _ in range(SENTENCES)),
        *(("irrelevant", sentence, PROMPT) for sentence in INSTRUCTIONS["chatter"].held_out[:SENTENCES]),
        ("empty", "", ""),
    ]


def measure(driver):
    """A row for each case, and for each group its mean score and by how much it is below the plain one."""
    rows, returns = [], {}
    for group, told, question in cases():
        driver.told, driver.model.question = told, question
        results = evaluate.evaluate(driver, TRACKS)
        returns.setdefault(group, []).append([r["return"] for r in results])
        rows.append({"group": group, "instruction": told, "question": question} | evaluate.summarize(results))
        print(f"{group}: {told} {question} {rows[-1]['mean']:.1f} ± {rows[-1]['std']:.1f}", flush=True)
    groups = {}
    for group, scores in returns.items():
        loss, error = runs.paired(returns["plain"][0], np.mean(scores, 0))
        groups[group] = {
            "sentences": len(scores),
            "mean": round(float(np.mean(scores)), 2),
            "loss": round(loss, 2),
            "loss_standard_error": round(error, 2),
        }
    return {"groups": groups, "sentences": rows}


def main():
    torch.set_num_threads(evaluate.TORCH_THREADS)
    for name in DRIVERS:
        began, facts = time.time(), evaluate.describe(name, TRACKS)
        measured = measure(evaluate.DRIVERS[name]()) | facts | {"seconds": round(time.time() - began)}
        run_files.add_to_json(OUTPUT, {name: measured})


if __name__ == "__main__":
    checks.run(main)
