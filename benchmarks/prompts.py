"""Does the language matter? The same adapter and policy asked in other words.

For each prompt: exact answers on the validation split of CarRacing-Data/, and the score of the answers and of the PPO policy
on validation tracks. Writes benchmarks/prompts.json.

    python -m benchmarks.prompts      # 12 minutes on two CPU cores
"""

from pathlib import Path

import numpy as np
import torch

import evaluate
import GitText2ActionWithPrompt as model_file
import run_files
import train_git_lora_carllava_style as stage2

POLICY = "results/published/policy"
TRACKS = range(100_000, 100_020)
OUTPUT = Path(__file__).parent / "prompts.json"
PROMPTS = {
    "task": model_file.PROMPT,
    "paraphrase": "What should the car do now?",
    "paraphrase, longer": "In this scenario, which action should the vehicle take?",
    "empty": "",
    "irrelevant": "How fast is the car?",  # one of the questions that git-tiny was pretrained on
    "misleading": "The vehicle should turn right in this scenario.",
}


@torch.no_grad()
def exact_answers(model, data):
    """Share of the captions whose answer the model generates."""
    right, answers = 0, list(model_file.ANSWERS)
    for rows in torch.arange(len(data)).split(128):
        frames, truth = zip(*(data[i] for i in rows))
        right += sum(said == answers[true] for said, true in zip(model.answer(np.stack(frames)), truth))
    return right / len(data)


def main():
    model = model_file.GitText2ActionWithPrompt.from_policy(run_files.ROOT / POLICY)
    data = stage2.Captions(run_files.ROOT / stage2.DATA_DIR / "validation")
    results = {}
    for name, prompt in PROMPTS.items():
        model.prompt = model_file.prompt_ids(model.processor.tokenizer, prompt)
        answers, policy = evaluate.Answers(model), evaluate.Policy(model)
        results[name] = {
            "prompt": prompt,
            "exact_answers": round(exact_answers(model, data), 4),
            "answers": evaluate.summarize(evaluate.evaluate(answers, TRACKS, evaluate.NUM_ENVS)),
            "unparsable_share": round(answers.unparsable / answers.words, 4),
            "policy": evaluate.summarize(evaluate.evaluate(policy, TRACKS, evaluate.NUM_ENVS)),
        }
        print(
            f"{name}: exact {results[name]['exact_answers']:.1%}, answers {results[name]['answers']['mean']:.1f}, "
            f"policy {results[name]['policy']['mean']:.1f}",
            flush=True,
        )
    facts = {"frames": len(data), "tracks": [TRACKS[0], TRACKS[-1]], "policy": POLICY}
    run_files.write_json(OUTPUT, {"prompts": results} | facts | run_files.run_facts())


if __name__ == "__main__":
    main()
