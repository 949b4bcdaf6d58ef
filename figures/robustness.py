"""What does the latent know, and how much does a distraction change it? One state, rendered under many distractions.

python figures/robustness.py ./log --task dmc_walker_stand_video,dmc_walker_stand_color_hard --out robustness.png

LOGDIR is a control-suite run with a checkpoint; pass several to compare them. The numbers are also written as CSV
beside the picture, a row per run, task, clips and measure. Default of --task: the variants that the run was trained and
evaluated on; if there are none, all variants whose files are available. If background clips are held out
(--holdout_clips, --eval_resource_files, --distracting_cs_split of the run, or --eval_resource_files here), clips of
training (seen) and held-out ones (unseen) are measured apart.

The same actions are played from the same initial states, without distraction and under --draws distractions of a kind,
drawn with other seeds than those of training; the simulator states are checked to be equal. Actions are random, or
those of another agent (--player). The online networks filter each episode like the policy, but take the mode of each
latent instead of a sample, so that all differences come from the picture. With z_sk the latent of state s (class
probabilities or means, and the recurrent state) under draw k, and |.| the Euclidean norm:

- denoising factor = (other - same) / (other + same), where `same` is the mean of |z_sk - z_sk'| over draws k != k' and
  `other` the mean of |z_sk - z_s'k'| over states s != s' (Luo et al., 2025, arXiv 2506.00563): 1 if only the state
  matters, 0 if the draw matters as much as the state.
- ACPC = (mean over h = 1..8 of |P(z_h) - P(z~_h)|^2)^(1/2), where z_h is imagined h steps ahead from the clean history
  of a state and z~_h from a distracted one, along the same recorded actions; averaged over states and draws. P is the
  expected latent divided by its spread over states (root of the total variance of clean imaginations): the same for
  every method, and without a scale to shrink. 0 if the distraction has no effect; 1.41 between unrelated states. For an
  agent that was never trained on clean pictures these are one more distraction.
- invariance radius: 95% of these distances lie below it, relative to the mean distance between clean imaginations of
  different states. Below 1 a distracted imagination is nearer to its own state than another state is on average.
- probe R^2 of the physical state (all vectors of the suite, seen by the agent or not): ridge regression on z_sk, fitted
  on some of these episodes, scored on others. A latent that ignores the picture scores well above, but not here.
- reward R^2: of the reward head on these episodes, which are not in replay. Below 0: worse than the mean reward.
- action and value agreement = 1 - (variance over draws) / (variance over states and draws) of the policy's mode and the
  critic's value: 1 if the distraction has no effect, about 0 if it alone decides.
- return: mean of --episodes evaluation episodes.

Intervals are at 95%, by bootstrap over episodes, as the states of one episode depend on each other; each episode has
draws of its own. `untrained` is the same network with its initial weights, the effect of the architecture alone. The
clean task shows what probe and reward head can reach without distraction. A measure is undefined where what it relates
to does not vary: a constant latent ignores every distraction, but no distance between states is left to compare with.
Agreements and return are undefined before an actor is trained.
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

import dreamer
import envs
import models
import tools
from envs import paired
from envs.dmc import VARIANTS
from figures import plot

MEASURES = models.DIAGNOSTICS | {"return": "mean of evaluation episodes, with the policy's mode"}
COLUMNS = ("run", "task", "clips", "measure", "value", "low", "high", "n")


def load(logdir: str, args) -> tuple[SimpleNamespace, dict]:
    """Config and checkpoint of a run. Raises UserError."""
    config = tools.run_config(logdir)
    checkpoint = tools.load_checkpoint(Path(logdir) / "latest.pt")
    if checkpoint is None or "agent" not in checkpoint:
        raise tools.UserError(f"{logdir} holds no checkpoint of a run")
    config.video_pred_log = False
    for name in ("resource_files", "eval_resource_files", "ds_resource_path"):
        if getattr(args, name, None):
            setattr(config, name, getattr(args, name))
    return config, checkpoint


def find_tasks(config, requested: str) -> list[str]:
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
            envs.prepare(f"{clean}_{variant}", **dreamer.env_options(config))
            tasks.append(f"{clean}_{variant}")
        except envs.EnvError as error:
            tools.warn(f"{variant} skipped: {error}")
    if not tasks:
        raise tools.UserError(f"no variant of {clean} can be rendered here: python setup/download.py fetches files")
    return tasks


# --- measuring ------------------------------------------------------------------------------------------------------


def measure(args) -> tuple[list[dict], dict[str, np.ndarray]]:
    """Rows of the table, and one state under all draws (K,H,W,C) of each task and kind of clips."""
    rows: list[dict] = []
    pictures: dict[str, np.ndarray] = {}
    rendered: dict[tuple, paired.Paired] = {}  # several runs see the same pictures
    for logdir in args.logdir:
        config, checkpoint = load(logdir, args)
        torch.set_num_threads(config.threads or tools.default_threads(0))
        clean = paired.clean_task(config.task)
        config.eval_task = [clean, *find_tasks(config, args.task)]
        env = envs.make(clean, **dreamer.env_options(config))
        torch.manual_seed(config.seed)
        agent = dreamer.make_agent(config, env.observation_space, env.action_space)
        env.close()
        agents = {logdir: agent, f"{logdir} untrained": copy.deepcopy(agent)}
        with tools.reading(f"{logdir}/latest.pt does not fit config.json", "restore them from a copy"):
            dreamer.load_agent(agent, checkpoint["agent"])
        for task, clips in dreamer.evaluations(config).values():
            print(f"{logdir}: {task} {clips}".rstrip(), flush=True)
            options = dreamer.env_options(config) | {"unseen": clips == "unseen"}
            key = (task, *options.items())
            if key not in rendered:
                rendered[key] = render(task, options, args)
            episodes = rendered[key]
            if episodes.distracted is not None:
                pictures.setdefault(place(task, clips), episodes.distracted["image"][:, 0, -1])
            for run, candidate in agents.items():
                found = models.diagnose(candidate.world_model, candidate.actor_critic, *episodes)
                rows += rows_of(run, task, clips, found, len(episodes.actions))
            if args.episodes and int(agent.actor_critic.updates):
                found = {"return": measure_return(agent, config, dreamer.Evaluated(task, clips), args.episodes)}
                rows += rows_of(logdir, task, clips, found, args.episodes)
    return rows, pictures


def render(task: str, options: dict, args) -> paired.Paired:
    """The episodes to measure on."""
    size = {"episodes": args.trajectories, "steps": args.steps}
    if not args.player:
        return paired.render(task, options, draws=args.draws, **size)
    own = dreamer.env_options(tools.run_config(args.player))
    if own["action_repeat"] != options["action_repeat"]:
        repeats = f"{own['action_repeat']}, not {options['action_repeat']}"
        raise tools.UserError(f"--player {args.player} has --action_repeat {repeats}")
    player = dreamer.load(args.player, task=paired.clean_task(task), video_pred_log=False)

    def act(obs: paired.Obs, first: bool) -> np.ndarray:
        if first:
            player.reset()
        return player.act(obs)

    size["steps"] = min(args.steps, options["time_limit"], own["time_limit"])
    return paired.render(task, options, draws=args.draws, actions=paired.record(player.env, act, **size), **size)


def measure_return(agent: dreamer.Agent, config, evaluated: dreamer.Evaluated, episodes: int) -> models.Estimate:
    finished: list[tuple] = []
    vec = dreamer.make_eval_envs(config, evaluated)
    try:
        dreamer.evaluate(agent, vec, episodes, finished=finished)
    finally:
        vec.close()
    found = dreamer.summarise(np.array([score for score, *_ in finished[:episodes]]))
    return models.Estimate(found["mean"], *found["mean_interval"])


def rows_of(run: str, task: str, clips: str, found: dict[str, models.Estimate], n: int) -> list[dict]:
    where = {"run": run, "task": task, "clips": clips}
    return [where | {"measure": name, **estimate._asdict(), "n": n} for name, estimate in found.items()]


# --- table and picture ----------------------------------------------------------------------------------------------


def table(rows: list[dict]) -> str:
    """The rows by measure, each with what it means."""
    lines = []
    header = ("run", "task", "clips", "value", "95% interval", "n")
    for measure, meaning in MEASURES.items():
        cells = [header]
        for row in (row for row in rows if row["measure"] == measure):
            interval = "" if math.isnan(row["low"]) else f"{row['low']:.3f} to {row['high']:.3f}"
            value = "undefined" if math.isnan(row["value"]) else f"{row['value']:.3f}"
            cells.append((row["run"], row["task"], row["clips"] or "-", value, interval, str(row["n"])))
        if len(cells) > 1:
            widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
            lines += ["", f"{measure}: {meaning}"]
            lines += ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in cells]
    lines += ["", "n: episodes. Intervals: bootstrap over episodes."]
    if any(math.isnan(row["value"]) for row in rows):
        lines += [
            "undefined: what the measure relates to (the latent, the reward) does not vary, or no actor is trained."
        ]
    return "\n".join(lines[1:])


def draw(rows: list[dict], pictures: dict[str, np.ndarray]) -> plot.plt.Figure:
    """One state under all draws (K,H,W,C) of each task; below, bars by task, clips and run of what is defined."""
    defined = {row["measure"] for row in rows if not math.isnan(row["value"])}
    measures = [name for name in MEASURES if name in defined]
    trained = [run for run in dict.fromkeys(row["run"] for row in rows) if not run.endswith(" untrained")]
    per_row = min(len(pictures), 4)
    strips = math.ceil(len(pictures) / per_row)
    strip_height = min(9.0 / per_row / max(map(len, pictures.values())), 1.2) + 0.35
    columns = min(len(measures), 4)
    bars = math.ceil(len(measures) / columns) * 2.1 + 0.3 + 0.2 * len(trained)
    figure = plot.plt.figure(figsize=(9.0, strips * strip_height + bars), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[strips * strip_height, bars])
    axes = above.subplots(strips, per_row, squeeze=False).ravel()
    for axis in axes[len(pictures) :]:
        axis.remove()
    for axis, (name, images) in zip(axes, pictures.items(), strict=False):
        axis.imshow(np.concatenate(images, 1), interpolation="nearest")
        width = images.shape[2]
        axis.set_xticks([width * (k + 0.5) - 0.5 for k in range(len(images))], range(1, len(images) + 1), fontsize=8)
        axis.tick_params(length=0, pad=1)
        axis.set_yticks([])
        axis.set_title(f"{name}: one state, draws 1 to {len(images)}", fontsize=8)
    axes = below.subplots(math.ceil(len(measures) / columns), columns, squeeze=False).ravel()
    for axis in axes[len(measures) :]:
        axis.remove()
    for axis, name in zip(axes, measures, strict=False):
        draw_bars(axis, name, [row for row in rows if row["measure"] == name], trained)
    handles = {}
    for axis in below.axes:
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    below.legend(
        handles.values(), handles, loc="outside lower center", ncols=min(2 * len(trained), 4), frameon=False, fontsize=8
    )
    return figure


def draw_bars(axis, name: str, rows: list[dict], trained: list[str]) -> None:
    """One measure by place, a bar per run in its colour; the untrained network of a run is pale and hatched."""
    places = list(dict.fromkeys(place(row["task"], row["clips"]) for row in rows))
    runs = list(dict.fromkeys(row["run"] for row in rows))
    labels, width = short_names(trained), 0.8 / len(runs)
    for i, run in enumerate(runs):
        own = run.removesuffix(" untrained")
        values = {place(row["task"], row["clips"]): row for row in rows if row["run"] == run}
        shown = [values.get(key, {"value": np.nan, "low": np.nan, "high": np.nan}) for key in places]
        x = np.arange(len(places)) + (i - (len(runs) - 1) / 2) * width
        heights = np.array([row["value"] for row in shown])
        errors = np.abs([[row["value"] - row["low"], row["high"] - row["value"]] for row in shown]).T
        style = {"color": plot.COLORS[trained.index(own) % len(plot.COLORS)], "label": labels[own]}
        if run != own:
            style |= {"alpha": 0.45, "hatch": "////", "edgecolor": "white", "label": f"{labels[own]}, untrained"}
        axis.bar(x, heights, width, **style)
        axis.errorbar(x, heights, errors, fmt="none", ecolor="black", elinewidth=1, capsize=1.5)
        for at, key in zip(x, places, strict=True):
            if key in values and math.isnan(values[key]["value"]):
                axis.text(at, 0, " undefined", rotation=90, ha="center", va="bottom", fontsize=6, color="dimgray")
    turn = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if len(places) > 3 else {}
    axis.set_xlim(-0.5, len(places) - 0.5)
    axis.set_xticks(range(len(places)), [key.replace(" ", "\n") for key in places], fontsize=8, **turn)
    axis.tick_params(axis="y", labelsize=8)
    axis.set_title(title(name), fontsize=9)
    axis.axhline(0, color="black", lw=0.8)
    axis.grid(axis="y", alpha=0.25)
    axis.set_axisbelow(True)


def title(measure: str) -> str:
    return {"acpc": "ACPC (low is good)", "invariance_radius": "invariance radius (low is good)"}.get(
        measure, measure.replace("_", " ").replace("r2", "R²")
    )


def place(task: str, clips: str) -> str:
    variant = envs.parse_task(task).variant.replace("_", " ") or "clean"
    return f"{variant} {clips}".rstrip()


def short_names(runs: list[str]) -> dict[str, str]:
    """Folders of runs without the part of the path that all of them share; a single run keeps two folders."""
    paths = [Path(run).absolute() for run in runs]
    shared = os.path.commonpath([path.parent if len(runs) > 1 else path.parent.parent for path in paths])
    return {run: os.path.relpath(path, shared) for run, path in zip(runs, paths, strict=True)}


# --- the command ----------------------------------------------------------------------------------------------------


def run(args) -> None:
    paths = plot.check_out(Path(args.out))
    rows, pictures = measure(args)
    print(table(rows))
    with open(Path(args.out).with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
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
    parser.add_argument("--draws", type=int, default=3, help="draws of the distraction per state (3)")
    parser.add_argument("--trajectories", type=int, default=16, help="episodes played under every draw (16)")
    parser.add_argument("--steps", type=int, default=32, help="states in each of them (32)")
    parser.add_argument(
        "--player", help="folder of a run whose agent plays these, with clean pictures; default: random"
    )
    parser.add_argument("--episodes", type=int, default=8, help="evaluation episodes per task; 0 skips returns (8)")
    parser.add_argument("--resource_files", help="background files, if not those of the run")
    parser.add_argument("--eval_resource_files", help="background files that the run has not seen, to measure on apart")
    parser.add_argument("--ds_resource_path", help="folder that holds DAVIS, if not that of the run")
    parser.add_argument(
        "--out", default="robustness.png", help="picture, .png, .pdf or .svg (robustness.png); the CSV goes beside it"
    )
    args = parser.parse_args(argv)
    try:
        if min(args.draws, args.steps) < 2 or args.trajectories < 3 or args.episodes < 0:
            raise tools.UserError(
                "--draws and --steps take at least 2, --trajectories at least 3, --episodes at least 0"
            )
        run(args)
    except (tools.UserError, envs.EnvError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    console.run(main)
