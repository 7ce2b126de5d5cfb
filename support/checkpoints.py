"""GIT bases and LoRA adapters from their folders. Nothing in them is executed, and none is used half loaded."""

import hashlib
import json
import warnings

import torch
from huggingface_hub.utils import enable_progress_bars
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners import lora
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoProcessor
from transformers.utils.logging import disable_progress_bar

from support.checks import BadInput, check_same, read_json, read_weights
from support.run_files import ROOT, file_hash

disable_progress_bar()  # of "Loading weights", which takes a moment;
enable_progress_bars()  # those of the Hub's downloads stay
warnings.filterwarnings("ignore", ".is_gradient_checkpointing.", FutureWarning)  # between PEFT and transformers

TASK_FILE = "task.json"  # beside an adapter: what it was trained for


def fingerprint(git):
    """A short hash of a base model's weights, stored with an adapter so that it is not put on another base.

    The tensors' names and order, which differ between versions of transformers, do not enter.
    """
    digests = (hashlib.sha256(p.detach().float().cpu().numpy().tobytes()).digest() for p in git.parameters())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()[:16]


def picture_size(image_processor):
    """Height and width of the pictures that an image processor makes."""
    size = image_processor.size
    return (size["height"], size["width"]) if "height" in size else (size["shortest_edge"],) * 2


def load_base(base_model):
    """A GIT base and its processor, from a folder relative to the repository, any folder or the Hub's name of it.

    Weights come from safetensors only, all of them, and no code from the folder; BadInput otherwise.
    """
    source = ROOT / base_model if (ROOT / base_model).exists() else base_model
    safely = {"use_safetensors": True, "trust_remote_code": False}
    try:
        git, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, **safely
        )
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
        if git.config.model_type != "git":
            raise ValueError(f"it is of type {git.config.model_type}")
        if info["missing_keys"]:
            raise ValueError(f"its weights lack {min(info['missing_keys'])}")
        size, expected = picture_size(processor.image_processor), git.config.vision_config.image_size
        if size != (expected, expected):
            raise ValueError(f"its processor makes pictures of {size[0]} x {size[1]}, the model wants {expected}")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BadInput(
            f"{base_model!r} is no adapter, no folder with a GIT model and no GIT model of the Hub "
            f"({str(error).splitlines()[0]}): use 'offline/git-tiny' or another GIT, or run "
            "train_git_lora_carllava_style.py"
        ) from None
    git.git.image_encoder.config._attn_implementation = "sdpa"  # the text decoder knows eager attention only
    return git, processor


def attach_adapter(git, adapter, trainable=False):
    """`git` with the weights of an adapter folder on it, a `PeftModel`; BadInput if they are damaged or do not fit."""
    weights = read_weights(adapter / "adapter_model.safetensors")  # PEFT would look for a pickle instead
    try:
        git = PeftModel.from_pretrained(git, adapter, is_trainable=trainable)
        wrong = weights.keys() ^ get_peft_model_state_dict(git, save_embedding_layers=False).keys()
        if wrong:
            raise ValueError(f"{min(wrong)} is in one of adapter_config.json and adapter_model.safetensors only")
    except Exception as error:  # of many kinds, after what is damaged
        reason = (str(error) or repr(error)).splitlines()[0]
        raise BadInput(
            f"{adapter}/adapter_config.json is damaged or does not fit ({reason}): rerun "
            "train_git_lora_carllava_style.py"
        ) from None
    return git


def check_lora(git):
    """Raise BadInput if a `PeftModel` has anything that fast/git_forward.py does not compute."""
    config = git.peft_config["default"]
    adapted = [name for name, module in git.named_modules() if hasattr(module, "lora_A")]
    unread = [name for name in adapted if not isinstance(git.get_submodule(name), lora.Linear)]
    if config.lora_dropout or config.use_dora or unread:
        raise BadInput(f"fast/git_forward.py computes plain LoRA on linear layers: no dropout, no DoRA, not {unread}")


def load_git(name, task):
    """A base, or an adapter merged into its base; the processor, and where they come from.

    BadInput if the adapter was not trained for `task`, or not on that base.
    """
    adapter = ROOT / name
    if not (adapter / TASK_FILE).exists():
        git, processor = load_base(name)
        source = {"base_model": name, "base_fingerprint": fingerprint(git), "adapter": "", "adapter_hash": ""}
        return git, processor, source
    facts = read_json(adapter / TASK_FILE)
    check_same(
        f"{adapter}/", facts, task, "put it back, or rerun collect_captions.py and train_git_lora_carllava_style.py"
    )
    git, processor = load_base(facts.get("base_model", ""))
    base = {"base_model": facts["base_model"], "base_fingerprint": fingerprint(git)}
    check_same(f"{adapter}/", facts, base, "restore that base, or rerun train_git_lora_carllava_style.py")
    git = attach_adapter(git, adapter).merge_and_unload()
    weights = file_hash(adapter / "adapter_model.safetensors")
    return git, processor, base | {"adapter": name, "adapter_hash": weights}


def last_complete_checkpoint(folder):
    """The newest of the Trainer's checkpoints whose last file, trainer_state.json, parses; None without one."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    for checkpoint in checkpoints:
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
            return str(checkpoint)
        except (OSError, json.JSONDecodeError):
            print(f"{checkpoint.name} is not complete: it is left out")
    return None
