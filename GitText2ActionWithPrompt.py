"""The model: a GIT vision-language model asked what the vehicle should do, with a policy head on its answer.

Reads a GIT base and (optionally) a LoRA adapter and a policy folder; writes a policy folder. Shared by every script.

The prompt is the question, or an instruction and the question: "Keep left. What should the vehicle do in this
scenario?" From one pass over image and prompt come `features`, the hidden state of the prompt's last token, and
`answer_log_probs`, how likely the model finds each of the five answers. The policy is

    action_logits = LANGUAGE_PRIOR * log(0.98 p + 0.02 / 5) + policy_head(features);  value = value_head(features)

The heads' last layers start at zero, so the untrained policy takes the most probable of the five answers.
"""

import functools
import os
import re

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

import questions
from car_racing_env import BRAKE, FRAME_SKIP, GAS, LEFT, NO_OP, RIGHT
from fast import git_forward
from support import cards
from support.checkpoints import load_git, picture_size
from support.checks import BadInput, check_same, check_shapes, read_json, read_weights
from support.run_files import ROOT, write_file, write_json

PROMPT = "What should the vehicle do in this scenario?"
# in logit order, each with the simulator's action; one token of the base, or two whose first is the same in all such
ANSWERS = {"Coast": NO_OP, "Accelerate": GAS, "Turn left": LEFT, "Turn right": RIGHT, "Brake": BRAKE}

LANGUAGE_PRIOR = 1.0  # weight of the answers' log-probabilities in the action logits; 0 is a plain policy head
PRIOR_FLOOR = 0.02  # share of the prior spread over all answers, so that every action stays explorable
HEAD_SIZE = 256  # the head's expanded hidden layer
DROPOUT = 0.1  # in the policy head, while training only
MAX_ANSWER_TOKENS = 16  # of a sentence about the scene; the answers have at most two
DEVICE = "auto"  # "cpu", "cuda", or "auto": CUDA where there is one; on CUDA the backbone runs in bfloat16

HEAD_FACTS = ("language_prior", "prior_floor", "head_size")  # what a saved policy says of its head
# every linear layer of decoder, image encoder and projection, by full name: PEFT takes a pattern or a list of endings
BACKBONE_LAYERS = (
    r"git\.(encoder|image_encoder)\..*\.(query|key|value|dense|q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
    r"|git\.visual_projection\.visual_projection\.0"
)
LORA_TARGETS = rf"({BACKBONE_LAYERS}|output)"  # and the word output, which the features do not pass


def to_simulator(actions):
    """Actions in the order of ANSWERS, an int tensor (N,), as the simulator's indices, int64 numpy (N,)."""
    return np.array(list(ANSWERS.values()))[actions.cpu().numpy()]


def answer_of(action, probabilities=None):
    """The answer that stands for a simulator's action.

    Of several the most probable, by the `probabilities` of all answers in their order; without them the first.
    """
    answers = [answer for answer, index in ANSWERS.items() if index == action]
    if not probabilities:
        return answers[0]
    return max(answers, key=dict(zip(ANSWERS, probabilities)).get)


def differs(answer, action):
    """Whether an answer, which may be None, or any words, says something else than the simulator's action."""
    return answer is not None and ANSWERS.get(answer) != action


def task():
    """What data, adapter and policy are made for; each stores it and is refused where it differs."""
    return {"prompt": PROMPT, "answers": [*ANSWERS], "actions": [*ANSWERS.values()], "frame_skip": FRAME_SKIP}


def device():
    """The torch device that DEVICE means, under torchrun this process's own GPU."""
    if DEVICE not in ("auto", "cpu", "cuda") or (DEVICE == "cuda" and not torch.cuda.is_available()):
        raise BadInput(f'DEVICE = {DEVICE!r}: use "auto" or "cpu", or "cuda" where torch finds a GPU')
    if DEVICE == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def resize(frames, image_processor):
    """Frames uint8 (B, H, W, 3), numpy or torch, at the size that GIT wants: pixels 0 to 255, float32 (B, 3, S, S)."""
    frames = torch.as_tensor(frames)
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise BadInput(f"frames must be uint8 (B, height, width, 3), not {frames.dtype} {tuple(frames.shape)}")
    pixels = frames.permute(0, 3, 1, 2).float()
    size = picture_size(image_processor)
    if pixels.shape[-2:] != size:
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 255)
    return pixels


@functools.lru_cache(10_000)
def prompt_ids(tokenizer, instruction="", question=PROMPT):
    """Token ids of [CLS], instruction and question, numbers in words, no [SEP]: the answer follows directly."""
    text = questions.spelled(f"{instruction} {question}".strip())
    return [tokenizer.cls_token_id, *tokenizer(text, add_special_tokens=False).input_ids]


@functools.lru_cache(10_000)
def ending_ids(tokenizer, answer):
    """Token ids of an answer, numbers in words, and [SEP]: what follows a prompt."""
    return [*tokenizer(questions.spelled(answer), add_special_tokens=False).input_ids, tokenizer.sep_token_id]


def unknown_words(tokenizer, text):
    """Which words of a text the base has no token for, or spells in part: a list."""
    cut = {word: tokenizer.tokenize(word) for word in re.findall(r"\w+", questions.spelled(text.lower()))}
    return [
        word
        for word, pieces in cut.items()
        if tokenizer.unk_token in pieces or (len(word) > 1 and min(len(x.removeprefix("##")) for x in pieces) == 1)
    ]


def answer_ids(tokenizer, answers):
    """Token ids of each answer without [SEP]: one token each, or two that all share the first; else BadInput."""
    ids = [tokenizer(answer, add_special_tokens=False).input_ids for answer in answers]
    first_of_two = {x[0] for x in ids if len(x) == 2}
    fit = all(len(x) == 2 or (len(x) == 1 and x[0] not in first_of_two) for x in ids)
    if not fit or len(first_of_two) > 1 or len(set(map(tuple, ids))) < len(ids):
        raise BadInput(
            f"ANSWERS {answers} cannot be scored in one pass: use different answers of one token, or of two "
            f"that share the first (now {[tokenizer.convert_ids_to_tokens(x) for x in ids]})"
        )
    return ids


def score_answers(log_probs, answers):
    """Log-probability of each answer, renormalised over all of them: (B, answers).

    `log_probs` (B, 1 or 2, vocabulary) are those of the word after the prompt and, if answers have two, of that after
    prompt and shared first word; `answers` are token ids as `answer_ids` returns them.
    """
    scores = [sum(log_probs[:, i, word] for i, word in enumerate(ids)) for ids in answers]
    return torch.stack(scores, 1).log_softmax(-1)


def parse_answer(text):
    """The answer that a generated text says, or None: letter case and surrounding blanks do not matter."""
    return next((answer for answer in ANSWERS if answer.casefold() == text.strip().casefold()), None)


class GitText2ActionWithPrompt(nn.Module):
    """GIT + prompt + policy head: frames uint8 (B, 96, 96, 3) in, five action logits and a value out.

    Settings of the head that are not given are the constants above. `instructions` are one sentence for all frames, or
    a list with one for each; "" is the question alone. `git` stays on its device. Its weights are read into the fast
    pass once, here; whoever trains them calls `prepare` again.
    """

    def __init__(
        self, git, processor, source=None, *,
        language_prior=None, prior_floor=None, head_size=None, dropout=None,
    ):  # fmt: skip
        super().__init__()
        self.git, self.processor, self.source, self.trains_lora = git, processor, source, False
        self.language_prior = LANGUAGE_PRIOR if language_prior is None else language_prior
        self.prior_floor = PRIOR_FLOOR if prior_floor is None else prior_floor
        self.head_size = HEAD_SIZE if head_size is None else head_size
        self.dropout = DROPOUT if dropout is None else dropout
        self.feature_size = git.config.hidden_size
        self.question, self.answers = PROMPT, answer_ids(processor.tokenizer, [*ANSWERS])  # as token ids
        self.shared_word = next(([x[0]] for x in self.answers if len(x) == 2), [])
        self.policy_head, self.value_head = (
            nn.Sequential(nn.Linear(self.feature_size, self.head_size), nn.Tanh(), nn.Linear(self.head_size, outputs))
            for outputs in (len(self.answers), 1)
        )
        for head in (self.policy_head, self.value_head):
            nn.init.orthogonal_(head[0].weight, 2**0.5)
            for zero in (head[0].bias, head[2].weight, head[2].bias):
                nn.init.zeros_(zero)
        self.to(self.device)
        self.prepare()

    def forward(self, frames, instructions=""):
        """Frames uint8 (B, 96, 96, 3) -> action logits (B, 5) in the order of ANSWERS, and value (B,)."""
        return self.head(*self.encode(frames, instructions))

    @torch.no_grad()
    def encode(self, frames, instructions=""):
        """`features` (B, feature_size) and `answer_log_probs` (B, 5) of frames uint8 (B, 96, 96, 3), in one pass.

        The log-likelihood of each whole answer without [SEP], renormalised over them. Prompt plus the shared first
        word ("turn") is all the text it takes.
        """
        states = self.read(self.weights, frames, instructions, self.shared_word)
        words = git_forward.linear(states, *self.weights.lm_head).log_softmax(-1)
        return self.features(frames, instructions, states[:, 0]), score_answers(words, self.answers)

    def features(self, frames, instructions="", state=None):
        """What the heads read, (B, feature_size): the state of the prompt's last token, which predicts the first word.

        `state` is that of a pass already made. A LoRA that PPO trains makes a pass of its own and gets gradients.
        """
        if self.trains_lora:
            weights = git_forward.collect(self.base, self.processor.image_processor)
            state = self.read(weights, frames, instructions)[:, 0]
        elif state is None:
            state = self.read(self.weights, frames, instructions)[:, 0]
        return state  # an input of the heads that the frames show is joined here; feature_size counts it

    def head(self, features, answer_log_probs, dropout=None):
        """Action logits (B, 5) and value (B,) from stored features.

        `dropout` float32 (B, head_size) multiplies the policy's hidden layer: the masks drawn by `draw_dropout` at the
        time of acting, stored with the rollout. None, as in evaluation, drops nothing.
        """
        hidden = self.policy_head[:2](features)
        if dropout is not None:
            hidden = hidden * dropout
        return self.prior(answer_log_probs) + self.policy_head[2](hidden), self.value_head(features)[:, 0]

    def prior(self, answer_log_probs):
        """The language model's share of the action logits: (B, 5)."""
        p = answer_log_probs.exp()
        return self.language_prior * torch.log((1 - self.prior_floor) * p + self.prior_floor / p.shape[-1])

    def draw_dropout(self, batch_size, generator=None):
        """Dropout masks for `head`: 0 with probability p = `dropout`, else 1 / (1 - p), float32 (B, head_size)."""
        kept = torch.rand(batch_size, self.head_size, device=self.device, generator=generator) >= self.dropout
        return kept / (1 - self.dropout)

    def answer(self, frames, instructions=""):
        """What the vehicle should do, in words: one of ANSWERS for each frame, or whatever else the model says."""
        return [parse_answer(text) or text for text in self.ask(frames, self.question, instructions)]

    @torch.no_grad()
    def ask(self, frames, question, instruction=""):
        """Greedily generated answers to any question, one string per frame, at most MAX_ANSWER_TOKENS tokens."""
        tokenizer, (tokens, lengths) = self.processor.tokenizer, self.prompts(instruction, len(frames), (), question)
        room = min(MAX_ANSWER_TOKENS, len(self.weights.text_positions) - tokens.shape[1])
        stop = tokenizer.sep_token_id
        with self.autocast():
            rows = git_forward.generate(self.weights, self.pixels(frames), tokens, lengths, stop, room)
        return [tokenizer.decode(row, skip_special_tokens=True).replace(" - ", "-") for row in rows]  # "forty-five"

    def read(self, weights, frames, instructions, ending=()):
        """One pass: states of the prompt's last token and of the E tokens `ending`, float32 (B, 1 + E, hidden)."""
        tokens, lengths = self.prompts(instructions, len(frames), ending)
        with self.autocast():
            return git_forward.read(weights, self.pixels(frames), tokens, lengths, 1 + len(ending))[0]

    def prompts(self, instructions, count, ending=(), question=None):
        """Padded token ids int64 (count, T) of instruction, question and `ending`, and their lengths int64 (count,)."""
        each = [instructions] if isinstance(instructions, str) else instructions
        each = each[:1] if len(set(each)) == 1 else each  # one prompt for all is expanded
        question = self.question if question is None else question
        each = [prompt_ids(self.processor.tokenizer, told, question) + [*ending] for told in each]
        longest = max(map(len, each)) - len(ending)
        room = len(self.weights.text_positions) - max(map(len, self.answers)) - 1  # without answer and [SEP]
        if longest > room:
            raise BadInput(f"a prompt of {longest} tokens: this model takes {room}; say it in fewer words")
        lengths = torch.tensor([len(ids) for ids in each], device=self.device)
        padding = self.processor.tokenizer.pad_token_id
        tokens = pad_sequence([torch.tensor(ids) for ids in each], batch_first=True, padding_value=padding)
        return tokens.to(self.device).expand(count, -1), lengths.expand(count)

    def pixels(self, frames):
        return resize(torch.as_tensor(frames).to(self.device), self.processor.image_processor)

    def autocast(self):
        """bfloat16 on a GPU. On a CPU float32, also where it trains in bfloat16: scores hardly depend on the CPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    @property
    def base(self):
        """The `GitForCausalLM`, without the PEFT model that may be around it."""
        return self.git.get_base_model() if isinstance(self.git, PeftModel) else self.git

    @property
    def device(self):
        return self.base.output.weight.device

    @classmethod
    def from_pretrained(cls, name, **head):
        """Frozen: an adapter of stage 2 merged into its base, or a GIT base, by folder or the Hub's name."""
        git, processor, source = load_git(str(name), task())
        return cls(git.eval().requires_grad_(False).to(device()), processor, source, **head)

    @classmethod
    def from_policy(cls, folder):
        """A policy folder, relative to the repository, together with the base and adapter that it names."""
        folder = ROOT / folder
        remedy = "put it back, or rerun ppo_git_with_prompt.py"
        facts = read_json(folder / "policy.json", "run ppo_git_with_prompt.py first, or name results/published/policy")
        weights = read_weights(folder / "policy.safetensors")
        check_same(f"{folder}/", facts, task(), remedy)
        head = {name: facts[name] for name in HEAD_FACTS}
        model = cls.from_pretrained(facts.get("adapter") or facts.get("base_model"), **head)
        made_on = {name: model.source[name] for name in ("base_fingerprint", "adapter_hash")}
        check_same(f"{folder}/", facts, made_on, remedy)
        if facts.get("lora_rank"):
            model.add_lora(facts["lora_rank"], facts["lora_alpha"])
        model.load_trained(weights, f"{folder}/policy.safetensors")
        model.git.requires_grad_(False)
        return model

    def prepare(self):
        """Read the backbone's present weights into the fast pass, which answers with them from now on."""
        assert not self.trains_lora, "the answers stay those without the LoRA that PPO trains"
        self.weights = git_forward.prepare(self.base, self.processor.image_processor)

    def add_lora(self, rank, alpha):
        """Put a fresh, trainable LoRA on the (merged) backbone, for the features; the answers stay those without it."""
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=rf"({BACKBONE_LAYERS})")
        self.git, self.trains_lora = get_peft_model(self.git, config).eval(), True
        self.source = self.source | {"lora_rank": rank, "lora_alpha": alpha}

    def trained_parameters(self):
        """What PPO trains and a policy folder holds, by name, detached: the two heads and a fresh LoRA, if any."""
        return {name: p.detach() for name, p in self.named_parameters() if "_head." in name or "lora_" in name}

    def load_trained(self, weights, file):
        """Load what `trained_parameters` returned; BadInput names `file` if it is of another model."""
        check_shapes(file, weights, self.trained_parameters(), "rerun ppo_git_with_prompt.py")
        self.load_state_dict(weights, strict=False)

    def save_policy(self, folder, **facts):
        """Write `policy.safetensors` (the trained weights), `policy.json` (what they stand on, `facts`) and a card.

        The folder is relative to the repository.
        """
        folder = ROOT / folder
        folder.mkdir(parents=True, exist_ok=True)
        facts |= self.source | task() | {name: getattr(self, name) for name in HEAD_FACTS}
        weights = {name: p.contiguous() for name, p in self.trained_parameters().items()}
        write_file(folder / "policy.safetensors", save(weights))
        write_json(folder / "policy.json", facts)
        shown = folder.resolve().relative_to(ROOT) if folder.resolve().is_relative_to(ROOT) else folder
        write_file(folder / "README.md", cards.policy_card(shown, facts).encode())
