"""What a trained world model expects to see: a probe decoder learns to draw from its frozen latents.

python figures/openloop.py ./log --out openloop.png

LOGDIR is a run with its checkpoint and replay. The probe learns from replay alone, on the latents that the online
networks infer from the pictures as they are; nothing of the world model changes. It draws the picture without
distraction if replay has it (runs with --video_pred_log), else the observed one. Then the agent plays an evaluation
episode: the model watches its first 10 frames and imagines the next 50 from the actions alone. The PNG has every fifth
frame, an MP4 beside it all; from the top: observed (if that is not the truth), truth, model, error (grey is none).
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import trange

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dreamer
import envs
import models
import tools
from figures import robustness


def load_replay(config, state: dict, folder: Path) -> tools.Replay:
    rows = sum(length for *_, length in state["episodes"])
    size = {"batch_size": config.batch_size, "batch_length": config.batch_length}
    replay = tools.Replay(capacity=rows, num_envs=config.envs, seed=config.seed, **size)
    replay.load(folder, state)
    return replay


def run(args) -> None:
    logdir, out = Path(args.logdir), Path(args.out)
    config, checkpoint = robustness.load(args.logdir, args)
    config.video_pred_log, config.envs = True, 1
    torch.manual_seed(config.seed)
    vec = dreamer.make_envs(config, "eval")
    try:
        agent = dreamer.make_agent(config, vec.observation_space, vec.action_space)
        if not args.untrained:
            dreamer.load_agent(agent, checkpoint["agent"])
        replay = load_replay(config, checkpoint["replay"], logdir / "replay")
        batches = (replay.sample() for _ in trange(args.updates, unit="update", disable=None))
        loss = models.fit_probe(agent.probe, agent.world_model, batches)
        seen = []
        dreamer.evaluate(agent, vec, 1, seen=seen)
    finally:
        vec.close()
    frames = dreamer.open_loop(agent, seen)
    tools.save_mp4(out.with_suffix(".mp4"), frames, 10)
    Image.fromarray(np.concatenate(frames[::5], 1)).save(out.with_suffix(".png"))
    print(f"{out.with_suffix('.png')}: squared error per picture {loss:.2f} after {args.updates} updates")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logdir", help="folder of a run")
    parser.add_argument("--updates", type=int, default=2000, help="updates of the probe (2000)")
    parser.add_argument("--untrained", action="store_true", help="fresh weights in place of those of the run")
    parser.add_argument("--resource_files", help="other background files than those of the run")
    parser.add_argument("--ds_resource_path", help="another folder of DAVIS than that of the run")
    parser.add_argument("--out", default="openloop.png", help="picture (openloop.png); the video lies beside it")
    args = parser.parse_args(argv)
    try:
        if args.updates < 1:
            raise tools.UserError(f"--updates takes at least 1, not {args.updates}")
        run(args)
    except (tools.UserError, envs.EnvError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
