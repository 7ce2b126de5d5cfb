"""What can be said and asked: splits that share no sentence, targets, obedience, and what the scene's sentences say."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

import instructions
import questions
from instructions import INSTRUCTIONS, RACE, SIDE, Target
from teacher import STATE_SIZE


def words(sentences):
    return {word for sentence in sentences for word in re.findall(r"[a-z]+", sentence.lower())}


def without_marks(sentences):
    return {" ".join(re.findall(r"\w+", sentence.lower())) for sentence in sentences}


def test_held_out_sentences_are_not_taught_and_their_words_are_known():
    """Word for word; some words are known from the questions about the scene alone."""
    taught, held_out = instructions.taught_sentences(), instructions.held_out_sentences()
    assert without_marks(taught).isdisjoint(without_marks(held_out))
    scene = words(wording for wordings in questions.QUESTIONS.values() for wording in wordings)
    scene |= words(sentence for seed in range(300) for sentence in questions.describe(*scene_of(seed)).values())
    scene |= words(questions.number(n) for n in range(101))
    assert words(held_out) <= words(taught) | scene
    assert len(words(held_out) - words(taught)) >= 5
    asks = {sentence: i.target for i in INSTRUCTIONS.values() for sentence in (*i.taught, *i.held_out)}
    assert all(asks[sentence] == i.target for i in INSTRUCTIONS.values() for sentence in (*i.taught, *i.held_out))
    for name, instruction in INSTRUCTIONS.items():
        assert len(set(instruction.taught)) >= 20 and len(set(instruction.held_out)) >= 5, name


def test_training_draws_taught_sentences_only():
    """Every kind of them; a combination is two sentences of the taught combinations."""
    rng, taught, seen = np.random.default_rng(0), instructions.taught_sentences(), set()
    for _ in range(3000):
        told = instructions.draw(rng)
        seen.add(told.name)
        if told.name == "garbled":
            continue
        assert told.target == instructions.target(told.name) and told.split == "taught"
        assert not instructions.is_held_out(told.name, told.sentence)
        parts = re.findall(r"[^.?]+[.?]", told.sentence)
        assert {part.strip() for part in parts} <= taught
        assert len(parts) == (2 if told.name in instructions.COMBINATIONS else 1)
    for _ in range(3000):  # said as somebody else might: the same words but for small ones, and nothing held out
        told = instructions.draw(rng, varied_share=1.0)
        assert not instructions.is_held_out(told.name, told.sentence)
        assert told.name == "garbled" or words([told.sentence]) - instructions.SMALL_WORDS <= words(taught)
    assert instructions.is_held_out("slow left", "Keep left. slow and careful please.")
    assert instructions.is_held_out("slow right", "Drive slowly. Keep right.")
    assert instructions.is_held_out("speed forty-five", "Drive at forty-five.")
    simple = {"race", "slow", "left", "middle", "right", "stop", "chatter", "garbled"}
    assert seen == simple | {f"speed {word}" for word in instructions.SPEEDS} | instructions.COMBINATIONS
    assert not instructions.COMBINATIONS & instructions.HELD_OUT_COMBINATIONS
    assert not instructions.SPEEDS.keys() & instructions.HELD_OUT_SPEEDS.keys()


def test_the_right_is_the_left_mirrored():
    left, right = INSTRUCTIONS["left"], INSTRUCTIONS["right"]
    assert right.target == Target(side=SIDE) and left.target == Target(side=-SIDE)
    assert {"Right, please.", "The left lane is closed."} <= set(right.taught)
    assert instructions.mirrored(right.taught) == left.taught


def test_a_side_is_more_often_named_than_the_other_one():
    rng = np.random.default_rng(0)
    said = [instructions.phrase("right", rng) for _ in range(2000)]
    indirect = np.mean(["left" in instructions.without_marks(sentence).split() for sentence in said])
    phrasings = INSTRUCTIONS["right"].taught
    evenly = np.mean(["left" in instructions.without_marks(sentence).split() for sentence in phrasings])
    assert 0.35 < evenly < 0.5 and 0.15 < indirect < 0.3 and set(said) == set(phrasings)


def test_the_wish_is_the_simplest_phrasing():
    said = {
        name: instructions.wish(name) for name in ("left", "stop", "speed thirty", "slow right", "chatter", "garbled")
    }
    assert [*said.values()] == [
        "Keep left.", "Stop.", "Drive at speed thirty.", "Drive slowly. Keep right.", "Nothing.", "Nothing.",
    ]  # fmt: skip


def test_it_fits_if_speed_and_offset_are_told_as_wanted():
    slow_left = Target(20.0, -SIDE)
    for speed, offset, answer in (
        (20, -3, "Yes."),
        (22, -4.1, "Yes."),
        (23, -2.2, "The car is too fast."),
        (17, -1.8, "The car is too far right. The car is too slow."),
        (-9, -6, "The car is too far left. The car is too slow."),
    ):
        assert instructions.fit(slow_left, speed, offset) == answer, (speed, offset)
    assert instructions.fit(RACE, 80, 9) == "Yes." and instructions.fit(Target(speed=0.0), -9, 9) == "Yes."


def test_targets_measure_speed_and_side():
    slow_left = instructions.target("slow left")
    assert slow_left == Target(20.0, -SIDE)
    assert slow_left.at_speed(np.array([14, 15, 25, 26])).tolist() == [False, True, True, False]
    assert slow_left.on_side(np.array([-0.1, 0.1])).tolist() == [True, False]
    assert Target(side=0.0).on_side(np.array([-2.0, 2.5])).tolist() == [True, False]
    assert Target(speed=0.0).at_speed(np.array([1.9, 2.1])).tolist() == [True, False]
    assert RACE.at_speed(np.array([3.0])).all() and RACE.on_side(np.array([9.0])).all()
    assert [Target(speed=20.0).speed_error(x) for x in (20, 40, 100, 120)] == pytest.approx([0, 0.5, 1, 1])
    assert [Target(side=0.0).side_error(x) for x in (0, 3, -9)] == pytest.approx([0, 0.5, 1])
    encoded = [target.encode().tolist() for target in (RACE, Target(speed=0.0), Target(25.0, SIDE))]
    assert encoded == [[0, 0, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0.5, 0, 1, 1]]


@pytest.mark.parametrize(
    "target, speed, offset, on_road, travelled, obeyed",
    [
        (Target(speed=20.0), [20] * 8 + [40] * 2, 0, 1, 20, True),
        (Target(speed=20.0), [20] * 7 + [40] * 3, 0, 1, 20, False),
        (Target(speed=20.0), [20] * 10, 0, 0, 20, False),  # on the grass
        (Target(20.0, SIDE), [20] * 10, 3, 1, 20, True),
        (Target(20.0, SIDE), [20] * 10, -3, 1, 20, False),
        (Target(speed=0.0), [0] * 10, 0, 0, 0, True),
        (Target(speed=0.0), [0] * 9 + [3], 0, 1, 0, False),
        (Target(speed=20.0), [20] * 10, 0, 1, -20, False),  # the wrong way
        (RACE, [60] * 10, 0, 1, 50, True),
        (RACE, [60] * 10, 0, 1, -50, False),  # the wrong way
    ],
)
def test_obeyed(target, speed, offset, on_road, travelled, obeyed):
    drive = np.array(speed, float), np.full(10, float(offset)), np.full(10, bool(on_road))
    assert target.obeyed(*drive, travelled) == obeyed


def scene_of(seed=None, **known):
    """A state and road: at rest in the middle of a straight road, but for what is `known`; random with a `seed`."""
    state, track = np.zeros(STATE_SIZE, np.float32), np.zeros((300, 4))
    if seed is not None:
        rng = np.random.default_rng(seed)
        state = rng.normal(0, 0.7, STATE_SIZE).astype(np.float32)
        state[8:12] = rng.random(4) < 0.6
        track[:, 1] = np.cumsum(rng.normal(0, 0.1, 300))
    else:
        state[8:12], state[14] = 1, 1
    for place, x in known.items():
        if place == "heading":
            track[4:, 1] = np.radians(x)
        else:
            state[int(place[1:])] = x
    return state, SimpleNamespace(track=track, tile=0)


@pytest.mark.parametrize(
    "about, sentence, known",
    [
        ("speed", "The car stands still.", {}),
        ("speed", "The car drives at speed forty-five.", {"s0": 0.9}),
        ("offset", "The car is in the middle.", {}),
        ("offset", "The car is one pace left of the middle.", {"s12": -0.1}),
        ("offset", "The car is three paces right of the middle.", {"s12": 0.33}),
        ("heading", "The car points along the road.", {}),
        ("heading", "The car points twenty degrees to the left.", {"s13": -0.36}),
        ("heading", "The car points backwards.", {"s14": -1.0}),
        ("grass", "No, all wheels are on the road.", {}),
        ("grass", "One wheel is on the grass.", {"s8": 0.0}),
        ("bend", "The road goes straight on.", {}),
        ("bend", "The road bends gently to the left.", {"heading": 14}),
        ("bend", "The road bends sharply to the right.", {"heading": -30}),
        ("turning", "The car turns quickly to the left.", {"s2": 0.6}),
    ],
)
def test_the_scene_in_sentences(about, sentence, known):
    assert questions.describe(*scene_of(**known))[about] == sentence


def test_numbers_in_words():
    expected = {0: "zero", 13: "thirteen", 20: "twenty", 21: "twenty-one", 90: "ninety", 250: "one hundred"}
    assert {n: questions.number(n) for n in expected} == expected
    assert len({questions.number(n) for n in range(101)}) == 101
