"""Several environments stepped together, in worker processes or in this process, with identical results."""

import atexit
import contextlib
import ctypes
import hashlib
import multiprocessing
import os
import signal
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Sequence

import gymnasium
import numpy as np

from envs.task import EnvError, get_state, set_state

FLAGS = ("is_first", "is_last", "is_terminal")
THREAD_LIMITS = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1"
)
THREAD_LIMITS["LP_NUM_THREADS"] = "0"  # Mesa renders small images faster without extra threads
RESTARTS = 3  # of one worker without a finished episode in between
START_TIMEOUT = 300.0
WAYS_OUT = "use fewer --envs, a longer --worker_timeout, or --parallel False to see what happens"
PR_SET_PDEATHSIG = 1  # of Linux' prctl

# Why not gymnasium's AsyncVectorEnv: it creates one more environment in the calling process (a second simulator and GL
# context next to the training device), reports an error in a constructor as a closed pipe, and its workers import the
# calling script, and with it torch. An observation is about 12 kB, so pipes cost little compared with rendering.


class Vector:
    """`n` environments behind one interface. The caller resets them; there is no automatic reset.

    Observations are dicts of arrays (n, ...) owned by the caller: the environment's keys with the dtype of its space,
    and the bool flags `is_first` (after a reset), `is_last` (the episode is over) and `is_terminal` (it ended in a
    terminal state, not by the time limit).

    A worker that dies or does not respond in time is replaced, with a warning; its episode is lost, and its next ones
    use a new seed. Repeated failures of a worker, and exceptions raised in it, are raised here.

    Attributes:
        num_envs: n.
        render_mode: "rgb_array" if `render` works, as in gymnasium.
        observation_space: the Dict space of one environment, without the flags.
        action_space: the action space of one environment.
        restarts: workers that were replaced.
    """

    def __init__(
        self,
        constructors: Sequence[Callable[[], gymnasium.Env]],
        *,
        parallel: bool,
        timeout: float = 300.0,
        niceness: int = 0,
    ):
        """Build every environment; with `parallel`, each constructor is pickled and called in its own process.

        `timeout`: seconds a worker may take to respond (to start, at least START_TIMEOUT); 0 = no limit.
        `niceness`: scheduling priority of the workers, see `nice`.

        Raises:
            EnvError: from a constructor, wherever it ran. No worker is left running.
        """
        self.num_envs, self.restarts = len(constructors), 0
        self._constructors, self._timeout, self._niceness = constructors, timeout or None, niceness
        self._start_timeout = timeout and max(timeout, START_TIMEOUT) or None
        self._slots: list[_Local | _Process] = []
        with self._closed_on_error():
            with _worker_surroundings() if parallel else contextlib.nullcontext():
                for constructor in constructors:
                    self._slots.append(_Process(constructor, niceness) if parallel else _Local(constructor))
            try:
                properties = [slot.receive(self._start_timeout) for slot in self._slots]
            except _WorkerLost as error:
                raise EnvError(f"an environment worker {error}: {WAYS_OUT}") from None
            self.observation_space, self.action_space, self.render_mode = properties[0]
        # The start state and actions of each episode, and whether the worker that ran it was lost.
        self._starts, self._actions = [None] * self.num_envs, [[] for _ in range(self.num_envs)]
        self._lost = np.zeros(self.num_envs, bool)
        self._failures = np.zeros(self.num_envs, int)
        # Runs before the exit hook of multiprocessing, which would wait forever for workers, since they ignore SIGTERM.
        atexit.register(self.close)
        self._obs = {
            key: np.zeros((self.num_envs, *space.shape), space.dtype) for key, space in self.observation_space.items()
        } | {flag: np.zeros(self.num_envs, bool) for flag in FLAGS}

    def reset(self, mask: np.ndarray) -> dict[str, np.ndarray]:
        """Reset the environments where `mask` (n,) is true; returns the observations of all environments."""
        with self._closed_on_error():
            for i, (start, observation) in self._call_all(np.flatnonzero(mask), "reset").items():
                self._starts[i], self._actions[i], self._lost[i] = start, [], False
                self._write(i, observation, is_first=True, is_last=False, is_terminal=False)
        return self.observations()

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Step every environment with its row of `action` (n, A).

        Returns:
            Observations, reward (n,) float32, done (n,) bool, and info {"success": (n,) float32, "lost": (n,) bool}.
            Where `lost`, the worker was replaced: the episode is over and the observation is the previous one.
        """
        self.step_async(action)
        return self.step_wait()

    def step_async(self, action: np.ndarray) -> None:
        """First half of `step`: start the workers. No other call may come before `step_wait`."""
        self._begin(np.arange(self.num_envs), action)

    def step_wait(self) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Second half of `step`: wait for the result."""
        return self._finish()

    def render(self, i: int) -> np.ndarray | None:
        """A rendering of environment `i` for videos, uint8 (H, W, 3) of any size; None if its worker was replaced."""
        with self._closed_on_error():
            picture = self._call([i], "render")[i]
        self._lost[i] |= picture is None
        return picture

    def observations(self) -> dict[str, np.ndarray]:
        """The current observations of all environments."""
        return {key: value.copy() for key, value in self._obs.items()}

    def state_dict(self, running: np.ndarray) -> list[dict]:
        """State for `load_state_dict`, as JSON types; without the episode in progress where `running` (n,) is false."""
        with self._closed_on_error():
            idle = self._call_all(np.flatnonzero(~running), "get_state")
        return [
            {"start": self._starts[i], "actions": np.asarray(self._actions[i]).tolist(), "digest": self._digest(i)}
            if running[i]
            else {"start": idle[i]}
            for i in range(self.num_envs)
        ]

    def load_state_dict(self, states: list[dict]) -> np.ndarray:
        """Restore every environment, and return which episodes (n,) continue.

        Episodes are restored by replaying their actions. One that does not reach the same observation does not
        continue, with a warning.
        """
        with self._closed_on_error():
            self._call_all(range(self.num_envs), "set_state", [state["start"] for state in states])
        actions = [np.asarray(state.get("actions", []), self.action_space.dtype) for state in states]
        running = np.array(["actions" in state for state in states])
        self.reset(running)
        for t in range(max(map(len, actions))):
            chosen = [i for i in np.flatnonzero(running) if t < len(actions[i])]
            self._begin(chosen, {i: actions[i][t] for i in chosen})
            _, _, done, _ = self._finish()
            running &= ~done
        for i, state in enumerate(states):
            running[i] &= self._digest(i) == state.get("digest")
            if "digest" in state and not running[i]:
                warn(f"environment {i} could not be restored to its state: its episode ends at the checkpoint")
        return running

    def close(self) -> None:
        """Close every environment and stop the workers. Safe to call twice."""
        for slot in self._slots:
            slot.close()
        self._slots = []
        atexit.unregister(self.close)

    def _begin(self, chosen: Iterable[int], action) -> None:
        """`step_async` for the environments `chosen`, each with its `action[i]`."""
        self._pending = {i: np.array(action[i]) for i in chosen if not self._lost[i]}
        with self._closed_on_error():
            self._send(self._pending, "step", self._pending)

    def _finish(self) -> tuple:
        reward, success = np.zeros((2, self.num_envs), np.float32)
        with self._closed_on_error():
            results = self._receive(self._pending)
        for i, result in results.items():
            if result is None:
                self._lost[i] = True
                continue
            observation, reward[i], terminated, truncated, info = result
            success[i] = info.get("success", 0.0)
            over = terminated or truncated
            self._write(i, observation, is_first=False, is_last=over, is_terminal=terminated)
            self._actions[i].append(self._pending[i])
            self._failures[i] *= not over
        for i in np.flatnonzero(self._lost):
            self._write(i, {}, is_first=False, is_last=True, is_terminal=False)
        obs = self.observations()
        return obs, reward, obs["is_last"].copy(), {"success": success, "lost": self._lost.copy()}

    def _write(self, i: int, observation: dict, **flags: bool) -> None:
        for key, value in (observation | flags).items():
            self._obs[key][i] = value

    def _digest(self, i: int) -> str:
        return hashlib.sha256(b"".join(self._obs[key][i].tobytes() for key in self.observation_space)).hexdigest()

    def _call(self, chosen: Iterable[int], method: str, arguments=None) -> dict:
        """Results by environment, each called with `arguments[i]`; None where the worker was replaced."""
        self._send(chosen, method, arguments)
        return self._receive(chosen)

    def _send(self, chosen: Iterable[int], method: str, arguments=None) -> None:
        for i in chosen:
            self._slots[i].send(method, *([] if arguments is None else [arguments[i]]))

    def _receive(self, chosen: Iterable[int]) -> dict:
        results, failed = {}, {}
        for i in chosen:
            try:
                results[i] = self._slots[i].receive(self._timeout)
            except _WorkerLost as error:
                results[i], failed[i] = None, error
        for i, error in failed.items():
            self._replace(i, error)
        return results

    def _call_all(self, chosen: Iterable[int], method: str, arguments=None) -> dict:
        """`_call`, repeated for replaced workers."""
        results = self._call(chosen, method, arguments)
        while missing := [i for i, result in results.items() if result is None]:
            results |= self._call(missing, method, arguments)
        return results

    def _replace(self, i: int, error: "_WorkerLost") -> None:
        while True:
            self._failures[i] += 1
            if self._failures[i] > RESTARTS:
                raise EnvError(
                    f"the worker of environment {i} failed {self._failures[i]} times in a row (it {error}): {WAYS_OUT}"
                )
            warn(f"the worker of environment {i} {error}: replaced, its episode is lost")
            self.restarts += 1
            self._slots[i].close(kill=True)
            with _worker_surroundings():
                self._slots[i] = _Process(self._constructors[i], self._niceness)
            try:
                self._slots[i].receive(self._start_timeout)
                # The original seed would repeat the first episodes.
                self._slots[i].send("seed", int(np.random.SeedSequence().generate_state(1)[0]))
                self._slots[i].receive(self._timeout)
                return
            except _WorkerLost as again:
                error = again

    @contextlib.contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


class _WorkerLost(Exception):
    """A worker died or hangs; the message continues "it ..."."""


def _properties(env: gymnasium.Env) -> tuple:
    return env.observation_space, env.action_space, env.render_mode


def _answer(env: gymnasium.Env, method: str, *args):
    if method == "seed":
        env.reset(seed=args[0])
        return True
    if method == "reset":
        return get_state(env.unwrapped), env.reset()[0]
    if method == "get_state":
        return get_state(env.unwrapped)
    if method == "set_state":
        set_state(env.unwrapped, *args)
        return True
    return getattr(env, method)(*args)


class _Local:
    """An environment in this process, with the interface of `_Process`."""

    def __init__(self, constructor: Callable[[], gymnasium.Env]):
        self._env = constructor()
        self._result = _properties(self._env)

    def send(self, method: str, *args) -> None:
        self._result = _answer(self._env, method, *args)

    def receive(self, timeout: float | None):
        return self._result

    def close(self) -> None:
        self._env.close()


class _Process:
    """An environment in a worker process. Must be made inside `_worker_surroundings`."""

    def __init__(self, constructor: Callable[[], gymnasium.Env], niceness: int):
        context = multiprocessing.get_context("spawn")  # forking a process with CUDA or GL state is not safe
        self._pipe, remote = context.Pipe()
        self._process = context.Process(target=_serve, args=(remote, constructor, niceness), daemon=True)
        self._process.start()
        remote.close()

    def send(self, method: str, *args) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # reported by `receive`
            self._pipe.send((method, args))

    def receive(self, timeout: float | None):
        """The next result. Raises what the worker raised, or _WorkerLost if none arrives within `timeout` seconds."""
        if not self._pipe.poll(timeout):
            raise _WorkerLost(f"did not answer for {timeout:g} s")
        try:
            result = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(timeout=5)
            raise _WorkerLost(f"ended (exit code {self._process.exitcode}; -9 is often a lack of memory)") from None
        if isinstance(result, Exception):
            raise result
        return result

    def close(self, kill: bool = False) -> None:
        if kill:
            self._process.kill()
        self._pipe.close()  # the worker then closes its environment and exits
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(pipe, constructor: Callable[[], gymnasium.Env], niceness: int) -> None:
    """Body of a worker: build one environment, then serve (method, arguments) until the pipe closes.

    The pipe also closes when the parent dies for any reason, so no worker outlives it; on Linux the kernel then kills
    even workers that hang.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
    ):  # sent to the whole process group; the parent handles them
        signal.signal(number, signal.SIG_IGN)
    os.nice(niceness)
    env = None
    try:
        env = constructor()
        pipe.send(_properties(env))
        while True:
            method, args = pipe.recv()
            pipe.send(_answer(env, method, *args))
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
    """Environment for new processes: one thread per numeric library, and an empty main module.

    A spawned process first imports the caller's main script, which would load torch in every worker.
    """
    main = sys.modules["__main__"]
    environ = {name: os.environ.get(name) for name in THREAD_LIMITS}
    sys.modules["__main__"] = types.ModuleType("__main__")
    os.environ.update(THREAD_LIMITS)
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        for name, value in environ.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
