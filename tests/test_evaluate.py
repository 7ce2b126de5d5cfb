"""Drivers, the fixed tracks and what is refused."""

import functools
import os
import shutil
import signal
import subprocess

import numpy as np
import pytest

import car_racing_env
import checks
import collect_captions
import evaluate
import GitText2ActionWithPrompt as model_file


def test_results_do_not_depend_on_the_number_of_environments():
    """The teacher on three tracks, one and two at a time, against a plain loop."""
    teacher = evaluate.Teacher()
    expected, decisions = [], 0
    for track in (100_000, 100_001, 100_002):
        env = collect_captions.PrivilegedState(car_racing_env.make_env(2, draw=False), collect_captions.TILES_AHEAD)
        _, info = env.reset(seed=track)
        total, end = 0.0, ""
        while not end:
            action = int(teacher(None, {"state": info["state"][None]})[0])
            _, reward, terminated, truncated, info = env.step(action)
            total, end = total + reward, car_racing_env.episode_end(terminated, truncated, info)
            decisions += 1
        expected.append((track, pytest.approx(total), end))
    for num_envs in (1, 2):
        asked = []
        driver = lambda frames, infos: asked.append(len(frames)) or teacher(frames, infos)  # noqa: E731, B023
        results = evaluate.evaluate(driver, [100_000, 100_001, 100_002], num_envs, progress=False)
        assert [(r["track_seed"], r["return"], r["end"]) for r in results] == expected
        assert sum(asked) == decisions


def test_summary_of_known_returns():
    results = [{"return": r, "end": e} for r, e in ((900, "lap"), (400, "time"), (920, "lap"), (-120, "field"))]
    summary = evaluate.summarize(results)
    assert summary == {
        "mean": 525.0, "std": round(float(np.std([900, 400, 920, -120])), 2), "median": 650.0, "min": -120.0, "max": 920.0,
        "laps_finished_percent": 50.0, "below_500_percent": 50.0,
    }  # fmt: skip


def test_words_drive_and_nonsense_is_counted(toy_model, monkeypatch):
    monkeypatch.setattr(toy_model, "answer", lambda frames: ["Turn left", "fly away", "Brake"])
    driver = evaluate.Answers(toy_model)
    assert driver(np.zeros((3, 96, 96, 3), dtype=np.uint8), {}).tolist() == [2, 0, 4]
    assert (driver.words, driver.unparsable) == (3, 1)


def test_policy_acts_by_the_simulators_index(toy_model, frames):
    logits = toy_model(frames)[0]
    actions = evaluate.Policy(toy_model)(frames, {})
    names = list(model_file.ANSWERS)
    assert [model_file.ANSWERS[names[i]] for i in logits.argmax(1)] == actions.tolist()


def test_unknown_driver_and_other_frame_skip_are_named(constants, pipeline):
    with pytest.raises(checks.BadInput, match="DRIVER = 'me'"):
        evaluate.load_driver("me")
    constants(evaluate, ADAPTER=str(pipeline.adapter), POLICY=str(pipeline.results / "policy"))
    constants(car_racing_env, FRAME_SKIP=4)
    for driver in ("answers", "policy"):
        with pytest.raises(checks.BadInput, match="FRAME_SKIP = 2, car_racing_env.py has 4"):
            evaluate.load_driver(driver)


def test_the_panel_shows_what_it_is_told():
    blank = evaluate.compose(np.zeros((400, 600, 3), np.uint8), None, "Brake", None, 0, 0)
    full = evaluate.compose(
        np.zeros((400, 600, 3), np.uint8), "Turn left", "Brake", [0.1, 0.2, 0.6, 0.05, 0.05], 50, 300
    )
    assert blank.shape == full.shape == (560, 600, 3)
    assert not blank[:400].any() and (blank[400:] != full[400:]).any()


def test_the_film_can_show_what_the_prompt_attends_to(toy_model, constants):
    constants(car_racing_env, MAX_FRAMES=6)
    plain, red = [], []
    for heat_map, pictures in ((False, plain), (True, red)):
        constants(evaluate, HEAT_MAP=heat_map)
        pictures += [picture for picture, _ in evaluate.drive(evaluate.Policy(toy_model), 100_000)]
    assert len(plain) == len(red) == 3
    for before, after in zip(plain, red):
        assert np.array_equal(before[400:], after[400:])  # the panel stays
        redder = after[:400].astype(int) - before[:400]
        assert redder[..., 0].mean() > 1 > redder[..., 2].mean()


@pytest.fixture(params=["dummy", "x11"])
def screen(request, monkeypatch):
    """SDL's dummy screen, and an X server's where Xvfb is installed."""
    monkeypatch.setenv("SDL_VIDEODRIVER", request.param)
    if request.param == "dummy":
        yield request.param
        return
    if not shutil.which("Xvfb"):
        pytest.skip("needs Xvfb (Debian: apt install xvfb)")
    read, write = os.pipe()
    server = subprocess.Popen(["Xvfb", "-displayfd", str(write), "-screen", "0", "800x700x24"], pass_fds=[write])
    monkeypatch.setenv("DISPLAY", ":" + os.read(read, 20).decode().strip())
    yield request.param
    server.terminate()
    server.wait()


@pytest.mark.parametrize("driver", ["offscreen", "none"])
def test_watching_needs_a_display(driver, monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", driver)
    with pytest.raises(checks.BadInput, match="WATCH = True .*no display .*set it to False"):
        evaluate.check_display()


def test_watching_shows_the_pictures_in_a_window(toy_model, constants, monkeypatch, screen):
    constants(car_racing_env, MAX_FRAMES=6)
    shown = []
    flip = evaluate.pygame.display.flip
    window = evaluate.pygame.display.get_surface
    monkeypatch.setattr(
        evaluate.pygame.display, "flip", lambda: (shown.append(evaluate.pygame.surfarray.array3d(window())), flip())
    )
    drivers = []
    close = evaluate.pygame.display.quit
    monkeypatch.setattr(
        evaluate.pygame.display, "quit", lambda: (drivers.append(evaluate.pygame.display.get_driver()), close())
    )
    evaluate.watch(evaluate.Policy(toy_model), 100_000)
    expected = [picture for picture, _ in evaluate.drive(evaluate.Policy(toy_model), 100_000)]
    assert len(shown) == 3 and drivers == [screen]
    assert all(np.array_equal(a.swapaxes(0, 1), b) for a, b in zip(shown, expected))


def test_closing_ends_workers_that_ignore_terminate():
    """SDL handles SIGTERM while a display is open, and forked workers inherit that."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    envs = car_racing_env.AsyncVectorEnv([functools.partial(evaluate.make_worker_env, 2)] * 2, "DISABLED")
    signal.signal(signal.SIGTERM, before)
    evaluate.close_envs(envs)
    assert not any(worker.is_alive() for worker in envs.processes)
