"""Ten seeds: the interval of their mean, and what they say together. Controls without words. Measured drives."""

from types import SimpleNamespace

import numpy as np
import pytest

import evaluate
import ppo_git_with_prompt as ppo
from benchmarks import controls, drives, from_nothing, obedience, recovery, runs, seeds
from GitText2ActionWithPrompt import ANSWERS
from support import run_files
from support.checks import BadInput, read_json
from targets import RACE, SIDE, Target


def test_the_interval_counts_seeds_and_tracks_as_draws():
    """Where seeds and tracks add up, the variance of the mean is the sum of those of their means."""
    rng = np.random.default_rng(0)
    run, track = rng.normal(0, 10, 12), rng.normal(900, 30, 100)
    low, high = seeds.interval(run[:, None] + track)
    deviation = (run.var() / len(run) + track.var() / len(track)) ** 0.5
    assert (high - low) / (2 * 1.96 * deviation) == pytest.approx(1, abs=0.05)
    assert (low + high) / 2 == pytest.approx(run.mean() + track.mean(), abs=1)


def test_few_seeds_are_not_resampled():
    """Three seeds' means by Student's t, its quantile from a table; a single one says nothing of others."""
    returns = np.array([[898.0, 902.0], [904.0, 906.0], [908.0, 912.0]])
    assert seeds.interval(returns) == pytest.approx(
        [905 - 4.302653 * 5 / 3**0.5, 905 + 4.302653 * 5 / 3**0.5], abs=0.01
    )
    assert np.isnan(seeds.interval(returns[:1])).all()


def test_runs_together():
    rows = {seed: {"seed": seed, "mean": 900.0 + seed, "laps_finished_percent": 90.0 + seed} for seed in range(2)}
    for seed, row in rows.items():
        row["below_500_percent"] = 1.0 - seed
        row["returns"] = [900.0 + seed] * 99 + [400.0 + 200 * seed]
    told = seeds.summarize(rows)
    assert told["mean"] == 896.5 and told["seeds"] == {0: 900.0, 1: 901.0} and told["worst_percent"] == [400.0, 600.0]
    assert told["below_500_percent"] == 0.5 and told["laps_finished_percent"] == 90.5


def test_drivers_are_compared_track_by_track():
    assert runs.paired([3, 5, 7], [2, 2, 2]) == pytest.approx((3, 2 / 3**0.5))
    with pytest.raises(ValueError):
        runs.paired([900] * 100, [900])


@pytest.fixture
def captions():
    """Dark frames mean gas and bright ones left, but for stop."""
    rng, data = np.random.default_rng(0), []
    for i in range(32):
        frame, text = rng.integers(0, 100, (96, 96, 3)), ["Accelerate", "Turn left"][i % 2]
        told = [("stop", "Stop.", "Brake"), ("garbled", "Xyz.", text)]
        told = [dict(zip(("instruction", "sentence", "text"), x)) for x in told]
        data.append(((frame + 150 * (i % 2)).astype(np.uint8), {"text": text, "told": told, "asked": []}))
    return data


@pytest.mark.parametrize("arm, rate", [("numbers", 5e-3), ("words", 3e-3)])
def test_a_control_learns_what_it_sees_and_is_told(toy_base, script, captions, arm, rate):
    """The policy does it, with fresh heads and frozen."""
    edited = script("benchmarks/controls", BASE=str(toy_base), EPOCHS=60, BATCH_SIZE=16, LEARNING_RATE=rate)
    model = edited.imitate(arm, captions)()
    stop = edited.in_numbers(Target(speed=0.0)) if arm == "numbers" else "Stop."
    logits, _ = model(np.stack([captions[i % 2][0] for i in range(4)]), ["", "", stop, stop])
    assert [[*ANSWERS][i] for i in logits.argmax(1)] == ["Accelerate", "Turn left", "Brake", "Brake"]
    assert len(model.trained_parameters()) == 8  # the two heads
    assert not any(p.requires_grad for p in model.git.parameters())


def test_every_control_runs_to_its_row_of_the_table(toy_base, script, captions, tmp_path, monkeypatch):
    """All but PPO, whose runs are tested elsewhere."""
    edited = script("benchmarks/controls", BASE=str(toy_base), EPOCHS=1, BATCH_SIZE=16)
    score = {"mean": 900.0, "returns": [900.0] * 3, "laps_finished_percent": 90.0, "constants": {}}

    def run(load, seed, tracks, **_):
        return score | {"seed": seed, "curve": [{"frames": 0, "mean": 900.0}]}, evaluate.Policy(load())

    monkeypatch.setattr(edited.runs, "run", run)
    monkeypatch.setattr(edited.evaluate, "score", lambda *_: score)
    monkeypatch.setattr(edited.stage2, "load_data", lambda: (captions, None))
    monkeypatch.setattr(edited.stage2, "training_folders", list)
    with pytest.raises(BadInput, match="other captions"):  # than those of the runs that are there
        edited.run("words", 0)
    monkeypatch.setattr(edited, "OUTPUT", tmp_path)
    run_files.write_json(tmp_path / "words_seed0.json", {"base_fingerprint": "of another git-tiny"})
    with pytest.raises(BadInput, match="base_fingerprint"):
        edited.main()
    (tmp_path / "words_seed0.json").unlink()
    monkeypatch.setattr(edited.ppo, "MODEL", str(toy_base))
    toy = {"CASES": {"taught": ["stop"], "held_out": ["stop"], "new": []}, "WHEN": 2, "TOLD": 100, "TRACKS": [100_200]}
    for name, x in toy.items():
        monkeypatch.setattr(edited.obedience, name, x)
    rows = {arm: {0: edited.run(arm, 0)} for arm in edited.ARMS}
    assert [("before_ppo" in row, len(row.get("obeyed", []))) for (row,) in map(dict.values, rows.values())] == [
        (True, 2), (True, 0), (True, 1), (False, 2), (True, 2), (True, 0)
    ]  # fmt: skip
    assert all(f"\n| {arm} | " in edited.table(rows) for arm in edited.ARMS)
    edited.draw(rows, tmp_path / "curves.png")


def test_a_run_of_something_else_is_not_taken_for_ours(tmp_path, monkeypatch):
    """Another model, constant or instruction; what the file does not note is not compared."""
    path, ours = tmp_path / "seed0.json", {"adapter_hash": "ours"}
    runs.once(path, lambda: {"constants": {"ppo_git_with_prompt.py": {"GAMMA": ppo.GAMMA}}}, model=ours)
    runs.once(path, None, model=ours)
    with pytest.raises(BadInput, match="seed0.json .* model"):
        runs.once(path, None, model={"adapter_hash": "theirs"})
    with monkeypatch.context() as patch, pytest.raises(BadInput, match="GAMMA"):
        patch.setattr(ppo, "GAMMA", 0.5)
        runs.once(path, None, model=ours)
    run_files.add_to_json(path, {"instructions": "others"})
    with pytest.raises(BadInput, match="instructions"):
        runs.once(path, None, model=ours)


def test_from_nothing_goes_on_after_the_last_script_that_ended(tmp_path, monkeypatch):
    """Each script runs once; one that fails is named and runs again."""
    monkeypatch.setattr(from_nothing, "ROOT", tmp_path)
    monkeypatch.setattr(from_nothing, "SCRIPTS", ("one", "two"))
    (tmp_path / "one.py").write_text("open('ran', 'a').write('1')")
    (tmp_path / "two.py").write_text("raise SystemExit(1)")
    with pytest.raises(BadInput, match="two"):
        from_nothing.main()
    score = {"mean": 900.0, "std": 10.0, "min": 880.0, "laps_finished_percent": 90.0, "returns": []}
    (tmp_path / "two.py").write_text("open('ran', 'a').write('2')")
    run_files.write_json(tmp_path / from_nothing.SCORE, score)
    from_nothing.main()
    made = read_json(tmp_path / from_nothing.OUTPUT)
    assert (tmp_path / "ran").read_text() == "12" and [*made["seconds"]] == ["one", "two"] and made["mean"] == 900
    with pytest.raises(BadInput, match=from_nothing.OUTPUT):
        from_nothing.main()
    run_files.write_json(tmp_path / from_nothing.OUTPUT, {"git_commit": "another", "seconds": {}})
    with pytest.raises(BadInput, match="another"):
        from_nothing.main()


def test_targets_told_in_numbers():
    for target in (RACE, Target(25.0), Target(side=-3.2), Target(0.0), Target(30.0, 0.0)):
        assert controls.read_numbers(controls.in_numbers(target)) == target


def test_a_drive_is_told_and_turned():
    """Two cars with gas until they are told to stop after 40 decisions, the second turned round at that moment."""
    words = SimpleNamespace(answer=lambda frames, told: ["Brake" if told else "Accelerate"] * len(frames))
    results = drives.drive(evaluate.Answers(words), [3, 3], 120, {40: "Stop."}, [0.0, np.pi], 40)
    speed, along = results["speed"], results["along"]
    assert (speed[39] > 20).all() and (speed[-1] < 2).all()
    assert along[38:40] == pytest.approx(speed[38:40], rel=0.1)
    assert along[41, 1] == pytest.approx(-speed[41, 1], rel=0.1) and along[41, 0] > 20
    tiles = results["travelled"]
    assert (tiles[39] > 5).all() and tiles[-1, 1] < tiles[39, 1] and tiles[-1, 0] > tiles[39, 0]
    assert obedience.judge(Target(speed=0.0), results, 40)[0].tolist() == [1, 1]
    with pytest.raises(BadInput, match="told"):
        drives.drive(lambda frames, infos: np.zeros(len(frames), int), [3], 2, {1: "Stop."})


def test_only_progress_along_the_road_after_the_turn_counts(monkeypatch):
    monkeypatch.setattr(recovery, "WHEN", 2)
    tiles = np.array([[9, 0, 0, 8, 0], [9, 0, 0, 8, 0], [-8, 8, 8, 8, 8], [8, 8, 8, 8, 8], [14, -9, 0, 0, 0]])
    driving, short_cuts = np.ones((5, 5), bool), np.zeros((5, 5), int)
    driving[3:, 2], short_cuts[4:, 1], short_cuts[2:, 3] = False, 1, 1  # of the second only after it had come back
    short_cuts[:, 4] = 1  # and of the last before the turn
    results = {"travelled": tiles.cumsum(0), "driving": driving, "short_cuts": short_cuts}
    back, by_short_cut = recovery.came_back(results)
    assert back.tolist() == [False, True, False, True, True]
    assert by_short_cut.tolist() == [False, False, False, True, False]


def test_obedience_is_judged_after_the_grace_and_while_it_drives():
    """Three cars, told something at decision 50: it obeys; too fast for half of what is judged; it leaves the field."""
    driving, left_field, speed = np.ones((215, 3), bool), np.zeros((215, 3), bool), np.full((215, 3), 30.0)
    speed[:175], speed[195:, 1] = 60.0, 60.0  # before and within the grace of 125 decisions, and later
    driving[200:, 2], left_field[200:, 2] = False, True
    results = {"speed": speed, "along": speed, "offset": np.full((215, 3), SIDE), "on_road": np.ones((215, 3), bool)}
    judged = obedience.judge(Target(30.0, SIDE), results | {"driving": driving, "left_field": left_field}, 50)
    assert judged.tolist() == [[1, 0, 0], [1, 0.5, 0], [1, 1, 0]]  # obeyed, at the speed, on the side
