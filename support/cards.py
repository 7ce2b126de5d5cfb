"""Cards in the Hub's format for what the scripts write: dataset, adapter, policy, base.

Strings only; nothing is read or written.
"""

from huggingface_hub import EvalResult, ModelCardData


def model_card(name, text, metrics, **data):
    """`text` below the metadata that the Hub shows: `data`, and `metrics` by name, of the validation tracks."""
    results = [
        EvalResult(
            task_type=data["pipeline_tag"],
            dataset_type="CarRacing-v3",
            dataset_name="CarRacing-v3, validation tracks",
            metric_type=metric,
            metric_value=value,
        )
        for metric, value in metrics.items()
    ]
    if results:
        data |= {"model_name": name, "eval_results": results}
    return f"---\n{ModelCardData(**data).to_yaml()}\n---\n{text.lstrip()}"


def table(metrics):
    """Metrics as Markdown rows, without those that are nan (an action that does not occur has no recall)."""
    rows = (
        f"| {name} | {x:.4f} |" if isinstance(x, float) else f"| {name} | {x} |"
        for name, x in metrics.items()
        if x == x
    )
    return "\n".join(["| on the validation tracks | |", "|---|---|", *rows])


POLICY = """
# A policy on a vision-language model's answers

Policy and value head on the hidden state of the last token of "{prompt}", safetensors; `policy.json` names base
(`{base_model}`), adapter (`{adapter}`) and what else they were trained for. Made by `python ppo_git_with_prompt.py`.

With this project, from the repository's folder:

```python
from GitText2ActionWithPrompt import GitText2ActionWithPrompt

model = GitText2ActionWithPrompt.from_policy("{folder}")
action_logits, value = model(frames)  # uint8 (B, 96, 96, 3) -> (B, 5), (B,)
```
"""

POLICY_WITHOUT_PROJECT = """
Without it, from a folder that holds base, adapter and policy under these names:

```python
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoProcessor

git = AutoModelForCausalLM.from_pretrained("{base_model}")
git = PeftModel.from_pretrained(git, "{adapter}").merge_and_unload().eval()
processor = AutoProcessor.from_pretrained("{adapter}")
weights = load_file("{folder}/policy.safetensors")


def layer(name, x):
    return x @ weights[name + ".weight"].T + weights[name + ".bias"]


answers = [processor.tokenizer(x, add_special_tokens=False).input_ids for x in {answers}]
shared = next(([x[0]] for x in answers if len(x) == 2), [])  # the first word of all answers of two
prompt = processor.tokenizer({prompt!r}, return_tensors="pt").input_ids[:, :-1]
tokens = torch.cat([prompt, torch.tensor([shared], dtype=torch.int64)], 1)
pixels = processor(images=frame, return_tensors="pt").pixel_values  # frame: PIL image or uint8 (96, 96, 3)
with torch.no_grad():
    output = git(input_ids=tokens, pixel_values=pixels, output_hidden_states=True)
last = -1 - len(shared)  # the prompt's last token
first, second = output.logits[0, last].log_softmax(-1), output.logits[0, -1].log_softmax(-1)
scores = torch.stack([first[x[0]] + sum(second[i] for i in x[1:]) for x in answers])
correction = layer("policy_head.2", torch.tanh(layer("policy_head.0", output.hidden_states[-1][0, last])))
action_logits = {language_prior} * torch.log({rest} * scores.softmax(0) + {floor}) + correction  # of {answers}
```
"""


def policy_card(folder, facts):
    """The card of a policy folder with the facts of its policy.json.

    The lines without this project need an adapter, and heads that stand on it alone: no LoRA that PPO trained on top.
    """
    text = POLICY + POLICY_WITHOUT_PROJECT if facts["adapter"] and "lora_rank" not in facts else POLICY
    rest, floor = 1 - facts["prior_floor"], facts["prior_floor"] / len(facts["answers"])
    validation = facts.get("validation")
    metrics = {"mean_reward": f"{validation['mean']} +/- {validation['std']}"} if validation else {}
    return model_card(
        "carllava-rl-policy", text.format(folder=folder, rest=rest, floor=floor, **facts), metrics,
        pipeline_tag="reinforcement-learning", base_model=facts["base_model"], tags=["CarRacing-v3", "ppo"],
    )  # fmt: skip


ADAPTER = """
# A LoRA that answers "{prompt}"

Trained by `train_git_lora_carllava_style.py` on {data} with base `{base_model}`, rank {rank}, frame skip {frame_skip}. All
constants, commit, versions and time are in `run.json`. It answers one of {answers}.

{table}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoProcessor

base = AutoModelForCausalLM.from_pretrained("{base_model}")
processor = AutoProcessor.from_pretrained("{folder}")
model = PeftModel.from_pretrained(base, "{folder}").eval()
prompt = processor.tokenizer({prompt!r}, return_tensors="pt").input_ids[:, :-1]  # no [SEP]: the answer follows
pixels = processor(images=frame, return_tensors="pt").pixel_values  # frame: PIL image or uint8 (96, 96, 3)
words = model.generate(pixel_values=pixels, input_ids=prompt, max_new_tokens=6)
print(processor.tokenizer.decode(words[0, prompt.shape[1] :], skip_special_tokens=True))
```
"""


def adapter_card(facts, metrics):
    """The card of an adapter folder; `metrics` are those of stage 2's last epoch."""
    text = ADAPTER.format(**facts | {"answers": ", ".join(facts["answers"])}, table=table(metrics))
    return model_card(
        "carllava-rl-lora", text, {"exact_match": round(metrics["exact_match"], 4)}, library_name="peft",
        pipeline_tag="image-text-to-text", base_model=facts["base_model"],
    )  # fmt: skip


DATASET = """---
task_categories: [visual-question-answering]
configs:
- config_name: default
  data_files:
  - split: train
    path: train/**
  - split: validation
    path: validation/**
---
# CarRacing captions

{train:,} training and {validation:,} validation frames of Gymnasium's CarRacing (uint8 RGB, 96 x 96),
each with the answer to "{prompt}". Driver: `{driver}`, answers by: {answer_by}, frame skip {frame_skip},
random bursts of 1-{burst_longest} decisions (start {burst_start:.1%}). The splits share no track.

{table}

Episodes dropped because the car was stuck: {stuck[train]} training, {stuck[validation]} validation.
Columns: `file_name`, `text` (the answer), `prompt`, `action` (the simulator's index), `track_seed`, `frame`; `told`, the
answers under {dreamed} instructions each (`instruction`, `split` of its phrasing, `sentence`, `text`); `asked`, {asked} questions
about the scene each (`about`, `question`, `text`).

```python
datasets.load_dataset("imagefolder", data_dir="{folder}")
```

Made by `collect_captions.py`; its constants, versions and commit are in `run.json`.
"""


def dataset_card(facts, counts, stuck, table):
    """The card of the caption dataset; `counts` are Counters of the answers by split, `stuck` episodes by split."""
    sizes = {split: count.total() for split, count in counts.items()}
    return DATASET.format(**facts, **sizes, stuck=stuck, table=table)


BASE = """
# git-tiny

A GIT (image encoder + text decoder) of {parameters:,} parameters and a vocabulary of {words} tokens for Gymnasium's CarRacing: {shape}.
It answers questions about the scene, which were answered from the simulator's state while training, and says in the simplest words
what an instruction wants ("The right lane is closed. What do I want?": "Keep left.") and whether it is so ("Keep left. Is it as
I want it?": "The car is too far right."); it was never shown an action.

Made by `python -m offline.make_git_tiny` ({made}). Cross-entropy, the mean over each answer's tokens: {loss:.3f} in training, where the answers about instructions count, too,
{validation_loss:.3f} about the scene on frames of other tracks. Wholly right answers there:

| question | right |
|---|---|
{rows}
"""


def base_card(facts, accuracy):
    """The card of git-tiny; `accuracy` by question, those after an instruction have a comma in their name."""
    scene = [share for question, share in accuracy.items() if "," not in question]
    rows = "\n".join(f"| {question} | {share:.1%} |" for question, share in accuracy.items())
    return model_card(
        "git-tiny", BASE.format(**facts, rows=rows), {"exact_match": round(sum(scene) / len(scene), 4)},
        library_name="transformers", pipeline_tag="image-text-to-text",
    )  # fmt: skip
