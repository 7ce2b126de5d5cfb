"""Drive a fixed set of tracks with any driver and write what it scored.

Reads a driver: nothing ("random"), offline/teacher.safetensors ("teacher"), the fine-tuned adapter ("answers": it says
words, the words drive) or a PPO policy ("policy"). Writes RESULTS_DIR/eval_<driver>.json and, if asked, a video.
The task is the plain one: no reward shaping, no early stop, 1000 frames at most.

    python evaluate.py      # 100 tracks of the PPO policy: 2 minutes on two CPU cores
"""

import functools
import multiprocessing
import signal
import time
from pathlib import Path

import imageio
import numpy as np
import pygame
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import car_racing_env
import checks
import collect_captions
import GitText2ActionWithPrompt as model_file
import run_files
from run_files import ROOT

DRIVER = "policy"  # "random", "teacher", "answers" or "policy"
FIRST_TRACK = 100_000  # 100,000-100,099 validation, 100,100-100,199 held out, 200,000-200,099 test
NUM_TRACKS = 100
NUM_ENVS = 10  # simulated side by side, each in a process of its own
ADAPTER = "lora_git_caption_model_carllava"  # for "answers"
POLICY = "results/policy"  # for "policy"
RESULTS_DIR = "results"
VIDEO = True  # also film the first track
WATCH = False  # also show the first track live in a window, with the answer below it
HEAT_MAP = False  # in film and window: redden what the prompt's last token attends to
SEED = 0  # of the random driver

DRIVERS = ("random", "teacher", "answers", "policy")


def to_simulator(actions):
    """Actions in the order of ANSWERS, an int tensor (N,), as the simulator's indices, int64 numpy (N,)."""
    return np.array(list(model_file.ANSWERS.values()))[actions.cpu().numpy()]


class Random:
    """Uniformly random actions."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def __call__(self, frames, infos):
        return self.rng.integers(5, size=len(frames))


class Teacher:
    """The collecting policy; it reads the simulator's state from `infos`."""

    def __init__(self):
        self.teacher = collect_captions.load_teacher()

    def __call__(self, frames, infos):
        return self.teacher(torch.from_numpy(infos["state"])).argmax(1).numpy()


class Answers:
    """The fine-tuned model's generated words; what cannot be parsed is counted and driven as no-op."""

    def __init__(self, model):
        self.model, self.words, self.unparsable = model, 0, 0

    def __call__(self, frames, infos):
        texts = self.model.answer(frames)
        self.words += len(texts)
        self.unparsable += sum(text not in model_file.ANSWERS for text in texts)
        return np.array([model_file.ANSWERS.get(text, 0) for text in texts])


class Policy:
    """The most probable action of a model with its policy head."""

    def __init__(self, model):
        self.model = model

    @torch.no_grad()
    def __call__(self, frames, infos):
        return to_simulator(self.model(frames)[0].argmax(1))


def load_driver(name):
    """The driver of that name, from the files that the constants point to."""
    if name == "random":
        return Random(SEED)
    if name == "teacher":
        return Teacher()
    if name == "answers":
        return Answers(load_answerer(ADAPTER))
    if name == "policy":
        model = model_file.GitText2ActionWithPrompt.from_policy(ROOT / POLICY)
        car_racing_env.check_frame_skip(POLICY, checks.read_json(ROOT / POLICY / "policy.json"))
        return Policy(model)
    raise checks.BadInput(f"DRIVER = {name!r} in evaluate.py: use one of {', '.join(DRIVERS)}")


def driver_files(driver):
    """Where the weights of the driver of that name come from, and a hash of them."""
    teacher = Path(collect_captions.TEACHER)
    files = {
        "teacher": (str(teacher.parent), teacher.name),
        "policy": (POLICY, "policy.safetensors"),
        "answers": (ADAPTER, "adapter_model.safetensors"),
    }
    if driver not in files:
        return {}
    folder, name = files[driver]
    return {"folder": folder, "weights_hash": run_files.file_hash(ROOT / folder / name)}


def load_answerer(adapter):
    """The base that an adapter folder names, with the adapter merged."""
    task = model_file.read_task(ROOT / adapter)
    car_racing_env.check_frame_skip(adapter, task)
    return model_file.GitText2ActionWithPrompt.from_pretrained(task["base_model"], ROOT / adapter)


def make_eval_env(frame_skip, **kwargs):
    """The plain task with the privileged state in `info` (only the teacher reads it)."""
    env = car_racing_env.make_env(frame_skip, **kwargs)
    return collect_captions.PrivilegedState(env, collect_captions.TILES_AHEAD)


def leave_ctrl_c_to_the_parent():
    """Let a worker process ignore Ctrl-C, which a terminal sends to all processes at once."""
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def make_worker_env(frame_skip):
    """`make_eval_env` for a worker process."""
    leave_ctrl_c_to_the_parent()
    return make_eval_env(frame_skip)


def close_envs(envs):
    """End a vector environment's processes, dead ones among them. They have nothing to save, and could ignore a milder signal."""
    for worker in envs.processes:
        worker.kill()
        worker.join()
    envs.closed = True


def evaluate(driver, tracks, num_envs, progress=True):
    """Drive each track once; returns a list of `{"track_seed", "return", "end"}` in the order of `tracks`.

    `driver` maps frames uint8 (N, 96, 96, 3) and a dict of N privileged states to N simulator actions; it is asked only for
    environments whose track is not driven yet.
    """
    tracks = list(dict.fromkeys(tracks))
    num_envs = min(num_envs, len(tracks))
    make = functools.partial(make_worker_env, car_racing_env.FRAME_SKIP)
    envs = car_racing_env.AsyncVectorEnv([make] * num_envs, "DISABLED")
    results = {}
    waiting = tracks[num_envs:]
    current, returns = tracks[:num_envs], np.zeros(num_envs)
    try:
        obs, infos = envs.reset(seed=current)
        with tqdm(total=len(tracks), unit="track", disable=not progress, leave=False) as bar:
            while len(results) < len(tracks):
                to_drive = np.array([track not in results for track in current])
                actions = np.zeros(num_envs, dtype=np.int64)
                actions[to_drive] = driver(obs[to_drive], {"state": infos["state"][to_drive]})
                obs, rewards, terminated, truncated, infos = envs.step(actions)
                returns += rewards
                done = terminated | truncated
                if not done.any():
                    continue
                for i in np.flatnonzero(done):
                    if current[i] not in results:
                        info = {"lap_finished": bool(infos.get("lap_finished", np.zeros(num_envs))[i])}
                        end = car_racing_env.episode_end(terminated[i], truncated[i], info)
                        results[current[i]] = {"track_seed": current[i], "return": float(returns[i]), "end": end}
                        bar.update()
                        bar.set_postfix(mean=f"{np.mean([r['return'] for r in results.values()]):.1f}")
                    # a finished environment without a track left idles on its last one
                    current[i] = waiting.pop(0) if waiting else current[i]
                    returns[i] = 0.0
                seeds = [track if done[i] else None for i, track in enumerate(current)]
                obs, reset_infos = envs.reset(seed=seeds, options={"reset_mask": done})
                infos["state"][done] = reset_infos["state"][done]
    except (EOFError, ConnectionError):
        raise checks.BadInput(
            "a simulator's process ended (killed, or out of memory?): start again, with a lower NUM_ENVS in evaluate.py if "
            "it recurs"
        ) from None
    finally:
        close_envs(envs)
    return [results[track] for track in tracks]


def summarize(results):
    """Mean, std, median, extremes, laps and failures of `evaluate`'s list."""
    returns = np.array([r["return"] for r in results])
    return {
        "mean": round(float(returns.mean()), 2),
        "std": round(float(returns.std()), 2),
        "median": round(float(np.median(returns)), 2),
        "min": round(float(returns.min()), 2),
        "max": round(float(returns.max()), 2),
        "laps_finished_percent": round(100 * float(np.mean([r["end"] == "lap" for r in results])), 1),
        "below_500_percent": round(100 * float((returns < 500).mean()), 1),
    }


@torch.no_grad()
def drive(driver, track_seed):
    """Drive one track; yields for each decision a picture, uint8 (560, 600, 3), and the return after it.

    The frame large; below it prompt, answer, action, probabilities, speed and return. Drivers without a model get the
    frame, the action and the numbers.
    """
    env = make_eval_env(car_racing_env.FRAME_SKIP, render_mode="rgb_array")
    obs, info = env.reset(seed=track_seed)
    model = getattr(driver, "model", None)
    names = {action: answer for answer, action in model_file.ANSWERS.items()}
    total, end = 0.0, ""
    while not end:
        action = int(driver(obs[None], {"state": info["state"][None]})[0])
        words, probabilities, frame = None, None, env.render()
        if model:
            words = model.answer(obs[None])[0]
            if isinstance(driver, Answers):
                probabilities = model.answer_log_probs(obs[None])[0].exp().tolist()
            else:
                probabilities = model(obs[None])[0][0].softmax(-1).tolist()
            if HEAT_MAP:
                frame = redden(frame, model.attention(obs[None])[0].cpu().numpy())
        speed = env.unwrapped.car.hull.linearVelocity.length
        picture = compose(frame, words, names[action], probabilities, speed, total)
        obs, reward, terminated, truncated, info = env.step(action)
        total += reward
        end = car_racing_env.episode_end(terminated, truncated, info)
        yield picture, total


def record_video(driver, track_seed, path):
    """Film a driver on one track to an mp4 at the simulator's speed; returns the episode's return."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    fps = car_racing_env.stock.FPS / car_racing_env.FRAME_SKIP
    with imageio.get_writer(partial, fps=fps, codec="libx264", quality=6, macro_block_size=None) as video:
        for picture, total in drive(driver, track_seed):  # noqa: B007
            video.append_data(picture)
    partial.replace(path)
    return total


def check_display():
    """Fail before the driving if `watch` will find no screen."""
    try:
        pygame.display.init()
        screen = pygame.display.get_driver()
    except pygame.error as error:
        screen = str(error)
    found = pygame.display.get_init() and screen != "offscreen"  # SDL's invisible one, where there is no other
    pygame.display.quit()
    if not found:
        raise checks.BadInput(f"WATCH = True in evaluate.py, but there is no display ({screen}): set it to False")


def watch(driver, track_seed):
    """Show a driver on one track in a window, at the simulator's speed if the model is fast enough; closing it stops."""
    pygame.display.init()
    window = pygame.display.set_mode((600, 560))
    pygame.display.set_caption(f"track {track_seed}")
    clock = pygame.time.Clock()
    try:
        for picture, _ in drive(driver, track_seed):
            if any(event.type == pygame.QUIT for event in pygame.event.get()):
                break
            pygame.surfarray.blit_array(window, picture.swapaxes(0, 1))
            pygame.display.flip()
            clock.tick(car_racing_env.stock.FPS / car_racing_env.FRAME_SKIP)
    finally:
        pygame.display.quit()


def redden(frame, attention):
    """A frame uint8 (H, W, 3) with an attention map (n, n) laid over it: the strongest patch is half red."""
    heat = Image.fromarray(attention / attention.max()).resize(frame.shape[1::-1], Image.BILINEAR)
    heat = 0.5 * np.asarray(heat)[..., None]
    return (frame * (1 - heat) + heat * np.array([255, 40, 40])).astype(np.uint8)


def compose(frame, answer, action, probabilities, speed, total):
    """One video frame, uint8 (560, 600, 3): the rendered frame (400, 600, 3) above the panel."""
    image = Image.new("RGB", (600, 560), (18, 22, 28))
    image.paste(Image.fromarray(frame))
    draw = ImageDraw.Draw(image)
    text = functools.partial(draw.text, font=ImageFont.load_default(15))
    grey, white, green = (150, 158, 168), (240, 242, 245), (120, 220, 140)
    text((12, 408), model_file.PROMPT, fill=grey)
    if answer is not None:
        draw.text((12, 430), f"“{answer}”", fill=white, font=ImageFont.load_default(30))
    same = action == answer
    text((12, 478), f"action   {action}", fill=white if same or answer is None else (255, 190, 90))
    text((12, 502), f"speed    {speed:.0f}", fill=grey)
    text((12, 526), f"return   {total:.0f}", fill=grey)
    for i, name in enumerate(model_file.ANSWERS if probabilities else ()):
        y = 434 + 24 * i
        text((300, y), name, fill=white if name == action else grey)
        draw.rectangle((395, y + 4, 395 + 150, y + 14), fill=(45, 50, 58))
        draw.rectangle((395, y + 4, 395 + 150 * probabilities[i], y + 14), fill=green if name == action else grey)
        text((553, y), f"{probabilities[i]:.2f}", fill=grey)
    return np.asarray(image)


def main():
    car_racing_env.check_constants()
    checks.check_constants(
        globals(), FIRST_TRACK=(int, 0, None), NUM_TRACKS=(int, 1, None), NUM_ENVS=(int, 1, None), SEED=(int, 0, None),
        VIDEO=(bool, None, None), WATCH=(bool, None, None), HEAT_MAP=(bool, None, None), ADAPTER=(str, None, None),
        POLICY=(str, None, None), RESULTS_DIR=(str, None, None),
    )  # fmt: skip
    began, facts = time.time(), run_files.run_facts()
    driver = load_driver(DRIVER)
    results_dir = ROOT / RESULTS_DIR
    run_files.check_writable(results_dir)
    if WATCH:
        check_display()
    tracks = range(FIRST_TRACK, FIRST_TRACK + NUM_TRACKS)
    print(
        f"{DRIVER} drives tracks {tracks[0]}-{tracks[-1]} of {car_racing_env.ENV_ID}, frame skip {car_racing_env.FRAME_SKIP}, "
        f"and {RESULTS_DIR}/eval_{DRIVER}.json gets the returns, {checks.duration(1.5 * NUM_TRACKS)} with git-tiny"
    )
    results = evaluate(driver, tracks, NUM_ENVS)
    summary = summarize(results)
    if isinstance(driver, Answers):
        summary["unparsable_answers"] = driver.unparsable
        summary["answers"] = driver.words
    path = results_dir / f"eval_{DRIVER}.json"
    run_files.write_json(
        path,
        {
            "driver": DRIVER, **driver_files(DRIVER), "env_id": car_racing_env.ENV_ID, "frame_skip": car_racing_env.FRAME_SKIP,
            "tracks": [tracks[0], tracks[-1]], **summary, **facts,
            "seconds": round(time.time() - began, 1),
            "returns": [round(r["return"], 2) for r in results], "ends": [r["end"] for r in results],
            "seeds": list(tracks),
        },
    )  # fmt: skip
    print(f"{summary['mean']:.1f} ± {summary['std']:.1f}, median {summary['median']:.1f}, "
          f"{summary['laps_finished_percent']:.0f} % laps, {summary['below_500_percent']:.0f} % below 500")  # fmt: skip
    print(f"wrote {RESULTS_DIR}/{path.name}")
    if VIDEO:
        video = path.with_name(f"video_{DRIVER}.mp4")
        record_video(driver, tracks[0], video)
        print(f"wrote {RESULTS_DIR}/{video.name}")
    if WATCH:
        watch(driver, tracks[0])
    print("next: another DRIVER or FIRST_TRACK here, or a policy as POLICY in collect_captions.py")


if __name__ == "__main__":
    checks.run(main)
