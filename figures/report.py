"""A self-contained HTML page about runs: curves, results, differing options, videos, robustness, versions.

python figures/report.py ./log --out report.html

Curves and results follow the rules of figures/plot.py and take the same options.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from setup import console  # before what takes seconds to import

# isort: split
import base64
import csv
import html
import io
import json
import math
import time
from collections.abc import Sequence

import numpy as np
from PIL import Image

import models
import tools
from figures import grid, plot

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { font-size: 1.6em } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ddd }
img { max-width: 100% } .note { color: #666; font-size: .9em }
table { border-collapse: collapse; font-size: .9em } .wide { overflow-x: auto }
th, td { text-align: left; vertical-align: top; padding: .2em .8em .2em 0; border-bottom: 1px solid #eee }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums }
.videos { display: flex; flex-wrap: wrap; gap: 1em } figure { margin: 0; width: 200px; font-size: .85em }
.strip { width: 100%; image-rendering: pixelated }
video { width: 200px; image-rendering: pixelated; background: #000 }
"""


def table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """An HTML table; numbers are right-aligned."""

    def cell(tag: str, text: str, like) -> str:
        kind = ' class="number"' if isinstance(like, int | float) else ""
        return f"<{tag}{kind}>{html.escape(text)}</{tag}>"

    def text(value) -> str:
        if not isinstance(value, int | float):
            return str(value)
        return "-" if value != value else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"

    head = "".join(cell("th", name, like) for name, like in zip(header, rows[0], strict=True))
    body = "\n".join(f"<tr>{''.join(cell('td', text(value), value) for value in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>\n{body}</table></div>'


def data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def curves(results: plot.Results) -> str:
    file = io.BytesIO()
    figure = plot.draw(results)
    figure.savefig(file, dpi=130, format="png")
    plot.plt.close(figure)
    return f'<img alt="learning curves" src="{data_uri("image/png", file.getvalue())}">'


def final(results: plot.Results) -> str:
    header = ["task", "method", "step", results.metric, "95% low", "95% high", "runs"]
    rows = [(*name, *map(float, point[:4]), point.runs) for name, point in results.final.items()]
    return table(header, rows) if rows else "<p>No task has a bin that all its runs have reached.</p>"


def progress(runs: Sequence[plot.Run]) -> str:
    """One row per run: progress, last value and time taken."""
    rows = []
    for run in runs:
        last = plot.read_rows(run.logdir)[-1]
        state = "finished" if run.steps[-1] >= run.config["steps"] else f"of {run.config['steps']:,}"
        hours = round(last.get("time", float("nan")) / 3600, 2)
        rows.append(
            (run.task, run.method, str(run.seed), last["step"], state, float(run.values[-1]), hours, run.logdir)
        )
    return table(["task", "method", "seed", "step", "", "last value", "hours", "folder"], rows)


def final_evaluations(runs: Sequence[plot.Run]) -> str:
    """One row per run and evaluation in final_eval.json."""
    rows = []
    for run in runs:
        found = tools.read_final_evaluation(run.logdir) or {"evaluations": {}}
        for name, result in found["evaluations"].items():
            where = f"{name} (held-out clips)" if result["clips"]["held_out"] else name
            mean, iqm = (result[f"{key}_interval"] or (math.nan, math.nan) for key in ("mean", "iqm"))
            numbers = [result["mean"], *mean, result["std"], result["iqm"], *iqm]
            label = (run.task, run.method, str(run.seed), where)
            rows.append((*label, len(result["returns"]), *numbers, f"{found['config_hash']} {found['step']:,}"))
    intervals = ["mean", "95% low", "95% high", "std", "IQM", "95% low", "95% high"]
    header = ["task", "method", "seed", "evaluation", "episodes", *intervals, "configuration, step"]
    return table(header, rows) if rows else "<p>None (--final_episodes).</p>"


def differences(runs: Sequence[plot.Run]) -> tuple[str, str]:
    """Tables of the options that differ between runs, with a column per (task, method), and of those all runs share."""
    groups = plot.group(runs)
    keys = [key for key in runs[0].config if key not in ("task", "logdir", "seed")]
    shown = {key: [json.dumps(run.config[key]) for run in runs] for key in keys}
    different = [key for key in keys if len(set(shown[key])) > 1]
    columns = []
    for members in groups.values():
        columns.append([", ".join(sorted({json.dumps(run.config[key]) for run in members})) for key in different])
    header = ["option", *(f"{task} {method}" for task, method in groups)]
    rows = [(key, *values) for key, *values in zip(different, *columns, strict=True)]
    shared = table(["option", "value"], [(key, shown[key][0]) for key in keys if key not in different])
    return table(header, rows) if rows else "<p>Only task and seed.</p>", shared


def videos(runs: Sequence[plot.Run]) -> str:
    """The latest evaluation video of every run, for each task it is evaluated on."""
    figures = []
    for run in runs:
        latest = {}
        for path in sorted((run.logdir / "video").glob("eval*.mp4"), key=plot.natural):
            latest[path.stem.rpartition("_")[0]] = path
        for path in latest.values():
            name, _, step = path.stem.rpartition("_")
            variant = name.removeprefix("eval").removesuffix("policy").strip("_")
            caption = f"{run.task}, {run.method}, seed {run.seed}, step {step} {variant}"
            source = data_uri("video/mp4", path.read_bytes())
            figures.append(
                f'<figure><video controls autoplay loop muted playsinline src="{source}"></video>'
                f"<figcaption>{html.escape(caption)}</figcaption></figure>"
            )
    return f'<div class="videos">{"".join(figures)}</div>' if figures else "<p>None.</p>"


def strips(runs: Sequence[plot.Run]) -> str:
    """The latest open-loop strip of every run, with labels."""
    figures = []
    for run in runs:
        paths = sorted((run.logdir / "video").glob("eval*openloop_*.png"), key=plot.natural)
        if paths:
            caption = f"{run.task}, {run.method}, seed {run.seed}, step {paths[-1].stem.rpartition('_')[2]}"
            source = data_uri("image/png", label_strip(paths[-1], run.config["size"]))
            figures.append(
                f'<p class="note">{html.escape(caption)}</p><img class="strip" alt="open loop" src="{source}">'
            )
    note = (
        "Every fifth frame; error: grey is zero. The model sees 10 frames and imagines the rest from the actions alone."
    )
    return "".join([f'<p class="note">{note}</p>', *figures]) if figures else "<p>None.</p>"


def label_strip(path: Path, size: Sequence[int]) -> bytes:
    """PNG of a strip written during training, whose frames have `size` (H, W)."""
    height, width = size
    strip = np.asarray(Image.open(path).convert("RGB"))
    columns = np.stack(np.split(strip, strip.shape[1] // width, axis=1))
    file = io.BytesIO()
    grid.open_loop(columns, height).save(file, format="PNG")
    return file.getvalue()


def robustness(runs: Sequence[plot.Run], path: str | None) -> str:
    """The last measurement of every run, and the table and picture of figures/robustness.py at `path`."""
    rows, parts = [], []
    for run in runs:
        last = {}
        for row in plot.read_rows(run.logdir):
            last |= {key: value for key, value in row.items() if key.startswith("robustness/")}
        for where in plot.unique(key.rpartition("/")[0] for key in last):
            values = [last.get(f"{where}/{name}") for name in models.DIAGNOSTICS]
            values = [float("nan") if value is None else value for value in values]
            rows.append((run.task, run.method, str(run.seed), where.removeprefix("robustness/"), *values))
    if rows:
        parts.append(table(["task", "method", "seed", "variant", *models.DIAGNOSTICS], rows))
    if path:
        with tools.reading(f"{path} is not a table of figures/robustness.py", "name its CSV"):
            with open(path, newline="") as file:
                header, *lines = csv.reader(file)
            if header[:2] != ["run", "task"] or not lines:
                raise ValueError(f"it begins with {','.join(header)[:40]}")
            parts.append(table(header, [[number(cell) for cell in line] for line in lines]))
        picture = Path(path).with_suffix(".png").read_bytes()
        parts.append(f'<img alt="robustness" src="{data_uri("image/png", picture)}">')
    return (
        "".join(parts)
        or "<p>Not measured. Train with --robustness_every, or run figures/robustness.py and pass --robustness.</p>"
    )


def number(text: str) -> float | str:
    try:
        return float(text or "nan")
    except ValueError:
        return text


def versions(runs: Sequence[plot.Run]) -> str:
    """Combinations of commit, device and package versions, and how many starts of the runs had each."""
    starts = [start for run in runs for start in tools.read_config(run.logdir)["runs"]]
    rows = []
    with tools.reading("config.json of a run has a start of another form", "leave that run out"):
        names = plot.unique(name for start in starts for name in start["versions"])
        for start in starts:
            commit = (start["git"]["commit"] or "unknown")[:12] + (" (modified)" if start["git"]["dirty"] else "")
            rows.append((commit, start["device"], *(start["versions"].get(name) or "-" for name in names)))
    counted = [(*row, rows.count(row)) for row in plot.unique(rows)]
    return table(["commit", "device", *names, "starts"], counted)


def page(runs: Sequence[plot.Run], results: plot.Results, measured: str | None = None) -> str:
    """The HTML page; `measured` is the path of a CSV from figures/robustness.py."""
    different, shared = differences(runs)
    tasks = plot.unique(run.task for run in runs)
    title = f"{', '.join(tasks[:3])}{' ...' if len(tasks) > 3 else ''}: {len(runs)} runs"
    published = plot.unique(method for _, method in results.published)
    dashed = f" Dashed: published curves of {', '.join(published)}." if published else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<p class="note">Written {time.strftime("%Y-%m-%d %H:%M %Z")}.</p>
<h2>Curves</h2>
{curves(results)}
<p class="note">Interquartile mean over runs with a 95% interval by stratified bootstrap; bins of {results.width:g}
frames. Lines are faded where not all runs have data. With fewer than four runs the plain mean is shown, and the
interval is too narrow to rely on.{html.escape(dashed)}</p>
<h2>Final results</h2>
{final(results)}
<p class="note">Of the final evaluations if all runs of a task have one, otherwise in the latest bin that all of them
have reached.</p>
<h2>Final evaluations</h2>
{final_evaluations(runs)}
<p class="note">Intervals: bootstrap over the episodes of one run. They do not tell how seeds differ.</p>
<h2>Runs</h2>
{progress(runs)}
<h2>Differing options</h2>
{different}
<h2>Latest evaluation videos</h2>
{videos(runs)}
<h2>Open loop</h2>
{strips(runs)}
<h2>Robustness</h2>
{robustness(runs, measured)}
<ul class="note">{"".join(f"<li>{name}: {html.escape(text)}.</li>" for name, text in models.DIAGNOSTICS.items())}</ul>
<h2>Versions</h2>
{versions(runs)}
<h2>Shared options</h2>
<details><summary>Show</summary>{shared}</details>
</body></html>
"""


def main(argv: list[str] | None = None) -> int:
    parser = plot.arguments(__doc__, "report.html")
    parser.add_argument("--robustness", help="CSV of figures/robustness.py, with its picture beside it")
    args = parser.parse_args(argv)
    try:
        tools.check_out(args.out)
        text = page(*plot.load(args), args.robustness)
        Path(args.out).write_text(text)
    except (tools.UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(args.out)
    return 0


if __name__ == "__main__":
    console.run(main)
