"""A toy LoRA run to which something happens: `python toy_lora.py FOLDER BASE RESUME FAULT`.

FAULT: "step" (killed in the second epoch), "checkpoint" (killed while the first is written), "ctrl-c", "disk" or empty.
"""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from conftest import edit  # noqa: E402
from toy_process import at_call, die, fill_the_disk  # noqa: E402

import GitText2ActionWithPrompt as model_file  # noqa: E402
from support import checks  # noqa: E402
from support.run_files import write_json  # noqa: E402


def write_data(folder):
    """Noise with answers; under torchrun written before the processes start."""
    rng, answers = np.random.default_rng(0), list(model_file.ANSWERS)
    for split, count in {"train": 40, "validation": 10}.items():
        (folder / split).mkdir(parents=True)
        with (folder / split / "metadata.jsonl").open("w") as metadata:
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)).save(folder / split / f"{i}.png")
                row = {"file_name": f"{i}.png", "text": answers[i % 5], "prompt": model_file.PROMPT}
                told = [("left", "taught", "Keep left."), ("speed thirty", "held_out", "Speed thirty.")]
                row["told"] = [
                    {"instruction": name, "split": split, "sentence": sentence, "text": answers[(i + j) % 5]}
                    for j, (name, split, sentence) in enumerate(told)
                ]
                row["asked"] = [
                    {"about": "grass", "question": "Is the car on the grass?", "text": "One wheel is on the grass."}
                ]
                metadata.write(json.dumps(row) + "\n")
    write_json(folder / "task.json", model_file.task())


def toy_lora(folder, base, **constants):
    """The fine-tuning script at toy size; the data are written first if they are missing."""
    folder = Path(folder)
    if not (folder / "data").exists():
        write_data(folder / "data")
    defaults = dict(
        BASE_MODEL=str(base), DATA_DIR=str(folder / "data"), OUTPUT_DIR=str(folder / "adapter"), MIN_FRAMES=1, EPOCHS=3,
        RESULTS_DIR=str(folder / "results"), CHECKPOINT_DIR=str(folder / "checkpoints"), BATCH_SIZE=8, LORA_RANK=4,
    )  # fmt: skip
    torch.set_num_threads(1)
    return edit("train_git_lora_carllava_style", **defaults | constants)


def main(folder, base, resume="", fault=""):
    stage2 = toy_lora(folder, base, RESUME=bool(resume))
    training_step = stage2.AnswerTrainer.training_step
    if fault == "step":
        stage2.AnswerTrainer.training_step = at_call(7, training_step)
    if fault == "ctrl-c":
        stage2.AnswerTrainer.training_step = at_call(2, training_step, lambda *args: os.killpg(0, signal.SIGINT))
    if fault == "checkpoint":
        torch.save = die  # after the weights, before the optimizer's state
    if fault == "disk":
        fill_the_disk(size=10_000)  # less than the weights
    stage2.main()


if __name__ == "__main__":
    checks.run(lambda: main(*sys.argv[1:]))
