"""Does the language matter? The same adapter and policy asked in other words.

For each prompt: exact answers on the validation split of CarRacing-Data/, and the score of the answers and of the PPO policy
on validation tracks. Writes benchmarks/prompts.json.

    python -m benchmarks.prompts      # 12 minutes on two CPU cores
"""

from pathlib import Path

import numpy as np
import torch

import evaluate
import train_git_lora_carllava_style as stage2
from GitText2ActionWithPrompt import PROMPT, GitText2ActionWithPrompt
from support import checks, run_files
from support.run_files import ROOT

POLICY = "results/published/policy"
TRACKS = range(100_000, 100_020)
OUTPUT = Path(__file__).parent / "prompts.json"
PROMPTS = {
    "task": PROMPT,
    "paraphrase": "What should the car do now?",
    "paraphrase, longer": "In this scenario, which action should the vehicle take?",
    "empty": "",
    "irrelevant": "How fast is the car?",  # one of the questions that git-tiny was pretrained on
    "misleading": "The vehicle should turn right in this scenario.",
}


def exact_answers(model, data):
    """Share of the captions whose answer the model generates."""
    right = 0
    for rows in torch.arange(len(data)).split(128):
        frames, truth = zip(*(data[i] for i in rows))
        right += sum(said == row["text"] for said, row in zip(model.answer(np.stack(frames)), truth))
    return right / len(data)


def main():
    torch.set_num_threads(evaluate.TORCH_THREADS)
    model = GitText2ActionWithPrompt.from_policy(ROOT / POLICY)
    data = stage2.Captions(ROOT / stage2.DATA_DIR / "validation")
    results = {}
    for name, prompt in PROMPTS.items():
        answers, policy = evaluate.Answers(model), evaluate.Policy(model)
        model.question = prompt
        row = {
            "prompt": prompt,
            "exact_answers": round(exact_answers(model, data), 4),
            "answers": evaluate.score(answers, TRACKS),
            "unparsable_share": round(answers.unparsable / answers.words, 4),
            "policy": evaluate.score(policy, TRACKS),
        }
        results[name] = row
        print(
            f"{name}: exact {row['exact_answers']:.1%}, answers {row['answers']['mean']:.1f}, "
            f"policy {row['policy']['mean']:.1f}",
            flush=True,
        )
    facts = {"frames": len(data), "tracks": [TRACKS[0], TRACKS[-1]], "policy": POLICY}
    run_files.write_json(OUTPUT, {"prompts": results} | facts | run_files.run_facts())


if __name__ == "__main__":
    checks.run(main)
