"""What a trained world model predicts: a probe decoder learns to reconstruct frames from its frozen latents.

python figures/openloop.py ./log --out openloop.png

LOGDIR is a run with its checkpoint and replay. The probe is trained on replay, on the latents that the online networks
infer from unmasked frames; the world model does not change. It reconstructs the frame without distraction if replay has
it (runs with --video_pred_log), else the observed one. The agent then plays an evaluation episode, of which the model
sees the first 10 frames and imagines the next 50 from the actions alone. The PNG shows every fifth frame, an MP4 beside
it all of them. Rows: observed (if it differs from the truth), truth, model, error (grey is zero).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from setup import console  # before what takes seconds to import

# isort: split
import argparse

import torch
from tqdm import trange

import dreamer
import envs
import models
import tools
from figures import grid, robustness


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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logdir", help="folder of a run")
    parser.add_argument("--updates", type=int, default=2000, help="updates of the probe (2000)")
    parser.add_argument("--untrained", action="store_true", help="use initial weights instead of those of the run")
    parser.add_argument("--resource_files", help="background files, if not those of the run")
    parser.add_argument("--ds_resource_path", help="folder that holds DAVIS, if not that of the run")
    parser.add_argument("--out", default="openloop.png", help="PNG to write (openloop.png); the video goes beside it")
    args = parser.parse_args(argv)
    try:
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
