"""The page of demo.py: its messages, its sessions, and the page itself in Chromium, if there is one."""

import contextlib
import json
import shutil
import threading
import time

import pytest
from conftest import edit
from playwright.sync_api import sync_playwright
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from GitText2ActionWithPrompt import GitText2ActionWithPrompt
from support.run_files import ROOT
from support.web import NotUnderstood

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
PICTURES = None  # ROOT / "results/published": keep the screenshots that README and docs/ show


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
        wait_for(lambda: server.started)
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
    assert "PPO" in said[-1]["by"] and session.told == ""
    session.do_say("left " * 100)
    assert "token" in said[-1]["note"] and session.told == ""
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
        for hostile in ("{", "x" * 10_000, b"\x00\xff", json.dumps({"say": "a" * 201})):
            other, _ = drive(address)
            wait_for(lambda: len(sessions) == 2)
            assert "full" in drive(address)[1]
            other.send(hostile)
            with pytest.raises(ConnectionClosed):
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


@pytest.fixture
def visit():
    """`visit()` opens the page with the shipped policy in Chromium, without errors and without other servers."""
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine")
    model, errors, loaded = GitText2ActionWithPrompt.from_policy(ROOT / "results/published/policy"), [], []
    with serving(model) as (address, sessions), sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)

        def open_page():
            page = chromium.new_page(viewport={"width": 1180, "height": 860})
            page.on("pageerror", lambda error: errors.append(error))
            page.on("console", lambda line: errors.append(line.text))
            page.on("request", lambda request: loaded.append(request.url))
            page.goto(address)
            page.wait_for_selector(".drive img[src]")
            return page

        yield open_page
        chromium.close()
        wait_for(lambda: not sessions, 5)
        assert not errors and all(url.startswith((address, "data:")) for url in loaded)


def speed(page):
    return float(page.inner_text(".speed"))


def enter(page, field, text):
    page.fill(field, text), page.keyboard.press("Enter")


def test_the_page(visit, tmp_path):
    """As a visitor uses it; screenshots of it are what the README shows."""
    page, other = visit(), visit()
    wait_for(lambda: speed(page) > 30 and speed(other) > 30)
    enter(page, "#sentence", "Stop.")
    wait_for(lambda: speed(page) < 2)
    assert page.inner_text("#told") == "Stop." and page.inner_text(".answer") == "Brake"
    assert other.inner_text("#told") == "nothing" and speed(other) > 30
    wait_for(lambda: speed(page) == 0)
    enter(page, "#question", "How fast is the car?")
    page.wait_for_selector("#replies dd")
    assert page.inner_text("#replies dd") == "The car stands still."
    enter(page, "#sentence", "Drive on.")
    wait_for(lambda: speed(page) > 10)
    enter(page, "#sentence", "<script>document.title = 'hurt'</script>")
    wait_for(lambda: page.inner_text("#told").startswith("<script>"))
    assert "hurt" not in page.title() and "script" in page.inner_text("#note")
    page.click("text=Keep left.")
    wait_for(lambda: page.inner_text("#told") == "Keep left." and speed(page) > 35)
    enter(page, "#question", "Where on the road is the car?")
    wait_for(lambda: page.locator("#replies dd").count() == 2)
    page.screenshot(path=(PICTURES or tmp_path) / "page_drive.png")
    enter(page, "#sentence", "xq " * 66)  # more than it can read
    wait_for(lambda: "tokens" in page.inner_text("#note"))
    page.click("#pause")
    page.wait_for_selector("#pause[aria-pressed=true]")
    shown, score = page.get_attribute(".drive img", "src"), page.inner_text(".return")
    page.check("#attention")
    wait_for(lambda: page.get_attribute(".drive img", "src") != shown)
    assert page.inner_text(".return") == score and page.inner_text("#told") == "Keep left."
    page.click("#pause")
    enter(page, "#track", "100003")
    page.click("text=Race it")
    wait_for(lambda: page.locator(".drive").count() == 2 and speed(page) < 1)
    assert page.input_value("#track") == "100003" and page.input_value("#first") == "you"
    page.keyboard.down("ArrowUp")
    wait_for(lambda: speed(page) > 20)
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()
    enter(other, "#track", "100054")
    other.click("#compare")  # the answers alone lose the road, the policy drives on: each sees its own pictures
    wait_for(lambda: other.locator(".drive").count() == 2)
    laps = other.locator(".lap")
    wait_for(lambda: float(laps.nth(1).inner_text()[:-2]) > float(laps.nth(0).inner_text()[:-2]) + 3, 180)
    other.evaluate("scrollTo(0, 0)")
    other.screenshot(path=(PICTURES or tmp_path) / "page_compare.png")
