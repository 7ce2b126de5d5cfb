"""How near to this machine's limits are the model's pass and a drawn frame, on one core?

The pass is compared with its floating-point operations at the rate at which this core multiplies large matrices; a
drawn frame with writing the pixels of the simulator's window once and reading them once, which drawing and narrowing
cannot do without. And where does a drawn frame's time go? Writes benchmarks/limits.json.

    python -m benchmarks.limits      # a minute, on idle cores
"""

import cProfile
import itertools
import pstats
import time
from pathlib import Path

import numpy as np
import torch
from gymnasium.envs.box2d import car_racing as stock
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import car_racing_env
import ppo_git_with_prompt as ppo
from benchmarks import simulator
from fast import git_forward
from GitText2ActionWithPrompt import GitText2ActionWithPrompt
from support import checks, run_files

BATCH_SIZES = (1, 4, 8)
REPEATS = 200
MATRIX = 1024  # rows and columns
FRAMES = 400  # of the teacher's drive
TRACK = 1
PARTS = {  # of a drawn frame, by the functions that do them, callees included
    "road and grass": ("draw_polygons",),
    "narrowing": ("<built-in method pygame.transform.smoothscale>",),
    "car": ("_draw_car",),
    "instruments": ("_render_indicators", "_score_text"),
}
OUTPUT = Path(__file__).with_suffix(".json")


def milliseconds(work, repeats=REPEATS):
    """The median of some runs, after some to warm up."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - began))
    return float(np.median(times[repeats // 10 :]))


def multiplications_per_second():
    """Floating-point operations a second of the faster of torch's two ways to multiply large float32 matrices."""
    a, b = torch.rand(2, MATRIX, MATRIX)
    ways = [lambda: a @ b]
    if git_forward.ONEDNN:
        packed = torch.ops.mkldnn._reorder_linear_weight(b)
        ways.append(lambda: git_forward.linear(a, packed, None))
    return 2 * MATRIX**3 / (min(milliseconds(way, 30) for way in ways) / 1e3)


@torch.no_grad()
def measure_model():
    """A row for each batch size: operations a frame, milliseconds a frame, and times over the limit."""
    model, rate, rows = GitText2ActionWithPrompt.from_pretrained(ppo.MODEL), multiplications_per_second(), {}
    prepared, plain = model.weights, git_forward.collect(model.base, model.processor.image_processor)
    for size in BATCH_SIZES:
        frames = np.random.default_rng(0).integers(0, 256, (size, 96, 96, 3), dtype=np.uint8)
        model.weights = plain  # the counter knows no packed matrices
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it knows no fused attention
            model(frames)
        model.weights = prepared
        operations, taken = counter.get_total_flops() / size, milliseconds(lambda frames=frames: model(frames)) / size
        limit = 1e3 * operations / rate
        rows[f"pass, batch {size}"] = {
            "gflop_per_frame": round(operations / 1e9, 3), "ms": round(taken, 3), "limit_ms": round(limit, 3),
            "times_the_limit": round(taken / limit, 2),
        }  # fmt: skip
    return rows | {"gflop_per_second": round(rate / 1e9)}


def measure_frames():
    """A drawn frame without its physics, beside writing and reading the window's pixels."""
    window = np.zeros((stock.WINDOW_H, stock.WINDOW_W), dtype=np.uint32)
    limit = milliseconds(lambda: window.fill(1)) + milliseconds(window.max)
    times, drive = {}, simulator.record_drive(TRACK, FRAMES)
    for draw in (True, False):
        env, actions = car_racing_env.make_env(1, draw=draw), itertools.cycle(drive)
        env.reset(seed=TRACK)
        times[draw] = milliseconds(lambda env=env, actions=actions: env.step(next(actions)), FRAMES)
        if draw:
            parts = measure_parts(env, drive)
        env.close()
    taken = times[True] - times[False]
    return {
        "drawn frame": {
            "megabytes": round(window.nbytes / 1e6, 1), "ms": round(taken, 3), "limit_ms": round(limit, 3),
            "times_the_limit": round(taken / limit, 2), "physics_ms": round(times[False], 3), "parts_ms": parts,
        }
    }  # fmt: skip


def measure_parts(env, drive):
    """Milliseconds a frame in each of PARTS, by a profiler, which slows the interpreter but not what is compiled."""
    env.reset(seed=TRACK)
    profile = cProfile.Profile()
    profile.enable()
    for action in drive:
        env.step(action)
    profile.disable()
    spent = {name: facts[3] for (_, _, name), facts in pstats.Stats(profile).stats.items()}  # seconds, callees included
    return {part: round(1e3 * sum(spent[name] for name in names) / len(drive), 3) for part, names in PARTS.items()}


def main():
    torch.set_num_threads(1)
    rows = measure_model() | measure_frames()
    run_files.write_json(OUTPUT, rows | run_files.run_facts())
    for name, row in rows.items():
        print(f"{name}: {row}")


if __name__ == "__main__":
    checks.run(main)
