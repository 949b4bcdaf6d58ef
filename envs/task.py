"""What every environment family shares: the parsed name of a task and the error of this package."""

from typing import NamedTuple


class EnvError(ValueError):
    """An environment cannot be made or used as asked. The message is one line and says what to do."""


class Task(NamedTuple):
    """A parsed task string, for example `dmc_walker_stand_video`."""

    suite: str
    domain: str
    name: str
    variant: str  # "" is the clean task
