"""The DeepMind Control Suite: `dmc_{domain}_{name}`, clean or with a distraction: `dmc_{domain}_{name}_{variant}`."""

import contextlib
import difflib
import functools
import os
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator

import gymnasium
import numpy as np

from envs import natural_video
from envs.distraction import Distraction, Edits, edit_assets
from envs.task import EnvError, Task, two_seeds

# Same as dm_control.suite.TASKS_BY_DOMAIN, repeated here so that parsing a task does not load the simulator.
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
VARIANTS = ("video", "color_easy", "color_hard", "video_easy", "video_hard", "distracting_cs", "sensor_cs")

# Camera of clean tasks where it is not 0. Distracted tasks always use camera 0.
CLEAN_CAMERAS = {"quadruped": 2}

RENDER_ONCE = "from dm_control import mujoco; mujoco.Physics.from_xml_string('<mujoco/>').render(8, 8)"

UNLIMITED = 1e10  # what dm_control reports for an actuator without limits (lqr)


def parse(rest: str) -> tuple[str, str, str]:
    """Split `{domain}_{name}[_{variant}]`. Domains and names may contain underscores: the longest match wins."""
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
    ds_resource_path: str,
    distracting_cs_intensity: float,
    distracting_cs_dynamic: bool,
    holdout_clips: float,
    eval_resource_files: str,
    shadow_size: int,
    unseen: bool,
    camera: int | None,
    **_,
) -> Callable[[], gymnasium.Env]:
    """Check everything, decode the clips that `task` needs, and return the constructor of the environment."""
    check_rendering()
    own_task_seed, distraction_seed = two_seeds(seed, start)
    if camera is None:
        camera = 0 if task.variant else CLEAN_CAMERAS.get(task.domain, 0)
    edits, distraction = {}, None
    # Imported where used, because only some of these need video decoders.
    if task.variant == "video":
        from envs import video

        edits = natural_video.look(task.domain)
        source = video.make_source(
            img_source,
            resource_files=resource_files,
            holdout_clips=holdout_clips,
            eval_resource_files=eval_resource_files,
            unseen=unseen,
            total_frames=total_frames,
            size=size,
            clip_seed=int(seed.generate_state(1)[0]),
            seed=distraction_seed,
        )
        distraction = natural_video.NaturalVideo(source)
    elif task.variant.startswith("color"):
        from envs import dmc_gs

        distraction = dmc_gs.Colors(dmc_gs.load_colors(task.variant), distraction_seed)
    elif task.variant.startswith("video"):
        from envs import dmc_gs

        edits = dmc_gs.look(dmc_gs.GREEN_SCREEN[task.variant])
        distraction = dmc_gs.GreenScreen(dmc_gs.find_clips(task.variant, size, holdout_clips, unseen))
    elif task.variant:
        from envs import distracting_cs

        distraction = distracting_cs.make_distraction(
            task.variant,
            task.domain,
            difficulty=distracting_cs_intensity,
            dynamic=distracting_cs_dynamic,
            camera=camera,
            resource_path=ds_resource_path,
            seed=distraction_seed,
            unseen=unseen,
        )
    return functools.partial(
        ControlSuite,
        task.domain,
        task.name,
        size=size,
        camera=camera,
        action_repeat=action_repeat,
        shadow_size=shadow_size,
        task_seed=own_task_seed if task_seed is None else task_seed,
        edits=edits,
        distraction=distraction,
    )


def has_unseen(
    task: Task,
    *,
    img_source: str,
    holdout_clips: float,
    eval_resource_files: str,
    distracting_cs_split: bool,
    **_,
) -> bool:
    """Whether there are background clips of `task` that only evaluation shows."""
    if task.variant == "video":
        return img_source in ("video", "images") and bool(holdout_clips or eval_resource_files)
    return distracting_cs_split if task.variant == "distracting_cs" else "video" in task.variant and holdout_clips > 0


def find_clips(
    task: Task,
    *,
    img_source: str,
    resource_files: str,
    holdout_clips: float,
    eval_resource_files: str,
    ds_resource_path: str,
    distracting_cs_intensity: float,
    unseen: bool,
    **_,
) -> list[str]:
    """Files or folders of the clips from which the backgrounds of `task` are drawn."""
    if task.variant == "video" and img_source in ("video", "images"):
        from envs import video

        named = {"resource_files": resource_files, "eval_resource_files": eval_resource_files}
        return video.find_clips(img_source, **named, holdout_clips=holdout_clips, unseen=unseen)
    if task.variant in ("video_easy", "video_hard"):
        from envs import dmc_gs

        return dmc_gs.find_files(task.variant, holdout_clips, unseen)
    if task.variant == "distracting_cs":
        from envs import distracting_cs

        return distracting_cs.find_videos(ds_resource_path, distracting_cs_intensity, unseen)
    return []


class ControlSuite(gymnasium.Env):
    """One task of the suite with pixels.

    Observation: `image` uint8 (H, W, 3) and every key of the suite as float32 (scalars have shape (1,)). Action: Box
    [-1, 1], clipped and mapped linearly to the actuator limits (unchanged for an actuator without limits). Reward: sum
    over the repeated steps. Terminated if the suite ends the episode with discount 0 (only `lqr` does), truncated if it
    ends the episode otherwise. `info["discount"]` is the suite's.
    """

    lasting = ("_random", "_distraction")

    def __init__(
        self,
        domain: str,
        name: str,
        *,
        size: tuple[int, int] = (64, 64),
        camera: int = 0,
        action_repeat: int = 1,
        shadow_size: int = 2048,
        task_seed: int = 0,
        edits: Edits | None = None,
        distraction: Distraction | None = None,
    ):
        """Load a task with `edits` applied to the shared assets; `distraction` alters its images."""
        from dm_control import suite
        from dm_control.mujoco import engine

        with edited_assets(edits or {}), recorded_model() as model:
            self._env = suite.load(domain, name, task_kwargs={"random": task_seed})
        physics, self._random = self._env.physics, self._env.task.random
        # A persistent camera with an offscreen buffer of the image size (set before the GL context is created) gives
        # the same pixels as `physics.render` in less time.
        visual = physics.model.vis
        visual.global_.offheight, visual.global_.offwidth = size
        visual.quality.shadowsize = shadow_size
        self._camera = engine.Camera(physics, *size, camera_id=camera)
        self._free = weakref.finalize(
            self, physics.free
        )  # also at exit, to avoid errors from a GL context freed by the interpreter
        self._distraction = distraction or Distraction()
        self._distraction.attach(*model)
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
        """With `distraction_seed` in `options`, the same episode is rendered under another draw of the distraction."""
        super().reset(seed=seed)
        if seed is not None:
            task_seed, distraction_seed = two_seeds(np.random.SeedSequence(seed))
            self._random.seed(task_seed)
            self._distraction.seed(distraction_seed)
        if options and "distraction_seed" in options:
            self._distraction.seed(options["distraction_seed"])
        self._running = True
        self._distraction.before_reset(self._env.physics)
        time_step = self._env.reset()
        self._distraction.after_reset(self._env.physics)
        return self._observe(time_step), {}

    def step(self, action: np.ndarray):
        if not self._running:
            raise RuntimeError("step() called on an environment that needs reset()")
        action = np.clip(np.asarray(action, np.float64), -1.0, 1.0)
        if not np.isfinite(action).all():
            raise ValueError(f"action is not finite: {action}")
        action = self._action_low + (action + 1.0) / 2.0 * (self._action_high - self._action_low)
        reward = 0.0
        for frame in range(self._action_repeat):
            time_step = self._env.step(action)
            reward += time_step.reward or 0.0
            last = time_step.last() or frame == self._action_repeat - 1
            self._distraction.after_step(self._env.physics, last)
            if last:
                break
        self._running = not time_step.last()
        terminated = time_step.last() and time_step.discount == 0.0
        truncated = time_step.last() and not terminated
        return self._observe(time_step), float(reward), terminated, truncated, {"discount": float(time_step.discount)}

    def close(self) -> None:
        self._free()

    def _observe(self, time_step) -> dict[str, np.ndarray]:
        image = self._camera.render().copy()  # the camera returns a view of a buffer that it reuses
        image = self._distraction.paint(image, time_step.first())
        numbers = {k: np.atleast_1d(np.asarray(v, np.float32)) for k, v in time_step.observation.items()}
        return numbers | {"image": image}


@contextlib.contextmanager
def edited_assets(edits: Edits) -> Iterator[None]:
    """Apply `edits` to the XML files shared by all domains, for tasks loaded inside the context."""
    from dm_control.suite import common

    original = dict(common.ASSETS)
    try:
        common.ASSETS.update(edit_assets(original, edits))
        yield
    finally:
        common.ASSETS.update(original)


@contextlib.contextmanager
def recorded_model() -> Iterator[list]:
    """A list that, once a task is loaded inside the context, holds the XML text and the assets of its model.

    The file of the domain is not enough, because some tasks generate their XML in code.
    """
    from dm_control.mujoco import engine

    model, original = [], vars(engine.Physics)["from_xml_string"]  # the classmethod object, not bound to the class

    def record(cls, xml_string, assets=None):
        model[:] = xml_string, dict(assets or {})
        return original.__func__(cls, xml_string, assets)

    engine.Physics.from_xml_string = classmethod(record)
    try:
        yield model
    finally:
        engine.Physics.from_xml_string = original


def egl_device(gpu: str) -> str | None:
    """EGL's number of CUDA device `gpu`: EGL counts all cards, CUDA those of CUDA_VISIBLE_DEVICES.

    None if MUJOCO_EGL_DEVICE_ID is set already or CUDA_VISIBLE_DEVICES names cards otherwise than by number.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = visible.split(",") if visible else [str(number) for number in range(int(gpu) + 1)]
    card = cards[int(gpu)].strip() if int(gpu) < len(cards) else ""
    return card if card.isdigit() and "MUJOCO_EGL_DEVICE_ID" not in os.environ else None


@functools.cache
def check_rendering() -> None:
    """Choose and test MuJoCo's rendering backend: MUJOCO_GL if set, else egl, else osmesa with a warning.

    EGL renders on CUDA device HRSSM_RENDER_DEVICE, if set; on another, with a warning, if it cannot. The test runs in a
    subprocess, because a failed attempt cannot be undone within a process. Processes started later inherit the choice.
    Raises EnvError that names the packages to install.
    """
    chosen, gpu = os.environ.get("MUJOCO_GL"), os.environ.get("HRSSM_RENDER_DEVICE")
    device = egl_device(gpu) if gpu else None
    attempts = [{"MUJOCO_GL": backend} for backend in ([chosen] if chosen else ["egl", "osmesa"])]
    if device and attempts[0]["MUJOCO_GL"] == "egl":
        attempts.insert(0, attempts[0] | {"MUJOCO_EGL_DEVICE_ID": device})
    failures = []
    for variables in attempts:
        attempt = subprocess.run(
            [sys.executable, "-c", RENDER_ONCE], env=os.environ | variables, capture_output=True, text=True
        )
        name = " ".join(f"{key}={value}" for key, value in variables.items())
        if attempt.returncode == 0:
            os.environ.update(variables)
            if failures:
                warnings.warn(f"rendering with {name} ({'; '.join(failures)})", stacklevel=2)
            return
        failures.append(f"{name}: {(attempt.stderr.strip().splitlines() or ['no output'])[-1]}")
    raise EnvError(
        f"MuJoCo cannot render ({'; '.join(failures)}): install libegl1 libgl1 or libosmesa6, as setup/install.sh does"
        + (", or unset MUJOCO_GL" if chosen else "")
    )


def _longest_prefix(text: str, words) -> tuple[str, str]:
    """The longest of `words` that is a prefix of `text` (up to an underscore), and the rest; ("", text) if none is."""
    fitting = [word for word in words if f"{text}_".startswith(f"{word}_")]
    word = max(fitting, key=len, default="")
    return word, text[len(word) :].removeprefix("_") if word else text
