"""Exact resume of an episode in mid-drive.

Reads and writes nothing.
"""

import gymnasium as gym


class Resumable(gym.Wrapper):
    """Exact resume of an episode, which is driven again: Box2D's state cannot be saved.

    Goes around `TrainingRewards`, whose generator it restores; what else is drawn comes from the track's seed. The
    first `reset` after `resume_from` was set to a snapshot drives its actions again, undrawn, to the very same moment.
    """

    resume_from = None

    def reset(self, *, seed=None, options=None):
        snapshot, self.resume_from = self.resume_from, None
        rng, draws = self.get_wrapper_attr("track_rng"), self.get_wrapper_attr("draws")
        if snapshot:
            rng.bit_generator.state = snapshot["rng"]
        self.rng_before, self.actions = rng.bit_generator.state, []
        self.set_wrapper_attr("draws", draws and not snapshot)
        obs, info = self.env.reset(seed=seed, options=options)
        for action in snapshot["actions"] if snapshot else ():
            info |= self.step(action)[4]
        self.set_wrapper_attr("draws", draws)
        return self.unwrapped.draw() if draws and snapshot else obs, info

    def step(self, action):
        self.actions.append(int(action))
        return self.env.step(action)

    def snapshot(self):
        """The generator's state before this episode drew its track, and the actions since."""
        return {"rng": self.rng_before, "actions": list(self.actions)}
