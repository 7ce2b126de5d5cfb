"""The default run's frames by several processes: how fast, and how good is the policy?

Each process brings NUM_ENVS environments of its own, so an update has as many times the frames and there are as many
times fewer of them, three of which still only warm the value up. Writes a row of benchmarks/torchrun.json, under the
number of processes.

    torchrun --standalone --nproc_per_node=2 -m benchmarks.torchrun      # 15 minutes on two CPU cores
"""

from pathlib import Path

import numpy as np
import torch

import evaluate
import GitText2ActionWithPrompt as model_file
import ppo_git_with_prompt as ppo
from benchmarks import runs
from car_racing_env import FRAME_SKIP
from support import checks, processes, run_files

TRACKS = range(100_000, 100_100)  # validation tracks
OUTPUT = Path(__file__).with_suffix(".json")


def train(rank, total_updates):
    """As `main` of stage 3; returns the averaged policy and the diagnostics of each update."""
    with ppo.make_envs(ppo.SEED, rank=rank) as workers:
        torch.set_num_threads(ppo.TORCH_THREADS)
        accelerator = processes.make_accelerator(model_file.device())
        torch.manual_seed(ppo.SEED)
        model, averaged = (model_file.GitText2ActionWithPrompt.from_pretrained(ppo.MODEL) for _ in range(2))
        torch.manual_seed(ppo.SEED + rank)
        history = []
        for _, _, diagnostics, state in ppo.train(model, workers, accelerator, total_updates=total_updates):
            averaged.load_trained(state["average"], "the average")
            history.append(diagnostics)
        accelerator.end_training()
    return averaged, history[1:]


def main():
    rank, world_size = processes.join_torchrun()
    updates = ppo.TOTAL_UPDATES // world_size
    averaged, history = train(rank, updates)
    if rank == 0:
        speeds = [FRAME_SKIP * diagnostics["decisions_per_second"] for diagnostics in history]
        frames = updates * world_size * ppo.NUM_ENVS * ppo.NUM_STEPS * FRAME_SKIP
        facts = {"seed": ppo.SEED, "model": averaged.source, "updates": updates, "frames": frames}
        facts["frames_per_second"] = round(float(np.median(speeds)), 1)
        facts["constants"] = run_files.constants_of(*map(vars, runs.MODULES))
        facts |= runs.final_score(evaluate.Policy(averaged), TRACKS)
        rows = checks.read_json(OUTPUT) if OUTPUT.exists() else {}
        run_files.write_json(OUTPUT, rows | {str(world_size): facts})
        print(f"{world_size} processes: {facts['frames_per_second']} frames a second, {facts['mean']:.1f}")


if __name__ == "__main__":
    checks.run(main)
