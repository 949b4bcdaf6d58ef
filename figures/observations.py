"""What the agent observes: one row per task, with a clean frame and frames with video behind the robot.

python figures/observations.py --resource_files 'DIR/*.mp4' --out figures/observations.png
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from setup import console  # before what takes seconds to import

# isort: split
import argparse

import numpy as np

import envs
import tools
from figures import grid

TASKS = ["walker_stand", "cheetah_run", "hopper_stand", "finger_spin", "reacher_easy", "cartpole_balance"]
TASKS += ["ball_in_cup_catch", "pendulum_swingup"]
EVERY = 10  # agent steps from one frame to the next


def observe(task: str, count: int, **options) -> list[np.ndarray]:
    """`count` observations (64, 64, 3), `EVERY` random actions apart."""
    env = envs.make(task, seed=0, **options)
    env.action_space.seed(0)
    images = [env.reset()[0]["image"]]
    while len(images) < EVERY * count:
        images.append(env.step(env.action_space.sample())[0]["image"])
    env.close()
    return images[::EVERY]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resource_files", default="../distractors/*.mp4", help="background videos")
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="control-suite tasks without dmc_")
    parser.add_argument("--frames", type=int, default=8, help="columns; the first is without video")
    parser.add_argument("--out", default="figures/observations.png")
    args = parser.parse_args()
    try:
        tools.check_out(args.out)
        rows = []
        for task in args.tasks:
            clean = observe(f"dmc_{task}", 1)
            rows.append(clean + observe(f"dmc_{task}_video", args.frames - 1, resource_files=args.resource_files))
            print(task, flush=True)
        columns = ["clean", *(f"video, t = {EVERY * i}" for i in range(args.frames - 1))]
        picture = grid.draw(rows, [task.replace("_", " ") for task in args.tasks], columns)
        picture.quantize(256).save(args.out, optimize=True)
    except (tools.UserError, envs.EnvError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    console.run(main)
