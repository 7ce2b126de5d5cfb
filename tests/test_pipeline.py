"""What the four scripts wrote, run one after the other."""

import datasets
import numpy as np
import pytest
from conftest import COLLECT, STAGE2, toy_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import car_racing_env
from GitText2ActionWithPrompt import ANSWERS, PROMPT, GitText2ActionWithPrompt
from support.checks import BadInput, read_json
from support.run_files import file_hash, read_log, replace_folder


def test_captions_read_as_imagefolder(pipeline, tmp_path):
    data = datasets.load_dataset("imagefolder", data_dir=str(pipeline.data), cache_dir=str(tmp_path))
    assert {split: len(data[split]) for split in data} == {"train": 96, "validation": 32}
    for row in data["train"]:
        assert row["image"].size == (96, 96) and row["prompt"] == PROMPT and ANSWERS[row["text"]] == row["action"]
    train, validation = (set(data[split]["track_seed"]) for split in ("train", "validation"))
    assert max(train) < car_racing_env.TRAIN_TRACKS <= min(validation)


def test_logs(pipeline):
    names = ("lora", "reward", "update", "eval")
    lora, episodes, updates, evaluations = (read_log(pipeline.results / f"{x}_log.csv") for x in names)
    assert [row["epoch"] for row in lora] == ["0", "1", "2"]
    assert float(lora[2]["average_loss"]) < float(lora[1]["average_loss"])
    assert [int(row["episode"]) for row in episodes] == list(range(1, len(episodes) + 1)) and episodes
    assert {row["told"] for row in episodes} == {"0", "1"} and any(name.startswith("obeyed_") for name in updates[0])
    assert [int(row["env_frames"]) for row in updates] == [240, 480, 720]  # 2 x 60 decisions of 2 frames
    assert all(np.isfinite(float(x)) for row in updates for name, x in row.items() if not name.startswith("obeyed"))
    assert [row["update"] + row["driver"] for row in evaluations] == ["0answers", "0policy", "3policy"]


def test_tensorboard_shows_what_the_logs_hold(pipeline):
    events = EventAccumulator(str(pipeline.results / "tensorboard")).Reload()
    episodes, updates, evaluations = (read_log(pipeline.results / f"{x}_log.csv") for x in ("reward", "update", "eval"))
    told, plain = ([row for row in episodes if row["told"] == x] for x in "10")
    policy = [row for row in evaluations if row["driver"] == "policy"]
    for tag, rows, name in (
        ("charts/episodic_return", plain, "return"), ("charts/episodic_length_told", told, "length"),
        ("losses/value_loss", updates, "value_loss"), ("eval/policy_return", policy, "mean"),
    ):  # fmt: skip
        logged = [(int(row["env_frames"]), float(row[name])) for row in rows]
        shown = [(x.step, x.value) for x in events.Scalars(tag)]
        assert shown == [(step, pytest.approx(x, 1e-5)) for step, x in logged]


def test_an_adapter_learns_on_with_captions_of_drives_of_its_own(pipeline, tmp_path, script):
    """Stage 1 lets it drive, stage 2 goes on with both datasets: it begins where it ended."""
    driven = tmp_path / "driven"
    toy_script(COLLECT, tmp_path, POLICY=str(pipeline.adapter), OUTPUT_DIR=str(driven)).main()
    inputs = dict(BASE_MODEL=str(pipeline.base), DATA_DIR=str(pipeline.data), MORE_DATA=(str(driven),))
    toy_script(STAGE2, tmp_path, ADAPTER=str(pipeline.adapter), EPOCHS=1, **inputs).main()
    before, (began, ended) = (read_log(x / "results" / "lora_log.csv") for x in (pipeline.root, tmp_path))
    assert began["validation_loss"] == before[-1]["validation_loss"]
    assert float(ended["average_loss"]) < float(before[1]["average_loss"])
    hashes = [file_hash(data / "train" / "metadata.jsonl") for data in (pipeline.data, driven)]
    assert read_json(tmp_path / "adapter" / "run.json")["inputs"]["data_hash"] == " ".join(hashes)
    assert GitText2ActionWithPrompt.from_pretrained(tmp_path / "adapter") and hashes[0] != hashes[1]


def test_a_loss_that_is_not_finite_is_neither_saved_nor_resumed_from(pipeline, tmp_path, script):
    inputs = dict(BASE_MODEL=str(pipeline.base), DATA_DIR=str(pipeline.data))
    with pytest.raises(BadInput, match="LEARNING_RATE"):
        toy_script(STAGE2, tmp_path, LEARNING_RATE=1e30, **inputs).main()
    assert not list(tmp_path.rglob("*.safetensors")) and len(read_log(tmp_path / "results" / "lora_log.csv")) == 1


def test_the_saved_policy_scores_the_same(pipeline):
    """From its files alone, one environment at a time; and the file of the evaluation says so."""
    facts, policy = read_json(pipeline.results / "eval_policy_100000.json"), pipeline.results / "policy"
    driver = pipeline.evaluate.Policy(GitText2ActionWithPrompt.from_policy(policy))
    again = pipeline.evaluate.evaluate(driver, [100_000, 100_001], 1)
    assert [round(r["return"], 2) for r in again] == facts["returns"] and facts["tracks"] == [100_000, 100_001]
    assert facts["weights_hash"] == file_hash(policy / "policy.safetensors")
    summary = [function(facts["returns"]) for function in (np.mean, np.std, np.median, min, max)]
    assert [facts[name] for name in ("mean", "std", "median", "min", "max")] == pytest.approx(summary, abs=0.01)
    assert (facts["laps_finished_percent"], facts["below_500_percent"]) == (0, 100)  # in 60 frames


def test_an_output_takes_the_place_of_the_old_one_and_of_no_copy(tmp_path):
    for name in ("output", "output.old", "output.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "made").write_text(name)
    replace_folder(tmp_path / "output.partial", tmp_path / "output")
    assert {path.name: (path / "made").read_text() for path in tmp_path.iterdir()} == {
        "output": "output.partial", "output.old": "output.old",
    }  # fmt: skip
