"""Stable-Baselines3 PPO with `CnnPolicy` in the same conditions: same environments, workers, frame skip, evaluations.

Trains until it has had both the frames and the wall-clock of the run in RESULTS_DIR. Writes RESULTS_DIR/sb3_eval_log.csv, which
draw_results.py draws into reward_curve.png, and sb3_run.json.

    pip install stable-baselines3
    python -m benchmarks.sb3_baseline      # 25 minutes on two CPU cores, after a run of ppo_git_with_prompt.py
"""

import contextlib
import csv
import functools
import json
import time

import numpy as np
import stable_baselines3
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize, VecTransposeImage

import car_racing_env
import draw_results
import evaluate
import ppo_git_with_prompt as ppo
import run_files

RESULTS_DIR = "results"
LEARNING_RATE = 3e-4  # Stable-Baselines3's own
SEED = 0


class Driver:
    """The most probable action; the environments take the simulator's indices as they are."""

    def __init__(self, agent):
        self.agent = agent

    def __call__(self, frames, infos):
        return self.agent.predict(frames.transpose(0, 3, 1, 2), deterministic=True)[0]


class Evaluate(BaseCallback):
    """Before training and after every share of the frames: the same tracks as ours; stops when both budgets are spent."""

    def __init__(self, path, frames, seconds):
        super().__init__()
        self.path, self.frames, self.seconds = path, frames, seconds
        self.began, self.next_evaluation, self.rows = time.time(), 0, []

    def _on_step(self):
        return True

    def _on_rollout_start(self):
        """After each update but before the next rollout."""
        frames = self.num_timesteps * car_racing_env.FRAME_SKIP
        done = frames >= self.frames and time.time() - self.began > self.seconds
        if frames >= self.next_evaluation or done:
            self.next_evaluation += self.frames // ppo.EVALUATIONS
            scores = evaluate.evaluate(Driver(self.model), ppo.EVAL_TRACKS, evaluate.NUM_ENVS)
            row = {"env_frames": frames, "seconds": round(time.time() - self.began), **evaluate.summarize(scores)}
            self.rows.append(row)
            with self.path.open("w", newline="") as file:
                writer = csv.DictWriter(file, row)
                writer.writeheader()
                writer.writerows(self.rows)
            print(f"{frames:,} frames, {row['seconds']} s: {row['mean']:.1f} ± {row['std']:.1f}", flush=True)
        if done:
            raise StopIteration


def make_agent(num_envs, n_steps):
    """The peer on our training environments, rewards normalised by the running std of the return as ours are."""
    makers = [functools.partial(ppo.make_worker_env, i, SEED, **ppo.env_settings()) for i in range(num_envs)]
    envs = VecNormalize(SubprocVecEnv(makers), norm_obs=False, clip_reward=np.inf, gamma=ppo.GAMMA)
    torch.set_num_threads(2)
    return PPO(
        "CnnPolicy", VecTransposeImage(envs), learning_rate=LEARNING_RATE, n_steps=n_steps,
        batch_size=ppo.MINIBATCH_SIZE, n_epochs=ppo.K_EPOCHS, gamma=ppo.GAMMA, gae_lambda=ppo.GAE_LAMBDA, seed=SEED,
        device="cpu",
    )  # fmt: skip


def main():
    began, facts = time.time(), run_files.run_facts()
    results = run_files.ROOT / RESULTS_DIR
    run = json.loads((results / "run.json").read_text())
    frames = int(run_files.read_log(results / "update_log.csv")[-1]["env_frames"])
    agent = make_agent(ppo.NUM_ENVS, ppo.NUM_STEPS)
    callback = Evaluate(results / "sb3_eval_log.csv", frames, run["seconds"])
    with contextlib.suppress(StopIteration):
        agent.learn(10**9, callback)
    agent.get_env().close()
    draw_results.draw(results)
    run_files.write_json(
        results / "sb3_run.json",
        facts
        | {"stable_baselines3": stable_baselines3.__version__, "learning_rate": LEARNING_RATE, "seed": SEED}
        | {"seconds": round(time.time() - began)},
    )


if __name__ == "__main__":
    main()
