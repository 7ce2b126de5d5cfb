"""Decisions per second of the PPO rollout over the number of environments and over the model's size.

Runs `rollout` of ppo_git_with_prompt.py itself. Writes benchmarks/scaling.json and scaling.png.

    python -m benchmarks.scaling      # 6 minutes
"""

import copy
import time
from pathlib import Path

import matplotlib
import torch
from transformers import GitConfig, GitForCausalLM

import ppo_git_with_prompt as ppo
from GitText2ActionWithPrompt import GitText2ActionWithPrompt
from support import checks, run_files

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

NUM_ENVS = (2, 4, 8, 16, 32)
SIZES = {"width 64": 64, "width 128": 128, "width 256": 256, "width 512": 512, "git-base, 96 px": 768}
DECISIONS = 1024  # a measurement
OUTPUT = Path(__file__).parent


class Timed(GitText2ActionWithPrompt):
    """The model with a stopwatch on its passes."""

    seconds = 0.0

    def encode(self, frames, instructions=""):
        began = time.perf_counter()
        result = super().encode(frames, instructions)
        self.seconds += time.perf_counter() - began
        return result


def decisions_per_second(model, num_envs):
    """Of `rollout`, and how much of the time the model's passes take."""
    num_steps = max(8, DECISIONS // num_envs)
    with ppo.make_envs(0, num_envs) as workers:
        generators = [torch.Generator(model.device) for _ in workers]
        observations = [ppo.observe(*envs.reset()) for envs in workers]
        observations, *_ = ppo.rollouts(workers, observations, generators, model, num_steps)  # to warm up
        model.seconds, began = 0.0, time.perf_counter()
        ppo.rollouts(workers, observations, generators, model, num_steps)
        total = time.perf_counter() - began
    return {
        "decisions_per_second": round(num_envs * num_steps / total, 1),
        "model_share": round(model.seconds / total, 3),
    }


def sized(model, width):
    """A GIT of another width with random weights: git-tiny's depth, or git-base's whole configuration at 96 px."""
    config = copy.deepcopy(model.git.config)
    if width == 768:
        config = GitConfig(vocab_size=config.vocab_size, vision_config={"image_size": 96})
    else:
        for part in (config, config.vision_config):
            part.hidden_size, part.intermediate_size = width, 4 * width
    for part in (config, config.vision_config):
        part._attn_implementation = "eager"
    torch.manual_seed(0)
    git = GitForCausalLM(config).eval().requires_grad_(False)
    return Timed(git, model.processor)


def main():
    torch.set_num_threads(ppo.TORCH_THREADS)
    model = Timed.from_pretrained(ppo.MODEL)
    results = {"environments": {}, "models": {}}
    for count in NUM_ENVS:
        results["environments"][count] = decisions_per_second(model, count)
        print(f"{count} environments: {results['environments'][count]}", flush=True)
    for name, width in SIZES.items():
        other = sized(model, width)
        parameters = sum(p.numel() for p in other.git.parameters())
        results["models"][name] = {"parameters": parameters, **decisions_per_second(other, ppo.NUM_ENVS)}
        print(f"{name}, {parameters:,} parameters: {results['models'][name]}", flush=True)
    run_files.write_json(OUTPUT / "scaling.json", results | run_files.run_facts())
    draw(results)


def draw(results):
    """scaling.png."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    rows = results["environments"]
    counts = [int(count) for count in rows]
    left.plot(counts, [row["decisions_per_second"] for row in rows.values()], "o-")
    left.set(xlabel="environments (git-tiny)", ylabel="decisions per second", xscale="log", ylim=(0, None))
    left.set_xticks(counts, [*map(str, counts)])
    left.minorticks_off()
    rows = results["models"]
    right.plot(
        [row["parameters"] for row in rows.values()], [row["decisions_per_second"] for row in rows.values()], "o-"
    )
    right.set(xlabel="parameters of the model (8 environments)", xscale="log", yscale="log")
    right.set_yticks(ticks := (20, 50, 100, 200, 400), [str(tick) for tick in ticks])
    right.minorticks_off()
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(OUTPUT / "scaling.png", dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    checks.run(main)
