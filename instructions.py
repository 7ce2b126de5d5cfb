"""What is said to the car: instructions drawn and put into words, and which words are for measurements only.

An instruction has a name: an entry of INSTRUCTIONS (phrasings.py), one of COMBINATIONS, a speed and a side, or
"garbled".
"""

import functools
import re
from typing import NamedTuple

import numpy as np

import questions
from phrasings import (
    COMBINATIONS,
    HELD_OUT_COMBINATIONS,
    HELD_OUT_SPEEDS,
    HELD_OUT_WORDINGS,
    INSTRUCTIONS,
    SPEEDS,
    WORDINGS,
)
from support.checks import BadInput
from support.run_files import facts_hash
from targets import RACE, Target, random_target

COMBINATION_WEIGHT = 0.3  # how often one of COMBINATIONS is drawn, relative to the instructions' weights
GARBLED_WEIGHT = 0.03  # how often words of random letters, under which the driver races
# how often a sentence that names the other side is said in training, relative to the others: said as often, neither
# "left" nor "right" tells much by itself, and LoRA had not learned which is which (LOG.md)
INDIRECT = 0.4
SMALL_WORDS = {"a", "an", "the", "here", "now", "please"}  # which varied sentences drop or add
SMALL_TALK_SHARE = 0.15  # of varied sentences that come with one about something else

WISH_QUESTION = "What do I want?"  # asked after an instruction; `wish` answers it from the words alone

HELD_OUT_NAMES = {f"speed {word}" for word in HELD_OUT_SPEEDS}
SPEED_NAMES = {f"speed {word}" for word in SPEEDS | HELD_OUT_SPEEDS}
KINDS = [name for name in INSTRUCTIONS if name not in SPEED_NAMES] + ["speed", "combination", "garbled"]


def kind(name):
    """The kind of an instruction, one of KINDS: "speed" and "combination" stand for many, the others for themselves.

    That of nothing is "".
    """
    if name in SPEED_NAMES:
        return "speed"
    return name if name in INSTRUCTIONS or name in ("", "garbled") else "combination"


def parts(name):
    """The names of the instructions that a combination consists of, speed and side; any other name by itself."""
    return [name] if kind(name) != "combination" else name.rsplit(" ", 1)


def target(name):
    """The `Target` of an instruction, or of a combination of a speed and a side ("slow left")."""
    if name in INSTRUCTIONS:
        return INSTRUCTIONS[name].target
    speed, side = parts(name)
    return Target(INSTRUCTIONS[speed].target.speed, INSTRUCTIONS[side].target.side)


def names_other_side(name, sentence):
    """Whether the sentence asks for the side `name` by naming the other one: "The left lane is closed."."""
    return {"left": "right", "right": "left"}.get(name) in without_marks(sentence).split()


@functools.cache
def chances(name, split):
    """How probable each phrasing of an instruction is, float64 (N,): even, but for INDIRECT in training."""
    weights = [
        INDIRECT if split == "taught" and names_other_side(name, sentence) else 1.0
        for sentence in getattr(INSTRUCTIONS[name], split)
    ]
    return np.array(weights) / sum(weights)


def phrase(name, rng, split="taught"):
    """One sentence that asks for the instruction `name`, two for a combination; `split` is "taught" or "held_out"."""
    if name in INSTRUCTIONS:
        phrasings = getattr(INSTRUCTIONS[name], split)
        return phrasings[rng.choice(len(phrasings), p=chances(name, split))]
    said = [phrase(part, rng, split) for part in parts(name)]
    return " ".join(said if rng.random() < 0.5 else said[::-1])


def varied(sentence, rng):
    """The sentence as somebody else might say it: small words left out or added, perhaps with small talk."""
    words = [word for word in sentence[:-1].split() if word.strip(",").lower() not in SMALL_WORDS or rng.random() < 0.7]
    words = words or [sentence[:-1]]
    before, after = rng.choice(["", "", "", "please", "now"]), rng.choice(["", "", "", "please", "now", "here"])
    if before and words[0] != "I":
        words[0] = words[0].lower()
    said = " ".join(filter(None, [before, *words, after])).rstrip(",") + sentence[-1]
    said = said[0].upper() + said[1:]
    if rng.random() < SMALL_TALK_SHARE:
        small_talk_first = rng.integers(2) == 0
        small_talk = phrase("chatter", rng)
        said = f"{small_talk} {said}" if small_talk_first else f"{said} {small_talk}"
    return said


def garbled(rng):
    """Two to four words of random letters."""
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    return " ".join("".join(rng.choice(letters, rng.integers(3, 7))) for _ in range(rng.integers(2, 5))) + "."


class Told(NamedTuple):
    """An instruction as it is given: its name, the split of its phrasing, the sentence, what it asks for."""

    name: str
    split: str
    sentence: str
    target: Target


NOTHING = Told("", "taught", "", RACE)


def draw_target(rng, share):
    """A random target without words, for the teacher; with probability 1 - `share` nothing."""
    return NOTHING._replace(target=random_target(rng)) if rng.random() < share else NOTHING


def draw(rng, split="taught", share=1.0, varied_share=0.0):
    """A random instruction, by the weights of the instructions, of combinations and of garbled words.

    With probability 1 - `share` nothing; `varied_share` of the sentences are said as somebody else might.
    """
    if rng.random() >= share:
        return NOTHING
    weights = {name: instruction.weight for name, instruction in INSTRUCTIONS.items()}
    weights |= {"combination": COMBINATION_WEIGHT, "garbled": GARBLED_WEIGHT}
    odds = np.array([*weights.values()])
    name = str(rng.choice([*weights], p=odds / odds.sum()))
    if name == "combination":
        name = str(rng.choice(sorted(COMBINATIONS)))
    return say(name, rng, split, varied_share)


def say(name, rng, split="taught", varied_share=0.0):
    """The instruction `name`, or "garbled", in one of its phrasings, as `draw` does it."""
    if name == "garbled":
        return Told(name, split, garbled(rng), RACE)
    sentence = phrase(name, rng, split)
    sentence = varied(sentence, rng) if rng.random() < varied_share else sentence
    return Told(name, split, sentence, target(name))


def obeyed_shares(obedience):
    """Share of decisions after which the car was as told, by kind, from pairs `(kind, obeyed)`; nan: never told."""
    if not obedience:
        return {}
    kinds = [kind for kind in KINDS if kind not in ("race", "chatter", "garbled")]  # nothing to obey
    obeyed = {kind: [x for k, x in obedience if k == kind] or [np.nan] for kind in kinds}
    return {f"obeyed_{kind}": float(np.mean(x)) for kind, x in obeyed.items()}


def wish(name):
    """The answer to WISH_QUESTION under the instruction `name`: the simplest way to say it, or "Nothing."."""
    if name in ("chatter", "garbled"):
        return "Nothing."
    return " ".join(INSTRUCTIONS[part].taught[0] for part in parts(name))


def taught_sentences():
    """Every sentence that may be said in training, as written, a set of strings; `varied` makes more."""
    names = INSTRUCTIONS.keys() - HELD_OUT_NAMES
    return {sentence for name in names for sentence in INSTRUCTIONS[name].taught} | set(WORDINGS)


@functools.cache
def held_out_sentences():
    """Everything that may only be said in measurements: a set of strings, without case and marks."""
    said = {sentence for instruction in INSTRUCTIONS.values() for sentence in instruction.held_out}
    for name in HELD_OUT_NAMES:
        said |= set(INSTRUCTIONS[name].taught)
    return {without_marks(sentence) for sentence in said | set(HELD_OUT_WORDINGS)}


def check_phrasings():
    """Raise BadInput if an instruction asks for a stop at a side, a phrasing lacks its mark or is taught and held out.

    It is taught, too, if it differs from a taught one in small words alone, which `varied` adds.
    """
    for name in [*INSTRUCTIONS, *COMBINATIONS]:
        if target(name).speed == 0 and target(name).side is not None:
            raise BadInput(f"phrasings.py: {name!r} is a stop at a side, where nobody drives first: drop one of both")
    for instruction in INSTRUCTIONS.values():
        for sentence in (*instruction.taught, *instruction.held_out):
            if not re.fullmatch(r"[^.?!]+[.?!]", sentence):
                raise BadInput(f"phrasings.py: {sentence!r} is not one sentence that ends with '.', '?' or '!'")

    def told_apart(sentences):
        return {" ".join(word for word in said.split() if word not in SMALL_WORDS) for said in sentences}

    if both := told_apart(held_out_sentences()) & told_apart(map(without_marks, taught_sentences())):
        raise BadInput(f"phrasings.py teaches {min(both)!r} and holds it out: keep one of the two")


def without_marks(sentence):
    """Its words in lower case, numbers among them."""
    return " ".join(re.findall(r"[a-z-]+", questions.spelled(sentence.lower())))


def is_held_out(name, sentence):
    """Whether the instruction `name`, said in this `sentence` or two, is for measurements only."""
    if name in HELD_OUT_COMBINATIONS or not HELD_OUT_NAMES.isdisjoint(parts(name)):
        return True
    return not held_out_sentences().isdisjoint(map(without_marks, re.split("[.?!]", sentence)))


def digest():
    """A short hash of phrasings, targets and weights, by which a run says which instructions it had.

    Held-out sentences, SMALL_WORDS and the question about an instruction are not in it.
    """
    said = {name: (i.target.speed, i.target.side, i.taught, i.weight) for name, i in INSTRUCTIONS.items()}
    said |= {
        "combinations": sorted(COMBINATIONS),
        "wordings": WORDINGS,
        "shares": [COMBINATION_WEIGHT, GARBLED_WEIGHT, SMALL_TALK_SHARE, INDIRECT],
    }
    return facts_hash(dict(sorted(said.items())))
