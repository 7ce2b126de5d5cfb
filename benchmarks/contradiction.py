"""The irreducible part of the answers' errors: how often the teacher contradicts itself on frames that look alike.

The teacher answers from the simulator's state, which a frame does not show whole (the wheels' angle, how fast they spin). For
each validation frame the nearest training frame is sought, by the mean absolute difference of grey levels. If two like
frames get different answers in a share d of the cases, no reader of frames alone errs in less than about d / 2 of them.
Writes benchmarks/contradiction.json.

    python -m benchmarks.contradiction      # 4 minutes on two CPU cores, after collect_captions.py
"""

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

import collect_captions
import evaluate
import GitText2ActionWithPrompt as model_file
import train_git_lora_carllava_style as stage2

NEAREST = (0.01, 0.05, 0.25, 1.0)  # shares of the validation frames, the most alike pairs first
OUTPUT = Path(__file__).parent / "contradiction.json"


def load(split):
    """Grey frames, float32 (N, 2304) of 48 x 48 pixels, and answers, int64 (N,)."""
    data = stage2.Captions(collect_captions.ROOT / stage2.DATA_DIR / split)
    frames, answers = [], []
    for frame, answer in tqdm((data[i] for i in range(len(data))), total=len(data), desc=split, leave=False):
        grey = torch.tensor(frame, dtype=torch.float32).mean(-1)
        frames.append(F.avg_pool2d(grey[None, None], 2).flatten())
        answers.append(answer)
    return torch.stack(frames), torch.tensor(answers)


def main():
    frames, answers = load("train")
    seen, truth = load("validation")
    distance, nearest = zip(*(torch.cdist(part, frames, p=1).min(1) for part in tqdm(seen.split(50), leave=False)))
    distance, nearest = torch.cat(distance) / frames.shape[1], torch.cat(nearest)
    contradicts = answers[nearest] != truth
    order, rows = distance.argsort(), []
    for share in NEAREST:
        pairs = order[: round(share * len(order))]
        rows.append(
            {
                "pairs": len(pairs),
                "largest_difference_in_grey_levels": round(distance[pairs].max().item(), 2),
                "contradictions": round(contradicts[pairs].float().mean().item(), 4),
            }
        )
        print(rows[-1])
    names = list(model_file.ANSWERS)
    by_answer = {
        names[i]: {"frames": int((truth == i).sum()), "contradicted": round(contradicts[truth == i].float().mean().item(), 4)}
        for i in np.unique(truth)
    }  # fmt: skip
    facts = {"training_frames": len(frames), "validation_frames": len(seen)} | collect_captions.run_facts()
    evaluate.write_json(OUTPUT, {"nearest": rows, "by_answer": by_answer} | facts)


if __name__ == "__main__":
    main()
