"""The page's server: its messages and its sessions."""

import asyncio
import contextlib
import json
import threading
import time

import pytest
from conftest import edit
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from support.web import Latest, NotUnderstood


def wait_for(condition, seconds=30):
    """The first true value of `condition`."""
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, f"not within {seconds} seconds"
        time.sleep(0.02)
    return found


@contextlib.contextmanager
def serving(model, **constants):
    """The address of a server and its set of sessions."""
    server = edit("demo", OPEN_BROWSER=False, **constants).make_server(model)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: hasattr(server, "address"))
        yield server.address, server.config.app.state.sessions
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.parametrize(
    "message",
    ["", "7", "[]", "null", "{}", "{", "[" * 3000, '{"say": 1}', '{"say": "a", "ask": "b"}', '{"run": "ls"}',
     '{"say": "%s"}' % ("a" * 201), '{"drivers": []}', '{"drivers": ["policy", "policy", "policy"]}',
     '{"drivers": [["policy"]]}', '{"track": -1}', '{"track": 1e9}', '{"track": true}', '{"keys": ["Enter"]}',
     '{"pause": 1}', '{"__class__": true}', '{"say": "\\ud800"}'],
)  # fmt: skip
def test_a_message_that_the_page_does_not_send_is_not_understood(message):
    demo = edit("demo")
    with pytest.raises(NotUnderstood):
        demo.understand(message)


def test_what_a_visitor_is_told(toy_model):
    """The teacher obeys the sentences it knows, in any spelling; others are remarked on, as are unknown words."""
    said = []
    session = edit("demo").Session(toy_model, said.append)
    session.do_drivers(["teacher"])
    session.begin()
    for sentence, speed, note in (("drive at 20", 20, False), ("Brabbel.", None, True), ("", None, False)):
        session.do_say(sentence)
        assert session.drives[0].driver.told.speed == speed and bool(said[-1]["note"]) == note, sentence
    session.do_ask("How fast is the car?")
    assert said[-1]["reply"] and not said[-1]["by"]
    session.do_drivers(["you", "policy"])
    session.do_keys(["ArrowUp"])
    session.begin()
    assert session.drives[0].driver(None, None) == [3]
    session.do_ask("How fast is the car?")
    assert "PPO" in said[-1]["by"] and session.told == "" and not said[-1]["note"]
    for question, unknown in (("Стоп?", "стоп"), ("How far is 150?", "150")):
        session.do_ask(question)
        assert said[-1]["note"].endswith(f" {unknown}.") and session.told == ""
    session.do_say("left " * 100)
    assert "token" in said[-1]["note"] and session.told == ""
    session.do_say("Slow down and keep left.")
    assert not said[-1]["note"]
    session.do_drivers(["policy", "teacher"])  # who reads no such sentence
    assert "teacher" in said[-1]["note"]
    session.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_drive_that_fails_ends_its_session(toy_model, monkeypatch):
    with serving(toy_model) as (address, sessions):
        monkeypatch.setattr(toy_model, "answer", lambda *_: 1 / 0)
        socket, _ = drive(address)
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(timeout=30)
        assert closed.value.rcvd.code == 1011
        wait_for(lambda: not sessions, 10)


def test_a_slow_page_gets_all_notes_and_the_last_picture():
    """And no other before it has seen that one."""
    notes, pictures = [{"note": i} for i in range(2)], [{"drives": [i]} for i in range(3)]

    async def visit():
        latest = Latest(asyncio.get_running_loop())
        for message in (pictures[0], notes[0], pictures[1], notes[1]):
            latest.put(message)
        got = [await latest.get() for _ in range(3)]
        latest.put(pictures[2])
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(latest.get(), 0.2)
        latest.was_seen()
        return [*got, await latest.get()]

    assert asyncio.run(visit()) == [*notes, *pictures[1:]]


def drive(address):
    """A visitor without a page, and what it is told first."""
    socket = connect(address.replace("http", "ws") + "/drive")
    return socket, json.loads(socket.recv(timeout=10))


def test_one_session_does_not_disturb_another(toy_model):
    """A message that is not understood closes its own; a closed one ends its thread; the one too many waits.

    A page that does not say what it has seen gets no further picture.
    """
    with serving(toy_model, MAX_SESSIONS=2) as (address, sessions):
        calm, _ = drive(address)
        flood = [json.dumps({"ask": "How fast is the car?"})] * 1000
        for hostile in (["{"], ["x" * 10_000], [b"\x00\xff"], [json.dumps({"say": "a" * 201})], flood):
            other, _ = drive(address)
            wait_for(lambda: len(sessions) == 2)
            assert "full" in drive(address)[1]
            with pytest.raises(ConnectionClosed):
                for message in hostile:
                    other.send(message)
                for _ in range(1000):
                    other.recv(timeout=10)
            wait_for(lambda: len(sessions) == 1, 5)
        assert len([x for x in threading.enumerate() if type(x).__name__ == "Session"]) == 1
        first = calm.recv(timeout=10)
        with pytest.raises(TimeoutError):
            calm.recv(timeout=0.5)
        calm.send('{"seen": true}')
        assert json.loads(calm.recv(timeout=10))["drives"] != json.loads(first)["drives"]
        calm.close()
        wait_for(lambda: not sessions, 5)
