"""A stranger's files run nothing: each would create a file if it were unpickled or imported."""

import json
import pickle
import shutil
from pathlib import Path

import pytest

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
