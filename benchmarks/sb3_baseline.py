"""Stable-Baselines3 PPO with `CnnPolicy` from random weights: the same frames, frame skip, rewards and evaluations.

The environments are those in which nobody is told anything and no car is thrown about. Writes
benchmarks/controls/CnnPolicy_seed<n>.json as each run ends, and skips those that are there: stop and start at will.

    pip install stable-baselines3
    python -m benchmarks.sb3_baseline      # 20 to 35 minutes a seed on two CPU cores
"""

import copy
import functools
import threading
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
from benchmarks import controls, runs
from car_racing_env import FRAME_SKIP
from support import checks, run_files

LEARNING_RATE = 3e-4  # Stable-Baselines3's own; it falls to a tenth, and the weights are averaged, as in ours
NAME = "CnnPolicy"


class Driver:
    """The most probable action; the environments take the simulator's indices as they are.

    One thread at a time: the library's policy keeps its distribution in itself, so that two would mix their actions.
    """

    def __init__(self, policy):
        self.policy, self.lock = policy, threading.Lock()

    def __call__(self, frames, infos):
        with self.lock:
            return self.policy.predict(frames.transpose(0, 3, 1, 2), deterministic=True)[0]


class Curve(BaseCallback):
    """The running average of the weights, and its score before the run and between its parts."""

    def __init__(self, agent):
        super().__init__()
        self.rows, self.averaged = [], copy.deepcopy(agent.policy)

    def average(self):
        """Let the average follow the weights, as it does after each of our updates."""
        for average, p in zip(self.averaged.parameters(), self.model.policy.parameters(), strict=True):
            average.data.lerp_(p.data, 1 - ppo.EMA_DECAY)

    def _on_step(self):
        return True

    def _on_rollout_start(self):
        """After each update but before the next rollout."""
        frames = self.num_timesteps * FRAME_SKIP
        if frames:
            self.average()
        if frames >= len(self.rows) * runs.FRAMES // ppo.EVALUATIONS:
            self.rows.append({"frames": frames} | evaluate.score(Driver(self.averaged), ppo.EVAL_TRACKS))


def make_agent(num_envs, n_steps, seed=0):
    """The peer on our training environments, rewards normalised by the running std of the return as ours are."""
    seeds = range(seed * 10_000, seed * 10_000 + num_envs)  # those of ppo.make_envs
    makers = [functools.partial(car_racing_env.make_training_env, seed) for seed in seeds]
    envs = VecNormalize(SubprocVecEnv(makers), norm_obs=False, clip_reward=np.inf, gamma=ppo.GAMMA)
    torch.set_num_threads(2)
    return PPO(
        "CnnPolicy", VecTransposeImage(envs), learning_rate=lambda left: LEARNING_RATE * (0.1 + 0.9 * left),
        n_steps=n_steps, batch_size=ppo.MINIBATCH_SIZE, n_epochs=ppo.K_EPOCHS, gamma=ppo.GAMMA,
        gae_lambda=ppo.GAE_LAMBDA, seed=seed, device="cpu",
    )  # fmt: skip


def run(seed):
    """One run; returns how it drives over it and at its end."""
    began, agent = time.time(), make_agent(ppo.NUM_ENVS, ppo.NUM_STEPS, seed)
    curve = Curve(agent)
    agent.learn(runs.FRAMES // FRAME_SKIP, curve, log_interval=None)
    agent.get_env().close()
    curve.average()
    facts = {"arm": NAME, "seed": seed, "frames": agent.num_timesteps * FRAME_SKIP, "curve": curve.rows}
    facts["constants"] = run_files.constants_of(globals(), *map(vars, runs.MODULES))
    facts["stable_baselines3"] = stable_baselines3.__version__
    facts |= runs.final_score(Driver(curve.averaged), controls.TRACKS)
    return facts | {"seconds": round(time.time() - began)}


def main():
    for seed in controls.SEEDS:
        path, tracks = controls.OUTPUT / f"{NAME}_seed{seed}.json", [controls.TRACKS[0], controls.TRACKS[-1]]
        runs.once(path, functools.partial(run, seed), globals(), tracks=tracks)


if __name__ == "__main__":
    checks.run(main)
