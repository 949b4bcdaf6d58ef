"""Measure what this machine makes of the code. Prints medians and ratios; tests nothing.

    python tests/bench.py envs [--upstream HRSSM]     per-step cost of every DMC variant, beside upstream's if given
    python tests/bench.py memory                      memory of four worker processes over twenty episodes

Both parts need asset sets: `python setup/download.py demo` makes some. `--upstream` is a checkout of
github.com/bit1029public/HRSSM, whose implementation takes turns with ours, step by step, and needs xmltodict.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import envs
from envs import dmc

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
    env = envs.make("_".join(filter(None, ["dmc", *TASK, variant])), ds_resource_path="..").unwrapped
    clock = Clock()
    clock.around(env._env, "step", "physics")
    clock.around(env._camera, "render", "render")
    return env, clock


def theirs(module, variant: str):
    from envs import assets

    davis = [str(assets.root() / "davis")]
    env = module.make_env(*TASK, 0, action_repeat=2, image_size=64, mode=variant, intensity=0.1, ds_resource_path=davis)
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
        from tests import upstream_envs

        dmc.check_rendering()
        module = upstream_envs.load(Path(args.upstream).resolve())
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
    parser.add_argument("part", choices=["envs", "memory"])
    parser.add_argument("--upstream", help="a checkout of upstream to compare with")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--resets", type=int, default=3)
    args = parser.parse_args()
    {"envs": bench_envs, "memory": bench_memory}[args.part](args)


if __name__ == "__main__":
    main()
