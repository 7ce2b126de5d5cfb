"""The same tracks in other pictures: how far the answers and the PPO policy carry.

The pictures are changed after the simulator has drawn them, so the tracks stay the plain ones. Writes
benchmarks/shifts.json.

    python -m benchmarks.shifts      # 12 minutes on two CPU cores
"""

import zlib
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

import evaluate
from car_racing_env import HELD_OUT
from GitText2ActionWithPrompt import GitText2ActionWithPrompt
from support import checks, run_files
from support.run_files import ROOT

POLICY = "results/published/policy"
TRACKS = HELD_OUT[:20]
OUTPUT = Path(__file__).parent / "shifts.json"


def recoloured(frames, rng):
    """Grass turns from green to blue: green and blue change places, the instrument bar stays."""
    frames = frames.copy()
    frames[:, :84] = frames[:, :84][..., [0, 2, 1]]
    return frames


def noise(frames, rng):
    """Gaussian noise of standard deviation 20 grey levels."""
    return np.clip(frames + rng.normal(0, 20, frames.shape), 0, 255).astype(np.uint8)


def blur(frames, rng):
    """The mean over 3 x 3 pixels."""
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    return F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1).round().byte().permute(0, 2, 3, 1).numpy()


def bar(frames, rng):
    """A dark vertical bar, 6 pixels wide, left of the car."""
    frames = frames.copy()
    frames[:, :84, 30:36] = 40
    return frames


def blob(frames, rng):
    """A red disc of 15 pixels across in the upper right quarter."""
    frames = frames.copy()
    y, x = np.mgrid[:96, :96]
    frames[:, (y - 25) ** 2 + (x - 68) ** 2 <= 49] = (200, 60, 60)
    return frames


def plain(frames, rng):
    return frames


class Shifted:
    """A driver that sees changed pictures."""

    def __init__(self, driver, shift):
        self.driver, self.shift = driver, shift

    def __call__(self, frames, infos):
        rng = np.random.default_rng(zlib.crc32(frames.tobytes()))  # whichever thread asks
        return self.driver(self.shift(frames, rng), infos)


def main():
    torch.set_num_threads(evaluate.TORCH_THREADS)
    model = GitText2ActionWithPrompt.from_policy(POLICY)
    results = {}
    for shift in (plain, recoloured, noise, blur, bar, blob):
        drivers = {"answers": evaluate.Answers(model), "policy": evaluate.Policy(model)}
        scores = {name: evaluate.score(Shifted(driver, shift), TRACKS) for name, driver in drivers.items()}
        results[shift.__name__] = scores
        print(
            f"{shift.__name__}: " + ", ".join(f"{n} {x['mean']:.1f} ± {x['std']:.1f}" for n, x in scores.items()),
            flush=True,
        )
    facts = {"tracks": [TRACKS[0], TRACKS[-1]], "policy": POLICY}
    facts["weights_hash"] = run_files.file_hash(ROOT / POLICY / "policy.safetensors")
    facts |= run_files.run_facts()
    run_files.write_json(OUTPUT, {"shifts": results} | facts)


if __name__ == "__main__":
    checks.run(main)
