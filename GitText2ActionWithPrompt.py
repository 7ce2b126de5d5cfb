"""The model: a GIT vision-language model asked what the vehicle should do, with a policy head on its answer.

Reads a GIT base and (optionally) a LoRA adapter and a policy folder; writes a policy folder. Shared by every script; the
backbone's forward pass is in git_forward.py.
"""

import hashlib
import os
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoProcessor

import checks
import git_forward
import policy_card
import run_files
from run_files import ROOT

PROMPT = "What should the vehicle do in this scenario?"
# in logit order: no-op, accelerate, left, right, brake -> the simulator's own index (its 1 is right and its 2 is left)
ANSWERS = {"Coast": 0, "Accelerate": 3, "Turn left": 2, "Turn right": 1, "Brake": 4}

LANGUAGE_PRIOR = 1.0  # weight of the answers' log-probabilities in the action logits; 0 is a plain policy head
PRIOR_FLOOR = 0.02  # share of the prior spread over all answers, so that every action stays explorable
HEAD_SIZE = 256  # the head's expanded hidden layer
DROPOUT = 0.1  # in the head, while training only
MAX_ANSWER_TOKENS = 6
DEVICE = "auto"  # "cpu", "cuda", or "auto": CUDA where there is one; on CUDA the backbone runs in bfloat16

TASK_FILE = "task.json"  # beside an adapter: what it was trained for
# every linear layer of decoder, image encoder and projection, by full name: PEFT takes a pattern or a list of endings
BACKBONE_LAYERS = (
    r"git\.(encoder|image_encoder)\..*\.(query|key|value|dense|q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
    r"|git\.visual_projection\.visual_projection\.0"
)
LORA_TARGETS = rf"({BACKBONE_LAYERS}|output)"  # and the word output, which the features do not pass


def check_constants():
    """Raise BadInput if a constant above is of another type or out of range."""
    checks.check_constants(
        globals(), PROMPT=(str, None, None), ANSWERS=(dict, None, None), LANGUAGE_PRIOR=(float, 0, None),
        PRIOR_FLOOR=(float, 1e-6, 1), HEAD_SIZE=(int, 1, None), DROPOUT=(float, 0, 0.99), MAX_ANSWER_TOKENS=(int, 1, None),
    )  # fmt: skip


def policy_constants():
    """The constants that a trained policy depends on."""
    return {
        "prompt": PROMPT, "answers": list(ANSWERS), "language_prior": LANGUAGE_PRIOR, "prior_floor": PRIOR_FLOOR,
        "head_size": HEAD_SIZE,
    }  # fmt: skip


def device():
    """The torch device that DEVICE means, under torchrun this process's own GPU."""
    if DEVICE not in ("auto", "cpu", "cuda"):
        raise checks.BadInput(f"DEVICE = {DEVICE!r} in GitText2ActionWithPrompt.py: use 'auto', 'cpu' or 'cuda'")
    if DEVICE == "cuda" and not torch.cuda.is_available():
        raise checks.BadInput(
            "DEVICE = 'cuda' in GitText2ActionWithPrompt.py, but torch finds no GPU: use 'auto' or 'cpu'"
        )
    if DEVICE == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def resize(frames, image_processor):
    """Frames uint8 (B, H, W, 3), numpy or torch, at the size that GIT wants: pixels 0 to 255, float32 (B, 3, S, S)."""
    frames = torch.as_tensor(frames)
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise checks.BadInput(f"frames must be uint8 (B, height, width, 3), not {frames.dtype} {tuple(frames.shape)}")
    size = image_processor.size
    size = (size["height"], size["width"]) if "height" in size else (size["shortest_edge"],) * 2
    pixels = frames.permute(0, 3, 1, 2).float()
    if pixels.shape[-2:] != size:
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 255)
    return pixels


def preprocess(frames, image_processor):
    """What the processor makes of frames uint8 (B, H, W, 3), in one batched step: float32 (B, 3, S, S), normalised.

    Equal to the processor itself where no resizing is needed. Fine-tuning takes it; driving has it in the weights.
    """
    pixels = resize(frames, image_processor).contiguous()
    mean, std = (
        torch.tensor(x, dtype=torch.float32, device=pixels.device)[:, None, None]
        for x in (image_processor.image_mean, image_processor.image_std)
    )
    return (pixels * image_processor.rescale_factor - mean) / std


def prompt_ids(tokenizer, prompt=None):
    """Token ids of [CLS] and the prompt, no [SEP]: the answer follows directly."""
    ids = tokenizer(PROMPT if prompt is None else prompt, add_special_tokens=False).input_ids
    return [tokenizer.cls_token_id, *ids]


def answer_ids(tokenizer):
    """Token ids of each answer without [SEP]: one word each, or two that all share their first word.

    Raises BadInput naming the answers that one forward pass cannot score.
    """
    ids = [tokenizer(answer, add_special_tokens=False).input_ids for answer in ANSWERS]
    first_of_two = {x[0] for x in ids if len(x) == 2}
    bad = [
        answer
        for answer, x in zip(ANSWERS, ids)
        if len(x) not in (1, 2) or len(first_of_two) > 1 or (len(x) == 1 and x[0] in first_of_two)
    ]
    if bad or len({tuple(x) for x in ids}) < len(ids):
        raise checks.BadInput(
            f"ANSWERS {bad or list(ANSWERS)} cannot be scored in one pass: use different answers of one token, or of two "
            f"that share the first (now {[tokenizer.convert_ids_to_tokens(x) for x in ids]})"
        )
    return ids


def score_answers(log_probs, answers):
    """Log-probability of each answer, renormalised over all of them: (B, answers).

    `log_probs` (B, 2, vocabulary) are the words' after the prompt, and after the prompt and the shared first word;
    `answers` are token ids as `answer_ids` returns them.
    """
    scores = [sum(log_probs[:, i, word] for i, word in enumerate(ids)) for ids in answers]
    return torch.stack(scores, 1).log_softmax(-1)


def parse_answer(text):
    """The answer that a generated text says, or None: letter case and surrounding blanks do not matter."""
    return next((answer for answer in ANSWERS if answer.casefold() == text.strip().casefold()), None)


def fingerprint(git):
    """A short hash of a base model's weights, stored with an adapter so that it is not put on another base.

    The tensors' names and order, which differ between versions of transformers, do not enter.
    """
    digests = (hashlib.sha256(p.detach().float().cpu().numpy().tobytes()).digest() for p in git.parameters())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()[:16]


def read_task(adapter):
    """The `task.json` of an adapter folder: base model, its fingerprint, prompt, answers, frame skip."""
    path = Path(adapter) / TASK_FILE
    if not path.exists():
        raise checks.BadInput(f"no adapter in {adapter}/: run train_git_lora_carllava_style.py first")
    task = checks.read_json(path)
    missing = {"base_model", "base_fingerprint", "prompt", "answers", "frame_skip"} - task.keys()
    if missing:
        raise checks.BadInput(f"{path} lacks {', '.join(sorted(missing))}: rerun train_git_lora_carllava_style.py")
    return task


def load_base(base_model):
    """A GIT base and its processor, from a folder relative to the repository, any folder or the Hub.

    Nothing of it is executed: weights from safetensors only, no code from the folder.
    """
    local = ROOT / base_model
    source = local if local.exists() else base_model
    try:
        git = AutoModelForCausalLM.from_pretrained(
            source, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
        )
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
        if git.config.model_type != "git":
            raise ValueError(f"it is of type {git.config.model_type}")
    except (OSError, ValueError, SafetensorError) as error:
        raise checks.BadInput(
            f"BASE_MODEL {base_model!r} is no folder with a GIT model and no GIT model of the Hub "
            f"({str(error).splitlines()[0]}): use 'offline/git-tiny' or another GIT"
        ) from None
    git.git.image_encoder.config._attn_implementation = "sdpa"  # the text decoder knows eager attention only
    return git, processor


def load_adapter(git, adapter):
    """The PEFT model of a base and an adapter folder, from safetensors only; every weight of the adapter must be there."""
    weights = checks.read_weights(Path(adapter) / "adapter_model.safetensors")  # PEFT would look for a pickle instead
    try:
        git = PeftModel.from_pretrained(git, adapter)
    except Exception as error:  # of many kinds, after what is damaged
        raise checks.BadInput(
            f"{adapter}/adapter_config.json is damaged or does not fit ({(str(error) or repr(error)).splitlines()[0]}): "
            "rerun train_git_lora_carllava_style.py"
        ) from None
    wrong = weights.keys() ^ get_peft_model_state_dict(git, save_embedding_layers=False).keys()  # "auto" asks the Hub
    if wrong:
        raise checks.BadInput(
            f"{adapter}/adapter_model.safetensors does not fit its adapter_config.json ({min(wrong)}): "
            "rerun train_git_lora_carllava_style.py"
        )
    return git


class GitText2ActionWithPrompt(nn.Module):
    """GIT + fixed prompt + policy head: frames uint8 (B, 96, 96, 3) in, five action logits and a value out.

    The head's last layer starts at zero, so the untrained policy is the language model's own answer; the value starts
    at zero. `from_pretrained` freezes the backbone; what `add_lora` adds is trainable.
    """

    def __init__(self, git, processor):
        super().__init__()
        check_constants()
        self.git, self.processor, self.has_lora = git, processor, False
        self._watch()
        tokenizer = processor.tokenizer
        self.prompt, self.answers = prompt_ids(tokenizer), answer_ids(tokenizer)  # as token ids
        self.shared_word = next(([x[0]] for x in self.answers if len(x) == 2), [])
        hidden = git.config.hidden_size
        self.policy_head = nn.Sequential(nn.Linear(hidden, HEAD_SIZE), nn.Tanh(), nn.Linear(HEAD_SIZE, len(ANSWERS)))
        self.value_head = nn.Sequential(nn.Linear(hidden, HEAD_SIZE), nn.Tanh(), nn.Linear(HEAD_SIZE, 1))
        for head in (self.policy_head, self.value_head):
            nn.init.orthogonal_(head[0].weight, 2**0.5)
            nn.init.zeros_(head[0].bias), nn.init.zeros_(head[2].weight), nn.init.zeros_(head[2].bias)

    @classmethod
    def from_pretrained(cls, base_model, adapter=None):
        """Load a GIT base and merge the LoRA adapter into it; `adapter=None` takes the base as it is."""
        git, processor = load_base(base_model)
        if adapter is not None:
            task = read_task(adapter)
            if task["base_fingerprint"] != fingerprint(git):
                raise checks.BadInput(
                    f"{adapter}/ was trained on another base ({task['base_model']}) than {base_model}: "
                    "rerun train_git_lora_carllava_style.py with this BASE_MODEL"
                )
            for name, ours in (("prompt", PROMPT), ("answers", list(ANSWERS))):
                if task[name] != ours:
                    raise checks.BadInput(
                        f"{adapter}/ was trained with {name} {task[name]!r}, GitText2ActionWithPrompt.py has {ours!r}: "
                        "put it back or rerun collect_captions.py and train_git_lora_carllava_style.py"
                    )
            git = load_adapter(git, adapter).merge_and_unload()
        return cls(git.eval().requires_grad_(False), processor).to(device())

    @classmethod
    def from_policy(cls, folder):
        """Load a policy folder of ppo_git_with_prompt.py together with the base and adapter that it names."""
        folder = Path(folder)
        if not (folder / "policy.json").exists():
            raise checks.BadInput(f"no policy in {folder}/: run ppo_git_with_prompt.py first")
        facts = checks.read_json(folder / "policy.json")
        missing = {"base_model", "adapter", "adapter_hash", "frame_skip"} - facts.keys()
        if missing:
            raise checks.BadInput(
                f"{folder}/policy.json lacks {', '.join(sorted(missing))}: rerun ppo_git_with_prompt.py"
            )
        adapter = ROOT / facts["adapter"] if facts["adapter"] else None
        model = cls.from_pretrained(facts["base_model"], adapter)
        if adapter and facts["adapter_hash"] != run_files.file_hash(adapter / "adapter_model.safetensors"):
            raise checks.BadInput(
                f"{folder}/ was trained on another adapter than the one now in {facts['adapter']}/: restore that, or rerun "
                "ppo_git_with_prompt.py"
            )
        model.load_policy(folder)
        model.git.requires_grad_(False)
        return model

    def add_lora(self, rank, alpha):
        """Add a fresh, trainable LoRA to the (merged) backbone, for the features; the answers stay those without it."""
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=rf"({BACKBONE_LAYERS})")
        self.git, self.has_lora = get_peft_model(self.git, config).eval(), True
        self._watch()

    @property
    def device(self):
        return self._backbone().output.weight.device

    # the backbone

    def weights(self, adapted=True):
        """The backbone for git_forward, collected anew when a parameter has changed or gradients flow into one."""
        if adapted and torch.is_grad_enabled() and any(p.requires_grad for p in self._watched):
            return git_forward.collect(self._backbone(), self.processor.image_processor)
        version = sum(p._version for p in self._watched)
        if self._collected.get(adapted, (None,))[0] != version:
            with torch.no_grad():
                weights = git_forward.collect(self._backbone(), self.processor.image_processor, adapted)
                self._collected[adapted] = version, git_forward.packed(weights)
        return self._collected[adapted][1]

    def _watch(self):
        self._watched, self._collected = [*self.git.parameters()], {}

    def _apply(self, *args, **kwargs):  # a move to another device
        self._collected.clear()
        return super()._apply(*args, **kwargs)

    def train(self, mode=True):  # a fused optimizer, as the Trainer's, changes parameters without raising their version
        self._collected.clear()
        return super().train(mode)

    def __getstate__(self):  # for copies: oneDNN's matrices cannot be copied
        return self.__dict__ | {"_collected": {}}

    def read(self, weights, frames, tokens, last=1):
        """One pass over the image and the text `tokens`, a list of ids: the `last` states (B, last, hidden), and the cache."""
        frames = torch.as_tensor(frames)
        if self.device.type == "cuda" and frames.device.type == "cpu":
            frames = frames.pin_memory()
        frames = frames.to(self.device, non_blocking=True)
        image = git_forward.encode_image(weights, resize(frames, self.processor.image_processor))
        tokens = torch.tensor([tokens], device=self.device)
        text = git_forward.embed(weights, tokens).expand(len(image), -1, -1)
        mask = git_forward.prefix_mask(image.shape[1], text.shape[1], self.device)
        return git_forward.decode(weights, torch.cat([image, text], 1), mask, last=last)

    def encode(self, frames):
        """`features` (B, hidden), the last prompt token's state, and `answer_log_probs` (B, 5), in one pass.

        The log-likelihood of each whole answer without [SEP], renormalised over the five. Prompt plus the shared first
        word ("turn") is all the text it takes. With a LoRA of PPO's the answers are those of the model underneath.
        """
        weights = self.weights(adapted=not self.has_lora)
        with self._autocast():
            states, _ = self.read(weights, frames, self.prompt + self.shared_word, 1 + len(self.shared_word))
        states = states.float()
        words = git_forward.linear(states, *weights.lm_head).log_softmax(-1)
        features = self.features(frames) if self.has_lora else states[:, 0]
        return features, score_answers(words, self.answers)

    def features(self, frames):
        """Hidden state of the last prompt token, the one that predicts the answer's first word: (B, hidden)."""
        weights = self.weights()
        with self._autocast():
            return self.read(weights, frames, self.prompt)[0][:, 0].float()

    def answer_log_probs(self, frames):
        """Log-probability of each of the five answers, normalised over them: (B, 5)."""
        return self.encode(frames)[1]

    @torch.no_grad()
    def answer(self, frames):
        """Greedily generated words, one string per frame: one of ANSWERS, or whatever else the model says."""
        tokenizer, words = self.processor.tokenizer, []
        weights = self.weights(adapted=not self.has_lora)
        with self._autocast():
            states, cache = self.read(weights, frames, self.prompt)
        while True:
            words.append(git_forward.linear(states[:, -1].float(), *weights.lm_head).argmax(-1))
            ended = (torch.stack(words) == tokenizer.sep_token_id).any(0)
            if ended.all() or len(words) == MAX_ANSWER_TOKENS:
                break
            with self._autocast():
                text = git_forward.embed(weights, words[-1][:, None], len(self.prompt) + len(words) - 1)
                states, cache = git_forward.decode(weights, text, cache=cache)
        rows = torch.stack(words, 1).tolist()
        rows = [row[: row.index(tokenizer.sep_token_id)] if tokenizer.sep_token_id in row else row for row in rows]
        texts = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        return [parse_answer(text) or text for text in texts]

    @torch.no_grad()
    def attention(self, frames):
        """Where the prompt's last token looks: (B, n, n), its attention to the n x n patches in the last layer, mean of heads."""
        weights = self.weights()
        below = weights._replace(decoder=weights.decoder[:-1])
        rows, _ = self.read(below, frames, self.prompt, last=None)
        query, key, _ = git_forward.project_qkv(rows, weights.decoder[-1].qkv, weights.decoder_heads)
        share = (query[:, :, -1:] @ key.mT / query.shape[-1] ** 0.5).softmax(-1).mean(1)[:, 0]
        patches = len(weights.patch_positions)  # after the image's own [CLS]
        return share[:, 1 : 1 + patches].unflatten(1, (round(patches**0.5), -1))

    # the policy

    def head(self, features, answer_log_probs, dropout=None):
        """Action logits (B, 5) and value (B,) from stored features.

        `dropout` float32 (B, HEAD_SIZE) multiplies the policy's hidden layer: the masks drawn by `draw_dropout` at the
        time of acting, stored with the rollout. None, as in evaluation, drops nothing.
        """
        hidden = self.policy_head[:2](features)
        if dropout is not None:
            hidden = hidden * dropout
        return self.prior(answer_log_probs) + self.policy_head[2](hidden), self.value_head(features)[:, 0]

    def prior(self, answer_log_probs):
        """The language model's share of the action logits: (B, 5)."""
        p = answer_log_probs.exp()
        return LANGUAGE_PRIOR * torch.log((1 - PRIOR_FLOOR) * p + PRIOR_FLOOR / p.shape[-1])

    def draw_dropout(self, batch_size):
        """Dropout masks for `head`: 0 with probability DROPOUT, else 1 / (1 - DROPOUT), float32 (B, HEAD_SIZE)."""
        return F.dropout(torch.ones(batch_size, HEAD_SIZE, device=self.device), DROPOUT)

    def forward(self, frames):
        """Frames uint8 (B, 96, 96, 3) -> action logits (B, 5) in the order of ANSWERS, and value (B,)."""
        return self.head(*self.encode(frames))

    # files

    def save_policy(self, folder, **facts):
        """Write `policy.safetensors` (the trained weights), `policy.json` (`facts`: base, adapter, frame skip...) and a card."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: p.contiguous() for name, p in self.trained_parameters().items()}
        run_files.write_file(folder / "policy.safetensors", save(weights))
        facts = facts | policy_constants()
        run_files.write_json(folder / "policy.json", facts)
        place = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
        run_files.write_file(folder / "README.md", policy_card.card(place, facts).encode())

    def load_policy(self, folder):
        """Load what `save_policy` wrote into this model and return its facts."""
        folder = Path(folder)
        facts = checks.read_json(folder / "policy.json")
        for name, ours in policy_constants().items():
            if facts.get(name) != ours:
                raise checks.BadInput(
                    f"{folder}/ was trained with {name} {facts.get(name)!r}, GitText2ActionWithPrompt.py has {ours!r}: "
                    "put the constant back or rerun ppo_git_with_prompt.py"
                )
        weights = checks.read_weights(folder / "policy.safetensors")
        if facts.get("lora_rank") and not self.has_lora:
            self.add_lora(facts["lora_rank"], facts["lora_alpha"])
        if self.has_lora and self.git.peft_config["default"].lora_alpha != facts.get("lora_alpha"):
            raise checks.BadInput(
                f"{folder}/ was trained with a LoRA of alpha {facts.get('lora_alpha')}, not this model's: put it back"
            )
        expected = self.trained_parameters()
        bad = [n for n in expected.keys() | weights.keys() if n not in weights or n not in expected
               or weights[n].shape != expected[n].shape]  # fmt: skip
        if bad:
            raise checks.BadInput(
                f"{folder}/policy.safetensors does not fit this model ({min(bad)}): rerun ppo_git_with_prompt.py"
            )
        self.load_state_dict(weights, strict=False)
        return facts

    def trained_parameters(self):
        """What PPO trains and a policy folder holds, by name, detached: the two heads and a fresh LoRA if there is one."""
        return {name: p.detach() for name, p in self.named_parameters() if "_head." in name or "lora_" in name}

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def _backbone(self):
        """The `GitForCausalLM`, with or without a PEFT model around it."""
        return self.git.get_base_model() if isinstance(self.git, PeftModel) else self.git
