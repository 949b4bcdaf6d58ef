"""Colours, green screen, camera and backgrounds of the DMC-GS variants, against slow reference code and MuJoCo."""

import colorsys
import functools
import json
import shutil

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import envs
from envs import assets as files
from envs import distracting_cs, dmc_gs
from envs.distraction import call_gl
from envs.dmc import ControlSuite, check_rendering, edited_assets
from envs.task import get_state, set_state
from tests.test_envs import encode

MODES = ["color_easy", "color_hard", "video_easy", "video_hard", "distracting_cs", "sensor_cs"]
LENGTHS = [6, 7, 8]  # frames per video


@pytest.fixture(scope="module", autouse=True)
def assets(tmp_path_factory):
    """Small asset sets in the published layout: two colours per table, three videos per mode, tiny DAVIS folders."""
    check_rendering()
    root = tmp_path_factory.mktemp("assets")
    rng = np.random.default_rng(0)
    keys = ["grid_rgb1", "grid_rgb2", "self_rgb", "skybox_rgb"]
    tables = {mode: [{k: rng.uniform(0, 1, 3).tolist() for k in keys} for _ in range(2)] for mode in dmc_gs.COLORS}
    (root / "dmcgs").mkdir()
    (root / "dmcgs/colors.json").write_text(json.dumps(tables))
    for mode in dmc_gs.VIDEOS:
        (root / "dmcgs" / mode).mkdir()
        for i, frames in enumerate(LENGTHS):
            encode(root / "dmcgs" / mode / f"video{i}.mp4", frames, brightness=60 * (i + 1))
    for name in distracting_cs.DAVIS:
        folder = root / "davis/DAVIS/JPEGImages/480p" / name
        folder.mkdir(parents=True)
        for i in range(3):
            cv2.imwrite(str(folder / f"{i:05d}.jpg"), rng.integers(0, 256, (48, 85, 3), np.uint8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HRSSM_ASSETS", str(root))
        patch.setenv("HRSSM_CACHE", str(root / "cache"))
        yield root


def frames(env, steps, seed=0):
    rng = np.random.default_rng(seed)
    result = [env.reset()[0]["image"]]
    for _ in range(steps):
        result.append(env.step(rng.uniform(-1, 1, env.action_space.shape))[0]["image"])
    return np.stack(result)


def make(task, **options):
    return envs.make(f"dmc_{task}", **{"seed": 0, "size": (32, 32)} | options)


# --- all modes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("task", ["walker_stand", "reacher_easy"])
def test_variants_repeat_with_the_seed_and_differ_from_clean(task, mode):
    def episodes(variant, seed=0):
        env = make(f"{task}{variant}", seed=seed, time_limit=4)
        return np.concatenate([frames(env, 4) for _ in range(2)])

    shown = episodes(f"_{mode}")
    np.testing.assert_array_equal(shown, episodes(f"_{mode}"))
    assert (shown != episodes(f"_{mode}", seed=1)).any()
    if (task, mode) != ("reacher_easy", "video_easy"):  # its camera sees no sky, so the variant equals the clean task
        assert (shown != episodes("")).any()


@pytest.mark.parametrize("mode", MODES)
def test_state_is_restored_exactly(mode):
    one, other = (make(f"walker_stand_{mode}", time_limit=4, start=start) for start in (0, 5))
    steps = np.zeros((3, 6), np.float32)
    for _ in range(2):
        one.reset()
        state = get_state(one.unwrapped)
    set_state(other.unwrapped, json.loads(json.dumps(state)))
    for env in (one, other):
        env.reset()
    for action in steps:
        np.testing.assert_array_equal(one.step(action)[0]["image"], other.step(action)[0]["image"])


@pytest.mark.parametrize("mode", MODES)
def test_environments_in_one_process_do_not_influence_each_other(mode):
    alone = frames(make(f"cartpole_balance_{mode}"), 4)
    one, other = make(f"cartpole_balance_{mode}"), make("cartpole_balance_distracting_cs", distracting_cs_intensity=0.5)
    rng = np.random.default_rng(0)
    other.reset()
    together = [one.reset()[0]["image"]]
    for _ in range(4):
        other.step(other.action_space.sample())
        together.append(one.step(rng.uniform(-1, 1, 1))[0]["image"])
    np.testing.assert_array_equal(np.stack(together), alone)


def test_a_folder_of_a_flag_comes_before_the_cache(monkeypatch, tmp_path):
    for folder in ("cache/davis", "own", "env/davis"):
        (tmp_path / folder / "DAVIS").mkdir(parents=True)
    monkeypatch.setattr("envs.assets.CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HRSSM_ASSETS")
    find = functools.partial(files.find, "davis", "DAVIS")
    assert find() == str(tmp_path / "cache/davis/DAVIS")
    assert find(str(tmp_path / "own")) == str(tmp_path / "own/DAVIS")
    monkeypatch.setenv("HRSSM_ASSETS", str(tmp_path / "env"))
    assert find(str(tmp_path / "own")) == str(tmp_path / "env/davis/DAVIS")


@pytest.mark.parametrize("mode", MODES)
def test_missing_assets_name_the_download_command(mode, monkeypatch, tmp_path):
    monkeypatch.setenv("HRSSM_ASSETS", str(tmp_path))
    monkeypatch.setattr("envs.assets.CACHE", str(tmp_path))
    if mode == "sensor_cs":
        make("walker_stand_sensor_cs")  # needs no files
        return
    with pytest.raises(envs.EnvError, match="python setup/download.py (dmcgs|davis)"):
        envs.prepare(f"dmc_walker_stand_{mode}", ds_resource_path=str(tmp_path))


# --- colours --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "domain, name", [("walker", "stand"), ("cartpole", "two_poles"), ("finger", "spin"), ("fish", "swim")]
)
def test_colours_equal_those_of_a_reloaded_simulator(domain, name):
    settings = {
        "grid_rgb1": [0.1, 0.5, 0.2],
        "grid_rgb2": [0.9, 0, 0.4],
        "self_rgb": [0, 0.3, 1],
        "skybox_rgb": [1, 0, 0],
    }
    env = ControlSuite(domain, name, distraction=dmc_gs.Colors([settings], seed=0))
    env.reset()
    image = env.step(np.zeros(env.action_space.shape))[0]["image"]
    with edited_assets(dmc_gs.look(settings)):
        loaded = ControlSuite(domain, name)
    loaded.reset()
    np.testing.assert_array_equal(image, loaded.step(np.zeros(env.action_space.shape))[0]["image"])


def test_every_row_of_the_table_is_drawn():
    env = make("walker_stand_color_hard", time_limit=1)
    first = {env.reset()[0]["image"][0, 0].tobytes() for _ in range(12)}
    assert len(first) == 2


# --- green screen ---------------------------------------------------------------------------------------------------


def is_green(red, green, blue):
    hue, saturation, value = colorsys.rgb_to_hsv(red / 255.0, green / 255.0, blue / 255.0)
    return 100 <= hue * 360 <= 185 and 80 <= saturation * 255 <= 255 and 70 <= value * 255 <= 255


@given(st.integers(0, 2**32 - 1))
def test_green_pixels_match_the_definition(seed):
    rng = np.random.default_rng(seed)
    # Near the boundaries of green, and anywhere.
    near = rng.integers([0, 60, 0], [120, 256, 230], (40, 50, 3))
    image = np.concatenate([near, rng.integers(0, 256, (10, 50, 3))]).astype(np.uint8)
    expected = [[is_green(*map(int, pixel)) for pixel in row] for row in image]
    np.testing.assert_array_equal(dmc_gs.is_green(image), expected)


def test_green_of_known_colours():
    image = np.array([[[51, 204, 51], [102, 153, 204], [128, 128, 128], [0, 0, 0]]], np.uint8)
    assert dmc_gs.is_green(image).tolist() == [[True, False, False, False]]


def test_videos_advance_as_in_the_benchmark():
    """Episode k shows video k+1 modulo their number; step t shows frame t modulo its length."""
    clips = dmc_gs.find_clips("video_hard", (32, 32))
    screen, green = dmc_gs.GreenScreen(clips), np.full((32, 32, 3), (51, 204, 51), np.uint8)
    for video in [1, 2, 0, 1]:
        screen.before_reset(None)
        stored = np.load(clips[video][0])
        for t in range(LENGTHS[video] + 2):
            np.testing.assert_array_equal(screen.paint(green, t == 0), stored[t % LENGTHS[video]])
    screen.seed(1)
    screen.before_reset(None)
    np.testing.assert_array_equal(screen.paint(green, True), np.load(clips[2][0])[0])


@pytest.mark.parametrize("edge", [352, 480, 218, 100, 64])
@pytest.mark.parametrize("size", [(64, 64), (32, 64)])
def test_frames_are_scaled_like_torch(edge, size):
    frame = np.random.default_rng(edge).integers(0, 256, (edge, edge, 3), np.uint8)
    x = torch.from_numpy(frame).permute(2, 0, 1).contiguous().float()[None] / 255.0
    x = torch.nn.functional.interpolate(x, size=size, mode="bilinear", align_corners=False)
    expected = (x * 255.0).byte()[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(dmc_gs.shrink(frame, size), expected)


def test_videos_are_sorted_by_number(assets, tmp_path, monkeypatch):
    for i in [10, 2, 1]:
        encode_to = tmp_path / "dmcgs/video_hard"
        encode_to.mkdir(parents=True, exist_ok=True)
        encode(encode_to / f"video{i}.mp4", i)
    encode(encode_to / "video_of_a_street.mp4", 3)  # has no place in the order
    monkeypatch.setenv("HRSSM_ASSETS", str(tmp_path))
    assert [count for _, count in dmc_gs.find_clips("video_hard", (16, 16))] == [1, 2, 10]


def test_only_the_videos_that_are_shown_are_needed(assets, monkeypatch, tmp_path):
    monkeypatch.setenv("HRSSM_ASSETS", str(tmp_path))
    pictures = tmp_path / "davis/DAVIS/JPEGImages/480p"
    for name in distracting_cs.DAVIS[:4]:
        shutil.copytree(assets / pictures.relative_to(tmp_path) / name, pictures / name)
    assert len(distracting_cs.find_videos("", 0.1)) == 4
    with pytest.raises(envs.EnvError, match="lacks 4 of 8 videos"):
        distracting_cs.find_videos("", 0.2)


# --- distracting suite ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repeat", [1, 2, 3])
@pytest.mark.parametrize("task", ["walker_stand", "reacher_easy"])
def test_the_camera_never_jumps_back(task, repeat):
    """Also with an odd action repeat, where the benchmark's code renders the original camera every other step."""
    shaken = frames(make(f"{task}_sensor_cs", action_repeat=repeat, distracting_cs_intensity=0.5), 5)
    plain = frames(make(task, action_repeat=repeat), 5)
    assert all((a != b).mean() > 0.2 for a, b in zip(shaken, plain, strict=True))


@pytest.mark.parametrize("dynamic", [True, False])
def test_the_camera_moves_within_its_limits_or_not_at_all(dynamic):
    env = make("cartpole_balance_sensor_cs", distracting_cs_intensity=0.2, distracting_cs_dynamic=dynamic).unwrapped
    camera = env._distraction.parts[0]
    env.reset()
    positions = []
    for _ in range(200):
        camera.after_step(env._env.physics, True)
        positions.append(camera._position.copy())
        assert abs(camera._roll) <= np.pi / 2 * 0.2 + 1e-12
    positions = np.stack(positions)
    assert (positions >= camera._low - 1e-9).all() and (positions <= camera._high + 1e-9).all()
    assert (np.ptp(positions, 0) > 1e-3).all() == dynamic
    assert (np.ptp(positions, 0) < 1e-9).all() != dynamic


@pytest.mark.parametrize("look", [distracting_cs.look_at_level, distracting_cs.look_at])
@given(seed=st.integers(0, 2**32 - 1))
def test_camera_rotations_look_along_the_direction(look, seed):
    direction = np.random.default_rng(seed).normal(size=3)
    rotation = look(direction)
    tolerance = 1e-9 if look is distracting_cs.look_at_level else 1e-2  # its axis is slightly shorter than 1
    np.testing.assert_allclose(rotation @ [0, 0, -1], direction / np.linalg.norm(direction), atol=tolerance)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=2 * tolerance)


def test_spherical_coordinates_are_inverted():
    points = np.random.default_rng(0).normal(size=(20, 3))
    for point in points:
        np.testing.assert_allclose(distracting_cs.from_sphere(distracting_cs.to_sphere(point)), point, atol=1e-12)


def test_the_background_plays_back_and_forth():
    env = make("cheetah_run_distracting_cs", action_repeat=2).unwrapped
    background = env._distraction.parts[0]
    env.reset()
    indices = []
    for _ in range(12):
        env.step(np.zeros(6))
        indices.append(int(background._index))
    assert set(indices) == {0, 1, 2}
    assert all(abs(a - b) <= 1 for a, b in zip(indices, indices[1:], strict=False))


@pytest.fixture
def quick():
    """An environment that uploads only the mipmap levels of its sky that 64 x 64 pixels sample."""
    env = make("cartpole_balance_distracting_cs", size=(64, 64), distracting_cs_intensity=0.5).unwrapped
    env.reset()
    if not env._distraction.parts[0]._quick:
        pytest.skip("this OpenGL driver averages the levels of a texture in its own way")
    return env


def test_uploading_some_mipmap_levels_gives_the_same_images(quick, monkeypatch):
    monkeypatch.setattr(distracting_cs, "small_levels_suffice", lambda physics: False)
    whole = make("cartpole_balance_distracting_cs", size=(64, 64), distracting_cs_intensity=0.5).unwrapped
    whole.reset()
    assert not whole._distraction.parts[0]._quick
    pictures = frames(quick, 6), frames(whole, 6)
    assert len({picture.tobytes() for picture in pictures[0]}) == 7
    np.testing.assert_array_equal(*pictures)
    quick._env.physics._free_rendering_contexts()
    quick._distraction.parts[0].show(quick._env.physics)
    np.testing.assert_array_equal(quick._camera.render(), pictures[0][-1])


def test_small_images_sample_no_other_mipmap_levels(quick):
    physics, rng = quick._env.physics, np.random.default_rng(0)
    texture = int(physics.contexts.mujoco.ptr.texture[distracting_cs.SKY])

    def paint(level):
        from OpenGL import GL

        edge = distracting_cs.SKY_EDGE >> level
        white = np.full((edge, edge, 4), 255, np.uint8)
        GL.glBindTexture(GL.GL_TEXTURE_CUBE_MAP, texture)
        for face in range(GL.GL_TEXTURE_CUBE_MAP_POSITIVE_X, GL.GL_TEXTURE_CUBE_MAP_POSITIVE_X + 6):
            GL.glTexSubImage2D(face, level, 0, 0, edge, edge, GL.GL_RGBA, GL.GL_UNSIGNED_BYTE, white)

    def look_around():
        pictures = []
        for rotation in rotations:
            physics.data.cam_xmat[0] = rotation.reshape(-1)
            pictures.append(quick._camera.render().copy())
        return np.stack(pictures)

    rotations = np.linalg.qr(rng.normal(size=(10, 3, 3)))[0]
    before = look_around()
    for level in (0, distracting_cs.LEVELS + 1, distracting_cs.LEVELS + 2):
        call_gl(physics, paint, level)
    np.testing.assert_array_equal(look_around(), before)
    call_gl(physics, paint, 3)
    assert (look_around() != before).any((1, 2, 3)).all()


@pytest.mark.parametrize("edge, suffice", [(64, True), (32, False), (128, False)])
def test_other_sizes_need_other_mipmap_levels(edge, suffice):
    env = make("walker_stand_distracting_cs", size=(edge, edge)).unwrapped
    assert distracting_cs.small_levels_suffice(env._env.physics) == suffice


@pytest.mark.parametrize("dynamic", [True, False])
def test_material_colours_stay_near_the_original(dynamic):
    env = make("finger_spin_distracting_cs", distracting_cs_intensity=0.3, distracting_cs_dynamic=dynamic).unwrapped
    model = env._env.physics.model
    original = model.mat_rgba[:, :3].copy()
    env.reset()
    seen = [model.mat_rgba[:, :3].copy()]
    for _ in range(10):
        env.step(np.zeros(2))
        seen.append(model.mat_rgba[:, :3].copy())
    assert np.abs(np.stack(seen) - original).max() <= 0.3 + 1e-6
    assert (np.ptp(np.stack(seen), 0) > 0).any() == dynamic


@pytest.mark.parametrize(
    "task, options, message",
    [
        ("hopper_hop_sensor_cs", {}, "there is ball_in_cup"),
        ("walker_stand_sensor_cs", {"distracting_cs_intensity": 0.12}, "use 0.025"),
    ],
)
def test_settings_outside_the_benchmark_are_rejected(task, options, message):
    with pytest.raises(envs.EnvError, match=message):
        envs.prepare(f"dmc_{task}", **options)
