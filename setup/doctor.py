"""Checks that this machine can train: one line per check, with a fix for each failure; exit status 1 on failure.

Run it as `setup/run.sh python setup/doctor.py`. With a warning training works, but with restrictions.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from setup import console

# isort: split
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata

SETUP = Path(__file__).resolve().parent
INSTALL = f"rm -r {SETUP.parent / '.venv'}, then run setup/run.sh again"
RENDER = """
from dm_control import suite
physics = suite.load("cartpole", "balance").physics
frame = physics.render(64, 64, camera_id=0)
assert frame.shape == (64, 64, 3) and frame.std() > 1, "the frame is blank"
from OpenGL import GL
with physics.contexts.gl.make_current() as context:
    print(context.call(GL.glGetString, GL.GL_RENDERER).decode())
"""
Line = tuple[str, str, str]  # "ok", "warn" or "FAIL"; the result; the fix


def check_python() -> Iterator[Line]:
    version = "python {}.{}.{}".format(*sys.version_info)
    yield "ok" if sys.version_info >= (3, 11) else "FAIL", version, "use Python 3.11 or newer: PYTHON=... setup/run.sh"


def check_packages() -> Iterator[Line]:
    """Every requirement is installed in exactly the pinned version (local build tags such as +cpu are ignored)."""
    from packaging.requirements import Requirement

    text = "".join(p.read_text() for p in sorted(SETUP.glob("requirements*.txt")))
    requirements = [Requirement(line) for line in re.findall(r"^\w.*", text, re.M)]
    pins = {r.name: str(r.specifier)[2:] for r in requirements if r.marker is None or r.marker.evaluate()}
    wrong = []
    for name, wanted in pins.items():
        try:
            version = metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            version = "missing"
        if version != wanted:
            wrong.append(f"{name} is {version}, not {wanted}")
    yield "FAIL" if wrong else "ok", f"{len(pins)} pinned packages" + "".join(f"; {w}" for w in wrong), INSTALL


def check_torch() -> Iterator[Line]:
    import torch

    cores = len(os.sched_getaffinity(0))
    yield "ok", f"torch {torch.__version__}, {cores} CPU cores, {torch.get_num_threads()} threads", ""
    if torch.cuda.is_available():
        torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")
        memory = torch.cuda.mem_get_info()[1] / 2**30
        yield "ok", f"GPU {torch.cuda.get_device_name()}, {memory:.0f} GiB, CUDA {torch.version.cuda}", ""
    elif Path("/proc/driver/nvidia/version").exists():
        yield (
            "warn",
            "torch sees no GPU although an NVIDIA driver is installed",
            "check nvidia-smi and CUDA_VISIBLE_DEVICES",
        )
    else:
        yield "ok", "no GPU, training runs on the CPU", ""


def check_rendering() -> Iterator[Line]:
    """Renders a frame with each backend, in a subprocess because a process can use only one of them."""
    asked = os.environ.get("MUJOCO_GL")
    works = False
    for backend in [asked] if asked else ["egl", "osmesa"]:
        start = time.perf_counter()
        environ = {**os.environ, "MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend}
        run = subprocess.run([sys.executable, "-c", RENDER], env=environ, capture_output=True, text=True)
        if run.returncode == 0:
            works, where = True, run.stdout.strip()
            seconds = time.perf_counter() - start
            yield "ok", f"rendering with {backend} on {where}, {seconds:.1f} s to the first frame", ""
        else:
            reason = (run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1]
            fix = "run setup/install.sh; on NVIDIA containers set NVIDIA_DRIVER_CAPABILITIES=all"
            last = backend in (asked, "osmesa")
            yield "FAIL" if last and not works else "warn", f"rendering with {backend}: {reason}", fix


def check_cards() -> Iterator[Line]:
    """Where the environments of a run with `--device cuda:N` render, for each GPU: it should be that one."""
    sys.path.insert(0, str(SETUP.parent))
    from envs import dmc

    for gpu, name in enumerate(gpu_names()):
        device = os.environ.get("MUJOCO_EGL_DEVICE_ID") or dmc.egl_device(str(gpu))
        environ = {**os.environ, "MUJOCO_GL": "egl", **({"MUJOCO_EGL_DEVICE_ID": device} if device else {})}
        run = subprocess.run([sys.executable, "-c", RENDER], env=environ, capture_output=True, text=True)
        where = run.stdout.strip() or (run.stderr.strip().splitlines() or ["nothing"])[-1]
        text = f"cuda:{gpu} is {name}; its environments render on {where} (MUJOCO_EGL_DEVICE_ID {device or 'not set'})"
        same = name.removeprefix("NVIDIA ") in where
        yield "ok" if same else "warn", text, "set MUJOCO_EGL_DEVICE_ID to the card's number among EGL's devices"


def gpu_names() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(gpu) for gpu in range(torch.cuda.device_count())]


def check_cache() -> Iterator[Line]:
    folder = Path(os.environ.get("HRSSM_CACHE") or "~/.cache/hrssm").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        yield (
            "warn",
            f"cannot keep decoded videos in {folder}: {error.strerror}",
            "set HRSSM_CACHE to a writable folder",
        )
    else:
        yield "ok", f"decoded videos are kept in {folder}", ""


def check_replay() -> Iterator[Line]:
    """Space for a full replay of the default size, in memory and, for its saved copy, on the disk of this folder."""
    from ruamel.yaml import YAML

    steps = YAML(typ="safe").load(SETUP.parent / "configs.yaml")["defaults"]["dataset_size"]
    needed = steps * 64 * 64 * 3 / 2**30
    meminfo = Path("/proc/meminfo").read_text()
    memory = int(re.search(r"MemAvailable:\s+(\d+)", meminfo)[1]) / 2**20
    disk = shutil.disk_usage(".").free / 2**30
    text = f"a full replay takes {needed:.1f} GiB; free: memory {memory:.1f} GiB, disk here {disk:.1f} GiB"
    fits = needed < min(memory, disk)
    yield "ok" if fits else "warn", text, "use a smaller --dataset_size or --steps for runs that would fill it"


def check_vulkan() -> Iterator[Line]:
    """The device on which SAPIEN, the simulator of ManiSkill2, renders."""
    sys.path.insert(0, str(SETUP.parent))
    from envs import EnvError, maniskill

    try:
        yield "ok", f"rms_* and ms_* tasks, rendering on {maniskill.check_simulator()}", ""
    except EnvError as error:
        reason, _, fix = str(error).rpartition(": ")
        yield "warn", f"no rms_* and ms_* tasks: {reason}", fix


CHECKS = [
    check_python,
    check_packages,
    check_torch,
    check_rendering,
    check_cards,
    check_vulkan,
    check_cache,
    check_replay,
]


def main() -> int:
    failed = False
    for check in CHECKS:
        for status, text, fix in run(check):
            failed |= status == "FAIL"
            print(f"{status:4}  {text}" + (f"  ->  {fix}" if status != "ok" else ""), flush=True)
    return int(failed)


def run(check: Callable[[], Iterator[Line]]) -> Iterator[Line]:
    """The lines of a check; a package that it needs and that is missing is one of them."""
    try:
        yield from check()
    except ImportError as error:
        yield "FAIL", f"{check.__name__.removeprefix('check_')}: {error}", INSTALL


if __name__ == "__main__":
    console.run(main)
