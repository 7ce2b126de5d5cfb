"""PPO runs that leave no files, for the benchmarks: what the averaged policy scores on the way and at the end."""

import time

import numpy as np
import torch
from tqdm import tqdm

import car_racing_env
import evaluate
import GitText2ActionWithPrompt as model_file
import instructions
import perturbations
import ppo_git_with_prompt as ppo
import targets
from car_racing_env import FRAME_SKIP
from support import checks, processes, run_files

LOADED = run_files.run_facts()  # the commit of this code, not that of the checkout hours later
MODULES = (ppo, model_file, car_racing_env, perturbations, targets)  # whose constants a run notes
# paths, and which other runs there are
MAY_CHANGE = ppo.MAY_CHANGE - {"TOTAL_UPDATES", "EVALUATIONS"} | {"ARMS", "IN_WORDS", "TOLD", "SEEDS"}
FRAMES = ppo.TOTAL_UPDATES * ppo.NUM_ENVS * ppo.NUM_STEPS * FRAME_SKIP  # of the default run


def run(load, seed, tracks, *, frames=FRAMES, frame_skip=FRAME_SKIP, evaluations=0, envs=None, **arguments):
    """Train what `load()` returns; gives a dict (schedule, `curve`, scores on `tracks` at the end) and the driver.

    The curve has the environment frames and the score on `ppo.EVAL_TRACKS` before the run and after each of
    `evaluations` parts of it, the last one left out. At another frame skip the discount per frame and the frames per
    update stay. `envs` are arguments of `ppo.make_envs`, `arguments` those of `ppo.train`. Under torchrun an update has
    the frames of all processes, of which the first one alone is scored.
    """
    began, num_steps = time.time(), ppo.NUM_STEPS * FRAME_SKIP // frame_skip
    envs = {"num_envs": ppo.NUM_ENVS, "frame_skip": frame_skip} | (envs or {})
    arguments = {"k_epochs": ppo.K_EPOCHS, "normalize_return": ppo.NORMALIZE_RETURN} | arguments
    rank, world_size = processes.join_torchrun()
    frames_per_update = world_size * ppo.NUM_ENVS * num_steps * frame_skip
    schedule = {"gamma": ppo.GAMMA ** (frame_skip / FRAME_SKIP), "num_steps": num_steps}
    schedule["total_updates"] = updates = round(frames / frames_per_update)
    evaluate_at, curve, speeds = {updates * i // evaluations for i in range(evaluations)}, [], []
    with ppo.make_envs(seed, rank=rank, **envs) as workers:
        torch.set_num_threads(ppo.TORCH_THREADS)
        torch.manual_seed(seed)
        model, averaged = load(), load()
        torch.manual_seed(seed + rank)
        accelerator, driver = processes.make_accelerator(model_file.device()), evaluate.Policy(averaged)
        steps = ppo.train(model, workers, accelerator, **schedule, **arguments)
        for number, _, diagnostics, state in tqdm(steps, total=1 + updates, unit="update", disable=rank > 0):
            averaged.load_trained(state["average"], "the average")
            speeds += [frame_skip * diagnostics["decisions_per_second"]] if number else []
            if number in evaluate_at and rank == 0:
                scores = evaluate.evaluate(driver, ppo.EVAL_TRACKS, frame_skip=frame_skip)
                curve.append({"frames": number * frames_per_update} | evaluate.summarize(scores))
    facts = {"seed": seed, **schedule, "frames": updates * frames_per_update, "curve": curve}
    facts |= {"model": averaged.source, "instructions": instructions.digest()}
    facts["constants"] = run_files.constants_of(*map(vars, MODULES))
    facts |= {"processes": world_size, "frames_per_second": round(float(np.median(speeds)), 1)}
    if rank == 0:
        facts |= final_score(driver, tracks, frame_skip=frame_skip)
    return facts | {"seconds": round(time.time() - began)}, driver


def once(path, run, *namespaces, **facts):
    """Write `facts` and what `run()` returns to a json file, unless it is there; bad input is told and leaves it out.

    BadInput if a run that is there had, as far as it noted them, other `facts`, such as `model`, other instructions or
    constants, those of MODULES and of `namespaces`, `vars()` of others.
    """
    if path.exists():
        facts["instructions"], saved = instructions.digest(), checks.read_json(path)
        made, now = saved.get("constants", {}), run_files.constants_of(*map(vars, MODULES), *namespaces)
        files = now.keys() & made
        changed = {name for file in files for name, x in now[file].items() if made[file].get(name, x) != x}
        changed |= {name for name, x in facts.items() if saved.get(name, x) != x}
        if other := sorted(changed - MAY_CHANGE):
            raise checks.BadInput(
                f"{path} was run with another {', '.join(other)}: move {path.parent.name}/ away to run all anew, or "
                "put it back"
            )
    else:
        print(path.stem, flush=True)
        try:
            run_files.write_json(path, facts | run())
        except checks.BadInput as error:
            print(f"{path.stem} is left out: {error}", flush=True)


def load(folder, name=""):
    """The runs `<name>seed<n>.json` that are there, by seed."""
    found = [checks.read_json(path) for path in folder.glob(f"{name}seed*.json")]
    return {row["seed"]: row for row in sorted(found, key=lambda row: row["seed"])}


def over_seeds(means):
    """Mean ± std of several seeds' means, as text."""
    return f"{np.mean(means):.1f} ± {np.std(means, ddof=1):.1f}" if len(means) > 1 else "one seed"


def paired(ours, theirs):
    """Mean difference of two lists, track by track, and its standard error."""
    difference = np.array([x - y for x, y in zip(ours, theirs, strict=True)])
    return float(difference.mean()), float(difference.std(ddof=1) / len(difference) ** 0.5)


def final_score(driver, tracks, **how):
    """How a driver does on tracks at the end of a run, and by which code on which machine: a dict."""
    scores = evaluate.evaluate(driver, tracks, **how)
    facts = {"tracks": [tracks[0], tracks[-1]], **evaluate.summarize(scores)}
    facts |= {"returns": [round(x["return"], 1) for x in scores], "ends": [x["end"] for x in scores]}
    return facts | LOADED
