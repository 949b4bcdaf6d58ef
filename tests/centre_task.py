"""`gym_tests.centre_task:Centre-v0`: a task that is learned from pictures alone in two minutes."""

import gymnasium
import numpy as np

STEPS, EDGE = 24, 16


class Centre(gymnasium.Env):
    """Bring a red square to the middle of a torus, before a wall of noise.

    The action is the square's velocity, the reward 1 - its distance from the middle (at least 0). The square starts
    anywhere and meets no border that could tell where it is, so an agent that does not see does no better than chance.
    """

    metadata = {"render_modes": ["rgb_array"]}
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.place = 0, self.np_random.uniform(-1, 1, 2)
        return self.place.astype(np.float32), {}

    def step(self, action):
        self.t += 1
        self.place = (self.place + 0.25 * np.asarray(action, np.float64) + 1) % 2 - 1
        reward = max(0.0, 1 - float(np.linalg.norm(self.place)))
        return self.place.astype(np.float32), reward, False, self.t == STEPS, {}

    def render(self):
        picture = self.np_random.integers(0, 100, (EDGE, EDGE, 3)).astype(np.uint8)
        picture[:4, :4] = 255, 0, 0
        return np.roll(picture, np.round((self.place + 1) / 2 * EDGE).astype(int) - 2, (0, 1))


gymnasium.register("Centre-v0", Centre)
