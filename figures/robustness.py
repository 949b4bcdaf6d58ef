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
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import envs
import tools
from networks import stack_states

NUMBERS = ("denoising_factor", "action_agreement", "value_agreement")
COLUMNS = ("run", "task", *NUMBERS, "same", "other", "return", "of_clean")


def play(env, actions: np.ndarray, seed: int, distraction_seed: int) -> dict[str, np.ndarray]:
    """Observations (T+1,...) of an episode with `actions` (T,A)."""
    observations = [env.reset(seed=seed, options={"distraction_seed": distraction_seed})[0]]
    observations += [env.step(action)[0] for action in actions]
    return {key: np.stack([row[key] for row in observations]) for key in observations[0]}


def clean_task(task: str) -> str:
    """The task without its variant; UserError if it is not one of the control suite."""
    parsed = envs.parse_task(task)
    if parsed.suite != "dmc":
        raise tools.UserError(f"{task}: robustness is measured on tasks of the control suite, such as dmc_walker_stand")
    return "_".join(parsed[:3])


def render(
    task: str, options: dict, *, draws: int = 4, episodes: int = 2, steps: int = 50, seed: int = 0
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Observations (draws, episodes, steps, ...) and the actions that led to them (episodes, steps, A).

    `options` are those of `envs.prepare`. Raises RuntimeError if the simulators do not move alike.
    """
    steps = min(steps, options["time_limit"])
    env = envs.make(clean_task(task), seed=seed, **options)
    actions = np.random.default_rng(seed).uniform(-1.0, 1.0, (episodes, steps, *env.action_space.shape))
    actions = actions.astype(np.float32)
    clean = [play(env, actions[e, 1:], e, 0) for e in range(episodes)]
    env.close()
    seen = []
    for k in range(draws):
        # A stream beside those of training and evaluation.
        env = envs.make(task, seed=np.random.SeedSequence([seed, len(envs.STREAMS), k]), **options)
        seen.append([play(env, actions[e, 1:], e, k * episodes + e) for e in range(episodes)])
        env.close()
        for observed, expected in zip(seen[-1], clean, strict=True):
            envs.check_same_state(observed, expected)
    return {key: np.array([[row[key] for row in rows] for rows in seen]) for key in seen[0][0]}, actions


@torch.no_grad()
def encode(agent, obs: dict[str, np.ndarray], actions: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (K,S,F), actions (K,S,A) and values (K,S,1) for observations (K,E,T,...), S = E T states."""
    draws, episodes, steps = next(iter(obs.values())).shape[:3]
    model, rssm = agent.world_model, agent.world_model.dynamics
    rows = {key: value.reshape(-1, *value.shape[2:]) for key, value in obs.items()}
    first = np.broadcast_to(np.arange(steps) == 0, (draws * episodes, steps))
    data = model.preprocess({**rows, "action": np.tile(actions, (draws, 1, 1)), "is_first": first.copy()})
    embed, state, states = model.representation.encoder(data), rssm.initial((draws * episodes,)), []
    for t in range(steps):
        state = rssm.obs_step(state, data["action"][:, t], embed[:, t], data["is_first"][:, t], sample=False)
        states.append(state)
    state = stack_states(states, 1)
    dist = rssm.dist(state.logit)
    expected = dist.log_probs.exp() if rssm.classes else dist.mode
    latent = state._replace(stoch=expected).feat
    found = latent, agent.actor_critic.actor(state.feat).mode, agent.actor_critic.critic(state.feat).mode
    return tuple(x.reshape(draws, episodes * steps, -1).double() for x in found)


def denoising_factor(latent: Tensor) -> dict[str, float]:
    """Latents (K,S,F) of S states under K draws -> the factor and the two mean distances."""
    draws, states = latent.shape[:2]
    distance = torch.cdist(latent.flatten(0, 1), latent.flatten(0, 1)).reshape(draws, states, draws, states)
    alike = distance.diagonal(dim1=1, dim2=3)  # (K, K, S)
    same = alike.sum() / (states * draws * (draws - 1))
    other = (distance.sum() - alike.sum()) / (states * (states - 1) * draws * draws)
    factor = (other - same) / (other + same)
    return {"denoising_factor": factor.item(), "same": same.item(), "other": other.item()}


def agreement(x: Tensor) -> float:
    """Share of the variance of x (K,S,D) that is not between draws; NaN if x is constant."""
    return (1.0 - x.var(0).mean(0).sum() / x.flatten(0, 1).var(0).sum()).item()


def measure(agent, obs: dict[str, np.ndarray], actions: np.ndarray) -> dict[str, float]:
    """The numbers of an agent on what `render` returned. Draws no random numbers."""
    latent, action, value = encode(agent, obs, actions)
    agreements = {"action_agreement": agreement(action), "value_agreement": agreement(value)}
    return denoising_factor(latent) | agreements


# --- the command ----------------------------------------------------------------------------------------------------


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
                raise tools.UserError(f"--task {task}: give variants of {clean_task(config.task)}, such as ..._video")
        return list(dict.fromkeys(tasks))
    from envs.dmc import VARIANTS

    for variant in VARIANTS:
        try:
            envs.prepare(f"{clean_task(config.task)}_{variant}", **options)
            tasks.append(f"{clean_task(config.task)}_{variant}")
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

    names = [name for name in (*NUMBERS, "return") if any(name in row for row in rows)]
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
    import dreamer

    rows, pictures = [], {}
    for logdir in args.logdir:
        config, checkpoint = load(logdir, args)
        options = dreamer.env_options(config)
        tasks, clean = find_tasks(config, options, args.task), clean_task(config.task)
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
            obs, actions = render(task, options, draws=args.draws, steps=args.steps)
            pictures.setdefault(task, obs["image"][:, 0, -1])
            for name, found in agents.items():
                rows.append({"run": name, "task": task} | measure(found, obs, actions))
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
