"""The whole PPO loop against Stable-Baselines3's PPO with `CnnPolicy`: decisions per second and peak memory.

Same world (car_racing_env.make_training_env; theirs is told nothing and no car is thrown about), frame skip, decisions
per update, epochs and minibatch; theirs has a process for each environment and trains a convolutional network, ours
asks a vision-language model. Each run is a process of its own; they take turns. Writes its claims to
benchmarks/results.json.

    pip install stable-baselines3
    python -m benchmarks.ppo      # 12 minutes
"""

import multiprocessing
import threading
import time

import numpy as np
import psutil
import torch

import GitText2ActionWithPrompt as model_file
import ppo_git_with_prompt as ppo
from benchmarks import compare
from support import checks, processes

ROUNDS = 5
UPDATES = 2  # timed, after WARMUP_UPDATES in which only the value learns
DECISIONS = UPDATES * ppo.NUM_ENVS * ppo.NUM_STEPS


def run_ours(pipe):
    """Sends decisions per second, and the share of the time that the updates take rather than the rollouts."""
    with ppo.make_envs(ppo.SEED) as envs:
        torch.set_num_threads(ppo.TORCH_THREADS)
        torch.manual_seed(ppo.SEED)
        model = model_file.GitText2ActionWithPrompt.from_pretrained(ppo.MODEL)
        accelerator = processes.make_accelerator(model.device)
        marks, shares = [], []
        for _, _, diagnostics, _ in ppo.train(model, envs, accelerator, total_updates=ppo.WARMUP_UPDATES + UPDATES):
            marks.append(time.perf_counter())
            shares.append(diagnostics.get("update_share"))
    pipe.send((DECISIONS / (marks[-1] - marks[-1 - UPDATES]), float(np.mean(shares[-UPDATES:]))))


def run_peer(pipe):
    """Sends decisions per second."""
    from stable_baselines3.common.callbacks import BaseCallback

    from benchmarks.sb3_baseline import make_agent

    marks = []

    class Clock(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_start(self):
            marks.append(time.perf_counter())

    agent = make_agent(ppo.NUM_ENVS, ppo.NUM_STEPS)
    agent.learn((2 + UPDATES) * ppo.NUM_ENVS * ppo.NUM_STEPS, Clock(), log_interval=None)
    agent.get_env().close()
    pipe.send((DECISIONS / (marks[1 + UPDATES] - marks[1]), None))


def watch_memory(process, peak):
    """Raise peak[0] to the proportional set size, MB, of a process and its children while it lives."""
    while process.is_alive():
        try:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            peak[0] = max(peak[0], sum(p.memory_full_info().pss for p in family) / 2**20)
        except psutil.Error:
            pass
        time.sleep(1)


def measure(run):
    """One run in a fresh process: decisions per second, the updates' share of the time, peak memory in MB."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe()
    process = context.Process(target=run, args=(send,))
    process.start()
    send.close()
    peak = [0.0]
    watcher = threading.Thread(target=watch_memory, args=(process, peak))
    watcher.start()
    decisions_per_second, share = receive.recv()
    process.join()
    watcher.join()
    return decisions_per_second, share, peak[0]


def main():
    peer, ours = [], []
    for _ in range(ROUNDS):
        peer.append(measure(run_peer))
        ours.append(measure(run_ours))
        print(f"decisions per second: peer {peer[-1][0]:.0f}, ours {ours[-1][0]:.0f}", flush=True)
    costs = ([1e3 / run[0] for run in runs] for runs in (peer, ours))
    share = round(float(np.median([run[1] for run in ours])), 3)
    compare.record("PPO loop: ours vs Stable-Baselines3 CnnPolicy", "ms_per_decision", *costs, update_share=share)
    compare.record("peak memory: ours vs Stable-Baselines3", "mb", [run[2] for run in peer], [run[2] for run in ours])


if __name__ == "__main__":
    checks.run(main)
