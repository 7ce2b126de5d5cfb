"""Copy what a run wrote to results/published/, where the README reads it, and make the README's moving picture.

Reads RESULTS_DIR; run by hand after a run that is worth showing. Writes results/published/.

    python -m offline.publish
"""

import shutil

import imageio
import numpy as np
from PIL import Image

import checks
import policy_card
import run_files

RESULTS_DIR = "results"
FILES = (
    "run.json reward_log.csv update_log.csv eval_log.csv lora_log.csv reward_curve.png ppo_losses.png ppo_diagnostics.png "
    "lora_loss.png lora_confusion.png sb3_eval_log.csv sb3_run.json"
).split()
GIF_FRAMES, GIF_EVERY, GIF_WIDTH = 75, 2, 420  # pictures, stride in the video's frames, pixels


def made_by(run):
    """What the published policy's card says beside how to load it: what made it and where its scores are."""
    constants = run["constants"]
    return f"""
## This run

Seed {constants["SEED"]}, {constants["TOTAL_UPDATES"]} updates of {constants["NUM_ENVS"]} x {constants["NUM_STEPS"]} decisions, {run["seconds"] / 60:.0f} minutes on {run["machine"]}, commit
{run["git_commit"]}; the checkpoint is the best of the run on validation tracks 100,000-100,019 by mean - 0.5 std ([eval_log.csv](../eval_log.csv)).
All constants and versions: [run.json](../run.json). Scores over 100 tracks: [validation/](../validation), [held_out/](../held_out), [test/](../test).
"""


def make_gif(video, path):
    """The end of a film with one palette for all its pictures, so that colours do not flicker."""
    with imageio.get_reader(video) as reader:
        end = reader.count_frames()
        shots = [reader.get_data(i) for i in range(max(0, end - GIF_EVERY * GIF_FRAMES), end, GIF_EVERY)]
    height = GIF_WIDTH * shots[0].shape[0] // shots[0].shape[1]
    pictures = [Image.fromarray(np.asarray(shot)).resize((GIF_WIDTH, height)) for shot in shots]
    palette = Image.fromarray(np.concatenate([np.asarray(p) for p in pictures[::6]])).quantize(96)
    pictures = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=40 * GIF_EVERY, loop=0)


def main():
    results = run_files.ROOT / RESULTS_DIR
    published = run_files.ROOT / "results" / "published"
    published.mkdir(parents=True, exist_ok=True)
    missing = [name for name in (*FILES, "video_final.mp4", "policy/policy.json") if not (results / name).exists()]
    if missing:
        raise checks.BadInput(
            f"no {', '.join(missing)} in {RESULTS_DIR}/: run the three stages and benchmarks/sb3_baseline.py"
        )
    for name in FILES:
        shutil.copy2(results / name, published / name)
    shutil.copytree(results / "policy", published / "policy", dirs_exist_ok=True)
    facts = checks.read_json(published / "policy" / "policy.json")
    make_gif(results / "video_final.mp4", published / "demo.gif")
    card = policy_card.card("results/published/policy", facts) + made_by(checks.read_json(results / "run.json"))
    (published / "policy" / "README.md").write_text(card)
    print(f"wrote {published}, demo.gif {(published / 'demo.gif').stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    checks.run(main)
