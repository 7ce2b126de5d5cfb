"""A toy LoRA run in a process of its own: `python toy_lora.py FOLDER BASE RESUME KILL`.

KILL: "step" (in the second epoch), "checkpoint" (while the second epoch's checkpoint is being written), or empty.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from toy_ppo import die, die_at_call  # noqa: E402

import train_git_lora_carllava_style as stage2  # noqa: E402

KILLS = ("step", "checkpoint")
answers = list(stage2.model_file.ANSWERS)


def write_data(folder):
    """Noise with answers; under torchrun written before the processes start."""
    rng = np.random.default_rng(0)
    for split, count in {"train": 40, "validation": 10}.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        rows = []
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)).save(folder / split / f"{i}.png")
            rows.append({"file_name": f"{i}.png", "text": answers[i % 5], "prompt": stage2.model_file.PROMPT})
        (folder / split / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.json").write_text(json.dumps({"frame_skip": stage2.car_racing_env.FRAME_SKIP}))


def main(folder, base, resume, kill):
    folder = Path(folder)
    if not (folder / "data" / "run.json").exists():
        write_data(folder / "data")
    stage2.BASE_MODEL, stage2.DATA_DIR, stage2.OUTPUT_DIR = base, str(folder / "data"), str(folder / "adapter")
    stage2.RESULTS_DIR, stage2.CHECKPOINT_DIR = str(folder / "results"), str(folder / "checkpoints")
    stage2.MIN_FRAMES, stage2.EPOCHS, stage2.BATCH_SIZE, stage2.LORA_RANK, stage2.LORA_DROPOUT = 1, 3, 8, 4, 0.1
    stage2.RESUME = bool(resume)
    if kill == "step":
        stage2.model_file.preprocess = die_at_call(11, stage2.model_file.preprocess)
    if kill == "checkpoint":
        save, saved = stage2.torch.save, []

        def save_or_die(state, path, *args, **kwargs):
            saved.extend([path] * str(path).endswith("scheduler.pt"))
            return die() if len(saved) == 2 else save(state, path, *args, **kwargs)

        stage2.torch.save = save_or_die
    stage2.main()


if __name__ == "__main__":
    main(*sys.argv[1:])
