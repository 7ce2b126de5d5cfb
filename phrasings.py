"""The sentences: how each instruction may be said to the car, and the plain question in other words.

To add an instruction, add one entry to INSTRUCTIONS: its target, and how it is said. instructions.py draws from them.

Language has splits as tracks have: `taught` phrasings are for stages 1 to 3; `held_out` ones, HELD_OUT_SPEEDS,
HELD_OUT_COMBINATIONS and HELD_OUT_WORDINGS are for measuring only: never said as something to obey. As answers about
the scene the model knows the held-out speeds and two of the phrasings, "The car drives at speed" and "The car stands
still".
"""

import re
from typing import NamedTuple

import questions
from targets import RACE, SIDE, Target


class Instruction(NamedTuple):
    """A target, the sentences that ask for it, and how often it is drawn, relative to the others."""

    target: Target
    taught: tuple
    held_out: tuple
    weight: float = 0.12


def sentences(text):
    """The sentences of a block, each with its mark at the end."""
    return tuple(" ".join(sentence.split()) for sentence in re.findall(r"[^.?!]+[.?!]?", text.strip()))


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
        weight=0.03,
    ),
}
INSTRUCTIONS["right"] = Instruction(
    Target(side=SIDE), mirrored(INSTRUCTIONS["left"].taught), mirrored(INSTRUCTIONS["left"].held_out)
)

SPEEDS = {questions.number(x): float(x) for x in (10, 15, 20, 22, 28, 30, 32, 35, 38, 40, 42, 48, 50)}
HELD_OUT_SPEEDS = {"twenty-five": 25.0, "forty-five": 45.0}  # taught as what the car does, not as what is wanted
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
        weight=0.0 if word in HELD_OUT_SPEEDS else 0.02,
    )

# a speed and a side: one sentence for each, in either order; "slow right" asks for what "speed twenty right", taught,
# does
HELD_OUT_COMBINATIONS = {"slow right", "speed thirty left", "speed forty middle"}
COMBINATIONS = {
    f"{speed} {side}"
    for speed in ("slow", *(f"speed {word}" for word in SPEEDS))
    for side in ("left", "middle", "right")
} - HELD_OUT_COMBINATIONS

# the plain question in other words; the last is empty: who asks nothing wants nothing else
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
