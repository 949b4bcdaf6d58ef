"""How much does a distraction change the latent? The same simulator states, rendered under many distractions.

python figures/robustness.py ./log --task dmc_walker_stand_video,dmc_walker_stand_color_hard --out robustness.png

LOGDIR is a control-suite run with a checkpoint; pass several to compare them. The table is also written as CSV beside
the picture. Default of --task: the variants that the run was trained and evaluated on; if there are none, all variants
whose files are available.

The same random actions are played from the same initial states, without distraction and under --draws distractions of a
kind, drawn with other seeds than those of training; the simulator states are checked to be equal. The online networks
filter each sequence like the policy, but take the mode of each latent instead of a sample, so that all differences come
from the picture. With z_sk the latent of state s (class probabilities or means, and the recurrent state) under draw k,
and |.| the Euclidean norm:

- denoising factor = (other - same) / (other + same), where `same` is the mean of |z_sk - z_sk'| over draws k != k' and
  `other` the mean of |z_sk - z_s'k'| over states s != s' (Luo et al., 2025, arXiv 2506.00563): 1 if only the state
  matters, 0 if the draw matters as much as the state.
- action and value agreement = 1 - (variance over draws) / (variance over states and draws) of the policy's mode and the
  critic's value: 1 if the distraction has no effect, about 0 if it alone decides.
- return: mean of --episodes evaluation episodes, next to that on the clean task.

Intervals are at 95%: over draws (jackknife, three draws or more), and over episodes for returns; columns ending in _ci
hold half their width. `untrained` is the same network with its initial weights, the effect of the architecture alone.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from setup import console  # before what takes seconds to import

# isort: split
import argparse
import copy
import csv
import math
import os
from types import SimpleNamespace

import numpy as np
import torch
from scipy import stats

import dreamer
import envs
import models
import tools
from envs import paired
from envs.dmc import VARIANTS
from figures import plot

MEASURES = (*models.ROBUSTNESS, "return")
COLUMNS = ("run", "task", *models.ROBUSTNESS, "same", "other", "return", "of_clean")


def load(logdir: str, args) -> tuple[SimpleNamespace, dict]:
    """Config and checkpoint of a run. Raises UserError."""
    config = tools.run_config(logdir)
    checkpoint = tools.load_checkpoint(Path(logdir) / "latest.pt")
    if checkpoint is None or "agent" not in checkpoint:
        raise tools.UserError(f"{logdir} holds no checkpoint of a run")
    config.video_pred_log = False
    for name in ("resource_files", "ds_resource_path"):
        if getattr(args, name):
            setattr(config, name, getattr(args, name))
    return config, checkpoint


def find_tasks(config, options: dict, requested: str) -> list[str]:
    """Tasks to measure on: those requested, else the variants of the run, else every variant that can be rendered."""
    clean = paired.clean_task(config.task)
    if requested:
        tasks = requested.split(",")
    else:
        tasks = [task for task in (config.task, *config.eval_task) if envs.parse_task(task).variant]
    for task in tasks:
        if envs.parse_task(task)[:3] != envs.parse_task(config.task)[:3] or not envs.parse_task(task).variant:
            raise tools.UserError(f"--task {task}: give variants of {clean}, such as {clean}_video")
    if tasks:
        return list(dict.fromkeys(tasks))
    for variant in VARIANTS:
        try:
            envs.prepare(f"{clean}_{variant}", **options)
            tasks.append(f"{clean}_{variant}")
        except envs.EnvError as error:
            tools.warn(f"{variant} skipped: {error}")
    return tasks


def table(rows: list[dict]) -> str:
    def text(value) -> str:
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    cells = [COLUMNS, *([text(row.get(name, "-")) for name in COLUMNS] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def draw(rows: list[dict], pictures: dict[str, np.ndarray]) -> plot.plt.Figure:
    """One state under all draws (K,H,W,C) of each task; below, bars of every measure by task and run."""
    measures = [name for name in MEASURES if any(np.isfinite(row.get(name, np.nan)) for row in rows)]
    runs = list(dict.fromkeys(row["run"] for row in rows))
    trained = [run for run in runs if not run.endswith(" untrained")]
    per_row = min(len(pictures), 3)
    strips = math.ceil(len(pictures) / per_row)
    draws = max(map(len, pictures.values()))
    strip_height = min(9.0 / per_row / draws, 1.2) + 0.35
    figure = plot.plt.figure(figsize=(9.0, strips * strip_height + 2.3 + 0.22 * len(trained)), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[strips * strip_height, 2.3 + 0.22 * len(trained)])
    axes = above.subplots(strips, per_row, squeeze=False).ravel()
    for axis in axes[len(pictures) :]:
        axis.remove()
    for axis, (task, images) in zip(axes, pictures.items(), strict=False):
        axis.imshow(np.concatenate(images, 1), interpolation="nearest")
        width = images.shape[2]
        axis.set_xticks([width * (k + 0.5) - 0.5 for k in range(len(images))], range(1, len(images) + 1), fontsize=8)
        axis.tick_params(length=0, pad=1)
        axis.set_yticks([])
        axis.set_title(f"{variant_name(task)}: one state, draws 1 to {len(images)}", fontsize=9)
    for axis, name in zip(below.subplots(1, len(measures), squeeze=False)[0], measures, strict=True):
        draw_bars(axis, name, rows, trained)
    handles = {}
    for axis in below.axes:
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    below.legend(
        handles.values(), handles, loc="outside lower center", ncols=min(len(trained), 4), frameon=False, fontsize=8
    )
    return figure


def draw_bars(axis, name: str, rows: list[dict], trained: list[str]) -> None:
    """One measure by task, a bar per run in its colour; the untrained network of a run is pale and hatched."""
    tasks = list(dict.fromkeys(row["task"] for row in rows if name in row))
    runs = [run for run in dict.fromkeys(row["run"] for row in rows) if any(name in r for r in rows if r["run"] == run)]
    labels, width = short_names(trained), 0.8 / len(runs)
    for i, run in enumerate(runs):
        own = run.removesuffix(" untrained")
        values = {row["task"]: row for row in rows if row["run"] == run and name in row}
        x = np.arange(len(tasks)) + (i - (len(runs) - 1) / 2) * width
        heights = [values[task][name] if task in values else np.nan for task in tasks]
        errors = [values[task].get(f"{name}_ci", np.nan) if task in values else np.nan for task in tasks]
        style = {"color": plot.COLORS[trained.index(own) % len(plot.COLORS)], "label": labels[own]}
        if run != own:
            style |= {"alpha": 0.45, "hatch": "////", "edgecolor": "white", "label": f"{labels[own]}, untrained"}
        axis.bar(x, heights, width, **style)
        axis.errorbar(x, heights, errors, fmt="none", ecolor="black", elinewidth=1, capsize=1.5)
    turn = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if len(tasks) > 3 else {}
    axis.set_xlim(-0.5, len(tasks) - 0.5)
    axis.set_xticks(range(len(tasks)), map(variant_name, tasks), fontsize=8, **turn)
    axis.tick_params(axis="y", labelsize=8)
    axis.set_title(name.replace("_", " "), fontsize=9)
    axis.axhline(0, color="black", lw=0.8)
    axis.grid(axis="y", alpha=0.25)
    axis.set_axisbelow(True)


def variant_name(task: str) -> str:
    return envs.parse_task(task).variant.replace("_", " ") or "clean"


def short_names(runs: list[str]) -> dict[str, str]:
    """Folders of runs without the part of the path that all of them share; a single run keeps two folders."""
    paths = [Path(run).absolute() for run in runs]
    shared = os.path.commonpath([path.parent if len(runs) > 1 else path.parent.parent for path in paths])
    return {run: os.path.relpath(path, shared) for run, path in zip(runs, paths, strict=True)}


def measure(args) -> tuple[list[dict], dict[str, np.ndarray]]:
    """Rows of the table, and one state under all draws (K,H,W,C) of each task."""
    rows, pictures = [], {}
    for logdir in args.logdir:
        config, checkpoint = load(logdir, args)
        options = dreamer.env_options(config)
        tasks, clean = find_tasks(config, options, args.task), paired.clean_task(config.task)
        env = envs.make(clean, **options)
        torch.manual_seed(config.seed)
        agent = dreamer.make_agent(config, env.observation_space, env.action_space)
        env.close()
        agents = {logdir: agent, f"{logdir} untrained": copy.deepcopy(agent)}
        with tools.reading(f"{logdir}/latest.pt does not fit config.json", "restore them from a copy"):
            dreamer.load_agent(agent, checkpoint["agent"])
        returns = {}
        if args.episodes:
            returns = {task: measure_return(agent, config, task, args.episodes) for task in (clean, *tasks)}
            rows.append({"run": logdir, "task": clean, "of_clean": 1.0} | returns[clean])
        for task in tasks:
            print(f"{logdir}: {task}", flush=True)
            obs, actions = paired.render(task, options, draws=args.draws, steps=args.steps)
            pictures.setdefault(task, obs["image"][:, 0, -1])
            for name, candidate in agents.items():
                metrics = models.measure_robustness(candidate.world_model, candidate.actor_critic, obs, actions)
                quantile = stats.t.ppf(0.975, args.draws - 1)
                errors = {key: metrics.pop(f"{key}_error") for key in models.ROBUSTNESS if f"{key}_error" in metrics}
                intervals = {f"{key}_ci": float(quantile * error) for key, error in errors.items()}
                rows.append({"run": name, "task": task} | metrics | intervals)
                if candidate is agent and returns:
                    rows[-1] |= returns[task] | {"of_clean": returns[task]["return"] / returns[clean]["return"]}
    return rows, pictures


def measure_return(agent: dreamer.Agent, config, task: str, episodes: int) -> dict[str, float]:
    """Mean return and half the width of its interval."""
    vec = dreamer.make_envs(config, "eval", task=task)
    try:
        metrics, _ = dreamer.evaluate(agent, vec, episodes)
    finally:
        vec.close()
    low, high = dreamer.interval(metrics)
    return {"return": metrics["return"], "return_ci": (high - low) / 2}


def run(args) -> None:
    paths = plot.check_out(Path(args.out))
    rows, pictures = measure(args)
    print(table(rows))
    with open(Path(args.out).with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *(f"{name}_ci" for name in MEASURES)])
        writer.writeheader()
        writer.writerows(rows)
    figure = draw(rows, pictures)
    for path in paths:
        figure.savefig(path, dpi=200)
    plot.plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logdir", nargs="+", help="folders of runs")
    parser.add_argument("--task", default="", help="task variants to measure on, separated by commas")
    parser.add_argument("--draws", type=int, default=4, help="draws of the distraction per state (4)")
    parser.add_argument("--steps", type=int, default=50, help="states in each of two episodes (50)")
    parser.add_argument("--episodes", type=int, default=8, help="evaluation episodes per task; 0 skips returns (8)")
    parser.add_argument("--resource_files", help="background files, if not those of the run")
    parser.add_argument("--ds_resource_path", help="folder that holds DAVIS, if not that of the run")
    parser.add_argument(
        "--out", default="robustness.png", help="picture, .png, .pdf or .svg (robustness.png); the CSV goes beside it"
    )
    args = parser.parse_args(argv)
    try:
        if min(args.draws, args.steps) < 2 or args.episodes < 0:
            raise tools.UserError("--draws and --steps take at least 2, --episodes at least 0")
        run(args)
    except (tools.UserError, envs.EnvError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    console.run(main)
