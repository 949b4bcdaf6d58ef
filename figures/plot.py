"""Learning curves and final results of runs, by task and method.

python figures/plot.py ./log --out curves.png

LOGDIR is a run, or a folder that contains runs at any depth. The suffix of --out (.png, .pdf, .svg) decides the format;
with a PNG comes a PDF. Beside it: curves.csv (every point) and curves_final.csv (the bars).

Following Agarwal et al. (NeurIPS 2021), curves are interquartile means over runs with 95% intervals from a stratified
bootstrap (percentiles of 2000 resamplings of the runs within each task). With fewer than four runs the interquartile
mean is the mean, and the interval is too narrow to rely on.

- Binning: bin k of width W (--bin; default: the largest eval_every of the runs) holds the rows with
  k W <= step < (k+1) W. Each run contributes the mean of its rows in the bin, plotted at the mean of their steps.
  Nothing is interpolated. Lines are faded where not all runs of a group have data.
- Final results: of the final evaluations (final_eval.json) if all runs of a task have one, otherwise of the latest bin
  that all runs of a task have reached. They are averaged over tasks only where returns
  share a scale, as in DeepMind Control (0 to 1000), or with --same_scale.
- Methods: the option `method` of the saved config, and the options that differ between runs of the same task and
  method, such as `HRSSM without bisimulation` or `HRSSM mask ratio 0.3`. Variants of a method that differ in more than
  three options are numbered, and a list is printed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from setup import console  # before what takes seconds to import

# isort: split
import argparse
import csv
import gzip
import json
import math
import re
import textwrap
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from scipy import stats

import tools

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# Not rliable: version 1.2.0 pulls in pandas, statsmodels and six more packages for the ten lines of `iqm`, fails to
# import with their current versions, and requires the same number of runs for every task.
RESAMPLINGS = 2000
# Colours of Okabe and Ito, but wine in place of a yellow that is too light for lines.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255"]
MARKERS = "o^sD"  # the next one each time the colours are used up
FORMATS = (".png", ".pdf", ".svg")
METHODS = {
    "hrssm": "HRSSM",
    "dreamer": "DreamerV3",
    "rssm": "RSSM",
    "repo": "RePo",
    "r2dreamer": "R2-Dreamer",
    "infonce": "InfoNCE",
}
# Options that are not part of the method.
NOT_METHOD = {"method", "seed", "task", "shared_env_seed", "video_pred_log"}
NOT_METHOD |= {"resource_files", "scene_files", "ds_resource_path"}


class Run(NamedTuple):
    """One seed of one method on one task: `values` (n,) of a metric at increasing `steps` (n,) in frames."""

    task: str
    method: str
    seed: int
    steps: np.ndarray
    values: np.ndarray
    logdir: Path | None = None  # None for published runs
    config: dict | None = None  # options by dotted name
    final: tuple[float, float] | None = None  # step and value of the final evaluation


class Point(NamedTuple):
    """A point of a curve, or a bar: interquartile mean and 95% interval (NaN for a single run) over `runs` runs."""

    step: float
    iqm: float
    low: float
    high: float
    runs: int
    complete: bool  # whether these are all runs of the group


def find_runs(paths: Sequence[str]) -> list[Path]:
    """Folders that contain a config.json, at or below `paths`, in natural order and without duplicates."""
    folders = {}
    for path in map(Path, paths):
        files = [file for file in path.rglob("config.json") if tools.REPLACED not in file.relative_to(path).parts]
        below = sorted({file.parent for file in files}, key=natural)
        if not below:
            tools.warn(f"{path}: no runs in this folder" if path.is_dir() else f"{path}: no such folder")
        folders |= {folder.resolve(): folder for folder in below}
    return list(folders.values())


def natural(path: Path) -> list:
    """Sort key that compares the numbers in a path by value."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def read_rows(logdir: Path) -> list[dict]:
    """Rows of metrics.jsonl, [] if the file is missing. Whatever is not a number is left out, as are lines without a
    step, for example those truncated by a kill."""
    path, rows = logdir / "metrics.jsonl", []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    rows = [{key: value for key, value in row.items() if is_number(value)} for row in rows if isinstance(row, dict)]
    return [row for row in rows if row.get("step", -1) >= 0]


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def read_runs(paths: Sequence[str], *, metric: str = "eval/return", method: str = "HRSSM") -> list[Run]:
    """All runs in `paths` with their values of `metric`; runs that are unreadable or lack the metric cost a warning.

    `method` is the display name of HRSSM itself. Raises UserError if no run is left.
    """
    defaults = {key: option.default for key, option in tools.read_options()[0].items()}
    runs = []
    for logdir in find_runs(paths):
        try:
            config = defaults | tools.flatten(vars(tools.run_config(logdir)))
            # Of rows with the same step, as after a resume, the last one counts.
            points = {row["step"]: row[metric] for row in read_rows(logdir) if metric in row}
        except (OSError, tools.UserError) as error:
            tools.warn(f"{logdir} skipped: {error}")
            continue
        if not points:
            tools.warn(f"{logdir} skipped: it has no {metric} yet")
            continue
        steps, values = np.array(sorted(points.items()), float).T
        last = read_final(logdir, metric)
        last = last if last and last[0] >= steps[-1] else None
        runs.append(Run(config["task"], "", config["seed"], steps, values, logdir, config, last))
    if not runs:
        raise tools.UserError(f"nothing to plot: no run with {metric} in {' '.join(map(str, paths))}")
    runs = name_methods(runs, METHODS | {"hrssm": method})
    names = [run[:3] for run in runs]
    for name in sorted({name for name in names if names.count(name) > 1}):
        tools.warn(f"{names.count(name)} runs of {name[0]}, {name[1]}, seed {name[2]}: they count as different seeds")
    return runs


def read_final(logdir: Path, metric: str) -> tuple[float, float] | None:
    """Step and mean of `metric` (a return) in final_eval.json, None without it."""
    found, (name, _, key) = tools.read_final_evaluation(logdir), metric.rpartition("/")
    if not found or key != "return":
        return None
    evaluations = found["evaluations"]
    result = evaluations.get(name) or (evaluations.get("eval/seen") if name == "eval" else None)
    return (found["step"], result["mean"]) if result else None


def name_methods(runs: list[Run], names: dict[str, str]) -> list[Run]:
    """Fill in `Run.method`: the display name of the method and the options that differ between its runs."""
    result = list(runs)
    for method in unique(run.config["method"] for run in runs):
        chosen = [i for i, run in enumerate(runs) if run.config["method"] == method]
        peers = [runs[i] for i in chosen]
        keys = [key for key in peers[0].config if is_option_of(peers, key) and differs(key, peers)]
        settings = [describe(run.config, keys) for run in peers]
        name = names.get(method, method)
        labels = {tuple(options): f"{name} {', '.join(options)}".strip() for options in sorted(settings)}
        if len(max(settings, key=len)) > 3:
            labels = {options: f"{name} #{i}" for i, options in enumerate(labels, 1)}
            print(*(f"{label}: {', '.join(options)}" for options, label in labels.items()), sep="\n")
        for i, options in zip(chosen, settings, strict=True):
            result[i] = runs[i]._replace(method=labels[tuple(options)])
    warn_about_unequal_methods(result)
    return result


def is_option_of(runs: Sequence[Run], key: str) -> bool:
    """Whether a (dotted) option can be part of the method of these runs; their decoder may be a probe alone."""
    group, option = key.split(".")[0], tools.read_options()[0].get(key)
    may_change = option is not None and option.may_change
    learns = any(r.config["method"] == "dreamer" or r.config.get("autoencoder", "none") != "none" for r in runs)
    return group not in NOT_METHOD and not may_change and (group != "decoder" or learns)


def differs(key: str, runs: Sequence[Run]) -> bool:
    """Whether an option distinguishes runs of the same task."""
    values = {(run.task, json.dumps(run.config.get(key))) for run in runs}
    return len(values) > len({run.task for run in runs})


def describe(config: dict, keys: Sequence[str]) -> list[str]:
    """Readable settings of `keys`: `mask ratio 0.3`, `without bisimulation`. Switches that are off are not listed."""
    ablated = [key for key in ("nomlr", "nosimsr") if key in keys and config[key]]
    losses = {"nomlr": "without latent reconstruction", "nosimsr": "without bisimulation"}
    parts = ["without both losses"] if len(ablated) == 2 else [losses[key] for key in ablated]
    for key in keys:
        if key not in losses and (value := config.get(key)) is not False:
            name = re.sub("[._]", " ", key)
            parts.append(name if value is True else f"{name} {value}")
    return parts


def warn_about_unequal_methods(runs: Sequence[Run]) -> None:
    """Methods should be compared with the same settings: name the options that differ between methods only."""
    methods = unique(run.config["method"] for run in runs)
    groups = [[run for run in runs if run.config["method"] == method] for method in methods]
    options = [key for key in runs[0].config if all(is_option_of(group, key) for group in groups)]
    unequal = [key for key in options if differs(key, runs) and not any(differs(key, group) for group in groups)]
    if unequal:
        tools.warn(f"the methods do not share all their settings: {', '.join(unequal)}")


def read_published(path: str) -> list[Run]:
    """Published runs from JSON (optionally .gz), a list of {task, method, seed, xs, ys}, or from CSV with the columns
    task, method, seed, step, value. Raises UserError."""
    try:
        data = Path(path).read_bytes()
        text = (gzip.decompress(data) if path.endswith(".gz") else data).decode()
        if path.endswith(".csv"):
            groups: dict[tuple, list] = {}
            for row in csv.DictReader(text.splitlines()):
                point = float(row["step"]), float(row["value"])
                groups.setdefault((row["task"], row["method"], int(row["seed"])), []).append(point)
            runs = [Run(*name, *np.array(sorted(points)).T) for name, points in groups.items()]
        else:
            fields = [(r["task"], r["method"], r["seed"], r["xs"], r["ys"]) for r in json.loads(text)]
            runs = [Run(*name, np.array(xs, float), np.array(ys, float)) for *name, xs, ys in fields]
        if not runs:
            raise ValueError("it holds no curve")
        for run in runs:
            points = [*run.steps, *run.values]
            if run.steps.shape != run.values.shape or run.steps.ndim != 1 or not np.isfinite(points).all():
                raise ValueError(f"steps and values of {run.task} are not two lists of as many numbers")
            if not isinstance(run.task, str) or not isinstance(run.method, str) or not len(run.steps):
                raise ValueError("a curve without points, or whose task or method is not text")
        return runs
    except (OSError, EOFError, ValueError, LookupError, TypeError, RecursionError, zlib.error) as error:
        raise tools.UserError(
            f"cannot read --published {path} ({type(error).__name__}: {error}): expected a JSON list of {{task, method,"
            " seed, xs, ys}}, or CSV with the columns task, method, seed, step, value"
        ) from error


def iqm(strata: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """Interquartile mean of all values and its 95% interval from a bootstrap within each of `strata` (arrays (n,)).

    The interval is NaN if no stratum has two values. Deterministic.
    """
    mean = float(stats.trim_mean(np.concatenate(strata), 0.25))
    if max(map(len, strata)) < 2:
        return mean, np.nan, np.nan
    rng = np.random.default_rng(0)
    drawn = [values[rng.integers(len(values), size=(RESAMPLINGS, len(values)))] for values in strata]
    low, high = np.percentile(stats.trim_mean(np.concatenate(drawn, 1), 0.25, axis=1), [2.5, 97.5])
    return mean, float(low), float(high)


def bins(run: Run, width: float) -> dict[int, tuple[float, float]]:
    """Bin -> mean step and mean value of its rows."""
    index = (run.steps // width).astype(int)
    return {int(k): (run.steps[index == k].mean(), run.values[index == k].mean()) for k in np.unique(index)}


def curve(runs: Sequence[Run], width: float) -> list[Point]:
    """Points over the runs of one task and method, in order of steps."""
    binned = [bins(run, width) for run in runs]
    points = []
    for k in sorted(set().union(*binned)):
        steps, values = np.array([run_bins[k] for run_bins in binned if k in run_bins]).T
        points.append(Point(steps.mean(), *iqm([values]), len(values), len(values) == len(runs)))
    return points


def final(groups: dict[tuple[str, str], list[Run]], width: float, together: bool) -> dict[tuple[str, str], Point]:
    """(task, method) -> result of the final evaluations if all runs of the task have one, else in the latest bin that
    all of them have reached; other tasks are left out.

    `together` adds results over tasks as ("all tasks", method), for methods with runs on all tasks.
    """
    results, strata = {}, {}
    for task in unique(task for task, _ in groups):
        binned = {method: [bins(run, width) for run in runs] for (t, method), runs in groups.items() if t == task}
        common = set.intersection(*(set(run_bins) for run_bins in sum(binned.values(), [])))
        if all(run.final for (t, _), runs in groups.items() if t == task for run in runs):
            binned = {method: [{0: run.final} for run in groups[task, method]] for method in binned}
            common = {0}
        if not common:
            tools.warn(f"{task}: no final result, its runs share no bin of {width:g} frames")
            continue
        for method, method_bins in binned.items():
            steps, values = np.array([run_bins[max(common)] for run_bins in method_bins]).T
            results[task, method] = Point(steps.mean(), *iqm([values]), len(values), True)
            strata.setdefault(method, []).append(values)
    tasks = unique(task for task, _ in results)
    if together and len(tasks) > 1:
        for method, values in strata.items():
            if len(values) == len(tasks):
                results["all tasks", method] = Point(np.nan, *iqm(values), sum(map(len, values)), True)
    return results


def unique(items) -> list:
    return list(dict.fromkeys(items))


def group(runs: Sequence[Run]) -> dict[tuple[str, str], list[Run]]:
    """Runs by task and method, both in alphabetical order."""
    names = sorted({(run.task, run.method) for run in runs})
    return {name: [run for run in runs if (run.task, run.method) == name] for name in names}


class Results(NamedTuple):
    """Everything that is drawn and written: points by (task, method)."""

    metric: str
    width: float
    curves: dict[tuple[str, str], list[Point]]
    published: dict[tuple[str, str], list[Point]]
    final: dict[tuple[str, str], Point]


def analyse(runs: Sequence[Run], published: Sequence[Run], *, metric: str, width: float, same_scale: bool) -> Results:
    """Curves and final results of `runs`; curves of `published` on the same tasks, up to the last step of `runs`."""
    width = width or max(run.config["eval_every"] for run in runs)
    groups = group(runs)
    ends = {task: max(run.steps[-1] for run in runs if run.task == task) for task, _ in groups}
    references = {}
    for name, task_runs in group([run for run in published if run.task in ends]).items():
        points = [point for point in curve(task_runs, width) if point.step < ends[name[0]] + width]
        references |= {name: points} if points else {}
    if published and not references:
        tools.warn(f"no published curve of {', '.join(ends)} within the frames of these runs")
    together = same_scale or "success" in metric or all(task.startswith("dmc_") for task in ends)
    if not together and len(ends) > 1:
        tools.warn("no result over all tasks: their returns may differ in scale; pass --same_scale if they do not")
    curves = {name: curve(task_runs, width) for name, task_runs in groups.items()}
    return Results(metric, width, curves, references, final(groups, width, together))


frames = matplotlib.ticker.EngFormatter(sep="")  # 40000 -> 40k


def draw(results: Results) -> plt.Figure:
    """One panel of curves per task and one of final results; published curves are dashed."""
    tasks = unique(task for task, _ in results.curves)
    methods = sorted({method for _, method in results.curves})
    styles = {
        method: {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i // len(COLORS) % len(MARKERS)]}
        for i, method in enumerate(methods)
    }
    labels = {method: f"{method} ({count_runs(results, method)})" for method in methods}
    references = sorted({method for _, method in results.published})
    greys = {method: str(0.25 + 0.5 * i / max(1, len(references))) for i, method in enumerate(references)}
    panels = len(tasks) + 1
    rows = math.ceil(panels / 4)
    columns = math.ceil(panels / rows)
    figure, axes = plt.subplots(rows, columns, squeeze=False, layout="constrained", figsize=(3.4 * columns, 2.8 * rows))
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
    axes = axes.ravel()
    for axis in axes[panels:]:
        axis.remove()
    for task, axis in zip(tasks, axes, strict=False):
        for (t, method), points in results.published.items():
            if t == task:
                axis.plot(*zip(*[p[:2] for p in points], strict=True), "--", color=greys[method], lw=1.2, label=method)
        for (t, method), points in results.curves.items():
            if t == task:
                draw_curve(axis, points, labels[method], **styles[method])
        axis.set_title(task, fontsize=10)
        axis.set(xlabel="environment frames", ylabel=results.metric)
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
        axis.xaxis.set_major_formatter(frames)
        axis.margins(x=0.03)
        axis.grid(alpha=0.25)
    draw_bars(axes[len(tasks)], results, {method: style["color"] for method, style in styles.items()})
    handles = {}
    for axis in axes[: len(tasks)]:
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    entries = sorted(handles, key=lambda label: (label in references, label))
    longest = max(map(len, entries))
    fitting = max(1, int(3.4 * columns / (0.6 + 0.08 * longest)))
    figure.legend(
        [handles[label] for label in entries],
        entries,
        loc="outside lower center",
        ncols=min(fitting, len(entries)),
        frameon=False,
    )
    return figure


def count_runs(results: Results, method: str) -> str:
    """`5 runs`, or `3 to 5 runs` where the tasks of a method have different numbers."""
    most = [max(point.runs for point in points) for (_, m), points in results.curves.items() if m == method]
    low, high = min(most), max(most)
    return plural(low) if low == high else f"{low} to {high} runs"


def plural(runs: int) -> str:
    return f"{runs} run{'s' * (runs != 1)}"


def draw_curve(axis, points: list[Point], label: str, color: str, marker: str) -> None:
    steps, mean, low, high = np.array([point[:4] for point in points]).T
    complete = np.array([point.complete for point in points])
    style = {"color": color, "marker": marker, "markersize": 3}  # a single point has no line to see
    axis.plot(steps, np.where(complete, mean, np.nan), label=label, **style)
    axis.plot(steps, mean, alpha=0.35, zorder=1.5, **style)
    axis.fill_between(steps, low, high, color=color, alpha=0.15, lw=0)


def draw_bars(axis, results: Results, colors: dict[str, str]) -> None:
    """Final results with intervals: over all tasks if available, else for each task."""
    if not results.final:
        axis.set_axis_off()
        return
    overall = {name: point for name, point in results.final.items() if name[0] == "all tasks"}
    shown = overall or results.final
    tasks = unique(task for task, _ in shown)
    # A few methods are named above their bars, otherwise the legend tells them apart.
    named = len(tasks) == 1 and len(shown) <= 6
    row, ticks = 0.0, []
    for task in tasks:
        points = {method: point for (t, method), point in shown.items() if t == task}
        ticks.append(row + (len(points) + 1) / 2)
        for method, point in points.items():
            row += 1.0
            axis.barh(row, point.iqm, 0.4 if named else 0.9, color=colors[method], alpha=0.75)
            if point.runs > 1:
                axis.plot([point.low, point.high], [row, row], color="black", lw=1.5 if len(shown) < 12 else 0.8)
            if named:
                text = f"{method} ({plural(point.runs)})"
                style = {"va": "bottom", "fontsize": 8, "transform": axis.get_yaxis_transform(), "in_layout": False}
                axis.text(0.02, row - 0.25, text, **style)
        row += 0.8
    row -= 0.8
    steps = unique(point.step for point in shown.values())
    at = f" at {frames(steps[0])} frames" if len(steps) == 1 and not overall else ""
    scope = "all tasks" if overall else "each task" if len(tasks) > 1 else ""
    axis.set_title(f"final results, {scope}" if scope else "final results", fontsize=10)
    axis.set_xlabel(results.metric + at)
    if len(tasks) == 1:
        ticks, tasks = [], []
    axis.set_yticks(ticks, [textwrap.fill(task.replace("_", " "), 16) for task in tasks], fontsize=8)
    axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
    axis.set_ylim(row + 0.6, 0.1 if named else 0.4)
    axis.grid(axis="x", alpha=0.25)


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in rows)


def save(results: Results, out: Path) -> list[Path]:
    """Write OUT in the format of its suffix, a PDF beside a PNG, and both CSV files; returns their paths."""
    paths = check_out(out)
    figure = draw(results)
    for path in paths:
        figure.savefig(path, dpi=200)
    plt.close(figure)
    header = ["task", "method", "metric", "step", "iqm", "low", "high", "runs"]
    curves = [("run", name, point) for name, points in results.curves.items() for point in points]
    curves += [("published", name, point) for name, points in results.published.items() for point in points]
    rows = [[source, *name, results.metric, *point[:5]] for source, name, point in curves]
    tables = [out.with_suffix(".csv"), out.with_name(f"{out.stem}_final.csv")]
    write_csv(tables[0], ["source", *header], rows)
    write_csv(tables[1], header, [[*name, results.metric, *point[:5]] for name, point in results.final.items()])
    return paths + tables


def check_out(out: Path) -> list[Path]:
    """The picture files to write for --out: PNG without a suffix, and a PDF beside every PNG. Raises UserError."""
    out = out if out.suffix else out.with_suffix(".png")
    if out.suffix not in FORMATS:
        raise tools.UserError(f"--out {out}: the suffix must be one of {', '.join(FORMATS)}")
    tools.check_out(out)
    return [out, out.with_suffix(".pdf")] if out.suffix == ".png" else [out]


def arguments(description: str, out: str) -> argparse.ArgumentParser:
    """The options that the plot and the report share."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter)
    parser.add_argument("logdir", nargs="+", help="a run, or a folder with runs below it")
    parser.add_argument("--out", default=out, help=f"file to write (default {out})")
    parser.add_argument("--metric", default="eval/return", help="key of metrics.jsonl (default eval/return)")
    parser.add_argument("--method", default="HRSSM", help="display name of HRSSM itself (default HRSSM)")
    parser.add_argument("--bin", type=float, default=0, help="bin width in frames (default: eval_every)")
    parser.add_argument("--same_scale", action="store_true", help="average results over all tasks")
    parser.add_argument("--published", nargs="+", default=[], help="reference curves, JSON (.gz) or CSV; drawn dashed")
    return parser


def load(args: argparse.Namespace) -> tuple[list[Run], Results]:
    """The runs named on the command line, and their results. Raises UserError."""
    if not args.bin >= 0:
        raise tools.UserError(f"--bin takes a positive number of frames, not {args.bin}")
    runs = read_runs(args.logdir, metric=args.metric, method=args.method)
    published = sum(map(read_published, args.published), [])
    options = {"metric": args.metric, "width": args.bin, "same_scale": args.same_scale}
    return runs, analyse(runs, published, **options)


def main(argv: list[str] | None = None) -> int:
    args = arguments(__doc__, "curves.png").parse_args(argv)
    try:
        check_out(Path(args.out))
        _, results = load(args)
        print(*save(results, Path(args.out)), sep="\n")
    except (tools.UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    console.run(main)
