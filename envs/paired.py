"""Paired observations: the same simulator states of a control-suite task, rendered under several distractions.

The same random actions are played from the same initial states without distraction and under each of several draws of
the distraction. The drawn distractions come from a random stream of their own, disjoint from training and evaluation.
"""

import gymnasium
import numpy as np

import envs


def clean_task(task: str) -> str:
    """The task without its variant. Raises EnvError outside the control suite."""
    parsed = envs.parse_task(task)
    if parsed.suite != "dmc":
        raise envs.EnvError(f"{task}: robustness is measured on control-suite tasks, such as dmc_walker_stand")
    return "_".join(parsed[:3])


def render(
    task: str, options: dict, *, draws: int = 4, episodes: int = 2, steps: int = 50, seed: int = 0
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Observations (draws, episodes, steps, ...) and the actions that led to them (episodes, steps, A).

    `options` are those of `envs.prepare`. Raises RuntimeError if the simulator states differ between draws.
    """
    steps = min(steps, options["time_limit"])
    env = envs.make(clean_task(task), seed=seed, **options)
    actions = np.random.default_rng(seed).uniform(-1.0, 1.0, (episodes, steps, *env.action_space.shape))
    actions = actions.astype(np.float32)
    clean = [rollout(env, actions[e, 1:], e, 0) for e in range(episodes)]
    env.close()
    observations = []
    for k in range(draws):
        env = envs.make(task, seed=np.random.SeedSequence([seed, envs.STREAMS.index("paired"), k]), **options)
        observations.append([rollout(env, actions[e, 1:], e, k * episodes + e) for e in range(episodes)])
        env.close()
        for distracted, reference in zip(observations[-1], clean, strict=True):
            envs.check_same_state(distracted, reference)
    keys = observations[0][0]
    return {key: np.array([[episode[key] for episode in row] for row in observations]) for key in keys}, actions


def rollout(env: gymnasium.Env, actions: np.ndarray, seed: int, distraction_seed: int) -> dict[str, np.ndarray]:
    """Observations (T+1, ...) of one episode that plays `actions` (T, A)."""
    observations = [env.reset(seed=seed, options={"distraction_seed": distraction_seed})[0]]
    observations += [env.step(action)[0] for action in actions]
    return {key: np.stack([observation[key] for observation in observations]) for key in observations[0]}
