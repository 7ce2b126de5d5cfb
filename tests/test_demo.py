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

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update --disable-sync"


PICTURES = None  # ROOT / "results/published": keep the screenshots that README and docs/ show


def wait_for(condition, seconds=10):
    """The first true value of `condition`."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} seconds")


@contextlib.contextmanager
def serving(model, **constants):
    """The address of a server and its set of sessions."""
    demo = edit("demo", OPEN_BROWSER=False, **constants)
    server = demo.make_server(model)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield server.address, server.config.app.state.sessions
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


class Visitor:
    """What the page does, without a page."""

    def __init__(self, address):
        self.socket = connect(address.replace("http", "ws") + "/drive")
        self.welcome = json.loads(self.socket.recv(timeout=10))

    def send(self, command, value):
        self.socket.send(json.dumps({command: value}))

    def get(self, *names, looks=400):
        """The next message with one of the keys `names`; pictures are seen."""
        for _ in range(looks):
            message = json.loads(self.socket.recv(timeout=20))
            if "drives" in message:
                self.send("seen", True)
            if set(names) & message.keys():
                return message
        raise AssertionError(f"no message with {names}")


@pytest.mark.parametrize(
    "message",
    ["", "7", "[]", "null", "{}", "{", "[" * 3000, '{"say": 1}', '{"say": "a", "ask": "b"}', '{"run": "ls"}', '{"say": "%s"}' % ("a" * 201),
     '{"drivers": []}', '{"drivers": ["policy", "policy", "policy"]}', '{"drivers": [["policy"]]}', '{"track": -1}', '{"track": 1e9}',
     '{"track": true}', '{"keys": ["Enter"]}', '{"pause": 1}', '{"__class__": true}'],
)  # fmt: skip
def test_a_message_that_the_page_does_not_send_is_not_understood(message):
    demo = edit("demo")
    with pytest.raises(demo.NotUnderstood):
        demo.understand(message)


def test_what_a_visitor_does(toy_model):
    with serving(toy_model, MAX_SESSIONS=2) as (address, sessions):
        visitor = Visitor(address)
        assert {"policy", "you"} <= visitor.welcome["drivers"].keys() and "Stop." in visitor.welcome["instructions"]
        first, second = (visitor.get("drives")["drives"][0] for _ in range(2))
        assert first["picture"] != second["picture"] and second["answer"] and len(second["probabilities"]) == 5
        visitor.send("say", "  <b>Keep left, wagon!</b> ")
        assert visitor.get("unknown")["unknown"] == ["wagon"]
        assert visitor.get("drives")["told"] == "<b>Keep left, wagon!</b>"
        visitor.send("say", "xq " * 66)
        assert "tokens" in visitor.get("note")["note"] and "wagon" in visitor.get("drives")["told"]
        visitor.send("ask", "How fast is the car?")
        assert visitor.get("asked").keys() == {"asked", "reply", "unknown"}
        visitor.send("track", 7), visitor.send("drivers", ["you", "teacher"]), visitor.send("keys", ["ArrowUp"])
        told = wait_for(
            lambda: (
                (x := visitor.get("drives"))["track"] == 7
                and len(x["drives"]) == 2
                and x["drives"][0]["speed"] > 15
                and x
            )
        )
        assert [drive["driver"] for drive in told["drives"]] == ["you", "teacher"] and told["drives"][1]["speed"] > 15
        assert told["drives"][0]["answer"] is None
        visitor.send("pause", True)
        paused = wait_for(lambda: (x := visitor.get("drives"))["paused"] and x)
        visitor.send("attention", True)
        assert visitor.get("drives")["drives"][0]["return"] == paused["drives"][0]["return"]


def test_one_session_does_not_disturb_another(toy_model):
    """A message that is not understood closes its own; a closed one ends its thread; the one too many waits."""
    with serving(toy_model, MAX_SESSIONS=2) as (address, sessions):
        calm = Visitor(address)
        for hostile in ("{", "x" * 10_000, b"\x00\xff", json.dumps({"say": "a" * 201})):
            other = Visitor(address)
            wait_for(lambda: len(sessions) == 2)
            assert "full" in Visitor(address).welcome
            other.socket.send(hostile)
            with pytest.raises(ConnectionClosed):
                for _ in range(1000):
                    other.socket.recv(timeout=10)
            wait_for(lambda: len(sessions) == 1, 5)
        assert calm.get("drives") and len([x for x in threading.enumerate() if type(x).__name__ == "Session"]) == 1
        calm.socket.close()
        wait_for(lambda: not sessions, 5)


def test_a_page_that_does_not_keep_up_gets_fewer_pictures(toy_model):
    with serving(toy_model) as (address, _):
        slow, returns = Visitor(address), []
        for _ in range(2):
            message = json.loads(slow.socket.recv(timeout=10))
            returns.append(message["drives"][0]["return"])
            with pytest.raises(TimeoutError):
                slow.socket.recv(timeout=0.5)
            slow.send("seen", True)
        assert returns[0] != returns[1]


@pytest.fixture
def browser():
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine")
    with sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield chromium
        chromium.close()


def test_the_page(browser, tmp_path):
    """As a visitor uses it, with the shipped policy; screenshots of it are what the README shows."""
    model = GitText2ActionWithPrompt.from_policy(ROOT / "results/published/policy")
    with serving(model) as (address, sessions):
        page, errors = browser.new_page(viewport={"width": 1180, "height": 860}), []
        (
            page.on("pageerror", lambda error: errors.append(error)),
            page.on("console", lambda line: errors.append(line.text)),
        )
        page.on(
            "request",
            lambda request: (
                errors.append(request.url) if address not in request.url and "data:" not in request.url else None
            ),
        )
        page.goto(address)

        def speed():
            return float(page.inner_text(".speed"))

        def say(text):
            page.fill("#sentence", text), page.keyboard.press("Enter")

        page.wait_for_selector(".drive img[src]")
        before = page.get_attribute(".drive img", "src")
        wait_for(lambda: speed() > 30 and page.get_attribute(".drive img", "src") != before)
        other = browser.new_page()
        other.goto(address)
        say("Stop.")
        wait_for(lambda: speed() < 2, 3)
        assert page.inner_text("#told") == "Stop." and page.inner_text(".answer") == "Brake"
        other.wait_for_selector(".drive img[src]")
        assert other.inner_text("#told") == "nothing"
        wait_for(lambda: float(other.inner_text(".speed")) > 30)
        page.fill("#question", "How fast is the car?"), page.keyboard.press("Enter")
        page.wait_for_selector("#replies dd")
        assert page.inner_text("#replies dd") == "The car stands still."
        say("Drive on.")
        wait_for(lambda: speed() > 10)
        say("<script>document.title = 'hurt'</script>")
        wait_for(lambda: page.inner_text("#told").startswith("<script>"))
        assert "hurt" not in page.title() and "script" in page.inner_text("#unknown")
        page.click("text=Keep left.")
        wait_for(lambda: page.inner_text("#told") == "Keep left.")
        wait_for(lambda: page.inner_text("#told") == "Keep left." and speed() > 35)
        page.screenshot(path=(PICTURES or tmp_path) / "page_drive.png")
        page.fill("#track", "100003"), page.keyboard.press("Enter")
        page.click("text=Drive against it")
        wait_for(lambda: len(page.query_selector_all(".drive")) == 2 and speed() < 1)
        assert page.input_value("#track") == "100003" and page.input_value("#first") == "you"
        page.keyboard.down("ArrowUp")
        wait_for(lambda: speed() > 20)
        page.keyboard.up("ArrowUp")
        page.set_viewport_size({"width": 390, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.close(), other.close()
        wait_for(lambda: not sessions, 5)
        assert not errors


def test_two_drivers_side_by_side(browser, tmp_path):
    """The answers alone lose the road, the policy drives on: each sees its own pictures."""
    model = GitText2ActionWithPrompt.from_policy(ROOT / "results/published/policy")
    with serving(model, TRACK=100_066) as (address, _):
        page = browser.new_page(viewport={"width": 1180, "height": 860})
        page.goto(address)
        page.click("#compare")
        wait_for(lambda: len(page.query_selector_all(".drive")) == 2)

        def laps():
            return [float(x.rstrip(" %")) for x in page.locator(".lap").all_inner_texts()]

        wait_for(lambda: laps()[1] > laps()[0] + 3, 60)
        page.screenshot(path=(PICTURES or tmp_path) / "page_compare.png")
