"""What throws a driver off its line, so that it comes back: random actions, and the car thrown about.

Reads and writes nothing.
"""

import gymnasium as gym
import numpy as np

from road import move_car

THROWN_BESIDE = 10.0  # units from the middle of the road, at most, where a thrown car is put: the verge begins at 6.7
THROWN_SPEED = 70.0  # units per second, at most, of a thrown car
SPED_UP = 0.7  # share of the throws that only give it a speed in SPED_UP_TO, in its direction; stage 1 has its own
SPED_UP_TO = (60.0, 95.0)  # lowest and highest, units per second: the teacher reaches 79, gas and nothing else 94


class RandomBursts(gym.Wrapper):
    """Now and then take over for 1 to `longest` decisions with one random action, so that recoveries are seen.

    Each decision starts a burst with probability `start`. `info["action"]` is the action that was really taken.
    """

    def __init__(self, env, seed, start, longest):
        super().__init__(env)
        self.rng = np.random.default_rng([seed, 3])
        self.start, self.longest, self.left = start, longest, 0

    def reset(self, *, seed=None, options=None):
        self.left = 0
        return self.env.reset(seed=seed, options=options)

    def step(self, action):
        if not self.left and self.rng.random() < self.start:
            self.left = int(self.rng.integers(1, self.longest + 1))
            self.burst = int(self.rng.integers(5))
        if self.left:
            self.left -= 1
            action = self.burst
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated, truncated, info | {"action": action}


class Throws(gym.Wrapper):
    """Throw the car about, so that coming back is learned: first with probability `at_start`, then `chance`.

    In a share `sped_up` of the throws (None: SPED_UP) its speed becomes one in the range SPED_UP_TO, mostly more. In
    the others it is turned by any angle and, half of the time, put anywhere across road and verge; its velocity then
    turns along, stays as it was (the car slides), or is a new one. Draws come from the episode's seed; `info["thrown"]`
    says when it was turned.
    """

    def __init__(self, env, at_start=0.0, chance=0.0, sped_up=None):
        super().__init__(env)
        self.at_start, self.chance, self.sped_up = at_start, chance, SPED_UP if sped_up is None else sped_up

    def reset(self, *, seed=None, options=None):
        obs, info = self.env.reset(seed=seed, options=options)
        # not the stream of the track, of instructions or of bursts
        self.rng = np.random.default_rng(None if seed is None else [seed, 1])
        self.due = self.rng.random() < self.at_start
        return obs, info

    def step(self, action):
        thrown = self.due or self.rng.random() < self.chance
        self.due = False
        if thrown:
            thrown = self.throw()
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated, truncated, info | {"thrown": thrown}

    def throw(self):
        """One throw, now; returns whether the car was turned."""
        car, rng, road = self.unwrapped.car, self.rng, self.get_wrapper_attr("road")
        if rng.random() < self.sped_up:
            direction = np.array([-np.sin(car.hull.angle), np.cos(car.hull.angle)])
            move_car(car, 0.0, velocity=rng.uniform(*SPED_UP_TO) * direction)
            return False
        turn = rng.uniform(-np.pi, np.pi)
        shift, velocity = np.zeros(2), None
        if rng.random() < 0.5:
            across = np.array([np.cos(road.heading), np.sin(road.heading)])
            shift = across * (rng.uniform(-THROWN_BESIDE, THROWN_BESIDE) - road.offset)
        kind, angle = rng.integers(3), car.hull.angle + turn
        if kind == 1:
            velocity = np.array(car.hull.linearVelocity)
        elif kind == 2:
            velocity = rng.uniform(0, THROWN_SPEED) * np.array([-np.sin(angle), np.cos(angle)])
        move_car(car, turn, shift, velocity)
        return True
