"""The world: Gymnasium's CarRacing behind a frame skip, and the training-only rewards.

Reads and writes nothing. `make_env()` is the plain task, scored as published: the physics, pixels and rewards of
`gym.make("CarRacing-v3", continuous=False)`. `make_training_env()` puts `TrainingRewards` around it; no evaluation
does. To change what training rewards, add a field to `Rewards` and a line to `TrainingRewards.step`
(docs/customise.md).
"""

import math
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
from gymnasium.envs.box2d import car_racing as stock

import instructions
from perturbations import Throws
from road import FollowRoad
from support.resume import Resumable
from targets import RACE

ENV_ID = "CarRacing-v3"  # whose task `make_env` builds; a name for the records
FPS = stock.FPS
NO_OP, RIGHT, LEFT, GAS, BRAKE = range(5)  # the simulator's actions
FRAME_SKIP = 2  # frames per decision; stored with data, adapter and policy, a mismatch is an error
MAX_FRAMES = 1000  # frames per episode, as in Gymnasium's registration
MISSED_AT_ONCE = 30  # tiles that training charges for at most in a decision: a car that cuts across many would set the
# scale of all rewards
TRAIN_TRACKS = 100_000  # training draws track seeds below; the seeds from here on are kept for evaluation
VALIDATION, HELD_OUT, TEST = range(100_000, 100_100), range(100_200, 100_300), range(201_000, 201_100)


@dataclass(frozen=True)
class Rewards:
    """What training adds to the task's reward. None of it can reach an evaluation.

    To a driver that discounts, 10 % more speed is worth some 10 points, to the task less than 1: it would hurry and
    make mistakes. So mistakes cost several times what the task charges for them.
    """

    # bound on the task's reward per decision, also on its -100 for leaving the field; at 1 two tiles, 3.5 each, would
    # pay like one
    clip: float = 10.0
    grass_limit: int = 50  # frames with all four wheels on grass before the episode ends
    grass_penalty: float = 300.0  # subtracted by that end
    miss_penalty: float = 100.0  # subtracted for each tile left behind; the first one costs the lap, some 30 points
    penalty_ramp: float = 0.25  # share of the lap over which both penalties grow from 0: a beginner would stand still
    lap_bonus: float = 100.0  # added by a finished lap: about what driving on would be worth; no frame shows the finish
    thrown_grace: int = 300  # frames after a throw that turned the car: neither grass nor missed tiles cost anything
    # 0 here, of use to the teacher's training (offline/train_teacher.py)
    progress: float = 0.0  # per tile's length along the road, negative backwards: it tells a turned car where to go
    facing: float = 0.0  # per change of the cosine of the car's angle to the road, 2 for a half turn
    # told a speed, keeping it pays in place of the tiles, about what racing pays, and no tile left behind costs; told a
    # side, being off it costs; both are per two frames, times an error from 0 to 1
    speed_kept: float = 2.4
    side_left: float = 3.0


REWARDS = Rewards()


class FrameSkip(gym.Wrapper):
    """Repeat each action `skip` frames, sum the rewards, draw only the last frame.

    Goes outside the time limit, so that an episode has `MAX_FRAMES` frames whatever the skip; an episode that ends
    inside a skip stops there and its last frame is drawn. With `draw=False` nothing is drawn and observations are None.
    """

    def __init__(self, env, skip, draw=True):
        super().__init__(env)
        self.skip, self.draws = skip, draw

    def reset(self, *, seed=None, options=None):
        self.unwrapped.drawing = self.draws
        return self.env.reset(seed=seed, options=options)

    def step(self, action):
        total, base = 0.0, self.unwrapped
        for frame in range(self.skip):
            base.drawing = self.draws and frame == self.skip - 1
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += reward
            if terminated or truncated:
                break
        if obs is None and self.draws:
            obs = base.draw()
        return obs, total, terminated, truncated, info


def clipped(value, limit):
    """The value, or -limit or limit if it is beyond them."""
    return max(-limit, min(value, limit))


def episode_end(terminated, truncated, info):
    """How an episode of the plain task ended: "lap", "field" (left the playfield), "time", or "" while it runs."""
    if terminated:
        return "lap" if info["lap_finished"] else "field"
    return "time" if truncated else ""


def frame_number(env):
    """How many frames an environment has driven since its reset, which draws one of its own."""
    return round(env.unwrapped.t * FPS) - 1


class TrainingRewards(gym.Wrapper):
    """Training only: the task's reward clipped, the terms of `Rewards`, an early stop, a track per episode.

    Track seeds are drawn below TRAIN_TRACKS from the wrapper's own generator `track_rng`, so that a logged `track_seed`
    replays its track. The early stop, on grass, is a termination with a penalty, never a truncation. When an episode
    ends, `info["episode_summary"]` holds its true `return`, its `training_return`, which counts what is paid here, its
    `length` in frames, `end` ("lap", "field", "time", "grass"), `track_seed` and `told`, whether it was under
    instructions. Around `Instructed` it pays for what was told.
    """

    def __init__(self, env, seed, rewards=REWARDS):
        super().__init__(env)
        self.track_rng, self.rewards = np.random.default_rng(seed), rewards
        self.frame_skip, self.instructed = env.get_wrapper_attr("skip"), env.has_wrapper_attr("told")

    def reset(self, *, seed=None, options=None):
        self.track_seed = int(self.track_rng.integers(TRAIN_TRACKS))
        self.episode_return, self.training_return = 0.0, 0.0
        self.grass_frames, self.furthest_tile, self.missed_tiles, self.grace = 0, 0, 0, 0
        obs, info = self.env.reset(seed=self.track_seed, options=options)
        self.travelled, self.faces = 0.0, self._faces_the_road()
        return obs, info

    def step(self, action):
        target = self.get_wrapper_attr("told").target if self.instructed else RACE  # of this decision
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.episode_return += reward
        newly_missed, penalty_scale = self._look_at_the_road()
        self.grace = self.rewards.thrown_grace if info.get("thrown") else max(0, self.grace - self.frame_skip)
        end = episode_end(terminated, truncated, info)
        if not end and self.grass_frames >= self.rewards.grass_limit and not self.grace:
            terminated, end = True, "grass"

        reward = clipped(reward, self.rewards.clip) if target.speed is None else 0.0
        reward += self._pay_for_the_way(target) + self._pay_for_turning(info.get("thrown"))
        if not self.grace and target.speed is None:
            reward -= penalty_scale * self.rewards.miss_penalty * newly_missed
        if end == "lap":
            reward += self.rewards.lap_bonus
        if end == "grass":
            reward -= penalty_scale * self.rewards.grass_penalty

        self.training_return += reward
        if end:
            info["episode_summary"] = {
                "return": self.episode_return,
                "training_return": self.training_return,
                "length": frame_number(self),
                "end": end,
                "track_seed": self.track_seed,
                "told": int(self.instructed),
            }
        return obs, reward, terminated, truncated, info

    def _pay_for_the_way(self, target):
        """What progress along the road pays, and how well the target is kept."""
        road, before = self.get_wrapper_attr("road"), self.travelled
        self.travelled = road.travelled
        limit = float(self.frame_skip)  # tiles: faster than any car
        progress = clipped(road.travelled - before, limit)
        pairs = self.frame_skip / 2  # of frames
        reward = self.rewards.progress * progress - pairs * self.rewards.side_left * target.side_error(road.offset)
        if target.speed is not None:  # the speed along the road: neither standing nor going the wrong way pays
            speed = progress * stock.TRACK_DETAIL_STEP * FPS / self.frame_skip
            reward += pairs * self.rewards.speed_kept * (1 - target.speed_error(speed))
        return reward

    def _pay_for_turning(self, thrown):
        """What the heading's change towards the road pays; a throw's own change pays nothing."""
        before, self.faces = self.faces, self._faces_the_road()
        return 0.0 if thrown else self.rewards.facing * (self.faces - before)

    def _faces_the_road(self):
        return math.cos(self.get_wrapper_attr("road").heading - self.unwrapped.car.hull.angle)

    def _look_at_the_road(self):
        """Tiles newly left behind unvisited, and the penalties' present share; counts `grass_frames`."""
        base = self.unwrapped
        touched = [tile.idx for wheel in base.car.wheels for tile in wheel.tiles]
        self.grass_frames = 0 if touched else self.grass_frames + self.frame_skip
        # the start line lies behind the car: a tile more than half a lap ahead of the furthest one is one behind it
        ahead = (i for i in touched if i - self.furthest_tile < len(base.track) / 2)
        self.furthest_tile = max([self.furthest_tile, *ahead])
        missed = max(self.missed_tiles, self.furthest_tile + 1 - base.tile_visited_count)
        newly_missed, self.missed_tiles = min(MISSED_AT_ONCE, missed - self.missed_tiles), missed
        ramp = max(1.0, self.rewards.penalty_ramp * len(base.track))
        return newly_missed, min(1.0, base.tile_visited_count / ramp)


class Instructed(gym.Wrapper):
    """Tell the driver what to do, and now and then something else; goes inside `TrainingRewards`, which pays for it.

    `draw_instruction` maps a generator to an `instructions.Told`; each decision draws anew with probability `change`, a
    driver told to stop three times as often. `told` holds for the next decision, `info["instruction"]` is its sentence,
    `info["kind"]` what was told for the last one ("" for nothing) and `info["obeyed"]` whether the car then was as
    told.
    """

    told = instructions.NOTHING

    def __init__(self, env, draw_instruction, change):
        super().__init__(env)
        self.draw_instruction, self.change = draw_instruction, change

    def reset(self, *, seed=None, options=None):
        obs, info = self.env.reset(seed=seed, options=options)
        self.instruction_rng = np.random.default_rng(None if seed is None else [seed, 2])
        self.tell()
        return obs, info | {"instruction": self.told.sentence}

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        target = self.told.target
        speed = np.array([self.unwrapped.car.hull.linearVelocity.length])
        obeyed = target.at_speed(speed)[0] and target.on_side(np.array([self.get_wrapper_attr("road").offset]))[0]
        info |= {"kind": instructions.kind(self.told.name), "obeyed": bool(obeyed)}
        if self.instruction_rng.random() < self.change * (3 if target.speed == 0 else 1):
            self.tell()
        return obs, reward, terminated, truncated, info | {"instruction": self.told.sentence}

    def tell(self):
        """Draw the next instruction."""
        self.told = self.draw_instruction(self.instruction_rng)


def make_env(frame_skip=FRAME_SKIP, draw=True, **kwargs):
    """The plain task: CarRacing, five actions, `frame_skip` frames per decision, at most MAX_FRAMES frames.

    Keyword arguments go to `CarRacing`. With `draw=False` observations are None: for drivers that see the state.
    """
    from fast.car_racing import FastCarRacing  # here: who only asks the model loads no rasteriser and its compiler

    env = FastCarRacing(continuous=False, **kwargs)
    return FollowRoad(FrameSkip(gym.wrappers.TimeLimit(env, MAX_FRAMES), frame_skip, draw))


def make_training_env(
    seed, rewards=REWARDS, frame_skip=FRAME_SKIP, draw=True, *, draw_instruction=None, change=0.0, thrown=0.0
):
    """The plain task inside `TrainingRewards`; `seed` decides the tracks.

    With `draw_instruction` under instructions that change with probability `change` per decision (see `Instructed`);
    with `thrown` the car is thrown about with that probability per decision.
    """
    env = make_env(frame_skip, draw)
    env = Throws(env, thrown, thrown) if thrown else env
    env = Instructed(env, draw_instruction, change) if draw_instruction else env
    return Resumable(TrainingRewards(env, seed, rewards))
