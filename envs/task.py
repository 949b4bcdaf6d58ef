"""Shared by all suites: the parsed task name, seeds, saved state, and the error of this package."""

from typing import NamedTuple

import numpy as np


class EnvError(ValueError):
    """An environment cannot be created or used as requested. The one-line message says what to do."""


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class Task(NamedTuple):
    """A parsed task string, for example `dmc_walker_stand_video`."""

    suite: str
    domain: str
    name: str
    variant: str  # "" is the clean task


def two_seeds(seed: np.random.SeedSequence, start: int | None = None) -> tuple[int, int]:
    """Seeds of the simulator and the background, different for each `start`. Unlike `spawn`, does not change `seed`."""
    if start is not None:
        seed = np.random.SeedSequence(seed.entropy, spawn_key=(*seed.spawn_key, start))
    task_seed, background_seed = seed.generate_state(2)
    return int(task_seed), int(background_seed)


def get_state(owner):
    """State that carries over between episodes, as JSON types: the attributes listed in the class's `lasting`.

    These may be generators, numbers, objects with their own `lasting`, and lists of these. {} without `lasting`.
    """
    if isinstance(owner, np.random.Generator):
        return owner.bit_generator.state
    if isinstance(owner, np.random.RandomState):
        state = owner.get_state(legacy=False)
        return state | {"state": {"key": state["state"]["key"].tolist(), "pos": state["state"]["pos"]}}
    if isinstance(owner, list):
        return [get_state(part) for part in owner]
    if owner is None or isinstance(owner, int):
        return owner
    return {name: get_state(getattr(owner, name)) for name in getattr(owner, "lasting", ())}


def set_state(owner, state) -> None:
    """Inverse of `get_state`, in place."""
    if isinstance(owner, np.random.Generator):
        owner.bit_generator.state = state
    elif isinstance(owner, np.random.RandomState):
        owner.set_state(state)
    elif isinstance(owner, list):
        for part, saved in zip(owner, state, strict=True):
            set_state(part, saved)
    else:
        for name, saved in state.items():
            if saved is None or isinstance(saved, int):
                setattr(owner, name, saved)
            else:
                set_state(getattr(owner, name), saved)
