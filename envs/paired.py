"""Paired observations: the same simulator states of a control-suite task, rendered under several distractions.

The same actions are played from the same initial states without distraction and under each of several draws of the
distraction. The drawn distractions come from a random stream of their own, disjoint from training and evaluation.
"""

from collections.abc import Callable
from typing import NamedTuple

import gymnasium
import numpy as np

import envs

Obs = dict[str, np.ndarray]


class Paired(NamedTuple):
    """The same episodes without distraction, (episodes, steps, ...), and under it, (draws, episodes, steps, ...).

    actions (episodes, steps, A) and rewards (episodes, steps) led to the observation of their row; row 0 has none.
    """

    clean: Obs
    distracted: Obs | None
    actions: np.ndarray
    rewards: np.ndarray


def clean_task(task: str) -> str:
    """The task without its variant. Raises EnvError outside the control suite."""
    parsed = envs.parse_task(task)
    if parsed.suite != "dmc":
        raise envs.EnvError(f"{task}: robustness is measured on control-suite tasks, such as dmc_walker_stand")
    return "_".join(parsed[:3])


def render(
    task: str,
    options: dict,
    *,
    draws: int = 3,
    episodes: int = 16,
    steps: int = 32,
    seed: int = 0,
    actions: np.ndarray | None = None,
) -> Paired:
    """Play `actions` (episodes, steps, A), random ones by default, and render them clean and under each draw.

    A clean task has no distracted episodes. `options` are those of `envs.prepare`. Raises RuntimeError if the simulator
    states differ between draws.
    """
    steps = min(steps, options["time_limit"])
    variant = envs.parse_task(task).variant
    # With the camera of the distracted task, which is 0 for all.
    env = envs.make(clean_task(task), seed=seed, camera=0 if variant else None, **options)
    if actions is None:
        actions = np.random.default_rng(seed).uniform(-1.0, 1.0, (episodes, steps, *env.action_space.shape))
    actions = actions.astype(np.float32)
    clean = [rollout(env, actions[e, 1:], e, 0) for e in range(episodes)]
    env.close()
    distracted = []
    for k in range(draws if variant else 0):
        env = envs.make(task, seed=np.random.SeedSequence([seed, envs.STREAMS.index("paired"), k]), **options)
        played = [rollout(env, actions[e, 1:], e, k * episodes + e)[0] for e in range(episodes)]
        env.close()
        for observed, (reference, _) in zip(played, clean, strict=True):
            envs.check_same_state(observed, reference)
        distracted.append(stack(played))
    rewards = np.array([reward for _, reward in clean])
    return Paired(stack([obs for obs, _ in clean]), stack(distracted) if distracted else None, actions, rewards)


def record(
    env: gymnasium.Env, act: Callable[[Obs, bool], np.ndarray], episodes: int = 16, steps: int = 32
) -> np.ndarray:
    """Actions (episodes, steps, A) of `act(obs, first)` in the episodes that `render` begins; row 0 is zero."""
    actions = np.zeros((episodes, steps, *env.action_space.shape), np.float32)
    for e in range(episodes):
        obs, _ = env.reset(seed=e, options={"distraction_seed": 0})
        for t in range(1, steps):
            actions[e, t] = act(obs, t == 1)
            obs = env.step(actions[e, t])[0]
    return actions


def rollout(env: gymnasium.Env, actions: np.ndarray, seed: int, distraction_seed: int) -> tuple[Obs, np.ndarray]:
    """Observations (T+1, ...) and rewards (T+1,) of one episode that plays `actions` (T, A)."""
    observations, rewards = [env.reset(seed=seed, options={"distraction_seed": distraction_seed})[0]], [0.0]
    for action in actions:
        obs, reward, *_ = env.step(action)
        observations.append(obs)
        rewards.append(float(reward))
    return stack(observations), np.array(rewards)


def stack(rows: list[Obs]) -> Obs:
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}
