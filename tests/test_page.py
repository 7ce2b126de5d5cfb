"""The page itself in Chromium, if there is one, as a visitor uses it."""

import shutil

import pytest
from playwright.sync_api import sync_playwright
from test_demo import serving, wait_for

from GitText2ActionWithPrompt import GitText2ActionWithPrompt
from support.run_files import ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
PICTURES = None  # ROOT / "results/published": keep the screenshots that README and docs/ show


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


def lap(page):
    """In percent."""
    return float(page.inner_text(".lap")[:-2])


def coasts(page):
    """Whether its speed stays the same for half a second."""
    before = speed(page)
    page.wait_for_timeout(500)
    return speed(page) == before


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
    page.wait_for_timeout(1000)  # what is shown is rounded, and the model reads bars that fall to zero
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
    page.evaluate("socket.close()")  # the connection is lost: another drive begins, told what was in force
    wait_for(lambda: "not connected" in page.inner_text("#status"))
    wait_for(lambda: lap(page) < 2)
    wait_for(lambda: page.inner_text("#told") == "Keep left." and lap(page) > 3)
    page.click("#restart")
    wait_for(lambda: lap(page) < 2, 5)
    for hidden in ("true", "false"):  # in a tab that nobody sees it waits
        page.evaluate(f"Object.defineProperty(document, 'hidden', {{value: {hidden}, configurable: true}})")
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        page.wait_for_selector(f"#pause[aria-pressed={hidden}]")
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
    page.keyboard.down("Control"), page.keyboard.up("ArrowUp"), page.keyboard.up("Control")  # let go all the same
    wait_for(lambda: coasts(page), 5)
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    brake = page.locator("[data-key=ArrowDown]").first
    brake.dispatch_event("pointerdown")
    wait_for(lambda: speed(page) == 0)
    brake.dispatch_event("pointerup")
    enter(page, "#sentence", "Stop.")  # and the keys drive again
    page.keyboard.down("ArrowUp")
    wait_for(lambda: speed(page) > 20)
    page.keyboard.up("ArrowUp")
    page.close()
    enter(other, "#track", "100054")
    other.click("#compare")  # the answers alone lose the road, the policy drives on: each sees its own pictures
    wait_for(lambda: other.locator(".drive").count() == 2)
    laps = other.locator(".lap")
    wait_for(lambda: float(laps.nth(1).inner_text()[:-2]) > float(laps.nth(0).inner_text()[:-2]) + 3, 180)
    other.evaluate("scrollTo(0, 0)")
    other.screenshot(path=(PICTURES or tmp_path) / "page_compare.png")
