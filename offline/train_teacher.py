"""Train the teacher that collect_captions.py lets drive: PPO on privileged simulator state, nothing drawn.

Reads nothing. Writes offline/teacher.safetensors (the running average of the actor's weights, not the best of many
evaluations), its log offline/teacher_log.csv and, not in git, offline/teacher_state.pt, from which an interrupted run
goes on.

    python -m offline.train_teacher      # 8 to 9 minutes on two CPU cores

The actor sees the car, 12 tiles of road and a target: a speed, a side of the road, standing still, or none, when it
races. Targets change while it drives, and now and then the car is thrown about, so that it learns to come back from
anywhere. The actor-critic is asymmetric: the critic alone also sees time, visited share and missed tiles. Each worker
process rolls out its environments with its own copy of the policy, so that no step crosses a process border.
"""

import contextlib
import dataclasses
import functools
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
from safetensors.torch import save
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import car_racing_env
import perturbations
import targets
import teacher as teacher_file
from instructions import draw_target
from perturbations import RandomBursts, Throws
from ppo_git_with_prompt import ReturnNormalizer, compute_gae, explained_variance, ppo_losses
from road import STATE_SIZE
from support import checks, processes, run_files
from support.run_files import ROOT
from targets import TARGET_SIZE
from teacher import PrivilegedState, Teacher, make_evaluation_env, mlp

OUTPUT_DIR = "offline"
SEED = 0
RESUME = False  # continue from offline/teacher_state.pt, the last evaluation's

NUM_WORKERS = 2  # processes, each with its own environments and a copy of the policy
ENVS_PER_WORKER = 16
NUM_STEPS = 512  # decisions per environment and update
TOTAL_UPDATES = 120  # x 16,384 decisions
BURST_START = 0.01  # random bursts while training make the teacher good at recoveries; they fade to none
BURST_LONGEST = 7  # decisions
PLAIN_UPDATES = 30  # first it learns to race; over as many again throws and targets come in
TARGETS = 0.4  # share of the time with a target
THROWN_AT_START = 0.3  # share of the episodes that begin with the car thrown about
THROWN = 0.003  # chance of it per decision later
CHANGE = 0.006  # chance per decision that the target changes
REWARDS = dataclasses.replace(  # no ramp and no bonus: this critic knows how much of the lap is left
    car_racing_env.REWARDS,
    grass_limit=200,  # frames, enough to turn round beside the road
    grass_penalty=10.0,
    miss_penalty=20.0,  # at 10 one lap in five lacked a tile
    penalty_ramp=0.0,
    lap_bonus=0.0,
    thrown_grace=0,
    progress=0.5,
    side_left=4.0,  # at 3, on the road and at any speed, sides were left in one decision of five
    facing=40.0,  # without it a car that is turned round brakes and stands: the wrong way costs, standing nothing
)

LEARNING_RATE = 5e-4  # falls linearly to 3 % of it
EMA_DECAY = 0.95  # per update, of the averaged actor, which is evaluated and kept
GAMMA = 0.995  # per decision; 0.99 rewards haste, and haste is what misses tiles
GAE_LAMBDA = 0.95
CLIP = 0.2
ENTROPY_COEF = 0.003  # falls linearly to 0
VALUE_COEF = 0.5
K_EPOCHS = 6
MINIBATCH_SIZE = 2048  # decisions
MAX_GRAD_NORM = 0.5

EVAL_EVERY = 40  # updates
EVAL_TRACKS = car_racing_env.VALIDATION


ACTOR_SIZE = STATE_SIZE + TARGET_SIZE
PRIVILEGED_SIZE = 4  # numbers that only the critic sees


class Critic(nn.Module):
    """Value of what the actor sees and what only the critic may know: time, visited share, missed tiles, grass."""

    def __init__(self):
        super().__init__()
        self.net = mlp(ACTOR_SIZE + PRIVILEGED_SIZE, 1)

    def forward(self, state):
        return self.net(state)[:, 0]


# in a worker process


@functools.cache
def worker_envs(seed, num_envs):
    """This process's environments, made once, and what their critics see now, (N, ACTOR_SIZE + PRIVILEGED_SIZE)."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    envs, draw = [], functools.partial(draw_target, share=0.0)
    for env_seed in range(1000 * seed, 1000 * seed + num_envs):
        env = car_racing_env.Instructed(Throws(car_racing_env.make_env(draw=False)), draw, CHANGE)
        env = car_racing_env.TrainingRewards(env, env_seed, REWARDS)
        envs.append(PrivilegedState(RandomBursts(env, env_seed, BURST_START, BURST_LONGEST)))
    return envs, np.stack([critic_state(env, env.reset()[1]) for env in envs])


def critic_state(env, info):
    """State, target and what only the critic may know, float32 (ACTOR_SIZE + PRIVILEGED_SIZE,)."""
    base, missed, told = (env.unwrapped, *map(env.get_wrapper_attr, ("missed_tiles", "told")))
    known = [base.t * 0.05, base.tile_visited_count / len(base.track), min(missed, 5) / 5]
    known.append(env.get_wrapper_attr("grass_frames") / REWARDS.grass_limit)
    return np.concatenate([info["state"], told.target.encode(), np.float32(known)])


@torch.no_grad()
def rollout(seed, num_envs, num_steps, weights, difficulty, remaining):
    """`num_steps` decisions in each environment of this process, with the `weights` of actor and critic.

    From 0 to 1, `difficulty` scales targets, throws and what rewards give for them; `remaining`, the share of the run
    that is left, the random bursts. Returns a dict of arrays (T, N, ...) and the finished episodes.
    """
    envs, states = worker_envs(seed, num_envs)
    easy = car_racing_env.REWARDS.grass_limit
    rewards = dataclasses.replace(
        REWARDS,
        progress=difficulty * REWARDS.progress,
        facing=difficulty * REWARDS.facing,
        grass_limit=round(easy + difficulty * (REWARDS.grass_limit - easy)),
    )
    for env in envs:
        env.set_wrapper_attr("rewards", rewards)
        env.set_wrapper_attr("draw_instruction", functools.partial(draw_target, share=difficulty * TARGETS))
        env.set_wrapper_attr("at_start", difficulty * THROWN_AT_START)
        env.set_wrapper_attr("chance", difficulty * THROWN)
        env.set_wrapper_attr("start", remaining * BURST_START)
    actor, critic = Teacher(), Critic()
    actor.load_state_dict(weights[0])
    critic.load_state_dict(weights[1])
    names = ("log_prob", "value", "reward", "terminated", "done", "next_value")
    data = {name: np.zeros((num_steps, num_envs), np.float32) for name in names}
    data |= {"state": np.zeros((num_steps, *states.shape), np.float32)}
    data |= {"action": np.zeros((num_steps, num_envs), np.int64)}
    episodes = []
    for t in range(num_steps):
        data["state"][t] = states
        state = torch.from_numpy(data["state"][t])
        log_probs = actor(state[:, :ACTOR_SIZE]).log_softmax(-1)
        action = torch.multinomial(log_probs.exp(), 1)
        data["action"][t], data["value"][t] = action[:, 0], critic(state)
        data["log_prob"][t] = log_probs.gather(1, action)[:, 0]
        for i, env in enumerate(envs):
            _, reward, terminated, truncated, info = env.step(int(data["action"][t, i]))
            states[i] = critic_state(env, info)
            data["reward"][t, i], data["terminated"][t, i] = reward, terminated
            if terminated or truncated:
                data["done"][t, i] = 1
                if not terminated:
                    data["next_value"][t, i] = critic(torch.from_numpy(states[i : i + 1]))[0]
                episodes.append(info["episode_summary"])
                states[i] = critic_state(env, env.reset()[1])
    following = np.concatenate([data["value"][1:], critic(torch.from_numpy(states))[None]])
    data["next_value"] += (1 - data["done"]) * following
    return data, episodes


@functools.cache
def worker_evaluation_env():
    """This process's environment for evaluations, made once."""
    return make_evaluation_env(draw=False)


@torch.no_grad()
def drive(weights, track):
    """The actor's greedy return on one track, and how it ended."""
    env = worker_evaluation_env()
    actor = Teacher()
    actor.load_state_dict(weights)
    _, info = env.reset(seed=track)
    total, end = 0.0, ""
    while not end:
        _, reward, terminated, truncated, info = env.step(actor.act(info["state"][None])[0])
        total += reward
        end = car_racing_env.episode_end(terminated, truncated, info)
    return total, end


# in the learning process


def make_workers(stack, first_update):
    """Pairs of a process and what it rolls out.

    Each has a pool of its own: a shared one could swap their environments.
    """
    context, workers = multiprocessing.get_context("spawn"), []
    for rank in range(NUM_WORKERS):
        pool = stack.enter_context(ProcessPoolExecutor(1, context, processes.start_worker))
        seed = 1000 * (SEED + 7919 * (first_update - 1)) + rank  # a resumed run starts new episodes
        workers.append((pool, functools.partial(rollout, seed, ENVS_PER_WORKER, NUM_STEPS)))
    return workers


def copy_weights(module):
    """A module's weights for another process; they would share their memory with those that train on."""
    return {name: p.clone() for name, p in module.state_dict().items()}


def collect(workers, actor, critic, difficulty, remaining):
    """Everyone's rollout: a dict of tensors (T, N, ...), and the finished episodes."""
    weights = copy_weights(actor), copy_weights(critic)
    running = [pool.submit(roll_out, weights, difficulty, remaining) for pool, roll_out in workers]
    parts, episodes = zip(*(future.result() for future in running))
    data = {name: torch.from_numpy(np.concatenate([part[name] for part in parts], 1)) for name in parts[0]}
    return data, sum(episodes, [])


def make_batch(data, normalizer):
    """One row for each decision (T * N, ...), with its advantage and return."""
    reward = torch.stack([normalizer(*step) for step in zip(data["reward"], data["done"])])
    values = data["value"], data["next_value"]
    advantage, returns = compute_gae(reward, *values, data["terminated"], data["done"], GAMMA, GAE_LAMBDA)
    return {name: x.flatten(0, 1) for name, x in (data | {"advantage": advantage, "returns": returns}).items()}


def update(actor, critic, optimizer, batch, entropy_coef):
    """K_EPOCHS over one batch of decisions; returns the last minibatch's losses and diagnostics."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(K_EPOCHS):
        for rows in torch.randperm(len(batch["action"])).split(MINIBATCH_SIZE):
            b = {name: x[rows] for name, x in batch.items()}
            advantage = (b["advantage"] - b["advantage"].mean()) / (b["advantage"].std() + 1e-8)
            logits, value = actor(b["state"][:, :ACTOR_SIZE]), critic(b["state"])
            terms = ppo_losses(logits, value, b["action"], b["log_prob"], advantage, b["returns"], CLIP)
            loss = terms["policy_loss"] - entropy_coef * terms["entropy"] + VALUE_COEF * terms["value_loss"]
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            optimizer.step()
    return {name: x.item() for name, x in terms.items()}


def evaluate(workers, weights):
    """What an actor scores on EVAL_TRACKS, greedily."""
    job, shares = functools.partial(drive, weights), [EVAL_TRACKS[i :: len(workers)] for i in range(len(workers))]
    running = [pool.map(job, share) for (pool, _), share in zip(workers, shares)]
    returns, ends = zip(*(score for scores in running for score in scores))
    return {
        "eval_mean": np.mean(returns),
        "eval_std": np.std(returns),
        "eval_min": np.min(returns),
        "eval_laps": np.mean([end == "lap" for end in ends]),
    }


def summarize(episodes):
    """Mean return, share of finished laps and mean length of the episodes that ended in an update."""
    columns = {
        "return": [e["return"] for e in episodes],
        "laps": [e["end"] == "lap" for e in episodes],
        "length": [e["length"] for e in episodes],
    }
    return {name: np.mean(column) if column else float("nan") for name, column in columns.items()}


def save_teacher(output, number, weights, row, parts, normalizer, run):
    """Write the averaged actor, with what it scored and how it was made, and the state from which a run goes on."""
    run = run_files.until_now(run)
    metadata = {"update": str(number), **{name: f"{row[name]:.1f}" for name in ("eval_mean", "eval_std")}}
    run_files.write_file(output / "teacher.safetensors", save(weights, metadata | {"run": json.dumps(run)}))
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= {"normalizer": vars(normalizer), "update": number, "run": run}
    run_files.save_state(output / "teacher_state.pt", state)


def main():
    output, modules = ROOT / OUTPUT_DIR, (car_racing_env, perturbations, targets, teacher_file)
    run = run_files.describe_run(globals(), *map(vars, modules))
    torch.manual_seed(SEED)
    torch.set_num_threads(2)
    actor, critic = Teacher(), Critic()
    actor.net[-1].weight.data *= 0.01
    optimizer = torch.optim.Adam([*actor.parameters(), *critic.parameters()], lr=LEARNING_RATE, eps=1e-5)
    normalizer = ReturnNormalizer(NUM_WORKERS * ENVS_PER_WORKER, GAMMA)
    average = AveragedModel(actor, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    parts = {"actor": actor, "critic": critic, "optimizer": optimizer, "average": average}
    first = 1
    if RESUME:
        state = run_files.load_state(output / "teacher_state.pt")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        vars(normalizer).update(state["normalizer"])
        run = run_files.continue_from(output / "teacher_state.pt", state["run"], run, {"RESUME", "TOTAL_UPDATES"})
        first = state["update"] + 1
    print(
        f"{TOTAL_UPDATES} updates; replaces {OUTPUT_DIR}/"
        "teacher.safetensors at every evaluation (the shipped one comes back with: git checkout "
        "offline/teacher.safetensors)"
    )
    log = run_files.Log(output / "teacher_log.csv", keep_until=first - 1 if RESUME else None)
    with contextlib.ExitStack() as stack:
        workers = make_workers(stack, first)
        for number in tqdm(range(first, TOTAL_UPDATES + 1), initial=first - 1, total=TOTAL_UPDATES, unit="update"):
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - 0.98 * (number - 1) / TOTAL_UPDATES)
            difficulty = float(np.clip(number / PLAIN_UPDATES - 1, 0, 1))
            remaining = 1 - number / TOTAL_UPDATES
            data, episodes = collect(workers, actor, critic, difficulty, remaining)
            batch = make_batch(data, normalizer)
            terms = update(actor, critic, optimizer, batch, remaining * ENTROPY_COEF)
            average.update_parameters(actor)

            row = {"update": number, "decisions": number * len(batch["action"]), **summarize(episodes)}
            row |= {"entropy": terms["entropy"], "approx_kl": terms["approx_kl"]}
            row["explained_variance"] = explained_variance(batch["value"], batch["returns"])
            row |= dict.fromkeys(("eval_mean", "eval_std", "eval_min", "eval_laps"), float("nan"))
            evaluated = number % EVAL_EVERY == 0 or number == TOTAL_UPDATES
            if evaluated:
                weights = copy_weights(average.module)
                row |= evaluate(workers, weights)
            row["seconds"] = run_files.until_now(run)["seconds"]
            log.write(row)
            if evaluated:
                save_teacher(output, number, weights, row, parts, normalizer, run)
    print(f"wrote {OUTPUT_DIR}/teacher.safetensors; next: python collect_captions.py")


if __name__ == "__main__":
    checks.run(main)
