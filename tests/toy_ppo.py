"""A toy PPO run in a process of its own, for tests that kill it: `python toy_ppo.py FOLDER BASE RESUME KILL [lora]`.

KILL names the point at which the process kills itself with SIGKILL, or is empty: "rollout" (between two decisions of
update 2), "log" (update 2's row is written, its state is not) or "state" (while update 3's state is being written). Or what
goes wrong in update 3: "worker" (a simulator is killed), "disk" (no file can grow further, as on a full one), "nan" (the loss is).
"""

import os
import resource
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import car_racing_env  # noqa: E402
import ppo_git_with_prompt as ppo  # noqa: E402

KILLS = ("rollout", "log", "state")
FAILURES = {"worker": "a simulator's process ended", "disk": "File too large", "nan": "loss is not finite"}


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_call(number, function, instead=die):
    """`function`, but its `number`th call kills the process, or does something else, instead."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return (instead if len(calls) == number else function)(*args, **kwargs)

    return counted


def score(driver, tracks, num_envs):
    """In place of an evaluation: how far the policy has moved, so that later policies are the better ones."""
    weights = driver.model.policy_head[2].weight
    return [{"return": weights.abs().sum().item(), "end": "time"} for _ in tracks]


def main(folder, base, resume, kill, lora=""):
    ppo.ADAPTER, ppo.BASE_WITHOUT_ADAPTER, ppo.RESULTS_DIR, ppo.RESUME = "", base, folder, bool(resume)
    ppo.NUM_ENVS, ppo.NUM_STEPS, ppo.TOTAL_UPDATES, ppo.WARMUP_UPDATES, ppo.EVALUATIONS = 3, 24, 4, 1, 2
    ppo.MINIBATCH_SIZE, ppo.EVAL_TRACKS = 24, range(100_000, 100_001)
    car_racing_env.MAX_FRAMES = 30  # episodes end at other decisions than updates do
    ppo.TRAIN_LORA, ppo.evaluate.evaluate = bool(lora), score
    ppo.evaluate.record_video = lambda driver, track, path: 0.0
    model = ppo.model_file.GitText2ActionWithPrompt
    kill = kill if os.environ.get("RANK", "1") == "1" else ""  # under torchrun only the second process dies
    if kill == "rollout":
        model.encode = die_at_call(2 * 24 + 20, model.encode)
    if kill == "log":
        write, ppo.run_files.Log.write = ppo.run_files.Log.write, lambda log, row: (write(log, row), "approx_kl" in row and row["update"] == 2 and die())  # fmt: skip
    if kill == "state":
        write = ppo.run_files.write_file

        def write_half(path, content):
            if Path(path).name == "state.pt":
                Path(f"{path}.partial").write_bytes(content[: len(content) // 2])
                die()
            write(path, content)

        save = ppo.save_state

        def save_or_die(path, state):
            ppo.run_files.write_file = write_half if state["update"] == 3 else write
            save(path, state)

        ppo.save_state = save_or_die
    if kill == "worker":

        def kill_a_worker(envs, frames, model):
            os.kill(envs[1].processes[0].pid, signal.SIGKILL)
            return collect(envs, frames, model)

        collect, ppo.collect_rollout = ppo.collect_rollout, die_at_call(3, ppo.collect_rollout, kill_a_worker)
    if kill == "disk":

        def disk_is_full(path, state):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # the state is larger, standard error smaller
            return save(path, state)

        save, ppo.save_state = ppo.save_state, die_at_call(3, ppo.save_state, disk_is_full)
    if kill == "nan":
        gae = ppo.compute_gae
        ppo.compute_gae = die_at_call(3, gae, lambda *args: [x * float("nan") for x in gae(*args)])
    ppo.checks.run(ppo.main)


if __name__ == "__main__":
    main(*sys.argv[1:])
