"""What can be asked about the scene: questions, each in several wordings, and the sentences that answer them.

Reads and writes nothing. The answers come from the simulator's state; none of them says what to do. git-tiny learns to
see by them (offline/make_git_tiny.py), and stage 2 keeps them.
"""

import re

import numpy as np

from support.checks import BadInput
from support.run_files import facts_hash

SPEED_STEP = 5  # units per second in which the speed is told
OFFSET_PACE = 0.75  # units: a pace from the middle of the road
WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()

QUESTIONS = {
    "speed": ("How fast is the car?", "What is the speed of the car?", "Is the car fast or slow?"),
    "offset": ("Where on the road is the car?", "Is the car in the middle of the road?", "Which lane is the car in?"),
    "heading": ("How is the car pointed?", "Where does the car look?", "Does the car point along the road?"),
    "turning": ("How is the car turning?", "Is the car turning?", "Does the car turn left or right?"),
    "sliding": ("How does the car slide?", "Is the car sliding?", "Does the car slide to a side?"),
    "steering": ("How are the wheels steered?", "Where do the wheels point?", "Are the wheels turned left or right?"),
    "wheels": ("How fast are the wheels?", "What is the speed of the wheels?", "How fast do the wheels spin?"),
    "grass": ("Is the car on the grass?", "How many wheels are on the grass?", "Is the car off the road?"),
    "bend": ("How does the road bend?", "Is there a bend here?", "Which way does the road turn here?"),
    "next bend": ("How does the road bend next?", "Is there a bend ahead?", "Which way does the road turn next?"),
    "far bend": (
        "How does the road bend far ahead?",
        "Is there a bend far ahead?",
        "Which way does it turn far ahead?",
    ),
    "near": ("Where does the road go?", "Where is the road a moment ahead?", "Where is the road close to the car?"),
    "ahead": ("Where does the road go next?", "Where is the road ahead?", "Which side is the road on ahead?"),
    "far": (
        "Where does the road go far ahead?",
        "Where is the road far ahead?",
        "Which side is the road on far ahead?",
    ),
}


def number(value):
    """A whole number from 0 to 100 in words: "forty-five"."""
    value = int(value)
    if value <= 20:
        return WORDS[value]
    if value >= 100:
        return "one hundred"
    return TENS[value // 10] + (f"-{WORDS[value % 10]}" if value % 10 else "")


def spelled(text):
    """The text with its whole numbers from 0 to 100 in words, as the model was taught them: "Drive at 20." """
    return re.sub(r"(?<![\d.,])(100|\d\d?)(?!\d|[.,]\d)", lambda match: number(match[0]), text)


def rounded(value, step):
    """The size of `value` in words, as the nearest multiple of `step` from 0 to 100."""
    return number(step * np.clip(round(abs(value) / step), 0, 100 // step))


def paces(value, pace, place, zero):
    """ "three paces left of PLACE", a pace being `pace` units, or `zero` for none."""
    count, side = min(round(abs(value) / pace), 15), "left" if value < 0 else "right"
    if count == 0:
        return zero
    return f"{number(count)} {'pace' if count == 1 else 'paces'} {side} of {place}"


def graded(value, steps, manners):
    """Which of the `manners` the size of `value` falls into, and its side; "" below the first of the `steps`."""
    grade = int(np.searchsorted(steps, abs(value)))
    return "" if grade == 0 else " ".join(f"{manners[grade - 1]} to the {'left' if value < 0 else 'right'}".split())


BENDS = ([3.5, 10.5, 17.5, 24.5, 35.0], ["slightly", "gently", "", "sharply", "very sharply"])  # degrees
TURNS = ([0.1, 0.5, 1.3], ["slowly", "", "quickly"])  # radians per second
SLIDES = ([0.5, 2.5, 6.5], ["slightly", "", "fast"])  # units per second
STEERS = ([0.025, 0.125, 0.275], ["slightly", "", "fully"])  # radians


def describe(car, road):
    """The answer to each of QUESTIONS: a dict of sentences, from the `State` of the car and the `Road` around it."""

    def bend(start, end):
        """How the road bends between two of the next tiles."""
        before, after = (road.track[(road.tile + i) % len(road.track), 1] for i in (start, end))
        turn = (before - after + np.pi) % (2 * np.pi) - np.pi  # right is positive
        manner = graded(np.degrees(turn), *BENDS)
        return f"bends {manner}" if manner else "goes straight on"

    heading, grass = np.degrees(np.arctan2(car.sin_heading, car.cos_heading)), 4 - int(car.wheels_on_road.sum())
    if abs(car.forward) < SPEED_STEP / 2:
        manner = "stands still"
    else:
        manner = f"drives at speed {rounded(car.forward, SPEED_STEP)}" if car.forward > 0 else "rolls back"
    if grass in (0, 4):
        on_grass = "The whole car is on the grass." if grass else "No, all wheels are on the road."
    else:
        on_grass = f"{number(grass).capitalize()} {'wheel is' if grass == 1 else 'wheels are'} on the grass."
    if abs(heading) > 90:
        points_to = "backwards"
    else:
        side, degrees = "left" if heading < 0 else "right", rounded(heading, 5)
        points_to = "along the road" if degrees == "zero" else f"{degrees} degrees to the {side}"
    answers = {
        "speed": f"The car {manner}.",
        "offset": f"The car is {paces(car.offset, OFFSET_PACE, 'the middle', 'in the middle')}.",
        "heading": f"The car points {points_to}.",
        "turning": f"The car turns {graded(-car.yaw_rate, *TURNS) or 'nowhere'}.",
        "sliding": f"The car slides {graded(car.right, *SLIDES) or 'nowhere'}.",
        "steering": f"The wheels point {graded(-car.steering, *STEERS) or 'straight on'}.",
        "wheels": f"The wheels spin at speed {number(10 * np.clip(round(car.wheel_speeds[2] / 10), 0, 10))}.",
        "grass": on_grass,
        "bend": f"The road {bend(0, 4)}.",
        "next bend": f"Next the road {bend(4, 8)}.",
        "far bend": f"Far ahead the road {bend(8, 12)}.",
        "near": f"The road is {paces(car.ahead[2, 0], 0.8, 'the car', 'straight before it')}.",
        "ahead": f"Ahead the road is {paces(car.ahead[5, 0], 1.5, 'the car', 'straight before it')}.",
        "far": f"Far ahead the road is {paces(car.ahead[8, 0], 3.0, 'the car', 'straight before it')}.",
    }
    if unmatched := answers.keys() ^ QUESTIONS.keys():
        raise BadInput(f"questions.py: {min(unmatched)!r} is in one of QUESTIONS and describe only: add the other half")
    return answers


def digest():
    """A short hash of the questions and of where their answers change, by which captions say which they answer.

    What `describe` does with these is not in it.
    """
    return facts_hash([QUESTIONS, SPEED_STEP, OFFSET_PACE, BENDS, TURNS, SLIDES, STEERS])


def draw(rng, answers, count):
    """`count` of the questions that `answers` (of `describe`) answer, each in any wording, as rows of a dataset."""
    rows = []
    for key in rng.choice(list(answers), count, replace=False):
        wording = QUESTIONS[key][rng.integers(len(QUESTIONS[key]))]
        rows.append({"about": str(key), "question": wording, "text": answers[key]})
    return rows
