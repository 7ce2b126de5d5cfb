"""The pictures that README.md and docs/ show, drawn from results/published/; run by hand after offline/publish.py.

Reads results/published/ and the shipped adapter. Writes there answers_and_ppo.gif (the two drivers on one track, side
by side), instructions.png (one frame under several instructions), the graphs of the published run and of its LoRA.

    python -m offline.make_readme_pictures      # 1 to 2 minutes on two CPU cores
"""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import car_racing_env
import evaluate
import film
from car_racing_env import FPS, FRAME_SKIP
from GitText2ActionWithPrompt import ANSWERS, GitText2ActionWithPrompt
from support import checks, plots
from support.run_files import ROOT

PUBLISHED = ROOT / "results" / "published"
TRACK = 100_054  # of the validation tracks the second worst for the answers alone; both lose the worst, 100,065
FROM_SECOND = 6  # of the episode; the pictures end with the right drive
PANEL_WIDTH = 350  # pixels
EVERY = 2  # decisions per picture
HOLD = 2000  # milliseconds for which the last picture stays
COLORS = 128  # one palette for all pictures, so that colours do not flicker
TOLD = ("", "Drive slowly.", "Keep to the left.", "The left lane is closed.", "Stop.")  # of one frame
TOLD_AT = 63  # decision of the plain drive over TOLD_TRACK
TOLD_TRACK = 100_000


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
        both.paste(left[min(i, len(left) - 1)], (0, 0))
        both.paste(right[i], (PANEL_WIDTH + 6, 0))
        pictures.append(both)
    palette = Image.fromarray(np.concatenate([np.asarray(picture) for picture in pictures[::8]])).quantize(COLORS)
    pictures = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    durations = [round(1000 * EVERY * FRAME_SKIP / FPS)] * len(decisions) + [HOLD]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0)


def draw_instructions(model, path):
    """One frame of a plain drive; under it what the policy says, and how probable each answer is, told five things."""
    env, driver = car_racing_env.make_env(), evaluate.Policy(model)
    frame, info = env.reset(seed=TOLD_TRACK)
    for _ in range(TOLD_AT):
        frame, *_ = env.step(int(driver(frame[None], info)[0]))
    frames, names = np.stack([frame] * len(TOLD)), list(ANSWERS)
    answers = model.answer(frames, list(TOLD))
    driver.told = list(TOLD)
    probabilities = driver.probabilities(frames).numpy()
    figure, axes = plots.plt.subplots(2, len(TOLD), figsize=(2.3 * len(TOLD), 4.6), layout="constrained")
    for (picture, bars), told, answer, p in zip(axes.T, TOLD, answers, probabilities):
        picture.imshow(frame)
        picture.set_title(f"{told or '(told nothing)'}\n“{answer}”", fontsize=10)
        picture.axis("off")
        colors = ["tab:green" if i == p.argmax() else "tab:gray" for i in range(len(names))]
        bars.barh(names, p, color=colors)
        bars.set(xlim=(0, 1), xticks=(0, 0.5, 1))
        bars.invert_yaxis()
        bars.tick_params(labelsize=8, labelleft=bars is axes[1, 0])
        bars.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("probability of each action after PPO", fontsize=9)
    plots.save(figure, path)


def main():
    torch.set_num_threads(1)
    plots.draw_ppo(PUBLISHED)
    plots.draw_lora_loss(PUBLISHED)
    confusion = np.loadtxt(PUBLISHED / "lora_confusion.csv", dtype=int, delimiter=",")
    plots.draw_confusion(confusion, list(ANSWERS), PUBLISHED / "lora_confusion.png")
    policy = GitText2ActionWithPrompt.from_policy(PUBLISHED / "policy")
    answers = GitText2ActionWithPrompt.from_pretrained(policy.source["adapter"])
    draw_instructions(policy, PUBLISHED / "instructions.png")
    path = PUBLISHED / "answers_and_ppo.gif"
    side_by_side(panels(evaluate.Answers(answers), "answers alone"), panels(evaluate.Policy(policy), "after PPO"), path)
    print(f"wrote {PUBLISHED}/: the graphs and {path.name}, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    checks.run(main)
