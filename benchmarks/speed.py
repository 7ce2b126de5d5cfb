"""Speed of the simulator and of the model's path, each against a named peer in the same run.

Reads offline/ and the adapter. Writes benchmarks/results.json: per claim the median ratio over alternating rounds, its
spread, and both times. Machines are noisy: the ratio is the claim.

    python -m benchmarks.speed      # 2 minutes
"""

import json
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.box2d.car_racing import CarRacing

import car_racing_env
import collect_captions
import evaluate
import GitText2ActionWithPrompt as model_file

OUTPUT = Path(__file__).parent / "results.json"
ROUNDS = 7
FRAMES = 100  # per round


def compare(name, peer, ours, unit, **note):
    """Run the two alternately; `peer` and `ours` do one round and return units done."""
    times = {"peer": [], "ours": []}
    peer(), ours()
    for _ in range(ROUNDS):
        for who, work in (("peer", peer), ("ours", ours)):
            began = time.perf_counter()
            units = work()
            times[who].append(1e3 * (time.perf_counter() - began) / units)
    ratios = np.array(times["peer"]) / np.array(times["ours"])
    result = {
        "median_ratio": round(float(np.median(ratios)), 2),
        "ratio_range": [round(float(ratios.min()), 2), round(float(ratios.max()), 2)],
        f"peer_ms_per_{unit}": round(float(np.median(times["peer"])), 3),
        f"ours_ms_per_{unit}": round(float(np.median(times["ours"])), 3),
        **note,
    }
    print(f"{name}: {result['median_ratio']}x {result['ratio_range']}")
    return name, result


def driver(env, skip, frames):
    """Steps of fixed, lively actions; an episode that ends starts over on the next track."""
    env.reset(seed=0)
    state = {"track": 0, "t": 0}

    def round_():
        for _ in range(frames // skip):
            state["t"] += 1
            action = (3, 2, 3, 1, 3)[state["t"] // 5 % 5]
            for _ in range(1 if isinstance(env, car_racing_env.FrameSkip) else skip):
                _, _, terminated, truncated, _ = env.step(action)
                if terminated or truncated:
                    state["track"] += 1
                    env.reset(seed=state["track"])
        return frames

    return round_


def stock():
    return gym.wrappers.TimeLimit(CarRacing(continuous=False), 1000)


@torch.no_grad()
def main():
    results = [
        compare(
            "drawn frame of FastCarRacing vs Gymnasium's CarRacing",
            driver(stock(), 1, FRAMES),
            driver(car_racing_env.make_env(1), 1, FRAMES),
            "frame",
        ),
        compare(
            f"frame at FRAME_SKIP = {car_racing_env.FRAME_SKIP} vs Gymnasium's CarRacing behind a plain skip",
            driver(stock(), car_racing_env.FRAME_SKIP, FRAMES),
            driver(car_racing_env.make_env(car_racing_env.FRAME_SKIP), car_racing_env.FRAME_SKIP, FRAMES),
            "frame",
        ),
    ]
    model = evaluate.load_answerer(evaluate.ADAPTER)
    processor, git = model.processor, model.git
    for batch in (8, 1):
        frames = torch.randint(0, 256, (batch, 96, 96, 3), dtype=torch.uint8).numpy()
        prompt = torch.tensor(model.prompt + model.shared_word).expand(batch, -1)
        prompt_only = torch.tensor(model.prompt).expand(batch, -1)

        def tutorial(frames=frames, prompt=prompt):
            for _ in range(10):
                pixels = torch.cat([processor(images=f, return_tensors="pt").pixel_values for f in frames])
                git(pixel_values=pixels, input_ids=prompt, output_hidden_states=True)
            return 10 * len(frames)

        def ours(frames=frames):
            for _ in range(10):
                model(frames)
            return 10 * len(frames)

        def generate(frames=frames, prompt=prompt_only):
            pixels = torch.cat([processor(images=f, return_tensors="pt").pixel_values for f in frames])
            git.generate(
                pixel_values=pixels, input_ids=prompt, max_new_tokens=model_file.MAX_ANSWER_TOKENS, do_sample=False
            )
            return len(frames)

        def answer(frames=frames):
            model.answer(frames)
            return len(frames)

        results.append(
            compare(f"policy forward, batch {batch}, vs GitForCausalLM + processor per frame", tutorial, ours, "frame")
        )
        results.append(compare(f"answer, batch {batch}, vs generate()", generate, answer, "frame"))
    facts = dict(results) | collect_captions.run_facts()
    OUTPUT.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
