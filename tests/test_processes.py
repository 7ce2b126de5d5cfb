"""Workers, simulators and training processes: the same numbers as one, an end if one dies, and none left behind."""

import contextlib
import itertools
import math
import multiprocessing
import os
import subprocess
import sys
import time

import psutil
import pytest
import torch
from accelerate.utils import gather_object
from test_ppo_git_with_prompt import make_accelerator, make_batch
from test_ppo_training import train
from toy_process import same

import ppo_git_with_prompt as ppo
from GitText2ActionWithPrompt import GitText2ActionWithPrompt
from support import processes
from support.run_files import ROOT

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ENV = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"}


def test_jobs_come_back_in_order_and_closing_ends_the_workers():
    with processes.workers(2) as run_jobs:
        assert [*run_jobs(math.sqrt, iter(range(9)))] == [math.sqrt(number) for number in range(9)]
        workers = multiprocessing.active_children()
        next(run_jobs(bytes, itertools.repeat(30_000_000)))  # while results are handed over
    assert len(workers) == 2 and not any(worker.is_alive() for worker in workers)


def update(base, stored):
    """Warm up, update on this process's share (one minibatch: its order does not matter) and normalise."""
    accelerator = make_accelerator()
    count, index = accelerator.num_processes, accelerator.process_index
    torch.manual_seed(0)
    model = GitText2ActionWithPrompt.from_pretrained(base)
    batch = {name: x.chunk(count)[index].clone() for name, x in stored.items()}
    optimizer = ppo.make_optimizer(model)
    for warming_up in (True, False):
        diagnostics = ppo.update(model, optimizer, batch, accelerator, warming_up=warming_up)
    rewards = stored["returns"].view(10, 4).chunk(count, 1)[index]
    rewards = processes.in_step(ppo.ReturnNormalizer(4, 0.98), accelerator, rewards, (rewards > 0.9).float())
    return model.trained_parameters() | {"rewards": accelerator.gather(rewards.T.contiguous()).T}, diagnostics


def main(folder):
    """Under torchrun: an update on a share of a batch, two updates in simulators, and the second once more."""
    rank, _ = processes.join_torchrun()
    stack = contextlib.ExitStack()
    first, second = (stack.enter_context(ppo.make_envs(0, num_envs=2, rank=rank)) for _ in range(2))
    torch.set_num_threads(1)

    def run(workers, state=None):
        torch.manual_seed(rank)
        model = GitText2ActionWithPrompt.from_pretrained(f"{folder}/base")
        states = [new for *_, new in train(model, workers, state, total_updates=2, num_steps=5, k_epochs=1)]
        return states, gather_object([seed for envs in workers for seed in envs.call("track_seed")])

    updated = update(f"{folder}/base", torch.load(f"{folder}/batch.pt"))
    (_, before, after), tracks = run(first)
    result = {"updated": updated, "tracks": tracks, "state": after, "resumed": run(second, before)[0][0]}
    stack.close()
    if rank == 0:
        torch.save(result, f"{folder}/result.pt")
    make_accelerator().end_training()


def test_two_processes_train_as_one_on_tracks_of_their_own_and_resume(toy_model, toy_base, tmp_path):
    batch = {name: x for name, x in make_batch(toy_model).items() if torch.is_tensor(x)}
    torch.save(batch, tmp_path / "batch.pt")
    (tmp_path / "base").symlink_to(toy_base)
    subprocess.run([*TORCHRUN, __file__, tmp_path], env=ENV, check=True, timeout=180)
    two, (expected, diagnostics) = torch.load(tmp_path / "result.pt"), update(toy_base, batch)
    for name, x in expected.items():
        assert torch.allclose(two["updated"][0][name], x, atol=1e-5) and x.abs().max() > 1e-4, name
    assert two["updated"][1] == pytest.approx(diagnostics, abs=1e-5)
    assert len(two["tracks"]) == len(set(two["tracks"])) == 4
    for name in ("model", "average", "processes"):
        assert same(two["resumed"][name], two["state"][name]), name


def test_a_killed_torchrun_leaves_no_process(tmp_path):
    (tmp_path / "sleep.py").write_text(
        "import pathlib, time\nfrom support import processes\nrank, _ = processes.join_torchrun()\n"
        "pathlib.Path(__file__).with_name(f'{rank}.ready').touch()\ntime.sleep(600)\n"
    )
    agent = psutil.Popen([*TORCHRUN, tmp_path / "sleep.py"], env=ENV)
    until = time.monotonic() + 60
    while len(list(tmp_path.glob("*.ready"))) < 2:
        assert agent.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    processes_of_it = agent.children()
    agent.kill()
    assert len(processes_of_it) == 2 and not psutil.wait_procs(processes_of_it, timeout=10)[1]


if __name__ == "__main__":
    main(sys.argv[1])
