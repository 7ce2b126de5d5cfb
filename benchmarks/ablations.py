"""Which part does it? PPO runs of 150,000 frames with one thing changed, scored on the validation tracks.

Writes benchmarks/ablations/<name>_seed<n>.json as each run ends, and skips those that are there: stop and start at will.
At the end it prints `table()`. The frames, the discount per frame and the frames per update are the same in every run.

    python -m benchmarks.ablations      # 7 minutes a run on two CPU cores
"""

import json
import multiprocessing
import tempfile
from pathlib import Path

import numpy as np

import run_files

OUTPUT = Path(__file__).parent / "ablations"
SEEDS = (1, 2)
FRAMES = 150_000
TRACKS = range(100_000, 100_100)
# name: constants by module; "ppo" is the run's script, "model" the model class file, "world" the environment
CHANGES = {
    "as it is": {},
    "no return normalisation": {"ppo": {"NORMALIZE_RETURN": False}},
    "hidden layer of 32, no dropout": {"model": {"HEAD_SIZE": 32, "DROPOUT": 0.0}},
    "no clipped rewards": {"world": {"REWARD_CLIP": 1e9}},
    "K_EPOCHS = 1": {"ppo": {"K_EPOCHS": 1}},
    "LANGUAGE_PRIOR = 0": {"model": {"LANGUAGE_PRIOR": 0.0}},
    "base without the adapter, LANGUAGE_PRIOR = 0": {"ppo": {"ADAPTER": ""}, "model": {"LANGUAGE_PRIOR": 0.0}},
    "penalties from the start": {"world": {"PENALTY_RAMP": 0.0}},
    "FRAME_SKIP = 1": {"world": {"FRAME_SKIP": 1}},
    "FRAME_SKIP = 4": {"world": {"FRAME_SKIP": 4}},
    "TRAIN_LORA": {"ppo": {"TRAIN_LORA": True}},  # five passes backward through the model: half an hour
}


def run(changes, seed, path):
    """One PPO run in this process; its last policy's score on TRACKS goes to `path`."""
    import car_racing_env
    import evaluate
    import GitText2ActionWithPrompt as model_file
    import ppo_git_with_prompt as ppo

    modules = {"ppo": ppo, "model": model_file, "world": car_racing_env}
    for module, constants in changes.items():
        for name, value in constants.items():
            setattr(modules[module], name, value)
    skip = car_racing_env.FRAME_SKIP
    car_racing_env.check_frame_skip = lambda *args: None  # the adapter was taught at skip 2: that is the experiment
    ppo.GAMMA **= skip / 2
    ppo.NUM_STEPS = ppo.NUM_STEPS * 2 // skip
    ppo.SEED, ppo.TOTAL_UPDATES = seed, round(FRAMES / (ppo.NUM_ENVS * ppo.NUM_STEPS * skip))
    ppo.EVALUATIONS, ppo.VIDEO_EVERY = 1, 10**9
    scores = {}
    evaluate_tracks = evaluate.evaluate

    def evaluate_the_last(driver, tracks, num_envs):
        """Only the evaluation at the end costs time; the one before training is that of the answers, known already."""
        if scores.setdefault("calls", 0) < 2:
            scores["calls"] += 1
            return [{"return": 0.0, "end": "time"}]
        scores["last"] = evaluate_tracks(driver, TRACKS, num_envs)
        return scores["last"]

    evaluate.evaluate = evaluate_the_last
    evaluate.record_video = lambda *args: 0.0
    with tempfile.TemporaryDirectory() as folder:
        ppo.RESULTS_DIR = folder
        ppo.main()
    schedule = {"gamma": ppo.GAMMA, "num_steps": ppo.NUM_STEPS, "total_updates": ppo.TOTAL_UPDATES}
    facts = {
        "changes": changes,
        "seed": seed,
        **schedule,
        "frames": ppo.TOTAL_UPDATES * ppo.NUM_ENVS * ppo.NUM_STEPS * skip,
    }
    summary = evaluate.summarize(scores["last"])
    returns = [round(score["return"], 1) for score in scores["last"]]
    run_files.write_json(path, facts | summary | {"returns": returns} | run_files.run_facts())


def table():
    """The runs that are there, as a Markdown table; a change's difference to "as it is" for each seed that both have."""
    runs = {name: {} for name in CHANGES}
    for name in CHANGES:
        for path in OUTPUT.glob(f"{name}_seed*.json"):
            row = json.loads(path.read_text())
            runs[name][row["seed"]] = row
    seeds = " | ".join(f"seed {seed}" for seed in SEEDS)
    lines = [
        f"| change | {seeds} | mean ± std over seeds | minus as it is, each seed |",
        "|---" * (len(SEEDS) + 3) + "|",
    ]
    for name, rows in runs.items():
        if not rows:
            continue
        each = [f"{rows[seed]['mean']:.1f} ± {rows[seed]['std']:.1f}" if seed in rows else "" for seed in SEEDS]
        means = [row["mean"] for row in rows.values()]
        over_seeds = f"{np.mean(means):.1f} ± {np.std(means, ddof=1):.1f}" if len(rows) > 1 else "one seed"
        both = [seed for seed in SEEDS if seed in rows and seed in runs["as it is"] and name != "as it is"]
        minus = ", ".join(f"{rows[seed]['mean'] - runs['as it is'][seed]['mean']:+.1f}" for seed in both)
        lines.append(f"| {name} | {' | '.join(each)} | {over_seeds} | {minus} |")
    return "\n".join(lines)


def main():
    OUTPUT.mkdir(exist_ok=True)
    for name, changes in CHANGES.items():
        for seed in SEEDS:
            path = OUTPUT / f"{name}_seed{seed}.json"
            if path.exists():
                continue
            print(f"{name}, seed {seed}", flush=True)
            process = multiprocessing.get_context("spawn").Process(target=run, args=(changes, seed, path))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"the run {name!r}, seed {seed}, failed: see above")
    print(table())


if __name__ == "__main__":
    main()
