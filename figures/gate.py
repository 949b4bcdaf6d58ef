"""Whether runs are as good as they should be: a table against reference curves, and an exit code.

python figures/gate.py ./log --reference figures/reference/hrssm_upstream.csv

Runs of each task and method are compared with the reference curve of the task, window by window. A run contributes the
mean of its evaluations in a window; a window counts where at least --min_seeds runs have one. It is met if the mean
over runs is at least the reference's lowest seed less --margin times the best mean of the reference.

- PASS: the last window and at least --share of all windows are met. Better than the reference passes too.
- FAIL: they are not.
- too few seeds: no window has --min_seeds runs.

summary.json (--out) holds the numbers of every window. Exit code: 0 if every task passes, 1 if one does not, 2 for an
error. `--write FILE.csv` makes a reference of runs, or of published curves in the formats of figures/plot.py
--published. `--smoke` trains two tiny agents and tries all of this on them, in less than a minute.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from setup import console  # before what takes seconds to import

# isort: split
import argparse
import csv
import json
import subprocess
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

import tools
from figures import plot

COLUMNS = ["task", "method", "begin", "end", "mean", "low", "high", "seeds"]
SMOKE = "--configs tiny --task dmc_cartpole_balance --envs 2 --time_limit 40 --steps 320 --eval_every 160 --prefill 40"
SMOKE += " --pretrain 1 --actor_start 0 --train_ratio 4 --eval_episode_num 2 --final_episodes 2 --parallel False"
SMOKE += " --overlap False --device cpu --simple_log True --batch_size 2 --dyn_deter 16 --dyn_hidden 16 --units 16"


class Window(NamedTuple):
    """Mean, lowest and highest seed of a reference between the frames `begin` and `end`."""

    begin: float
    end: float
    mean: float
    low: float
    high: float
    seeds: int


def read_reference(path: str) -> dict[str, list[Window]]:
    """Windows by task. Raises UserError."""
    found, methods = {}, {}
    try:
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                begin, end, mean, low, high = (float(row[name]) for name in COLUMNS[2:7])
                window = Window(begin, end, mean, low, high, int(row["seeds"]))
                found.setdefault(row["task"], []).append(window)
                methods.setdefault(row["task"], set()).add(row["method"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise tools.UserError(
            f"cannot read --reference {path} ({type(error).__name__}: {error}): expected CSV with the columns "
            f"{', '.join(COLUMNS)}, as --write makes it"
        ) from error
    if not found or any(len(names) > 1 for names in methods.values()):
        raise tools.UserError(f"--reference {path} must have one method for each task, and at least one task")
    return found


def write_reference(path: Path, runs: Sequence[plot.Run], width: float) -> None:
    rows = []
    for name, members in plot.group(runs).items():
        binned = [plot.bins(run, width) for run in members]
        for k in sorted(set().union(*binned)):
            values = [run_bins[k][1] for run_bins in binned if k in run_bins]
            edges = float(k * width), float((k + 1) * width)
            rows.append([*name, *edges, float(np.mean(values)), float(min(values)), float(max(values)), len(values)])
    plot.write_csv(path, COLUMNS, rows)


def compare(runs: Sequence[plot.Run], reference: Sequence[Window], args) -> dict:
    """Verdict on the runs of one task and method, with the numbers of every window."""
    scale, windows = max(abs(window.mean) for window in reference), []
    for window in reference:
        inside = [(run.steps >= window.begin) & (run.steps < window.end) for run in runs]
        values = [float(run.values[rows].mean()) for run, rows in zip(runs, inside, strict=True) if rows.any()]
        if len(values) >= args.min_seeds:
            floor, mean = window.low - args.margin * scale, float(np.mean(values))
            own = {"runs": values, "runs_mean": mean, "floor": floor, "met": mean >= floor}
            windows.append(window._asdict() | own)
    share = float(np.mean([window["met"] for window in windows])) if windows else 0.0
    passed = bool(windows) and windows[-1]["met"] and share >= args.share
    verdict = "PASS" if passed else "FAIL" if windows else "too few seeds"
    return {"verdict": verdict, "seeds": len(runs), "windows_met": share, "windows": windows}


def table(results: dict[tuple[str, str], dict]) -> str:
    rows: list[tuple[str, ...]] = [
        ("task", "method", "seeds", "windows met", "last window", "runs", "reference (low to high)", "needed", "")
    ]
    for (task, method), result in results.items():
        shown = (task, method, str(result["seeds"]))
        if result["windows"]:
            last, count = result["windows"][-1], len(result["windows"])
            met = f"{round(result['windows_met'] * count)} of {count}"
            spread = f"{last['mean']:.1f} ({last['low']:.1f} to {last['high']:.1f})"
            numbers = f"{last['runs_mean']:.1f}", spread, f"{last['floor']:.1f}"
            shown += (met, f"{last['begin']:g} to {last['end']:g}", *numbers)
        else:
            shown += ("-",) * 5
        rows.append((*shown, result["verdict"]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def gate(args) -> int:
    files = [path for path in args.runs if Path(path).is_file()]
    folders = [path for path in args.runs if path not in files]
    runs = plot.read_runs(folders, metric=args.metric) if folders else []
    runs += sum(map(plot.read_published, files), [])
    if args.write:
        write_reference(Path(args.write), runs, args.window)
        print(args.write)
    if not args.reference:
        return 0
    reference = read_reference(args.reference)
    groups = plot.group(runs)
    results = {
        name: compare(members, reference[name[0]], args) for name, members in groups.items() if name[0] in reference
    }
    for task in sorted({task for task, _ in groups} - reference.keys()):
        tools.warn(f"{task} is not in {args.reference}: not judged")
    if not results:
        raise tools.UserError(f"{args.reference} has none of the tasks of these runs: it has {', '.join(reference)}")
    passed = all(result["verdict"] == "PASS" for result in results.values())
    rows = [{"task": task, "method": method, **result} for (task, method), result in results.items()]
    rules = {name: getattr(args, name) for name in ("reference", "metric", "min_seeds", "margin", "share")}
    text = json.dumps({"passed": passed, **rules, "results": rows}, indent=2)
    tools.write_atomic(Path(args.out), lambda file: file.write(text.encode()))
    print(table(results), args.out, sep="\n")
    return 0 if passed else 1


def smoke() -> int:
    """Train two seeds, make a reference of them, and see one PASS, one FAIL and one "too few seeds"."""
    with tempfile.TemporaryDirectory() as folder:
        reference, out = f"{folder}/reference.csv", ["--out", f"{folder}/summary.json", "--metric", "eval/return"]
        runs, command = f"{folder}/runs", [sys.executable, str(tools.ROOT / "dreamer.py"), *SMOKE.split()]
        started = [
            subprocess.Popen([*command, "--seed", seed, "--logdir", f"{runs}/{seed}"], stdout=subprocess.DEVNULL)
            for seed in ("0", "1")
        ]
        codes = [process.wait() for process in started]
        if any(codes):
            raise tools.UserError("the runs of the smoke test failed, see above")
        codes = [main([runs, "--write", reference, "--window", "160", *out])]
        codes.append(main([runs, "--reference", reference, "--min_seeds", "2", *out]))
        better = read_reference(reference)["dmc_cartpole_balance"]
        rows = [["dmc_cartpole_balance", "x", *w[:2], *(2 * value + 1 for value in w[2:5]), w.seeds] for w in better]
        plot.write_csv(Path(f"{folder}/better.csv"), COLUMNS, rows)
        codes.append(main([runs, "--reference", f"{folder}/better.csv", "--min_seeds", "2", *out]))
        codes.append(main([runs, "--reference", reference, *out]))
        found = tools.read_final_evaluation(Path(runs) / "0")
    expected = [0, 0, 1, 1]
    print(
        "smoke test passed" if codes == expected and found else f"smoke test failed: exit codes {codes}, not {expected}"
    )
    return 0 if codes == expected and found else 1


def main(argv: list[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("runs", nargs="*", help="runs, folders with runs below them, or files of published curves")
    parser.add_argument("--reference", help="CSV of reference curves")
    parser.add_argument("--write", help="write a reference made of RUNS to this CSV")
    parser.add_argument("--window", type=float, default=50_000, help="frames per window of --write (default 50000)")
    parser.add_argument("--metric", default="eval/return", help="key of metrics.jsonl (default eval/return)")
    parser.add_argument("--min_seeds", type=int, default=3, help="runs that a window needs (default 3)")
    parser.add_argument("--margin", type=float, default=0.1, help="allowed below the lowest seed (default 0.1)")
    parser.add_argument("--share", type=float, default=0.8, help="share of windows to be met (default 0.8)")
    parser.add_argument("--out", default="summary.json", help="file for the numbers (default summary.json)")
    parser.add_argument("--smoke", action="store_true", help="try everything on two tiny runs")
    args = parser.parse_args(argv)
    try:
        if args.smoke:
            return smoke()
        if not args.runs or not (args.reference or args.write):
            raise tools.UserError("give runs and --reference FILE.csv, or --write FILE.csv to make one, or --smoke")
        if not (args.window > 0 and args.min_seeds > 0 and args.margin >= 0 and 0 <= args.share <= 1):
            raise tools.UserError("--window and --min_seeds must be above 0, --margin at least 0, --share from 0 to 1")
        return gate(args)
    except (tools.UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    console.run(main)
