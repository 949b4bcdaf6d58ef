"""Any gymnasium environment that renders: `gym_{id}`, for example `gym_HalfCheetah-v5`.

`gym_{module}:{id}` first imports the module that registers the environment: `gym_my_env:Reach-v0`. The module must be
importable (installed, or in a folder on PYTHONPATH). Atari games, such as `gym_ALE/Pong-v5`, need the package ale-py.
`gym_{id}?key=value&key=value` passes arguments to it: `gym_HalfCheetah-v5?camera_name=track`. Values are YAML scalars.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable

import cv2
import gymnasium
import numpy as np
from gymnasium import spaces
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from envs.dmc import check_rendering
from envs.task import EnvError, Task, one_line, two_seeds

TAKEN = {"action", "reward", "is_first", "is_last", "is_terminal"}  # columns that replay adds


def parse(rest: str) -> tuple[str, str, str]:
    """All of `rest` is the id, which must be registered, if necessary by importing its module, and arguments."""
    full_id, _ = split_arguments(rest)
    module, _, env_id = full_id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        gymnasium.spec(env_id)
    except ModuleNotFoundError as error:
        if error.name != "ale_py":
            raise unknown(rest, error) from error
        raise EnvError(f"gym_{rest}: Atari games need the package ale-py: pip install ale-py") from error
    except (gymnasium.error.Error, ImportError, TypeError, ValueError) as error:
        raise unknown(rest, error) from error
    return rest, "", ""


def unknown(rest: str, error: Exception) -> EnvError:
    return EnvError(
        f"unknown task 'gym_{rest}' ({one_line(error)}): write gym_ID with an id that gymnasium knows, or "
        "gym_MODULE:ID with an importable module (PYTHONPATH) that registers it"
    )


def split_arguments(rest: str) -> tuple[str, dict]:
    """`id?key=value&key=value` -> id and the arguments. Raises EnvError. Those of Atari games are in `ale_py`."""
    env_id, _, query = rest.partition("?")
    env_id = f"ale_py:{env_id}" if env_id.startswith("ALE/") else env_id
    arguments = {}
    for part in filter(None, query.split("&")):
        key, equals, value = part.partition("=")
        if not (key.isidentifier() and equals):
            raise EnvError(f"gym_{rest}: {part!r} is no argument: write gym_ID?key=value&key=value")
        try:
            arguments[key] = YAML(typ="safe").load(value)
        except YAMLError as error:
            raise EnvError(f"gym_{rest}: {value!r} is no value ({one_line(error)[:80]})") from error
    return env_id, arguments


def prepare(
    task: Task,
    *,
    size: tuple[int, int],
    action_repeat: int,
    seed: np.random.SeedSequence,
    start: int,
    task_seed: int | None,
    **_,
) -> Callable[[], gymnasium.Env]:
    """Constructor of the environment. The other options of `envs.prepare` do not apply."""
    # Many of these environments render with MuJoCo, but none declares it; the others do not need it.
    with contextlib.suppress(EnvError):
        check_rendering()
    own_task_seed, _ = two_seeds(seed, start)
    return functools.partial(
        GymnasiumTask,
        task.domain,
        size=size,
        action_repeat=action_repeat,
        task_seed=own_task_seed if task_seed is None else task_seed,
    )


class GymnasiumTask(gymnasium.Env):
    """A registered environment with its rendering as the image.

    Observation: `image` uint8 (H, W, 3), the rendering scaled to `size`, and the environment's own observation,
    flattened to float32 (n,) (discrete values one-hot): under its keys if it is a Dict, else as `state`. An observation
    that is itself an image (uint8, one or three channels) is scaled instead, and replaces the rendering if it is the
    only one or is named `image`.

    Action: Discrete (from 0), or Box [-1, 1] of shape (A,), clipped and mapped linearly to the bounds of the
    environment (unbounded actions are passed unchanged). Reward: sum over `action_repeat` steps. Episodes end where the
    environment ends them. `info["success"]` is the environment's `success` or `is_success`.

    Raises:
        EnvError: the environment cannot be built, does not render, or has unsupported actions or observations.
    """

    lasting = ("_task_seed", "_rng")

    def __init__(self, env_id: str, *, size: tuple[int, int] = (64, 64), action_repeat: int = 1, task_seed: int = 0):
        try:
            full_id, arguments = split_arguments(env_id)
            self.inner = gymnasium.make(full_id, render_mode="rgb_array", disable_env_checker=True, **arguments)
        except Exception as error:  # third-party code: a missing package or display, wrong arguments
            raise EnvError(f"gym_{env_id} cannot be built: {one_line(error)}") from error
        self._id, self._size, self._action_repeat = env_id, size, action_repeat
        self._task_seed: int | None = task_seed
        self._running = False
        self.action_space = self._make_action_space()

        observed = self.inner.observation_space
        named = isinstance(observed, spaces.Dict)
        self._parts = dict(observed.items()) if named else {"image" if is_picture(observed) else "state": observed}
        if wrong := TAKEN.intersection(self._parts):
            raise EnvError(f"gym_{env_id} has an observation {wrong.pop()!r}, a name taken by replay: rename it")
        if "image" in self._parts and not is_picture(self._parts["image"]):
            raise EnvError(f"gym_{env_id} observes image as {self._parts['image']}, not uint8 (H, W, 3): rename it")
        self.named = named  # observes a Dict
        self.observation_space = spaces.Dict(
            {"image": spaces.Box(0, 255, (*size, 3), np.uint8)}
            | {key: self._part_space(key, space) for key, space in self._parts.items()}
        )

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        # Seeded once; later episodes continue the environment's own random stream.
        observation, _ = self.inner.reset(seed=self._task_seed if seed is None else seed)
        self._task_seed = None
        self._running = True
        return self.observe(observation), {}

    def step(self, action):
        if not self._running:
            raise RuntimeError("step() called on an environment that needs reset()")
        if not np.isfinite(action).all():
            raise ValueError(f"action is not finite: {action}")
        inner_action, reward = self._inner_action(action), 0.0
        for _ in range(self._action_repeat):
            observation, step_reward, terminated, truncated, info = self.inner.step(inner_action)
            reward += float(step_reward)
            if terminated or truncated:
                break
        self._running = not (terminated or truncated)
        success = float(info.get("success", info.get("is_success", 0.0)))
        return self.observe(observation), reward, bool(terminated), bool(truncated), {"success": success}

    def close(self) -> None:
        self._running = False
        self.inner.close()

    def outer_action(self, action: np.ndarray | None) -> np.ndarray:
        """An action of `inner` as one of this task, (A,) float32; zeros without one."""
        if action is None:
            return np.zeros(self.action_space.shape, np.float32)
        return (2.0 * (action.ravel() - self._low.ravel()) / (self._high - self._low).ravel() - 1.0).astype(np.float32)

    @property
    def _rng(self) -> np.random.Generator:
        return self.inner.unwrapped.np_random

    def _make_action_space(self) -> spaces.Space:
        space = self.inner.action_space
        if isinstance(space, spaces.Discrete):
            return spaces.Discrete(int(space.n))
        if not (isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating)):
            raise EnvError(f"gym_{self._id} has actions {space}: only Box of floats and Discrete are supported")
        bounded = np.isfinite(space.low) & np.isfinite(space.high)
        self._low = np.where(bounded, space.low, -1.0)
        self._high = np.where(bounded, space.high, 1.0)
        return spaces.Box(-1.0, 1.0, (int(np.prod(space.shape)),), np.float32)

    def _inner_action(self, action):
        space = self.inner.action_space
        if isinstance(space, spaces.Discrete):
            return int(action) + int(space.start)
        action = np.clip(np.asarray(action, np.float64), -1.0, 1.0).reshape(space.shape)
        return (self._low + (action + 1.0) / 2.0 * (self._high - self._low)).astype(space.dtype)

    def _part_space(self, key: str, space: spaces.Space) -> spaces.Box:
        if is_picture(space):
            return spaces.Box(0, 255, (*self._size, space.shape[-1] if key != "image" else 3), np.uint8)
        try:
            return spaces.Box(-np.inf, np.inf, (spaces.flatdim(space),), np.float32)
        except (ValueError, NotImplementedError) as error:
            raise EnvError(f"gym_{self._id} observes {key} as {space}, which has no fixed size") from error

    def observe(self, observation) -> dict[str, np.ndarray]:
        """What the task shows of the state that `inner`, the registered environment, observes so."""
        values = observation if self.named else dict.fromkeys(self._parts, observation)
        result = {
            key: self._scale(values[key], self.observation_space[key].shape[-1])
            if is_picture(space)
            else np.asarray(spaces.flatten(space, values[key]), np.float32)
            for key, space in self._parts.items()
        }
        return result if "image" in result else result | {"image": self._scale(self._render(), 3)}

    def _render(self) -> np.ndarray:
        try:
            picture = self.inner.render()
        except gymnasium.error.DependencyNotInstalled as error:
            raise EnvError(f"gym_{self._id} cannot render: {one_line(error)}") from error
        if not isinstance(picture, np.ndarray) or picture.ndim != 3 or picture.shape[-1] != 3:
            raise EnvError(f"gym_{self._id} renders {type(picture).__name__} in mode rgb_array, not an (H, W, 3) array")
        return picture

    def _scale(self, picture: np.ndarray, channels: int) -> np.ndarray:
        height, width = self._size
        scaled = cv2.resize(np.ascontiguousarray(picture, np.uint8), (width, height), interpolation=cv2.INTER_AREA)
        return np.broadcast_to(scaled.reshape(height, width, -1), (height, width, channels)).copy()


def is_picture(space: spaces.Space) -> bool:
    return (
        isinstance(space, spaces.Box)
        and space.dtype == np.uint8
        and len(space.shape) == 3
        and space.shape[-1] in (1, 3)
    )
