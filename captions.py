"""The captions of stage 1 as a GIT reads them: frames, the texts of each, and batches of both.

A text is an instruction ("" for none), a question and the answer to it. The answer's tokens are supervised, the
prompt's not: `[CLS] prompt answer [SEP]`, with labels -100 on prompt and padding.
"""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import GitText2ActionWithPrompt as model_file
import instructions
from fast import git_forward
from GitText2ActionWithPrompt import ANSWERS, PROMPT
from phrasings import WORDINGS
from support import checks


class Captions(torch.utils.data.Dataset):
    """One split of one or more imagefolder datasets: (frame uint8 (96, 96, 3), its metadata row)."""

    def __init__(self, *folders):
        self.rows = []
        for folder in map(Path, folders):
            metadata = folder / "metadata.jsonl"
            if not metadata.exists():
                raise checks.BadInput(f"no captions in {folder}/: run collect_captions.py first")
            try:
                for row in map(json.loads, metadata.read_text().splitlines()):
                    added = {"file": folder / row["file_name"], "answer": list(ANSWERS).index(row["text"])}
                    self.rows.append({"told": [], "asked": []} | row | added)
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise checks.BadInput(f"{metadata} is damaged ({error!r}): rerun collect_captions.py") from None

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        try:
            with Image.open(row["file"], formats=["PNG"]) as image:
                return np.asarray(image.convert("RGB")), row
        except OSError as error:
            raise checks.BadInput(f"no frame in {row['file']} ({error}): rerun collect_captions.py") from None


def choice(items):
    """One of the items, by torch's generator."""
    return items[torch.randint(len(items), ())]


def draw_told(row):
    """The labelled instructions that one frame is read under: the first, and another one."""
    first, others = row["told"][:1], row["told"][1:]
    return first + [choice(others)] if others else first


def draw_texts(row, reworded=0.0, wishes=0.0):
    """The texts that one frame is read with in training, as (instruction, question, answer).

    The plain question, the question under the frame's first instruction (the driver's, if it had one) and under another
    one, and a question about the scene or, in a share `wishes` of the frames, about the instruction; as far as stage 1
    gave the frame any. A share `reworded` of the plain questions is asked in other words, and half that share of those
    under an instruction.
    """

    def wording(share):
        return choice(WORDINGS) if torch.rand(()) < share else PROMPT

    texts = [("", wording(reworded), row["text"])]
    for told in draw_told(row):
        texts.append((told["sentence"], wording(reworded / 2), told["text"]))
    if row["asked"]:
        asked = choice(row["asked"])
        asks_for_wish = row["told"] and torch.rand(()) < wishes
        texts.append(wish_of(choice(row["told"])) if asks_for_wish else ("", asked["question"], asked["text"]))
    return texts


def wish_of(told):
    """The text that asks for the wish behind an instruction, which the words alone tell."""
    return told["sentence"], instructions.WISH_QUESTION, instructions.wish(told["instruction"])


def measured_texts(row):
    """The texts that a validation frame is measured with, each with the metrics that it counts for.

    The plain question, all that the frame was labelled for, the wishes behind these, all that it was asked. The first
    instruction is the one that led there, if any did, and always in a taught phrasing: it counts by itself, so that
    taught and held-out phrasings are compared on the same frames.
    """
    texts = [((), ("", PROMPT, row["text"]))]
    for i, told in enumerate(row["told"]):
        by_kind = f"exact_{instructions.kind(told['instruction'])}_{told['split']}"
        texts.append(((by_kind if i else "exact_first_told",), (told["sentence"], PROMPT, told["text"])))
        texts.append(((f"exact_wish_{told['split']}",), wish_of(told)))
    for asked in row["asked"]:
        metrics = ("exact_scene", f"exact_scene_{asked['about'].replace(' ', '_')}")
        texts.append((metrics, ("", asked["question"], asked["text"])))
    return texts


def all_texts(row):
    """The texts of `measured_texts` alone."""
    return [text for _, text in measured_texts(row)]


class Collator:
    """Frames and rows -> pixel_values (B, 3, S, S), input_ids and labels (B, texts, T) of what `choose` chooses."""

    def __init__(self, processor, choose):
        self.processor, self.choose = processor, choose

    def __call__(self, samples):
        tokenizer = self.processor.tokenizer
        frames, rows = zip(*samples)
        texts = []
        for instruction, question, answer in (text for row in rows for text in self.choose(row)):
            prompt = model_file.prompt_ids(tokenizer, instruction, question)
            texts.append((prompt, model_file.ending_ids(tokenizer, answer)))
        pixels = model_file.resize(np.stack(frames), self.processor.image_processor)
        tokens, labels = git_forward.pad_texts(texts, tokenizer.pad_token_id)
        if tokens.shape[1] > tokenizer.model_max_length:
            longest = tokenizer.decode(max((prompt + ending for prompt, ending in texts), key=len))
            raise checks.BadInput(
                f"{longest!r} has {tokens.shape[1]} tokens, this base takes {tokenizer.model_max_length}: say it in "
                "fewer words (phrasings.py, questions.py), or train a git-tiny that knows them"
            )
        texts = {"input_ids": tokens, "labels": labels}
        return {"pixel_values": pixels} | {name: x.unflatten(0, (len(rows), -1)) for name, x in texts.items()}
