"""Ours or upstream's program for `bench.py`, in a process of its own because the two share their modules' names.

    python tests/bench/program.py CODE CHECKOUT CONFIG        CODE: ours | upstream; CONFIG: resolved options as JSON

Reads the name of a part per line, runs it once and answers with a JSON line of milliseconds by name. As the part "loop"
it trains, and goes on for some steps with every line.
"""

import json
import resource
import sys
import time
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import numpy as np
import torch

ACTIONS, EPISODE = 6, 250


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(times: dict, name: str, function):
    def call(*args, **kwargs):
        synchronize()
        start = time.perf_counter()
        result = function(*args, **kwargs)
        synchronize()
        times[name] = times.get(name, 0.0) + 1e3 * (time.perf_counter() - start)
        return result

    return call


def episode(size, rng) -> dict[str, np.ndarray]:
    """Random experience of one environment, (EPISODE, ...)."""
    rows = {
        "image": rng.integers(0, 256, (EPISODE, *size, 3), np.uint8),
        "orientations": rng.normal(size=(EPISODE, 14)),
    }
    rows |= {"action": rng.uniform(-1, 1, (EPISODE, ACTIONS)), "reward": rng.uniform(0, 1, EPISODE)}
    rows = {key: value if value.dtype == np.uint8 else value.astype(np.float32) for key, value in rows.items()}
    flags = {key: np.zeros(EPISODE, bool) for key in ("is_first", "is_terminal")}
    flags["is_first"][0] = True
    return rows | flags


def spaces(size) -> dict:
    box = gymnasium.spaces.Box
    return {"image": box(0, 255, (*size, 3), np.uint8), "orientations": box(-np.inf, np.inf, (14,), np.float32)}


def answer(times: dict[str, float]) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(times | {"peak MiB": peak}), file=sys.__stdout__, flush=True)


class Gate:
    """Called once per vector step by a training loop, stops it every `turn` steps until it is told to go on."""

    def __init__(self, turn: int):
        self.turn, self.calls, self.start = turn, 0, None

    def __call__(self) -> None:
        if self.calls % self.turn == 0:
            if self.start is not None:
                answer({"loop": 1e3 * (time.perf_counter() - self.start)})
            if not sys.stdin.readline():
                sys.exit()
            self.start = time.perf_counter()
        self.calls += 1


def ours(config, root: Path) -> dict:
    sys.path.insert(0, str(root))
    import dreamer
    import tools

    tools.keep_memory()
    device = dreamer.pick_device(config.device)
    tools.seed_everything(0)
    times = {}
    if config.part == "loop":
        gate, run = Gate(config.turn), dreamer.Run(config, Path(config.logdir), device)
        send = run.rollout.send
        run.rollout.send = lambda action: (send(action), gate())
        dreamer.train(run, lambda: False)
    act_space = gymnasium.spaces.Box(-1, 1, (ACTIONS,))
    agent = dreamer.make_agent(config, gymnasium.spaces.Dict(spaces(config.size)), act_space, device)
    sizes = {"batch_size": config.batch_size, "batch_length": config.batch_length}
    replay = tools.Replay(capacity=8 * EPISODE, num_envs=1, seed=0, extra_rows=EPISODE, device=device, **sizes)
    rng = np.random.default_rng(0)
    for _ in range(8):
        rows = episode(config.size, rng)
        for t in range(EPISODE):
            replay.add({key: value[t : t + 1] for key, value in rows.items()})
    agent.speed_up(config.compile)
    if not isinstance(agent.update, tools.CudaGraphs):  # parts of a CUDA graph cannot be timed
        agent.world_model.update = timed(times, "world model", agent.world_model.update)
        agent.actor_critic.update = timed(times, "actor-critic", agent.actor_critic.update)
    obs = {key: value[: config.envs] for key, value in rows.items() if key not in ("action", "reward")}
    batch, carry = replay.sample(), [None]

    def act() -> None:
        action, carry[0] = agent.policy(obs, carry[0])
        action.cpu()

    parts = {"update": lambda: agent.update(batch), "sample": replay.sample, "act": act}
    parts = {name: (timed(times, name, part), times) for name, part in parts.items()}
    return parts | {"kernels": (lambda: times.update(profile(lambda: agent.update(batch))), times)}


def profile(function, calls: int = 5) -> dict[str, float]:
    """Of one call, on a GPU, after some that warm up: wall time, time in kernels and between them, how many there are.

    The profiler slows down the host, so wall time is taken without it.
    """
    for _ in range(5):
        function()
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize()
    wall = 1e3 * (time.perf_counter() - start) / calls
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        function()
        synchronize()
    kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    busy = 1e-3 * sum(event.self_device_time_total for event in kernels)
    found = {"wall": wall, "in kernels": busy, "gap": wall - busy, "kernels": float(len(kernels))}
    return found | {"peak GPU MiB": torch.cuda.max_memory_allocated() / 2**20}


def theirs(config, root: Path) -> dict:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from upstream.record import import_program

    upstream = import_program(root)
    config.compile = config.video_pred_log = config.parallel = False  # its defaults
    config.size = tuple(config.size)
    times = {}
    if config.part == "loop":
        gate, simulate = Gate(config.turn), upstream.tools.simulate

        def gated(agent, *args, **kwargs):
            return simulate(lambda *inputs: (agent(*inputs), gate())[0], *args, **kwargs)

        upstream.tools.simulate = gated
        upstream.main(config)
    config.num_actions = ACTIONS
    space = SimpleNamespace(spaces=spaces(config.size))
    torch.manual_seed(0)
    rng, cache = np.random.default_rng(0), OrderedDict()
    for number in range(8):
        rows = episode(config.size, rng)
        cache[str(number)] = {key: list(value) for key, value in rows.items()} | {"discount": [1.0] * EPISODE}
    dataset = upstream.make_dataset(cache, config)
    agent = upstream.Dreamer(space, None, config, SimpleNamespace(step=0), dataset)
    agent = agent.to(config.device).requires_grad_(False)
    agent._wm._train = timed(times, "world model", agent._wm._train)
    agent._task_behavior._train = timed(times, "actor-critic", agent._task_behavior._train)
    obs = {key: value[: config.envs] for key, value in rows.items() if key not in ("action", "reward")}
    batch, carry = next(dataset), [None]

    def act() -> None:
        with torch.no_grad():
            output, carry[0] = agent._policy(obs, carry[0], True)
        output["action"].cpu()

    parts = {"update": lambda: agent._train(batch), "sample": lambda: next(dataset), "act": act}
    return {name: (timed(times, name, part), times) for name, part in parts.items()}


def main() -> None:
    code, root, options = sys.argv[1:]
    config = SimpleNamespace(**json.loads(options))
    torch.set_num_threads(config.threads)
    sys.stdout = sys.stderr
    parts = ours(config, Path(root)) if code == "ours" else theirs(config, Path(root))
    for line in sys.stdin:
        part, times = parts[line.strip()]
        times.clear()
        part()
        answer(times)


if __name__ == "__main__":
    main()
