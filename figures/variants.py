"""The variants of the tasks: one row per task, one column per variant, the same simulator state along a row.

python figures/variants.py --resource_files 'DIR/*.mp4' --ds_resource_path DIR --out figures/variants.png
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
from envs.distracting_cs import DOMAINS
from envs.dmc import VARIANTS
from figures import grid

TASKS = ["walker_stand", "cheetah_run", "hopper_stand", "finger_spin", "reacher_easy", "cartpole_balance"]
TASKS += ["ball_in_cup_catch"]


def observe(task: str, **options) -> np.ndarray:
    """The observation (64, 64, 3) after twenty random actions of the second episode."""
    env = envs.make(task, seed=0, task_seed=0, **options)
    env.action_space.seed(0)
    env.reset()
    image = env.reset()[0]["image"]
    for _ in range(20):
        image = env.step(env.action_space.sample())[0]["image"]
    env.close()
    return image


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resource_files", default="../distractors/*.mp4", help="background videos of `video`")
    parser.add_argument("--ds_resource_path", default="..", help="folder that holds DAVIS")
    parser.add_argument("--distracting_cs_intensity", type=float, default=0.1)
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="control-suite tasks without dmc_")
    parser.add_argument("--out", default="figures/variants.png")
    options = vars(parser.parse_args())
    tasks, out = options.pop("tasks"), options.pop("out")
    try:
        tools.check_out(out)
        rows = []
        for task in tasks:
            # The benchmark defines distracting_cs and sensor_cs for some domains only.
            variants = [v for v in VARIANTS if not v.endswith("_cs") or task.startswith(DOMAINS)]
            frames = {variant: observe(f"dmc_{task}_{variant}", **options) for variant in variants}
            rows.append([observe(f"dmc_{task}", **options), *(frames.get(variant) for variant in VARIANTS)])
            print(task, flush=True)
        columns = ["clean", *VARIANTS]
        picture = grid.draw(rows, [task.replace("_", " ") for task in tasks], columns)
        picture.quantize(256).save(out, optimize=True)
    except (tools.UserError, envs.EnvError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    console.run(main)
