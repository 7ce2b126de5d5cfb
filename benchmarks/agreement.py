"""How often the PPO policy does what the model says, per action, and a picture sheet of frames where it does not.

The untrained head's action is the most probable whole answer, the generated answer is greedy word by word: "before PPO"
shows how far the two agree. Writes benchmarks/agreement.json and agreement.png.

    python -m benchmarks.agreement      # 2 minutes on two CPU cores
"""

from collections import Counter
from pathlib import Path

import numpy as np
import torch

import evaluate
from car_racing_env import VALIDATION
from GitText2ActionWithPrompt import ANSWERS, GitText2ActionWithPrompt, to_simulator
from support import checks, plots, run_files
from support.run_files import ROOT

POLICY = "results/published/policy"
TRACKS = VALIDATION[:20]
PICTURES = 24
OUTPUT = Path(__file__).parent


class Watched:
    """The policy, and for each decision: what the model says, what the untrained head would do, what is done."""

    def __init__(self, model):
        self.model, self.decisions, self.frames = model, [], []

    @torch.no_grad()
    def __call__(self, frames, infos):
        features, scores = self.model.encode(frames)
        action = self.model.head(features, scores)[0].argmax(1)
        answers = list(ANSWERS)
        said = [answers.index(text) if text in answers else -1 for text in self.model.answer(frames)]
        decisions = list(zip(said, scores.argmax(1).tolist(), action.tolist()))
        self.decisions += decisions
        self.frames += [(x.copy(), word, done) for x, (word, _, done) in zip(frames, decisions) if word != done]
        return to_simulator(action)


def agreement(said, done):
    """Overall and per said answer: share of decisions in which the action is the answer, and their count."""
    said, done = np.array(said), np.array(done)
    table = {"all": {"agreement": round(float((said == done).mean()), 4), "decisions": len(said)}}
    for i, answer in enumerate(ANSWERS):
        rows = said == i
        if rows.any():
            table[answer] = {"agreement": round(float((done[rows] == i).mean()), 4), "decisions": int(rows.sum())}
    return table


def changes(said, done):
    """How many decisions turned one answer into another action, the most frequent first."""
    names = [*ANSWERS, "no answer"]
    counts = Counter(f"{names[a]} -> {names[b]}" for a, b in zip(said, done) if a != b)
    return dict(counts.most_common())


def main():
    torch.set_num_threads(evaluate.TORCH_THREADS)
    watched = Watched(GitText2ActionWithPrompt.from_policy(POLICY))
    scores = evaluate.evaluate(watched, TRACKS)
    said, before, done = zip(*watched.decisions)
    results = {
        "before_ppo": agreement(said, before),
        "after_ppo": agreement(said, done),
        "changes": changes(said, done),
        "score": evaluate.summarize(scores),
        "tracks": [TRACKS[0], TRACKS[-1]],
        "policy": POLICY,
        "weights_hash": run_files.file_hash(ROOT / POLICY / "policy.safetensors"),
    }
    names, chosen = [*ANSWERS, "no answer"], plots.spread(watched.frames, PICTURES)
    captions = [f"says {names[said]}, does {names[done]}" for _, said, done in chosen]
    plots.draw_sheet([frame for frame, _, _ in chosen], captions, OUTPUT / "agreement.png", columns=6)
    run_files.write_json(OUTPUT / "agreement.json", results | run_files.run_facts())
    for name in ("before_ppo", "after_ppo"):
        print(
            name, "  ".join(f"{a} {row['agreement']:.1%} of {row['decisions']:,}" for a, row in results[name].items())
        )


if __name__ == "__main__":
    checks.run(main)
