"""Stable-Baselines3 PPO with `CnnPolicy` in the same conditions: same frame skip, frames, evaluations.

The environments are those in which nobody is told anything and no car is thrown about.

Trains until it has had both the frames and the wall-clock of the run in RESULTS_DIR. Writes RESULTS_DIR/sb3_eval_log.csv
and sb3_run.json.

    pip install stable-baselines3
    python -m benchmarks.sb3_baseline      # 25 minutes on two CPU cores, after a run of ppo_git_with_prompt.py
"""

import contextlib
import functools
import time

import numpy as np
import stable_baselines3
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize, VecTransposeImage

import car_racing_env
import evaluate
import ppo_git_with_prompt as ppo
from support import checks, run_files
from support.run_files import ROOT

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
        self.log, self.frames, self.seconds = run_files.Log(path), frames, seconds
        self.began, self.next_evaluation = time.time(), 0

    def _on_step(self):
        return True

    def _on_rollout_start(self):
        """After each update but before the next rollout."""
        frames = self.num_timesteps * car_racing_env.FRAME_SKIP
        done = frames >= self.frames and time.time() - self.began > self.seconds
        if frames >= self.next_evaluation or done:
            self.next_evaluation += self.frames // ppo.EVALUATIONS
            summary = evaluate.score(Driver(self.model), ppo.EVAL_TRACKS)
            row = {"env_frames": frames, "seconds": round(time.time() - self.began), **summary}
            self.log.write(row)
            print(f"{frames:,} frames, {row['seconds']} s: {row['mean']:.1f} ± {row['std']:.1f}", flush=True)
        if done:
            raise StopIteration


def make_agent(num_envs, n_steps):
    """The peer on our training environments, rewards normalised by the running std of the return as ours are."""
    seeds = range(SEED * 10_000, SEED * 10_000 + num_envs)  # those of ppo.make_envs
    makers = [functools.partial(car_racing_env.make_training_env, seed) for seed in seeds]
    envs = VecNormalize(SubprocVecEnv(makers), norm_obs=False, clip_reward=np.inf, gamma=ppo.GAMMA)
    torch.set_num_threads(2)
    return PPO(
        "CnnPolicy", VecTransposeImage(envs), learning_rate=LEARNING_RATE, n_steps=n_steps,
        batch_size=ppo.MINIBATCH_SIZE, n_epochs=ppo.K_EPOCHS, gamma=ppo.GAMMA, gae_lambda=ppo.GAE_LAMBDA, seed=SEED,
        device="cpu",
    )  # fmt: skip


def main():
    began, results = time.time(), ROOT / RESULTS_DIR
    seconds = checks.read_json(results / "run.json", "run ppo_git_with_prompt.py first")["seconds"]
    frames = int(run_files.read_log(results / "update_log.csv")[-1]["env_frames"])
    run = run_files.describe_run(globals(), vars(ppo), stable_baselines3=stable_baselines3.__version__)
    agent = make_agent(ppo.NUM_ENVS, ppo.NUM_STEPS)
    with contextlib.suppress(StopIteration):
        agent.learn(10**9, Evaluate(results / "sb3_eval_log.csv", frames, seconds), log_interval=None)
    agent.get_env().close()
    run_files.write_json(results / "sb3_run.json", run | {"seconds": round(time.time() - began)})


if __name__ == "__main__":
    checks.run(main)
