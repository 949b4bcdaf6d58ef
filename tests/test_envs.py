"""Environments against real MuJoCo, real videos and recorded frames of the original suite."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import cv2
import gymnasium
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import envs
from envs import dmc_gs, natural_video, video
from envs.dmc import TASKS, ControlSuite, check_rendering, edited_assets
from envs.vector import Vector

ROOT = Path(__file__).parent.parent
SIZE = (64, 64)
ALL_TASKS = [(domain, name) for domain, names in TASKS.items() for name in names]
# First frame (seed 0, camera 0, 64x64) of every domain, and of the tasks that build their model in code, rendered by
# the natural-video research code with its own copy of the suite: fraction of replaced pixels, and mean colour.
REFERENCE = json.loads((ROOT / "tests/reference_frames.json").read_text())


@pytest.fixture(scope="session", autouse=True)
def rendering():
    check_rendering()  # before any test imports dm_control, which chooses its backend at import


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_cache(cache, monkeypatch):
    monkeypatch.setenv("HRSSM_CACHE", str(cache))


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """A folder of three moving clips of 6, 7 and 8 frames, each with its own brightness."""
    folder = tmp_path_factory.mktemp("clips")
    for i, frames in enumerate([6, 7, 8]):
        encode(folder / f"clip{i}.mp4", frames, brightness=60 * (i + 1))
    return folder


@pytest.fixture(scope="session")
def real_videos(test_data):
    return sorted((test_data / "dmcgs/video_hard").glob("*.mp4"))


def encode(path, frames, brightness=100):
    ramp = np.linspace(0, 60, 96 * 80 * 3).reshape(80, 96, 3)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 96, 80, "yuv420p", 2_000_000
        for t in range(frames):
            picture = np.roll(ramp + brightness, 5 * t, axis=1).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def rollout(env, steps, seed=0):
    """Observations after a reset and `steps` random actions."""
    rng = np.random.default_rng(seed)
    observations = [env.reset()[0]]
    for _ in range(steps):
        observations.append(env.step(rng.uniform(-1, 1, env.action_space.shape).astype(np.float32))[0])
    return observations


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], other[key], err_msg=key)


# --- names


def test_task_table_matches_the_suite():
    from dm_control import suite

    assert {domain: tuple(names) for domain, names in suite.TASKS_BY_DOMAIN.items()} == TASKS
    assert len(ALL_TASKS) == 51


@pytest.mark.parametrize("variant", ["", "video"])
def test_every_task_is_parsed(variant):
    for domain, name in ALL_TASKS:
        task = envs.parse_task("_".join(filter(None, ["dmc", domain, name, variant])))
        assert task == ("dmc", domain, name, variant)


@pytest.mark.parametrize(
    "task, parsed",
    {
        "dmc_cup_catch": ("ball_in_cup", "catch", ""),
        "dmc_cup_catch_video": ("ball_in_cup", "catch", "video"),
        "dmc_humanoid_CMU_run": ("humanoid_CMU", "run", ""),
        "dmc_humanoid_run_pure_state": ("humanoid", "run_pure_state", ""),
        "dmc_cartpole_swingup_sparse_video": ("cartpole", "swingup_sparse", "video"),
        "dmc_lqr_lqr_2_1": ("lqr", "lqr_2_1", ""),
    }.items(),
)
def test_names_with_underscores(task, parsed):
    assert envs.parse_task(task)[1:] == parsed


@pytest.mark.parametrize(
    "task, message",
    {
        "dmc_walker_stnd": "did you mean 'dmc_walker_stand'.*walker has stand, walk, run",
        "dmc_point_mas_easy": "did you mean 'dmc_point_mass_easy'.*domains are acrobot, ball_in_cup",
        "dmc_walker_stand_vidoe": "unknown variant 'vidoe'.*there is video",
        "dmc_walker": "unknown task.*walker has stand",
        "atari_pong": "unknown suite 'atari'.*there is dmc",
        "walker": "unknown suite 'walker'",
    }.items(),
)
def test_unknown_names_list_the_alternatives(task, message):
    with pytest.raises(envs.EnvError, match=message) as error:
        envs.parse_task(task)
    assert "\n" not in str(error.value)


# --- one environment


WORDS = [
    "dmc",
    "rms",
    "ms",
    "walker",
    "stand",
    "ball",
    "in",
    "cup",
    "catch",
    "video",
    "easy",
    "point",
    "mass",
    "PickCube-v0",
    "",
]


@given(st.one_of(st.text(), st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map("_".join)))
def test_any_text_parses_or_gives_a_one_line_error(text):
    assume(not text.startswith("gym_"))  # gym_ tasks may import modules
    try:
        suite, domain, name, variant = envs.parse_task(text)
    except envs.EnvError as error:
        assert len(str(error).splitlines()) == 1 and error.args[0]
    else:
        rest = "_".join(filter(None, [domain, name, variant]))
        assert envs.parse_task(f"{suite}_{rest}") == (suite, domain, name, variant)


def test_gymnasium_interface():
    env = envs.make("dmc_cartpole_balance", time_limit=5)
    observation, _ = env.reset()
    assert env.observation_space.contains(observation)
    assert {key: value.shape for key, value in observation.items()} == {
        "image": (64, 64, 3),
        "position": (3,),
        "velocity": (2,),
    }
    ends = [env.step(env.action_space.sample())[2:4] for _ in range(5)]
    assert ends == [(False, False)] * 4 + [(False, True)]
    with pytest.raises(ValueError, match="not finite"):
        env.step(np.array([np.nan], np.float32))
    env.close()


def test_equal_reset_seeds_give_equal_episodes(clips):
    env = envs.make("dmc_pendulum_swingup_video", resource_files=str(clips))
    first, second, other = (env.reset(seed=seed)[0] for seed in (3, 3, 4))
    assert_equal(first, second)
    assert (first["orientation"] != other["orientation"]).any()
    env.close()


def test_a_scalar_observation_becomes_a_vector():
    env = envs.make("dmc_walker_stand")
    assert env.reset()[0]["height"].shape == env.observation_space["height"].shape == (1,)
    env.close()


def test_the_suites_time_limit_truncates_and_requires_a_reset():
    env = ControlSuite("cartpole", "balance", size=(8, 8), action_repeat=300)
    env.reset()
    outcomes = [env.step(np.zeros(1))[1:4] for _ in range(4)]
    assert [outcome[1:] for outcome in outcomes] == [(False, False)] * 3 + [(False, True)]
    assert (
        outcomes[0][0] > 200 > 100 > outcomes[3][0] > 0
    )  # rewards are sums; the last one stops at simulator step 1000
    with pytest.raises(RuntimeError, match="reset"):
        env.step(np.zeros(1))
    env.close()


def test_lqr_terminates():
    env = ControlSuite("lqr", "lqr_2_1", size=(8, 8), action_repeat=200)
    env.reset()
    physics = env.unwrapped._env.physics
    with physics.reset_context():
        physics.data.qpos[:], physics.data.qvel[:] = 1e-9, 0
    _, _, terminated, truncated, info = env.step(np.zeros(1))
    assert (terminated, truncated, info["discount"]) == (True, False, 0.0)
    env.close()


@pytest.mark.parametrize(
    "domain, name, action, control",
    [
        ("quadruped", "walk", 1.0, [1.0, 1.1, 0.8]),  # limits of one leg: [-1, 1], [-1, 1.1], [-0.8, 0.8]
        ("quadruped", "walk", 0.0, [0.0, 0.05, 0.0]),
        ("quadruped", "walk", -7.0, [-1.0, -1.0, -0.8]),  # clipped before mapping
        ("walker", "stand", 0.3, [0.3, 0.3, 0.3]),
        ("lqr", "lqr_2_1", 0.3, [0.3]),  # no limits
    ],
)
def test_actions_are_mapped_to_the_actuator_limits(domain, name, action, control):
    env = ControlSuite(domain, name, size=(8, 8))
    env.reset()
    env.step(np.full(env.action_space.shape, action, np.float32))
    np.testing.assert_allclose(env._env.physics.data.ctrl[:3], control, atol=1e-6)
    env.close()


@pytest.mark.parametrize("task, camera", [("walker_stand", 0), ("quadruped_walk", 2), ("fish_swim", 0)])
def test_fast_rendering_equals_physics_render(task, camera):
    from dm_control import suite

    env = envs.make(f"dmc_{task}", task_seed=5, action_repeat=2)
    plain = suite.load(*task.split("_"), task_kwargs={"random": 5})
    plain.reset()
    observation, _ = env.reset()
    rng = np.random.default_rng(0)
    for _ in range(4):
        np.testing.assert_array_equal(observation["image"], plain.physics.render(*SIZE, camera_id=camera))
        action = rng.uniform(-1, 1, env.action_space.shape)
        observation, reward, *_ = env.step(action)
        low, high = plain.action_spec().minimum, plain.action_spec().maximum
        assert np.isclose(sum(plain.step(low + (action + 1) / 2 * (high - low)).reward for _ in range(2)), reward)
    env.close()
    plain.physics.free()


def test_smaller_map_of_shadows_changes_few_pixels():
    def render(**options):
        env = envs.make("dmc_walker_stand", task_seed=5, size=SIZE, **options)
        env.reset()
        pictures = [env.step(np.ones(6, np.float32))[0]["image"].astype(int) for _ in range(10)]
        env.close()
        return np.stack(pictures)

    usual = render()
    changed = np.abs(render(shadow_size=512) - usual).max(-1) > 8
    assert 0 < changed.mean() < 0.003, "that shadows have another resolution, and only that, must be seen"
    assert np.mean(np.abs(render(shadow_size=0) - usual).max(-1) > 8) > 0.05, "no shadows at all"


def test_returned_images_are_not_overwritten():
    env = envs.make("dmc_walker_stand")
    image = env.reset()[0]["image"]
    before = image.copy()
    assert (env.step(np.ones(6))[0]["image"] != before).any()
    np.testing.assert_array_equal(image, before)
    env.close()


# --- the look of natural video


@pytest.mark.parametrize("task", REFERENCE)
def test_first_frame_matches_the_reference(task):
    domain = max((d for d in TASKS if task.startswith(f"{d}_")), key=len)
    env = ControlSuite(domain, task.removeprefix(f"{domain}_"), task_seed=0, edits=natural_video.look(domain))
    image = env.reset()[0]["image"]
    keyed = natural_video.matte(image, np.zeros((1, 1, 1), np.uint8)).any(-1) < image.any(-1)
    assert keyed.mean() == pytest.approx(REFERENCE[task]["keyed"], abs=0.003)
    np.testing.assert_allclose(image.mean((0, 1)), REFERENCE[task]["mean_rgb"], atol=1)
    env.close()


def test_reference_covers_every_domain_of_the_suite():
    domains = {d for d in TASKS for task in REFERENCE if task.startswith(f"{d}_")}
    assert domains == set(TASKS) - {"dog"}  # added to the suite later


def test_shared_assets_are_restored_after_loading():
    from dm_control.suite import common

    before = dict(common.ASSETS)
    with pytest.raises(KeyError), edited_assets(natural_video.look("walker")):
        assert before != common.ASSETS
        raise KeyError
    assert before == common.ASSETS


def test_a_task_with_its_own_assets_loads():
    env = ControlSuite("dog", "stand", edits=natural_video.look("dog"))
    red, green, blue = np.moveaxis(env.reset()[0]["image"].astype(int), -1, 0)
    assert ((blue > green) & (blue > red)).mean() > 0.6
    env.close()


@given(st.integers(0, 2**32 - 1))
def test_matte_replaces_exactly_the_blue_pixels(seed):
    rng = np.random.default_rng(seed)
    image = rng.choice([0, 90, 91, 92, 255], (5, 7, 3)).astype(np.uint8)  # ties are frequent
    frame = rng.integers(0, 256, (5, 7, rng.choice([1, 3])), np.uint8)
    before = image.copy()
    result = natural_video.matte(image, frame)
    np.testing.assert_array_equal(image, before)
    assert result.dtype == np.uint8
    for y, x in np.ndindex(5, 7):
        red, green, blue = image[y, x]
        expected = np.broadcast_to(frame[y, x], 3) if blue > green and blue > red else image[y, x]
        np.testing.assert_array_equal(result[y, x], expected)


# --- background frames


def test_frames_of_a_real_video_are_grey_and_scaled(real_videos):
    path = str(real_videos[0])
    frames = video.decode_video(path, (48, 64))
    with av.open(path) as container:
        for i, frame in enumerate(container.decode(video=0)):
            if i % 100 == 0:
                # ffmpeg's gray is the luma stretched from [16, 235] to the full range
                luma = frame.reformat(format="yuv420p").to_ndarray()[: frame.height].astype(float)
                full = np.clip((luma - 16) * 255 / 219, 0, 255)
                expected = cv2.resize(full, (64, 48), interpolation=cv2.INTER_LINEAR)
                np.testing.assert_allclose(frames[i], expected, atol=1.5)
                assert frames[i].std() > 5
    assert len(frames) == i + 1 == 500
    assert frames[0].shape == (48, 64)


@pytest.mark.parametrize("damage", ["truncated", "empty", "no frames", "other frames"])
def test_a_damaged_cache_is_decoded_again(damage, clips, cache):
    path = str(clips / "clip0.mp4")
    name, count = video.cached(path, (10, 12), video.decode_video)
    frames = np.load(name)
    if damage in ("truncated", "empty"):
        data = Path(name).read_bytes()
        Path(name).write_bytes(data[: len(data) // 2] if damage == "truncated" else b"")
    else:
        np.save(name, frames[:0] if damage == "no frames" else frames[:, :5])
    assert video.cached(path, (10, 12), video.decode_video) == (name, count)
    assert np.array_equal(np.load(name), frames)


@pytest.mark.parametrize("decode", [video.decode_video, dmc_gs.decode_rgb])
def test_clips_are_decoded_once_and_cached(decode, clips, cache, monkeypatch):
    path = str(clips / "clip0.mp4")
    name, count = video.cached(path, (10, 12), decode)
    assert count == 6
    monkeypatch.setattr(video, "_write", None)  # called if the clip were decoded again
    assert video.cached(path, (10, 12), decode) == (name, 6)
    np.testing.assert_array_equal(np.load(name), decode(path, (10, 12)))
    assert Path(name).is_relative_to(cache)
    with pytest.raises(TypeError):
        video.cached(path, (10, 13), decode)


def test_a_folder_may_hold_other_files(clips, tmp_path):
    for clip in clips.iterdir():
        (tmp_path / clip.name).write_bytes(clip.read_bytes())
    (tmp_path / "LICENSE.txt").write_text("text, which ffmpeg would film")
    cv2.imwrite(str(tmp_path / "thumbnail.jpg"), np.zeros((8, 8, 3), np.uint8))
    names = [Path(path).name for path in video.find_files("video", str(tmp_path))]
    assert names == ["clip0.mp4", "clip1.mp4", "clip2.mp4"]
    assert [Path(path).name for path in video.find_files("images", str(tmp_path))] == ["thumbnail.jpg"]


def test_a_changed_file_is_decoded_again(tmp_path):
    path = tmp_path / "clip.mp4"
    encode(path, 4)
    video.cached(str(path), (8, 8), video.decode_video)
    encode(path, 5)
    assert video.cached(str(path), (8, 8), video.decode_video)[1] == 5


def test_selection_takes_every_clip_once_per_pass_and_cuts_the_last(clips):
    files = video.find_files("video", str(clips))
    lengths = {Path(f).stem: n for f, n in zip(files, [6, 7, 8], strict=True)}
    orders = set()
    for seed in range(20):
        chosen = video.select(files, 50, SIZE, np.random.default_rng(seed), video.decode_video)
        names = [Path(name).stem.rsplit("-", 1)[0] for name, _ in chosen]
        counts = [count for _, count in chosen]
        assert sum(counts) == 50
        assert sorted(names[:3]) == sorted(names[3:6]) == sorted(lengths)
        assert counts[:-1] == [lengths[name] for name in names[:-1]]
        assert 0 < counts[-1] <= lengths[names[-1]]
        orders.update({tuple(names[:3]), tuple(names[3:6])})
    assert len(orders) == 6
    everything = video.select(files, 0, SIZE, np.random.default_rng(0), video.decode_video)
    assert sum(count for _, count in everything) == 21


def test_position_advances_once_per_observation_across_resets_and_wraps(clips):
    env = envs.make("dmc_pendulum_swingup_video", resource_files=str(clips), total_frames=16, time_limit=3, seed=1)
    source = env.unwrapped._distraction.source
    frames = np.concatenate([np.load(name)[:count] for name, count in source.clips])
    position = source.position
    for episode in range(6):
        for observation in rollout(env, 3, seed=episode):
            mask = natural_video.matte(np.full((64, 64, 3), (0, 0, 1), np.uint8), np.zeros((1, 1, 1), np.uint8))
            assert not mask.any()
            grey = (observation["image"] == frames[position % 16][..., None]).all(-1)
            assert grey.mean() > 0.97  # the part of the image that the pendulum does not cover
            position += 1
    assert position - 16 > 6  # the sequence wrapped around
    before = len(os.listdir("/proc/self/fd"))
    many = video.Clips(source.clips * 4, 0)  # each of these files stays open if it is mapped at once
    many(True)
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    starts = {video.Clips(source.clips, seed).position for seed in range(200)}
    assert starts == set(range(16))
    env.close()


@pytest.mark.parametrize("kind", ["color", "noise"])
def test_colour_and_noise(kind):
    env = envs.make("dmc_pendulum_swingup_video", img_source=kind)
    corners = np.array([[o["image"][0, 0] for o in rollout(env, 3, seed=0)] for _ in range(3)])  # episode, step, rgb
    new_per_episode = len(np.unique(corners[:, 0], axis=0)) == 3
    new_per_step = len(np.unique(corners[0], axis=0)) == 4
    assert (new_per_episode, new_per_step) == (True, kind == "noise")
    env.close()


def test_pictures(tmp_path):
    for level in (10, 200):
        cv2.imwrite(str(tmp_path / f"{level}.png"), np.full((20, 30, 3), level, np.uint8))
    env = envs.make("dmc_pendulum_swingup_video", img_source="images", resource_files=str(tmp_path), total_frames=4)
    levels = {tuple(o["image"][0, 0]) for o in rollout(env, 4)}
    assert levels == {(10, 10, 10), (200, 200, 200)}
    env.close()


def test_a_damaged_video_is_skipped_with_one_warning(clips, tmp_path):
    for path in clips.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "broken.mp4").write_bytes((clips / "clip2.mp4").read_bytes()[:300])
    with pytest.warns(UserWarning, match="skipping .*broken.mp4") as caught:
        files = {"resource_files": str(tmp_path), "holdout_clips": 0.0, "eval_resource_files": "", "unseen": False}
        source = video.make_source("video", **files, total_frames=60, size=SIZE, clip_seed=0, seed=0)
    assert len(caught) == 1
    assert source.ends[-1] == 60


@pytest.mark.filterwarnings("ignore:skipping")
@pytest.mark.parametrize(
    "options, message",
    [
        ({"resource_files": "nowhere/*.mp4"}, "no video matches nowhere/.*pass --resource_files 'DIR/.*mp4'"),
        ({"resource_files": "nowhere", "img_source": "images"}, "no picture matches nowhere"),
        ({"resource_files": __file__}, "none of the 1 files.* can be decoded"),
        ({"resource_files": __file__, "img_source": "images"}, "none of the 1 files.* can be decoded"),
        ({"img_source": "vidoe"}, "unknown --img_source 'vidoe': there is video, images, color, noise"),
        ({"action_repeat": 0}, "at least 1"),
    ],
)
def test_bad_options_fail_before_any_environment_is_created(options, message):
    with pytest.raises(envs.EnvError, match=message) as error:
        envs.prepare("dmc_walker_stand_video", **options)
    assert "\n" not in str(error.value)


def test_an_unwritable_cache_is_replaced_by_a_temporary_one(clips, monkeypatch):
    monkeypatch.setenv("HRSSM_CACHE", "/dev/null/cache")
    with pytest.warns(UserWarning, match="set HRSSM_CACHE"):
        name, count = video.cached(str(clips / "clip0.mp4"), SIZE, video.decode_video)
    assert np.load(name).shape == (6, 64, 64)


# --- several environments


def vector(n=2, seed=0, stream="train", parallel=False, task="dmc_pendulum_swingup", **options):
    return envs.make_vector(task, n, seed=seed, stream=stream, parallel=parallel, **options)


def first_frames(**options):
    v = vector(**options)
    obs = v.reset(np.ones(v.num_envs, bool))
    v.close()
    return obs


def test_seeds():
    train, again, evaluation, other = (first_frames(**kw) for kw in ({}, {}, {"stream": "eval"}, {"seed": 1}))
    assert_equal(train, again)
    angles = np.concatenate([train["orientation"], evaluation["orientation"], other["orientation"]])
    assert len(np.unique(angles, axis=0)) == 6
    shared = first_frames(shared_seed=True)["orientation"]
    np.testing.assert_array_equal(shared[0], shared[1])
    final = first_frames(shared_seed=True, stream="final")["orientation"]  # of episodes that training never starts with
    assert len(np.unique([shared[0], *final], axis=0)) == 3


def test_a_resumed_run_has_the_same_clips_and_new_episodes(clips):
    options = {"resource_files": str(clips), "total_frames": 10, "seed": 2}
    one, other = (envs.make("dmc_pendulum_swingup_video", start=start, **options) for start in (0, 500))
    assert one.unwrapped._distraction.source.clips == other.unwrapped._distraction.source.clips
    assert one.unwrapped._distraction.source.position != other.unwrapped._distraction.source.position
    assert (one.reset()[0]["orientation"] != other.reset()[0]["orientation"]).any()
    one.close()
    other.close()


def test_backgrounds_differ_between_environments_and_repeat_with_the_seed(clips):
    options = {"task": "dmc_pendulum_swingup_video", "n": 3, "resource_files": str(clips), "shared_seed": True}
    images, again = first_frames(**options)["image"], first_frames(**options)["image"]
    np.testing.assert_array_equal(images, again)
    assert len(np.unique(images, axis=0)) > 1


def test_workers_and_serial_stepping_agree_exactly(clips):
    options = {"task": "dmc_pendulum_swingup_video", "resource_files": str(clips), "time_limit": 4}
    rng = np.random.default_rng(0)
    serial, parallel = vector(**options), vector(parallel=True, **options)
    assert serial.observation_space == parallel.observation_space
    assert serial.action_space == parallel.action_space
    done = np.ones(2, bool)
    episodes = 0
    while episodes < 2:
        if done.any():
            assert_equal(serial.reset(done), parallel.reset(done))
        action = rng.uniform(-1, 1, (2, 1)).astype(np.float32)
        one, other = serial.step(action), parallel.step(action)
        assert_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])
        np.testing.assert_array_equal(one[2], other[2])
        assert_equal(one[3], other[3])
        done = one[2]
        episodes += done.all()
    serial.close()
    parallel.close()


class Counter(gymnasium.Env):
    """Observes the number of steps of the episode and the number of episodes; ends by itself after `length` steps."""

    observation_space = gymnasium.spaces.Dict({"count": gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)})
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, length, terminates):
        self.length, self.terminates, self.steps, self.episodes = length, terminates, 0, 0

    def observation(self):
        return {"count": np.array([self.steps, self.episodes], np.float32)}

    def reset(self, *, seed=None, options=None):
        self.steps, self.episodes = 0, self.episodes + 1
        return self.observation(), {}

    def step(self, action):
        self.steps += 1
        over = self.steps == self.length
        return self.observation(), 2.0, over and self.terminates, over and not self.terminates, {"success": float(over)}


def test_resets_and_flags():
    v = Vector([lambda: Counter(2, True), lambda: Counter(3, False)], parallel=False)
    obs = v.reset(np.array([True, True]))
    assert obs["is_first"].all() and not obs["is_last"].any()
    kept = obs["count"]
    v.step(np.zeros((2, 1)))
    np.testing.assert_array_equal(kept, [[0, 1], [0, 1]])  # the caller owns the returned arrays
    obs, reward, done, info = v.step(np.zeros((2, 1)))
    assert (reward.dtype, reward.tolist()) == (np.float32, [2, 2])
    assert done.tolist() == [True, False]
    assert info["success"].tolist() == [1, 0]
    assert [obs[flag].tolist() for flag in ("is_first", "is_last", "is_terminal")] == [
        [False, False],
        [True, False],
        [True, False],
    ]
    obs = v.reset(done)
    np.testing.assert_array_equal(obs["count"], [[0, 2], [2, 1]])
    assert [obs[flag].tolist() for flag in ("is_first", "is_last", "is_terminal")] == [
        [True, False],
        [False, False],
        [False, False],
    ]
    obs, _, done, _ = v.step(np.zeros((2, 1)))
    assert done.tolist() == obs["is_last"].tolist() == [False, True]
    assert not obs["is_terminal"].any()


def follow(vec, steps, seed):
    """The current observation and those after random steps, with resets where episodes end."""
    rng, seen, done = np.random.default_rng(seed), [vec.observations()], np.zeros(vec.num_envs, bool)
    for _ in range(steps):
        if done.any():
            seen.append(vec.reset(done))
        obs, reward, done, _ = vec.step(rng.uniform(-1, 1, (vec.num_envs, *vec.action_space.shape)).astype(np.float32))
        seen.append(obs | {"reward": reward})
    return seen, done


RESTORED = {
    "dmc_pendulum_swingup_video": {"parallel": True, "img_source": "noise"},
    "dmc_reacher_easy_video": {},
    "gym_tests.bench.soak:Dot-v0": {},
    "dmc_reacher_easy_sensor_cs": {"clean_image": True},  # of a second simulator
}


@pytest.mark.parametrize("task", RESTORED)
def test_state_is_restored_exactly_in_another_vector(task, clips):
    """Restored in the middle of the second episode, into environments with another start and state."""
    options = {"resource_files": str(clips), "total_frames": 15, "time_limit": 5, "size": (16, 16)} | RESTORED[task]
    one, other = (vector(task=task, start=start, **options) for start in (0, 500))
    try:
        one.reset(np.ones(2, bool))
        _, done = follow(one, 8, seed=0)
        assert not done.any()
        state = json.loads(json.dumps(one.state_dict(~done)))
        assert other.load_state_dict(state).all()
        for ours, theirs in zip(follow(one, 6, seed=1)[0], follow(other, 6, seed=1)[0], strict=True):
            assert_equal(ours, theirs)
        # Between episodes, the next episode is the same too.
        ended = np.ones(2, bool)
        assert not other.load_state_dict(json.loads(json.dumps(one.state_dict(~ended)))).any()
        assert_equal(one.reset(ended), other.reset(ended))
    finally:
        one.close()
        other.close()


def test_an_environment_that_cannot_be_restored_warns(capfd):
    vectors = [Vector([lambda: Counter(9, False), lambda: Counter(2, False)], parallel=False) for _ in range(2)]
    one, other = vectors
    for _ in range(2):  # the episode counter is not saved, so the second episode cannot be restored
        one.reset(np.ones(2, bool))
    one.step(np.zeros((2, 1)))
    state = one.state_dict(np.array([True, False]))
    assert other.load_state_dict(state).tolist() == [False, False]
    assert capfd.readouterr().err.startswith("warning: environment 0 could not be restored to its state")


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_dies_or_hangs_is_replaced(fault, capfd):
    suite = functools.partial(ControlSuite, "pendulum", "swingup", size=(8, 8))
    vec = Vector([suite] * 2, parallel=True, timeout=5, niceness=3)
    try:
        first = vec.reset(np.ones(2, bool))
        os.kill(vec._slots[1]._process.pid, fault)
        obs, _, done, info = vec.step(np.zeros((2, 1), np.float32))
        assert info["lost"].tolist() == done.tolist() == obs["is_last"].tolist() == [False, True]
        assert not obs["is_terminal"].any() and vec.restarts == 1
        assert (obs["orientation"][0] != first["orientation"][0]).any()
        error = capfd.readouterr().err
        assert ("did not answer for 5 s" if fault == signal.SIGSTOP else "ended (exit code -9") in error
        # Training continues, but not with the first episodes again, also if it is interrupted now.
        state = json.loads(json.dumps(vec.state_dict(np.zeros(2, bool))))
        again = vec.reset(done)
        resumed = Vector([suite] * 2, parallel=False)
        resumed.load_state_dict(state)
        assert (resumed.reset(done)["orientation"][1] == again["orientation"][1]).all()
        resumed.close()
        assert again["is_first"].tolist() == [False, True]
        assert (again["orientation"][1] != first["orientation"][1]).any()
        assert not vec.step(np.zeros((2, 1), np.float32))[3]["lost"].any()
        # A worker lost at a reset only causes a warning.
        os.kill(vec._slots[0]._process.pid, signal.SIGKILL)
        assert vec.reset(np.ones(2, bool))["is_first"].all() and vec.restarts == 2
        assert not vec.step(np.zeros((2, 1), np.float32))[3]["lost"].any()
        nice = [os.getpriority(os.PRIO_PROCESS, slot._process.pid) for slot in vec._slots]
        assert nice == [os.getpriority(os.PRIO_PROCESS, 0) + 3] * 2
    finally:
        vec.close()
    assert not [p for p in _children(os.getpid()) if "spawn_main" in p]


class Dying(Counter):
    """Exits its process at the first step of every episode."""

    def __init__(self):
        super().__init__(5, False)

    def step(self, action):
        os._exit(7)


def test_a_worker_that_dies_repeatedly_is_an_error(capfd):
    vec = Vector([Dying], parallel=True)
    for _ in range(3):
        vec.reset(np.ones(1, bool))
        assert vec.step(np.zeros((1, 1)))[3]["lost"].all()
    vec.reset(np.ones(1, bool))
    with pytest.raises(envs.EnvError, match=r"failed 4 times in a row \(it ended \(exit code 7") as error:
        vec.step(np.zeros((1, 1)))
    assert "\n" not in str(error.value) and capfd.readouterr().err.count("warning: ") == 3
    assert not [p for p in _children(os.getpid()) if "spawn_main" in p]


def test_an_error_in_a_worker_is_raised_in_the_parent():
    good = functools.partial(ControlSuite, "pendulum", "swingup", size=(8, 8))
    with pytest.raises(envs.EnvError, match="unknown suite 'nothing'") as error:
        Vector([good, functools.partial(envs.make, "nothing")], parallel=True)
    assert "\n" not in str(error.value)
    assert not [p for p in _children(os.getpid()) if "spawn_main" in p]


def _children(parent):
    """Command lines of the live processes whose parent is `parent`."""
    lines = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rsplit(")", 1)[1].split()
            if int(fields[1]) == parent and fields[0] != "Z":
                lines.append((status.parent / "cmdline").read_text())
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has exited since
    return lines


SCRIPT = """
import multiprocessing, os, sys, time
print("main script runs", flush=True)
import numpy as np, envs
v = envs.make_vector("dmc_pendulum_swingup", 1, seed=0, stream="train", parallel=True)
v.reset(np.ones(1, bool))
maps = open(f"/proc/{multiprocessing.active_children()[0].pid}/maps").read()
assert "torch" not in maps and "mujoco" in maps
assert "torch" not in sys.modules and "dm_control" not in sys.modules
print("worker", multiprocessing.active_children()[0].pid, flush=True)
if "wait" in sys.argv:
    time.sleep(60)
# The vector stays open: exiting must not hang although its worker ignores SIGTERM.
"""


@pytest.fixture
def start(tmp_path):
    """Starts SCRIPT with arguments and environment variables, and kills what is left of it."""
    script = tmp_path / "main.py"
    script.write_text(SCRIPT)
    started = []

    def start(*arguments, **environment):
        process = subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_workers_import_neither_torch_nor_the_main_script_and_exit_quietly(start):
    process = start()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.count("main script runs") == 1
    assert err == ""


@pytest.mark.parametrize("hanging", [False, True])
def test_workers_die_with_a_killed_parent(start, hanging):
    process = start("wait")
    worker = next(int(line.split()[1]) for line in process.stdout if line.startswith("worker"))
    if hanging:
        os.kill(worker, signal.SIGSTOP)
    process.kill()
    deadline = time.time() + 20
    while Path(f"/proc/{worker}/stat").exists() and Path(f"/proc/{worker}/stat").read_text().split()[2] != "Z":
        assert time.time() < deadline, "the worker outlived its parent"
        time.sleep(0.05)


def test_no_rendering_backend_gives_a_one_line_error(start):
    process = start(MUJOCO_GL="nonsense")
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    last = err.strip().splitlines()[-1]
    assert "MuJoCo cannot render (MUJOCO_GL=nonsense" in last and "setup/install.sh" in last and "libegl1" in last


def test_clean_image_is_the_same_state_without_distraction():
    options = {"size": (32, 32), "seed": 3, "img_source": "noise", "time_limit": 5}
    env = envs.make("dmc_finger_turn_hard_video", clean_image=True, **options)
    clean = envs.make("dmc_finger_turn_hard", clean_image=True, **options)
    assert "clean_image" in env.observation_space.spaces and "clean_image" not in clean.observation_space.spaces
    for _ in range(2):  # the target changes at every reset
        pairs = [(env.reset()[0], clean.reset()[0])]
        for action in np.linspace(-1, 1, 10).reshape(5, 2):
            pairs.append((env.step(action)[0], clean.step(action)[0]))
        for observed, expected in pairs:
            assert (observed["clean_image"] == expected["image"]).all()
            assert (observed["image"] != expected["image"]).any()
    # Also where clean tasks have another camera.
    twin = envs.prepare("dmc_quadruped_walk_video", clean_image=True, **options).args[1]
    assert twin.keywords["camera"] == 0 and envs.prepare("dmc_quadruped_walk").args[0].keywords["camera"] == 2
    env.unwrapped.env.step(np.ones(2))
    with pytest.raises(RuntimeError, match="in different states: "):
        env.env.step(np.ones(2))
    env.close()
    clean.close()
