"""What the four scripts wrote, run one after the other."""

import csv
import json
import re
from pathlib import Path

import datasets
import imageio
import numpy as np
import pytest
from conftest import run_pipeline
from PIL import Image

import car_racing_env
import collect_captions
import evaluate
import GitText2ActionWithPrompt as model_file
import run_files


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_captions_read_as_imagefolder(pipeline, tmp_path):
    data = datasets.load_dataset("imagefolder", data_dir=str(pipeline.data), cache_dir=str(tmp_path))
    assert {split: len(data[split]) for split in data} == {"train": 96, "validation": 32}
    row = data["train"][0]
    assert row["image"].size == (96, 96) and row["text"] in model_file.ANSWERS and row["prompt"] == model_file.PROMPT
    assert model_file.ANSWERS[row["text"]] == row["action"]
    assert not set(data["train"]["track_seed"]) & set(data["validation"]["track_seed"])


def test_the_shipped_sample_loads_by_its_card(tmp_path, monkeypatch):
    monkeypatch.chdir(run_files.ROOT)
    line = re.search(r"```python\n(.*)\n```", Path("CarRacing-Data/README.md").read_text()).group(1)
    data = eval(line.replace(")", f", cache_dir={str(tmp_path)!r})"), {"datasets": datasets})
    assert {split: len(data[split]) for split in data} == {"train": 180, "validation": 20}


def test_a_caption_is_the_frame_the_simulator_draws(pipeline):
    """The first kept frame of a track, replayed with the recorded answers' absence: only the zoom-in at the start."""
    first = json.loads((pipeline.data / "train" / "metadata.jsonl").read_text().splitlines()[0])
    env = car_racing_env.make_env(1)
    obs, _ = env.reset(seed=first["track_seed"])
    for _ in range(first["frame"]):
        obs, *_ = env.step(3)  # on its first straight the teacher accelerates
    with Image.open(pipeline.data / "train" / first["file_name"]) as image:
        difference = np.abs(np.asarray(image).astype(int) - obs)[:84].mean()
    assert difference < 3


def test_folders_have_cards_and_run_files(pipeline):
    assert (pipeline.data / "contact_sheet.png").exists() and "| Turn left |" in (
        pipeline.data / "README.md"
    ).read_text()
    for folder in (pipeline.data, pipeline.adapter, pipeline.results):
        run = json.loads((folder / "run.json").read_text())
        assert run["frame_skip"] == 2 and run["versions"]["torch"] and run["constants"]
    made_from = [json.loads((folder / "run.json").read_text()) for folder in (pipeline.data, pipeline.adapter)]
    assert made_from[0]["teacher_hash"] == run_files.file_hash(run_files.ROOT / collect_captions.TEACHER)
    assert made_from[1]["data_hash"] == run_files.file_hash(pipeline.data / "train" / "metadata.jsonl")
    assert "PeftModel" in (pipeline.adapter / "README.md").read_text()


def test_adapter_loads_with_plain_peft(pipeline, frames):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoProcessor

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pipeline.base), pipeline.adapter).eval()
    processor = AutoProcessor.from_pretrained(pipeline.adapter)
    prompt = processor.tokenizer(model_file.PROMPT, return_tensors="pt").input_ids[:, :-1]
    pixels = processor(images=list(frames.numpy()), return_tensors="pt").pixel_values
    words = model.generate(pixel_values=pixels, input_ids=prompt.expand(3, -1), max_new_tokens=6)
    said = processor.tokenizer.batch_decode(words[:, prompt.shape[1] :], skip_special_tokens=True)
    ours = model_file.GitText2ActionWithPrompt.from_pretrained(str(pipeline.base), pipeline.adapter).answer(frames)
    assert [model_file.parse_answer(x) or x for x in said] == ours


def test_lora_log(pipeline):
    log = rows(pipeline.results / "lora_log.csv")
    assert [row["epoch"] for row in log] == ["1", "2"]
    assert float(log[1]["average_loss"]) < float(log[0]["average_loss"])
    assert 0 <= float(log[1]["exact_match"]) <= 1
    assert sum(int(log[0][key]) for key in log[0] if key.startswith("count_")) == 32


def test_reward_log_is_the_true_return(pipeline):
    log = rows(pipeline.results / "reward_log.csv")
    assert list(log[0]) == ["episode", "update", "env_frames", "return", "length", "end", "track_seed"]
    assert [int(row["episode"]) for row in log] == list(range(1, len(log) + 1))
    assert {row["end"] for row in log} <= {"lap", "field", "time", "grass"}
    assert all(0 <= int(row["track_seed"]) < 100_000 for row in log)


def test_evaluation_file(pipeline):
    facts = json.loads((pipeline.results / "eval_policy.json").read_text())
    assert facts["seeds"] == [100_000, 100_001] and len(facts["returns"]) == 2
    assert facts["weights_hash"] == run_files.file_hash(pipeline.results / "policy" / "policy.safetensors")
    assert facts["mean"] == pytest.approx(np.mean(facts["returns"]), abs=0.01)
    assert facts["std"] == pytest.approx(np.std(facts["returns"]), abs=0.01)


def test_videos_play(pipeline):
    for name in ("video_final.mp4", "video_policy.mp4"):
        video = imageio.get_reader(pipeline.results / name)
        assert video.get_data(0).shape == (560, 600, 3)
        video.close()


def test_evaluation_reloads_the_saved_policy(pipeline):
    """The saved files alone give the same score again, one environment at a time."""
    model = model_file.GitText2ActionWithPrompt.from_policy(pipeline.results / "policy")
    again = evaluate.evaluate(evaluate.Policy(model), [100_000, 100_001], 1, progress=False)
    facts = json.loads((pipeline.results / "eval_policy.json").read_text())
    assert [round(r["return"], 2) for r in again] == facts["returns"]


def test_the_same_seeds_give_the_same_files(pipeline, toy_base, tmp_path):
    """All four scripts a second time: what they measured and trained is equal to the last bit."""
    again = run_pipeline(tmp_path, toy_base)

    def facts(path, *different):
        return {key: x for key, x in json.loads(path.read_text()).items() if key not in different}

    def without(path, *columns):
        return [{key: x for key, x in row.items() if key not in columns} for row in rows(path)]

    one, two = ([p.relative_to(made.data) for p in sorted(made.data.rglob("*"))] for made in (pipeline, again))
    assert one == two and len(one) > 128
    for name in one:
        if name.suffix in (".png", ".jsonl"):
            assert (pipeline.data / name).read_bytes() == (again.data / name).read_bytes(), name
    for one, two in ((pipeline.adapter, again.adapter), (pipeline.results / "policy", again.results / "policy")):
        for weights in one.glob("*.safetensors"):
            assert weights.read_bytes() == (two / weights.name).read_bytes(), weights
    for name, different in (
        ("lora_log.csv", ["seconds"]), ("reward_log.csv", []), ("eval_log.csv", []),
        ("update_log.csv", ["seconds", "decisions_per_second", "update_share"]),
    ):  # fmt: skip
        assert without(pipeline.results / name, *different) == without(again.results / name, *different), name
    one, two = (facts(p.results / "eval_policy.json", "seconds", "folder") for p in (pipeline, again))
    assert one == two
