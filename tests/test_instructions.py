"""What can be said and asked: splits that share no sentence, targets, obedience, and what the scene's sentences say."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

import instructions
import questions
from offline.make_git_tiny import fit
from phrasings import COMBINATIONS, INSTRUCTIONS
from road import STATE_SIZE, read_state
from support.run_files import ROOT
from targets import RACE, SIDE, Target


def words(sentences):
    return {word for sentence in sentences for word in re.findall(r"[a-z]+", sentence.lower())}


def test_held_out_sentences_are_not_taught_and_their_words_are_known():
    """Word for word, small words left out; some words are known from the questions about the scene alone."""
    taught, held_out = instructions.taught_sentences(), instructions.held_out_sentences()
    instructions.check_phrasings()
    rows = map(json.loads, (ROOT / "CarRacing-Data/train/metadata.jsonl").read_text().splitlines())
    asked = [text for row in rows for x in row["asked"] for text in (x["question"], x["text"])]
    assert words(held_out) <= words(taught) | words(asked) | words(map(questions.number, range(101)))
    asks = {sentence: i.target for i in INSTRUCTIONS.values() for sentence in (*i.taught, *i.held_out)}
    for name, i in INSTRUCTIONS.items():
        assert len(set(i.taught)) >= 20 and len(set(i.held_out)) >= 5, name
        assert all(asks[sentence] == i.target for sentence in (*i.taught, *i.held_out)), name
    assert instructions.is_held_out("slow left", "Keep left. slow and careful please.")  # a phrasing
    assert instructions.is_held_out("slow right", "Drive slowly. Keep right.")  # a combination
    assert instructions.is_held_out("speed forty-five", "Drive at forty-five.")  # a speed
    assert instructions.is_held_out("speed forty-five", "As fast as forty-five")  # a speed, by its name
    assert instructions.is_held_out("", "Nice weather. drive at 45")  # or by what is said
    assert not instructions.is_held_out("", "Drive at 4 or at 45.5.")


def test_training_draws_taught_sentences_only():
    """Of every kind; a combination is two of them; varied, they have the same words but for small ones."""
    rng, taught, seen = np.random.default_rng(0), instructions.taught_sentences(), set()
    for told, varied in ((instructions.draw(rng, varied_share=i % 2), i % 2) for i in range(6000)):
        seen.add(told.name)
        assert told.name == "garbled" or told.target == instructions.target(told.name)
        assert not instructions.is_held_out(told.name, told.sentence)
        if varied:
            assert told.name == "garbled" or words([told.sentence]) - instructions.SMALL_WORDS <= words(taught)
        elif told.name != "garbled":
            parts = [part.strip() for part in re.findall(r"[^.?]+[.?]", told.sentence)]
            assert taught.issuperset(parts) and len(parts) == 1 + (told.name in COMBINATIONS)
    assert seen == {"garbled", *INSTRUCTIONS, *COMBINATIONS} - {"speed twenty-five", "speed forty-five"}


def test_targets_measure_speed_and_side():
    """And what the words for them are."""
    slow_left = Target(20.0, -SIDE)
    assert (
        instructions.target("slow left") == slow_left and instructions.wish("slow left") == "Drive slowly. Keep left."
    )
    assert fit(slow_left, 22, -4.1) == "Yes." == fit(RACE, 90, 9)
    assert fit(slow_left, 17, -1) == "The car is too far right. The car is too slow."
    assert slow_left.at_speed(np.array([14, 15, 25, 26])).tolist() == [False, True, True, False]
    assert slow_left.on_side(np.array([-0.1, 0.1])).tolist() == [True, False]
    assert Target(side=0.0).on_side(np.array([-2.0, 2.5])).tolist() == [True, False]
    assert Target(speed=0.0).at_speed(np.array([1.9, 2.1])).tolist() == [True, False]
    assert RACE.at_speed(np.array([3.0])).all() and RACE.on_side(np.array([9.0])).all()
    assert [Target(speed=20.0).speed_error(x) for x in (20, 40, 100, 120)] == pytest.approx([0, 0.5, 1, 1])
    assert [Target(side=0.0).side_error(x) for x in (0, 3, -9)] == pytest.approx([0, 0.5, 1])


@pytest.mark.parametrize(
    "target, speed, offset, on_road, speed_along, obeyed",
    [
        (Target(20.0, SIDE), [20] * 8 + [40] * 2, 3, 1, 20, True),
        (Target(20.0, SIDE), [20] * 7 + [40] * 3, 3, 1, 20, False),
        (Target(speed=20.0), [20] * 10, 0, 0, 20, False),  # on the grass
        (Target(speed=20.0), [20] * 10, 0, 1, -20, False),  # the wrong way
        (Target(20.0, SIDE), [20] * 10, -3, 1, 20, False),
        (Target(speed=0.0), [0] * 10, 0, 0, 0, True),
        (Target(speed=0.0), [0] * 9 + [3], 0, 1, 0, False),
        (RACE, [60] * 10, 0, 1, 50, True),
        (RACE, [60] * 10, 0, 1, 30, False),
    ],
)
def test_obeyed(target, speed, offset, on_road, speed_along, obeyed):
    drive = np.array(speed, float), np.full(10, float(offset)), np.full(10, bool(on_road))
    assert target.obeyed(*drive, speed_along) == obeyed


@pytest.mark.parametrize(
    "state, degrees, expected",
    [
        ({}, 0, {"speed": "stands still", "offset": "is in the middle", "heading": "points along the road"}),
        ({}, 0, {"bend": "goes straight on", "turning": "turns nowhere"}),
        ({0: 0.9, 2: 0.6}, 0, {"speed": "drives at speed forty-five", "turning": "turns quickly to the left"}),
        ({12: -0.1, 13: -0.36}, 0, {"offset": "is one pace left of the", "heading": "twenty degrees to the left"}),
        ({12: 0.33, 14: -1.0}, 0, {"offset": "is three paces right of the middle", "heading": "points backwards"}),
        ({8: 0.0}, 14, {"grass": "One wheel is on the grass", "bend": "bends gently to the left"}),
        ({}, -30, {"grass": "No, all wheels are on the road", "bend": "bends sharply to the right"}),
    ],
)
def test_the_scene_in_sentences(state, degrees, expected):
    """At rest in the middle of the road but for what `state` says; the road turns by some degrees after four tiles."""
    values, track = np.zeros(STATE_SIZE), np.zeros((300, 4))
    values[8:12], values[14], track[4:, 1] = 1, 1, np.radians(degrees)
    values[[*state]] = [*state.values()]
    described = questions.describe(read_state(values), SimpleNamespace(track=track, tile=0))
    assert all(said in described[about] for about, said in expected.items())
