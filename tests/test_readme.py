"""The README's commands run as they stand there, only shortened; its options, presets and files exist."""

import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import yaml

import tools
from setup import download
from tests.helpers import ROOT, SMALL

README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^\s*(?:setup/run\.sh )?python (?:-u )?dreamer\.py (.*)$", README, re.MULTILINE)
SHORT = "--steps 40 --prefill 8 --eval_every 40 --time_limit 16 --pretrain 1 --train_ratio 1 --eval_episode_num 1"
SHORT += " --envs 1 --parallel False --total_frames 10 --dataset_size 1000 " + SMALL


def test_commands_are_found():
    assert len(COMMANDS) == 7
    assert all(sum(word in command for command in COMMANDS) == 1 for word in ("_video", "rms_", "gym_my_env"))


@pytest.mark.parametrize("command", COMMANDS)
def test_training_commands_run(command, tmp_path):
    if "rms_" in command:
        if sys.version_info[:2] != (3, 11):
            pytest.skip("SAPIEN 2 has wheels for Python 3.11 only")
        download.write_room(tmp_path / "Matterport/data/matterport3d/room.glb", np.random.default_rng(0))
    here = tmp_path / "here"
    here.mkdir()
    (tmp_path / "distractors").mkdir()
    clip = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), dtype=np.uint8)
    (here / "my_env.py").write_text(README.split("```python\n")[1].split("```")[0])
    tools.save_mp4(tmp_path / "distractors" / "clip.mp4", clip, 10)
    argv = shlex.split(command.replace("$seed", "0"))
    done = subprocess.run(
        [sys.executable, str(ROOT / "dreamer.py"), *argv, *SHORT.split()],
        cwd=here,
        env=os.environ | {"PYTHONPATH": "."},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    logdir = here / argv[argv.index("--logdir") + 1]
    assert (logdir / "latest.pt").exists()
    assert ("eval/sensor_cs/return" if "--eval_task" in argv else "eval/return") in (
        logdir / "metrics.jsonl"
    ).read_text()


def test_set_up_commands_stand_on_the_first_screen():
    first_screen = "\n".join(README.splitlines()[:40])
    assert "setup/run.sh python dreamer.py --configs tiny --task dmc_walker_stand" in first_screen
    assert "\nsetup/run.sh pytest\n" in first_screen


def test_options_presets_and_files_exist():
    blocks = yaml.safe_load((ROOT / "configs.yaml").read_text())
    options = tools.flatten(blocks["defaults"]).keys() | {"configs", "help", "upstream", "out", "formula", "from"}
    options |= {"array", "minutes", "nproc_per_node"}
    scripts = "".join(path.read_text() for path in [ROOT / "setup/sweep.sh", *(ROOT / "figures").glob("*.py")])
    options |= set(re.findall(r"--(\w+)", scripts))
    assert {name for name in re.findall(r"--([\w.]+)", README) if name not in options} == set()
    presets = re.findall(r"^\| `(\w+)` \| .*\|$", README.split("| preset | for |")[1].split("\n\n")[0], re.MULTILINE)
    assert set(presets) == blocks.keys() - {"defaults"}
    files = re.findall(r"\]\(((?:figures|envs|setup)/[^)]+)\)", README) + re.findall(r"`(\w+\.py)`", README)
    files += re.findall(r"tests/[\w/]+\.py", README)
    files.remove("my_env.py")  # the user's
    assert [file for file in files if not (ROOT / file).exists() and not (ROOT / "tests" / file).exists()] == []
