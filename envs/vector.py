"""Several environments stepped together, in worker processes or in this one, with identical results."""

import atexit
import contextlib
import multiprocessing
import os
import signal
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Sequence

import gymnasium
import numpy as np

from envs.task import EnvError

FLAGS = ("is_first", "is_last", "is_terminal")
THREAD_LIMITS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")

# Why not gymnasium's AsyncVectorEnv: it builds one more environment in the calling process (a second simulator and GL
# context next to the training device), reports an error in a constructor as a closed pipe, and its workers import
# the calling script, and torch with it. An observation is a dozen kilobytes, so a pipe costs nothing beside rendering.


class Vector:
    """`n` environments behind one interface; the caller resets them, there is no automatic reset.

    Observations are dicts of arrays (n, ...) that the caller owns: the environment's keys in the dtype of its space,
    plus the bool flags `is_first` (after a reset), `is_last` (episode over) and `is_terminal` (over for a reason that
    ends the future rewards, not by time).

    Attributes:
        num_envs: n.
        render_mode: "rgb_array" if `render` works, as in gymnasium.
        observation_space: the Dict space of one environment, without the flags.
        action_space: the action space of one environment.
    """

    def __init__(self, constructors: Sequence[Callable[[], gymnasium.Env]], *, parallel: bool):
        """Build every environment; with `parallel`, each constructor is pickled and called in its own process.

        Raises:
            EnvError: as raised by a constructor, wherever it ran. Nothing is left running.
        """
        self.num_envs = len(constructors)
        self._slots: list[_Local | _Process] = []
        with self._closed_on_error():
            with _worker_surroundings() if parallel else contextlib.nullcontext():
                for constructor in constructors:
                    self._slots.append(_Process(constructor) if parallel else _Local(constructor))
            self.observation_space, self.action_space, self.render_mode = [slot.receive() for slot in self._slots][0]
        # Runs before the exit hook of multiprocessing, which would wait for ever for open workers: they ignore SIGTERM.
        atexit.register(self.close)
        self._obs = {
            key: np.zeros((self.num_envs, *space.shape), space.dtype) for key, space in self.observation_space.items()
        } | {flag: np.zeros(self.num_envs, bool) for flag in FLAGS}

    def reset(self, mask: np.ndarray) -> dict[str, np.ndarray]:
        """Reset the environments where `mask` (n,) is true. Returns the observations of all; the others keep theirs."""
        chosen = np.flatnonzero(mask)
        with self._closed_on_error():
            for i in chosen:
                self._slots[i].send("reset")
            for i in chosen:
                observation, _ = self._slots[i].receive()
                self._write(i, observation, is_first=True, is_last=False, is_terminal=False)
        return self._copy()

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Step every environment with its row of `action` (n, A).

        Returns:
            Observations, reward (n,) float32, done (n,) bool, and info {"success": (n,) float32}.
        """
        reward, success = np.zeros((2, self.num_envs), np.float32)
        with self._closed_on_error():
            for slot, row in zip(self._slots, action, strict=True):
                slot.send("step", row)
            for i, slot in enumerate(self._slots):
                observation, reward[i], terminated, truncated, info = slot.receive()
                success[i] = info.get("success", 0.0)
                self._write(i, observation, is_first=False, is_last=terminated or truncated, is_terminal=terminated)
        obs = self._copy()
        return obs, reward, obs["is_last"].copy(), {"success": success}

    def render(self, i: int) -> np.ndarray:
        """A picture of environment `i` for people, uint8 (H, W, 3) of any size."""
        with self._closed_on_error():
            self._slots[i].send("render")
            return self._slots[i].receive()

    def close(self) -> None:
        """Close every environment and end the workers. Safe to call twice."""
        for slot in self._slots:
            slot.close()
        self._slots = []
        atexit.unregister(self.close)

    def _write(self, i: int, observation: dict, **flags: bool) -> None:
        for key, value in (observation | flags).items():
            self._obs[key][i] = value

    def _copy(self) -> dict[str, np.ndarray]:
        return {key: value.copy() for key, value in self._obs.items()}

    @contextlib.contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise


def _properties(env: gymnasium.Env) -> tuple:
    return env.observation_space, env.action_space, env.render_mode


class _Local:
    """An environment in this process, with the interface of `_Process`."""

    def __init__(self, constructor: Callable[[], gymnasium.Env]):
        self._env = constructor()
        self._result = _properties(self._env)

    def send(self, method: str, *args) -> None:
        self._result = getattr(self._env, method)(*args)

    def receive(self):
        return self._result

    def close(self) -> None:
        self._env.close()


class _Process:
    """An environment in a worker process. Must be made inside `_worker_surroundings`."""

    def __init__(self, constructor: Callable[[], gymnasium.Env]):
        context = multiprocessing.get_context("spawn")  # forking a process that holds CUDA or GL state is not safe
        self._pipe, remote = context.Pipe()
        self._process = context.Process(target=_serve, args=(remote, constructor), daemon=True)
        self._process.start()
        remote.close()

    def send(self, method: str, *args) -> None:
        try:
            self._pipe.send((method, args))
        except BrokenPipeError:
            raise self._death() from None

    def receive(self):
        try:
            result = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            raise self._death() from None
        if isinstance(result, Exception):
            raise result
        return result

    def close(self) -> None:
        self._pipe.close()  # the worker sees the end of the pipe, closes its environment and exits
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _death(self) -> EnvError:
        self._process.join(timeout=5)
        return EnvError(
            f"an environment worker ended unexpectedly (exit code {self._process.exitcode}; -9 is often a lack of "
            "memory): use fewer --envs, or --parallel False to see what happens"
        )


def _serve(pipe, constructor: Callable[[], gymnasium.Env]) -> None:
    """Body of a worker: build one environment, then answer (method, arguments) until the pipe closes.

    The pipe also closes when the parent dies, however it dies, so no worker outlives it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach the whole group; the parent decides what to do
        signal.signal(number, signal.SIG_IGN)
    env = None
    try:
        env = constructor()
        pipe.send(_properties(env))
        while True:
            method, args = pipe.recv()
            pipe.send(getattr(env, method)(*args))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    except EnvError as error:
        pipe.send(error)
    except Exception:
        pipe.send(RuntimeError(f"an environment worker failed:\n{traceback.format_exc()}"))
    finally:
        if env is not None:
            env.close()


@contextlib.contextmanager
def _worker_surroundings() -> Iterator[None]:
    """What new processes inherit: one thread for each numeric library, and a main module that imports nothing.

    A spawned process imports the caller's main script before anything else; that would load torch in each worker.
    """
    main = sys.modules["__main__"]
    environ = {name: os.environ.get(name) for name in THREAD_LIMITS}
    sys.modules["__main__"] = types.ModuleType("__main__")
    os.environ.update(dict.fromkeys(THREAD_LIMITS, "1"))
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        for name, value in environ.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
