"""Draw the variants of the tasks: one row per domain, one column per variant, the same simulator state along a row.

python figures/variants.py --resource_files 'DIR/*.mp4' --ds_resource_path DIR --out figures/variants.png
"""

import argparse
import sys
from pathlib import Path

from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import envs
from envs.distracting_cs import DOMAINS
from envs.dmc import VARIANTS

TASKS = ["walker_stand", "cheetah_run", "hopper_stand", "finger_spin", "reacher_easy", "cartpole_balance"]
TASKS += ["ball_in_cup_catch"]
EDGE, GAP, HEAD = 128, 4, 16  # pixels


def frame(task: str, **options) -> Image.Image:
    """The observation (64,64,3) after twenty random actions of the second episode, enlarged."""
    env = envs.make(task, seed=0, task_seed=0, **options)
    env.action_space.seed(0)
    env.reset()
    image = env.reset()[0]["image"]
    for _ in range(20):
        image = env.step(env.action_space.sample())[0]["image"]
    env.close()
    return Image.fromarray(image).resize((EDGE, EDGE), Image.NEAREST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resource_files", default="../distractors/*.mp4")
    parser.add_argument("--ds_resource_path", default="..")
    parser.add_argument("--distracting_cs_intensity", type=float, default=0.1)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--out", default="figures/variants.png")
    args = vars(parser.parse_args())
    tasks, out = args.pop("tasks"), args.pop("out")
    step = EDGE + GAP
    picture = Image.new("RGB", (step * (1 + len(VARIANTS)), HEAD + step * len(tasks)), "white")
    draw = ImageDraw.Draw(picture)
    for column, variant in enumerate(["", *VARIANTS]):
        draw.text((column * step + 4, 2), variant or "clean", "black")
        for row, task in enumerate(tasks):
            if variant.endswith("_cs") and not task.startswith(DOMAINS):
                continue  # not defined by the benchmark
            tile = frame("_".join(filter(None, ["dmc", task, variant])), **args)
            picture.paste(tile, (column * step, HEAD + row * step))
        print(variant or "clean", flush=True)
    picture.quantize(256).save(out, optimize=True)


if __name__ == "__main__":
    main()
