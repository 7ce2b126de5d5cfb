"""The whole PPO loop against Stable-Baselines3's PPO with `CnnPolicy`: decisions per second and peak memory.

Same environments (car_racing_env.make_training_env), workers, frame skip, decisions per update, epochs and minibatch; theirs
trains a convolutional network, ours asks a vision-language model. Each run is a process of its own; they take turns.
Writes its claims to benchmarks/results.json.

    pip install stable-baselines3
    python -m benchmarks.ppo      # 6 minutes
"""

import multiprocessing
import tempfile
import threading
import time

import gymnasium as gym
import numpy as np
import psutil

import ppo_git_with_prompt as ppo
from benchmarks import compare

ROUNDS = 3
UPDATES = 2  # timed, after one to warm up


class Stopwatch:
    """Adds up the time spent in the functions that it wraps."""

    def __init__(self):
        self.seconds = 0.0

    def wrap(self, function):
        def timed(*args, **kwargs):
            began = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds += time.perf_counter() - began
            return result

        return timed


def run_ours(pipe):
    """The script's own main() without evaluations and videos; sends decisions per second and the share of its own."""
    watch = Stopwatch()
    ppo.TOTAL_UPDATES, ppo.WARMUP_UPDATES, ppo.EVALUATIONS = 1 + UPDATES, 1, 1
    ppo.evaluate.evaluate = lambda act, tracks, envs: [{"return": 0.0, "end": "time"} for _ in tracks]
    ppo.evaluate.record_video = lambda *args: 0.0
    vector = gym.vector.AsyncVectorEnv
    vector.step_wait, vector.step_async = watch.wrap(vector.step_wait), watch.wrap(vector.step_async)
    model = ppo.model_file.GitText2ActionWithPrompt
    model.encode = watch.wrap(model.encode)
    marks = []
    update = ppo.update_policy
    # the script's time outside simulator and backbone, from the first update's end to the last one's

    def marked(*args, **kwargs):
        result = update(*args, **kwargs)
        marks.append((time.perf_counter(), watch.seconds))
        return result

    ppo.update_policy = marked
    with tempfile.TemporaryDirectory() as folder:
        ppo.RESULTS_DIR = folder
        ppo.main()
    seconds = marks[-1][0] - marks[0][0]
    busy = marks[-1][1] - marks[0][1]
    pipe.send((UPDATES * ppo.NUM_ENVS * ppo.NUM_STEPS / seconds, 1 - busy / seconds))


def run_peer(pipe):
    from stable_baselines3.common.callbacks import BaseCallback

    from benchmarks.sb3_baseline import make_agent

    marks = []

    class Clock(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_start(self):
            marks.append(time.perf_counter())

    agent = make_agent(ppo.NUM_ENVS, ppo.NUM_STEPS)
    agent.learn((2 + UPDATES) * ppo.NUM_ENVS * ppo.NUM_STEPS, Clock())
    agent.get_env().close()
    seconds = marks[1 + UPDATES] - marks[1]
    pipe.send((UPDATES * ppo.NUM_ENVS * ppo.NUM_STEPS / seconds, None))


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
    """One run in a fresh process: decisions per second, share of its own, peak memory in MB."""
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
    share = float(np.median([run[1] for run in ours]))
    compare.record(
        "PPO loop: ours vs Stable-Baselines3 CnnPolicy", "ms_per_decision", [1e3 / run[0] for run in peer],
        [1e3 / run[0] for run in ours], share_outside_simulator_and_backbone=round(share, 3),
    )  # fmt: skip
    compare.record("peak memory: ours vs Stable-Baselines3", "mb", [run[2] for run in peer], [run[2] for run in ours])


if __name__ == "__main__":
    main()
