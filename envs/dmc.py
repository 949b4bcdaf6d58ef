"""The DeepMind Control Suite: `dmc_{domain}_{name}`, clean or with a natural-video background (`_video`)."""

import contextlib
import difflib
import functools
import os
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from xml.etree import ElementTree

import gymnasium
import numpy as np

from envs import natural_video
from envs.task import EnvError, Task

# Equal to dm_control.suite.TASKS_BY_DOMAIN, written down so that parsing a name does not load a simulator.
TASKS = {
    "acrobot": ("swingup", "swingup_sparse"),
    "ball_in_cup": ("catch",),
    "cartpole": ("balance", "balance_sparse", "swingup", "swingup_sparse", "two_poles", "three_poles"),
    "cheetah": ("run",),
    "dog": ("stand", "walk", "trot", "run", "fetch"),
    "finger": ("spin", "turn_easy", "turn_hard"),
    "fish": ("upright", "swim"),
    "hopper": ("stand", "hop"),
    "humanoid": ("stand", "walk", "run", "run_pure_state"),
    "humanoid_CMU": ("stand", "walk", "run"),
    "lqr": ("lqr_2_1", "lqr_6_2"),
    "manipulator": ("bring_ball", "bring_peg", "insert_ball", "insert_peg"),
    "pendulum": ("swingup",),
    "point_mass": ("easy", "hard"),
    "quadruped": ("walk", "run", "escape", "fetch"),
    "reacher": ("easy", "hard"),
    "stacker": ("stack_2", "stack_4"),
    "swimmer": ("swimmer6", "swimmer15"),
    "walker": ("stand", "walk", "run"),
}
ALIASES = {"cup": "ball_in_cup"}
VARIANTS = ("video",)

# Clean tasks are seen by camera 0, except that one; distraction tasks always by camera 0.
CLEAN_CAMERAS = {"quadruped": 2}

RENDER_ONCE = "from dm_control import mujoco; mujoco.Physics.from_xml_string('<mujoco/>').render(8, 8)"

UNLIMITED = 1e10  # dm_control's bound of an actuator without limits (lqr)


def parse(rest: str) -> tuple[str, str, str]:
    """Split `{domain}_{name}[_{variant}]`. Domains and names may contain underscores: the longest fits."""
    domain, after_domain = _longest_prefix(rest, [*TASKS, *ALIASES])
    domain = ALIASES.get(domain, domain)
    name, variant = _longest_prefix(after_domain, TASKS.get(domain, ()))
    if name and (not variant or variant in VARIANTS):
        return domain, name, variant
    task = f"dmc_{rest}"
    if name:
        raise EnvError(f"unknown variant {variant!r} of task {task!r}: there is {', '.join(VARIANTS)}")
    suffixes = ["", *(f"_{variant}" for variant in VARIANTS)]
    everything = [f"dmc_{d}_{n}{suffix}" for d, names in TASKS.items() for n in names for suffix in suffixes]
    nearest = difflib.get_close_matches(task, everything, n=1, cutoff=0)[0]
    exists = f"{domain} has {', '.join(TASKS[domain])}" if domain else f"domains are {', '.join(TASKS)}"
    raise EnvError(f"unknown task {task!r}, did you mean {nearest!r}? ({exists})")


def prepare(
    task: Task,
    *,
    size: tuple[int, int],
    action_repeat: int,
    seed: np.random.SeedSequence,
    start: int,
    task_seed: int | None,
    resource_files: str,
    img_source: str,
    total_frames: int,
) -> Callable[[], gymnasium.Env]:
    """Constructor of the environment of `task`, after every check and after the clips it needs are decoded."""
    check_rendering()
    own_task_seed, background_seed = _two_seeds(
        np.random.SeedSequence(seed.entropy, spawn_key=(*seed.spawn_key, start))
    )
    camera, edits, background = CLEAN_CAMERAS.get(task.domain, 0), {}, None
    if task.variant == "video":
        from envs import video  # only these tasks need the decoders

        camera, edits = 0, natural_video.look(task.domain)
        background = video.make_source(
            img_source,
            resource_files=resource_files,
            total_frames=total_frames,
            size=size,
            clip_seed=int(seed.generate_state(1)[0]),
            seed=background_seed,
        )
    return functools.partial(
        ControlSuite,
        task.domain,
        task.name,
        size=size,
        camera=camera,
        action_repeat=action_repeat,
        task_seed=own_task_seed if task_seed is None else task_seed,
        edits=edits,
        background=background,
    )


class ControlSuite(gymnasium.Env):
    """One task of the suite with pixels.

    Observation: `image` uint8 (H, W, 3) and every key of the suite as float32 (a scalar as shape (1,)). Action: Box
    [-1, 1], clipped to it and mapped linearly to the actuator limits (an actuator without limits gets it unchanged).
    Reward: sum over the inner steps. Terminated where the suite says that the future is worth nothing (only `lqr`
    does), truncated where it ends an episode otherwise. `info["discount"]` is the suite's.
    """

    def __init__(
        self,
        domain: str,
        name: str,
        *,
        size: tuple[int, int] = (64, 64),
        camera: int = 0,
        action_repeat: int = 1,
        task_seed: int = 0,
        edits: natural_video.Edits | None = None,
        background=None,
    ):
        """Load a task with `edits` made to the shared assets; frames of the source `background` replace blue pixels."""
        from dm_control import suite
        from dm_control.mujoco import engine

        with edited_assets(edits or {}):
            self._env = suite.load(domain, name, task_kwargs={"random": task_seed})
        physics = self._env.physics
        # A buffer of the size of the picture (set before the GL context is made) and a camera that is kept give the
        # pixels of `physics.render`, faster.
        visual = physics.model.vis.global_
        visual.offheight, visual.offwidth = size
        self._camera = engine.Camera(physics, *size, camera_id=camera)
        self._free = weakref.finalize(self, physics.free)  # at exit too: a GL context left to the interpreter complains
        self._background = background
        self._action_repeat = action_repeat
        self._running = False

        limits = self._env.action_spec()
        limited = (limits.minimum > -UNLIMITED) & (limits.maximum < UNLIMITED)
        self._action_low = np.where(limited, limits.minimum, -1.0)
        self._action_high = np.where(limited, limits.maximum, 1.0)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, limits.shape, np.float32)
        self.observation_space = gymnasium.spaces.Dict(
            {
                key: gymnasium.spaces.Box(-np.inf, np.inf, spec.shape or (1,), np.float32)
                for key, spec in self._env.observation_spec().items()
            }
            | {"image": gymnasium.spaces.Box(0, 255, (*size, 3), np.uint8)}
        )

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        if seed is not None:
            task_seed, background_seed = _two_seeds(np.random.SeedSequence(seed))
            self._env.task.random.seed(task_seed)
            if self._background is not None:
                self._background.seed(background_seed)
        self._running = True
        return self._observe(self._env.reset()), {}

    def step(self, action: np.ndarray):
        if not self._running:
            raise RuntimeError("step() called on an environment that needs reset()")
        action = np.clip(np.asarray(action, np.float64), -1.0, 1.0)
        if not np.isfinite(action).all():
            raise ValueError(f"action is not finite: {action}")
        action = self._action_low + (action + 1.0) / 2.0 * (self._action_high - self._action_low)
        reward = 0.0
        for _ in range(self._action_repeat):
            time_step = self._env.step(action)
            reward += time_step.reward or 0.0
            if time_step.last():
                break
        self._running = not time_step.last()
        terminated = time_step.last() and time_step.discount == 0.0
        truncated = time_step.last() and not terminated
        return self._observe(time_step), float(reward), terminated, truncated, {"discount": float(time_step.discount)}

    def close(self) -> None:
        self._free()

    def _observe(self, time_step) -> dict[str, np.ndarray]:
        image = self._camera.render().copy()  # the camera gives a view of a buffer that its next picture overwrites
        if self._background is not None:
            image = natural_video.matte(image, self._background(time_step.first()))
        numbers = {k: np.atleast_1d(np.asarray(v, np.float32)) for k, v in time_step.observation.items()}
        return numbers | {"image": image}


@contextlib.contextmanager
def edited_assets(edits: natural_video.Edits) -> Iterator[None]:
    """Change attributes of the XML files that all domains share, for the tasks loaded inside the context."""
    from dm_control.suite import common

    original = dict(common.ASSETS)
    try:
        for file, elements in edits.items():
            root = ElementTree.fromstring(original[file])
            for (tag, name), attributes in elements.items():
                root.find(f".//{tag}[@name='{name}']").attrib.update(attributes)
            common.ASSETS[file] = ElementTree.tostring(root)
        yield
    finally:
        common.ASSETS.update(original)


@functools.cache
def check_rendering() -> None:
    """Choose how MuJoCo renders and try it: MUJOCO_GL as the user set it, else egl, else osmesa with a warning.

    Tried in a process of its own, because a failed attempt cannot be taken back within one. Processes started later
    inherit the choice. Raises EnvError with what to install.
    """
    chosen = os.environ.get("MUJOCO_GL")
    failures = []
    for backend in [chosen] if chosen else ["egl", "osmesa"]:
        attempt = subprocess.run(
            [sys.executable, "-c", RENDER_ONCE],
            env=os.environ | {"MUJOCO_GL": backend},
            capture_output=True,
            text=True,
        )
        if attempt.returncode == 0:
            os.environ["MUJOCO_GL"] = backend
            if failures:
                warnings.warn(f"rendering with MUJOCO_GL={backend} ({'; '.join(failures)})", stacklevel=2)
            return
        failures.append(f"MUJOCO_GL={backend}: {(attempt.stderr.strip().splitlines() or ['no output'])[-1]}")
    raise EnvError(
        f"MuJoCo cannot render ({'; '.join(failures)}): install libegl1 libgl1 or libosmesa6, as setup/install.sh does"
        + (", or unset MUJOCO_GL" if chosen else "")
    )


def _longest_prefix(text: str, words) -> tuple[str, str]:
    """The longest of `words` that `text` begins with (up to an underscore or its end), and the rest; or ("", text)."""
    fitting = [word for word in words if f"{text}_".startswith(f"{word}_")]
    word = max(fitting, key=len, default="")
    return word, text[len(word) :].removeprefix("_") if word else text


def _two_seeds(seed: np.random.SeedSequence) -> tuple[int, int]:
    """Seeds of the simulator and of the background. Unlike `spawn`, this leaves `seed` unchanged."""
    task_seed, background_seed = seed.generate_state(2)
    return int(task_seed), int(background_seed)
