"""Frames of the DMC-GS modes beside upstream's own code, same draws. Needs a checkout: HRSSM_UPSTREAM=DIR."""

import os
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from envs import distracting_cs, dmc_gs
from envs.dmc import ControlSuite, check_rendering
from tests.upstream import envs

ROOT = os.environ.get("HRSSM_UPSTREAM")
pytestmark = pytest.mark.skipif(not ROOT, reason="set HRSSM_UPSTREAM to a checkout of upstream, pip install xmltodict")
TASKS = [("walker", "stand"), ("cartpole", "balance"), ("cheetah", "run"), ("finger", "spin"), ("reacher", "easy")]
TASKS += [("ball_in_cup", "catch"), ("hopper", "hop")]
SEED, STEPS, EPISODES, VIDEOS = 3, 6, 3, 2


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    check_rendering()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(ROOT))
        assets = tmp_path_factory.mktemp("assets")
        for mode in dmc_gs.VIDEOS:
            (assets / "dmcgs" / mode).mkdir(parents=True)
            for file in sorted(Path(ROOT, "env/data", mode).resolve().glob("video[0-4].mp4"))[:VIDEOS]:
                (assets / "dmcgs" / mode / file.name).symlink_to(file)
        patch.setenv("HRSSM_ASSETS", str(assets))
        patch.setenv("HRSSM_CACHE", str(assets / "cache"))
        yield envs.load(Path(ROOT).resolve())


def assert_same_frames(ours, theirs, action_size):
    rng = np.random.default_rng(0)
    for _ in range(EPISODES):
        image, expected = ours.reset()[0]["image"], theirs.reset().observation["image"]
        np.testing.assert_array_equal(image, expected)
        for _ in range(STEPS):
            action = rng.uniform(-1, 1, action_size).astype(np.float32)
            (observation, reward, *_), (time_step, expected_reward, *_) = ours.step(action), theirs.step(action)
            np.testing.assert_array_equal(observation["image"], time_step.observation["image"])
            assert reward == pytest.approx(expected_reward, abs=1e-6)


def suite(domain, name, **options):
    return ControlSuite(domain, name, action_repeat=2, task_seed=SEED, **options)


@pytest.mark.parametrize("mode", dmc_gs.COLORS)
@pytest.mark.parametrize("domain, name", TASKS)
def test_colours(upstream, domain, name, mode):
    theirs = upstream.make_env(domain, name, SEED, action_repeat=2, image_size=64, mode=mode)
    table = [{key: list(numbers) for key, numbers in row.items()} for row in theirs._colors]
    colors = dmc_gs.Colors(table, SEED)
    colors._rng = SimpleNamespace(integers=np.random.RandomState(SEED).randint)
    ours = suite(domain, name, distraction=colors)
    assert_same_frames(ours, theirs, ours.action_space.shape)


@pytest.mark.parametrize("mode", dmc_gs.VIDEOS)
@pytest.mark.parametrize("domain, name", TASKS)
def test_videos(upstream, domain, name, mode):
    theirs = upstream.make_env(domain, name, SEED, action_repeat=2, image_size=64, mode=mode)
    paths = [path for path in theirs.env._video_paths if Path(path).exists()][:VIDEOS]
    theirs.env._video_paths, theirs.env._num_videos = paths, len(paths)
    screen = dmc_gs.GreenScreen(dmc_gs.find_clips(mode, (64, 64)))
    ours = suite(domain, name, edits=dmc_gs.look(dmc_gs.GREEN_SCREEN[mode]), distraction=screen)
    assert_same_frames(ours, theirs, ours.action_space.shape)


@pytest.fixture(scope="module")
def davis(tmp_path_factory):
    root = tmp_path_factory.mktemp("davis")
    rng = np.random.default_rng(0)
    for name in distracting_cs.DAVIS:
        folder = root / "DAVIS/JPEGImages/480p" / name
        folder.mkdir(parents=True)
        for i in range(3):
            picture = cv2.resize(rng.integers(0, 256, (6, 10, 3), np.uint8), (854, 480), interpolation=cv2.INTER_CUBIC)
            cv2.imwrite(str(folder / f"{i:05d}.jpg"), picture)
    return root


@pytest.mark.parametrize("difficulty", [0.1, 0.5])
@pytest.mark.parametrize("mode", ["distracting_cs", "sensor_cs"])
@pytest.mark.parametrize("domain, name", [task for task in TASKS if task[0] in distracting_cs.DOMAINS])
def test_distracting_suite(upstream, davis, domain, name, mode, difficulty):
    theirs = upstream.make_env(
        domain,
        name,
        SEED,
        action_repeat=2,
        image_size=64,
        mode=mode,
        intensity=difficulty,
        ds_resource_path=[str(davis)],
    )
    distraction = distracting_cs.make_distraction(
        mode, domain, difficulty, dynamic=True, camera=0, resource_path=str(davis), seed=0
    )
    layers, layer = {}, theirs._env
    while "Distracting" in type(layer := layer._env).__name__:
        layers[type(layer).__name__.removeprefix("Distracting").removesuffix("Env")] = layer
    assert layers.keys() == {type(part).__name__ for part in distraction.parts}
    for part in distraction.parts:
        layers[type(part).__name__]._random_state = np.random.RandomState(SEED)
        part.rng = np.random.RandomState(SEED)
    ours = suite(domain, name, distraction=distraction)
    assert_same_frames(ours, theirs, ours.action_space.shape)
