"""Measure what this machine makes of the code. Prints medians and ratios; tests nothing.

    python tests/bench/bench.py update [--preset tiny]  an update and its parts, acting, drawing a batch, peak memory
    python tests/bench/bench.py methods [--preset tiny]  an update of every --method beside that of hrssm
    python tests/bench/bench.py loop [--preset tiny]    wall-clock time of the whole training loop per policy step
    python tests/bench/bench.py launches [--preset tiny] kernel launches of an update, counted without a GPU, and on a
                                                        GPU time in kernels and between them for every --compile
    python tests/bench/bench.py scaling                 time of an update against batch size and length
    python tests/bench/bench.py envs                    per-step cost of every DMC variant
    python tests/bench/bench.py memory                  memory of four worker processes over twenty episodes

With `--upstream HRSSM`, a checkout of github.com/bit1029public/HRSSM, its implementation takes turns with ours and
ratios are printed (`envs` then needs xmltodict); so does an earlier commit of ours with `update --earlier CHECKOUT`.
`envs` and `memory` need asset sets: `python setup/download.py demo` makes some. Other options go to the configuration:
`python tests/bench/bench.py update --device cuda --compile off`.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import envs
import tools
from envs import assets, dmc

TASK = ("walker", "stand")
GS = [variant for variant in dmc.VARIANTS if variant != "video"]


class Clock:
    """Collects the milliseconds spent in methods that it was put around."""

    def __init__(self):
        self.spent = {}

    def around(self, owner, method: str, stage: str) -> None:
        original = getattr(owner, method)

        def timed(*args, **kwargs):
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self.spent[stage] = self.spent.get(stage, 0.0) + 1e3 * (time.perf_counter() - start)

        setattr(owner, method, timed)

    def measure(self, call, *args) -> tuple[float, float, float]:
        """Milliseconds of a call in physics, in rendering and elsewhere."""
        self.spent = {}
        start = time.perf_counter()
        call(*args)
        total = 1e3 * (time.perf_counter() - start)
        physics, render = self.spent.get("physics", 0.0), self.spent.get("render", 0.0)
        return physics, render, total - physics - render


def ours(variant: str):
    env = envs.make("_".join(filter(None, ["dmc", *TASK, variant]))).unwrapped
    clock = Clock()
    clock.around(env._env, "step", "physics")
    clock.around(env._camera, "render", "render")
    return env, clock


def theirs(module, variant: str):
    davis = [str(assets.root() / "davis")]
    env = module.make_env(*TASK, 0, action_repeat=2, image_size=64, mode=variant, intensity=0.1, ds_resource_path=davis)
    if variant.startswith("video"):  # a checkout may lack some
        paths = [path for path in env.env._video_paths if Path(path).exists()]
        env.env._video_paths, env.env._num_videos = paths, len(paths)
    base = env
    while hasattr(base, "env"):
        base = base.env
    inner = base._env
    while hasattr(inner, "_env"):
        inner = inner._env
    clock = Clock()
    clock.around(inner, "step", "physics")
    clock.around(base, "render", "render")
    return env, clock


def bench_envs(args) -> None:
    module = None
    if args.upstream:
        from tests.upstream import envs as upstream_envs

        dmc.check_rendering()
        module = upstream_envs.load(args.upstream)
        os.chdir(args.upstream)  # it looks for its files there
    rng = np.random.default_rng(0)
    print(f"ms per agent step (two inner steps, 64x64), medians of {args.steps}; reset: median of {args.resets}")
    print(f"{'variant':15}{'code':10}{'physics':>9}{'render':>9}{'rest':>9}{'rest/render':>13}{'reset':>9}")
    for variant in ["", *GS]:
        codes = {"ours": ours(variant)}
        if module and variant:
            codes["upstream"] = theirs(module, variant)
        steps, resets = {code: [] for code in codes}, {code: [] for code in codes}
        for _ in range(args.resets):
            for code, (env, clock) in codes.items():
                resets[code].append(sum(clock.measure(env.reset)))
            for _ in range(args.steps // args.resets):
                action = rng.uniform(-1, 1, 6).astype(np.float32)
                for code, (env, clock) in codes.items():
                    steps[code].append(clock.measure(env.step, action))
        for code in codes:
            physics, render, rest = np.median(steps[code], 0)
            reset = np.median(resets[code])
            share = f"{100 * rest / render:12.1f}%"
            print(
                f"{variant or 'clean':15}{code:10}{physics:9.2f}{render:9.2f}{rest:9.2f}{share}{reset:9.1f}", flush=True
            )


class Program:
    """A process that runs `program.py`."""

    def __init__(self, code: str, checkout: str | Path, options: list[str], **settings):
        config = vars(tools.load_config(options)) | settings
        command = [
            sys.executable,
            str(Path(__file__).with_name("program.py")),
            code,
            str(checkout),
            json.dumps(config),
        ]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, part: str) -> dict[str, float]:
        self.process.stdin.write(f"{part}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"error: {part} failed, see above")
        return json.loads(answer)


def take_turns(programs: dict[str, Program], parts: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Medians by program and name; the first round does not count."""
    found = {name: {} for name in programs}
    for number in tqdm(range(rounds + 1), disable=None, leave=False):
        for part in parts:
            for name, program in programs.items():
                times = program.run(part)
                for key, value in times.items() if number else ():
                    found[name].setdefault(key, []).append(value)
    for program in programs.values():
        program.process.kill()
    return {name: {key: float(np.median(values)) for key, values in times.items()} for name, times in found.items()}


def show(title: str, found: dict[str, dict[str, float]], keys: list[str], against: str = "upstream") -> None:
    """A row of medians for each of `keys`, and how many times as long the program `against` takes."""
    reference = found.get(against)
    columns = [*found, *(f"x {name}" for name in found if reference and name != against)]
    print(f"{title:18}" + "".join(f"{column:>16}" for column in columns))
    for key in keys:
        if not all(key in times for times in found.values()):
            continue
        row = [f"{times[key]:16.1f}" for times in found.values()]
        if reference:
            row += [f"{reference[key] / times[key]:16.2f}" for name, times in found.items() if name != against]
        print(f"{key:18}" + "".join(row), flush=True)


def device_settings(options: list[str]) -> dict:
    """The device and threads that a run with these options would have."""
    import dreamer

    config = tools.load_config(options)
    return {"device": str(dreamer.pick_device(config.device)), "threads": config.threads or tools.default_threads(0)}


def bench_update(args) -> None:
    options = ["--configs", args.preset, *args.options]
    settings = device_settings(options) | {"part": "update"}
    programs = {"float32": ("ours", tools.ROOT, {"precision": 32})}
    if args.earlier:
        programs["earlier"] = ("ours", args.earlier, {"precision": 32})
    else:
        programs["bf16"] = ("ours", tools.ROOT, {"precision": 16})
    if args.upstream:
        programs["upstream"] = ("upstream", args.upstream, {})
    programs = {name: Program(code, root, options, **settings, **own) for name, (code, root, own) in programs.items()}
    found = take_turns(programs, ["update", "act", "sample"], args.rounds)
    print(f"{args.preset} on {settings['device']}, {settings['threads']} threads, medians of {args.rounds}, ms (MiB)")
    keys = ["update", "world model", "actor-critic", "act", "sample", "peak MiB"]
    show("", found, keys, "earlier" if args.earlier else "upstream")


def bench_methods(args) -> None:
    """Two programs at a time, so that they fit into memory: hrssm and one other."""
    options = ["--configs", args.preset, *args.options]
    settings = device_settings(options) | {"part": "update"}
    print(f"{args.preset} on {settings['device']}, {settings['threads']} threads, medians of {args.rounds}, ms (MiB)")
    print(f"{'method':12}{'update':>10}{'hrssm':>10}{'ratio':>8}{'world model':>14}{'ratio':>8}{'peak MiB':>10}")
    for method in (name for name in tools.read_options()[0]["method"].allowed if name != "hrssm"):
        programs = {name: Program("ours", tools.ROOT, options, **settings, method=name) for name in (method, "hrssm")}
        times, reference = take_turns(programs, ["update"], args.rounds).values()
        ratios = [times[key] / reference[key] for key in ("update", "world model")]
        print(
            f"{method:12}{times['update']:10.1f}{reference['update']:10.1f}{ratios[0]:8.2f}"
            f"{times['world model']:14.1f}{ratios[1]:8.2f}{times['peak MiB']:10.0f}",
            flush=True,
        )


def bench_loop(args) -> None:
    # The same settings and pictures for both. Learning begins after two episodes; nothing is evaluated.
    options = ["--configs", args.preset, "--task", "dmc_walker_stand", "--shadow_size", "2048", *args.options]
    config, turn = tools.load_config(options), 20
    settings = device_settings(options) | {
        "part": "loop",
        "turn": turn,
        "pretrain": 1,
        "actor_start": 0,
        "log_every": 0,
    }
    settings |= {"prefill": config.envs * 20, "eval_episode_num": 0, "eval_every": config.steps, "simple_log": True}
    with tempfile.TemporaryDirectory() as folder:
        programs = {
            "in turn": ("ours", tools.ROOT, {"overlap": False}),
            "overlap": ("ours", tools.ROOT, {"overlap": True}),
        }
        if args.upstream:
            programs["upstream"] = ("upstream", args.upstream, {})
        programs = {
            name: Program(code, root, options, logdir=f"{folder}/{name}", **settings, **own)
            for name, (code, root, own) in programs.items()
        }
        for _ in range(20 // turn + 2):  # prefill and the first updates
            for program in programs.values():
                program.run("loop")
        found = take_turns(programs, ["loop"], args.rounds)
    for times in found.values():
        times["policy step"] = times["loop"] / (turn * config.envs)
    print(f"{args.preset}, {config.envs} environments, {settings['threads']} threads, medians of {args.rounds}, ms")
    show("", found, ["policy step", "peak MiB"])


def bench_launches(args) -> None:
    """Counted by what PyTorch dispatches to a device, so a kernel that splits into several counts once."""
    options = ["--configs", args.preset, *args.options]
    config = tools.load_config(options)
    command = [sys.executable, "-W", "ignore", str(tools.ROOT / "tests/fake_gpu.py"), "count", " ".join(options)]
    counted = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    parts = {key: int(value) for key, value in re.findall(r"(\w[a-z ]*)=(\d+)", counted)}
    print(f"{args.preset}: {parts['update']} launches per update")
    for name, steps in (("recurrence", config.batch_length), ("imagination", config.imag_horizon)):
        step = parts[f"{name} step"]
        print(f"  {name:12}{steps * step:6}  ({step} in each of {steps} steps, backward included)")
    print(f"  {'rest':12}{parts['rest']:6}", flush=True)
    settings = device_settings(options) | {"part": "update"}
    if not settings["device"].startswith("cuda"):
        print("no GPU here: times in kernels and between them are left out")
        return
    programs = {mode: Program("ours", tools.ROOT, options, **settings, compile=mode) for mode in args.modes.split(",")}
    found = take_turns(programs, ["kernels"], args.rounds)
    print(f"{args.preset} on {settings['device']}, --compile, medians of {args.rounds}, ms per update (MiB)")
    show("", found, ["wall", "in kernels", "gap", "kernels", "peak GPU MiB"], "off")


def bench_scaling(args) -> None:
    options = ["--configs", args.preset, *args.options]
    settings = device_settings(options) | {"part": "update"}
    print(f"{'batch x length':>16}{'ms':>10}{'us / step':>12}{'peak MiB':>10}")
    for batch, length in ((4, 32), (8, 32), (16, 32), (16, 64)):
        program = Program("ours", tools.ROOT, options, **settings, batch_size=batch, batch_length=length)
        found = take_turns({"": program}, ["update"], args.rounds)[""]
        share = 1e3 * found["update"] / (batch * length)
        print(f"{f'{batch} x {length}':>16}{found['update']:10.0f}{share:12.0f}{found['peak MiB']:10.0f}", flush=True)


def memory(pids: list[int]) -> tuple[float, float]:
    """MiB that processes hold, shared pages counted in each (RSS) and divided among their users (PSS)."""
    totals = {"Rss:": 0, "Pss:": 0}
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
            key, size, *_ = line.split()
            if key in totals:
                totals[key] += int(size)
    return totals["Rss:"] / 1024, totals["Pss:"] / 1024


def bench_memory(args) -> None:
    print("MiB of four worker processes together (episodes of 20 agent steps)")
    print(f"{'variant':15}" + "".join(f"{f'{kind} {n}':>10}" for n in (1, 10, 20) for kind in ("RSS", "PSS")))
    for variant in GS:
        task = "_".join(["dmc", *TASK, variant])
        vector = envs.make_vector(task, 4, seed=0, stream="train", parallel=True, time_limit=20)
        row = []
        for episode in tqdm(range(1, 21), desc=variant, leave=False, disable=None):
            vector.reset(np.ones(4, bool))
            for _ in range(20):
                vector.step(np.zeros((4, 6), np.float32))
            if episode in (1, 10, 20):
                row += memory([slot._process.pid for slot in vector._slots])
        vector.close()
        print(f"{variant:15}" + "".join(f"{x:10.0f}" for x in row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {
        "update": bench_update,
        "methods": bench_methods,
        "loop": bench_loop,
        "launches": bench_launches,
        "scaling": bench_scaling,
        "envs": bench_envs,
        "memory": bench_memory,
    }
    parser.add_argument("part", choices=parts)
    parser.add_argument("--upstream", type=lambda path: Path(path).resolve(), help="a checkout to compare with")
    parser.add_argument("--earlier", type=lambda path: Path(path).resolve(), help="update: an earlier checkout of ours")
    parser.add_argument("--preset", default="dmc_vision", help="of configs.yaml")
    parser.add_argument("--modes", default="off,auto,inductor", help="launches: of --compile, to be timed on a GPU")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each program")
    parser.add_argument("--steps", type=int, default=60, help="steps of each environment")
    parser.add_argument("--resets", type=int, default=3, help="resets of each environment")
    args, args.options = parser.parse_known_args()
    parts[args.part](args)


if __name__ == "__main__":
    main()
