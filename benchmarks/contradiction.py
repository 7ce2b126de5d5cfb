"""How much of the answers' errors is the teacher's: how often does it contradict itself on frames that look alike?

It answers from the simulator's state, which a frame does not show whole (the wheels' angle, how fast they spin). For each
validation frame the nearest training frame is sought, by the root mean square difference of grey levels at half size. Were such
pairs identical frames with two possible answers, a share d of contradictions would cost any reader of frames d / 2 at
least; how far they are from identical stands beside. Writes benchmarks/contradiction.json.

    python -m benchmarks.contradiction      # 2 minutes on two CPU cores, after collect_captions.py
"""

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

import evaluate
import train_git_lora_carllava_style as stage2
from GitText2ActionWithPrompt import ANSWERS, GitText2ActionWithPrompt
from support import checks, run_files
from support.run_files import ROOT

NEAREST = (0.01, 0.05, 0.25, 1.0)  # shares of the validation frames, the most alike pairs first
OUTPUT = Path(__file__).parent / "contradiction.json"


def load(split):
    """The split, its frames in grey, float32 (N, 2304) of 48 x 48 pixels, and its answers, int64 (N,)."""
    data = stage2.Captions(ROOT / stage2.DATA_DIR / split)
    frames, answers = [], []
    for frame, row in tqdm((data[i] for i in range(len(data))), total=len(data), desc=split, leave=False):
        grey = torch.tensor(frame, dtype=torch.float32).mean(-1)
        frames.append(F.avg_pool2d(grey[None, None], 2).flatten())
        answers.append(row["answer"])
    return data, torch.stack(frames), torch.tensor(answers)


def main():
    _, frames, answers = load("train")
    data, seen, truth = load("validation")
    frames, seen = frames - frames.mean(0), seen - frames.mean(0)  # small numbers: `cdist` multiplies matrices
    distance, nearest = zip(*(torch.cdist(part, frames).min(1) for part in tqdm(seen.split(100), leave=False)))
    distance, nearest = torch.cat(distance) / frames.shape[1] ** 0.5, torch.cat(nearest)
    contradicts = answers[nearest] != truth
    model, names = GitText2ActionWithPrompt.from_pretrained(evaluate.MODEL), list(ANSWERS)
    said = [model.answer(np.stack([data[i][0] for i in rows])) for rows in torch.arange(len(data)).split(100)]
    wrong = torch.tensor([text != names[i] for text, i in zip(sum(said, []), truth)])
    order, rows = distance.argsort(), []
    for share in NEAREST:
        pairs = order[: max(1, round(share * len(order)))]
        rows.append(
            {
                "pairs": len(pairs),
                "largest_difference_in_grey_levels": round(distance[pairs].max().item(), 2),
                "contradictions": round(contradicts[pairs].float().mean().item(), 4),
                "adapter_errors": round(wrong[pairs].float().mean().item(), 4),
            }
        )
        print(rows[-1])
    by_answer = {
        names[i]: {"frames": int((truth == i).sum()), "contradicted": round(contradicts[truth == i].float().mean().item(), 4)}
        for i in np.unique(truth)
    }  # fmt: skip
    facts = {"training_frames": len(frames), "validation_frames": len(seen)} | run_files.run_facts()
    run_files.write_json(OUTPUT, {"nearest": rows, "by_answer": by_answer} | facts)


if __name__ == "__main__":
    checks.run(main)
