"""Processes that work for a script: jobs spread over them, simulators in them, and that none is left behind."""

import contextlib
import datetime
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor

import gymnasium as gym
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from support.checks import BadInput


def end_with_parent(parent):
    """Let this process end when its parent, given by its process id, is gone: a killed one cannot tell its workers."""

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def start_worker():
    """What every worker process does first. A terminal sends Ctrl-C to all processes; the parent decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # not os.getppid(): the parent may be gone already, as a spawned worker imports for seconds
    end_with_parent(multiprocessing.parent_process().pid)


@contextlib.contextmanager
def workers(num_workers):
    """Spawned processes, as a function `run_jobs(function, jobs)` that yields `function(job)` of each job in order.

    They work 2 * `num_workers` jobs ahead. Leaving the context waits for these: a process that is ended while it hands
    over a result would leave half of it in the pipe, and its reader waiting for the rest for ever. One that dies raises
    BrokenProcessPool.
    """

    def run_jobs(function, jobs):
        jobs = iter(jobs)
        ahead = deque(pool.submit(function, job) for job in itertools.islice(jobs, 2 * num_workers))
        try:
            while ahead:
                yield ahead.popleft().result()
                ahead.extend(pool.submit(function, job) for job in itertools.islice(jobs, 1))
        finally:
            for future in ahead:
                future.cancel()

    with ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), start_worker) as pool:
        try:
            yield run_jobs
        finally:
            pool.shutdown(cancel_futures=True)


def simulate(pipe, env_fns, autoreset):
    """In a worker process: make environments, and do with them what is called through `pipe`."""
    start_worker()
    envs = gym.vector.SyncVectorEnv(env_fns, copy=False, autoreset_mode=gym.vector.AutoresetMode[autoreset])
    while True:
        name, args, kwargs = pipe.recv()
        pipe.send(getattr(envs, name)(*args, **kwargs))


class Simulators:
    """Some environments in one process, as Gymnasium's `SyncVectorEnv`.

    On few cores a process for each environment costs more than what it simulates. To use several cores have several of
    these, each stepped by a thread. `env_fns` make the environments; `autoreset` is "SAME_STEP" or "DISABLED". If the
    process dies whoever calls gets BadInput.
    """

    def __init__(self, env_fns, autoreset):
        self.num_envs = len(env_fns)
        context = multiprocessing.get_context("fork")  # it starts at once
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=simulate, args=(theirs, env_fns, autoreset))
        self.process.start()
        theirs.close()

    def _request(self, name, *args, **kwargs):
        try:
            self.pipe.send((name, args, kwargs))
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            raise BadInput(
                "a simulator's process ended. If an error in its code is shown above, that is why; else it was killed, "
                "or out of memory: continue a PPO run with RESUME = True, and if it recurs start anew with a lower "
                "NUM_ENVS"
            ) from None

    def reset(self, **kwargs):
        return self._request("reset", **kwargs)

    def restart(self, seeds, done, infos):
        """Reset those that are `done`, bool (N,), each on its seed of N; returns observations and infos of all.

        The infos are the last step's `infos`, but for what reset says of those, and 0 where it says nothing.
        """
        seeds = [seed if ended else None for seed, ended in zip(seeds, done)]
        obs, reset_infos = self.reset(seed=seeds, options={"reset_mask": done})
        infos = {name: x.copy() for name, x in infos.items()}
        for name, x in infos.items():
            x[done] = reset_infos[name][done] if name in reset_infos else 0
        return obs, infos

    def step(self, actions):
        return self._request("step", actions)

    def call(self, name):
        return self._request("call", name)

    def set_attr(self, name, values):
        return self._request("set_attr", name, values)

    def close(self):
        # it has nothing to save, and SDL with a display open makes it deaf to a milder signal
        self.process.kill()
        self.process.join()


@contextlib.contextmanager
def simulators(env_fns, autoreset, num_workers):
    """Environments dealt out to at most `num_workers` processes, as a list of `Simulators`, closed at the end."""
    with contextlib.ExitStack() as stack:
        shares = [env_fns[i::num_workers] for i in range(min(num_workers, len(env_fns)))]
        yield [stack.enter_context(contextlib.closing(Simulators(share, autoreset))) for share in shares]


# several training processes, started by torchrun


def join_torchrun():
    """This process's rank and their number, (0, 1) without torchrun; a killed torchrun leaves none of them."""
    if "RANK" in os.environ:
        end_with_parent(os.getppid())
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def make_accelerator(device):
    """Accelerate's view of the training processes on `device`'s kind; the others wait for hours while one evaluates."""
    patience = InitProcessGroupKwargs(timeout=datetime.timedelta(hours=6))
    return Accelerator(cpu=device.type == "cpu", kwargs_handlers=[patience])


def in_step(function, accelerator, *columns):
    """What `function` returns for this process's environments, (T, N), when all processes' are handed to it together.

    It is called once for each time step, with a row (processes * N,) of each of the `columns`, tensors (T, N).
    """
    together = accelerator.gather(torch.stack(columns).permute(2, 0, 1)).cpu()  # (processes * N, columns, T)
    results = torch.stack([function(*step) for step in together.permute(2, 1, 0)])
    return results.chunk(accelerator.num_processes, 1)[accelerator.process_index].to(columns[0].device)


def average_gradients(parameters, accelerator):
    """Replace each gradient by its mean over the processes, all in one message."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    mean = accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "mean")
    for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients])):
        gradient.copy_(part.view_as(gradient))
