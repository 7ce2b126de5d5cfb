"""A stranger's files run nothing: each would create a file if it were unpickled or imported."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import toy_lora

import checks
import collect_captions
import GitText2ActionWithPrompt as model_file
import ppo_git_with_prompt as ppo
import train_git_lora_carllava_style as stage2


class Touch:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def bomb(tmp_path):
    """The bytes of a hostile pickle, and the file that it would create."""
    path = tmp_path / "was_run"
    return pickle.dumps(Touch(path)), path


def test_the_bomb_works(bomb):
    payload, path = bomb
    pickle.loads(payload)
    assert path.exists()


def test_pickles_in_place_of_weights(bomb, pipeline, tmp_path, constants):
    payload, path = bomb
    adapter = shutil.copytree(pipeline.adapter, tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(payload)  # PEFT's own fallback
    with pytest.raises(checks.BadInput, match="adapter_model.safetensors"):
        model_file.GitText2ActionWithPrompt.from_pretrained(str(pipeline.base), adapter)
    (adapter / "adapter_model.safetensors").write_bytes(payload)
    with pytest.raises(checks.BadInput, match="adapter_model.safetensors"):
        model_file.GitText2ActionWithPrompt.from_pretrained(str(pipeline.base), adapter)

    policy = shutil.copytree(pipeline.results / "policy", tmp_path / "policy")
    (policy / "policy.safetensors").write_bytes(payload)
    with pytest.raises(checks.BadInput, match="policy.safetensors"):
        model_file.GitText2ActionWithPrompt.from_policy(policy)

    (tmp_path / "teacher").write_bytes(payload)
    with pytest.raises(checks.BadInput, match="teacher"):
        collect_captions.load_teacher(tmp_path / "teacher")

    base = shutil.copytree(pipeline.base, tmp_path / "base")
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(payload)
    with pytest.raises(checks.BadInput, match="BASE_MODEL"):
        model_file.load_base(str(base))

    (tmp_path / "state.pt").write_bytes(payload)
    constants(ppo, RESULTS_DIR=str(tmp_path), RESUME=True)
    with pytest.raises(checks.BadInput, match="state.pt"):
        ppo.main()
    assert not path.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_pickles_in_a_trainers_checkpoint(name, bomb, toy_base, tmp_path, constants):
    payload, path = bomb
    toy_lora.write_data(tmp_path / "data")
    folders = {key: str(tmp_path / key.lower()) for key in ("OUTPUT_DIR", "RESULTS_DIR", "CHECKPOINT_DIR")}
    constants(stage2, BASE_MODEL=str(toy_base), DATA_DIR=str(tmp_path / "data"), **folders)
    constants(stage2, MIN_FRAMES=1, EPOCHS=2, BATCH_SIZE=8, LORA_RANK=4)
    stage2.main()
    first, last = sorted((tmp_path / "checkpoint_dir").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    shutil.rmtree(last)
    (first / name).write_bytes(payload)
    constants(stage2, RESUME=True)
    with pytest.raises(checks.BadInput, match="cannot read .*checkpoint-5.*RESUME"):
        stage2.main()
    assert not path.exists()


def test_an_adapter_names_no_module(bomb, pipeline, tmp_path, monkeypatch):
    """PEFT imports the module that an adapter names for Megatron's layers; from 0.20 on only Megatron's own."""
    _, path = bomb
    adapter = shutil.copytree(pipeline.adapter, tmp_path / "adapter")
    (tmp_path / "hostile.py").write_text(f"from pathlib import Path\nPath({str(path)!r}).touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {"megatron_core": "hostile", "megatron_config": {"tensor_model_parallel_size": 1}}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(checks.BadInput, match="adapter_config.json"):
        model_file.GitText2ActionWithPrompt.from_pretrained(str(pipeline.base), adapter)
    assert not path.exists()


def test_code_beside_a_base_is_not_imported(bomb, pipeline, tmp_path):
    _, path = bomb
    base = shutil.copytree(pipeline.base, tmp_path / "base")
    (base / "hostile.py").write_text(f"from pathlib import Path\nPath({str(path)!r}).touch()\n")
    config = json.loads((base / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "hostile.Config", "AutoModelForCausalLM": "hostile.Model"}
    (base / "config.json").write_text(json.dumps(config))
    model_file.load_base(str(base))
    config["model_type"] = "unknown_to_transformers"
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(checks.BadInput, match="BASE_MODEL"):
        model_file.load_base(str(base))
    assert not path.exists()


def test_pictures_outside_the_dataset_are_not_read(pipeline, tmp_path):
    data = shutil.copytree(pipeline.data / "train", tmp_path / "train")
    link = data / "link.png"
    link.symlink_to("/etc/hostname")
    row = {"file_name": "link.png", "text": "Brake", "prompt": model_file.PROMPT}
    (data / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(checks.BadInput, match="leaves the dataset's folder"):
        stage2.Captions(data)
