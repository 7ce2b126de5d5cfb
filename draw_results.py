"""The graphs of stages 2 and 3, drawn from their CSV files while they run.

Reads RESULTS_DIR/lora_log.csv, reward_log.csv, update_log.csv, eval_log.csv and, if the baseline ran, sb3_eval_log.csv.
Writes lora_loss.png, reward_curve.png, ppo_losses.png and ppo_diagnostics.png beside them.

    python draw_results.py      # draw them again
"""

import matplotlib
import numpy as np

import checks
import GitText2ActionWithPrompt as model_file
from run_files import ROOT, read_log

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

RESULTS_DIR = "results"


def save(figure, path):
    """Write a picture that appears whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        figure.savefig(partial, dpi=130, format="png")
        partial.replace(path)
    finally:
        plt.close(figure)
        partial.unlink(missing_ok=True)


def draw_returns(axis, episodes, evaluations, baseline, bars=True):
    """Episodes and their moving mean, evaluations (with error bars if `bars`), answers alone, the 900 line."""
    if episodes:
        frames = np.array([int(row["env_frames"]) for row in episodes])
        returns = np.array([float(row["return"]) for row in episodes])
        label = "training episodes (sampled actions, stopped on grass)"
        axis.plot(frames, returns, ".", color="tab:blue", alpha=0.25, ms=4, label=label)
        window = min(50, len(returns))
        mean = np.convolve(returns, np.ones(window) / window, "valid")
        axis.plot(frames[window - 1 :], mean, color="tab:blue", label=f"running mean of {window} episodes")
    policy = [row for row in evaluations if row["driver"] == "policy"]
    for rows, marker, color, label in (
        (policy, "o-", "tab:orange", "greedy on the validation tracks ± std"),
        (baseline, "s-", "tab:purple", "SB3 PPO CnnPolicy, same tracks and frames"),
    ):
        if rows:
            x, mean, std = ([float(row[key]) for row in rows] for key in ("env_frames", "mean", "std"))
            axis.errorbar(x, mean, std if bars else None, fmt=marker, color=color, ms=5, capsize=3, label=label)
    for row in evaluations:
        if row["driver"] == "answers":
            axis.axhline(float(row["mean"]), color="tab:green", ls="--", label="answers alone, same tracks")
    axis.axhline(900, color="grey", ls=":", label="900: solved")
    axis.set(xlabel="environment frames (thousands)", ylabel="return", ylim=(None, 1000))
    axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}")
    axis.grid(alpha=0.3)


def draw_reward_curve(results):
    """reward_curve.png: every return of the run; beside it, if the policy drove from the start, those above 800 enlarged."""
    logs = [read_log(results / f"{name}_log.csv") for name in ("reward", "eval", "sb3_eval")]
    drives = any(row["update"] == "0" and row["driver"] == "policy" and float(row["mean"]) > 800 for row in logs[1])
    figure, axes = plt.subplots(1, 1 + drives, figsize=(6.5 + 5 * drives, 4.6), layout="constrained", squeeze=False)
    draw_returns(axes[0, 0], *logs)
    if drives:
        draw_returns(axes[0, 1], *logs, bars=False)
        axes[0, 0].set(title="all returns")
        axes[0, 1].set(ylim=(800, 950), ylabel=None, title="returns above 800, means without their ± std")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside lower center", ncol=2 + drives)
    save(figure, results / "reward_curve.png")


def draw_updates(results, name, columns):
    """One small graph per column of update_log.csv, side by side, in <name>.png."""
    rows = read_log(results / "update_log.csv")
    figure, axes = plt.subplots(1, len(columns), figsize=(2.9 * len(columns), 2.7), layout="constrained")
    for axis, column in zip(axes, columns):
        axis.plot([int(row["env_frames"]) for row in rows], [float(row[column]) for row in rows], lw=1)
        axis.set(title=column, xlabel="frames (thousands)")
        axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}")
        axis.grid(alpha=0.3)
    save(figure, results / f"{name}.png")


def draw_lora_loss(results):
    """lora_loss.png: average and validation loss per epoch, and exact match beside the majority's share."""
    rows = read_log(results / "lora_log.csv")
    column = lambda name: [float(row[name]) for row in rows]  # noqa: E731
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.plot(column("epoch"), column("average_loss"), "o-", label="average loss, training")
    left.plot(column("epoch"), column("validation_loss"), "o-", label="validation loss")
    left.set(xlabel="epoch", ylabel="cross-entropy per answer token (nats)", ylim=(0, None))
    right.plot(
        column("epoch"), column("exact_match"), "o-", color="tab:green", label="exact match of generated answers"
    )
    right.axhline(column("majority_share")[-1], color="grey", ls="--", label="always the commonest answer")
    right.set(xlabel="epoch", ylabel="share of validation frames", ylim=(0, 1))
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=8)
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    save(figure, results / "lora_loss.png")


def draw_confusion(confusion, path):
    """Rows: what the teacher did; columns: what the model said; shares of the row, with counts."""
    answers = list(model_file.ANSWERS)
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    figure, axis = plt.subplots(figsize=(6.2, 4.6), layout="constrained")
    axis.imshow(share, cmap="Greens", vmin=0, vmax=1)
    for (i, j), n in np.ndenumerate(confusion):
        if n:
            color = "white" if share[i, j] > 0.6 else "black"
            axis.text(j, i, f"{share[i, j]:.1%}\n{n}", ha="center", va="center", fontsize=8, color=color)
    for i in np.flatnonzero(confusion.sum(1) == 0):
        axis.text(2.5, i, "no such frame", ha="center", va="center", fontsize=8, color="grey")
    axis.set_xticks(range(6), [*answers, "other"], rotation=25), axis.set_yticks(range(5), answers)
    axis.set(xlabel="the model says", ylabel="the teacher answers")
    save(figure, path)


def draw(results):
    """The graphs of a PPO run's folder."""
    draw_reward_curve(results)
    if read_log(results / "update_log.csv"):
        draw_updates(results, "ppo_losses", ["policy_loss", "value_loss", "entropy", "kl_to_answers"])
        draw_updates(
            results, "ppo_diagnostics", ["approx_kl", "clipfrac", "explained_variance", "decisions_per_second"]
        )


def main():
    folder = ROOT / RESULTS_DIR
    if not (folder / "eval_log.csv").exists():
        raise checks.BadInput(f"no eval_log.csv in {RESULTS_DIR}/: run ppo_git_with_prompt.py first")
    draw(folder)
    if (folder / "lora_log.csv").exists():
        draw_lora_loss(folder)
    print(f"drew the graphs in {RESULTS_DIR}/")


if __name__ == "__main__":
    checks.run(main)
