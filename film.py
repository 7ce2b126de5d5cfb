"""A drive as pictures: the frame with question, answer, action and probabilities below it, as an mp4.

Reads and writes what it is told to; used by evaluate.py, ppo_git_with_prompt.py and demo.py.
"""

import contextlib
import functools

import imageio
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import questions
from car_racing_env import FPS, FRAME_SKIP, episode_end
from GitText2ActionWithPrompt import ANSWERS, answer_of, differs
from support.checks import BadInput
from teacher import make_evaluation_env

# asked in turn, for a sentence below the answer
SCENE_QUESTIONS = tuple(questions.QUESTIONS[about][0] for about in ("next bend", "speed", "offset"))
SCENE_EVERY = 25  # decisions between two of them


class Drive:
    """One driver on one track, decision by decision: `decide`, perhaps look at it, `step`."""

    def __init__(self, driver, track_seed):
        self.driver, self.reads = driver, hasattr(driver, "explain")
        self.env = make_evaluation_env(render_mode="rgb_array")
        self.obs, self.info = self.env.reset(seed=track_seed)
        self.total, self.end, self.decision, self.scene = 0.0, "", 0, ""

    def decide(self):
        """The simulator's action for this frame, the answer and the five probabilities, None without a model."""
        seen = self.obs[None], {name: np.asarray(x)[None] for name, x in self.info.items()}
        if not self.reads:
            return int(self.driver(*seen)[0]), None, None
        if self.decision % SCENE_EVERY == 0:
            self.scene = self.ask(SCENE_QUESTIONS[self.decision // SCENE_EVERY % len(SCENE_QUESTIONS)])
        actions, answers, probabilities = self.driver.explain(*seen)
        return int(actions[0]), answers[0], probabilities[0].tolist()

    def ask(self, question):
        """The model's answer to a question about the present frame."""
        return self.driver.model.ask(self.obs[None], question)[0].capitalize()

    def picture(self, heat_map=False):
        """The present frame as rendered, uint8 (400, 600, 3), with what the prompt's last token looks at if asked."""
        frame = self.env.render()
        if heat_map and self.reads:
            frame = overlay(frame, attention(self.driver.model, self.obs[None], self.driver.told)[0].cpu().numpy())
        return frame

    @property
    def speed(self):
        """Units per second."""
        return self.env.unwrapped.car.hull.linearVelocity.length

    def step(self, action):
        """Do the simulator's `action`."""
        self.obs, reward, terminated, truncated, self.info = self.env.step(action)
        self.total, self.decision = self.total + reward, self.decision + 1
        self.end = episode_end(terminated, truncated, self.info)


def drive(driver, track_seed, heat_map=False):
    """Drive one track; yields for each decision a picture, uint8 (560, 600, 3), and the return after it.

    The frame large; below it prompt, answer, action, probabilities, a sentence about the scene, speed and return.
    Drivers without a model get the frame, the action and the numbers.
    """
    car = Drive(driver, track_seed)
    with contextlib.closing(car.env):
        while not car.end:
            action, answer, probabilities = car.decide()
            prompt = f"{driver.told} {driver.model.question}".strip() if car.reads else ""
            frame = car.picture(heat_map)
            name = answer_of(action, probabilities)
            picture = compose(frame, prompt, answer, car.scene, name, probabilities, car.speed, car.total)
            car.step(action)
            yield picture, car.total


def record_video(driver, track_seed, path, heat_map=False):
    """Film a driver on one track to an mp4 at the simulator's speed; returns the episode's return."""
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    try:
        with imageio.get_writer(
            partial, fps=FPS / FRAME_SKIP, codec="libx264", quality=6, macro_block_size=None
        ) as video:
            for picture, total in drive(driver, track_seed, heat_map):  # noqa: B007
                video.append_data(picture)
        partial.replace(path)
    except OSError as error:  # ffmpeg has ended
        raise BadInput(f"cannot write {path} ({str(error).splitlines()[0]}): make room on the disk") from None
    finally:
        partial.unlink(missing_ok=True)
    return total


@torch.no_grad()
def attention(model, frames, instruction=""):
    """Where the prompt's last token looks: (B, n, n), attention to the patches in the last layer, mean of heads."""
    pixels = model.processor.image_processor(list(frames), return_tensors="pt").pixel_values.to(model.device)
    tokens, _ = model.prompts(instruction, len(frames))
    rows = model.base(tokens, pixel_values=pixels, output_attentions=True).attentions[-1].mean(1)[:, -1]
    vision = model.base.config.vision_config
    n = vision.image_size // vision.patch_size
    return rows[:, 1 : 1 + n * n].unflatten(1, (n, n))  # after the image's own [CLS]


def overlay(frame, weights):
    """A frame uint8 (H, W, 3) with attention `weights` (n, n) laid over it in red: the strongest patch is half red."""
    heat = Image.fromarray(weights / weights.max()).resize(frame.shape[1::-1], Image.BILINEAR)
    heat = 0.5 * np.asarray(heat)[..., None]
    return (frame * (1 - heat) + heat * np.array([255, 40, 40])).astype(np.uint8)


def compose(frame, prompt, answer, scene, action, probabilities, speed, total):
    """One video frame, uint8 (560, 600, 3): the rendered frame (400, 600, 3) above the panel."""
    image = Image.new("RGB", (600, 560), (18, 22, 28))
    image.paste(Image.fromarray(frame))
    draw = ImageDraw.Draw(image)
    text = functools.partial(draw.text, font=ImageFont.load_default(15))
    grey, white, green, orange = (150, 158, 168), (240, 242, 245), (120, 220, 140), (255, 190, 90)
    text((12, 404), prompt, fill=grey)
    if answer is not None:
        draw.text((12, 430), f"“{answer}”", fill=white, font=ImageFont.load_default(30))
    text((12, 466), scene, fill=grey)
    text((12, 486), f"action   {action}", fill=orange if differs(answer, ANSWERS[action]) else white)
    text((12, 508), f"speed    {speed:.0f}", fill=grey)
    text((12, 530), f"return   {total:.0f}", fill=grey)
    for i, name in enumerate(ANSWERS if probabilities else ()):
        y = 434 + 120 // len(ANSWERS) * i
        text((300, y), name, fill=white if name == action else grey)
        draw.rectangle((395, y + 4, 395 + 150, y + 14), fill=(45, 50, 58))
        draw.rectangle((395, y + 4, 395 + 150 * probabilities[i], y + 14), fill=green if name == action else grey)
        text((553, y), f"{probabilities[i]:.2f}", fill=grey)
    return np.asarray(image)
