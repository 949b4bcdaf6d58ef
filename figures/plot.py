"""Learning curves and final results of runs, by task and method.

python figures/plot.py ./log --out curves.png

LOGDIR is a run, or a folder with runs somewhere below. Beside the PNG go a PDF, curves.csv (every point) and
curves_final.csv (the bars).

What is drawn (Agarwal et al., NeurIPS 2021): the interquartile mean over runs, with a 95% interval by stratified
bootstrap (percentiles of 2000 resamplings of the runs within each task). Fewer than four runs have no quartiles to cut:
there it is the mean, and the interval is too narrow to rely on.

- Binning: bin k of width W (--bin; by default the largest eval_every of the runs) holds the rows with
  k W <= step < (k+1) W. A run has one value per bin, the mean of its rows; the point stands at the mean of their steps.
  Nothing is interpolated. A line is pale where some runs of its group have not got to.
- Final results: the latest bin that all runs of a task have. They are averaged over tasks only where returns have one
  scale, as in DeepMind Control (0 to 1000); --same_scale says that yours have.
- Methods: what differs between the saved configs of runs of the same task, such as `nomlr` or `mask_ratio 0.3`; where
  that is more than three options, methods are numbered and a list is printed.
"""

import argparse
import csv
import gzip
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tools

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# The library rliable 1.2.0 would bring pandas, statsmodels and six more packages for the ten lines of `iqm`, cannot be
# imported with their present versions, and needs equally many runs of every task.
RESAMPLINGS = 2000
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito
# Options that say nothing about the method.
NO_METHOD = {"seed", "task", "shared_env_seed", "resource_files", "scene_files", "ds_resource_path"}
NO_METHOD |= {"video_pred_log", "decoder"}


class Run(NamedTuple):
    """One seed of one method on one task: `values` (n,) of a metric at increasing `steps` (n,) in frames."""

    task: str
    method: str
    seed: int
    steps: np.ndarray
    values: np.ndarray
    logdir: Path | None = None  # None for published runs
    config: dict | None = None  # options by dotted name


class Point(NamedTuple):
    """A point of a curve, or a bar: interquartile mean, 95% interval (NaN for one run), and how much it rests on."""

    step: float
    iqm: float
    low: float
    high: float
    runs: int
    complete: bool  # all runs of the group take part


def find_runs(paths: Sequence[str]) -> list[Path]:
    """Folders with a config.json among `paths` and below, in natural order, each once; warns where there are none."""
    found = {}
    for path in map(Path, paths):
        below = sorted({file.parent for file in path.rglob("config.json")}, key=natural)
        if not below:
            tools.warn(f"{path}: no run there" if path.is_dir() else f"{path}: no such folder")
        found |= {folder.resolve(): folder for folder in below}
    return list(found.values())


def natural(path: Path) -> list:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def read_rows(logdir: Path) -> list[dict]:
    """Rows of metrics.jsonl, none if there is no such file; a line that was cut off by a kill is left out."""
    path, rows = logdir / "metrics.jsonl", []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in rows if isinstance(row, dict) and "step" in row]


def read_runs(paths: Sequence[str], *, metric: str = "eval/return", method: str = "HRSSM") -> list[Run]:
    """Every run in `paths` with its values of `metric`; those that cannot be read or have none cost a warning.

    The method of a run is `method` with the options that set it apart. Raises UserError if no run is left.
    """
    options, _ = tools.read_options()
    defaults = {key: option.default for key, option in options.items()}
    runs = []
    for logdir in find_runs(paths):
        try:
            config = defaults | tools.flatten(tools.read_config(logdir)["config"])
            # A row that comes again, after a resumption, replaces the first.
            points = {row["step"]: row[metric] for row in read_rows(logdir) if row.get(metric) is not None}
        except (OSError, tools.UserError) as error:
            tools.warn(f"{logdir} left out: {error}")
            continue
        if not points:
            tools.warn(f"{logdir} left out: it has no {metric} yet")
            continue
        steps, values = np.array(sorted(points.items()), float).T
        runs.append(Run(config["task"], "", config["seed"], steps, values, logdir, config))
    if not runs:
        raise tools.UserError(f"nothing to plot: no run with {metric} in {' '.join(map(str, paths))}")
    differing = [key for key, option in options.items() if not option.may_change and differs(key, runs)]
    settings = [describe(run.config, differing) for run in runs]
    names = {tuple(options): " ".join([method, *options]) for options in sorted(settings)}
    if len(max(settings, key=len)) > 3:
        names = {options: f"{method} #{i}" for i, options in enumerate(names, 1)}
        print(*(f"{name}: {', '.join(options)}" for options, name in names.items()), sep="\n")
    runs = [run._replace(method=names[tuple(options)]) for run, options in zip(runs, settings, strict=True)]
    names = [run[:3] for run in runs]
    for name in sorted({name for name in names if names.count(name) > 1}):
        tools.warn(f"{names.count(name)} runs of {name[0]}, {name[1]}, seed {name[2]}: they count as different seeds")
    return runs


def differs(key: str, runs: list[Run]) -> bool:
    """Whether an option tells runs of the same task apart and says something about the method."""
    if key.split(".")[0] in NO_METHOD:
        return False
    values = {(run.task, json.dumps(run.config[key])) for run in runs}
    return len(values) > len({run.task for run in runs})


def describe(config: dict, keys: Sequence[str]) -> list[str]:
    """`nomlr`, `mask_ratio 0.3`: values of `keys`; a switch that is off goes without saying."""
    named = [(key, config[key]) for key in keys if config[key] is not False]
    return [key if value is True else f"{key} {value}" for key, value in named]


def read_published(path: str) -> list[Run]:
    """Published runs: JSON (also .gz), a list of {task, method, seed, xs, ys}; or CSV with columns task, method, seed,
    step, value. Raises UserError."""
    try:
        data = Path(path).read_bytes()
        text = (gzip.decompress(data) if path.endswith(".gz") else data).decode()
        if path.endswith(".csv"):
            groups: dict[tuple, list] = {}
            for row in csv.DictReader(text.splitlines()):
                point = float(row["step"]), float(row["value"])
                groups.setdefault((row["task"], row["method"], int(row["seed"])), []).append(point)
            return [Run(*name, *np.array(sorted(points)).T) for name, points in groups.items()]
        fields = [(r["task"], r["method"], r["seed"], r["xs"], r["ys"]) for r in json.loads(text)]
        return [Run(*name, np.array(xs, float), np.array(ys, float)) for *name, xs, ys in fields]
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise tools.UserError(
            f"cannot read --published {path} ({type(error).__name__}: {error}): it takes a JSON list of {{task, method,"
            " seed, xs, ys}}, or CSV with the columns task, method, seed, step, value"
        ) from error


def iqm(strata: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """Interquartile mean of all values and its 95% interval by bootstrap within each of `strata` (arrays (n,)).

    The interval is NaN if no stratum has two values. The same values always give the same interval.
    """
    mean = float(stats.trim_mean(np.concatenate(strata), 0.25))
    if max(map(len, strata)) < 2:
        return mean, np.nan, np.nan
    rng = np.random.default_rng(0)
    drawn = [values[rng.integers(len(values), size=(RESAMPLINGS, len(values)))] for values in strata]
    low, high = np.percentile(stats.trim_mean(np.concatenate(drawn, 1), 0.25, axis=1), [2.5, 97.5])
    return mean, float(low), float(high)


def bins(run: Run, width: float) -> dict[int, tuple[float, float]]:
    """Bin -> mean step and mean value of the rows in it."""
    index = (run.steps // width).astype(int)
    return {int(k): (run.steps[index == k].mean(), run.values[index == k].mean()) for k in np.unique(index)}


def curve(runs: Sequence[Run], width: float) -> list[Point]:
    """Points over the runs of one task and method, in order of steps."""
    binned = [bins(run, width) for run in runs]
    points = []
    for k in sorted(set().union(*binned)):
        steps, values = np.array([found[k] for found in binned if k in found]).T
        points.append(Point(steps.mean(), *iqm([values]), len(values), len(values) == len(runs)))
    return points


def final(groups: dict[tuple[str, str], list[Run]], width: float, together: bool) -> dict[tuple[str, str], Point]:
    """(task, method) -> the result in the latest bin that all runs of the task have; tasks without one are left out.

    `together` adds the results over tasks under ("all tasks", method), of the methods that have all tasks.
    """
    results, strata = {}, {}
    for task in unique(task for task, _ in groups):
        binned = {method: [bins(run, width) for run in runs] for (t, method), runs in groups.items() if t == task}
        common = set.intersection(*(set(found) for found in sum(binned.values(), [])))
        if not common:
            tools.warn(f"{task}: no final result, its runs have no bin of {width:g} frames in common")
            continue
        for method, found in binned.items():
            steps, values = np.array([run[max(common)] for run in found]).T
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
    """What is drawn and written: points by (task, method)."""

    metric: str
    width: float
    curves: dict[tuple[str, str], list[Point]]
    published: dict[tuple[str, str], list[Point]]
    final: dict[tuple[str, str], Point]


def analyse(runs: Sequence[Run], published: Sequence[Run], *, metric: str, width: float, same_scale: bool) -> Results:
    """Curves and final results of `runs`, and curves of `published` on their tasks as far as ours go."""
    width = width or max(run.config["eval_every"] for run in runs)
    groups = group(runs)
    ends = {task: max(run.steps[-1] for run in runs if run.task == task) for task, _ in groups}
    references = {}
    for (task, method), found in group([run for run in published if run.task in ends]).items():
        points = [point for point in curve(found, width) if point.step < ends[task] + width]
        references |= {(task, method): points} if points else {}
    if published and not references:
        tools.warn(f"no published curve of {', '.join(ends)} within the frames of these runs")
    together = same_scale or "success" in metric or all(task.startswith("dmc_") for task in ends)
    if not together and len(ends) > 1:
        tools.warn("no result over all tasks, their returns may have different scales: --same_scale if they do not")
    curves = {name: curve(found, width) for name, found in groups.items()}
    return Results(metric, width, curves, references, final(groups, width, together))


def draw(results: Results) -> plt.Figure:
    """One panel of curves per task and one of final results; published curves are dashed."""
    tasks = unique(task for task, _ in results.curves)
    methods = sorted({method for _, method in results.curves})
    colors = {method: COLORS[i % len(COLORS)] for i, method in enumerate(methods)}
    references = sorted({method for _, method in results.published})
    greys = {method: str(0.25 + 0.5 * i / max(1, len(references))) for i, method in enumerate(references)}
    columns = min(len(tasks) + 1, 4)
    figure, axes = plt.subplots(
        -(-(len(tasks) + 1) // columns), columns, squeeze=False, layout="constrained", figsize=(3.6 * columns, 3.2)
    )
    figure.set_figheight(3.0 * len(axes) + 0.3)
    axes = axes.ravel()
    for axis in axes[len(tasks) + 1 :]:
        axis.remove()
    for task, axis in zip(tasks, axes, strict=False):
        for (t, method), points in results.published.items():
            if t == task:
                axis.plot(*zip(*[p[:2] for p in points], strict=True), "--", color=greys[method], lw=1.2, label=method)
        for (t, method), points in results.curves.items():
            if t == task:
                draw_curve(axis, points, colors[method], method)
        axis.set(title=task, xlabel="step (environment frames)", ylabel=results.metric)
        axis.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
        axis.margins(x=0.03)
        axis.grid(alpha=0.25)
    draw_bars(axes[len(tasks)], results, colors)
    handles = {}
    for axis in axes[: len(tasks)]:
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=min(4, len(handles)), frameon=False)
    return figure


def draw_curve(axis, points: list[Point], color: str, label: str) -> None:
    steps, mean, low, high = np.array([point[:4] for point in points]).T
    until = sum(point.complete for point in points)
    # A single point draws no line, so each gets a mark.
    axis.plot(steps[:until], mean[:until], color=color, marker=".", label=label if until else None)
    axis.plot(steps[max(0, until - 1) :], mean[max(0, until - 1) :], color=color, marker=".", alpha=0.35, zorder=1.5)
    axis.fill_between(steps, low, high, color=color, alpha=0.15, lw=0)


def draw_bars(axis, results: Results, colors: dict[str, str]) -> None:
    """Final results with intervals: over all tasks where there are such, else those of every task."""
    if not results.final:
        axis.set_axis_off()
        return
    overall = {name: point for name, point in results.final.items() if name[0] == "all tasks"}
    shown = overall or results.final
    tasks = unique(task for task, _ in shown)
    several = len(tasks) > 1
    for row, ((task, method), point) in enumerate(shown.items()):
        axis.barh(row, point.iqm, 0.4, color=colors[method], alpha=0.75)
        if point.runs > 1:
            axis.plot([point.low, point.high], [row, row], color="black", lw=1.5)
        name = f"{task}: {method}" if several else method
        shown_as = f"{name} ({point.runs} run{'s' * (point.runs != 1)})"
        axis.text(0.02, row - 0.25, shown_as, va="bottom", fontsize=8, transform=axis.get_yaxis_transform())
    steps = unique(point.step for point in shown.values())
    at = f", {matplotlib.ticker.EngFormatter(sep='')(steps[0])} frames" if len(steps) == 1 and not overall else ""
    axis.set(title=f"final: {'each task' if several else ''.join(tasks)}{at}", xlabel=results.metric, yticks=[])
    axis.set_ylim(len(shown) - 0.6, -0.8 - 0.2 * several)
    axis.grid(axis="x", alpha=0.25)


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in rows)


def save(results: Results, out: Path) -> list[Path]:
    """Write OUT.png, OUT.pdf, OUT.csv and OUT_final.csv; returns their paths."""
    figure = draw(results)
    paths = [out.with_suffix(".png"), out.with_suffix(".pdf")]
    for path in paths:
        figure.savefig(path, dpi=150)
    plt.close(figure)
    header = ["task", "method", "metric", "step", "iqm", "low", "high", "runs"]
    curves = [("run", name, point) for name, points in results.curves.items() for point in points]
    curves += [("published", name, point) for name, points in results.published.items() for point in points]
    rows = [[source, *name, results.metric, *point[:5]] for source, name, point in curves]
    paths += [out.with_suffix(".csv"), out.with_name(f"{out.stem}_final.csv")]
    write_csv(paths[2], ["source", *header], rows)
    write_csv(paths[3], header, [[*name, results.metric, *point[:5]] for name, point in results.final.items()])
    return paths


def arguments(description: str, out: str) -> argparse.ArgumentParser:
    """The options that the plot and the report share."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter)
    parser.add_argument("logdir", nargs="+", help="a run or a folder with runs below")
    parser.add_argument("--out", default=out, help=f"file to write (default {out})")
    parser.add_argument("--metric", default="eval/return", help="key of metrics.jsonl (default eval/return)")
    parser.add_argument("--method", default="HRSSM", help="name of the method, before what differs (default HRSSM)")
    parser.add_argument("--bin", type=float, default=0, help="width of a bin in frames (default: eval_every)")
    parser.add_argument("--same_scale", action="store_true", help="average the results of all tasks")
    parser.add_argument("--published", nargs="+", default=[], help="curves to compare with, JSON (.gz) or CSV; dashed")
    return parser


def load(args: argparse.Namespace) -> tuple[list[Run], Results]:
    """The runs that the command line names and what follows from them. Raises UserError."""
    if not args.bin >= 0:
        raise tools.UserError(f"--bin takes a positive number of frames, not {args.bin}")
    runs = read_runs(args.logdir, metric=args.metric, method=args.method)
    published = sum(map(read_published, args.published), [])
    options = {"metric": args.metric, "width": args.bin, "same_scale": args.same_scale}
    return runs, analyse(runs, published, **options)


def main(argv: list[str] | None = None) -> int:
    args = arguments(__doc__, "curves.png").parse_args(argv)
    try:
        _, results = load(args)
        print(*save(results, Path(args.out)), sep="\n")
    except (tools.UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
