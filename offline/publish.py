"""Copy what a run wrote to results/published/, where the README reads it, and make the README's moving picture.

Reads RESULTS_DIR; run by hand after a run that is worth showing. Writes results/published/.

    python -m offline.publish
"""

import json
import shutil

import imageio
import numpy as np
from PIL import Image

import collect_captions

RESULTS_DIR = "results"
FILES = (
    "run.json reward_log.csv update_log.csv eval_log.csv lora_log.csv reward_curve.png ppo_losses.png ppo_diagnostics.png "
    "lora_loss.png lora_confusion.png sb3_eval_log.csv sb3_run.json"
).split()
GIF_FROM, GIF_FRAMES, GIF_EVERY, GIF_WIDTH = 60, 60, 4, 360  # first video frame, pictures, stride, pixels

PLAIN = """import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoProcessor

base = AutoModelForCausalLM.from_pretrained("offline/git-tiny")
git = PeftModel.from_pretrained(base, "lora_git_caption_model_carllava").merge_and_unload().eval()
processor = AutoProcessor.from_pretrained("lora_git_caption_model_carllava")
weights = load_file("results/published/policy/policy.safetensors")
layer = lambda name, x: x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

words = processor.tokenizer.convert_tokens_to_ids(["coast", "accelerate", "left", "right", "brake", "turn"])
question = "What should the vehicle do in this scenario?"
tokens = processor.tokenizer(question, return_tensors="pt").input_ids[:, :-1]
tokens = torch.cat([tokens, torch.tensor([words[5:]])], 1)  # the question and "turn"
pixels = processor(images=frame, return_tensors="pt").pixel_values  # frame: PIL image or uint8 (96, 96, 3)
with torch.no_grad():
    output = git(input_ids=tokens, pixel_values=pixels, output_hidden_states=True)
first, second = output.logits[0, -2:].log_softmax(-1)  # the words after the question, and after "turn"
coast, accelerate, left, right, brake, turn = words
scores = [first[coast], first[accelerate], first[turn] + second[left], first[turn] + second[right], first[brake]]
p = torch.stack(scores).softmax(0)  # of the answers Coast, Accelerate, Turn left, Turn right, Brake
features = output.hidden_states[-1][0, -2]  # of the question's last token
correction = layer("policy_head.2", torch.tanh(layer("policy_head.0", features)))
action_logits = torch.log(0.98 * p + 0.02 / 5) + correction
"""


def card(run):
    """The policy's card: what made it and where its scores are."""
    constants = run["constants"]
    return f"""# PPO policy

Policy and value head on the last prompt token's hidden state, safetensors; `policy.json` names base and adapter. Made by
`python ppo_git_with_prompt.py`: seed {constants["SEED"]}, {constants["TOTAL_UPDATES"]} updates of {constants["NUM_ENVS"]} x {constants["NUM_STEPS"]} decisions, {run["seconds"] / 60:.0f} minutes on
{run["machine"]}, commit {run["git_commit"].rstrip("+")}; the checkpoint is the best of the run on validation tracks 100,000-100,019 by mean - 0.5 std
([eval_log.csv](../eval_log.csv)). All constants and versions: [run.json](../run.json). Scores over 100 tracks: [validation/](../validation), [held_out/](../held_out), [test/](../test).

With this project:

```python
from GitText2ActionWithPrompt import GitText2ActionWithPrompt

model = GitText2ActionWithPrompt.from_policy("results/published/policy")
action_logits, value = model(frames)  # uint8 (B, 96, 96, 3) -> (B, 5), (B,)
```

Without it, from the folder that holds base, adapter and policy:

```python
{PLAIN}```
"""


def make_gif(video, path):
    """A stretch of a film with one palette for all its pictures, so that colours do not flicker."""
    with imageio.get_reader(video) as reader:
        shots = [reader.get_data(GIF_FROM + GIF_EVERY * i) for i in range(GIF_FRAMES)]
    height = GIF_WIDTH * shots[0].shape[0] // shots[0].shape[1]
    pictures = [Image.fromarray(np.asarray(shot)).resize((GIF_WIDTH, height)) for shot in shots]
    palette = Image.fromarray(np.concatenate([np.asarray(p) for p in pictures[::6]])).quantize(96)
    pictures = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=40 * GIF_EVERY, loop=0)


def main():
    results = collect_captions.ROOT / RESULTS_DIR
    published = collect_captions.ROOT / "results" / "published"
    published.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copy2(results / name, published / name)
    shutil.copytree(results / "policy", published / "policy", dirs_exist_ok=True)
    make_gif(results / "video_final.mp4", published / "demo.gif")
    (published / "policy" / "README.md").write_text(card(json.loads((results / "run.json").read_text())))
    print(f"wrote {published}, demo.gif {(published / 'demo.gif').stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
