"""What a trained world model predicts: a probe decoder learns to reconstruct frames from its frozen latents.

python figures/openloop.py ./log --out openloop.png

LOGDIR is a run with its checkpoint and replay. The probe is trained on replay, on the latents that the online networks
infer from unmasked frames; the world model does not change. It reconstructs the frame without distraction if replay has
it (runs with --video_pred_log), else the observed one. The agent then plays an evaluation episode, of which the model
sees the first 10 frames and imagines the next 50 from the actions alone. The PNG shows every fifth frame, an MP4 beside
it all of them. Rows: observed (if it differs from the truth), truth, model, error (grey is zero).

python figures/openloop.py --data demos --runs log/external log/frozen --out regimes.png

compares runs that draw pictures (--method dreamer, --autoencoder, --video_pred_log) on the logged episodes of a folder:
of the one they were trained on those that they held out, of another one all. The models see 10 rows of a window and
imagine the next 90. The picture shows the truth and a row for each run, every tenth frame, and errors by horizon beside
those of the last picture seen and of the mean training picture. Runs that differ in nothing but their seed are one
line. Intervals are at 95%, by bootstrap: runs and episodes are drawn anew, the same episodes for every run. With a few
seeds they are too narrow to rely on. All points are in a CSV beside it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from setup import console  # before what takes seconds to import

# isort: split
import argparse
import copy
import os
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from tqdm import trange

import dreamer
import envs
import exploration
import models
import tools
from figures import grid, plot, robustness

BASELINES = {"copy": "last picture seen", "mean": "mean picture"}
# Options that a resumed run may change and that still make another run of it.
ALSO = ("steps", "offline_traindir", "offline_evaldir", "dataset_size", "init_from")
PANELS = {"mse": "squared error of pixels", "ssim": "structural similarity"}


def load_replay(config, state: dict, folder: Path) -> tools.Replay:
    rows = sum(length for *_, length in state["episodes"])
    size = {"batch_size": config.batch_size, "batch_length": config.batch_length}
    replay = tools.Replay(capacity=rows, num_envs=config.envs, seed=config.seed, **size)
    replay.load(folder, state)
    return replay


def run(args) -> None:
    logdir, out = Path(args.logdir), Path(args.out).with_suffix(".png")
    config, checkpoint = robustness.load(args.logdir, args)
    config.video_pred_log, config.envs = True, 1
    torch.manual_seed(config.seed)
    vec = dreamer.make_envs(config, "eval")
    try:
        agent = dreamer.make_agent(config, vec.observation_space, vec.action_space)
        if not args.untrained:
            with tools.reading(f"{logdir}/latest.pt does not fit config.json", "restore them from a copy"):
                dreamer.load_agent(agent, checkpoint["agent"])
        with tools.reading(f"{logdir}/latest.pt does not fit replay", "restore them from a copy"):
            replay = load_replay(config, checkpoint["replay"], logdir / "replay")
        batches = (replay.sample() for _ in trange(args.updates, unit="update", disable=None))
        loss = models.fit_probe(agent.probe, agent.world_model, batches)
        seen = []
        dreamer.evaluate(agent, vec, 1, rows=seen)
    finally:
        vec.close()
    frames = dreamer.open_loop(agent, seen)
    tools.save_mp4(out.with_suffix(".mp4"), frames, 10)
    grid.open_loop(frames[:: grid.EVERY], config.size[0]).save(out)
    print(f"{out}: squared error per frame {loss:.2f} after {args.updates} updates of the probe")


class Compared(NamedTuple):
    """What a run made of the held-out episodes: `models.measure_windows`, and one window from the truth and from it."""

    logdir: str
    config: SimpleNamespace
    found: dict[str, np.ndarray]
    truth: np.ndarray  # (T,H,W,3) uint8
    frames: np.ndarray


def compare(logdir: str, data: Path, rule: str) -> Compared:
    """Load a run and measure it on the episodes of `data`. Raises UserError."""
    asked, folder = tools.run_config(logdir), Path(logdir)
    config = copy.copy(asked)
    checkpoint = tools.load_checkpoint(folder / "latest.pt")
    if checkpoint is None or "agent" not in checkpoint:
        raise tools.UserError(f"{logdir} holds no checkpoint of a run")
    config.offline_traindir = config.offline_traindir or str(folder / "replay")
    same = data.resolve() == Path(config.offline_traindir).expanduser().resolve()
    if same and "logged" not in checkpoint:
        raise tools.UserError(f"{logdir} learned from all of {data}: name other episodes, or a run that held some out")
    config.offline_evaldir = config.offline_evaldir if same else str(data)
    logged = exploration.load_logged(config)
    if same:  # else the episodes held out now may be others
        exploration.check_unchanged(checkpoint["logged"], logged.files)
    agent = dreamer.make_agent(config, logged.spaces, logged.act_space)
    with tools.reading(f"{folder}/latest.pt does not fit config.json", "restore them from a copy"):
        agent.load_state_dict(checkpoint["agent"])
    if agent.painter[0] is None:
        raise tools.UserError(f"{logdir} draws no pictures: train it with --autoencoder or --video_pred_log")
    found = dreamer.measure_held_out(agent, logged, rule=rule)
    video, height = dreamer.open_loop_logged(agent, logged), config.size[0]
    parts = [np.repeat(video[:, i : i + height], 3 // video.shape[-1], -1) for i in range(0, video.shape[1], height)]
    return Compared(logdir, asked, found, parts[-3], parts[-2])


def group(runs: list[Compared]) -> dict[str, list[Compared]]:
    """Runs that differ in their seed alone, by what their folders share, or by the first of them."""
    groups: dict[tuple, list[Compared]] = {}
    for run in runs:
        options = vars(run.config)
        key = tools.config_hash(SimpleNamespace(**options | {"seed": 0})), *(options[name] for name in ALSO)
        groups.setdefault(key, []).append(run)
    paths = [os.path.commonpath([Path(run.logdir).absolute() for run in found]) for found in groups.values()]
    if len({*paths}) < len(paths):
        paths = [str(Path(found[0].logdir).absolute()) for found in groups.values()]
    names = robustness.short_names(paths) if len(paths) > 1 else {paths[0]: Path(paths[0]).name}
    return {names[path]: found for path, found in zip(paths, groups.values(), strict=True)}


def curve(runs: list[Compared], key: str) -> np.ndarray:
    """(3, horizons): mean over episodes and seeds with its 95% interval."""
    length = min(int(np.isfinite(run.found["kl"]).any(0).sum()) for run in runs)
    episodes = max(int(run.found["episode"].max()) for run in runs) + 1
    # Sums over windows and their numbers, by run, episode and horizon.
    totals, counts = np.zeros((2, len(runs), episodes, length))
    for at, run in enumerate(runs):
        values = run.found[key][:, :length]
        np.add.at(totals[at], run.found["episode"], np.nan_to_num(values))
        np.add.at(counts[at], run.found["episode"], np.isfinite(values))
    # (runs, episodes, horizons)
    means, known = totals / np.maximum(counts, 1), (counts > 0).astype(float)
    rng = np.random.default_rng(0)
    # How often each is drawn: all once first, for the mean.
    run_times, episode_times = (
        np.concatenate([np.ones((1, n)), rng.multinomial(n, np.full(n, 1 / n), plot.RESAMPLINGS)])
        for n in (len(runs), episodes)
    )
    drawn = "br,be,reh->bh", run_times, episode_times
    with np.errstate(invalid="ignore"):  # where no episode drawn is so long
        x = np.einsum(*drawn, means, optimize=True) / np.einsum(*drawn, known, optimize=True)
    return np.stack([x[0], *np.nanpercentile(x[1:], [2.5, 97.5], axis=0)])


def strip(runs: list[Compared]) -> np.ndarray:
    """The truth, and the row of each run, from every tenth frame; runs that held out other episodes have their own."""
    rows, labels, shown = [], [], None
    for name, found in group(runs).items():
        run = found[0]
        if shown is None or not np.array_equal(shown, run.truth):
            shown = run.truth
            rows, labels = [*rows, shown], [*labels, "truth"]
        rows, labels = [*rows, run.frames], [*labels, name]
    every = models.CONTEXT
    times = range(0, max(map(len, rows)), every)
    tiles = [[row[t] if t < len(row) else None for t in times] for row in rows]
    titles = [f"{'seen' if t < models.CONTEXT else 'imagined'} t={t}" for t in times]
    return np.asarray(grid.draw(tiles, labels, titles, rule=1))


def draw_comparison(runs: list[Compared], curves: dict[tuple[str, str], np.ndarray]) -> plot.plt.Figure:
    picture = strip(runs)
    height = 11.0 * picture.shape[0] / picture.shape[1]
    figure = plot.plt.figure(figsize=(11.0, height + 3.4), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[height, 3.4])  # type: ignore[misc]
    axis = above.add_subplot()
    axis.imshow(picture)
    axis.axis("off")
    axes = dict(zip(PANELS, below.subplots(1, len(PANELS)), strict=True))
    for name, axis in axes.items():
        lines = {label: values for (label, metric), values in curves.items() if metric == name}
        for i, (label, (mean, low, high)) in enumerate(lines.items()):
            baseline = label in BASELINES.values()
            color = ("grey", "black")[label == BASELINES["mean"]] if baseline else plot.COLORS[i % len(plot.COLORS)]
            steps = np.arange(1, len(mean) + 1)
            axis.plot(steps, mean, color=color, ls=":" if baseline else "-", lw=1.5, label=label)
            if not baseline:
                axis.fill_between(steps, low, high, color=color, alpha=0.2, lw=0)
        axis.set_xlabel("steps imagined")
        axis.set_title(PANELS[name], fontsize=10)
        axis.grid(alpha=0.25)
    axes["mse"].set_ylim(bottom=0)
    handles, labels = axes["mse"].get_legend_handles_labels()
    columns = max(1, min(5, 110 // max(map(len, labels))))  # as many as fit beside each other
    below.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    return figure


def run_comparison(args) -> None:
    out = Path(args.out)
    runs = [compare(logdir, Path(args.data).expanduser(), args.object) for logdir in args.runs]
    curves = {}
    for label, found in group(runs).items():
        for name in PANELS:
            curves[label, name] = curve(found, f"open_{name}")
        curves[label, "shuffled actions"] = curve(found, "shuffled_mse")
        parts = {
            "moving pixels": "moving_mse",
            "object": "object_mse",
            "rest": "rest_mse",
            "presence": "object_presence",
            "presence, closed loop": "closed_object_presence",
        }
        curves |= {(label, part): curve(found, key) for part, key in parts.items() if key in found[0].found}
    for key, label in BASELINES.items():
        names = {"mse": f"{key}_mse", "moving pixels": f"{key}_moving_mse", "object": f"{key}_object_mse"}
        for metric, name in names.items():
            if name in runs[0].found:
                curves[label, metric] = curve(runs, name)
    header = ["run", "metric", "horizon", "mean", "low", "high"]
    rows = [
        (*key, h + 1, *(f"{x:.6g}" for x in values[:, h]))
        for key, values in curves.items()
        for h in range(values.shape[1])
    ]
    plot.write_csv(out.with_suffix(".csv"), header, rows)
    shown = [h for h in models.HORIZONS if h <= min(values.shape[1] for values in curves.values())]
    width = max(len(label) for label, _ in curves)
    for metric in ("mse", "object"):
        if any(metric == other for _, other in curves):
            print(f"{metric + ', steps imagined':{max(width, 24)}}", *(f"{h:>22}" for h in shown))
        for label in (label for label, other in curves if other == metric):
            cells = ("{:.4f} ({:.4f}-{:.4f})".format(*curves[label, metric][:, h - 1]) for h in shown)
            print(f"{label:{max(width, 24)}}", *(f"{cell:>22}" for cell in cells))
    figure = draw_comparison(runs, curves)
    for path in plot.check_out(out):
        figure.savefig(path, dpi=150)
    plot.plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logdir", nargs="?", help="folder of a run")
    parser.add_argument("--data", help="folder of logged episodes to compare --runs on")
    parser.add_argument("--runs", nargs="+", help="folders of runs")
    parser.add_argument("--updates", type=int, default=2000, help="updates of the probe (2000)")
    parser.add_argument("--object", default="", help="with --data: what --offline_object measures apart")
    parser.add_argument("--untrained", action="store_true", help="use initial weights instead of those of the run")
    parser.add_argument("--resource_files", help="background files, if not those of the run")
    parser.add_argument("--ds_resource_path", help="folder that holds DAVIS, if not that of the run")
    parser.add_argument("--out", default="openloop.png", help="PNG to write (openloop.png); the video goes beside it")
    args = parser.parse_args(argv)
    try:
        if bool(args.data) != bool(args.runs) or bool(args.data) == bool(args.logdir):
            raise tools.UserError("name a LOGDIR, or --data with --runs")
        if args.data:
            plot.check_out(Path(args.out))
            run_comparison(args)
            return 0
        if args.updates < 1:
            raise tools.UserError(f"--updates takes at least 1, not {args.updates}")
        if Path(args.out).suffix not in ("", ".png"):
            raise tools.UserError(f"--out {args.out}: the suffix must be .png")
        tools.check_out(Path(args.out).with_suffix(".png"))
        run(args)
    except (tools.UserError, envs.EnvError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    console.run(main)
