"""What every environment family shares: the parsed name of a task, its seeds and the error of this package."""

from typing import NamedTuple

import numpy as np


class EnvError(ValueError):
    """An environment cannot be made or used as asked. The message is one line and says what to do."""


class Task(NamedTuple):
    """A parsed task string, for example `dmc_walker_stand_video`."""

    suite: str
    domain: str
    name: str
    variant: str  # "" is the clean task


def two_seeds(seed: np.random.SeedSequence, start: int | None = None) -> tuple[int, int]:
    """Seeds of the simulator and of the background, others for each `start`. Unlike `spawn`, it leaves `seed` be."""
    if start is not None:
        seed = np.random.SeedSequence(seed.entropy, spawn_key=(*seed.spawn_key, start))
    task_seed, background_seed = seed.generate_state(2)
    return int(task_seed), int(background_seed)
