"""Kill training again and again, and check after every kill that nothing was lost. Prints a table; not a test.

python tests/bench/soak.py run [--minutes 30]          trains `tiny` on cartpole; kills it and its workers at random
python tests/bench/soak.py kill-points [--count 1000]  kills runs that save all the time, at random moments
"""

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gymnasium
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
SMALL = (
    "--dyn_deter 24 --dyn_hidden 24 --dyn_stoch 4 --dyn_discrete 4 --units 24 --dyn_cont_stoch_size 8 --batch_size 2"
)
SMALL += " --imag_horizon 4 --encoder.cnn_depth 4 --encoder.mlp_units 24 --device cpu --simple_log True --pretrain 2"
SMALL += " --actor_start 2"
TRAIN = "--configs tiny --task dmc_cartpole_balance --envs 2 --steps 100000000 --time_limit 200 --prefill 100"
TRAIN += " --eval_every 1200 --eval_episode_num 2 --log_every 200 --save_every 0.25 --train_ratio 4 --dataset_size 2000"
TRAIN += f" --worker_timeout 40 {SMALL}"
DOT = "--configs tiny --task gym_tests.bench.soak:Dot-v0 --envs 2 --parallel False --size 16,16 --patch_size 4"
DOT += " --encoder.minres 2 --steps 400 --time_limit 32 --prefill 20 --eval_every 100 --eval_episode_num 1"
DOT += " --log_every 20 --train_ratio 8"
DOT += f" --save_every 1e-9 {SMALL}"


class Dot(gymnasium.Env):
    """Observes a dot that the action moves, and counts its steps in the picture."""

    metadata = {"render_modes": ["rgb_array"]}
    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
    render_mode = "rgb_array"

    def __init__(self, render_mode=None):
        self.steps, self.dot = 0, np.zeros(2, np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.dot = 0, self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.dot, {}

    def step(self, action):
        self.steps, self.dot = self.steps + 1, np.clip(self.dot + 0.1 * action, -1, 1).astype(np.float32)
        return self.dot, float(-np.abs(self.dot).sum()), False, False, {}

    def render(self):
        return np.full((16, 16, 3), self.steps, np.uint8)


if __name__ != "__main__":  # `gym_tests.bench.soak:Dot-v0` imports this file by its name
    gymnasium.register("Dot-v0", Dot)


def read_lines(logdir: Path) -> list[str]:
    path = logdir / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def read(logdir: Path):
    """Counters, rows and everything else wrong with a run's folder: (step, update, seconds, rows, replay, problems)."""
    import tools

    problems = []
    state = tools.load_checkpoint(logdir / "latest.pt")
    if state is None:
        return None
    rows = [json.loads(line) for line in read_lines(logdir)[: state["logger"]["rows"]]]
    for key in ("step", "update", "episode", "time"):
        values = [row[key] for row in rows]
        if values != sorted(values):
            problems.append(f"{key} goes back")
    if len(rows) != state["logger"]["rows"]:
        problems.append("rows are missing")
    evaluations = [row["step"] for row in rows if "eval/return" in row]
    if len(set(evaluations)) != len(evaluations):
        problems.append("an evaluation twice")
    replay = tools.Replay(capacity=10_000, batch_size=1, batch_length=4, num_envs=2, seed=0, extra_rows=2000)
    with contextlib.redirect_stdout(None):
        replay.load(logdir / "replay", state["replay"])
    if len(replay) != sum(length for _, _, length in state["replay"]["episodes"]):
        problems.append("replay lacks rows")
    for number, slots in replay.episodes.items():
        first = replay.storage["is_first"][np.array(slots)]
        if not first[0] or first[1:].any():
            problems.append(f"episode {number} is broken")
    stored = {path.name for path in (logdir / "replay").glob("*.npz")}
    if missing := {file for file, _, _ in state["replay"]["episodes"]} - stored:
        problems.append(f"missing {missing}")
    return state, rows, replay, problems


def descendants(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def usage(pid: int) -> tuple[float, int] | None:
    """MiB of resident memory and open files of a process."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20, len(os.listdir(f"/proc/{pid}/fd"))
    except (FileNotFoundError, ProcessLookupError):
        return None


def workers(pid: int) -> list[int]:
    found = []
    for child in descendants(pid):
        try:
            if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
                found.append(child)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def soak(args) -> int:
    random.seed(args.seed)
    logdir = Path(args.logdir or tempfile.mkdtemp()) / "soak"
    shutil.rmtree(logdir, ignore_errors=True)
    argv = [sys.executable, str(ROOT / "dreamer.py"), *TRAIN.split(), "--logdir", str(logdir)]
    log = open(logdir.parent / "soak.log", "w")  # noqa: SIM115
    end, starts, lost, problems, frames, memory, slowest = time.monotonic() + 60 * args.minutes, 0, [], [], 0, [], 0.0
    kills = dict.fromkeys(["SIGKILL", "SIGTERM", "SIGINT", "worker killed", "worker stopped"], 0)
    left_over, replaced = 0, 0
    saved_step, reached = 0, 0
    while time.monotonic() < end:
        written = len(Path(log.name).read_text())
        process = subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT)
        starts += 1
        stop = random.uniform(15, 90)
        children, samples, hurt = [], [], 0
        log.flush()
        while process.poll() is None and "Replay:" not in Path(log.name).read_text()[written:]:
            time.sleep(0.5)  # until it is resumed
        begun = time.monotonic()
        while process.poll() is None and time.monotonic() - begun < stop:
            time.sleep(1)
            children = workers(process.pid) or children
            if sample := usage(process.pid):
                samples.append(sample)
            # Workers of training and evaluation; the run survives the loss of any of them.
            if len(workers(process.pid)) == 4 and hurt < 2 and random.random() < 0.03:
                hurt += 1
                kind = random.choice(["worker killed", "worker stopped"])
                kills[kind] += 1
                victim = random.choice(workers(process.pid))
                os.kill(victim, signal.SIGKILL if kind == "worker killed" else signal.SIGSTOP)
                time.sleep(0 if kind == "worker killed" else 1)
        if process.poll() is not None:
            problems.append(f"start {starts} ended by itself with {process.returncode}: see {log.name}")
            break
        kind = random.choice(["SIGKILL", "SIGKILL", "SIGTERM", "SIGINT"])
        kills[kind] += 1
        process.send_signal(getattr(signal, kind))
        asked = time.monotonic()
        process.wait(timeout=120)
        slowest = max(slowest, time.monotonic() - asked)
        deadline = time.monotonic() + 20
        while any(usage(child) and usage(child)[0] for child in children) and time.monotonic() < deadline:
            time.sleep(0.2)
        left_over += sum(bool(usage(child) and usage(child)[0]) for child in children)
        if not logdir.exists() or not (logdir / "latest.pt").exists():
            continue
        state, rows, replay, found = read(logdir)
        problems += [f"start {starts}: {problem}" for problem in found]
        step = 4 * state["count"]["policy_step"]
        complete = [json.loads(line) for line in read_lines(logdir) if line.endswith("}")]
        reached = max([row["step"] for row in complete[state["logger"]["rows"] :]], default=step)
        late = [row["time"] for row in complete[state["logger"]["rows"] :]]
        if kind != "SIGKILL":
            if process.returncode != 128 + getattr(signal, kind):
                problems.append(f"start {starts}: {kind} gave exit code {process.returncode}")
            if reached > step:
                problems.append(f"start {starts}: {kind} lost {reached - step} frames")
        if step < saved_step:
            problems.append(f"start {starts}: the checkpoint went back from {saved_step} to {step}")
        seconds = max(late, default=0.0) - state["logger"]["seconds"]
        lost.append((max(0, reached - step), max(0.0, seconds)))
        saved_step, frames, replaced = step, step, state["count"]["worker_restarts"]
        if len(samples) > 25:  # after the first updates
            memory.append((samples[15], samples[-1]))
        print(f"start {starts}: {kind} at {stop:.0f} s, step {step}, lost {lost[-1][0]} frames", flush=True)
    log.close()
    print("\n| soak | |\n|---|---|")
    print(f"| minutes, starts | {args.minutes:g}, {starts} |")
    print(f"| frames, updates at the end | {frames}, {state['count']['update']} |")
    print(f"| kills | {', '.join(f'{kind} {count}' for kind, count in kills.items())} |")
    print(f"| workers replaced, left over after a kill | {replaced}, {left_over} |")
    print(
        f"| frames lost by SIGKILL: worst, mean over all stops | {max(lost)[0]}, {np.mean([x for x, _ in lost]):.0f} |"
    )
    print(f"| seconds lost: worst (a save comes every 15 s) | {max(s for _, s in lost):.0f} |")
    print(f"| slowest stop | {slowest:.1f} s |")
    more, files = np.median([(last[0] - first[0], last[1] - first[1]) for first, last in memory], 0)
    print(f"| growth within a start, median: memory, open files | {more:.1f} MiB, {files:.0f} |")
    ends = [last for _, last in memory]
    print(f"| first and last start at their end: memory | {ends[0][0]:.0f}, {ends[-1][0]:.0f} MiB |")
    print(f"| open files | {ends[0][1]}, {ends[-1][1]} |")
    print(f"| inconsistencies | {len(problems)} |")
    for problem in problems:
        print(problem)
    return bool(problems)


def kill_points(args) -> int:
    """Each child is forked, so that it need not import; it trains with a save at every step until it is killed."""
    import io

    import torch

    import dreamer

    torch.set_num_threads(1)
    random.seed(args.seed)
    folder = Path(tempfile.mkdtemp())
    dreamer.envs.prepare("gym_tests.bench.soak:Dot-v0")  # tries how rendering works, once for all
    loads, resumed, finished, problems, furthest, phases = 0, 0, 0, [], 0, {}
    number, before, reported = 0, 0, 0
    with contextlib.redirect_stderr(io.StringIO()) as complaints:
        for count in range(1, args.count + 1):
            logdir = folder / str(number)
            process = os.fork()
            if process == 0:
                sink = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(sink, 1)
                os.dup2(sink, 2)
                os._exit(dreamer.main([*DOT.split(), "--logdir", str(logdir)]))
            time.sleep(random.uniform(0.0, args.longest))
            os.kill(process, signal.SIGKILL)
            _, status = os.waitpid(process, 0)
            if os.WIFEXITED(status) and os.WEXITSTATUS(status):
                problems.append(f"kill {count}: the run ended by itself with {os.WEXITSTATUS(status)}")
            parts = [path.name for path in logdir.rglob("*.part")]
            for name in parts or ["between writes"]:
                phases[name.split("-")[0]] = phases.get(name.split("-")[0], 0) + 1
            try:
                found = read(logdir)
                loads += 1
            except Exception as error:
                problems.append(f"kill {count}: {error!r}")
                continue
            if found:
                state, _, _, wrong = found
                step = state["count"]["policy_step"]
                problems += [f"kill {count}: {problem}" for problem in wrong]
                if step < before:
                    problems.append(f"kill {count}: went back from {before} to {step}")
                resumed, furthest, before = resumed + (before > 0), max(furthest, step), step
                if state["count"]["evaluated"] * 4 >= 400:
                    finished, number, before = finished + 1, number + 1, 0
                    shutil.rmtree(logdir)
            elif before:
                problems.append(f"kill {count}: the checkpoint of step {before} is gone")
            if complaints.getvalue():
                problems.append(f"kill {count}: {complaints.getvalue()}")
                complaints.seek(0)
                complaints.truncate()
            if problems[reported:]:
                print(*problems[reported:], sep="\n", flush=True)
                reported = len(problems)
            if count % 100 == 0:
                print(f"{count} kills, {finished} runs finished, {len(problems)} problems", flush=True)
    print(
        "\n| kills | loadable afterwards | resumed | runs finished | killed in a write | problems |\n"
        + "|---" * 6
        + "|"
    )
    torn = sum(count for name, count in phases.items() if name != "between writes")
    print(f"| {args.count} | {loads} | {resumed} | {finished} | {torn} | {len(problems)} |")
    shutil.rmtree(folder)
    return bool(problems)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["run", "kill-points"])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--longest", type=float, default=1.5, help="seconds until a kill")
    parser.add_argument("--logdir", help="where the run is kept, by default a temporary folder")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    return {"run": soak, "kill-points": kill_points}[args.part](args)


if __name__ == "__main__":
    sys.exit(main())
