"""The READMEs: their commands run, only shortened; their options, presets, tasks, files and links exist."""

import json
import os
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import cv2
import gymnasium
import numpy as np
import pytest
import torch

import dreamer
import envs
import tools
from envs import distracting_cs
from setup import download
from tests.helpers import ROOT, SMALL, make_batch, make_config

NAMES = ["README.md", *(f"{folder}/README.md" for folder in ("envs", "figures", "setup", "tests"))]
README, ENVS, FIGURES, SETUP, TESTS = READMES = [(ROOT / name).read_text() for name in NAMES]
PROSE = [re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL) for text in READMES]
SPANS = [re.sub(r"\s+", " ", span) for text in PROSE for span in re.findall(r"`([^`]+)`", text)]

OPTIONS = set(tools.flatten(vars(tools.load_config([])))) | {"configs", "help"}
PRESETS = set(re.findall(r"^(\w+):", (ROOT / "configs.yaml").read_text(), re.MULTILINE)) - {"defaults"}
OTHER_PROGRAMS = {"sbatch": {"array"}, "tensorboard": {"logdir"}, "torchrun": {"nproc_per_node"}}
TAKE_OPTIONS = ("dreamer.py", "setup/sweep.sh", "setup/slurm.sh", "tests/bench/bench.py")  # those of dreamer.py
TAKE_OPTIONS += ("tests/upstream/train.py",)

SHORT = "--steps 40 --prefill 8 --eval_every 40 --time_limit 16 --pretrain 1 --train_ratio 1 --eval_episode_num 1"
SHORT += " --envs 1 --parallel False --total_frames 10 --dataset_size 1000 --decoder.cnn_depth 4 " + SMALL


def find_commands() -> list[list[str]]:
    """The words of every command, in shell blocks and in the text, without environment variables and `setup/run.sh`."""
    blocks = re.findall(r"^```bash\n(.*?)^```", "\n".join(READMES), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").replace("$seed", "0").splitlines()
    first_words = r"python|pytest|tensorboard|torchrun|sbatch|setup/\w+\.sh|[A-Z_]+=\S+"
    lines += [span for span in SPANS if re.match(rf"(?:{first_words}) ", span)]
    commands = []
    for line in lines:
        for part in line.split(" && "):
            words = shlex.split(part, comments=True)
            while words and (re.match("[A-Z_]+=", words[0]) or words[0] in ("export", "setup/run.sh")):
                words.pop(0)
            commands += [words] if words and words[0] not in ("for", "done") else []
    return commands


COMMANDS = find_commands()
TRAINING = [words for words in COMMANDS if {"dreamer.py", "--task"} <= {*words} and "--record" not in words]
TRAINING = [words[words.index("dreamer.py") + 1 :] for words in TRAINING]


def value(argv: list[str], option: str) -> str:
    return argv[argv.index(option) + 1]


def glossary() -> re.Pattern:
    """Matches the metrics that figures/README.md explains."""
    table = FIGURES.split("| key | meaning |\n")[1].split("\n\n")[0]
    keys = [key for line in table.splitlines() for key in re.findall(r"`([^`]+)`", line.split(" | ")[0])]
    patterns = [re.escape(key).replace(r"\.\.\.", ".+") for key in keys]
    patterns = [re.sub(r"<\w+>", "[^/]+", pattern) for pattern in patterns]
    patterns = [re.sub(r"\\{(.+)\\}", lambda m: f"({m[1].replace(',', '|')})", pattern) for pattern in patterns]
    return re.compile("|".join(patterns))


def test_commands_are_found():
    assert len(TRAINING) == 9
    for word in ("_video ", "rms_", "gym_my_env", "--method dreamer", "--eval_task"):
        assert any(word in " ".join(argv) for argv in TRAINING), word
    programs = {word for words in COMMANDS for word in words if (ROOT / word).is_file()}
    expected = {f"figures/{name}.py" for name in ("plot", "report", "robustness", "openloop")}
    expected |= {
        "setup/sweep.sh",
        "setup/slurm.sh",
        "setup/export.py",
        "setup/doctor.py",
        "setup/download.py",
        "tests/test_fidelity.py",
    }
    expected |= {"tests/bench/bench.py", "tests/bench/soak.py", "tests/upstream/record.py", "tests/upstream/train.py"}
    assert expected <= programs


@pytest.mark.parametrize("argv", TRAINING, ids=lambda argv: value(argv, "--logdir"))
def test_training_commands_run(argv, tmp_path):
    if value(argv, "--task").startswith("rms_"):
        if sys.version_info[:2] != (3, 11):
            pytest.skip("SAPIEN 2 has wheels for Python 3.11 only")
        download.write_room(tmp_path / "Matterport/data/matterport3d/room.glb", np.random.default_rng(0))
    here = tmp_path / "here"
    here.mkdir()
    (tmp_path / "distractors").mkdir()
    clip = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), dtype=np.uint8)
    for name in (*distracting_cs.DAVIS, *distracting_cs.DAVIS_VALIDATION):
        (tmp_path / "DAVIS/JPEGImages/480p" / name).mkdir(parents=True)
        cv2.imwrite(str(tmp_path / "DAVIS/JPEGImages/480p" / name / "0.jpg"), clip[0])
    (here / "my_env.py").write_text(ENVS.split("```python\n")[1].split("```")[0])
    for i in range(6, 10):  # clip8 is held out
        tools.save_mp4(tmp_path / "distractors" / f"clip{i}.mp4", clip, 10)
    done = subprocess.run(
        [sys.executable, str(ROOT / "dreamer.py"), *argv, *SHORT.split()],
        cwd=here,
        env=os.environ | {"PYTHONPATH": "."},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    logdir = here / value(argv, "--logdir")
    assert (logdir / "latest.pt").exists()
    metrics = {key for line in (logdir / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}
    assert ("eval/sensor_cs/return" if "--eval_task" in argv else "eval/return") in metrics
    explained = glossary()
    assert {key for key in metrics if not explained.fullmatch(key)} == set(), "not in the glossary of figures/README.md"


def test_every_example_has_a_folder_of_its_own():
    """Otherwise the second command that a reader tries is refused. What reads runs, reads those of the examples."""
    runs = [words for words in COMMANDS if {"--task", "--tasks"} & {*words} and "--logdir" in words]
    written = [value(words, "--logdir") for words in runs]
    assert len(written) == len(TRAINING) + 4  # sweeps, and upstream's own program
    assert [(a, b) for a in written for b in written if a is not b and f"{a}/".startswith(f"{b}/")] == []
    read = {word for words in COMMANDS for word in words if word.startswith("./")} - {*written, "./runs", "./study"}
    assert read
    for folder in read:
        assert any(f"{a}/".startswith(f"{b}/") for w in written for a, b in ((w, folder), (folder, w))), folder


def test_set_up_commands_stand_on_the_first_screen():
    lines = README.splitlines()
    assert len(lines) < 220
    first_screen = "\n".join(lines[:40])
    assert "setup/run.sh python dreamer.py --configs tiny --task dmc_walker_stand" in first_screen
    assert "\nsetup/run.sh pytest\n" in first_screen


def test_commands_use_options_that_their_programs_have():
    assert COMMANDS
    for words in COMMANDS:
        files = [word for word in words if (ROOT / word).is_file()]
        assert files or words[0] in {*OTHER_PROGRAMS, "git", "pytest", "CMD"}, words
        if any(word.startswith("figures/") for word in files):
            files.append("figures/plot.py")  # its options are the report's too
        known = OPTIONS if any(word in TAKE_OPTIONS for word in words) else set()
        known = known | OTHER_PROGRAMS.get(words[0], set())
        known = known.union(*(re.findall(r"--(\w+)", (ROOT / file).read_text()) for file in files))
        used = {word[2:].split("=")[0] for word in words if re.match(r"--\w", word)}
        assert used <= known, (words, used - known)
        if "--configs" in words:
            assert value(words, "--configs") in PRESETS, words


def test_options_presets_methods_and_tasks_exist():
    scripts = [
        *(ROOT / "setup" / name for name in ("sweep.sh", "study.sh", "download.py", "expert.py")),
        *(ROOT / "figures").glob("*.py"),
    ]
    scripts += [*(ROOT / "tests/bench").glob("*.py"), *(ROOT / "tests/upstream").glob("*.py")]
    known = OPTIONS.union(*OTHER_PROGRAMS.values(), *(re.findall(r"--(\w+)", file.read_text()) for file in scripts))
    assert {name for text in READMES for name in re.findall(r"--(\w[\w.]*)", text)} - known == set()
    assert set(first_column("| preset | for |")) == PRESETS
    assert first_column("| `--method` | ") == list(dreamer.METHODS)
    tasks = {span for span in SPANS if re.fullmatch(r"(dmc|gym|ms|rms)_[\w-]+", span)} - PRESETS
    for words in COMMANDS:
        for option in {"--task", "--tasks", "--eval_task"} & {*words}:
            tasks |= set(value(words, option).split(","))
    assert {"dmc_humanoid_CMU_run", "gym_HalfCheetah-v5", "dmc_walker_walk_sensor_cs", "rms_lift_cube"} <= tasks
    for task in tasks - {"gym_my_env:Reach-v0"}:  # that one is run
        envs.parse_task(task)


def first_column(header: str) -> list[str]:
    """The code in the first cell of each row of the main README's table with this header."""
    rows = re.findall(r"^\| (`.+?) \|", README.split(header)[1].split("\n\n")[0], re.MULTILINE)
    return [code for cell in rows for code in re.findall(r"`([^`]+)`", cell)]


def test_files_exist():
    assert {name.strip("/") for name in first_column("| file | what |")} == {
        "envs",
        *(path.name for path in ROOT.glob("*.py")),
    }
    for name, text in zip(NAMES, PROSE, strict=True):
        files = re.findall(r"`([\w./]+\.(?:c|py|sh|toml|yaml))`", text)
        files += [word for word in " ".join(re.findall(r"`([^`]+)`", text)).split() if word.startswith("tests/")]
        folder = (ROOT / name).parent
        missing = [file for file in files if not (ROOT / file).exists() and not (folder / file).exists()]
        assert set(missing) <= {"my_env.py"}, name  # the user's


def test_links_resolve():
    """Of files and of headings within them, from every README and to every README."""

    def slug(heading: str) -> str:
        return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")

    targets = set()
    for name, text in zip(NAMES, PROSE, strict=True):
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, anchor = link.partition("#")
            if path.startswith("https://"):
                continue
            target = (ROOT / name).parent / path if path else ROOT / name
            assert target.is_file(), (name, link)
            targets.add(target.resolve())
            if anchor:
                headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
                assert anchor in map(slug, headings), (name, link)
    assert {ROOT / name for name in NAMES} <= targets
    assert {path for path in (ROOT / "figures").iterdir() if path.suffix in (".png", ".svg")} <= targets


def test_example_of_comparing_parts_runs(monkeypatch):
    """tests/README.md: everything but the loading of upstream's weights, which tests/test_fidelity.py does."""
    monkeypatch.setattr(torch, "load", lambda path, weights_only: {})
    monkeypatch.setattr(dreamer.Agent, "load_upstream", lambda agent, state: 0)
    batch = {key: x for key, x in make_batch(steps=64).items() if key not in ("position", "velocity")}
    images = gymnasium.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    names = {
        "dreamer": dreamer,
        "torch": torch,
        "config": SimpleNamespace(**vars(make_config())),
        "obs_space": gymnasium.spaces.Dict({"image": images}),
        "act_space": gymnasium.spaces.Box(-1, 1, (3,)),
        "batch": batch,
        "grids": torch.ones(16, 6, 6),
        "obs": {key: batch[key][:, 0].numpy() for key in ("image", "is_first", "is_terminal")},
        "carry": None,
    }
    exec(TESTS.split("```python\n")[1].split("```")[0], names)
    assert names["mask"].shape == (64, 64, 64) and names["mask"].all()
    assert names["metrics"]["model_loss"].isfinite() and names["action"].shape == (2, 3)
