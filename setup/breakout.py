"""Breakout that says where its ball is, and a player, to record episodes with: a small object in the picture.

python dreamer.py --configs offline_tiny --size 64,64 --action_repeat 1 --time_limit 200 --record demos \
  --task gym_setup.breakout:BreakoutBall-v0 --record_policy setup.breakout:player

Needs the package ale-py. Beside the picture the environment observes `ram`, the 128 bytes of the machine, and `ball`,
the place of the ball's centre: x from 0 (left) to 1 (right), y from 0 (top) to 1 (bottom), or -1 and -1 without ball.
The episodes of one seed are alike, those of several differ, because ALE repeats a quarter of the actions at random.
"""

from collections.abc import Callable

import ale_py  # noqa: F401, registers the games
import gymnasium
import numpy as np

WIDTH, HEIGHT = 160, 210  # of the picture
BALL_X, BALL_Y, PADDLE_X = 99, 101, 72  # bytes of the RAM; 0 in BALL_Y: there is no ball
NOTHING, FIRE, RIGHT, LEFT = range(4)
REACH = 4  # the paddle, 16 pixels wide, follows a ball that is farther from its centre


def ball(ram: np.ndarray) -> np.ndarray:
    """The place (2,) of the ball's centre, 0 to 1 from the top left corner; -1 without ball."""
    if not ram[BALL_Y]:
        return np.full(2, -1.0, np.float32)
    # Its centre is pixel RAM - 48.5, where pixel 0 reaches from 0 to 1 and has its own centre at 0.5.
    return np.array([(ram[BALL_X] - 48.0) / WIDTH, (ram[BALL_Y] + 11.0) / HEIGHT], np.float32)


class Breakout(gymnasium.ObservationWrapper):
    """`ALE/Breakout-v5` that observes its RAM and the place of the ball."""

    def __init__(self, render_mode: str | None = None, **options):
        super().__init__(gymnasium.make("ALE/Breakout-v5", obs_type="ram", render_mode=render_mode, **options))
        place = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.observation_space = gymnasium.spaces.Dict({"ram": self.env.observation_space, "ball": place})

    def observation(self, observation: np.ndarray) -> dict[str, np.ndarray]:
        return {"ram": observation, "ball": ball(observation.astype(np.float32))}


def player(task: str) -> Callable[[dict[str, np.ndarray]], int]:
    """Fires when there is no ball, and keeps the paddle below it."""

    def policy(observation: dict[str, np.ndarray]) -> int:
        ram = observation["ram"]
        if not ram[BALL_Y]:
            return FIRE
        # Centres, in pixels
        apart = (ram[BALL_X] - 48.5) - (ram[PADDLE_X] - 39.5)
        return RIGHT if apart > REACH else LEFT if apart < -REACH else NOTHING

    return policy


gymnasium.register("BreakoutBall-v0", entry_point=Breakout)
