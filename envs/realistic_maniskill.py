"""Realistic ManiSkill (Zhu et al., RePo, NeurIPS 2023): `rms_{task}`, ManiSkill2 in scanned rooms.

Each episode stands in a room drawn from the .glb files of Matterport3D (or ReplicaCAD) that are found. The three cube
tasks start with the gripper around the cube; the others are ManiSkill2's own. The classes are in `maniskill_tasks.py`.
"""

import difflib
import functools
import glob
import warnings
from collections.abc import Callable
from pathlib import Path

import gymnasium
import numpy as np
from dm_control.utils.rewards import tolerance

from envs import assets
from envs.maniskill import CONTROL, ManiSkill, check_simulator
from envs.task import EnvError, Task, two_seeds

# What the wheel of mani_skill2 lacks, below the folder of the asset set "maniskill".
MODELS = {
    "push_cube": None,
    "lift_cube": None,
    "pick_cube": None,
    "turn_faucet": "partnet_mobility/dataset/5021",
    "assembling_kits": "assembling_kits",
    "peg_insertion_side": None,
    "plug_charger": None,
    "panda_avoid_obstacles": "avoid_obstacles/panda_train_2k.json.gz",
}
# Metres: where robot and cube stand in the cube tasks, and half the cube's edge.
BASE, CUBE, HALF_SIZE = (-0.615, 0.0, 0.05), (0.0, 0.0, 0.02), 0.02
GOALS = {"push_cube": (0.2, 0.2, 0.0), "lift_cube": (0.0, 0.0, 0.3), "pick_cube": (0.1, 0.0, 0.3)}
THRESHOLD = 0.025  # metres from the goal that count as there


def parse(rest: str) -> tuple[str, str, str]:
    """`rest` must be one of the eight tasks; there are no variants."""
    if rest not in MODELS:
        nearest = difflib.get_close_matches(rest, MODELS, n=1, cutoff=0)[0]
        raise EnvError(f"unknown task 'rms_{rest}', did you mean 'rms_{nearest}'? (there is {', '.join(MODELS)})")
    return rest, "", ""


def prepare(
    task: Task,
    *,
    size: tuple[int, int],
    action_repeat: int,
    seed: np.random.SeedSequence,
    start: int,
    task_seed: int | None,
    scene_files: str,
    **_,
) -> Callable[[], gymnasium.Env]:
    """Constructor of the environment, after every check. The other options of `envs.prepare` do not apply."""
    scenes = find_scenes(scene_files)
    models = MODELS[task.domain] and assets.find("maniskill", MODELS[task.domain])
    check_simulator()
    own_task_seed, scene_seed = two_seeds(seed, start)
    return functools.partial(
        ManiSkill,
        functools.partial(_build, task.domain, size, models),
        action_repeat=action_repeat,
        task_seed=own_task_seed if task_seed is None else task_seed,
        scene_seed=scene_seed,
        scenes=scenes,
    )


def find_scenes(pattern: str) -> list[str]:
    """Sorted .glb files that match `pattern` (a glob or a folder), else those of the asset set "matterport".

    Raises:
        EnvError: there are none.
    """
    given, kept = Path(pattern).expanduser(), assets.root() / "matterport"
    for path in (given, kept):
        if files := sorted(glob.glob(str(path / "*.glb" if path.is_dir() else path), recursive=True)):
            if any((folder / assets.GENERATED).exists() for folder in {Path(file).parent for file in files}):
                warnings.warn(f"{path} holds generated rooms: results compare with nothing", stacklevel=2)
            return files
    raise EnvError(
        f"no scene matches {given} and {kept} has none: name .glb files with --scene_files, or make rooms to try with "
        "python setup/download.py demo"
    )


def cube_reward(task: str, cube: np.ndarray, tcp: np.ndarray, fingers: float, grasped: bool) -> float:
    """Reward of the cube tasks; cube and tool centre (3,) and the distance between the fingers in metres.

    1 for reaching, 0.5 for closing the gripper around the cube, and for a grasped cube 5 for the way to the goal
    (push), its height (lift), or its height and then its place (pick). Numbers from the public code of RePo and HRSSM.
    """
    goal, start, base = np.array(GOALS[task]), np.array(CUBE), np.array(BASE)
    distance = np.linalg.norm(cube - tcp)
    reward = tolerance(distance, (0, HALF_SIZE), margin=np.linalg.norm(start - base), sigmoid="long_tail")
    if distance < HALF_SIZE:
        reward += 0.5 * tolerance(fingers, (0, 2 * HALF_SIZE), margin=HALF_SIZE, sigmoid="linear")
    if not grasped:
        return float(reward)

    def near(part: slice) -> float:
        margin = np.linalg.norm(goal[part] - start[part])
        return tolerance(np.linalg.norm(goal[part] - cube[part]), (0, THRESHOLD), margin=margin, sigmoid="linear")

    if task == "push_cube":
        return float(reward + 5 * near(slice(3)))
    reward += 5 * near(slice(2, 3))
    if task == "pick_cube" and abs(goal[2] - cube[2]) < THRESHOLD:
        reward += 5 * near(slice(2))
    return float(reward)


def _build(name: str, size: tuple[int, int], models: str | None):
    from envs import maniskill_tasks

    arguments = {
        "turn_faucet": {"asset_root": str(Path(models or "").parent), "model_ids": ["5021"]},
        "assembling_kits": {"asset_root": models},
        "panda_avoid_obstacles": {"episode_json": models},
    }
    return maniskill_tasks.CLASSES[name](
        obs_mode="none",
        reward_mode="dense",
        control_mode=CONTROL,
        camera_cfgs={"base_camera": {"height": size[0], "width": size[1]}},
        **arguments.get(name, {}),
    )
