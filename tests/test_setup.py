"""The set-up scripts. That they install everything on a bare machine is shown by running them there, not here."""

import os
import platform
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from setup import doctor

SETUP = Path(__file__).resolve().parents[1] / "setup"
REQUIREMENTS = [*sorted(SETUP.glob("requirements*.txt")), SETUP / "constraints.txt"]
SCRIPTS = [*sorted(SETUP.rglob("*.sh")), SETUP.parent / ".ci" / "run"]


def run(*command, **environ):
    return subprocess.run(command, env={**os.environ, **environ}, capture_output=True, text=True, timeout=300)


@pytest.fixture
def checkout(tmp_path):
    """A repository, in a folder with a space, that asks for no packages and whose system libraries are left alone."""
    setup = tmp_path / "my checkout" / "setup"
    setup.mkdir(parents=True)
    shutil.copy(SETUP / "run.sh", setup)
    for path in REQUIREMENTS:
        (setup / path.name).touch()
    (setup / "install.sh").write_text("#!/bin/sh\n")
    (setup / "install.sh").chmod(0o755)
    return setup.parent


def interpreter(folder: Path, body: str) -> str:
    path = folder / "fake python"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_can_be_executed(script):
    assert os.access(script, os.X_OK)
    assert run("bash", "-n", script).returncode == 0


def test_requirements_are_pinned():
    pinned = []
    for path in REQUIREMENTS:
        lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
        assert lines
        assert all("==" in line for line in lines), path
        requirements = map(Requirement, lines)
        pinned += [canonicalize_name(r.name) for r in requirements if not r.marker or r.marker.evaluate()]
    assert len(pinned) == len(set(pinned)), "no version is stated twice"


def test_pyproject_reads_the_lists_of_setup():
    """Each list is a dependency or an extra, but for what pip cannot resolve; modules and extras are complete."""
    project = tomllib.loads((SETUP.parent / "pyproject.toml").read_text())
    dynamic = project["tool"]["setuptools"]["dynamic"]
    extras = dynamic["optional-dependencies"]
    assert set(extras) == {"dev", "maniskill"}
    read = [file for entry in (dynamic["dependencies"], *extras.values()) for file in entry["file"]]
    assert {f"setup/{path.name}" for path in REQUIREMENTS} - set(read) == {
        "setup/constraints.txt",
        "setup/requirements-maniskill-no-deps.txt",
    }
    assert len(read) == len(set(read)) and all((SETUP.parent / file).is_file() for file in read)
    modules = [path.stem for path in SETUP.parent.glob("*.py")]
    assert sorted(project["tool"]["setuptools"]["py-modules"]) == sorted(modules)
    text = (SETUP / "run.sh").read_text()
    assert all(f"$setup/{path.name}" in text for path in REQUIREMENTS)


@pytest.mark.parametrize(
    "pretend", ["sys.version_info = (3, 10, 12)", "sys.modules['venv'] = None", "sys.modules['ensurepip'] = None"]
)
def test_run_without_a_usable_python_fails_with_one_line(checkout, tmp_path, pretend):
    python = interpreter(tmp_path, f'exec "{sys.executable}" -c "import sys; {pretend}; $2"')
    result = run(checkout / "setup" / "run.sh", "true", PYTHON=python)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert "apt-get install python3 python3-venv" in result.stderr


def test_run_without_a_command_fails_with_one_line(checkout):
    result = run(checkout / "setup" / "run.sh")
    assert result.returncode == 1
    assert result.stderr == "setup/run.sh: usage: setup/run.sh COMMAND [ARGUMENT...]\n"


def test_run_makes_the_environment_once_and_again_when_it_is_stale(checkout, tmp_path):
    """Concurrent first calls, arguments, exit status; then changed requirements and a half-made environment."""
    script, log = checkout / "setup" / "run.sh", tmp_path / "made"
    # A real virtual environment, but with a pip that does nothing.
    python = interpreter(
        tmp_path,
        f"""
        [ "$2" = venv ] || exec "{sys.executable}" "$@"
        echo made >>"{log}"
        "{sys.executable}" -m venv --without-pip --clear "$4"
        "$4/bin/python" -c "import pathlib, site; pathlib.Path(site.getsitepackages()[0], 'pip.py').touch()"
        """,
    )

    def made() -> int:
        return len(log.read_text().splitlines())

    code = "import sys; print(sys.prefix, sys.argv[1:]); sys.exit(3)"
    environ = {**os.environ, "PYTHON": python}

    command = [script, "python", "-c", code, "a b", "*"]
    calls = [subprocess.Popen(command, env=environ, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for call in calls:
        assert call.communicate(timeout=300)[0] == f"{checkout / '.venv'} ['a b', '*']\n"
        assert call.returncode == 3
    assert made() == 1

    start = time.perf_counter()
    assert run(script, "true", PYTHON=python).stderr == ""
    assert time.perf_counter() - start < 2
    assert made() == 1

    (checkout / "setup" / "requirements.txt").write_text("# changed\n")
    assert run(script, "true", PYTHON=python).returncode == 0
    assert made() == 2

    (checkout / ".venv" / ".fingerprint").unlink()
    assert run(script, "true", PYTHON=python).returncode == 0
    assert made() == 3


def test_doctor_is_content_here():
    result = run(sys.executable, SETUP / "doctor.py")
    assert result.returncode == 0, result.stdout
    assert "ok    rendering with" in result.stdout
    if sys.version_info[:2] == (3, 11) and platform.machine() == "x86_64":
        assert "ok    rms_* and ms_* tasks, rendering on" in result.stdout


def test_doctor_speaks_also_where_nothing_is_installed():
    result = run(sys.executable, "-S", SETUP / "doctor.py")  # without site-packages
    lines = result.stdout.splitlines()
    assert result.returncode == 1 and not result.stderr and len(lines) >= 8
    assert any(line.startswith("FAIL  torch: No module named 'torch'") for line in lines)


def test_doctor_tells_what_fails(monkeypatch, capsys):
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "1.0")
    monkeypatch.setattr(doctor, "CHECKS", [doctor.check_rendering, doctor.check_packages])
    assert doctor.main() == 1
    rendering, packages = capsys.readouterr().out.splitlines()
    assert rendering.startswith("FAIL  rendering with nonsense: ") and "setup/install.sh" in rendering
    assert packages.startswith("FAIL") and "numpy is 1.0, not " in packages
