"""Train the teacher that collect_captions.py lets drive: PPO on privileged simulator state, nothing drawn.

Reads nothing. Writes offline/teacher.safetensors (the running average of the actor's weights, not the best of many
evaluations), its log offline/teacher_log.csv and, not in git, offline/teacher_state.pt, from which an interrupted run goes on.

    python -m offline.train_teacher      # 39 minutes on two CPU cores

The actor sees the car and 12 tiles of road; the critic alone also sees time, visited share and missed tiles. Each worker
process rolls out its environments with its own copy of the policy, so that no step crosses a process border.
"""

import contextlib
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import car_racing_env
import checks
import collect_captions
import ppo_git_with_prompt as ppo
import run_files

OUTPUT = Path(__file__).parent / "teacher.safetensors"
SEED = 0
RESUME = False  # continue from offline/teacher_state.pt, the last evaluation's

NUM_WORKERS = 2  # processes, each with its own environments and a copy of the policy
ENVS_PER_WORKER = 16
NUM_STEPS = 512  # decisions per environment and update
TOTAL_UPDATES = 400  # x 16,384 decisions
BURST_START = 0.01  # random bursts while training make the teacher good at recoveries
BURST_LONGEST = 7  # decisions

GRASS_PENALTY = 10.0  # these four instead of car_racing_env's
MISS_PENALTY = 10.0
PENALTY_RAMP = 0.0
LAP_BONUS = 0.0  # this critic knows how much of the lap is left

LEARNING_RATE = 5e-4  # falls linearly to a fiftieth
AVERAGE = 0.95  # decay per update of the averaged actor, which is evaluated and kept
GAMMA = 0.995  # per decision; 0.99 rewards haste, and haste is what misses tiles
GAE_LAMBDA = 0.95
CLIP = 0.2
ENTROPY_COEF = 0.003
VALUE_COEF = 0.5
EPOCHS = 6
MINIBATCH = 2048
MAX_GRAD_NORM = 0.5

EVAL_EVERY = 20  # updates
EVAL_TRACKS = range(100_000, 100_100)


class Critic(nn.Module):
    """Value of privileged state plus what only the critic may know: time, visited share, missed tiles."""

    def __init__(self, state_size, hidden_size=128):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(state_size + 3, hidden_size), nn.Tanh(), nn.Linear(hidden_size, hidden_size), nn.Tanh(),
            nn.Linear(hidden_size, 1),
        )  # fmt: skip

    def forward(self, state):
        return self.net(state)[:, 0]


def start_worker(rank, seed, constants):
    """Give a spawned process the parent's constants and build its environments."""
    global ENVS, EVAL_ENV, OBS
    checks.end_with_the_parent()
    checks.set_constants(constants)
    torch.set_num_threads(1)
    torch.manual_seed(seed * 1000 + rank)
    ENVS = []
    for i in range(ENVS_PER_WORKER):
        env_seed = (seed * 1000 + rank) * 1000 + i
        env = car_racing_env.make_training_env(
            env_seed, draw=False, **ppo.env_settings() | dict(
                grass_penalty=GRASS_PENALTY, miss_penalty=MISS_PENALTY, penalty_ramp=PENALTY_RAMP, lap_bonus=LAP_BONUS,
            ),
        )  # fmt: skip
        env = collect_captions.RandomBursts(env, env_seed, BURST_START, BURST_LONGEST)
        ENVS.append(collect_captions.PrivilegedState(env, collect_captions.TILES_AHEAD))
    EVAL_ENV = collect_captions.PrivilegedState(
        car_racing_env.make_env(car_racing_env.FRAME_SKIP, draw=False), collect_captions.TILES_AHEAD
    )
    OBS = [critic_state(env, env.reset()[1]) for env in ENVS]


def critic_state(env, info):
    """What the critic sees, float32 (S + 3,): privileged state, time, visited share and missed tiles."""
    base, missed = env.unwrapped, env.get_wrapper_attr("missed")
    return np.append(
        info["state"], np.float32([base.t * 0.05, base.tile_visited_count / len(base.track), min(missed, 5) / 5])
    )


@torch.no_grad()
def rollout(weights):
    """NUM_STEPS decisions in each environment of this process; a dict of tensors (T, N, ...)."""
    actor, critic = networks()
    actor.load_state_dict(weights[0]), critic.load_state_dict(weights[1])
    size = len(OBS[0]) - 3
    data = {k: [] for k in ["state", "action", "log_prob", "value", "reward", "terminated", "done"]}
    next_value = torch.zeros(NUM_STEPS, len(ENVS))
    episodes = []
    for t in range(NUM_STEPS):
        state = torch.from_numpy(np.stack(OBS))
        log_probs = actor(state[:, :size]).log_softmax(-1)
        action = torch.multinomial(log_probs.exp(), 1)
        value = critic(state)
        if t:
            done = data["done"][-1].bool()
            next_value[t - 1] = torch.where(done, next_value[t - 1], value)
        reward, terminated, dones = np.zeros((3, len(ENVS)), dtype=np.float32)
        for i, env in enumerate(ENVS):
            _, reward[i], terminated[i], truncated, info = env.step(int(action[i]))
            OBS[i] = critic_state(env, info)
            dones[i] = terminated[i] or truncated
            if dones[i]:
                if truncated and not terminated[i]:
                    next_value[t, i] = critic(torch.from_numpy(OBS[i])[None])[0]
                episodes.append((info["episode_return"], info["episode_length"], info["end"]))
                OBS[i] = critic_state(env, env.reset()[1])
        for key, x in [
            ("state", state), ("action", action[:, 0]), ("log_prob", log_probs.gather(1, action)[:, 0]),
            ("value", value), ("reward", torch.from_numpy(reward)), ("terminated", torch.from_numpy(terminated)),
            ("done", torch.from_numpy(dones)),
        ]:  # fmt: skip
            data[key].append(x)
    done = data["done"][-1].bool()
    next_value[-1] = torch.where(done, next_value[-1], critic(torch.from_numpy(np.stack(OBS))))
    data = {key: torch.stack(x).numpy() for key, x in data.items()}
    return data | {"next_value": next_value.numpy()}, episodes


@torch.no_grad()
def drive(job):
    """Greedy return on one track."""
    weights, track = job
    actor, _ = networks()
    actor.load_state_dict(weights)
    _, info = EVAL_ENV.reset(seed=track)
    total, end = 0.0, ""
    while not end:
        action = int(actor(torch.from_numpy(info["state"])[None])[0].argmax())
        _, reward, terminated, truncated, info = EVAL_ENV.step(action)
        total += reward
        end = car_racing_env.episode_end(terminated, truncated, info)
    return total, end


def networks():
    """A fresh actor and critic."""
    size = 15 + 2 * collect_captions.TILES_AHEAD
    return collect_captions.Teacher(size), Critic(size)


def main():
    torch.manual_seed(SEED)
    torch.set_num_threads(2)
    actor, critic = networks()
    actor.net[-1].weight.data *= 0.01
    parameters = [*actor.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE, eps=1e-5)
    normalizer = ppo.ReturnNormalizer(NUM_WORKERS * ENVS_PER_WORKER, GAMMA)
    average = AveragedModel(actor, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE))
    first, seconds = 1, 0.0
    state_file = OUTPUT.with_name("teacher_state.pt")
    if RESUME and state_file.exists():
        saved = torch.load(state_file, weights_only=True)
        actor.load_state_dict(saved["actor"]), critic.load_state_dict(saved["critic"])
        optimizer.load_state_dict(saved["optimizer"]), normalizer.load_state_dict(saved["normalizer"])
        average.load_state_dict(saved["average"])
        first, seconds = saved["update"] + 1, saved["seconds"]
    print(
        f"{TOTAL_UPDATES} updates, {checks.duration(6 * TOTAL_UPDATES - seconds)}; replaces offline/{OUTPUT.name} at every "
        f"evaluation, the shipped one comes back with: git checkout offline/{OUTPUT.name}"
    )
    log = run_files.Log(OUTPUT.with_name("teacher_log.csv"), keep_until=first - 1 if first > 1 else None)
    bar = tqdm(range(first, TOTAL_UPDATES + 1), initial=first - 1, total=TOTAL_UPDATES, unit="update")
    context = multiprocessing.get_context("spawn")
    constants = checks.constants_of(__name__, "car_racing_env", "collect_captions")
    began = time.time() - seconds
    with contextlib.ExitStack() as stack:
        # a pool for each worker: a shared one would let them swap environments between updates
        pools = [
            stack.enter_context(
                ProcessPoolExecutor(1, context, start_worker, (rank, SEED + 7919 * (first - 1), constants))
            )
            for rank in range(NUM_WORKERS)
        ]
        for update in bar:
            weights = [{k: v.clone() for k, v in m.state_dict().items()} for m in (actor, critic)]
            running = [pool.submit(rollout, weights) for pool in pools]
            results = [future.result() for future in running]
            episodes = [e for _, done in results for e in done]
            data = {k: torch.from_numpy(np.concatenate([d[k] for d, _ in results], 1)) for k in results[0][0]}
            reward = torch.stack([normalizer(*step) for step in zip(data["reward"], data["done"])])
            advantage, returns = ppo.compute_gae(
                reward, data["value"], data["next_value"], data["terminated"], data["done"], GAMMA, GAE_LAMBDA
            )
            batch = {k: data[k].flatten(0, 1) for k in ["state", "action", "log_prob", "value"]}
            batch |= {"advantage": advantage.flatten(), "returns": returns.flatten()}
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - 0.98 * (update - 1) / TOTAL_UPDATES)
            for _ in range(EPOCHS):
                for rows in torch.randperm(len(batch["action"])).split(MINIBATCH):
                    b = {k: x[rows] for k, x in batch.items()}
                    a = (b["advantage"] - b["advantage"].mean()) / (b["advantage"].std() + 1e-8)
                    terms = ppo.ppo_losses(
                        actor(b["state"][:, :-3]), critic(b["state"]), b["action"], b["log_prob"], a, b["returns"], CLIP
                    )
                    loss = terms["policy_loss"] - ENTROPY_COEF * terms["entropy"] + VALUE_COEF * terms["value_loss"]
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
                    optimizer.step()
            average.update_parameters(actor)
            row = {
                "update": update,
                "decisions": update * len(batch["action"]),
                "return": np.mean([e[0] for e in episodes]) if episodes else float("nan"),
                "laps": np.mean([e[2] == "lap" for e in episodes]) if episodes else float("nan"),
                "length": np.mean([e[1] for e in episodes]) if episodes else float("nan"),
                "entropy": terms["entropy"].item(),
                "approx_kl": terms["approx_kl"].item(),
                "explained_variance": ppo.explained_variance(batch["value"], batch["returns"]),
            }
            row |= dict.fromkeys(("eval_mean", "eval_std", "eval_min", "eval_laps"), float("nan"))
            if update % EVAL_EVERY == 0 or update == TOTAL_UPDATES:
                weights = {k: v.clone() for k, v in average.module.state_dict().items()}
                jobs = [(weights, track) for track in EVAL_TRACKS]
                running = [pool.map(drive, jobs[i::NUM_WORKERS]) for i, pool in enumerate(pools)]
                scores, ends = zip(*(score for results in running for score in results))
                row |= {
                    "eval_mean": np.mean(scores), "eval_std": np.std(scores), "eval_min": np.min(scores),
                    "eval_laps": np.mean([e == "lap" for e in ends]),
                }  # fmt: skip
            row["seconds"] = time.time() - began
            log.write({key: x if isinstance(x, int) else float(x) for key, x in row.items()})
            if not np.isnan(row["eval_mean"]):
                metadata = {"update": str(update), **{key: f"{row[key]:.1f}" for key in ("eval_mean", "eval_std")}}
                run_files.write_file(OUTPUT, save(weights, metadata))
                ppo.save_state(state_file, {
                    "actor": actor.state_dict(), "critic": critic.state_dict(), "optimizer": optimizer.state_dict(),
                    "normalizer": normalizer.state_dict(), "average": average.state_dict(), "update": update,
                    "seconds": time.time() - began,
                })  # fmt: skip
            bar.set_postfix(reward=f"{row['return']:.0f}", laps=f"{row['laps']:.0%}")
    print(f"wrote offline/{OUTPUT.name}; next: python collect_captions.py")


if __name__ == "__main__":
    checks.run(main)
