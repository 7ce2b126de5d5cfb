"""Open a page, watch it drive and talk to it.

Reads the published policy (or POLICY), its adapter and the teacher; writes nothing. Wants the packages of
requirements-demo.txt.

    python demo.py      # prints an address and opens it in the browser; Ctrl-C ends it

The page (page/) and its server (support/web.py) talk over one WebSocket a visitor. The server sends what happens, a
JSON object per decision with a picture of each drive; the visitor sends objects with one key, COMMANDS. Each visitor
has a `Session`: one or two drives on one track, in a thread of its own, which share the model.
"""

import base64
import contextlib
import functools
import gc
import io
import json
import queue
import random
import re
import threading
import time

import torch
from PIL import Image

import evaluate
import film
import instructions
import questions
from car_racing_env import BRAKE, FPS, FRAME_SKIP, GAS, LEFT, RIGHT
from GitText2ActionWithPrompt import ANSWERS, GitText2ActionWithPrompt, answer_of, differs, unknown_words
from phrasings import INSTRUCTIONS
from support import checks, web
from targets import RACE

HOST = "127.0.0.1"  # this machine only; "0.0.0.0" lets others in
PORT = 0  # 0: a free one
OPEN_BROWSER = True
POLICY = "results/published/policy"
TRACK = 100_000  # the first one shown
MAX_SESSIONS = 4  # visitors at a time; the next one is told to wait
MAX_TEXT = 200  # characters of a sentence or a question
JPEG_QUALITY = 80
SPEEDS = ("ten", "thirty", "fifty")  # that can be said by a click; others are typed

KEYS = {"ArrowLeft": LEFT, "ArrowRight": RIGHT, "ArrowUp": GAS, "ArrowDown": BRAKE}
SENTENCES = {  # what a visitor may have typed, for the teacher, which reads no words
    instructions.without_marks(sentence): instruction.target
    for instruction in INSTRUCTIONS.values()
    for sentence in instruction.taught + instruction.held_out
}


def is_text(value):
    """Whether it is a short text; a lone surrogate is none and cannot be sent back."""
    return type(value) is str and len(value) <= MAX_TEXT and not re.search("[\ud800-\udfff]", value)


COMMANDS = {  # what a visitor may send, and which values
    "say": is_text,
    "ask": is_text,
    "drivers": lambda names: type(names) is list and 1 <= len(names) <= 2 and all(x in [*DRIVERS] for x in names),
    "track": lambda track: type(track) is int and 0 <= track < 2**31,
    "restart": lambda value: value is True,
    "pause": lambda paused: type(paused) is bool,
    "keys": lambda keys: type(keys) is list and len(keys) <= len(KEYS) and all(x in [*KEYS] for x in keys),
    "attention": lambda shown: type(shown) is bool,
    "seen": lambda value: value is True,
}


class You:
    """A visitor with the arrow keys; keys held together take turns, for the simulator takes one action at a time.

    `keys` are those that are down, a list that the session changes.
    """

    told = ""

    def __init__(self, keys):
        self.keys, self.turn = keys, 0

    def __call__(self, frames, infos):
        self.turn += 1
        return [KEYS[self.keys[self.turn % len(self.keys)]] if self.keys else 0]


DRIVERS = {  # name: what the page calls it, and how it is made of the model and the visitor's keys
    "policy": ("the model after PPO", lambda model, keys: evaluate.Policy(model)),
    "answers": ("the model's answers alone", lambda model, keys: evaluate.Answers(model)),
    "teacher": ("the teacher", lambda model, keys: evaluate.Teacher()),
    "random": ("random actions", lambda model, keys: evaluate.Random(random.randrange(2**31))),
    "you": ("you, with the arrow keys", lambda model, keys: You(keys)),
}


class Drive(film.Drive):
    """A drive as the page shows it."""

    def __init__(self, name, model, keys, track):
        super().__init__(DRIVERS[name][1](model, keys), track)
        self.name, self.facts = name, {}

    def tell(self, sentence):
        """Put an instruction in force."""
        target = SENTENCES.get(instructions.without_marks(sentence), RACE)
        self.driver.told = target if self.name == "teacher" else sentence

    def advance(self):
        """One decision, unless the episode has ended."""
        if self.end:
            return
        action, answer, probabilities = self.decide()
        self.facts = {"answer": answer, "action": answer_of(action, probabilities), "probabilities": probabilities}
        self.facts["differs"] = differs(answer, action)
        self.step(action)

    def show(self, attention):
        """What the page shows of it: a dict for JSON."""
        base = self.env.unwrapped
        jpeg = io.BytesIO()
        Image.fromarray(self.picture(attention)).save(jpeg, "JPEG", quality=JPEG_QUALITY)
        return self.facts | {
            "driver": self.name,
            "picture": base64.b64encode(jpeg.getvalue()).decode(),
            "speed": round(self.speed, 1),
            "return": round(self.total, 1),
            "lap": round(base.tile_visited_count / len(base.track), 3),
            "scene": self.scene,
            "end": self.end,
        }


class Session(threading.Thread):
    """One visitor's drives: a thread at the simulator's pace that obeys `commands` between two decisions.

    `send` is called from it with what the page shall know, a dict, and at the end with None.
    """

    def __init__(self, model, send):
        super().__init__(daemon=True)
        self.model, self.send, self.commands, self.ended = model, send, queue.SimpleQueue(), threading.Event()
        self.names, self.track, self.told, self.paused, self.attention = ["policy"], TRACK, "", False, False
        self.drives, self.keys, self.again = [], [], True

    def run(self):
        torch.set_num_threads(1)
        try:
            self.drive()
        finally:
            self.close()
            self.send(None)

    def drive(self):
        """Until the visitor has gone."""
        due = time.monotonic()
        while not self.ended.is_set():
            changed = self.obey()
            if self.again:
                self.begin()
            if not self.paused:
                for drive in self.drives:
                    drive.advance()
            if changed or not self.paused:
                shown = [drive.show(self.attention) for drive in self.drives]
                self.send({"drives": shown, "track": self.track, "told": self.told, "paused": self.paused})
            over = all(drive.end for drive in self.drives)
            due = max(due + FRAME_SKIP / FPS * (5 if over else 1), time.monotonic())
            time.sleep(max(0.0, due - time.monotonic()))

    def close(self):
        """End the simulators, each a cycle of references that Python would collect late."""
        for drive in self.drives:
            drive.env.close()
        self.drives = []
        gc.collect()

    def begin(self):
        """Put the drivers at the start of the track."""
        self.close()
        self.drives, self.again = [Drive(name, self.model, self.keys, self.track) for name in self.names], False
        self.tell(self.told)

    def tell(self, sentence):
        self.told = sentence
        for drive in self.drives:
            drive.tell(sentence)

    def obey(self):
        """Do what the visitor has sent; returns whether anything came.

        Several that begin anew do it once, afterwards.
        """
        changed = False
        while not self.ended.is_set() and not self.commands.empty():
            (command, value), changed = self.commands.get(), True
            getattr(self, f"do_{command}")(value)
        return changed

    def do_say(self, text):
        text = text.strip()
        problem = self.problem(text)
        if not problem:
            self.tell(text)
        self.send({"note": problem or self.remark(text)})

    def do_ask(self, text):
        reads = [drive for drive in self.drives if drive.reads]
        if not reads:
            reply, by = "None of these drivers can answer questions.", ""
        elif reply := self.problem("", text):
            by = ""
        else:
            reply = reads[0].ask(text)
            by = DRIVERS[reads[0].name][0] if len(self.drives) > 1 else ""
        speed = round(reads[0].speed) if reads else None
        self.send({"asked": text, "speed": speed, "reply": reply, "by": by, "note": self.unknown(text)})

    def do_drivers(self, names):
        self.names, self.again = names, True
        self.send({"note": self.remark(self.told)})

    def do_track(self, track):
        self.track, self.again = track, True

    def do_restart(self, _):
        self.again = True

    def do_pause(self, paused):
        self.paused = paused

    def do_attention(self, attention):
        self.attention = attention

    def do_keys(self, keys):
        self.keys[:] = keys

    def problem(self, instruction, question=None):
        """Why the model cannot read an instruction or question, or ""."""
        try:
            self.model.prompts(instruction, 1, question=question)
        except checks.BadInput as error:
            return f"{str(error).capitalize()}."
        return ""

    def remark(self, text):
        """What a visitor should know of a sentence that is in force, or ""."""
        said = [self.unknown(text)]
        if "teacher" in self.names and text and instructions.without_marks(text) not in SENTENCES:
            said.append("The teacher reads no words and knows the sentences of phrasings.py only: it races.")
        return " ".join(filter(None, said))

    def unknown(self, text):
        """Which words of a text the model does not know, as a sentence, or ""."""
        words = unknown_words(self.model.processor.tokenizer, text)
        return f"Not in its vocabulary: {', '.join(words)}." if words else ""


def understand(message):
    """The command and its value in a visitor's message; NotUnderstood for anything that the page does not send."""
    try:
        ((command, value),) = json.loads(message).items()
    except (ValueError, AttributeError, RecursionError):
        raise web.NotUnderstood from None
    if command not in COMMANDS or not COMMANDS[command](value):
        raise web.NotUnderstood
    return command, value


def welcome():
    """What the page needs to know first: what can be chosen, said and asked."""
    shown = [name for name in INSTRUCTIONS if instructions.kind(name) not in ("chatter", "speed")]
    shown += [f"speed {word}" for word in SPEEDS]
    return {
        "drivers": {name: title for name, (title, _) in DRIVERS.items()},
        "answers": list(ANSWERS),
        "instructions": [INSTRUCTIONS[name].taught[0] for name in shown],
        "questions": [wordings[0] for wordings in questions.QUESTIONS.values()],
        "max_text": MAX_TEXT,
    }


def make_server(model):
    """The server for the page, not started yet."""
    app = web.make_app(functools.partial(Session, model), understand, welcome(), MAX_SESSIONS)
    return web.Server(app, HOST, PORT, OPEN_BROWSER)


def serve():
    """Load the policy and serve the page until Ctrl-C."""
    torch.set_num_threads(1)
    server = make_server(GitText2ActionWithPrompt.from_policy(POLICY))
    gc.freeze()  # the collection after a visit, 0.3 s with all that the libraries made, need not look at what stays
    with contextlib.suppress(KeyboardInterrupt):  # the way to end it
        server.run()


if __name__ == "__main__":
    checks.run(serve)
