"""Realistic ManiSkill (Zhu et al., RePo, NeurIPS 2023): `rms_{task}`, ManiSkill2 in scanned rooms.

Each episode takes place in a room drawn from the available .glb files of Matterport3D (or ReplicaCAD). The three cube
tasks start with the gripper around the cube; the others are ManiSkill2's own. Their classes are in
`maniskill_tasks.py`, imported when an environment is built.
"""

import difflib
import functools
import glob
import warnings
from collections.abc import Callable
from pathlib import Path

import gymnasium
import numpy as np

from envs import assets
from envs.maniskill import CONTROL, ManiSkill, check_simulator, renderer_options
from envs.task import EnvError, Task, two_seeds

# Model files that the mani_skill2 wheel lacks, relative to the folder of the asset set "maniskill".
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


def parse(rest: str) -> tuple[str, str, str]:
    """`rest` is one of the eight tasks; there are no variants."""
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
    """Constructor of the environment, after all checks. The other options of `envs.prepare` do not apply."""
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
    """Sorted .glb files that match `pattern` (a glob or a folder), or those of the asset set "matterport".

    Raises:
        EnvError: no files.
    """
    given, kept = Path(pattern).expanduser(), assets.root() / "matterport"
    for path in (given, kept):
        if files := sorted(glob.glob(str(path / "*.glb" if path.is_dir() else path), recursive=True)):
            if any((folder / assets.GENERATED).exists() for folder in {Path(file).parent for file in files}):
                warnings.warn(f"{path} holds generated rooms: results on them are not comparable", stacklevel=2)
            return files
    raise EnvError(
        f"no scene matches {given} and {kept} has none: name .glb files with --scene_files, or make rooms to try with "
        "python setup/download.py demo"
    )


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
        renderer_kwargs=renderer_options(),
        **arguments.get(name, {}),
    )
