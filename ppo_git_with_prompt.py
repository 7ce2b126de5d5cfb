"""Stage 3: PPO turns the fine-tuned model's answers into a driver.

Reads the adapter of stage 2 (which names its base). Writes results/: reward_log.csv (a row per episode), update_log.csv,
eval_log.csv, reward_curve.png, ppo_losses.png, ppo_diagnostics.png, videos, policy/ (the best on the validation tracks),
state.pt (to resume), run.json and, if TensorBoard is installed, its scalars.

    python ppo_git_with_prompt.py      # 8 minutes on two CPU cores

What differs from textbook PPO: the backbone is frozen, runs once per decision, and its features are stored, so the
epochs train the head alone; the language model's answer is added to the action logits as a prior; dropout masks are
stored with the rollout, so that the ratio is 1 before the first step; the policy rests while the value warms up;
advantages are centred but not scaled; the training rewards (car_racing_env.py) weigh mistakes against haste as the task
does.
"""

import collections
import datetime
import functools
import io
import os
import pickle
import shutil
import sys
import time

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from tqdm import tqdm

import car_racing_env
import checks
import draw_results
import evaluate
import GitText2ActionWithPrompt as model_file
import run_files
from run_files import ROOT

SEED = 0
ADAPTER = "lora_git_caption_model_carllava"  # "" asks the base BASE_WITHOUT_ADAPTER, which was never taught to drive
BASE_WITHOUT_ADAPTER = "offline/git-tiny"
RESULTS_DIR = "results"
RESUME = False  # continue from RESULTS_DIR/state.pt

NUM_ENVS = 8  # simulators, each in a process of its own; at least 2
TORCH_THREADS = 1  # on two cores the simulators need the other one
NUM_STEPS = 512  # decisions per environment and update
TOTAL_UPDATES = 36  # x NUM_ENVS x NUM_STEPS x FRAME_SKIP frames
K_EPOCHS = 5
MINIBATCH_SIZE = 512  # decisions
WARMUP_UPDATES = 3  # the value learns alone first: a policy that drives already has much to lose
LEARNING_RATE = 3e-4  # falls linearly to a tenth; 5e-4 on a warm policy collapsed in one update
VALUE_LEARNING_RATE = 1e-3
GAMMA = 0.98  # per decision, two seconds ahead: what a frame shows; further on the value is noise
GAE_LAMBDA = 0.95
CLIP = 0.2
ENTROPY_COEF = 0.0
KL_COEF = 0.01  # pull towards the language model's answers
VALUE_COEF = 0.5
MAX_GRAD_NORM = 0.5
NORMALIZE_RETURN = True  # divide rewards by the running std of the discounted return

TRAIN_LORA = False  # also train a fresh LoRA on the merged backbone: slower by the backbone's backward pass
LORA_RANK, LORA_ALPHA = 8, 16
LORA_LEARNING_RATE = 1e-4
MICROBATCH_SIZE = 128  # decisions per pass backward through the backbone; a minibatch's gradients add up

EVALUATIONS = 4  # evenly spread over the run, besides the one before training
EVAL_TRACKS = range(100_000, 100_020)  # validation tracks
STD_WEIGHT = 0.5  # policy/ is the evaluated one with the highest mean - STD_WEIGHT * std
VIDEO_EVERY = 200  # finished training episodes; and one after 10
VIDEO_TRACK = 100_000


def compute_gae(reward, value, next_value, terminated, done, gamma, gae_lambda):
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

    Every argument is a float32 tensor (T, N) but `gamma` and `gae_lambda`. `next_value[t]` is the value of the state
    that followed step t, before any reset; `terminated` marks real ends, which are worth nothing afterwards; `done`
    marks every episode end, truncation included, where the sum stops but the value is still bootstrapped.

    Returns advantage and return (advantage + value), each (T, N).
    """
    advantage = torch.zeros_like(reward)
    running = torch.zeros_like(reward[0])
    delta = reward + gamma * next_value * (1 - terminated) - value
    for t in reversed(range(len(reward))):
        running = delta[t] + gamma * gae_lambda * (1 - done[t]) * running
        advantage[t] = running
    return advantage, advantage + value


def ppo_losses(logits, value, action, old_log_prob, advantage, returns, clip):
    """The terms of the clipped objective (Schulman et al. 2017, arXiv 1707.06347, eq. 7 and 9), and their diagnostics.

    `logits` float32 (B, A), `action` int64 (B,), the others float32 (B,); `advantage` is used as given.
    Returns scalars by their usual names: policy_loss, value_loss and entropy carry gradients, approx_kl and clipfrac none.
    """
    log_probs = logits.log_softmax(-1)
    log_ratio = log_probs.gather(1, action[:, None])[:, 0] - old_log_prob
    ratio = log_ratio.exp()
    return {
        "policy_loss": -torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean(),
        "value_loss": 0.5 * (value - returns).square().mean(),
        "entropy": -(log_probs.exp() * log_probs).sum(-1).mean(),
        "approx_kl": (ratio - 1 - log_ratio).mean().detach(),  # Schulman, "Approximating KL divergence", k3
        "clipfrac": ((ratio - 1).abs() > clip).float().mean(),
    }


class ReturnNormalizer:
    """Divide rewards by the running standard deviation of the discounted return, as Gymnasium's `NormalizeReward`.

    No mean is subtracted: the sign of a reward stays. As there, the reward of an episode's last step begins the next sum.
    The statistics belong in the checkpoint (`state_dict`).
    """

    def __init__(self, num_envs, gamma):
        self.gamma = gamma
        self.discounted = torch.zeros(num_envs, dtype=torch.float64)
        self.mean, self.var, self.count = 0.0, 1.0, 1e-4

    def __call__(self, reward, done):
        """Normalise one step's rewards, float32 (N,); `done` (N,), truncation included, forgets the return so far."""
        self.discounted = self.discounted * self.gamma * (1 - done.double()) + reward.double()
        batch_mean, batch_var = self.discounted.mean().item(), self.discounted.var(unbiased=False).item()
        batch_count = len(reward)
        delta, total = batch_mean - self.mean, self.count + batch_count
        m2 = self.var * self.count + batch_var * batch_count + delta**2 * self.count * batch_count / total
        self.mean, self.var, self.count = self.mean + delta * batch_count / total, m2 / total, total
        return reward / (self.var + 1e-8) ** 0.5

    def state_dict(self):
        return {name: getattr(self, name) for name in ("discounted", "mean", "var", "count")}

    def load_state_dict(self, state):
        vars(self).update(state)


def explained_variance(value, returns):
    """1 - Var(returns - value) / Var(returns): 1 is perfect, 0 as good as the mean."""
    return (1 - (returns - value).var() / (returns.var() + 1e-8)).item()


def make_worker_env(index, seed, **settings):
    """The training environment number `index`, for a worker process."""
    evaluate.leave_ctrl_c_to_the_parent()
    return car_racing_env.make_training_env(seed * 10_000 + index, **settings)


def env_settings():
    """The training environment's constants as arguments, so that every worker gets this process's values."""
    world = car_racing_env
    return dict(
        frame_skip=world.FRAME_SKIP, tracks=world.TRAIN_TRACKS, reward_clip=world.REWARD_CLIP,
        grass_limit=world.GRASS_LIMIT, grass_penalty=world.GRASS_PENALTY, miss_penalty=world.MISS_PENALTY,
        penalty_ramp=world.PENALTY_RAMP, lap_bonus=world.LAP_BONUS,
    )  # fmt: skip


def make_envs(seed, rank):
    """NUM_ENVS training environments in two halves: while one half simulates, the model looks at the other.

    `rank` is torchrun's: each process has other tracks. Started before torch starts its threads.
    """
    settings = env_settings()
    return [
        car_racing_env.AsyncVectorEnv(
            [functools.partial(make_worker_env, int(index), seed, **settings) for index in half], "SAME_STEP"
        )
        for half in np.array_split(np.arange(NUM_ENVS) + rank * NUM_ENVS, 2)
    ]


def load_model():
    """The fine-tuned model that ADAPTER names, with a fresh LoRA if TRAIN_LORA."""
    if ADAPTER:
        model = evaluate.load_answerer(ADAPTER)
    else:
        model = model_file.GitText2ActionWithPrompt.from_pretrained(BASE_WITHOUT_ADAPTER)
    if TRAIN_LORA:
        model.add_lora(LORA_RANK, LORA_ALPHA)
    return model


def policy_facts():
    """What a saved policy must remember to be loaded again."""
    adapter = ROOT / ADAPTER
    base = model_file.read_task(adapter)["base_model"] if ADAPTER else BASE_WITHOUT_ADAPTER
    adapter_hash = run_files.file_hash(adapter / "adapter_model.safetensors") if ADAPTER else ""
    lora = {"lora_rank": LORA_RANK, "lora_alpha": LORA_ALPHA} if TRAIN_LORA else {}
    facts = {"base_model": base, "adapter": ADAPTER, "adapter_hash": adapter_hash}
    return facts | {"frame_skip": car_racing_env.FRAME_SKIP} | lora


@torch.no_grad()
def collect_rollout(halves, frames, model):
    """NUM_STEPS decisions in every environment, the two halves taking turns between model and simulators.

    `frames` is a list of two arrays, uint8 (N / 2, 96, 96, 3). Returns the next frames, a dict of tensors (T, N, ...)
    and the finished episodes as `(decision, info)` pairs.
    """
    frames, rollouts, episodes = list(frames), ({}, {}), []
    pending = [None, None]

    def to_float(x):
        return torch.from_numpy(x).to(model.device, torch.float32)

    def receive(half):
        """Finish the half's step that is under way: its results complete the decision that `act` began."""
        step, t = pending[half]
        frames[half], reward, terminated, truncated, infos = halves[half].step_wait()
        done = terminated | truncated
        step |= {
            "reward": to_float(reward),
            "terminated": to_float(terminated),
            "done": to_float(done),
            "final_value": torch.zeros(len(done), device=model.device),
        }
        for i in np.flatnonzero(done):
            keys = ("episode_return", "episode_length", "end", "track_seed")
            episodes.append((t, {key: infos["final_info"][key][i] for key in keys}))
            if truncated[i] and not terminated[i]:  # frame 1000: the road goes on
                step["final_value"][i] = model(infos["final_obs"][i][None])[1][0]
        for key, x in step.items():
            rollouts[half].setdefault(key, []).append(x)

    def act(half, t):
        """Decide on the half's frames and send its simulators off."""
        features, answer_log_probs = model.encode(frames[half])
        dropout = model.draw_dropout(len(features))
        logits, value = model.head(features, answer_log_probs, dropout)
        log_probs = logits.log_softmax(-1)
        action = torch.multinomial(log_probs.exp(), 1)[:, 0]
        step = {
            "features": features,
            "answer_log_probs": answer_log_probs,
            "dropout": dropout,
            "action": action,
            "log_prob": log_probs.gather(1, action[:, None])[:, 0],
            "value": value,
        }
        if TRAIN_LORA:
            step["frames"] = torch.from_numpy(frames[half])
        halves[half].step_async(evaluate.to_simulator(action))
        pending[half] = step, t

    for t in range(NUM_STEPS):
        for half in (0, 1):
            if t:
                receive(half)
            act(half, t)
    for half in (0, 1):
        receive(half)
    for half, rollout in enumerate(rollouts):
        rollout |= {key: torch.stack(x) for key, x in rollout.items()}
        next_value = torch.cat([rollout["value"][1:], model(frames[half])[1][None]])
        rollout["next_value"] = torch.where(rollout["done"].bool(), rollout.pop("final_value"), next_value)
    return frames, {key: torch.cat([rollout[key] for rollout in rollouts], 1) for key in rollouts[0]}, episodes


def normalize_rewards(normalizer, reward, done, accelerator):
    """Rewards (T, N) of this process through the `ReturnNormalizer` that all processes' environments share."""
    union = accelerator.gather(torch.stack([reward, done]).permute(2, 0, 1)).cpu()  # (processes * N, 2, T)
    scaled = torch.stack([normalizer(*step) for step in union.permute(2, 1, 0)])
    return scaled.chunk(accelerator.num_processes, 1)[accelerator.process_index].to(reward.device)


def average_gradients(parameters, accelerator):
    """Replace each gradient by its mean over the processes, all in one message."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    mean = accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "mean")
    for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients])):
        gradient.copy_(part.view_as(gradient))


def update_policy(model, optimizer, batch, warming_up, accelerator):
    """K_EPOCHS over one batch of decisions; returns mean diagnostics. While warming up only the value head learns.

    With several processes MINIBATCH_SIZE is each one's share: the step is that of the union.
    """
    check_ratio(model, batch)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    totals, steps = {}, 0
    for _ in range(K_EPOCHS):
        for rows in torch.randperm(len(batch["action"])).split(MINIBATCH_SIZE):
            # rewards are normalised; dividing by the batch's own spread too would blow up batches in which nothing happened
            mean_advantage = accelerator.reduce(batch["advantage"][rows].mean(), "mean")
            optimizer.zero_grad()
            for part in rows.split(MICROBATCH_SIZE if TRAIN_LORA else MINIBATCH_SIZE):
                b, share = {key: x[part] for key, x in batch.items()}, len(part) / len(rows)
                features = model.features(b["frames"]) if TRAIN_LORA and not warming_up else b["features"]
                logits, value = model.head(features, b["answer_log_probs"], b["dropout"])
                advantage = b["advantage"] - mean_advantage
                terms = ppo_losses(logits, value, b["action"], b["log_prob"], advantage, b["returns"], CLIP)
                log_probs, prior = logits.log_softmax(-1), model.prior(b["answer_log_probs"]).log_softmax(-1)
                terms["kl_to_answers"] = (log_probs.exp() * (log_probs - prior)).sum(-1).mean()
                loss = VALUE_COEF * terms["value_loss"]
                if not warming_up:
                    loss = loss + terms["policy_loss"] + KL_COEF * terms["kl_to_answers"]
                    loss = loss - ENTROPY_COEF * terms["entropy"]
                if not torch.isfinite(loss):
                    raise checks.BadInput("the PPO loss is not finite: lower LEARNING_RATE; the last policy is kept")
                (share * loss).backward()
                totals = {key: totals.get(key, 0.0) + share * x.detach() for key, x in terms.items()}
            if accelerator.num_processes > 1:
                average_gradients(parameters, accelerator)
            torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            optimizer.step()
            # `model.weights` goes by the version, which fused optimizers do not raise
            torch.autograd.graph.increment_version(parameters)
            steps += 1
    return {key: x.item() / steps for key, x in accelerator.reduce(totals, "mean").items()}


@torch.no_grad()
def check_ratio(model, batch):
    """Before the first step the new policy is the old one: fail loudly if dropout masks or features were not kept."""
    b = {key: x[:MINIBATCH_SIZE] for key, x in batch.items()} if TRAIN_LORA else batch
    features = model.features(b["frames"]) if TRAIN_LORA else b["features"]
    logits, _ = model.head(features, b["answer_log_probs"], b["dropout"])
    log_prob = logits.log_softmax(-1).gather(1, b["action"][:, None])[:, 0]
    error = ((log_prob - b["log_prob"]).exp() - 1).abs().max().item()
    tolerance = 0.05 if TRAIN_LORA and model.device.type == "cuda" else 1e-4  # bfloat16 rounds by batch size
    if error > tolerance:
        raise RuntimeError(
            f"the policy ratio is off by {error:.2g} before the first step: the rollout does not fit the policy"
        )


def tensorboard(folder, last_frame):
    """TensorBoard's writer, or None where it is not installed; what an earlier start wrote after `last_frame` is hidden."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder, purge_step=last_frame + 1)


def log_evaluation(driver, name, update, env_frames, eval_log, writer):
    """Drive EVAL_TRACKS, log and print the scores; returns what chooses the best policy, mean - STD_WEIGHT * std."""
    summary = evaluate.summarize(evaluate.evaluate(driver, EVAL_TRACKS, evaluate.NUM_ENVS))
    eval_log.write({"update": update, "env_frames": env_frames, "driver": name, **summary})
    if writer:
        writer.add_scalar(f"eval/{name}_return", summary["mean"], env_frames)
    tqdm.write(
        f"update {update}, {name}: {summary['mean']:.1f} ± {summary['std']:.1f} over {len(EVAL_TRACKS)} validation tracks, "
        f"{summary['laps_finished_percent']:.0f} % laps"
    )
    return summary["mean"] - STD_WEIGHT * summary["std"]


def run_identity(facts, world_size):
    """What a resumed run must share with the one that it continues, the policy's facts among it."""
    facts = {key: x for key, x in facts.items() if key != "adapter"}  # its hash says which it is, the folder may move
    return facts | model_file.policy_constants() | {
        "seed": SEED, "processes": world_size, "num_envs": NUM_ENVS, "num_steps": NUM_STEPS, "train_lora": TRAIN_LORA,
        "train_tracks": car_racing_env.TRAIN_TRACKS, "eval_tracks": str(EVAL_TRACKS), "std_weight": STD_WEIGHT,
    }  # fmt: skip


def load_state(path, identity):
    """The state that the last finished update left, checked against what it depends on; None if there is none yet."""
    if not path.exists():
        if (
            len(run_files.read_log(path.with_name("update_log.csv"))) > 1
        ):  # a run killed before its first state has one row
            raise checks.BadInput(
                f"{path.parent}/ has a run's logs but no state.pt: restore it, or set RESUME to False"
            )
        print(f"RESUME = True, but there is no {path}: starts from the beginning")
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = dict(state)["identity"]
    except (RuntimeError, OSError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise checks.BadInput(
            f"cannot read {path} ({(str(error) or repr(error)).splitlines()[0]}): set RESUME to False to start anew"
        ) from None
    for name, ours in identity.items():
        if saved.get(name) != ours:
            raise checks.BadInput(
                f"{path} is of a run with {name} = {saved.get(name)!r}, now {ours!r}: put it back, or set RESUME to False to "
                "start anew"
            )
    return state


def save_state(path, state):
    """Replace the resumable state at once, so that a kill at any moment leaves a whole one."""
    buffer = io.BytesIO()  # torch's own file writer hides a full disk behind another error
    torch.save(state, buffer)
    run_files.write_file(path, buffer.getvalue())


def rng_states(device):
    """The generators that actions, dropout masks and minibatches are drawn from."""
    cuda = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state()} | cuda


def set_rng_states(states, device):
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def main():
    car_racing_env.check_constants()
    checks.check_constants(
        globals(), SEED=(int, 0, None), NUM_ENVS=(int, 2, None), TORCH_THREADS=(int, 1, None), NUM_STEPS=(int, 1, None),
        TOTAL_UPDATES=(int, 1, None), K_EPOCHS=(int, 1, None), MINIBATCH_SIZE=(int, 1, None), RESUME=(bool, None, None),
        WARMUP_UPDATES=(int, 0, None), LEARNING_RATE=(float, 0, 1), VALUE_LEARNING_RATE=(float, 0, 1),
        GAMMA=(float, 0, 0.9999), GAE_LAMBDA=(float, 0, 1), CLIP=(float, 0, 1), ENTROPY_COEF=(float, 0, None),
        KL_COEF=(float, 0, None), VALUE_COEF=(float, 0, None), MAX_GRAD_NORM=(float, 0, None),
        NORMALIZE_RETURN=(bool, None, None), TRAIN_LORA=(bool, None, None), EVALUATIONS=(int, 1, None),
        MICROBATCH_SIZE=(int, 1, None), VIDEO_EVERY=(int, 1, None), VIDEO_TRACK=(int, 0, None),
        LORA_RANK=(int, 1, None), LORA_ALPHA=(float, 0, None), LORA_LEARNING_RATE=(float, 0, 1),
        STD_WEIGHT=(float, 0, None), EVAL_TRACKS=(range, None, None), ADAPTER=(str, None, None),
        BASE_WITHOUT_ADAPTER=(str, None, None), RESULTS_DIR=(str, None, None),
    )  # fmt: skip
    if not EVAL_TRACKS:
        raise checks.BadInput("EVAL_TRACKS in ppo_git_with_prompt.py is empty: use range(100_000, 100_020)")
    began, facts = time.time(), run_files.run_facts() | {"frame_skip": car_racing_env.FRAME_SKIP}
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
    results, facts_of_policy = ROOT / RESULTS_DIR, policy_facts()
    identity = run_identity(facts_of_policy, world_size)
    state = load_state(results / "state.pt", identity) if RESUME else None
    envs = make_envs(SEED, rank)
    writer, began_writing, bar = None, False, None
    try:
        threads_of_update = torch.get_num_threads() if TRAIN_LORA else TORCH_THREADS  # the simulators rest meanwhile
        torch.set_num_threads(TORCH_THREADS)
        # the other processes wait while the first one evaluates
        patience = InitProcessGroupKwargs(timeout=datetime.timedelta(hours=6))
        accelerator = Accelerator(cpu=model_file.device().type == "cpu", kwargs_handlers=[patience])
        torch.manual_seed(SEED)
        model = load_model()
        groups = [
            {"params": [*model.policy_head.parameters()], "lr": LEARNING_RATE},
            {"params": [*model.value_head.parameters()], "lr": VALUE_LEARNING_RATE},
        ]
        if TRAIN_LORA:
            lora = [p for name, p in model.named_parameters() if "lora_" in name]
            groups.append({"params": lora, "lr": LORA_LEARNING_RATE})
        optimizer = torch.optim.Adam(groups, eps=1e-5)
        peak_rates = [group["lr"] for group in groups]
        normalizer = ReturnNormalizer(world_size * NUM_ENVS, GAMMA)
        first_update, episode, env_frames, best = 1, 0, 0, -np.inf
        seconds_before = state["seconds"] if state else 0.0
        if rank:
            torch.manual_seed(SEED + rank)  # the same start, other actions
        if state:
            model.load_state_dict(state["model"], strict=False)
            optimizer.load_state_dict(state["optimizer"])
            normalizer.load_state_dict(state["normalizer"])
            first_update, episode = state["update"] + 1, state["episode"]
            env_frames, best = state["env_frames"], state["best"]
            set_rng_states(state["processes"][rank]["rng"], model.device)
            for half, snapshots in zip(envs, state["processes"][rank]["episodes"]):
                half.set_attr("resume_from", snapshots)
        frames_per_update = world_size * NUM_ENVS * NUM_STEPS * car_racing_env.FRAME_SKIP
        results.mkdir(parents=True, exist_ok=True)
        if accelerator.is_main_process:
            decisions = (TOTAL_UPDATES - first_update + 1) * NUM_ENVS * NUM_STEPS
            expected = (0.02 if TRAIN_LORA else 0.0025) * decisions + 1.0 * (EVALUATIONS + 1) * len(EVAL_TRACKS)
            print(
                f"PPO on {ADAPTER or BASE_WITHOUT_ADAPTER}: {TOTAL_UPDATES} updates of {frames_per_update:,} frames in "
                f"{world_size * NUM_ENVS} environments, {sum(p.numel() for g in groups for p in g['params']):,} parameters "
                f"train; writes {RESULTS_DIR}/, {checks.duration(expected)} for git-tiny"
            )
            began_writing = True
            if not state:
                if (results / "state.pt").exists():
                    print(f"replaces the run in {RESULTS_DIR}/")
                (results / "state.pt").unlink(missing_ok=True)
                shutil.rmtree(results / "tensorboard", ignore_errors=True)
            resume_after = state["update"] if state else None
            reward_log, update_log, eval_log = (
                run_files.Log(results / f"{name}_log.csv", keep_until=resume_after)
                for name in ("reward", "update", "eval")
            )
            writer = tensorboard(results / "tensorboard", env_frames)
        driver = evaluate.Policy(model)

        if accelerator.is_main_process and not state:
            log_evaluation(evaluate.Answers(model), "answers", 0, 0, eval_log, writer)
            best = log_evaluation(driver, "policy", 0, 0, eval_log, writer)
            draw_results.draw(results)
            model.save_policy(results / "policy", **facts_of_policy)
        frames = [half.reset()[0] for half in envs]
        recent = collections.deque(maxlen=50)
        bar = tqdm(
            range(first_update, TOTAL_UPDATES + 1), initial=first_update - 1, total=TOTAL_UPDATES, unit="update",
            disable=not accelerator.is_main_process,
        )  # fmt: skip
        for update in bar:
            started = time.time()
            decay = 1 - 0.9 * (update - 1) / max(1, TOTAL_UPDATES - 1)
            for group, peak in zip(optimizer.param_groups, peak_rates):
                group["lr"] = peak * decay
            frames, rollout, episodes = collect_rollout(envs, frames, model)
            rollout_seconds = time.time() - started
            reward = rollout["reward"]
            if NORMALIZE_RETURN:
                reward = normalize_rewards(normalizer, reward, rollout["done"], accelerator)
            advantage, returns = compute_gae(
                reward,
                rollout["value"],
                rollout["next_value"],
                rollout["terminated"],
                rollout["done"],
                GAMMA,
                GAE_LAMBDA,
            )
            keys = ["features", "answer_log_probs", "dropout", "action", "log_prob", "value"] + ["frames"] * TRAIN_LORA
            batch = {key: rollout[key].flatten(0, 1) for key in keys}
            batch |= {"advantage": advantage.flatten(), "returns": returns.flatten()}
            torch.set_num_threads(threads_of_update)
            diagnostics = update_policy(model, optimizer, batch, update <= WARMUP_UPDATES, accelerator)
            torch.set_num_threads(TORCH_THREADS)
            seconds = time.time() - started
            snapshots = [list(half.call("snapshot")) for half in envs]
            everyone = gather_object([{"rng": rng_states(model.device), "episodes": snapshots}])
            episodes = sorted(gather_object(episodes), key=lambda finished: finished[0])
            if not accelerator.is_main_process:
                continue

            for decision, info in episodes:
                episode += 1
                frame = env_frames + (decision + 1) * frames_per_update // NUM_STEPS
                reward_log.write({
                    "episode": episode, "update": update, "env_frames": frame,
                    "return": float(info["episode_return"]), "length": int(info["episode_length"]),
                    "end": info["end"], "track_seed": int(info["track_seed"]),
                })  # fmt: skip
                recent.append(float(info["episode_return"]))
                if writer:
                    writer.add_scalar("charts/episodic_return", info["episode_return"], frame)
                if episode == 10 or episode % VIDEO_EVERY == 0:
                    evaluate.record_video(driver, VIDEO_TRACK, results / f"video_episode_{episode}.mp4")
            env_frames += frames_per_update
            row = {
                "update": update, "env_frames": env_frames, "learning_rate": optimizer.param_groups[0]["lr"], **diagnostics,
                "explained_variance": explained_variance(batch["value"], batch["returns"]),
                "decisions_per_second": world_size * NUM_ENVS * NUM_STEPS / seconds,
                "update_share": 1 - rollout_seconds / seconds, "seconds": seconds,
            }  # fmt: skip
            update_log.write(row)
            if writer:
                for key, x in row.items():
                    writer.add_scalar(f"losses/{key}", x, env_frames)
            bar.set_postfix(
                episodic_return=f"{np.mean(recent):.0f}" if recent else "-", fps=f"{frames_per_update / seconds:.0f}"
            )
            evaluations_done = update * EVALUATIONS // TOTAL_UPDATES
            if evaluations_done > (update - 1) * EVALUATIONS // TOTAL_UPDATES:
                score = log_evaluation(driver, "policy", update, env_frames, eval_log, writer)
                draw_results.draw(results)
                if score > best:
                    best = score
                    model.save_policy(results / "policy", **facts_of_policy)
            save_state(results / "state.pt", {
                "model": model.trained_parameters(), "optimizer": optimizer.state_dict(),
                "normalizer": normalizer.state_dict(), "update": update, "episode": episode, "env_frames": env_frames,
                "best": float(best), "processes": everyone, "identity": identity,
                "seconds": seconds_before + time.time() - began,
            })  # fmt: skip
        if accelerator.is_main_process:
            best_driver = evaluate.Policy(model_file.GitText2ActionWithPrompt.from_policy(results / "policy"))
            total = evaluate.record_video(best_driver, VIDEO_TRACK, results / "video_final.mp4")
            print(f"best policy on track {VIDEO_TRACK}: {total:.1f} (video_final.mp4)")
    except KeyboardInterrupt:
        raise SystemExit(
            "stopped by Ctrl-C: logs, graphs and the last saved policy are kept; RESUME = True continues after the last update"
        ) from None
    except (EOFError, ConnectionError):
        raise checks.BadInput(
            "a simulator's process ended (killed, or out of memory?): RESUME = True continues after the last update; "
            "lower NUM_ENVS in ppo_git_with_prompt.py if it happens again"
        ) from None
    finally:
        if bar is not None:
            bar.close()
        for half in envs:
            evaluate.close_envs(half)
        if writer:
            writer.close()
        if began_writing:
            modules = [sys.modules[__name__], model_file, car_racing_env]
            run_files.write_run(results, modules, began - seconds_before, facts)
            draw_results.draw(results)
    accelerator.end_training()
    if rank == 0:
        print(f"wrote {RESULTS_DIR}/ in {(time.time() - began) / 60:.1f} minutes; next: python evaluate.py")


if __name__ == "__main__":
    checks.run(main)
