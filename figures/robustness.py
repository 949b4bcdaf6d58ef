"""Does the latent ignore the distraction? The same states of the simulator, seen through many distractions.

python figures/robustness.py ./log --task dmc_walker_stand_video,dmc_walker_stand_color_hard --out robustness.png

LOGDIR is a run of the control suite with a checkpoint; several are compared. Beside the PNG goes a CSV with the table.
Without --task: the variants the run was trained and evaluated on, or all whose files are there if it has none.

One episode after the other, the same random actions are played from the same starts without distraction and under
--draws distractions of a kind, drawn with other seeds than those of training; that the simulators move alike is
checked. The online networks filter each sequence as the policy does, but with the mode of each latent instead of a
sample, so that all differences come from the picture. With z_sk the latent of state s (class probabilities, or
means, and the recurrent state) under draw k, and |.| the Euclidean distance:

- denoising factor = (other - same) / (other + same), where `same` is the mean of |z_sk - z_sk'| over draws k != k' and
  `other` the mean of |z_sk - z_s'k'| over states s != s' (Luo et al., 2025, arXiv 2506.00563): 1 if only the state
  matters, 0 if the distraction matters as much as which state it is.
- action and value agreement = 1 - (variance over draws) / (variance over states and draws) of the policy's mode and of
  the critic's value: 1 if the distraction changes nothing, about 0 if it decides alone.
- return: mean of --episodes evaluation episodes, beside that of the clean task.

`untrained` is the same network with fresh weights: what the architecture does by itself.
"""

import argparse
import copy
import csv
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dreamer
import envs
import models
import tools
from envs import paired

COLUMNS = ("run", "task", *models.ROBUSTNESS, "same", "other", "return", "of_clean")


def load(logdir: str, args) -> tuple[SimpleNamespace, dict]:
    """Config and checkpoint of a run."""
    saved = tools.read_config(Path(logdir))
    checkpoint = tools.load_checkpoint(Path(logdir) / "latest.pt")
    if saved is None or checkpoint is None:
        raise tools.UserError(f"{logdir} holds no run with a checkpoint")
    # Options that are younger than the run have their defaults.
    flat = tools.flatten(vars(tools.load_config([]))) | tools.flatten(saved["config"])
    config = SimpleNamespace(**tools.unflatten(flat))
    config.video_pred_log = False
    for name in ("resource_files", "ds_resource_path"):
        if getattr(args, name):
            setattr(config, name, getattr(args, name))
    return config, checkpoint


def find_tasks(config, options: dict, asked: str) -> list[str]:
    """What to measure on: as asked, or the variants of the run, or all that can be shown."""
    tasks = asked.split(",") if asked else [t for t in [config.task, *config.eval_task] if envs.parse_task(t).variant]
    if tasks:
        for task in tasks:
            if envs.parse_task(task)[:3] != envs.parse_task(config.task)[:3] or not envs.parse_task(task).variant:
                raise tools.UserError(
                    f"--task {task}: give variants of {paired.clean_task(config.task)}, such as ..._video"
                )
        return list(dict.fromkeys(tasks))
    from envs.dmc import VARIANTS

    for variant in VARIANTS:
        try:
            envs.prepare(f"{paired.clean_task(config.task)}_{variant}", **options)
            tasks.append(f"{paired.clean_task(config.task)}_{variant}")
        except envs.EnvError as error:
            tools.warn(f"{variant} left out: {error}")
    return tasks


def table(rows: list[dict]) -> str:
    def text(value) -> str:
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    cells = [COLUMNS, *([text(row.get(name, "-")) for name in COLUMNS] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def draw(rows: list[dict], pictures: dict[str, np.ndarray], path: Path) -> None:
    """Bars of every number by task and run; above them one state under all draws (K,H,W,C) of each task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [name for name in (*models.ROBUSTNESS, "return") if any(name in row for row in rows)]
    runs = list(dict.fromkeys(row["run"] for row in rows))
    figure = plt.figure(figsize=(14, 2.2 + 1.1 * len(pictures) + 0.25 * len(runs)), layout="constrained")
    above, below, foot = figure.subfigures(3, 1, height_ratios=[1.1 * len(pictures), 2.2, 0.25 * len(runs)])
    for axis, (task, frames) in zip(
        above.subplots(len(pictures), 1, squeeze=False)[:, 0], pictures.items(), strict=True
    ):
        axis.imshow(np.concatenate(frames, 1), interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_title(f"one state, {task}", fontsize=9)
    for axis, name in zip(below.subplots(1, len(names)), names, strict=True):
        tasks = list(dict.fromkeys(row["task"] for row in rows if name in row))
        for i, run in enumerate(runs):
            found = {row["task"]: row.get(name, np.nan) for row in rows if row["run"] == run}
            x = np.arange(len(tasks)) + (i - (len(runs) - 1) / 2) * 0.8 / len(runs)
            color = "0.6" if run.endswith("untrained") else f"C{i}"
            axis.bar(x, [found.get(task, np.nan) for task in tasks], 0.8 / len(runs), label=run, color=color)
        axis.set_xticks(range(len(tasks)), [envs.parse_task(task).variant or "clean" for task in tasks])
        axis.set_title(name.replace("_", " "))
        axis.axhline(0, color="black", lw=0.8)
        axis.grid(axis="y", alpha=0.25)
    handles, labels = axis.get_legend_handles_labels()
    foot.legend(handles, labels, loc="center", frameon=False, fontsize=9)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def run(args) -> None:
    rows, pictures = [], {}
    for logdir in args.logdir:
        config, checkpoint = load(logdir, args)
        options = dreamer.env_options(config)
        tasks, clean = find_tasks(config, options, args.task), paired.clean_task(config.task)
        space = envs.make(clean, **options)
        torch.manual_seed(config.seed)
        agent = dreamer.make_agent(config, space.observation_space, space.action_space)
        space.close()
        agents = {logdir: agent, f"{logdir} untrained": copy.deepcopy(agent)}
        dreamer.load_agent(agent, checkpoint["agent"])
        returns = {}
        for task in [clean] * (args.episodes > 0) + tasks:
            if args.episodes:
                vec = dreamer.make_envs(config, "eval", task=task)
                returns[task] = dreamer.evaluate(agent, vec, args.episodes)[0]["return"]
                vec.close()
            if task == clean:
                rows.append({"run": logdir, "task": task, "return": returns[task], "of_clean": 1.0})
                continue
            obs, actions = paired.render(task, options, draws=args.draws, steps=args.steps)
            pictures.setdefault(task, obs["image"][:, 0, -1])
            for name, found in agents.items():
                measured = models.measure_robustness(found.world_model, found.actor_critic, obs, actions)
                rows.append({"run": name, "task": task} | measured)
                if args.episodes and found is agent:
                    rows[-1] |= {"return": returns[task], "of_clean": returns[task] / returns[clean]}
    print(table(rows))
    with open(Path(args.out).with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, pictures, Path(args.out).with_suffix(".png"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logdir", nargs="+", help="folders of runs")
    parser.add_argument("--task", default="", help="variants to measure on, separated by commas")
    parser.add_argument("--draws", type=int, default=4, help="distractions per state (4)")
    parser.add_argument("--steps", type=int, default=50, help="states of each of two episodes (50)")
    parser.add_argument("--episodes", type=int, default=8, help="evaluation episodes per task, 0 for no returns (8)")
    parser.add_argument("--resource_files", help="other background files than those of the run")
    parser.add_argument("--ds_resource_path", help="another folder of DAVIS than that of the run")
    parser.add_argument("--out", default="robustness.png", help="picture (robustness.png); the CSV lies beside it")
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
    sys.exit(main())
