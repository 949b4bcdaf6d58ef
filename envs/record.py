"""Recording episodes: playing a policy in an environment, and giving pictures to the states of a Minari dataset.

A policy is a function of one observation (a dict) that returns an action of the environment.
"""

import functools
import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

import gymnasium
import numpy as np

from envs.episodes import UNREADABLE
from envs.gymnasium_tasks import GymnasiumTask
from envs.task import EnvError, one_line

Policy = Callable[[dict[str, np.ndarray]], np.ndarray | int]
ATOL, FAR = 1e-6, 0.1  # how far states may be from those that a simulator repeats exactly, or at all


def play(env: gymnasium.Env, policy: Policy, seed: int) -> dict[str, np.ndarray]:
    """One episode (T, ...) in the format of `envs.episodes`: all that the environment shows, seeded by `seed`."""
    observation, _ = env.reset(seed=seed)
    rows, over, terminated = [_row(env, observation, None)], False, False
    while not over:
        action = policy(observation)
        observation, reward, terminated, truncated, _ = env.step(action)
        rows.append(_row(env, observation, action, reward, terminated))
        over = terminated or truncated
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def _row(env: gymnasium.Env, observation: dict, action, reward=0.0, terminal: bool = False) -> dict[str, np.ndarray]:
    row: dict[str, Any] = {}
    for key, space in env.observation_space.items():  # type: ignore[attr-defined]
        value = np.asarray(observation[key])
        row[key] = value if space.dtype == np.uint8 else value.astype(np.float32).reshape(-1)
    if isinstance(env.action_space, gymnasium.spaces.Discrete):
        moved = np.eye(env.action_space.n, dtype=np.float32)[action] if action is not None else None
    else:
        moved = np.clip(np.asarray(action, np.float32), -1.0, 1.0) if action is not None else None
    row["action"] = np.zeros(_width(env), np.float32) if moved is None else moved
    return row | {"reward": np.float32(reward), "is_first": np.bool_(action is None), "is_terminal": np.bool_(terminal)}


def _width(env: gymnasium.Env) -> int:
    space = env.action_space
    return int(space.n) if isinstance(space, gymnasium.spaces.Discrete) else int(np.prod(space.shape))


def make_policy(name: str, env: gymnasium.Env, task: str) -> Callable[[int], Policy]:
    """Of --record_policy: random, FILE.npz or MODULE:FUNCTION; called with the seed of an episode. Raises EnvError."""
    if name == "random":
        return functools.partial(random_policy, env)
    policy = linear_policy(name, env) if name.endswith(".npz") else imported_policy(name, task)
    return lambda seed: policy


def random_policy(env: gymnasium.Env, seed: int) -> Policy:
    """Uniform actions."""
    rng, space = np.random.default_rng(seed), env.action_space
    if isinstance(space, gymnasium.spaces.Discrete):
        return lambda observation: int(rng.integers(space.n))
    return lambda observation: rng.uniform(-1.0, 1.0, space.shape).astype(np.float32)


def linear_policy(path: str, env: gymnasium.Env) -> Policy:
    """clip(W (state - mean) / std), with `W` (A,S), `mean` and `std` (S,) from an .npz; see setup/expert.py."""
    try:
        with np.load(path, allow_pickle=False) as file:
            weight, mean, std = file["W"], file["mean"], file["std"]
    except UNREADABLE as error:
        raise EnvError(f"{path} is no linear policy with arrays W, mean and std: {one_line(error)}") from error
    shown = env.observation_space.get("state", None)  # type: ignore[attr-defined]
    states = shown.shape[0] if shown else 0
    if weight.shape != (_width(env), states) or mean.shape != (states,) or std.shape != (states,):
        raise EnvError(
            f"{path} maps {weight.shape[-1]} numbers to {len(weight)} actions, the environment has a state of {states} "
            f"and takes {_width(env)}"
        )
    return lambda observation: np.clip(weight @ ((observation["state"] - mean) / std), -1.0, 1.0).astype(np.float32)


def imported_policy(name: str, task: str) -> Policy:
    """`MODULE:FUNCTION`, called once with the task; the module must be importable (PYTHONPATH)."""
    module, _, function = name.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise EnvError(
            f"unknown --record_policy {name!r} ({one_line(error)}): use agent, random, FILE.npz, minari:DATASET or "
            "MODULE:FUNCTION of an importable module (PYTHONPATH)"
        ) from error
    return make(task)


def from_minari(dataset_id: str, env: gymnasium.Env, first: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """Episodes of a local Minari dataset, from number `first` on, as `env` shows them: a `gym_` task of the same one.

    The stored actions are played from the stored seed. If that does not repeat the stored observations, which another
    version of the simulator may not, every step begins in the stored state instead: this needs a MuJoCo environment
    that observes all velocities and all positions but the first ones, which then follow from the steps.

    Raises:
        EnvError: minari or the dataset is missing, or its states are not those of `env`.
    """
    try:
        import minari
    except ImportError as error:
        raise EnvError("reading Minari datasets needs the package minari: pip install 'minari[hdf5]'") from error
    try:
        dataset = minari.load_dataset(dataset_id)
    except Exception as error:  # third-party code
        raise EnvError(f"{dataset_id} cannot be read: {one_line(error)}; get it with minari download") from error
    task, seeds = env.unwrapped, {}
    if not isinstance(task, GymnasiumTask) or task.named:
        raise EnvError("Minari datasets are recorded for gym_ tasks that observe one vector, as gym_HalfCheetah-v5")
    numbers = dataset.episode_indices[first:]
    for metadata in dataset.storage.get_episode_metadata(numbers):
        seeds[int(metadata["id"])] = metadata.get("seed")
    for episode in dataset.iterate_episodes(numbers):
        states, actions = np.asarray(episode.observations), np.asarray(episode.actions)
        steps = _repeat(task, states, actions, seeds[int(episode.id)])
        rows = [
            row | {"action": task.outer_action(action)} for row, action in zip(steps, [None, *actions], strict=True)
        ]
        late = {"reward": episode.rewards, "is_terminal": episode.terminations}
        found = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        found |= {key: np.concatenate([np.zeros(1, values.dtype), values]) for key, values in late.items()}
        found["reward"] = found["reward"].astype(np.float32)
        yield found | {"is_first": np.arange(len(rows)) == 0}


def _repeat(task: GymnasiumTask, states: np.ndarray, actions: np.ndarray, seed: int | None) -> list[dict]:
    """What `task` shows in `states` (T+1,S) of an episode with `actions` (T,A)."""
    inner, simulator = task.inner, cast(Any, task.inner.unwrapped)

    def live() -> Iterator[np.ndarray]:
        yield inner.reset(seed=seed)[0]
        for action in actions:
            yield inner.step(action)[0]

    if seed is not None and all(np.allclose(x, y, 0.0, ATOL) for x, y in zip(live(), states, strict=True)):
        return [task.observe(state) for state in live()]
    model = getattr(simulator, "model", None)
    hidden = model.nq + model.nv - states.shape[1] if model else -1
    if not 0 <= hidden < 3:
        raise EnvError("the dataset's states do not repeat, and they do not determine positions and velocities")
    inner.reset(seed=seed)
    place, rows, largest = simulator.data.qpos[:hidden].copy(), [], 0.0
    for t, state in enumerate(states):
        if t:
            simulator.set_state(*np.split(np.concatenate([place, states[t - 1]]), [model.nq]))
            reached = inner.step(actions[t - 1])[0]
            place, largest = simulator.data.qpos[:hidden].copy(), max(largest, np.abs(reached - state).max())
        else:
            simulator.set_state(*np.split(np.concatenate([place, state]), [model.nq]))
        rows.append(task.observe(state))
    if largest > FAR:
        raise EnvError(
            f"the dataset's steps lead elsewhere here, by up to {largest:.2g}: is it of another environment?"
        )
    if largest > ATOL:
        warnings.warn(
            f"another version of the simulator made these steps: states differ by {largest:.1g}", stacklevel=2
        )
    return rows
