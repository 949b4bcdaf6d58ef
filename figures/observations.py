"""Draw what the agent sees: one row per task, a clean frame and frames with video behind the robot.

python figures/observations.py --resource_files 'DIR/*.mp4' --out figures/observations.png
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import envs

TASKS = ["walker_stand", "cheetah_run", "hopper_stand", "finger_spin", "reacher_easy", "cartpole_balance"]
TASKS += ["ball_in_cup_catch", "pendulum_swingup"]


def frames(task: str, count: int, **options) -> list[np.ndarray]:
    """`count` observations (64,64,3), ten random actions apart."""
    env = envs.make(task, seed=0, **options)
    env.action_space.seed(0)
    images = [env.reset()[0]["image"]]
    while len(images) < 10 * count:
        images.append(env.step(env.action_space.sample())[0]["image"])
    env.close()
    return images[::10]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resource_files", default="../distractors/*.mp4")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--frames", type=int, default=8, help="columns; the first is without video")
    parser.add_argument("--out", default="figures/observations.png")
    args = parser.parse_args()
    rows = []
    for task in args.tasks:
        clean = frames(f"dmc_{task}", 1)
        video = frames(f"dmc_{task}_video", args.frames - 1, resource_files=args.resource_files)
        rows.append(np.concatenate(clean + video, 1))
        print(task, flush=True)
    picture = Image.fromarray(np.concatenate(rows, 0))
    picture.resize((2 * picture.width, 2 * picture.height), Image.NEAREST).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
