"""Copy what a run wrote to results/published/, where the README reads it, and make the README's moving picture.

Reads RESULTS_DIR; run by hand after a run that is worth showing. Writes results/published/.

    python -m offline.publish
"""

import shutil

import imageio
import numpy as np
from PIL import Image

import collect_captions

RESULTS_DIR = "results"
FILES = (
    "run.json reward_log.csv update_log.csv eval_log.csv lora_log.csv reward_curve.png ppo_losses.png ppo_diagnostics.png "
    "lora_loss.png lora_confusion.png"
).split()
GIF_FROM, GIF_FRAMES, GIF_EVERY, GIF_WIDTH = 60, 60, 4, 360  # first video frame, pictures, stride, pixels


def main():
    results = collect_captions.ROOT / RESULTS_DIR
    published = collect_captions.ROOT / "results" / "published"
    published.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copy2(results / name, published / name)
    shutil.copytree(results / "policy", published / "policy", dirs_exist_ok=True)
    with imageio.get_reader(results / "video_final.mp4") as video:
        shots = [video.get_data(GIF_FROM + GIF_EVERY * i) for i in range(GIF_FRAMES)]
    height = GIF_WIDTH * shots[0].shape[0] // shots[0].shape[1]
    pictures = [
        Image.fromarray(np.asarray(shot)).resize((GIF_WIDTH, height)).quantize(64, Image.Quantize.MAXCOVERAGE)
        for shot in shots
    ]
    pictures[0].save(published / "demo.gif", save_all=True, append_images=pictures[1:], duration=40 * GIF_EVERY, loop=0)
    print(f"wrote {published}, demo.gif {(published / 'demo.gif').stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
