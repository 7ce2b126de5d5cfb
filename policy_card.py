"""The card of a policy folder: what it is, and how to load it with this project or with torch and safetensors alone.

Reads and writes nothing; `GitText2ActionWithPrompt.save_policy` puts it beside the weights.
"""

CARD = """# A policy on a vision-language model's answers

Policy and value head on the hidden state of the last token of "{prompt}", safetensors; `policy.json` names base (`{base_model}`), adapter
(`{adapter}`) and what else they rest on. Trained by `python ppo_git_with_prompt.py`.

With this project, from the repository's folder:

```python
from GitText2ActionWithPrompt import GitText2ActionWithPrompt

model = GitText2ActionWithPrompt.from_policy("{folder}")
action_logits, value = model(frames)  # uint8 (B, 96, 96, 3) -> (B, 5), (B,)
```
"""

PLAIN = """
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


def card(folder, facts):
    """The card as Markdown, of a policy in `folder` with the facts of its `policy.json`.

    The plain lines need an adapter, and heads that rest on it alone: no LoRA that PPO trained on top.
    """
    values = facts | {
        "folder": folder,
        "rest": 1 - facts["prior_floor"],
        "floor": facts["prior_floor"] / len(facts["answers"]),
    }
    return (CARD + PLAIN if facts["adapter"] and "lora_rank" not in facts else CARD).format(**values)
