"""The world: Gymnasium's CarRacing, drawn faster, with frame skip and training-only rewards.

Reads and writes nothing. `make_env()` is the plain task, scored as published:
the same physics, pixels and rewards as `gym.make("CarRacing-v3", continuous=False)` behind a frame skip.
`TrainingRewards` is a separate wrapper that only training scripts put around it.
"""

import functools
import math

import gymnasium as gym
import numpy as np
import pygame
from gymnasium.envs.box2d import car_racing as stock
from pygame.surfarray import pixels2d
from pygame.transform import smoothscale

import checks
from rasterizer import draw_polygons

FRAME_SKIP = 2  # frames per decision; stored with data, adapter and policy, a mismatch is an error
MAX_FRAMES = 1000  # frames per episode, as in Gymnasium's registration

# Training only: none of these can reach an evaluation. A discounted driver values 10 % more speed at some 10 points, the
# task at less than 1: next to the tiles' rewards the penalties are ten times what the task charges, so that the two agree.
TRAIN_TRACKS = 100_000  # track seeds 0 .. TRAIN_TRACKS - 1; the seeds above are kept for evaluation
REWARD_CLIP = 10.0  # bound on the reward of one decision; one tile pays about 3.5, so +-1 would pay two tiles like one
GRASS_LIMIT = 50  # frames with all four wheels on grass before the episode ends
GRASS_PENALTY = 300.0  # reward subtracted by that end
MISS_PENALTY = 100.0  # subtracted for each tile left behind unvisited; the first one costs the lap, some 30 points
PENALTY_RAMP = 0.25  # share of the lap over which both penalties grow from 0: a beginner would learn to stand still
LAP_BONUS = 100.0  # reward added by a finished lap: about what driving on would be worth, as no frame shows the finish


def check_constants():
    """Raise BadInput if a constant above is of another type or out of range."""
    checks.check_constants(
        globals(), FRAME_SKIP=(int, 1, MAX_FRAMES), TRAIN_TRACKS=(int, 1, 100_000), REWARD_CLIP=(float, 0, None),
        GRASS_LIMIT=(int, 1, None), GRASS_PENALTY=(float, 0, None), MISS_PENALTY=(float, 0, None),
        PENALTY_RAMP=(float, 0, 1), LAP_BONUS=(float, 0, None),
    )  # fmt: skip


def check_frame_skip(folder, facts):
    """Raise BadInput if the data, adapter or policy in `folder`, described by `facts`, was made with another FRAME_SKIP."""
    if facts.get("frame_skip") != FRAME_SKIP:
        raise checks.BadInput(
            f"{folder}/ was made with FRAME_SKIP = {facts.get('frame_skip')}, car_racing_env.py has {FRAME_SKIP}: put it "
            "back or rerun the stages"
        )


def gymnasium_parts():
    """Gymnasium 1's environment id, `CarRacing`, and its `AsyncVectorEnv(env_fns, autoreset)` with autoreset "DISABLED" or "SAME_STEP".

    Gymnasium 0.29 is put behind the same interface: there a lap truncates and `info` does not tell it, final infos are a list,
    and a vector environment always resets what has ended, in the same step, and cannot reset some.
    """
    if hasattr(gym.vector, "AutoresetMode"):
        return (
            "CarRacing-v3",
            stock.CarRacing,
            lambda env_fns, autoreset: gym.vector.AsyncVectorEnv(
                env_fns, autoreset_mode=gym.vector.AutoresetMode[autoreset]
            ),
        )

    class CarRacing(stock.CarRacing):
        def step(self, action):
            obs, reward, terminated, lap, info = super().step(action)
            ended = {"lap_finished": not terminated} if terminated or lap else {}
            return obs, reward, terminated or lap, False, info | ended

    class ResetBySeed(gym.Wrapper):
        """Resets without a seed, as the vector environment's own, change nothing."""

        def reset(self, *, seed=None, options=None):
            if seed is not None:
                self.last = self.env.reset(seed=seed)
            return self.last

        def step(self, action):
            step = self.env.step(action)
            self.last = step[0], step[4]
            return step

    class AsyncVectorEnv(gym.vector.AsyncVectorEnv):
        def __init__(self, env_fns, autoreset):
            if autoreset == "DISABLED":
                env_fns = [lambda make=make: ResetBySeed(make()) for make in env_fns]
            super().__init__(env_fns)

        def reset_wait(self, **kwargs):
            obs, infos = super().reset_wait(**kwargs)
            return obs, self._arrays(infos)

        def step_wait(self, **kwargs):
            *step, infos = super().step_wait(**kwargs)
            if "final_info" in infos:
                infos["final_obs"], finals = infos["final_observation"], infos["final_info"]
                keys = {key for final in finals if final for key in final}
                infos["final_info"] = {key: [final and final.get(key) for final in finals] for key in keys}
            return *step, self._arrays(infos)

        def _arrays(self, infos):
            return infos | {"state": np.stack(infos["state"])} if "state" in infos else infos

    return "CarRacing-v2", CarRacing, AsyncVectorEnv


ENV_ID, CarRacing, AsyncVectorEnv = gymnasium_parts()

BAR = stock.WINDOW_H // 8  # rows of the window that the instruments cover
FIELD = stock.PLAYFIELD * np.array([[(1, 1), (1, -1), (-1, -1), (-1, 1)]], dtype=np.float64)
GRASS_SQUARES = stock.GRASS_DIM * np.array(  # the playfield's light squares, in the order the stock class draws them
    [[(x + 1, y), (x, y), (x, y + 1), (x + 1, y + 1)] for x in range(-20, 20, 2) for y in range(-20, 20, 2)],
    dtype=np.float64,
)


class FastCarRacing(CarRacing):
    """Gymnasium's `CarRacing` with the same constructor, physics, rewards and pixels, drawn faster or not at all.

    The stock class transforms some 700 polygons a frame in Python, and pygame draws the visible 20 pixel by pixel; here
    `rasterizer.py` does both. The picture is narrowed before it is flipped, since narrowing works row by row; surfaces
    and score texts are kept.

    Set `drawing = False` to leave frames undrawn: `step` then returns None as observation, and `draw()` makes up
    for the last one.
    """

    drawing = True
    _score = 0.0  # what the last frame shows; the stock class draws before it subtracts the step's 0.1
    _scores = {}  # rendered score texts, shared by the environments of a process

    def draw(self):
        """Draw the last undrawn step as the stock class would have, uint8 (96, 96, 3)."""
        reward, self.reward, drawing, self.drawing = self.reward, self._score, self.drawing, True
        self.state = self._render("state_pixels")
        self.reward, self.drawing = reward, drawing
        return self.state

    def render(self):
        drawing, score, self.drawing = self.drawing, self._score, True
        picture = super().render()
        self.drawing, self._score = drawing, score
        return picture

    def _create_track(self):
        if not super()._create_track():
            return False
        polygons, colors = zip(*self.road_poly)
        self._polygons = np.concatenate([FIELD, GRASS_SQUARES, np.array(polygons, dtype=np.float64)])
        grass = np.tile(self.grass_color, (len(GRASS_SQUARES), 1))
        self._colors = np.concatenate([[self.bg_color], grass, colors]).astype(np.float64)
        # a visited tile changes its colour in place: from now on in a row of this array
        rows = self._colors[-len(colors) :]
        views = dict(zip(map(id, colors), rows))
        for tile in self.road:
            tile.color = views[id(tile.color)]
        self.road_poly = list(zip(polygons, rows))
        return True

    def _render(self, mode):
        if mode == "state_pixels":
            self._score = self.reward
            if not self.drawing:
                return None
        if mode != "state_pixels" or "t" not in self.__dict__ or self._dials_overflow():
            return super()._render(mode)
        scene, instruments, narrow, upside_down, bar = self._surfaces
        zoom = 0.1 * stock.SCALE * max(1 - self.t, 0) + stock.ZOOM * stock.SCALE * min(self.t, 1)
        angle, (x, y) = -self.car.hull.angle, self.car.hull.position
        scroll = pygame.math.Vector2((-x * zoom, -y * zoom)).rotate_rad(angle)
        translation = (stock.WINDOW_W / 2 + scroll[0], stock.WINDOW_H / 4 + scroll[1])
        cos, sin = pygame.math.Vector2(1, 0).rotate_rad(angle)  # the same rounding as the stock rotation

        reach = math.hypot(stock.WINDOW_W / 2, 0.75 * stock.WINDOW_H) / zoom  # from the car to the farthest corner
        inside = max(abs(x), abs(y)) + reach < stock.PLAYFIELD
        background = scene.map_rgb([int(c) for c in self.bg_color]) if inside else 0
        world = self._polygons[inside:], self._colors[inside:]  # inside, the field is the background
        draw_polygons(pixels2d(scene).T, background, *world, zoom, cos, sin, *translation)
        self.car.draw(scene, zoom, translation, angle, draw_particles=False)
        rows = stock.WINDOW_H - BAR
        smoothscale(scene.subsurface((0, BAR, stock.WINDOW_W, rows)), upside_down.get_size(), upside_down)

        self.surf = instruments
        self._render_indicators(stock.WINDOW_W, stock.WINDOW_H)
        text = self._score_text(f"{self.reward:04.0f}")
        instruments.blit(text, text.get_rect(center=(60, stock.WINDOW_H - stock.WINDOW_H * 2.5 / 40.0)))
        smoothscale(instruments.subsurface((0, rows, stock.WINDOW_W, BAR)), bar.get_size(), bar)
        np.copyto(pixels2d(narrow)[:, :rows], pixels2d(upside_down)[:, ::-1])
        return self._create_image_array(narrow, (stock.STATE_W, stock.STATE_H))

    @functools.cached_property
    def _surfaces(self):
        """The kept surfaces: fresh memory for each frame would cost more than drawing the car."""
        masks = (0xFF0000, 0xFF00, 0xFF, 0)  # the rasteriser's, whatever format an open window has
        scene = pygame.Surface((stock.WINDOW_W, stock.WINDOW_H), depth=32, masks=masks)
        instruments = pygame.Surface((stock.WINDOW_W, stock.WINDOW_H))
        narrow = pygame.Surface((stock.STATE_W, stock.WINDOW_H))
        upside_down = pygame.Surface((stock.STATE_W, stock.WINDOW_H - BAR))
        bar = narrow.subsurface((0, stock.WINDOW_H - BAR, stock.STATE_W, BAR))
        return scene, instruments, narrow, upside_down, bar

    def _dials_overflow(self):
        """Whether a dial rises above the instrument bar, as with wheels that spin without grip."""
        return self.car.hull.linearVelocity.length > 190 or any(wheel.omega > 390 for wheel in self.car.wheels)

    def _score_text(self, score):
        if score not in self._scores:
            pygame.font.init()
            font = pygame.font.Font(pygame.font.get_default_font(), 42)
            self._scores[score] = font.render(score, True, (255, 255, 255), (0, 0, 0))
        return self._scores[score]


class FrameSkip(gym.Wrapper):
    """Repeat each action `skip` frames, sum the rewards, draw only the last frame.

    Goes outside the time limit, so that an episode has `MAX_FRAMES` frames whatever the skip; an episode that ends
    inside a skip stops there and its last frame is drawn. With `draw=False` nothing is drawn and observations are None.
    """

    def __init__(self, env, skip, draw=True):
        super().__init__(env)
        self.skip, self.draw = skip, draw

    def reset(self, *, seed=None, options=None):
        self.unwrapped.drawing = self.draw
        return self.env.reset(seed=seed, options=options)

    def step(self, action):
        total = 0.0
        for frame in range(self.skip):
            self.unwrapped.drawing = self.draw and frame == self.skip - 1
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += reward
            if terminated or truncated:
                break
        if obs is None and self.draw:
            obs = self.unwrapped.draw()
        return obs, total, terminated, truncated, info


def episode_end(terminated, truncated, info):
    """How an episode of the plain task ended: "lap", "field" (left the playfield), "time", or "" while it runs."""
    if terminated:
        return "lap" if info["lap_finished"] else "field"
    return "time" if truncated else ""


class TrainingRewards(gym.Wrapper):
    """Training only: clipped rewards, penalties, a lap bonus, an early stop on grass, a logged track seed per episode.

    Track seeds are drawn below `tracks` from the wrapper's own generator, so a logged `track_seed` replays its
    track; a seed given to `reset` restarts that generator. The early stop is a termination with a penalty, never a
    truncation. When an episode ends, `info` holds its true return (`episode_return`), frames (`episode_length`), `end`
    ("lap", "field", "time", "grass") and `track_seed`.

    Box2D's state cannot be saved: `snapshot()` keeps the track and the actions so far, and the first `reset` after
    `resume_from = snapshot` drives them again, undrawn, to the very same moment.
    """

    resume_from = None

    def __init__(
        self, env, seed, *, tracks, reward_clip, grass_limit, grass_penalty, miss_penalty, penalty_ramp, lap_bonus
    ):
        super().__init__(env)
        self.rng = np.random.default_rng(seed)
        self.tracks, self.reward_clip, self.lap_bonus = tracks, reward_clip, lap_bonus
        self.grass_limit, self.grass_penalty = grass_limit, grass_penalty
        self.miss_penalty, self.penalty_ramp = miss_penalty, penalty_ramp

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        if self.resume_from is not None:
            return self._resume(options)
        return self._start(int(self.rng.integers(self.tracks)), options)

    def _start(self, track_seed, options):
        self.track_seed, self.actions = track_seed, []
        self.episode_return, self.on_grass, self.front, self.missed = 0.0, 0, 0, 0
        obs, info = self.env.reset(seed=track_seed, options=options)
        self.frames_before = self._frames()
        return obs, info | {"track_seed": track_seed}

    def _resume(self, options):
        snapshot, self.resume_from = self.resume_from, None
        self.rng.bit_generator.state = snapshot["rng"]
        draw, self.env.draw = self.env.draw, False
        obs, info = self._start(snapshot["track_seed"], options)
        for action in snapshot["actions"]:
            self.step(action)
        self.env.draw = draw
        return self.unwrapped.draw() if draw else obs, info

    def snapshot(self):
        """What `resume_from` needs: the generator's state, the track, and the actions since its start."""
        return {"rng": self.rng.bit_generator.state, "track_seed": self.track_seed, "actions": list(self.actions)}

    def step(self, action):
        self.actions.append(int(action))
        obs, reward, terminated, truncated, info = self.env.step(action)
        car = self.unwrapped.car
        self.episode_return += reward
        reward = float(np.clip(reward, -self.reward_clip, self.reward_clip))

        touched = [tile.idx for wheel in car.wheels for tile in wheel.tiles]
        # the start line lies behind the car: a tile far ahead of the front one is one behind it
        self.front = max([self.front, *(i for i in touched if i - self.front < 30)])
        visited = self.unwrapped.tile_visited_count
        stake = min(1.0, visited / max(1.0, self.penalty_ramp * len(self.unwrapped.track)))
        missed = max(self.missed, self.front + 1 - visited)
        reward -= stake * self.miss_penalty * (missed - self.missed)
        self.missed = missed

        end = episode_end(terminated, truncated, info)
        reward += self.lap_bonus * (end == "lap")
        self.on_grass = 0 if touched else self.on_grass + self.env.skip
        if self.on_grass >= self.grass_limit and not end:
            reward, terminated, end = reward - stake * self.grass_penalty, True, "grass"
        if end:
            info = info | {
                "episode_return": self.episode_return,
                "episode_length": self._frames() - self.frames_before,
                "end": end,
                "track_seed": self.track_seed,
            }
        return obs, reward, terminated, truncated, info

    def _frames(self):
        return round(self.unwrapped.t * stock.FPS)


def make_env(frame_skip, draw=True, **kwargs):
    """The plain task: CarRacing with five discrete actions, `frame_skip` frames per decision, at most 1000 frames.

    Keyword arguments go to `CarRacing`. With `draw=False` observations are None: for drivers that see the state.
    """
    env = FastCarRacing(continuous=False, **kwargs)
    return FrameSkip(gym.wrappers.TimeLimit(env, MAX_FRAMES), frame_skip, draw)


def make_training_env(seed, frame_skip, draw=True, **rewards):
    """The plain task inside `TrainingRewards(seed, **rewards)`; all are arguments, so that spawned workers get them too."""
    return TrainingRewards(make_env(frame_skip, draw), seed, **rewards)
