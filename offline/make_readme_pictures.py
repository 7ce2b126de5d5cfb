"""The pictures that README.md and docs/ show, drawn from results/published/; run by hand after offline/publish.py.

Reads results/published/ and the shipped adapter. Writes there answers_and_ppo.gif (the two drivers on one track, side by
side), curves.png (PPO with and without the words, three seeds each), the graphs of the published run and of its LoRA.

    python -m offline.make_readme_pictures      # 1 to 2 minutes on two CPU cores
"""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import evaluate
import film
from car_racing_env import FPS, FRAME_SKIP
from GitText2ActionWithPrompt import ANSWERS, GitText2ActionWithPrompt
from support import checks, plots
from support.run_files import ROOT, read_log

PUBLISHED = ROOT / "results" / "published"
TRACK = 100_099  # a validation track where the answers alone spin round at 10 seconds and PPO's policy finishes its lap
FROM_SECOND = 6  # of the episode; the pictures end with the lap
PANEL_WIDTH = 350  # pixels
EVERY = 2  # decisions per picture
HOLD = 2000  # milliseconds for which the last picture stays
COLORS = 128  # one palette for all pictures, so that colours do not flicker
WITH_WORDS = {"seed 0": ".", "seed 1": "seed1", "seed 2": "seed2"}  # folders in PUBLISHED
WITHOUT_WORDS = {"seed 0": "no_prior", "seed 1": "no_prior/seed1", "seed 2": "no_prior/seed2"}


def panels(driver, name):
    """Each decision's picture of a drive over TRACK, below the driver's name and the return at the end."""
    pictures, totals = zip(*film.drive(driver, TRACK))
    height = PANEL_WIDTH * pictures[0].shape[0] // pictures[0].shape[1]
    made = []
    for picture in pictures:
        panel = Image.new("RGB", (PANEL_WIDTH, height + 28), "white")
        panel.paste(Image.fromarray(picture).resize((PANEL_WIDTH, height), Image.Resampling.LANCZOS), (0, 28))
        title = f"{name}: {totals[-1]:.1f} at the end"
        ImageDraw.Draw(panel).text((6, 4), title, fill="black", font=ImageFont.load_default(17))
        made.append(panel)
    return made


def side_by_side(left, right, path):
    """A GIF of two drives at the same time of the episode, at the simulator's speed, until the right one ends."""
    decisions = range(int(FROM_SECOND * FPS / FRAME_SKIP), len(right), EVERY)
    pictures = []
    for i in [*decisions, len(right) - 1]:
        both = Image.new("RGB", (2 * PANEL_WIDTH + 6, left[0].height), "white")
        both.paste(left[i], (0, 0))
        both.paste(right[i], (PANEL_WIDTH + 6, 0))
        pictures.append(both)
    palette = Image.fromarray(np.concatenate([np.asarray(picture) for picture in pictures[::8]])).quantize(COLORS)
    pictures = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    durations = [round(1000 * EVERY * FRAME_SKIP / FPS)] * len(decisions) + [HOLD]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0)


def draw_curves(path):
    """The greedy score on the validation tracks over training, of every whole PPO run."""
    figure, axis = plots.plt.subplots(figsize=(8, 4.2), layout="constrained")
    for runs, color, name in ((WITH_WORDS, "tab:orange", "with"), (WITHOUT_WORDS, "tab:blue", "without")):
        for (seed, folder), style in zip(runs.items(), ("o-", "s--", "^:")):
            rows = [row for row in read_log(PUBLISHED / folder / "eval_log.csv") if row["driver"] == "policy"]
            label = f"{name} the words, {seed}"
            axis.plot(plots.thousands(rows), plots.column(rows, "mean"), style, color=color, label=label)
    axis.axhline(plots.SOLVED, color="grey", lw=1, ls=":", label=f"{plots.SOLVED}: solved")
    axis.set(title="PPO with and without the words as prior", xlabel=plots.FRAMES_LABEL, ylim=(-150, 1000))
    axis.set(ylabel="return, mean of 20 validation tracks")
    axis.grid(alpha=0.3)
    figure.legend(frameon=False, fontsize=9, loc="outside right center")
    plots.save(figure, path)


def main():
    torch.set_num_threads(1)
    draw_curves(PUBLISHED / "curves.png")
    plots.draw_ppo(PUBLISHED)
    plots.draw_lora_loss(PUBLISHED)
    confusion = np.loadtxt(PUBLISHED / "lora_confusion.csv", dtype=int, delimiter=",")
    plots.draw_confusion(confusion, list(ANSWERS), PUBLISHED / "lora_confusion.png")
    policy = GitText2ActionWithPrompt.from_policy(PUBLISHED / "policy")
    answers = GitText2ActionWithPrompt.from_pretrained(policy.source["adapter"])
    path = PUBLISHED / "answers_and_ppo.gif"
    side_by_side(panels(evaluate.Answers(answers), "answers alone"), panels(evaluate.Policy(policy), "after PPO"), path)
    print(f"wrote {PUBLISHED}/: the graphs and {path.name}, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    checks.run(main)
