"""ManiSkill2 (Gu et al., ICLR 2023): `ms_{env}` is any rigid-body environment of mani_skill2 0.5.3.

`ms_lift_cube` (or `ms_LiftCube-v0`) observes the ground truth as one vector; `ms_lift_cube_rgbd` observes the colour
and depth images of the first camera, the robot's own state and the goal. `envs/realistic_maniskill.py` builds on this.
"""

import difflib
import functools
import glob
import importlib.util
import os
import re
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import gymnasium
import numpy as np

from envs import assets
from envs.task import EnvError, Task, two_seeds

# Soft-body tasks are left out: they need CUDA, a compiler and torch in every worker.
TASKS = {
    "assembling_kits": "AssemblingKits-v0",
    "lift_cube": "LiftCube-v0",
    "move_bucket": "MoveBucket-v1",
    "open_cabinet_door": "OpenCabinetDoor-v1",
    "open_cabinet_drawer": "OpenCabinetDrawer-v1",
    "panda_avoid_obstacles": "PandaAvoidObstacles-v0",
    "peg_insertion_side": "PegInsertionSide-v0",
    "pick_clutter_ycb": "PickClutterYCB-v0",
    "pick_cube": "PickCube-v0",
    "pick_single_egad": "PickSingleEGAD-v0",
    "pick_single_ycb": "PickSingleYCB-v0",
    "plug_charger": "PlugCharger-v0",
    "push_chair": "PushChair-v1",
    "stack_cube": "StackCube-v0",
    "turn_faucet": "TurnFaucet-v0",
}
CONTROL = "pd_ee_delta_pose"
LAYER = "VK_LAYER_HRSSM_external_semaphore"
LAYERS = Path(sys.prefix) / "share/vulkan/explicit_layer.d"  # where setup/vulkan/install.sh puts it
MAKE_RENDERER = """
import sys, sapien.core as s
s.SapienRenderer.set_log_level("info")
s.SapienRenderer(offscreen_only=True, device=sys.argv[1])
"""


def parse(rest: str) -> tuple[str, str, str]:
    """Split `{env}[_rgbd]`; `env` is a ManiSkill2 id, or the same in snake case without the version."""
    name = rest.removesuffix("_rgbd")
    by_id = {env_id: name for name, env_id in TASKS.items()}
    name = by_id.get(name, name)
    if name not in TASKS:
        nearest = difflib.get_close_matches(name, TASKS, n=1, cutoff=0)[0]
        raise EnvError(f"unknown task 'ms_{rest}', did you mean 'ms_{nearest}'? (there is {', '.join(TASKS)})")
    return name, "", "rgbd" if rest.endswith("_rgbd") else ""


def prepare(
    task: Task,
    *,
    size: tuple[int, int],
    action_repeat: int,
    seed: np.random.SeedSequence,
    start: int,
    task_seed: int | None,
    **_,
) -> Callable[[], gymnasium.Env]:
    """Constructor of the environment, after all checks. The other options of `envs.prepare` do not apply."""
    check_simulator()
    own_task_seed, _ = two_seeds(seed, start)
    return functools.partial(
        ManiSkill,
        functools.partial(_build, TASKS[task.domain], size, bool(task.variant)),
        keys=("image", "depth", "state") if task.variant else ("state",),
        action_repeat=action_repeat,
        task_seed=own_task_seed if task_seed is None else task_seed,
    )


class ManiSkill(gymnasium.Env):
    """A mani_skill2 environment that never terminates: a solved task keeps giving rewards until the time limit.

    Observation, by `keys`: `image` uint8 (H, W, 3) and `depth` float32 (H, W, 1) in metres from the first camera,
    `state` float32 (n,). Action: Box [-1, 1], clipped. Reward: the dense one, summed over `action_repeat` control steps
    of 50 ms. `info["success"]`: whether the task is currently solved. `render` returns a larger image.

    Every reset rebuilds the scene with a new seed, in a room from `scenes` if there are any.
    """

    lasting = ("_task_rng", "_scene_rng")
    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
    render_mode = "rgb_array"

    def __init__(
        self,
        build: Callable,
        *,
        keys: Sequence[str] = ("image",),
        action_repeat: int = 1,
        task_seed: int = 0,
        scene_seed: int = 0,
        scenes: Sequence[str] = (),
    ):
        """`build()` creates the mani_skill2 environment; it may raise EnvError."""
        import_mani_skill()
        self._env = build()
        self._keys, self._scenes, self._action_repeat = keys, scenes, action_repeat
        self._seed(task_seed, scene_seed)
        self._running = False
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, self._env.action_space.shape, np.float32)
        self.observation_space = gymnasium.spaces.Dict(
            {
                key: gymnasium.spaces.Box(0, 255, value.shape, np.uint8)
                if key == "image"
                else gymnasium.spaces.Box(-np.inf, np.inf, value.shape, np.float32)
                for key, value in self._observe().items()
            }
        )

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        if seed is not None:
            self._seed(*two_seeds(np.random.SeedSequence(seed)))
        if self._scenes:
            self._env.scene_file = self._scenes[self._scene_rng.integers(len(self._scenes))]
        self._env.reset(seed=int(self._task_rng.integers(2**32)), options={"reconfigure": True})
        self._running = True
        return self._observe(), {}

    def step(self, action: np.ndarray):
        if not self._running:
            raise RuntimeError("step() called on an environment that needs reset()")
        action = np.clip(np.asarray(action, np.float32), -1.0, 1.0)
        if not np.isfinite(action).all():
            raise ValueError(f"action is not finite: {action}")
        reward = 0.0
        for _ in range(self._action_repeat):
            _, step_reward, _, _, info = self._env.step(action)
            reward += float(step_reward)
        return self._observe(), reward, False, False, {"success": float(info["success"])}

    def render(self) -> np.ndarray:
        """An image uint8 (H, W, 3) for videos, with the goal if the task displays it."""
        return self._env.render_rgb_array()

    def close(self) -> None:
        self._running = False
        self._env.close()

    def _seed(self, task_seed: int, scene_seed: int) -> None:
        self._task_rng = np.random.default_rng(task_seed)
        self._scene_rng = np.random.default_rng(scene_seed)

    def _observe(self) -> dict[str, np.ndarray]:
        # The package's own observation would render every camera, including the one in the hand.
        observation = {}
        if "image" in self._keys:
            self._env.update_render()
            camera = next(iter(self._env._cameras.values())).camera
            camera.take_picture()
            color = camera.get_float_texture("Color")[..., :3]
            observation["image"] = np.clip(color * 255, 0, 255).astype(np.uint8)
        if "depth" in self._keys:
            observation["depth"] = -camera.get_float_texture("Position")[..., 2:3]
        if "state" in self._keys:
            from mani_skill2.utils.common import flatten_state_dict

            observation["state"] = flatten_state_dict(self._env._get_obs_state_dict()).astype(np.float32)
        return observation


def import_mani_skill() -> None:
    """Import mani_skill2 without its soft-body tasks, with the model folder that `setup/download.py` fills."""
    sys.modules.setdefault("mani_skill2.envs.mpm", types.ModuleType("mani_skill2.envs.mpm"))
    os.environ.setdefault("MS2_ASSET_DIR", str(assets.root() / "maniskill"))
    os.environ.setdefault("MS2_RENDERER_LOG_LEVEL", "error")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sapien uses pkg_resources, which is deprecated
        import mani_skill2.envs  # noqa: F401
        import sapien.core

    sapien.core.SapienRenderer.set_log_level("critical")  # silences its complaint about a missing display


@functools.cache
def check_simulator() -> str:
    """Name of the Vulkan device that SAPIEN renders on. Tested in a subprocess, since a failure may be a crash.

    HRSSM_SAPIEN_DEVICE ("cuda:1"), which later processes inherit, becomes the card of HRSSM_RENDER_DEVICE if that is
    set and can render.

    Raises:
        EnvError: the Python version is not 3.11, mani_skill2 is not installed, or there is no device.
    """
    if sys.version_info[:2] != (3, 11):
        raise EnvError(
            "ManiSkill2 tasks need Python 3.11, SAPIEN 2 has no newer wheels (this is {}.{}): remove .venv, then "
            "PYTHON=python3.11 setup/run.sh".format(*sys.version_info)
        )
    if missing := [name for name in ("mani_skill2", "sapien") if importlib.util.find_spec(name) is None]:
        raise EnvError(
            f"{' and '.join(missing)} not installed (x86-64 Linux only): remove .venv, then run setup/run.sh again"
        )
    _choose_vulkan()
    gpu, device = os.environ.get("HRSSM_RENDER_DEVICE"), os.environ.get("HRSSM_SAPIEN_DEVICE", "")
    if gpu and not device:
        try:
            name = _try_renderer(f"cuda:{gpu}")
        except EnvError as error:
            reason = str(error).rpartition(": ")[0]
            warnings.warn(f"SAPIEN does not render on cuda:{gpu} but on a card of its choice: {reason}", stacklevel=2)
        else:
            os.environ["HRSSM_SAPIEN_DEVICE"] = f"cuda:{gpu}"
            return name
    return _try_renderer(device)


def renderer_options() -> dict:
    """What mani_skill2's environments are to hand to their renderer."""
    device = os.environ.get("HRSSM_SAPIEN_DEVICE")
    return {"device": device} if device else {}


def _try_renderer(device: str) -> str:
    """Make a renderer on "cuda:N", or on any device if that is ""; returns the device's name or raises EnvError."""
    command = [sys.executable, "-W", "ignore", "-c", MAKE_RENDERER, device]
    attempt = subprocess.run(command, capture_output=True, text=True)
    output = attempt.stdout + attempt.stderr
    picked = re.search(r"Vulkan picked device: (\d+)", output)
    if attempt.returncode != 0 or not picked:
        # Without a driver SAPIEN does not fail, but reports it in its log.
        lines = [re.sub(r"^(\[.*?\] *)+", "", line) for line in output.splitlines() if line and "[info]" not in line]
        reason = (lines or ["no output"])[-1].rstrip(".")
        reason = f"exit status {attempt.returncode}" if attempt.returncode < 0 else reason
        raise EnvError(
            f"SAPIEN finds no Vulkan device ({reason}): run setup/vulkan/install.sh, which sets one up on the CPU, or "
            "install the GPU's driver (in NVIDIA's containers, NVIDIA_DRIVER_CAPABILITIES=all)"
        )
    row = re.search(rf"^ *{picked[1]} +(.+?)(?: {{2,}}\d+){{2}}", output, re.M)
    return row[1] if row else f"device {picked[1]}"


def _choose_vulkan() -> None:
    """Enable our layer if installed, and make every driver visible to SAPIEN; later processes inherit both."""
    layers = os.environ.get("VK_INSTANCE_LAYERS", "").split(":")
    if (LAYERS / "layer.json").exists() and LAYER not in layers:
        os.environ["VK_INSTANCE_LAYERS"] = ":".join([*filter(None, layers), LAYER])
        os.environ["VK_LAYER_PATH"] = ":".join(filter(None, [str(LAYERS), os.environ.get("VK_LAYER_PATH")]))
    # SAPIEN itself searches the second folder only; NVIDIA containers use the first.
    drivers = [file for folder in ("/etc", "/usr/share") for file in sorted(glob.glob(f"{folder}/vulkan/icd.d/*.json"))]
    if drivers and not os.environ.get("VK_DRIVER_FILES"):
        os.environ.setdefault("VK_ICD_FILENAMES", ":".join(drivers))


def _build(env_id: str, size: tuple[int, int], camera: bool):
    from mani_skill2.utils.registration import REGISTERED_ENVS

    try:
        # v1 are mobile robots, which have their own control modes.
        return REGISTERED_ENVS[env_id].make(
            obs_mode="none" if camera else "state",
            reward_mode="dense",
            control_mode=None if env_id.endswith("-v1") else CONTROL,
            camera_cfgs={"height": size[0], "width": size[1]},
            renderer_kwargs=renderer_options(),
        )
    except FileNotFoundError:
        download = f"MS2_ASSET_DIR={os.environ['MS2_ASSET_DIR']} python -m mani_skill2.utils.download_asset {env_id}"
        raise EnvError(f"{env_id} needs model files, get them with {download}") from None
