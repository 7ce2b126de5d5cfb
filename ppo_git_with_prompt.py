"""Stage 3: PPO turns the fine-tuned model's answers into a driver.

Reads the adapter of stage 2 (which names its base). Writes results/: reward_log.csv (a row per episode),
update_log.csv, eval_log.csv, graphs, videos, policy/ (the running average of the weights), state.pt (to resume),
run.json, tensorboard/.

    python ppo_git_with_prompt.py      # 9 to 25 minutes on two CPU cores; from the adapter that ships 910 to 916

What differs from textbook PPO: the backbone is frozen and runs once per decision, the epochs train the heads on its
stored features; the language model's answer is added to the action logits as a prior; dropout masks are stored too, so
that the ratio is 1 before the first step; the policy stands still while the value warms up; advantages are centred, not
scaled; mistakes are charged several times what the task charges, as discounting overpays haste; a running average of
the weights is kept."""

import contextlib
import functools
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from accelerate.utils import gather_object
from tqdm import tqdm

import car_racing_env
import evaluate
import film
import GitText2ActionWithPrompt as model_file
import instructions
import perturbations
import targets
from car_racing_env import FRAME_SKIP, VALIDATION
from GitText2ActionWithPrompt import GitText2ActionWithPrompt, to_simulator
from support import checks, plots, processes, run_files

SEED = 0
MODEL = "lora_git_caption_model_carllava"  # the adapter of stage 2, or a base that was never taught to drive
RESULTS_DIR = "results"
RESUME = False  # continue from RESULTS_DIR/state.pt

NUM_ENVS = 8  # simulators
NUM_WORKERS = 2  # processes that share them; each has a thread here, whose model runs while another one's cars drive
TORCH_THREADS = 1  # of torch, inside each of these threads; TRAIN_LORA's updates take all cores
NUM_STEPS = 512  # decisions per environment and update
INSTRUCTED_SHARE = 0.5  # of the environments: the driver is told what to do (phrasings.py), the car thrown about
CHANGE = 0.008  # chance per decision that it is told something else; three times as often while it is told to stop
THROWN = 0.001  # chance per decision, and at the start, of a throw (perturbations.py); a turned car is not charged
TOTAL_UPDATES = 48  # x NUM_ENVS x NUM_STEPS x FRAME_SKIP frames
K_EPOCHS = 5
MINIBATCH_SIZE = 256  # decisions of each process; under torchrun gradients are averaged; fewer if a large base trains
WARMUP_UPDATES = 3  # the value learns alone first: a policy that drives already has much to lose
LEARNING_RATE = 3e-4  # falls linearly to a tenth; 5e-4 on a warm policy collapsed in one update
VALUE_LEARNING_RATE = 1e-3
GAMMA = 0.98  # per decision, two seconds ahead: what a frame shows; further on the value is noise
GAE_LAMBDA = 0.95
CLIP = 0.2
ENTROPY_COEF = 0.0  # the prior's floor and KL_COEF keep it exploring
KL_COEF = 0.01  # pull towards the prior: the model's answers, or with LANGUAGE_PRIOR = 0 an even spread
VALUE_COEF = 0.5  # the heads share only the clipping of their gradients, and with TRAIN_LORA the LoRA
MAX_GRAD_NORM = 0.5
EMA_DECAY = 0.9  # per update, of the averaged weights, which are evaluated and kept
NORMALIZE_RETURN = True  # divide rewards by the running std of the discounted return

TRAIN_LORA = False  # also train a fresh LoRA on the merged backbone: slower by the backbone's backward pass
LORA_RANK = 8
LORA_ALPHA = 16
LORA_LEARNING_RATE = 1e-4

EVALUATIONS = 4  # evenly spread over the run, besides the one before training
EVAL_TRACKS = VALIDATION[:20]
VIDEO_EVERY = 200  # finished training episodes, and after 10, of the first of EVAL_TRACKS; 0: at the end only

# what a resumed run may change: none of it decides a number, but for TOTAL_UPDATES, which the learning rate follows,
# and the last bits, which depend on TORCH_THREADS
MAY_CHANGE = {"RESUME", "RESULTS_DIR", "TORCH_THREADS", "TOTAL_UPDATES", "EVALUATIONS", "VIDEO_EVERY"}


def compute_gae(reward, value, next_value, terminated, done, gamma, gae_lambda):
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

    Tensors are float32 (T, N). `next_value[t]` is the value of the state that followed step t, before any reset;
    `terminated` marks real ends, which are worth nothing afterwards; `done` every end, truncation and another
    instruction included, where the sum stops but the value is still bootstrapped. Returns advantage and return
    (advantage + value).
    """
    advantage, running = torch.empty_like(reward), 0.0
    delta = reward + gamma * next_value * (1 - terminated) - value
    for t in reversed(range(len(reward))):
        running = delta[t] + gamma * gae_lambda * (1 - done[t]) * running
        advantage[t] = running
    return advantage, advantage + value


def ppo_losses(logits, value, action, old_log_prob, advantage, returns, clip):
    """The terms of the clipped objective (Schulman et al. 2017, arXiv 1707.06347, eq. 7 and 9), and their diagnostics.

    `logits` float32 (B, A), `action` int64 (B,), the others float32 (B,); `advantage` is used as given. Returns
    scalars: policy_loss, value_loss and entropy with gradients, approx_kl and clipfrac without.
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
    """Divide rewards by the running std of the discounted return, as Gymnasium's `NormalizeReward`.

    No mean is subtracted. As there, the reward of an episode's last step begins the next sum.
    """

    def __init__(self, num_envs, gamma):
        self.gamma = gamma
        self.discounted = torch.zeros(num_envs, dtype=torch.float64)
        self.mean, self.var, self.count = 0.0, 1.0, 1e-4

    def __call__(self, reward, done):
        """Normalise one step's rewards, float32 (N,); `done` (N,), of any kind, forgets the return so far."""
        self.discounted = self.discounted * self.gamma * (1 - done.double()) + reward.double()
        batch_mean, batch_var = self.discounted.mean().item(), self.discounted.var(unbiased=False).item()
        delta, n, total = batch_mean - self.mean, len(reward), self.count + len(reward)
        m2 = self.var * self.count + batch_var * n + delta**2 * self.count * n / total
        self.mean, self.var, self.count = self.mean + delta * n / total, m2 / total, total
        return reward / (self.var + 1e-8) ** 0.5


def explained_variance(value, returns):
    """1 - Var(returns - value) / Var(returns): 1 is perfect, 0 as good as the mean."""
    return (1 - (returns - value).var() / (returns.var() + 1e-8)).item()


def make_envs(seed, num_envs=NUM_ENVS, rewards=None, frame_skip=FRAME_SKIP, rank=0, draw_instruction=instructions.draw):
    """A context with the training environments, a list of `Simulators`; enter it before torch starts its threads.

    `rewards` None are `car_racing_env.REWARDS`.
    """
    rewards = rewards or car_racing_env.REWARDS
    instructed = {"draw_instruction": draw_instruction, "change": CHANGE, "thrown": THROWN}
    makers = []
    for i in range(num_envs):
        env_seed = seed * 10_000 + rank * num_envs + i
        extras = instructed if i < INSTRUCTED_SHARE * num_envs else {}
        makers.append(functools.partial(car_racing_env.make_training_env, env_seed, rewards, frame_skip, **extras))
    return processes.simulators(makers, "SAME_STEP", NUM_WORKERS)


def observe(frames, infos):
    """What the model reads next: frames uint8 (N, 96, 96, 3), and what each driver is told, "" for nothing."""
    return frames, [said or "" for said in infos.get("instruction", [""] * len(frames))]


@torch.no_grad()
def rollout(envs, obs, generator, model, num_steps):
    """`num_steps` decisions in every environment, drawn by `generator`, from `obs` on, which is what `observe` returns.

    Returns the next `obs`, a dict of tensors (T, N, ...), the finished episodes as pairs `(decision, facts)`, and what
    was told and whether it was done as pairs `(kind, obeyed)`; kind is None or "" where nothing was.
    """
    steps, sentences, episodes, obedience = [], [], [], []
    cut_values = {}  # of what followed a decision, where the next row is of another episode or instruction
    for t in range(num_steps):
        frames, told = obs
        features, answer_log_probs = model.encode(frames, told)
        dropout = model.draw_dropout(envs.num_envs, generator)
        logits, value = model.head(features, answer_log_probs, dropout)
        log_probs = logits.log_softmax(-1)
        action = torch.multinomial(log_probs.exp(), 1, generator=generator)[:, 0]
        step = {"features": features, "answer_log_probs": answer_log_probs, "dropout": dropout, "action": action}
        step |= {"log_prob": log_probs.gather(1, action[:, None])[:, 0], "value": value}
        if model.trains_lora:  # its features change: what they are made of is kept
            step["frames"] = torch.from_numpy(frames.copy())
        sentences.append(told)
        next_frames, reward, terminated, truncated, infos = envs.step(to_simulator(action))
        obs = observe(next_frames, infos)
        ended = terminated | truncated
        told_anew = np.array([now != before for now, before in zip(obs[1], told)])
        changed = told_anew & ~ended
        for name, x in {"reward": reward, "terminated": terminated, "done": ended | changed}.items():
            step[name] = torch.as_tensor(x, dtype=torch.float32, device=model.device)
        steps.append(step)
        obedience += zip(infos.get("kind", ()), infos.get("obeyed", ()))
        for i in np.flatnonzero(changed | (truncated & ~terminated)):  # the road goes on
            last_frame = infos["final_obs"][i] if ended[i] else next_frames[i]
            cut_values[t, i] = model(last_frame[None], told[i])[1][0]
        for i in np.flatnonzero(ended):
            facts = {name: x[i] for name, x in infos["final_info"]["episode_summary"].items() if name[0] != "_"}
            episodes.append((t, facts))
    data = {name: torch.stack([step[name] for step in steps]) for name in steps[0]}
    data["instructions"] = np.array(sentences, dtype=object)
    data["next_value"] = (1 - data["done"]) * torch.cat([data["value"][1:], model(*obs)[1][None]])
    for step, value in cut_values.items():
        data["next_value"][step] = value
    return obs, data, episodes, obedience


def rollouts(workers, observations, generators, model, num_steps):
    """A `rollout` for each of `workers`, each in a thread; returns the list of the next `obs`, and the rest joined."""
    pool = ThreadPoolExecutor(len(workers))
    try:
        each = pool.map(functools.partial(rollout, model=model, num_steps=num_steps), workers, observations, generators)
        observations, parts, episodes, obedience = zip(*each)
    finally:
        pool.shutdown(wait=False)  # after Ctrl-C close the simulators: their threads end, in mid-rollout
    sentences = np.concatenate([part.pop("instructions") for part in parts], 1)
    data = {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}
    return observations, data | {"instructions": sentences}, sum(episodes, []), sum(obedience, [])


def compute_loss(model, batch, mean_advantage, warming_up):
    """The loss of some stored decisions, and the terms it is made of; while warming up it is the value's alone."""
    learned = model.trains_lora and not warming_up
    features = model.features(batch["frames"], batch["instructions"]) if learned else batch["features"]
    logits, value = model.head(features, batch["answer_log_probs"], batch["dropout"])
    # rewards are normalised; dividing by the batch's own spread too would blow up batches in which nothing happened
    advantage = batch["advantage"] - mean_advantage
    terms = ppo_losses(logits, value, batch["action"], batch["log_prob"], advantage, batch["returns"], CLIP)
    log_probs, prior = logits.log_softmax(-1), model.prior(batch["answer_log_probs"]).log_softmax(-1)
    terms["kl_to_prior"] = (log_probs.exp() * (log_probs - prior)).sum(-1).mean()
    loss = VALUE_COEF * terms["value_loss"]
    if not warming_up:
        loss = loss + terms["policy_loss"] + KL_COEF * terms["kl_to_prior"] - ENTROPY_COEF * terms["entropy"]
    return loss, terms


def update(model, optimizer, batch, accelerator, k_epochs=K_EPOCHS, warming_up=False):
    """`k_epochs` over one batch of decisions; returns mean diagnostics. While warming up only the value head learns."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    rounding = 1e-6 if model.device.type == "cpu" else 1e-3  # bfloat16 rounds by batch size
    totals, steps = {}, 0
    for _ in range(k_epochs):
        for rows in torch.randperm(len(batch["action"])).split(MINIBATCH_SIZE):
            minibatch = {name: x[rows] for name, x in batch.items()}
            mean_advantage = accelerator.reduce(minibatch["advantage"].mean(), "mean")
            loss, terms = compute_loss(model, minibatch, mean_advantage, warming_up)
            if not torch.isfinite(loss):
                raise checks.BadInput("the PPO loss is not finite: lower LEARNING_RATE; the last policy is kept")
            assert steps or terms["approx_kl"] <= rounding, "the ratio is not 1 before the first step"
            optimizer.zero_grad()
            loss.backward()
            processes.average_gradients(parameters, accelerator)
            torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            optimizer.step()
            totals = {name: totals.get(name, 0.0) + x.detach() for name, x in terms.items()}
            steps += 1
    return {name: x.item() / steps for name, x in accelerator.reduce(totals, "mean").items()}


def make_optimizer(model):
    """Adam with a learning rate of its own for the policy head, the value head and, if there is one, the LoRA."""
    rates = {"policy_head": LEARNING_RATE, "value_head": VALUE_LEARNING_RATE, "lora_": LORA_LEARNING_RATE}
    groups = []
    for part, rate in rates.items():
        parameters = [p for name, p in model.named_parameters() if part in name]
        if parameters:  # without TRAIN_LORA there is no LoRA
            groups.append({"params": parameters, "lr": rate, "peak_lr": rate})
    return torch.optim.Adam(groups, eps=1e-5)


def train(
    model, workers, accelerator, state=None, *, total_updates=TOTAL_UPDATES, num_steps=NUM_STEPS, k_epochs=K_EPOCHS,
    gamma=GAMMA, normalize_return=NORMALIZE_RETURN,
):  # fmt: skip
    """Train `model`; yields `(update, episodes, diagnostics, state)` after each update, and once before the first.

    Episodes are pairs `(decision, facts)`; another call goes on from `state` (its tensors are live: save or copy it),
    with the update after it.
    """
    num_envs = accelerator.num_processes * sum(envs.num_envs for envs in workers)
    optimizer, normalizer = make_optimizer(model), ReturnNormalizer(num_envs, gamma)
    generators = [torch.Generator(model.device).manual_seed(torch.randint(2**62, ()).item()) for _ in workers]
    average = {name: p.clone() for name, p in model.trained_parameters().items()}
    if state:
        model.load_trained(state["model"], "state.pt")
        average = {name: p.to(model.device) for name, p in state["average"].items()}
        optimizer.load_state_dict(state["optimizer"])
        vars(normalizer).update(state["normalizer"])
        own = state["processes"][accelerator.process_index]
        torch.set_rng_state(own["rng"])  # the minibatches are drawn by it
        for envs, generator, (snapshots, drawn) in zip(workers, generators, own["workers"], strict=True):
            envs.set_attr("resume_from", snapshots)
            generator.set_state(drawn)
    observations = [observe(*envs.reset()) for envs in workers]

    def saved_state(number):
        own = {"rng": torch.get_rng_state()}
        own["workers"] = [[list(envs.call("snapshot")), x.get_state()] for envs, x in zip(workers, generators)]
        state = {"update": number, "model": model.trained_parameters(), "average": average}
        state |= {"optimizer": optimizer.state_dict(), "normalizer": vars(normalizer)}
        return state | {"processes": gather_object([own])}

    if not state:
        yield 0, [], {}, saved_state(0)
    for number in range(state["update"] + 1 if state else 1, total_updates + 1):
        began = time.time()
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * (1 - 0.9 * (number - 1) / max(1, total_updates - 1))

        observations, data, episodes, obedience = rollouts(workers, observations, generators, model, num_steps)
        rollout_seconds = time.time() - began
        if normalize_return:
            data["reward"] = processes.in_step(normalizer, accelerator, data["reward"], data["done"])
        transitions = (data[name] for name in ("reward", "value", "next_value", "terminated", "done"))
        data["advantage"], data["returns"] = compute_gae(*transitions, gamma, GAE_LAMBDA)
        batch = {name: x.reshape(-1, *x.shape[2:]) for name, x in data.items()}
        diagnostics = {"learning_rate": optimizer.param_groups[0]["lr"]}
        warming_up = number <= WARMUP_UPDATES
        if model.trains_lora and not warming_up:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // accelerator.num_processes))
        diagnostics |= update(model, optimizer, batch, accelerator, k_epochs, warming_up)
        torch.set_num_threads(TORCH_THREADS)
        for name, p in model.trained_parameters().items():
            average[name].lerp_(p, 1 - EMA_DECAY)
        seconds = time.time() - began
        diagnostics["explained_variance"] = explained_variance(batch["value"], batch["returns"])
        diagnostics["decisions_per_second"] = accelerator.num_processes * len(batch["value"]) / seconds
        diagnostics |= {"update_share": 1 - rollout_seconds / seconds, "seconds": seconds}
        diagnostics |= instructions.obeyed_shares(gather_object(obedience))
        yield number, gather_object(episodes), diagnostics, saved_state(number)


def main():
    rank, world_size = processes.join_torchrun()
    results = run_files.ROOT / RESULTS_DIR
    frames_per_update = world_size * NUM_ENVS * NUM_STEPS * FRAME_SKIP
    if min(EVAL_TRACKS) < car_racing_env.TRAIN_TRACKS:
        raise checks.BadInput(f"EVAL_TRACKS = {EVAL_TRACKS}: validation tracks start at {car_racing_env.TRAIN_TRACKS}")
    with contextlib.ExitStack() as stack:
        workers = stack.enter_context(make_envs(SEED, NUM_ENVS, rank=rank))
        torch.set_num_threads(TORCH_THREADS)
        accelerator = processes.make_accelerator(model_file.device())
        stack.callback(accelerator.end_training)
        torch.manual_seed(SEED)
        model, averaged = (GitText2ActionWithPrompt.from_pretrained(MODEL) for _ in range(2))
        for each in (model, averaged):
            if TRAIN_LORA:
                each.add_lora(LORA_RANK, LORA_ALPHA)
        torch.manual_seed(SEED + rank)  # every process has the same heads, and acts by draws of its own
        facts = {"processes": world_size, "device": model.device.type, "instructions": instructions.digest()}
        modules = (model_file, car_racing_env, perturbations, targets)
        run = run_files.describe_run(globals(), *map(vars, modules), **facts | model.source)
        driver = evaluate.Policy(averaged)
        state = None
        episode = 0
        if RESUME:
            run = run_files.continue_run(results, run, MAY_CHANGE)
            state = run_files.load_state(results / "state.pt")
            episode = state["episode"]
            averaged.load_trained(state["average"], "state.pt")
        if rank == 0:
            print(f"PPO on {MODEL}: {TOTAL_UPDATES} updates of {frames_per_update:,} frames; writes {RESULTS_DIR}/")
            logs = stack.enter_context(run_files.RunLogs(results, run, state))

        evaluate_at = {TOTAL_UPDATES, *(TOTAL_UPDATES * i // EVALUATIONS for i in range(EVALUATIONS))}
        bar = tqdm(total=TOTAL_UPDATES, initial=state["update"] if state else 0, unit="update", disable=rank > 0)
        stack.enter_context(bar)  # an error begins a line of its own
        training = train(  # the defaults are those of the import, a sweep sets the constants later
            model, workers, accelerator, state, total_updates=TOTAL_UPDATES, num_steps=NUM_STEPS, k_epochs=K_EPOCHS,
            gamma=GAMMA, normalize_return=NORMALIZE_RETURN,
        )  # fmt: skip
        for number, episodes, diagnostics, new_state in training:
            if rank:  # the first process keeps the books
                continue
            now = {"update": number, "env_frames": number * frames_per_update}
            averaged.load_trained(new_state["average"], "the average")
            for decision, info in sorted(episodes, key=lambda finished: finished[0]):
                episode += 1
                frame = now["env_frames"] - frames_per_update + (decision + 1) * frames_per_update // NUM_STEPS
                logs.episode({"episode": episode, "update": number, "env_frames": frame} | info)
                if VIDEO_EVERY and (episode == 10 or episode % VIDEO_EVERY == 0):
                    film.record_video(driver, EVAL_TRACKS[0], results / f"video_episode_{episode}.mp4")
            if number:
                logs.update(now | diagnostics)
                bar.update()
            else:
                answers = evaluate.score(evaluate.Answers(model), EVAL_TRACKS)
                logs.evaluation(now | {"driver": "answers"} | answers)
            if number in evaluate_at:
                summary = evaluate.score(driver, EVAL_TRACKS)
                logs.evaluation(now | {"driver": "policy"} | summary)
                plots.draw_ppo(results)
                averaged.save_policy(results / "policy", validation=summary)
            run_files.save_state(results / "state.pt", new_state | {"episode": episode})
        if rank == 0:
            total = film.record_video(driver, EVAL_TRACKS[0], results / "video_final.mp4")
            print(f"the policy on track {EVAL_TRACKS[0]}: {total:.1f}; wrote {RESULTS_DIR}/; next: python evaluate.py")


if __name__ == "__main__":
    checks.run(main)
