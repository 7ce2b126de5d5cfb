"""The privileged state, the bursts, what an episode becomes, and the loop closed with a PPO policy."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import car_racing_env
import checks
import collect_captions
import GitText2ActionWithPrompt as model_file


def place(env, tile, right, turned=0.0):
    """Put the whole car `right` units beside the middle of a tile, turned to the left by `turned` radians."""
    _, heading, x, y = env.unwrapped.track[tile]
    for body in [env.unwrapped.car.hull, *env.unwrapped.car.wheels]:
        body.position = (x + right * np.cos(heading), y + right * np.sin(heading))
        body.angle = heading + turned
    env.tile = tile


def test_privileged_state_is_in_the_cars_frame():
    env = collect_captions.PrivilegedState(car_racing_env.make_env(2, draw=False), 12)
    env.reset(seed=1)
    place(env, 40, right=2.0, turned=0.3)
    state = env.state()
    assert state.shape == (39,) and state.dtype == np.float32
    assert state[12] == pytest.approx(2.0 / car_racing_env.stock.TRACK_WIDTH, abs=0.01)
    assert np.arctan2(state[13], state[14]) == pytest.approx(-0.3, abs=1e-3)
    points = state[15:].reshape(12, 2) * 20
    x, y = env.unwrapped.car.hull.position
    angle = env.unwrapped.car.hull.angle
    for k, (right, forward) in enumerate(points):  # back to the world: where the track says it is
        world = (
            x + right * np.cos(angle) - forward * np.sin(angle),
            y + right * np.sin(angle) + forward * np.cos(angle),
        )
        assert world == pytest.approx(env.unwrapped.track[41 + k][2:], abs=1e-4)


def test_bursts_take_over_at_their_rate():
    env = collect_captions.RandomBursts(car_racing_env.make_env(1, draw=False), 0, start=0.2, longest=3)
    env.reset(seed=0)
    taken = [env.step(3)[4]["action"] for _ in range(600)]
    assert 0.1 < np.mean([action != 3 for action in taken]) < 0.4
    assert set(taken) == {0, 1, 2, 3, 4}


@pytest.fixture
def worker(monkeypatch, tmp_path):
    """`collect_episode` in this process."""
    monkeypatch.setattr(collect_captions, "policy", None, raising=False)
    monkeypatch.setattr(collect_captions, "answerer", collect_captions.load_teacher(), raising=False)
    return monkeypatch


def test_an_episode_repeats_and_its_frames_are_those_of_the_simulator(worker, tmp_path):
    worker.setattr(collect_captions, "KEEP", 0.05)
    worker.setattr(collect_captions, "BURST_START", 0.0)
    rows = collect_captions.collect_episode((7, str(tmp_path)))
    assert rows and collect_captions.collect_episode((7, str(tmp_path))) == rows

    kept = {row["frame"]: row for row in rows}
    env = collect_captions.PrivilegedState(car_racing_env.make_env(2), collect_captions.TILES_AHEAD)
    obs, info = env.reset(seed=7)
    teacher, frame, seen = collect_captions.load_teacher(), 0, 0
    while seen < len(kept):  # the same drive, every frame drawn
        action = int(teacher(torch.from_numpy(info["state"])[None]).argmax())
        if frame in kept:
            assert kept[frame]["action"] == action == model_file.ANSWERS[kept[frame]["text"]]
            with Image.open(tmp_path / kept[frame]["file_name"]) as image:
                assert np.array_equal(np.asarray(image), obs)
            seen += 1
        obs, _, _, _, info = env.step(action)
        frame += 2


def test_a_stuck_episode_is_dropped(worker, tmp_path):
    brake = torch.eye(5)[4][None]
    worker.setattr(collect_captions, "answerer", lambda state: brake)
    worker.setattr(collect_captions, "BURST_START", 0.0)
    assert collect_captions.collect_episode((0, str(tmp_path))) == []
    assert not list(tmp_path.iterdir())


def test_a_policy_drives_and_the_teacher_answers(pipeline, constants, tmp_path):
    """DAgger; and what was in the folder before is replaced only when the new data is whole."""
    output = tmp_path / "data"
    constants(
        collect_captions, POLICY=str(pipeline.results / "policy"), OUTPUT_DIR=str(output), TRAIN_FRAMES=20,
        VALIDATION_FRAMES=10, STUCK_LIMIT=10_000, NUM_WORKERS=1,
    )  # fmt: skip
    collect_captions.main()
    assert len((output / "train" / "metadata.jsonl").read_text().splitlines()) == 20
    before = sorted(path.name for path in (output / "train").iterdir())
    constants(collect_captions, TEACHER="nowhere.safetensors")
    with pytest.raises(checks.BadInput, match="no teacher in"):
        collect_captions.main()
    assert sorted(path.name for path in (output / "train").iterdir()) == before
    assert json.loads((output / "run.json").read_text())["constants"]["ANSWER_BY"] == "teacher"


def test_the_policy_that_drives_must_have_this_frame_skip(pipeline, constants):
    constants(collect_captions, POLICY=str(pipeline.results / "policy"))
    constants(car_racing_env, FRAME_SKIP=4)
    with pytest.raises(checks.BadInput, match="FRAME_SKIP = 2, car_racing_env.py has 4"):
        collect_captions.load_drivers()


def constants_seen(job):
    return job, car_racing_env.FRAME_SKIP, model_file.PROMPT, collect_captions.KEEP


def test_workers_have_the_constants_of_this_process(constants):
    """Spawned processes import the files anew; the results keep the order of the jobs."""
    constants(car_racing_env, FRAME_SKIP=4)
    constants(model_file, PROMPT="Why?")
    constants(collect_captions, KEEP=0.5)
    sent = checks.constants_of("collect_captions", "car_racing_env", "GitText2ActionWithPrompt")
    seen = list(collect_captions.run_jobs(constants_seen, range(5), 1, checks.set_constants, (sent,)))
    assert seen == [(job, 4, "Why?", 0.5) for job in range(5)]
