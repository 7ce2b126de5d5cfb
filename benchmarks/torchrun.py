"""The default run's frames by several processes: how fast, and how good is the policy?

Each process brings NUM_ENVS environments of its own, so an update has as many times the frames and there are as many
times fewer of them, three of which still only warm the value up. Writes a row of benchmarks/torchrun.json, under the
number of processes.

    torchrun --standalone --nproc_per_node=2 -m benchmarks.torchrun      # 15 minutes on two CPU cores
"""

import functools
from pathlib import Path

import ppo_git_with_prompt as ppo
from benchmarks import runs
from car_racing_env import VALIDATION
from GitText2ActionWithPrompt import GitText2ActionWithPrompt
from support import checks, run_files

TRACKS = VALIDATION
OUTPUT = Path(__file__).with_suffix(".json")


def main():
    facts, _ = runs.run(functools.partial(GitText2ActionWithPrompt.from_pretrained, ppo.MODEL), ppo.SEED, TRACKS)
    if "mean" in facts:  # the first process
        run_files.add_to_json(OUTPUT, {str(facts["processes"]): facts})
        print("{processes} processes: {frames_per_second} frames a second, {mean:.1f}".format(**facts))


if __name__ == "__main__":
    checks.run(main)
