"""What a driver can be asked for, without words: a speed, a side of the road, both, to stand, or to race.

The teacher drives by a `Target`, obedience is measured on it; the model reads only sentences that ask for it
(phrasings.py). Scales and thresholds were fixed before a model learned any.
"""

from dataclasses import dataclass

import numpy as np

SIDE = 3.2  # units from the middle of the road; its edges are at 6.7
SPEED_SCALE = 50.0  # units per second that the teacher reads as 1
TARGET_SIZE = 5

# errors that count as 1, the most there is, where a target kept is rewarded
SPEED_ERROR = 80.0  # units per second
SIDE_ERROR = 6.0  # units

# when an instruction counts as obeyed
SPEED_TOLERANCE = 5.0  # units per second around a speed
MIDDLE = 2.2  # units around the middle of the road that count as the middle: a third of its width
STANDING = 2.0  # units per second below which the car stands
RACING = 35.0  # units per second along the road, on average, that count as racing; a lap in time takes more
GRACE = {"stop": 3.0, "other": 5.0}  # seconds after the instruction that are not judged
OBEYED_SHARE = 0.75  # of the decisions, for each of speed and side; a standing car must stand in all
ON_ROAD_SHARE = 0.9  # of the decisions with a wheel on the road


@dataclass(frozen=True)
class Target:
    """What an instruction asks for. With neither speed nor side the driver races; who stops does so on any side."""

    speed: float | None = None  # units per second; 0 is standing still
    side: float | None = None  # offset from the middle of the road in units, right is positive

    def encode(self):
        """What the teacher reads beside the state, float32 (TARGET_SIZE,)."""
        speed, side = self.speed, self.side
        return np.array(
            [speed is not None, (speed or 0.0) / SPEED_SCALE, speed == 0, side is not None, (side or 0.0) / SIDE],
            dtype=np.float32,
        )

    def speed_error(self, speed):
        """0 at the speed asked for, growing with the square root of the error to 1 at SPEED_ERROR."""
        return 0.0 if self.speed is None else (min(abs(speed - self.speed), SPEED_ERROR) / SPEED_ERROR) ** 0.5

    def side_error(self, offset):
        """0 at the offset asked for, 1 from SIDE_ERROR beside it on."""
        return 0.0 if self.side is None else min(abs(offset - self.side), SIDE_ERROR) / SIDE_ERROR

    def at_speed(self, speed):
        """Whether each of `speed` (T,) is the one asked for: bool (T,)."""
        if self.speed is None:
            return np.ones(len(speed), dtype=bool)
        return speed < STANDING if self.speed == 0 else abs(speed - self.speed) <= SPEED_TOLERANCE

    def on_side(self, offset):
        """Whether each of `offset` (T,) is on the half asked for, or in the middle: bool (T,)."""
        if self.side is None:
            return np.ones(len(offset), dtype=bool)
        return abs(offset) <= MIDDLE if self.side == 0 else offset * np.sign(self.side) > 0

    def grace(self):
        """Seconds after the instruction that are not judged."""
        return GRACE["stop" if self.speed == 0 else "other"]

    def obeyed(self, speed, offset, on_road, speed_along):
        """Whether a drive obeyed, from arrays (T,) of its decisions after the grace.

        `on_road` says whether a wheel touches the road, `speed_along` is the mean speed along the road.
        """
        if self.speed == 0:
            return bool(self.at_speed(speed).all())
        if np.mean(on_road) < ON_ROAD_SHARE or speed_along <= 0:  # on the grass, or the wrong way
            return False
        if self == RACE:
            return speed_along >= RACING
        return min(self.at_speed(speed).mean(), self.on_side(offset).mean()) >= OBEYED_SHARE


RACE = Target()


def random_target(rng):
    """Any target, for the teacher's training."""
    kind = rng.choice(4, p=[0.15, 0.4, 0.4, 0.05])  # speed, side, both, stop
    if kind == 3:
        return Target(speed=0.0)
    speed = float(rng.uniform(10, 60)) if kind != 1 else None
    side = float(rng.uniform(-1.4, 1.4) * SIDE) if kind != 0 else None
    return Target(speed, side)
