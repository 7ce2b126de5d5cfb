"""torchrun with two CPU processes: the same update as one, other tracks for each, an end with an error if one dies."""

import subprocess
import sys

import pytest
import torch
import toy_lora
import toy_ppo
import toy_update

import run_files

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def run(launcher, script, *arguments):
    command = [*launcher, script.__file__, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def rollout(toy_model, tmp_path):
    """64 stored decisions of a policy whose last layer is not zero, and rewards of 20 steps in 4 environments."""
    torch.manual_seed(1)
    frames = torch.randint(0, 256, (64, 96, 96, 3), dtype=torch.uint8)
    with torch.no_grad():
        features, scores = toy_model.encode(frames)
        dropout = toy_model.draw_dropout(64)
        logits, value = toy_model.head(features, scores, dropout)
    action = torch.randint(0, 5, (64,))
    batch = {
        "features": features, "answer_log_probs": scores, "dropout": dropout, "action": action, "value": value,
        "log_prob": logits.log_softmax(-1).gather(1, action[:, None])[:, 0], "advantage": torch.randn(64),
        "returns": torch.randn(64),
    }  # fmt: skip
    path = tmp_path / "rollout.pt"
    torch.save({"batch": batch, "reward": torch.randn(20, 4), "done": (torch.rand(20, 4) < 0.1).float()}, path)
    return path


def test_two_processes_update_as_one(rollout, toy_base, tmp_path):
    results = []
    for launcher in ([sys.executable], TORCHRUN):
        output = tmp_path / f"{len(results)}.pt"
        finished = run(launcher, toy_update, toy_base, rollout, output)
        assert finished.returncode == 0, finished.stderr
        results.append(torch.load(output, weights_only=True))
    one, two = results
    for ours, theirs in zip(two["parameters"], one["parameters"]):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert any(p.abs().max() > 1e-2 for p in one["parameters"])
    assert torch.allclose(two["reward"], one["reward"], atol=1e-6)
    assert two["diagnostics"] == pytest.approx(one["diagnostics"], abs=1e-5)


def test_two_processes_drive_other_tracks_and_resume(toy_base, tmp_path):
    """The second process is killed in a rollout: the first does not wait for ever, and the resumed run is the uninterrupted one."""
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    finished = run(TORCHRUN, toy_ppo, alone, toy_base, "", "")
    assert finished.returncode == 0, finished.stderr
    episodes = run_files.read_log(alone / "reward_log.csv")
    state = torch.load(alone / "state.pt", weights_only=True)
    tracks = [[e["track_seed"] for half in part["episodes"] for e in half] for part in state["processes"]]
    assert len(tracks) == 2 and len({*tracks[0], *tracks[1]}) == 6
    assert len(episodes) == len({row["track_seed"] for row in episodes}) == state["episode"]
    assert [int(row["env_frames"]) for row in episodes] == sorted(int(row["env_frames"]) for row in episodes)

    finished = run(TORCHRUN, toy_ppo, killed, toy_base, "", "rollout")
    assert finished.returncode != 0 and "Signal 9" in finished.stderr
    assert len(run_files.read_log(killed / "update_log.csv")) == 1
    finished = run(TORCHRUN, toy_ppo, killed, toy_base, "yes", "")
    assert finished.returncode == 0, finished.stderr
    for name in ("reward_log.csv", "policy/policy.safetensors"):
        assert (killed / name).read_bytes() == (alone / name).read_bytes(), name
    resumed = torch.load(killed / "state.pt", weights_only=True)
    assert all(torch.equal(p, resumed["model"][name]) for name, p in state["model"].items())


def test_two_processes_fine_tune(toy_base, tmp_path):
    toy_lora.write_data(tmp_path / "data")
    finished = run(TORCHRUN, toy_lora, tmp_path, toy_base, "", "")
    assert finished.returncode == 0, finished.stderr
    log = run_files.read_log(tmp_path / "results" / "lora_log.csv")
    assert [row["epoch"] for row in log] == ["1", "2", "3"]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert finished.stdout.count("wrote ") == 1
