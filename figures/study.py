"""The tables and pictures of setup/study.sh, from the folders of its runs.

python figures/study.py ./study

A run is STUDY/PART/TASK/METHOD/SEED. Three tables in --out keep what was ever measured, also of runs that are not in
STUDY any more, so a study may be made in pieces and on several machines:

- study_runs.csv: a row per finished run: length, hours, commit, device, command.
- study_values.csv: a row per finished run, step and metric: evaluation returns, `final/` those of the final
  evaluation; reward R^2, errors of predicted pictures and R^2 of states of world models.
- study_robustness.csv: a row per run, clips and measure, from STUDY/robustness_*.csv of figures/robustness.py.

A run that is measured again replaces all its rows.

From these: study.md, a table per part and task of means over seeds with 95% intervals (bootstrap over seeds, 10,000
resamplings), and differences to a base method (HRSSM) paired by seed; study_control.png and study_representation.png.
Where an interval of a difference contains 0 the seeds do not tell the methods apart. Of two or three seeds an interval
is their range, which the true mean lies in far less often than 95 times of 100. It tells nothing of differences between
episodes, as a run's value is a mean over its episodes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from setup import console  # before what takes seconds to import

# isort: split
import argparse
import csv
import json
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from matplotlib import pyplot as plt

import tools
from figures import plot

RESULTS = Path(__file__).parent / "results"
METRICS = re.compile(
    r"eval/(seen/|unseen/)?return|offline/(reward_r2|.*_mse(_\d+)?|(closed_)?object_presence|state_r2_\d+(_\d+)?)"
)
RUNS = ("part", "task", "method", "seed", "steps", "hours", "commit", "device", "command")
VALUES = ("part", "task", "method", "seed", "step", "metric", "value")
MEASURES = ("part", "task", "method", "seed", "clips", "measure", "value")
# Methods in the order of all tables and pictures, which decides their colours, too.
NAMES = {
    "hrssm": plot.METHODS["hrssm"],
    "neither": "neither loss",
    "nomlr": "no latent reconstruction",
    "nosimsr": "no bisimulation",
    "rssm": plot.METHODS["rssm"],
    "repo+beta_init=0.1+beta_lr=0.01": plot.METHODS["repo"],  # short runs need it: see the README
    "dreamer": plot.METHODS["dreamer"],
    "r2dreamer": plot.METHODS["r2dreamer"],
    "infonce": plot.METHODS["infonce"],
    "upstream": "upstream's program",
}
# Parts in the order of study.md, others last.
PARTS = ("representation", "control", "upstream", "masks", "sparse", "offline", "breakout", "data")
# Bars of final evaluations: their name in the legend, and opacity.
FINALS = {
    "final/return": ("", 0.9),
    "final/seen/return": ("clips of training", 0.4),
    "final/unseen/return": ("unseen clips", 0.9),
}
DOTS = {"ls": "", "marker": "o", "color": "black", "ms": 4, "mec": "white", "mew": 0.6}
SHOWN = {"denoising_factor": 0.0, "probe_r2": -0.2, "reward_r2": -1.0}  # in bars, drawn down to these values
# Metrics of a picture that needs no model are the column of a method of its own beside what models reach.
BASELINES = {"copy": "last picture seen", "mean": "mean picture"}
BASE = "hrssm"  # the method that others are compared with
BASES = {"offline": "autoencoder=internal", "breakout": "decoder_scale=1"}  # the same in these parts


class Cell(NamedTuple):
    part: str
    task: str
    method: str
    seed: str


def finished(logdir: Path) -> bool:
    return (logdir / "sweep.done").exists()


def merge(path: Path, columns: tuple[str, ...], rows: list[list], keys: int) -> list[dict[str, str]]:
    """Write `rows` to the table `path`, instead of all others of the same runs; returns all, sorted.

    The first four columns name a run, the first `keys` a row of it.
    """
    text = [tuple(f"{x:.6g}" if isinstance(x, float) else str(x) for x in row) for row in rows]
    known, new = {}, {row[:4] for row in text}
    if path.exists():
        with open(path, newline="") as file:
            known = {row[:keys]: row for row in map(tuple, csv.reader(file)) if row[:4] not in new and row != columns}
    known |= {row[:keys]: row for row in text}
    ordered = sorted(known.values(), key=lambda row: [plot.natural(Path(part)) for part in row[:keys]])
    plot.write_csv(path, columns, ordered)
    return [dict(zip(columns, row, strict=True)) for row in ordered]


def collect(study: Path) -> tuple[list[list], list[list]]:
    """Rows of RUNS and VALUES of the finished runs."""
    runs, values = [], []
    for logdir in plot.find_runs([str(study)]):
        parts = logdir.relative_to(study).parts
        if not finished(logdir) or len(parts) != len(Cell._fields):
            continue
        own, rows = Cell(*parts), plot.read_rows(logdir)
        for row in rows:
            values += [[*own, str(row["step"]), key, float(row[key])] for key in row if METRICS.fullmatch(key)]
        if final := tools.read_final_evaluation(logdir):
            for name, result in final["evaluations"].items():
                metric = f"{name.replace('eval', 'final', 1)}/return"
                values.append([*own, str(final["step"]), metric, float(result["mean"])])
        saved = json.loads((logdir / "config.json").read_text())
        made = saved["runs"][-1]
        hours = max(row.get("time", 0.0) for row in rows) / 3600
        # Folders of one machine mean nothing on another.
        command = " ".join(re.sub(r"(^|=)/.*/", r"\1", token) for token in made["command"])
        about = made["git"]["commit"], f"{made['device']}, torch {made['versions']['torch']}", command
        runs.append([*own, str(saved["config"]["steps"]), float(hours), *about])
    return runs, values


def collect_robustness(study: Path) -> list[list]:
    """Rows of MEASURES. Without distraction `clips` is `clean`; HRSSM's initial weights are the method `untrained`."""
    found = []
    for path in sorted(study.glob("robustness_*.csv")):
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                logdir, untrained = row["run"].removesuffix(" untrained"), row["run"].endswith(" untrained")
                own = Cell(*Path(logdir).absolute().parts[-4:])  # however the folder of the study was written
                if not finished(study.joinpath(*own)) or (untrained and own.method != BASE):
                    continue
                own = own._replace(method="untrained") if untrained else own
                clips = row["clips"] or ("clean" if row["task"] != own.task else "")
                found.append([*own, clips, row["measure"], row["value"]])
    return found


def colored(methods: Iterable[str]) -> dict[str, str]:
    """Colour of each of `methods`, the same in all pictures; in the order of NAMES, what is no method last."""
    last, methods = (*BASELINES.values(), "untrained"), plot.unique(methods)
    order = plot.unique([*NAMES, *(method for method in methods if method not in last), *last])
    colors = {method: plot.COLORS[i % len(plot.COLORS)] for i, method in enumerate(order)} | {"untrained": "lightgray"}
    return {method: color for method, color in colors.items() if method in methods}


def bootstrap(values: np.ndarray) -> tuple[float, float, float]:
    """Mean of `values` (n,) and its 95% interval over seeds; NaN for a single one."""
    if len(values) < 2:
        return float(values.mean()), np.nan, np.nan
    drawn = np.random.default_rng(0).choice(values, (10_000, len(values))).mean(1)
    return float(values.mean()), *np.percentile(drawn, [2.5, 97.5]).tolist()


def shown(values: Iterable[float], digits: int) -> str:
    mean, low, high = bootstrap(np.array(list(values)))
    return f"{mean:.{digits}f}" + ("" if np.isnan(low) else f" [{low:.{digits}f}, {high:.{digits}f}]")


def table(results: dict[str, dict[str, dict[str, float]]], base: str) -> list[str]:
    """Markdown of measure -> method -> seed -> value: means, and differences to method `base` paired by seed."""
    methods = list(colored(method for measure in results.values() for method in measure))
    names = [NAMES.get(method, method) for method in methods]
    for at, method in enumerate(methods):
        if method not in BASELINES.values():  # which are no runs
            counts = sorted({len(by_method[method]) for by_method in results.values() if method in by_method})
            names[at] += f" ({f'{counts[0]} to ' * (len(counts) > 1)}{plot.plural(counts[-1])})"
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(methods) + 1) + "|"]
    for measure, by_method in results.items():
        digits = 1 if "return" in measure else 4 if "mse" in measure else 2
        cells = [shown(by_method[m].values(), digits) if m in by_method else "" for m in methods]
        for at, method in enumerate(methods):
            if method in BASELINES.values() and method in by_method:
                cells[at] = f"{np.mean(list(by_method[method].values())):.{digits}f}"
        lines.append(f"| {measure} | {' | '.join(cells)} |")
        own, paired = by_method.get(base, {}), []
        for method in methods:
            both = own.keys() & by_method.get(method, {}).keys() if method != base else ()
            paired.append(shown((own[s] - by_method[method][s] for s in sorted(both)), digits) if both else "")
        if any(paired):
            lines.append(f"| {NAMES.get(base, base)} minus this | {' | '.join(paired)} |")
    return lines


def last_values(values: list[dict], measures: list[dict]) -> dict[tuple[str, str], dict]:
    """(part, task) -> measure -> method -> seed -> value: each run's last value, at the step that all have reached."""
    found = {}
    for row in measures:
        where = {"": "", "clean": ", clean"}.get(row["clips"], f", {row['clips']} clips")
        name = row["measure"].replace("_", " ") + where
        if row["value"] not in ("", "nan"):
            by_metric = found.setdefault((row["part"], row["task"]), {})
            by_metric.setdefault(name, {}).setdefault(row["method"], {})[row["seed"]] = float(row["value"])
    for part, task in plot.unique((row["part"], row["task"]) for row in values):
        rows = [row for row in values if (row["part"], row["task"]) == (part, task)]
        if part == "masks":  # they differ from HRSSM's runs of another part in the mask alone
            same = ("control", task, BASE)
            rows += [row for row in values if (row["part"], row["task"], row["method"]) == same]
        by_metric = found.setdefault((part, task), {})
        for metric in plot.unique(row["metric"] for row in rows):
            runs = {}
            for row in (row for row in rows if row["metric"] == metric):
                runs.setdefault((row["method"], row["seed"]), {})[int(row["step"])] = float(row["value"])
            common = set.intersection(*(set(run) for run in runs.values()))
            if not common:
                continue
            step = max(common)
            unit = "updates" if part in ("representation", *BASES) else "frames"
            baseline = re.fullmatch("offline/(copy|mean)_(mse)?(.*)", metric)
            if baseline:
                metric = f"offline/{'open_' if baseline[2] else ''}{baseline[2] or ''}{baseline[3]}"
            by_method = by_metric.setdefault(f"{metric} at {step:,} {unit}", {})
            for (method, seed), run in runs.items():
                method = BASELINES[baseline[1]] if baseline else method
                by_method.setdefault(method, {})[seed] = run[step]
    return found


def draw_curves(values: list[dict], part: str, metrics: tuple[str, ...], label: str, path: Path) -> None:
    """A panel per task: the mean over seeds of the first of `metrics` that its runs have, and every seed, faint.

    Below it bars of final evaluations, if there are any.
    """
    rows = [row for row in values if row["part"] == part and row["metric"] in metrics]
    finals = [row for row in values if row["part"] == part and row["metric"] in FINALS]
    tasks, colors = plot.unique(row["task"] for row in rows), colored(row["method"] for row in rows)
    lines = 1 + bool(finals)
    figure, axes = plt.subplots(
        lines, len(tasks), squeeze=False, figsize=(3.4 * len(tasks), 3.1 * lines), layout="constrained", sharey=True
    )
    for axis, task in zip(axes[0], tasks, strict=True):
        own = [row for row in rows if row["task"] == task]
        metric = next(metric for metric in metrics if any(row["metric"] == metric for row in own))
        for method, color in colors.items():
            runs = {}
            for row in (row for row in own if row["metric"] == metric and row["method"] == method):
                runs.setdefault(row["seed"], {})[int(row["step"])] = float(row["value"])
            if not runs:
                continue
            for run in runs.values():
                axis.plot(run.keys(), run.values(), color=color, alpha=0.35, lw=0.8)
            steps = sorted(set.intersection(*(set(run) for run in runs.values())))
            mean = [np.mean([run[step] for run in runs.values()]) for step in steps]
            name = f"{NAMES.get(method, method)} ({plot.plural(len(runs))})"
            axis.plot(steps, mean, color=color, lw=1.8, marker="o", ms=3, label=name)
        axis.set_title(task, fontsize=10)
        axis.set_xlabel("environment frames")
        axis.xaxis.set_major_formatter(plot.frames)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7, frameon=False)
    axes[0, 0].set_ylabel(label)
    if finals:
        axes[1, 0].set_ylabel("return of the final evaluation")
        for axis, task in zip(axes[1], tasks, strict=True):
            draw_finals(axis, [row for row in finals if row["task"] == task], colors)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def draw_finals(axis, rows: list[dict], colors: dict[str, str]) -> None:
    """A bar per method and kind of clips, with a dot per seed and the 95% interval over seeds."""
    kinds = [kind for kind in FINALS if any(row["metric"] == kind for row in rows)]
    methods = [method for method in colors if any(row["method"] == method for row in rows)]
    width = 0.8 / max(1, len(kinds))
    for k, kind in enumerate(kinds):
        label, opacity = FINALS[kind]
        for at, method in enumerate(methods):
            own = [float(row["value"]) for row in rows if (row["metric"], row["method"]) == (kind, method)]
            if not own:
                continue
            x, (mean, low, high) = at + (k - (len(kinds) - 1) / 2) * width, bootstrap(np.array(own))
            axis.bar(x, mean, 0.9 * width, color=colors[method], alpha=opacity)
            axis.plot([x] * len(own), own, **DOTS)
            axis.vlines(x, low, high, color="black", lw=1)  # nothing for a single seed, whose interval is NaN
        if label:
            axis.bar(0, 0, color="gray", alpha=opacity, label=label)
    axis.set_xticks(range(len(methods)), [NAMES.get(method, method) for method in methods], fontsize=8)
    axis.set_xlim(-0.6, len(colors) - 0.4)
    axis.grid(axis="y", alpha=0.25)
    axis.set_axisbelow(True)
    if any(FINALS[kind][0] for kind in kinds):
        axis.legend(fontsize=7, frameon=False)


def draw_bars(measures: list[dict], part: str, path: Path) -> None:
    """What latents know on held-out clips: a row of panels per task, a bar per method, a dot per seed."""
    rows = [row for row in measures if row["part"] == part and row["clips"] == "unseen" and row["value"] != "nan"]
    tasks = plot.unique(row["task"] for row in rows)
    colors = colored(row["method"] for row in rows)
    figure, axes = plt.subplots(
        len(tasks), len(SHOWN), squeeze=False, figsize=(9.5, 0.5 + 2.1 * len(tasks)), layout="constrained", sharey=True
    )
    for line, task in zip(axes, tasks, strict=True):
        for axis, (measure, lowest) in zip(line, SHOWN.items(), strict=True):
            for at, (method, color) in enumerate(colors.items()):
                own = [r for r in rows if (r["task"], r["measure"], r["method"]) == (task, measure, method)]
                values = np.array([float(row["value"]) for row in own])
                if not len(values):
                    continue
                axis.barh(at, max(values.mean(), lowest), 0.7, color=color)
                axis.plot(values.clip(lowest), [at] * len(values), clip_on=False, **DOTS)
                if values.mean() < lowest:
                    label = {"color": "white", "pad": 1}  # a bar may be black
                    axis.text(lowest * 0.95, at, f"{values.mean():.0f}", va="center", fontsize=7, bbox=label)
            axis.set_yticks(range(len(colors)), [NAMES.get(method, method) for method in colors], fontsize=8)
            axis.set_xlim(lowest - 0.05, 1.05)
            axis.tick_params(axis="x", labelsize=8)
            axis.axvline(0, color="black", lw=0.8)
            axis.set_title(f"{measure.replace('_', ' ').replace('r2', '$R^2$')}, {task}", fontsize=8)
            axis.grid(axis="x", alpha=0.25)
            axis.set_axisbelow(True)
    axes[0, 0].invert_yaxis()  # shared by all
    figure.savefig(path, dpi=200)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("study", nargs="?", help="folder of setup/study.sh; without it the tables in --out are used")
    parser.add_argument("--out", default=str(RESULTS), help="folder of the tables (default figures/results)")
    args = parser.parse_args(argv)
    out, study = Path(args.out), Path(args.study or ".")
    try:
        out.mkdir(parents=True, exist_ok=True)
        runs, values = collect(study) if args.study else ([], [])
        measures = collect_robustness(study) if args.study else []
        merge(out / "study_runs.csv", RUNS, runs, 4)
        all_values = merge(out / "study_values.csv", VALUES, values, 6)
        all_measures = merge(out / "study_robustness.csv", MEASURES, measures, 6)
        if not all_values:
            raise tools.UserError(f"no run of the study in {study}, and none in {out}: setup/study.sh makes them")
        lines, results = [], last_values(all_values, all_measures)
        order = plot.unique([*PARTS, *(part for part, _ in results)])
        for part, task in sorted(results, key=lambda own: (order.index(own[0]), own[1])):
            lines += [f"## {part}, {task}", "", *table(results[part, task], BASES.get(part, BASE)), ""]
        (out / "study.md").write_text("\n".join(lines))
        parts = {row["part"] for row in all_values}
        if "control" in parts:
            metrics = "eval/unseen/return", "eval/return"
            draw_curves(all_values, "control", metrics, "return (video: unseen clips)", out / "study_control.png")
        if "upstream" in parts:
            draw_curves(all_values, "upstream", ("eval/return",), "return", out / "study_upstream.png")
        if any(row["part"] == "representation" for row in all_measures):
            draw_bars(all_measures, "representation", out / "study_representation.png")
        print("\n".join(lines))
    except (tools.UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    console.run(main)
