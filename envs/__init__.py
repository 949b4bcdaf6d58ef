"""Environments by name: `make("dmc_walker_stand")` for one, `make_vector` for several in worker processes.

A suite is a module with two functions, imported on first use:

    parse(rest: str) -> (domain, name, variant)    # `rest` is the task string after the suite; raises EnvError
    prepare(task: Task, *, size, action_repeat, seed, start, task_seed, **options)  # the options of `prepare` below
        -> Callable[[], gymnasium.Env]             # checks everything first; the result can be pickled

The environment is a standard `gymnasium.Env` with a Dict observation space (key `image`: uint8 (H, W, 3)). To add a
suite, write such a module and list it in `SUITES`. Nothing in this package imports torch, which would cost every worker
process seconds and hundreds of MB.
"""

import functools
import importlib
import os
from collections.abc import Callable

import gymnasium
import numpy as np
from gymnasium.wrappers import TimeLimit

from envs.task import EnvError, Task
from envs.vector import Vector

__all__ = ["EnvError", "Task", "Vector", "check_same_state", "clip_names", "has_unseen", "make", "make_vector"]
__all__ += ["parse_task", "prepare", "render_on"]

SUITES = {
    "dmc": "envs.dmc",
    "gym": "envs.gymnasium_tasks",
    "ms": "envs.maniskill",
    "rms": "envs.realistic_maniskill",
}
STREAMS = ("train", "eval", "paired", "final", "record")  # of random numbers; "paired" is that of `envs.paired`


def parse_task(task: str) -> Task:
    """Split `{suite}_{domain}_{name}[_{variant}]`. Raises EnvError that lists the alternatives to an unknown part."""
    suite, _, rest = task.partition("_")
    if suite not in SUITES:
        raise EnvError(f"unknown suite {suite!r} in task {task!r}: there is {', '.join(SUITES)} (dmc_walker_stand)")
    return Task(suite, *_suite(suite).parse(rest))


def render_on(gpu: int) -> None:
    """Let simulators that start later render on CUDA device `gpu`.

    The user's HRSSM_RENDER_DEVICE comes first, and for MuJoCo so does MUJOCO_EGL_DEVICE_ID. Where that card cannot
    render, another does, with a warning.
    """
    os.environ.setdefault("HRSSM_RENDER_DEVICE", str(gpu))


def prepare(
    task: str,
    *,
    size: tuple[int, int] = (64, 64),
    action_repeat: int = 2,
    time_limit: int = 500,
    seed: int | np.random.SeedSequence = 0,
    start: int = 0,
    task_seed: int | None = None,
    resource_files: str = "../distractors/*.mp4",
    img_source: str = "video",
    total_frames: int = 1000,
    ds_resource_path: str = "..",
    distracting_cs_intensity: float = 0.1,
    distracting_cs_dynamic: bool = True,
    scene_files: str = "../Matterport/data/matterport3d/*.glb",
    holdout_clips: float = 0.0,
    eval_resource_files: str = "",
    distracting_cs_split: bool = False,
    shadow_size: int = 2048,
    unseen: bool = False,
    clean_image: bool = False,
    camera: int | None = None,
) -> Callable[[], gymnasium.Env]:
    """Check the task and its files, decode the videos it needs, and return a constructor that can be pickled.

    Args:
        size: height and width of `image` in pixels.
        action_repeat: environment steps per agent step.
        time_limit: agent steps after which an episode is truncated.
        seed: source of every random choice of this environment.
        start: mixed into the seed, except for the choice of clips. A resumed run passes its step, so that it continues
            with new episodes and the same background clips.
        task_seed: seed of the simulator alone, instead of one derived from `seed` and `start`.
        resource_files: glob or folder of the background files (`~` is expanded).
        img_source: what replaces the background of a `_video` task: video, images, color or noise.
        total_frames: length of the background sequence in frames; 0 means every frame of every file once.
        ds_resource_path: folder that holds `DAVIS`, for `distracting_cs`.
        distracting_cs_intensity: difficulty of `distracting_cs` and `sensor_cs`.
        distracting_cs_dynamic: whether these distractions move within an episode.
        scene_files: glob or folder of the rooms (.glb) of an `rms` task.
        holdout_clips: share of the clips of `_video`, `_video_easy` and `_video_hard` tasks that only evaluation shows.
        eval_resource_files: glob or folder of the clips of a `_video` task that only evaluation shows, instead.
        distracting_cs_split: evaluation of `distracting_cs` shows DAVIS' validation clips too. (Read by `has_unseen`.)
        shadow_size: width and height of MuJoCo's map of shadows in the control suite, whose own value is 2048.
        unseen: show the clips that only evaluation shows, not those of training.
        clean_image: for distracted control-suite tasks, also observe `clean_image`, the frame without distraction,
            rendered by a second simulator that plays the same actions.
        camera: number of the control suite's camera, instead of the one with which the task is published.

    Raises:
        EnvError: unknown task, no usable background file, no simulator, or no way to render.
    """
    parsed = parse_task(task)
    if min(*size, action_repeat, time_limit) < 1 or total_frames < 0:
        raise EnvError("size, action_repeat and time_limit must be at least 1, and total_frames at least 0")
    if holdout_clips and eval_resource_files:
        raise EnvError("--holdout_clips and --eval_resource_files both choose the held-out clips: give one of them")
    family = functools.partial(
        _suite(parsed.suite).prepare,
        size=tuple(size),
        action_repeat=action_repeat,
        seed=seed if isinstance(seed, np.random.SeedSequence) else np.random.SeedSequence(seed),
        start=start,
        task_seed=task_seed,
        resource_files=resource_files,
        img_source=img_source,
        total_frames=total_frames,
        ds_resource_path=ds_resource_path,
        distracting_cs_intensity=distracting_cs_intensity,
        distracting_cs_dynamic=distracting_cs_dynamic,
        scene_files=scene_files,
        holdout_clips=holdout_clips,
        eval_resource_files=eval_resource_files,
        shadow_size=shadow_size,
        unseen=unseen,
    )
    twin = None
    if clean_image and parsed.suite == "dmc" and parsed.variant:
        twin = family(parsed._replace(variant=""), camera=0)  # as all distracted tasks
    return functools.partial(_construct, family(parsed, camera=camera), twin, time_limit)


def has_unseen(task: str, **options) -> bool:
    """Whether `task` has background clips that only evaluation shows. Options as in `prepare`."""
    parsed = parse_task(task)
    return parsed.suite == "dmc" and _suite("dmc").has_unseen(parsed, **options)


def clip_names(task: str, **options) -> list[str]:
    """Names of the clips from which the backgrounds of `task` are drawn; [] if it has none."""
    parsed = parse_task(task)
    return (
        [os.path.basename(clip) for clip in _suite("dmc").find_clips(parsed, **options)]
        if parsed.suite == "dmc"
        else []
    )


def make(task: str, **options) -> gymnasium.Env:
    """One environment in this process. Options as in `prepare`."""
    return prepare(task, **options)()


def make_vector(
    task: str,
    n: int,
    *,
    seed: int,
    stream: str,
    parallel: bool,
    shared_seed: bool = False,
    timeout: float = 300.0,
    niceness: int = 0,
    first: int = 0,
    **options,
) -> Vector:
    """`n` environments of one task, each with its own random stream; those of different `stream`s are disjoint.

    Args:
        stream: one of STREAMS: "train", "eval" or "final".
        parallel: one worker process per environment; otherwise all run in this process, one after the other.
        shared_seed: seed every simulator with `seed`, as the original research code did (equal initial states);
            not those of stream "final", whose starts must be its own.
        timeout: seconds after which a worker that does not respond is replaced; 0 = never.
        niceness: of the worker processes.
        first: index of the first random stream; those before it belong to other ranks.
        options: as in `prepare`, except `seed` and `task_seed`.
    """
    seeds = np.random.SeedSequence([seed, STREAMS.index(stream)]).spawn(first + n)[first:]
    task_seed = seed if shared_seed and stream != "final" else None
    constructors = [prepare(task, seed=s, task_seed=task_seed, **options) for s in seeds]
    return Vector(constructors, parallel=parallel, timeout=timeout, niceness=niceness)


def _suite(name: str):
    return importlib.import_module(SUITES[name])


def _construct(constructor: Callable, twin: Callable | None, time_limit: int) -> gymnasium.Env:
    env = constructor() if twin is None else WithCleanImage(constructor(), twin())
    return TimeLimit(env, max_episode_steps=time_limit)


class WithCleanImage(gymnasium.Wrapper):
    """Adds `clean_image`: the frame of a `twin` without distraction, with the same seed and actions."""

    lasting = ("env", "twin")

    @property
    def unwrapped(self) -> "WithCleanImage":
        return self  # whose state is that of both

    def __init__(self, env: gymnasium.Env, twin: gymnasium.Env):
        super().__init__(env)
        self.twin = twin
        spaces = dict(env.observation_space)
        self.observation_space = gymnasium.spaces.Dict(spaces | {"clean_image": spaces["image"]})

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        observation, info = self.env.reset(seed=seed, options=options)
        return self._joined(observation, self.twin.reset(seed=seed)[0]), info

    def step(self, action: np.ndarray):
        observation, *result = self.env.step(action)
        return self._joined(observation, self.twin.step(action)[0]), *result

    def close(self) -> None:
        self.env.close()
        self.twin.close()

    def _joined(self, observation: dict, clean: dict) -> dict:
        check_same_state(observation, clean)
        return {**observation, "clean_image": clean["image"]}


def check_same_state(observation: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    """Raise RuntimeError if two simulators differ in anything but their images."""
    for key, value in observation.items():
        if key != "image" and not np.array_equal(value, other[key]):
            raise RuntimeError(f"the simulators with and without distraction are in different states: {key} differs")
