"""The graphs of stages 2 and 3, drawn from their CSV files while they run.

Reads RESULTS_DIR/lora_log.csv, reward_log.csv, update_log.csv and eval_log.csv. Writes lora_loss.png, reward_curve.png,
ppo_losses.png and ppo_diagnostics.png beside them; for stages 1 and 2 and the benchmarks sheets of frames and
lora_confusion.png.

    python -m support.plots      # draw them again
"""

import io

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

from support.checks import BadInput, run
from support.run_files import ROOT, read_log, write_file

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

RESULTS_DIR = "results"
SOLVED = 900  # mean return over 100 tracks at which CarRacing counts as solved
FRAMES_LABEL = "frames driven in training (thousands)"
LOSSES = {  # column of update_log.csv: its title
    "policy_loss": "policy loss",
    "value_loss": "value loss",
    "entropy": "entropy of the policy (nats)",
    "kl_to_prior": "KL to the prior (nats)",
}
DIAGNOSTICS = {
    "approx_kl": "KL of one update (nats)",
    "clipfrac": "share of clipped decisions",
    "explained_variance": "explained variance of the value",
    "decisions_per_second": "decisions per second",
}


def column(rows, name):
    """A column of a CSV log as a float array."""
    return np.array([float(row[name]) for row in rows])


def thousands(rows):
    """The frames at which the rows of a log were written, in thousands."""
    return column(rows, "env_frames") / 1000


def save(figure, path):
    """Write a picture that appears whole or not at all."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130, format="png")
    plt.close(figure)
    write_file(path, picture.getvalue())


def spread(items, count):
    """At most `count` of the items, evenly spread over the list."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(count, len(items))).astype(int)]


def draw_sheet(frames, captions, path, columns):
    """Frames uint8 (96, 96, 3) in rows, a caption below each."""
    size = 192
    rows, width, height = -(-len(frames) // columns), size + 4, size + 20
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (frame, caption) in enumerate(zip(frames, captions, strict=True)):
        x, y = i % columns * width, i // columns * height
        sheet.paste(Image.fromarray(frame).resize((size, size), Image.NEAREST), (x, y))
        draw.text((x + 2, y + size + 3), caption, "black")
    sheet.save(path)


def draw_reward_curve(results):
    """reward_curve.png: training episodes, their running mean, and the greedy scores on the validation tracks.

    Episodes under instructions are left out: who is told to stop earns nothing. A driver that drives from the start is
    shown from 700 up; the episodes below are triangles at the lower edge.
    """
    episodes = [row for row in read_log(results / "reward_log.csv") if row["told"] == "0"]
    evaluations = read_log(results / "eval_log.csv")
    policy, answers = ([row for row in evaluations if row["driver"] == name] for name in ("policy", "answers"))
    bottom = 700 if policy and column(policy, "mean").min() > 750 else None
    figure, axis = plt.subplots(figsize=(8, 4.6), layout="constrained")
    if episodes:
        x, returns = thousands(episodes), column(episodes, "return")
        axis.plot(
            x, returns, ".", color="tab:blue", alpha=0.25, label="one training episode (told nothing, actions sampled)"
        )
        below = returns < (bottom or -np.inf)
        if below.any():
            edge = np.full(below.sum(), bottom + 4)
            axis.plot(
                x[below], edge, "v", color="tab:blue", alpha=0.5, ms=5, label=f"episodes below {bottom}: {len(edge)}"
            )
        window = min(50, len(returns))
        mean = np.convolve(returns, np.ones(window) / window, "valid")
        axis.plot(x[window - 1 :], mean, color="tab:blue", label=f"mean of the last {window} episodes")
    if policy:
        errors = {"yerr": column(policy, "std"), "ecolor": "moccasin", "elinewidth": 1.5, "capsize": 3}
        label = "greedy policy, mean ± std over validation tracks"
        axis.errorbar(
            thousands(policy), column(policy, "mean"), fmt="o-", color="tab:orange", lw=2, label=label, **errors
        )
    if answers:
        axis.axhline(float(answers[-1]["mean"]), color="tab:green", ls="--", label="answers alone, the same tracks")
    axis.axhline(SOLVED, color="grey", ls=":", label=f"{SOLVED}: solved")
    axis.set(
        title="Return of the PPO run", xlabel=FRAMES_LABEL, ylabel="return", ylim=(bottom, 960 if bottom else 1000)
    )
    axis.grid(alpha=0.3)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncol=2)
    save(figure, results / "reward_curve.png")


def draw_updates(results, name, titles):
    """<name>.png: one small graph per column of update_log.csv; `titles` are columns with their titles."""
    rows = read_log(results / "update_log.csv")
    figure, axes = plt.subplots(1, len(titles), figsize=(3.2 * len(titles), 2.8), layout="constrained")
    for axis, (key, title) in zip(axes, titles.items()):
        axis.plot(thousands(rows), column(rows, key))
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    figure.supxlabel(FRAMES_LABEL, fontsize=10)
    save(figure, results / f"{name}.png")


def draw_ppo(results):
    """The graphs of a PPO run's folder."""
    draw_reward_curve(results)
    if read_log(results / "update_log.csv"):
        draw_updates(results, "ppo_losses", LOSSES)
        draw_updates(results, "ppo_diagnostics", DIAGNOSTICS)


def draw_lora_loss(results):
    """lora_loss.png: average and validation loss per epoch, and the exact answers beside the majority's share."""
    rows = read_log(results / "lora_log.csv")
    epochs = column(rows, "epoch")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.plot(epochs, column(rows, "average_loss"), "o-", label="training, average of the epoch")
    left.plot(epochs, column(rows, "validation_loss"), "o-", label="validation tracks, other texts (not comparable)")
    left.set(title="LoRA's loss", xlabel="epoch", ylabel="cross-entropy per answer (nats a token)", ylim=(0, None))
    right.plot(epochs, 100 * column(rows, "exact_match"), "o-", color="tab:green", label="the model's answers")
    majority = 100 * column(rows, "majority_share")[-1]
    right.axhline(majority, color="grey", ls="--", label="always the commonest answer")
    right.set(title="Answers like the teacher's", xlabel="epoch", ylabel="% of the validation frames", ylim=(0, 100))
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=8)
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    save(figure, results / "lora_loss.png")


def draw_confusion(confusion, answers, path):
    """Rows: what the teacher answers; columns: what the model says. Answers that never occur are left out.

    `confusion` are counts, int (answers, answers + 1); the last column is any other text. Also written beside it as
    csv.
    """
    np.savetxt(path.with_suffix(".csv"), confusion, fmt="%d", delimiter=",")
    names = [*answers, "other words"]
    rows, columns = confusion.any(1), confusion.any(0)
    columns[:-1] |= rows
    counts = confusion[rows][:, columns]
    share = counts / counts.sum(1, keepdims=True)
    figure, axis = plt.subplots(figsize=(6, 4.6), layout="constrained")
    axis.imshow(share, cmap="Greens", vmin=0, vmax=1)
    for (i, j), n in np.ndenumerate(counts):
        if n:
            color = "white" if share[i, j] > 0.6 else "black"
            axis.text(j, i, f"{share[i, j]:.1%}\n{n:,}", ha="center", va="center", fontsize=9, color=color)
    axis.set_xticks(range(columns.sum()), [name for name, shown in zip(names, columns) if shown])
    axis.set_yticks(range(rows.sum()), [name for name, shown in zip(names, rows) if shown])
    axis.set(
        title=f"Answers on {counts.sum():,} validation frames", xlabel="the model says", ylabel="the teacher answers"
    )
    save(figure, path)


DRAWN_FROM = {"lora_log.csv": draw_lora_loss, "eval_log.csv": draw_ppo}


def main():
    folder = ROOT / RESULTS_DIR
    drawn = {name: draw for name, draw in DRAWN_FROM.items() if (folder / name).exists()}
    if not drawn:
        raise BadInput(f"no {' and no '.join(DRAWN_FROM)} in {RESULTS_DIR}/: run stage 2 or 3 first")
    for draw in drawn.values():
        draw(folder)
    print(f"drew the graphs in {RESULTS_DIR}/")


if __name__ == "__main__":
    run(main)
