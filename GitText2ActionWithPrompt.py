"""The model: a GIT vision-language model asked what the vehicle should do, with a policy head on its answer.

Reads a GIT base and (optionally) a LoRA adapter and a policy folder; writes a policy folder. Shared by every script.

GIT reads the image rows first and then the text, causally; image rows never see the text. So one pass of the image
through the decoder gives keys and values that any text can attend to: `see` computes them, `read` uses them.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import save
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoProcessor
from transformers.activations import QuickGELUActivation

import checks

ROOT = Path(__file__).resolve().parent

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
# every linear layer of decoder, image encoder, projection and word output, by full name: "output" alone also hits blocks
LORA_TARGETS = (
    r"(git\.(encoder|image_encoder)\..*\.(query|key|value|dense|q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
    r"|git\.visual_projection\.visual_projection\.0|output)"
)


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


def preprocess(frames, image_processor):
    """Frames as GIT wants them, in one batched step that fine-tuning and driving share.

    `frames` uint8 (B, H, W, 3), numpy or torch -> float32 (B, 3, S, S), S the processor's size, normalised with its mean
    and standard deviation; equal to the processor itself where no resizing is needed.
    """
    frames = torch.as_tensor(frames)
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise checks.BadInput(f"frames must be uint8 (B, height, width, 3), not {frames.dtype} {tuple(frames.shape)}")
    size = image_processor.size
    size = (size["height"], size["width"]) if "height" in size else (size["shortest_edge"],) * 2
    pixels = frames.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    if pixels.shape[-2:] != size:
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 255)
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
    """A short hash of a base model's word and patch embeddings, stored with an adapter so that it is not put on another base."""
    weights = (
        git.git.embeddings.word_embeddings.weight,
        git.git.image_encoder.vision_model.embeddings.patch_embedding.weight,
    )
    return hashlib.sha256(b"".join(w.detach().float().cpu().numpy().tobytes() for w in weights)).hexdigest()[:16]


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
        git = AutoModelForCausalLM.from_pretrained(source, use_safetensors=True, trust_remote_code=False)
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, SafetensorError) as error:
        raise checks.BadInput(
            f"BASE_MODEL {base_model!r} is no folder with a GIT model and no model of the Hub: {str(error).splitlines()[0]}"
        ) from None
    git.git.image_encoder.config._attn_implementation = "sdpa"  # the text decoder knows eager attention only
    return git, processor


class GitText2ActionWithPrompt(nn.Module):
    """GIT + fixed prompt + policy head: frames uint8 (B, 96, 96, 3) in, five action logits and a value out.

    The head's last layer starts at zero, so the untrained policy is the language model's own answer; the value starts
    at zero. The backbone is frozen and in eval mode unless `add_lora` is called.
    """

    def __init__(self, git, processor):
        super().__init__()
        self.git, self.processor, self.has_lora = git, processor, False
        tokenizer = processor.tokenizer
        self.prompt, self.answers = prompt_ids(tokenizer), answer_ids(tokenizer)
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
            checks.read_weights(Path(adapter) / "adapter_model.safetensors")  # PEFT would look for a pickle instead
            git = PeftModel.from_pretrained(git, adapter).merge_and_unload()
        fold_quick_gelu(git)
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
        if adapter and facts["adapter_hash"] != checks.file_hash(adapter / "adapter_model.safetensors"):
            raise checks.BadInput(
                f"{folder}/ was trained on another adapter than the one now in {facts['adapter']}/: restore that, or rerun "
                "ppo_git_with_prompt.py"
            )
        model.load_policy(folder)
        return model

    def add_lora(self, rank, alpha):
        """Add a fresh, trainable LoRA to the (merged) backbone; `with model.git.disable_adapter()` is the answerer."""
        targets = LORA_TARGETS.replace("|output)", ")")  # the features do not pass the word layer
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
        self.git, self.has_lora = get_peft_model(self.git, config).eval(), True

    @property
    def device(self):
        return self._backbone().output.weight.device

    # the backbone

    def see(self, frames):
        """What each decoder layer makes of the image: a list of (key, value), each (B, heads, image rows, head size)."""
        git = self._backbone().git
        frames = torch.as_tensor(frames).to(self.device)
        pixels = preprocess(frames, self.processor.image_processor)
        vision = git.image_encoder.vision_model
        hidden = vision.pre_layrnorm(vision.embeddings(pixels))
        for layer in vision.encoder.layers:
            hidden = _look(layer, hidden)
        hidden = git.visual_projection(vision.post_layernorm(hidden))
        memory = []
        for i, layer in enumerate(git.encoder.layer):
            memory.append(_keys_and_values(layer, hidden))
            if i + 1 < len(git.encoder.layer):
                hidden = _attend(layer, hidden, *memory[-1])
        return memory

    def read(self, memory, tokens, start=0):
        """Decoder states (B, T, hidden) of the text `tokens` (T,) or (B, T), and the memory that a text after it sees.

        `start` counts the tokens that `memory` already holds beside the image.
        """
        git = self._backbone().git
        tokens = torch.as_tensor(tokens, device=self.device)
        hidden = git.embeddings(tokens if tokens.ndim == 2 else tokens[None], past_key_values_length=start)
        hidden = hidden.expand(len(memory[0][0]), -1, -1)
        text, seen = hidden.shape[1], memory[0][0].shape[2]
        mask = torch.ones(text, seen + text, dtype=torch.bool, device=self.device).tril(seen)
        longer = []
        for layer, before in zip(git.encoder.layer, memory):
            new = _keys_and_values(layer, hidden)
            longer.append([torch.cat(pair, 2) for pair in zip(before, new)])
            hidden = _attend(layer, hidden, *longer[-1], mask)
        return hidden, longer

    def encode(self, frames):
        """One pass: `features` (B, hidden), the last prompt token's state, and `answer_log_probs` (B, 5).

        The log-likelihood of each whole answer without [SEP], renormalised over the five. Prompt plus the shared first
        word ("turn") is all the text it takes.
        """
        if self.has_lora:  # the answers are those of the fine-tuned model underneath
            with self.git.disable_adapter():
                answer_log_probs = self._read_answers(frames)[1]
            return self.features(frames), answer_log_probs
        return self._read_answers(frames)

    def _read_answers(self, frames):
        with self._autocast():
            states, _ = self.read(self.see(frames), self.prompt + self.shared_word)
        last = len(self.prompt) - 1
        states = states.float()
        words = self._backbone().output(states[:, last:]).log_softmax(-1)
        return states[:, last], score_answers(words, self.answers)

    def features(self, frames):
        """Hidden state of the last prompt token, the one that predicts the answer's first word: (B, hidden)."""
        with self._autocast():
            return self.read(self.see(frames), self.prompt)[0][:, -1].float()

    def answer_log_probs(self, frames):
        """Log-probability of each of the five answers, normalised over them: (B, 5)."""
        return self.encode(frames)[1]

    @torch.no_grad()
    def answer(self, frames):
        """Greedily generated words, one string per frame: one of ANSWERS, or whatever else the model says."""
        if self.has_lora:  # the fine-tuned model underneath speaks
            with self.git.disable_adapter():
                return self._say(frames)
        return self._say(frames)

    def _say(self, frames):
        tokenizer, words = self.processor.tokenizer, []
        with self._autocast():
            states, memory = self.read(self.see(frames), self.prompt)
        while True:
            words.append(self._backbone().output(states[:, -1].float()).argmax(-1))
            ended = (torch.stack(words) == tokenizer.sep_token_id).any(0)
            if ended.all() or len(words) == MAX_ANSWER_TOKENS:
                break
            with self._autocast():
                states, memory = self.read(memory, words[-1][:, None], len(self.prompt) + len(words) - 1)
        rows = torch.stack(words, 1).tolist()
        rows = [row[: row.index(tokenizer.sep_token_id)] if tokenizer.sep_token_id in row else row for row in rows]
        texts = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        return [parse_answer(text) or text for text in texts]

    @torch.no_grad()
    def attention(self, frames):
        """Where the prompt's last token looks: (B, n, n), its attention to the n x n patches in the last layer, mean of heads."""
        memory, layer = self.see(frames), self._backbone().git.encoder.layer[-1]
        hidden, _ = self.read(memory[:-1], self.prompt)  # what enters the last layer
        query = _heads(layer.attention.self, layer.attention.self.query(hidden[:, -1:]))
        keys = torch.cat([memory[-1][0], _keys_and_values(layer, hidden)[0]], 2)
        share = (query @ keys.mT / query.shape[-1] ** 0.5).softmax(-1).mean(1)[:, 0]
        patches = memory[-1][0].shape[2] - 1  # the first image row is the image's own [CLS]
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
        """Write `policy.safetensors` (the trained weights) and `policy.json` (`facts`: base, adapter, frame skip...)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: p.contiguous() for name, p in self.trained_parameters().items()}
        facts = facts | {
            "prompt": PROMPT, "answers": list(ANSWERS), "language_prior": LANGUAGE_PRIOR,
            "prior_floor": PRIOR_FLOOR, "head_size": HEAD_SIZE,
        }  # fmt: skip
        checks.write_file(folder / "policy.safetensors", save(weights))
        checks.write_file(folder / "policy.json", (json.dumps(facts, indent=1) + "\n").encode())

    def load_policy(self, folder):
        """Load what `save_policy` wrote into this model and return its facts."""
        folder = Path(folder)
        facts = checks.read_json(folder / "policy.json")
        for name, ours in (
            ("prompt", PROMPT), ("answers", list(ANSWERS)), ("language_prior", LANGUAGE_PRIOR),
            ("prior_floor", PRIOR_FLOOR), ("head_size", HEAD_SIZE),
        ):  # fmt: skip
            if facts.get(name) != ours:
                raise checks.BadInput(
                    f"{folder}/ was trained with {name} {facts.get(name)!r}, GitText2ActionWithPrompt.py has {ours!r}: "
                    "put the constant back or rerun ppo_git_with_prompt.py"
                )
        weights = checks.read_weights(folder / "policy.safetensors")
        if facts.get("lora_rank") and not self.has_lora:
            self.add_lora(facts["lora_rank"], facts["lora_alpha"])
        expected = self.trained_parameters()
        bad = [n for n in expected.keys() | weights.keys() if n not in weights or n not in expected
               or weights[n].shape != expected[n].shape]  # fmt: skip
        if bad:
            raise checks.BadInput(f"{folder}/policy.safetensors does not fit this model: {', '.join(sorted(bad)[:3])}")
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


def fold_quick_gelu(git):
    """Put the factor of quick_gelu(x) = x sigmoid(1.702 x) = silu(1.702 x) / 1.702 into the weights around it.

    One operation instead of three: a fifth of the image encoder's time.
    """
    for layer in git.git.image_encoder.vision_model.encoder.layers:
        if isinstance(layer.mlp.activation_fn, QuickGELUActivation):
            with torch.no_grad():
                layer.mlp.fc1.weight *= 1.702
                layer.mlp.fc1.bias *= 1.702
                layer.mlp.fc2.weight /= 1.702
            layer.mlp.activation_fn = nn.SiLU(inplace=True)


def _look(layer, hidden):
    """One layer of the image encoder, without the wrappers around it that cost a third of the time at batch 1."""
    attention, normed = layer.self_attn, layer.layer_norm1(hidden)
    query, key, value = (
        project(normed).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    context = F.scaled_dot_product_attention(query, key, value)
    hidden = hidden + attention.out_proj(context.transpose(1, 2).flatten(2))
    return hidden + layer.mlp(layer.layer_norm2(hidden))


def _keys_and_values(layer, hidden):
    attention = layer.attention.self
    return _heads(attention, attention.key(hidden)), _heads(attention, attention.value(hidden))


def _attend(layer, hidden, key, value, mask=None):
    """One GIT decoder layer for the rows `hidden` (B, T, D) over given keys and values."""
    attention = layer.attention.self
    query = _heads(attention, attention.query(hidden))
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return layer.feed_forward_chunk(layer.attention.output(context.transpose(1, 2).flatten(2), hidden))


def _heads(attention, x):
    return x.view(*x.shape[:2], attention.num_attention_heads, attention.attention_head_size).transpose(1, 2)
