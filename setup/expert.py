"""A linear policy for a gymnasium task with continuous actions, by augmented random search, to record episodes with.

python setup/expert.py --task gym_HalfCheetah-v5 --minutes 5 --out expert.npz
python dreamer.py --record demos --task 'gym_HalfCheetah-v5?camera_name=track' --record_policy expert.npz

Action = clip(W (state - mean) / std). Each update plays episodes of --steps steps with W + noise and W - noise in
--directions random directions, and moves W along the best half of them (Mania et al., 2018, arXiv 1803.07055). Mean and
std are those of all states seen. The file holds the W with the best return of an episode of its own (arrays W, mean,
std). Nothing is rendered.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from setup import console  # before what takes seconds to import

# isort: split
import argparse
import time

import gymnasium
import numpy as np

from envs import EnvError, gymnasium_tasks


class States:
    """Running mean and variance of states (S,)."""

    def __init__(self, size: int):
        self.count, self.mean, self.squares = 0, np.zeros(size), np.zeros(size)

    def add(self, state: np.ndarray) -> None:
        self.count += 1
        delta = state - self.mean
        self.mean += delta / self.count
        self.squares += delta * (state - self.mean)

    @property
    def std(self) -> np.ndarray:
        std = np.sqrt(self.squares / max(1, self.count - 1))
        return np.where(std < 1e-6, 1.0, std)


def play(env: gymnasium.Env, weight: np.ndarray, mean: np.ndarray, std: np.ndarray, steps: int, seen: list) -> float:
    """Return of an episode; appends its states to `seen`."""
    low, high = env.action_space.low, env.action_space.high  # type: ignore[attr-defined]
    state, score = env.reset()[0], 0.0
    for _ in range(steps):
        seen.append(state)
        action = np.clip(weight @ ((state - mean) / std), -1.0, 1.0)
        state, reward, terminated, truncated, _ = env.step(
            (low + (action + 1.0) / 2.0 * (high - low)).astype(low.dtype)
        )
        score += float(reward)
        if terminated or truncated:
            break
    return score


def search(env: gymnasium.Env, out: Path, seconds: float, steps: int, directions: int, seed: int) -> float:
    """Return of the best policy, which is in `out`; every better one is written at once."""
    step_size, noise = 0.02, 0.03
    rng = np.random.default_rng(seed)
    states, size = States(env.observation_space.shape[0]), (env.action_space.shape[0], env.observation_space.shape[0])
    weight, best, started, said, update = np.zeros(size), -np.inf, time.monotonic(), time.monotonic(), 0
    env.reset(seed=seed)
    while update == 0 or time.monotonic() - started < seconds:
        mean, std, seen = states.mean.copy(), states.std, []
        found = play(env, weight, mean, std, steps, seen)
        if found > best:
            best = found
            with open(out, "wb") as file:
                np.savez(file, W=weight, mean=mean, std=std)
        moves = rng.normal(size=(directions, *size))
        scores = np.array([[play(env, weight + s * noise * d, mean, std, steps, seen) for s in (1, -1)] for d in moves])
        top = np.argsort(-scores.max(1))[: max(1, directions // 2)]
        gain = (scores[top, 0] - scores[top, 1]) / (scores[top].std() + 1e-8)
        weight = weight + step_size / len(top) * np.tensordot(gain, moves[top], 1)
        for state in seen:
            states.add(state)
        update += 1
        if time.monotonic() - said > 10.0:
            said = time.monotonic()
            print(f"{said - started:4.0f} s, update {update}: return {found:.0f}, best {best:.0f}", flush=True)
    return best


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, help="gym_ID, with a vector observation and continuous actions")
    parser.add_argument("--minutes", type=float, default=5.0, help="time to search (5)")
    parser.add_argument("--steps", type=int, default=300, help="steps of an episode (300)")
    parser.add_argument("--directions", type=int, default=16, help="directions tried per update (16)")
    parser.add_argument("--seed", type=int, default=0, help="of the search (0)")
    parser.add_argument("--out", type=Path, default=Path("expert.npz"), help="file to write (expert.npz)")
    args = parser.parse_args(argv)
    try:
        if args.directions < 1:
            raise EnvError(f"--directions takes at least 1, not {args.directions}")
        suite, _, rest = args.task.partition("_")
        if suite != "gym":
            raise EnvError(f"{args.task}: only gym_ tasks are searched, such as gym_HalfCheetah-v5")
        gymnasium_tasks.parse(rest)
        name, arguments = gymnasium_tasks.split_arguments(rest)
        env = gymnasium.make(name, disable_env_checker=True, **arguments)
        box = gymnasium.spaces.Box
        spaces = env.observation_space, env.action_space
        if not all(isinstance(space, box) and len(space.shape) == 1 for space in spaces):
            raise EnvError(f"{args.task} needs a vector observation and continuous actions")
        best = search(env, args.out, 60.0 * args.minutes, args.steps, args.directions, args.seed)
    except (EnvError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: return {best:.0f} in {args.steps} steps")
    return 0


if __name__ == "__main__":
    console.run(main)
