"""What can be said to the car: instructions, their phrasings, what the driver shall do, and when it counts as obeyed.

Reads and writes nothing. To add an instruction, add one entry to INSTRUCTIONS: the teacher drives by its target,
obedience is measured on it, and the model only ever sees the sentences. Targets and thresholds were fixed before a
model learned any.

Language has splits as tracks have: `taught` phrasings are for stages 1 to 3; `held_out` ones, HELD_OUT_SPEEDS,
HELD_OUT_COMBINATIONS and HELD_OUT_WORDINGS are for measuring only: never said as something to obey. As answers about
the scene the model knows the held-out speeds and two of the phrasings, "The car drives at speed" and "The car stands
still".
"""

import functools
import hashlib
import json
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

import questions
from support.checks import BadInput

SIDE = 3.2  # units from the middle of the road; its edges are at 6.7
SPEED_SCALE = 50.0  # units per second that the teacher reads as 1
TARGET_SIZE = 5

# when an instruction counts as obeyed
SPEED_TOLERANCE = 5.0  # units per second around a speed
MIDDLE = 2.2  # units around the middle of the road that count as the middle: a third of its width
STANDING = 2.0  # units per second below which the car stands
RACING = 35.0  # units per second along the road, on average, that count as racing; a lap in time takes more
GRACE = {"stop": 3.0, "other": 5.0}  # seconds after the instruction that are not judged
OBEYED_SHARE = 0.75  # of the decisions, for each of speed and side; a standing car must stand in all
ON_ROAD_SHARE = 0.9  # of the decisions with a wheel on the road


@dataclass(frozen=True)
class Target:
    """What an instruction asks for. With neither speed nor side the driver races."""

    speed: float | None = None  # units per second; 0 is standing still
    side: float | None = None  # offset from the middle of the road in units, right is positive

    def encode(self):
        """What the teacher reads beside the state, float32 (TARGET_SIZE,)."""
        speed, side = self.speed, self.side
        return np.array(
            [speed is not None, (speed or 0.0) / SPEED_SCALE, speed == 0, side is not None, (side or 0.0) / SIDE],
            dtype=np.float32,
        )

    def speed_error(self, speed):
        """0 at the speed asked for, 1 from 80 units per second beside it on; steep close to it."""
        return 0.0 if self.speed is None else (min(abs(speed - self.speed), 80.0) / 80) ** 0.5

    def side_error(self, offset):
        """0 at the offset asked for, 1 from 6 units beside it on."""
        return 0.0 if self.side is None else min(abs(offset - self.side), 6.0) / 6

    def at_speed(self, speed):
        """Whether each of `speed` (T,) is the one asked for: bool (T,)."""
        if self.speed is None:
            return np.ones(len(speed), dtype=bool)
        return speed < STANDING if self.speed == 0 else abs(speed - self.speed) <= SPEED_TOLERANCE

    def on_side(self, offset):
        """Whether each of `offset` (T,) is on the half asked for, or in the middle: bool (T,)."""
        if self.side is None:
            return np.ones(len(offset), dtype=bool)
        return abs(offset) <= MIDDLE if self.side == 0 else offset * np.sign(self.side) > 0

    def grace(self):
        """Seconds after the instruction that are not judged."""
        return GRACE["stop" if self.speed == 0 else "other"]

    def obeyed(self, speed, offset, on_road, speed_along):
        """Whether a drive obeyed, from arrays (T,) of its decisions after the grace.

        `on_road` says whether a wheel touches the road, `speed_along` is the mean speed along the road.
        """
        if self.speed == 0:
            return bool(self.at_speed(speed).all())
        if np.mean(on_road) < ON_ROAD_SHARE or speed_along <= 0:  # on the grass, or the wrong way
            return False
        if self == RACE:
            return speed_along >= RACING
        return min(self.at_speed(speed).mean(), self.on_side(offset).mean()) >= OBEYED_SHARE


RACE = Target()


def random_target(rng):
    """Any target, for the teacher's training."""
    kind = rng.choice(4, p=[0.15, 0.4, 0.4, 0.05])  # speed, side, both, stop
    if kind == 3:
        return Target(speed=0.0)
    speed = float(rng.uniform(10, 60)) if kind != 1 else None
    side = float(rng.uniform(-1.4, 1.4) * SIDE) if kind != 0 else None
    return Target(speed, side)


class Instruction(NamedTuple):
    """A target, the sentences that ask for it, and how often it is drawn, relative to the others."""

    target: Target
    taught: tuple
    held_out: tuple
    share: float = 0.12


def sentences(text):
    """The sentences of a block, each with its mark at the end."""
    return tuple(" ".join(sentence.split()) for sentence in re.findall(r"[^.?!]+[.?!]", text))


def mirrored(phrasings):
    """The same sentences for the other side of the road."""
    swap = {"left": "right", "right": "left", "Left": "Right", "Right": "Left"}
    return tuple(re.sub(r"\b(left|right|Left|Right)\b", lambda word: swap[word[0]], sentence) for sentence in phrasings)


INSTRUCTIONS = {
    "race": Instruction(
        RACE,
        taught=sentences("""
            Race. Drive on. Go on. Keep going. Drive as fast as you can. Go as fast as the road allows. Full speed
            ahead. Please drive fast. Please go on driving. Could you drive faster? Hurry. Hurry up, please. Finish
            the lap quickly. Drive freely. Do not slow down. Do not waste time. We are late. The road is free.
            Nobody is in the way. There is no limit. Please hurry up. Do not go slowly. Do not wait. The way ahead
            is free. You can drive as fast as you want. I want a fast lap. Do not stop. Do not brake. Do not stay
            here. Please do not wait here. Go. Go now, please. Move on. Faster. Faster, please. Drive faster. Not so
            slowly. Too slow. You drive too slowly. Do not drive slowly. Do not be so careful. There is no time. The
            light is green. The whole road is free. The road ahead is free. Could you go on? Could you hurry up? You
            can go now. You should go faster. I want you to race.
        """),
        held_out=sentences("""
            Do not be slow. Faster, we are late. Could you make it a fast lap? There is nobody ahead. Take the road
            as fast as it allows. There is no time to wait.
        """),
    ),
    "slow": Instruction(
        Target(speed=20.0),
        taught=sentences("""
            Drive slowly. Slow down. Go slowly, please. Please drive slowly. Take it slowly. Creep along. Could you
            slow down? Could you drive more carefully? Reduce your speed. Drive carefully. Please be careful. Not so
            fast. Too fast. Do not drive fast. Do not hurry. We have time. Not so quickly, I feel sick. The road is
            wet. There is ice on the road. Children play here. Slowly, please. You drive too fast. Please do not go
            so fast. Carefully, there is ice. Gently, please. Children are on the road here. Slower. Slower, please.
            Go slower. Drive slower, please. Do not go fast. Do not go so fast. Please do not hurry. You are too
            fast. You go too fast. Take your time. Be careful. Careful, please. Drive gently. There is no hurry. We
            are not late. We are in no hurry. Children play near the road. People walk near the road. It rained,
            drive carefully. The road is not good here. Could you go slower? Could you take it slowly? You should
            drive slowly. I want you to slow down.
        """),
        held_out=sentences("""
            I want to go gently. You should be more careful. Do not make it so fast. Slow and careful, please.
            There are children near the road. Not fast, please.
        """),
    ),
    "left": Instruction(
        Target(side=-SIDE),
        taught=sentences("""
            Keep left. Keep to the left. Stay on the left. Drive on the left side. Take the left lane. Use the left
            half of the road. Move over to the left. Follow the left edge. Please keep left. Left, please. Could you
            stay on the left? Could you use the left lane? The right lane is closed. There is a hole on the right.
            Somebody walks on the right. A truck blocks the right side. Do not drive on the right. Stay off the
            right side. Avoid the right lane. Leave the right side free. Stay left, please. Please leave the right
            lane. Could you drive close to the left edge? Do not use the right half. People walk on the right side
            of the road. Left. Left lane, please. Go to the left. Move to the left side. Drive left of the middle.
            Stay left of the middle. Keep near the left edge. Use the left side, please. I want you on the left. I
            want to drive on the left side. You should keep left. You should use the left lane. Could you move over
            to the left? Do not keep right. Do not stay on the right. Keep away from the right edge. Stay away from
            the right. The right side is blocked. The right half is closed. There are people on the right. Children
            play on the right. There is ice on the right. An accident blocks the right lane. The left side is free.
            The left lane is the best.
        """),
        held_out=sentences("""
            Please stay near the left edge. Could you move to the left half? Do not go near the right edge. The lane
            on the right is blocked. A child plays on the right side. Drive four paces left of the middle.
        """),
    ),
    "middle": Instruction(
        Target(side=0.0),
        taught=sentences("""
            Keep to the middle. Stay in the middle. Drive in the middle of the road. Use the middle lane. Keep to
            the center. Stay in the center of the road. Follow the middle line. Please keep to the middle. Middle of
            the road, please. Could you stay in the middle? Could you use the center? Both sides are closed. There
            are holes on both sides. People walk on both sides. Both edges are broken. Do not go near the edges.
            Avoid both sides. Stay off the sides. Keep away from the edges. Leave both sides free. Middle, please.
            Do not drive at the sides. Both edges are closed. Both sides of the road are blocked. Middle. Center,
            please. Drive on the middle line. Stay near the middle. Keep near the center. Go to the middle. Move to
            the middle. Please move to the center. Use the middle of the road. I want you in the middle. I want to
            drive in the middle. You should stay in the middle. Could you move to the middle? Not left and not
            right. Do not keep left or right. Do not move to the sides. Do not follow the edges. Stay away from both
            edges. There is ice on both sides. Children play on both sides. There are people on both sides. Nobody
            should drive at the edges. The middle is free. The middle lane is the best.
        """),
        held_out=sentences("""
            Please use the center of the road. Could you drive where both edges are far away? Do not drive on the
            left or right side. Stay away from the edges, please. The sides are blocked. Stay zero paces from the
            middle.
        """),
    ),
    "stop": Instruction(
        Target(speed=0.0),
        taught=sentences("""
            Stop. Stop now. Stop the car. Come to a stop. Halt. Hold still. Brake and wait. Wait here. Stay where
            you are. Please stop. Please wait. Could you stop here? Do not move. Do not go on. The light is red. A
            child runs into the road. An accident blocks the road ahead. The road ahead is blocked. The police want
            to see us. I want to get out. Stop here, please. Wait where you are. Do not drive. Brake, the light is
            red. A child is on the road. Stop, please. Stop here. Do not go. Do not drive on. Please do not move.
            Brake. Brake now. Brake, please. Come to a halt. Halt, please. Wait. Wait, please. Wait a moment. Stay
            here. Could you wait here? Could you stop now? The light is not green. The road is blocked. There is an
            accident ahead. There is a child on the road. I want to stop. I want you to stop. You should stop. You
            should wait here. Hold it.
        """),
        held_out=sentences("""
            Stay still, please. You should not drive on. Wait, the road is blocked. You should not move. The light
            ahead is red. The car stands still now.
        """),
    ),
    "chatter": Instruction(  # says nothing about driving: the driver races
        RACE,
        taught=sentences("""
            The weather is nice. I like this music. My sister plays the piano. Dinner is at seven. Look at that
            bird. What a beautiful day. He reads a book. The coffee was good. Please close the window. Could you
            call my mother? Do you know a good song? Yesterday it rained. They live in a small house. She has two
            brothers. I forgot my hat. Tell me a story. The grass is green. Cats sleep a lot. We were in Paris. Do
            not forget the milk. The music is beautiful. She forgot a good book. It rained in Paris yesterday. Tell
            my mother a story. There is a bird in the window. Dinner was nice. My brothers like coffee. The book is
            good. I like Paris. She has a small house. They like music. The hat is beautiful. I want more coffee.
            What a nice song. Do you like the weather? Do you live in Paris? He forgot dinner. The day was nice.
            Could you close the window? Please call my brothers. Please tell a story. I do not like the coffee. Do
            not call my mother. Do not close the book.
        """),
        held_out=sentences("""
            He has a beautiful book. I forgot the coffee. My brothers live in Paris. Do you know my mother? Look at
            the small house. Milk is good.
        """),
        share=0.03,
    ),
}
INSTRUCTIONS["right"] = Instruction(
    Target(side=SIDE), mirrored(INSTRUCTIONS["left"].taught), mirrored(INSTRUCTIONS["left"].held_out)
)

SPEEDS = {questions.number(x): float(x) for x in (10, 15, 20, 22, 28, 30, 32, 35, 38, 40, 42, 48, 50)}
HELD_OUT_SPEEDS = {"twenty-five": 25.0, "forty-five": 45.0}  # taught as what the car does, not as what is wanted
HELD_OUT_NAMES = {f"speed {word}" for word in HELD_OUT_SPEEDS}
SPEED_PHRASINGS = sentences("""
    Drive at speed {}. Drive at {}. Go at {}. Keep speed {}. Stay at {}. Make it {}. Set the speed to {}. Hold a
    speed of {}. Please drive at {}. Speed {}, please. Could you go at speed {}? Could you drive at {}? I want to go
    at {}. Your speed should be {}. A speed of {} is good. The speed limit is {}. The limit here is {}. Not faster
    and not slower than {}. Do not drive faster or slower than {}. Do not change the speed from {}. Please go at a
    speed of {}. Could you change your speed to {}? Not slower than {} and not faster. The right speed here is {}.
    We want to see {}. Speed {}. Take speed {}. Drive at {}, please. Please keep {}. Please stay at speed {}. Keep
    it at {}. Hold {}. Change to {}. Your limit is {}. The limit on this road is {}. I want speed {}. You should go
    at {}. You should drive at speed {}. A speed of {}, please. Could you keep {}? The best speed is {}. The car
    should go at {}.
""")
HELD_OUT_SPEED_PHRASINGS = sentences("""
    Please keep a speed of {}. Could you change to speed {}? Not slower and not faster than {}. We want to go at {}.
    The speed here should be {}. The car drives at speed {}.
""")
for word, speed in (SPEEDS | HELD_OUT_SPEEDS).items():
    INSTRUCTIONS[f"speed {word}"] = Instruction(
        Target(speed=speed),
        tuple(phrasing.format(word) for phrasing in SPEED_PHRASINGS),
        tuple(phrasing.format(word) for phrasing in HELD_OUT_SPEED_PHRASINGS),
        share=0.0 if word in HELD_OUT_SPEEDS else 0.02,
    )

# a speed and a side: one sentence for each, in either order; "slow right" asks for what "speed twenty right", taught,
# does
HELD_OUT_COMBINATIONS = {"slow right", "speed thirty left", "speed forty middle"}
COMBINATIONS = {
    f"{speed} {side}"
    for speed in ("slow", *(f"speed {word}" for word in SPEEDS))
    for side in ("left", "middle", "right")
} - HELD_OUT_COMBINATIONS

COMBINATION_SHARE = 0.3  # how often one of COMBINATIONS is drawn, relative to the instructions' shares
GARBLED_SHARE = 0.03  # how often words of random letters, under which the driver races
# how often a sentence that names the other side is said in training, relative to the others: said as often, neither
# "left" nor "right" tells much by itself, and LoRA had not learned which is which (LOG.md)
INDIRECT = 0.4
SMALL_WORDS = {"a", "an", "the", "here", "now", "please"}  # which varied sentences drop or add
SMALL_TALK_SHARE = 0.15  # of varied sentences that come with one about something else

# asked after an instruction: about the words alone, `wish` answers it; about the words and the picture, `fit` answers
# it
WISH_QUESTION = "What do I want?"
FIT_QUESTION = "Is it as I want it?"
FIT_SPEED, FIT_SIDE = 2.6, 1.2  # units per second and units, in the steps of questions.py, that are no complaint

# the plain question in other words; the last is none at all: who asks nothing wants nothing else
WORDINGS = sentences("""
    What should the vehicle do in this scenario? What should the car do now? What should the driver do here?
    What shall the vehicle do next? What would you do now? What do you do in this situation? What is to be
    done here? What is the right action now? Which action should the vehicle take? Which action is best in
    this scenario? How should the car drive on? How do you drive here? Tell me what the car should do. Say
    what to do next. Your next action? What now? What next? What would be good here? What would be right
    here? Which action is right here? What is best to do here? Which action is the best one? Which action do
    you take here? Which is the right action? Which way of driving is right here? Is it time to turn or to
    brake? Should the car turn, accelerate or brake? Where should the car go now? How should the driver go
    on here? How would you drive on? What does a good driver do here? What does the car do next? The next
    action, please. Say the right action. Tell me the action. Tell me how to drive on. Drive the car. You
    drive.
""") + ("",)
HELD_OUT_WORDINGS = sentences("""
    What should the car do in this situation? What should the vehicle do next? What shall the driver do now? What
    would the car do here? What is the best action in this scenario? Which action would you take now? Which action
    is the right one here? How should the vehicle drive in this scenario? Tell me what to do next. Say what the
    driver should do.
""")


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
    said = [said[0].upper() + said[1:]]
    if rng.random() < SMALL_TALK_SHARE:
        said.insert(rng.integers(2), phrase("chatter", rng))
    said = " ".join(said)
    return sentence if is_held_out("", said) else said


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
    """A random instruction, by the shares of the instructions, of combinations and of garbled words.

    With probability 1 - `share` nothing; `varied_share` of the sentences are said as somebody else might.
    """
    if rng.random() >= share:
        return NOTHING
    shares = {name: instruction.share for name, instruction in INSTRUCTIONS.items()}
    shares |= {"combination": COMBINATION_SHARE, "garbled": GARBLED_SHARE}
    odds = np.array([*shares.values()])
    name = str(rng.choice([*shares], p=odds / odds.sum()))
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
    """Share of decisions in which what was told was so, from pairs `(kind, obeyed)`; nan for kinds never told."""
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


def fit(target, speed, offset):
    """The answer to FIT_QUESTION under a target; `speed` and `offset` are taken in the steps of questions.py."""
    said = []
    offset = questions.OFFSET_PACE * round(offset / questions.OFFSET_PACE)
    speed = max(questions.SPEED_STEP * round(speed / questions.SPEED_STEP), 0)
    if target.side is not None and abs(offset - target.side) > FIT_SIDE:
        said.append(f"The car is too far {'right' if offset > target.side else 'left'}.")
    if target.speed is not None and abs(speed - target.speed) > FIT_SPEED:
        said.append(f"The car is too {'fast' if speed > target.speed else 'slow'}.")
    return " ".join(said) or "Yes."


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


def check_splits():
    """Raise BadInput if a held-out sentence is a taught one, or is but for small words, which `varied` adds."""

    def told_apart(sentences):
        return {" ".join(word for word in said.split() if word not in SMALL_WORDS) for said in sentences}

    if both := told_apart(held_out_sentences()) & told_apart(map(without_marks, taught_sentences())):
        raise BadInput(f"instructions.py teaches {min(both)!r} and holds it out: keep one of the two")


def without_marks(sentence):
    """Its words in lower case, numbers among them."""
    return " ".join(re.findall(r"[a-z-]+", questions.spelled(sentence.lower())))


def is_held_out(name, sentence):
    """Whether the instruction `name`, said in this `sentence` or two, is for measurements only."""
    if name in HELD_OUT_COMBINATIONS or not HELD_OUT_NAMES.isdisjoint(parts(name)):
        return True
    return not held_out_sentences().isdisjoint(map(without_marks, re.split("[.?!]", sentence)))


def digest():
    """A short hash of phrasings, targets and shares, by which a run says which instructions it had.

    Held-out sentences, SMALL_WORDS and the two questions about an instruction are not in it.
    """
    said = {name: (i.target.speed, i.target.side, i.taught, i.share) for name, i in INSTRUCTIONS.items()}
    said |= {
        "combinations": sorted(COMBINATIONS),
        "wordings": WORDINGS,
        "shares": [COMBINATION_SHARE, GARBLED_SHARE, SMALL_TALK_SHARE, INDIRECT],
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]
