"""ManiSkill2 in the real simulator with generated rooms; models that need a download are replaced by boxes."""

import gzip
import json
import math
import platform
import subprocess
import sys

import cv2
import numpy as np
import pytest

import dreamer
import envs
import hrssm
from envs import maniskill, realistic_maniskill
from setup import download
from tests.helpers import SMALL

# Where there is a wheel, the tests run or fail; they are not skipped for lack of Vulkan.
pytestmark = pytest.mark.skipif(
    sys.version_info[:2] != (3, 11) or (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="SAPIEN 2 has wheels for Python 3.11 on x86-64 Linux only",
)
CUBES = ("push_cube", "lift_cube", "pick_cube")
NO_DOWNLOAD = (*CUBES, "peg_insertion_side", "plug_charger")
SIZE = (32, 32)


@pytest.fixture(scope="session")
def rooms(tmp_path_factory):
    """A folder of three generated rooms, marked as generated."""
    folder = tmp_path_factory.mktemp("rooms")
    for i in range(3):
        download.write_room(folder / f"room{i}.glb", np.random.default_rng(i))
    return folder


@pytest.fixture(autouse=True)
def no_assets(tmp_path, monkeypatch):
    monkeypatch.setenv("HRSSM_ASSETS", str(tmp_path / "assets"))
    monkeypatch.setattr(realistic_maniskill.assets, "CACHE", str(tmp_path / "cache"))


@pytest.fixture
def make(rooms):
    made = []

    def make(task, **options):
        options = {"scene_files": str(rooms), "size": SIZE, "action_repeat": 1, "time_limit": 100} | options
        made.append(envs.make(task, **options))
        return made[-1]

    yield make
    for env in made:
        env.close()


def simulator(env):
    return env.unwrapped._env


def grasp_and_lift(t: int) -> np.ndarray:
    """Close the gripper, then move up, in the hand's frame (its z axis points down)."""
    action = np.zeros(7, np.float32)
    action[6] = -1.0
    if t >= 6:
        action[:3] = 0.05 * math.sin(t), 0.0, -0.35
    return action


@pytest.mark.parametrize("task", NO_DOWNLOAD)
def test_a_full_episode(make, task):
    env = make(f"rms_{task}")
    observation, info = env.reset(seed=0)
    assert list(observation) == ["image"] and env.observation_space.contains(observation)
    assert observation["image"].shape == (*SIZE, 3) and observation["image"].std() > 10
    assert env.action_space.shape == (7,)
    rewards, first = [], observation["image"]
    for t in range(100):
        observation, reward, terminated, truncated, info = env.step(grasp_and_lift(t))
        assert env.observation_space.contains(observation)
        assert not terminated and truncated == (t == 99) and info["success"] in (0.0, 1.0)
        rewards.append(reward)
    assert np.isfinite(rewards).all() and np.ptp(rewards) > 0
    assert np.abs(observation["image"].astype(int) - first).max() > 50  # the robot moves in the image
    if task in CUBES:
        assert rewards[0] == pytest.approx(1.0, abs=1e-3) and 1.85 < max(rewards[:6]) < 2.0
    if task == "lift_cube":
        assert max(rewards) > 5
    picture = env.render()
    assert picture.shape == (256, 256, 3) and picture.dtype == np.uint8 and picture.std() > 10


def by_hand(task: str, cube, tcp, fingers: float, grasped: bool) -> float:
    """The reward of the public research code, written again with plain numbers."""

    def linear(x, bound, margin):
        return 1.0 if x <= bound else max(0.0, 1.0 - 0.9 * (x - bound) / margin)

    reach = math.dist(cube, tcp)
    margin = math.sqrt(0.615**2 + 0.03**2)
    reward = 1.0 if reach <= 0.02 else 1.0 / (1.0 + 9.0 * ((reach - 0.02) / margin) ** 2)
    if reach < 0.02:
        reward += 0.5 * linear(fingers, 0.04, 0.02)
    if grasped and task == "push_cube":
        reward += 5 * linear(math.dist(cube, (0.2, 0.2, 0.0)), 0.025, math.sqrt(0.04 + 0.04 + 0.0004))
    elif grasped:
        height = abs(0.3 - cube[2])
        reward += 5 * linear(height, 0.025, 0.28)
        if task == "pick_cube" and height < 0.025:
            reward += 5 * linear(math.dist(cube[:2], (0.1, 0.0)), 0.025, 0.1)
    return reward


@pytest.mark.parametrize("task", CUBES)
def test_rewards_match_the_formula(make, task):
    env = simulator(make(f"rms_{task}"))
    env.reset(seed=0)
    rewards, rng = [], np.random.default_rng(0)
    for t in range(120):
        action = grasp_and_lift(t) if t < 80 else rng.uniform(-1, 1, 7).astype(np.float32)
        reward = env.step(action)[1]
        fingers = math.dist(env.agent.finger1_link.pose.p, env.agent.finger2_link.pose.p)
        grasped = env.agent.check_grasp(env.obj, max_angle=30)
        expected = by_hand(task, env.obj.pose.p.tolist(), env.tcp.pose.p.tolist(), fingers, grasped)
        assert reward == pytest.approx(expected, abs=1e-6)
        rewards.append(reward)
    # Close, grasped and away; lifting is rewarded in two tasks, and the position at the goal's height in pick_cube.
    assert min(rewards) < 0.9
    assert max(rewards) > {"push_cube": 1.85, "lift_cube": 5.9, "pick_cube": 7.0}[task]


def test_every_term_of_the_reward():
    from envs import maniskill_tasks

    rng = np.random.default_rng(0)
    for task in CUBES:
        for _ in range(300):
            goal = np.array(maniskill_tasks.GOALS[task])
            cube = goal + rng.normal(size=3) * rng.choice([0.01, 0.1, 0.5])
            tcp = cube + rng.normal(size=3) * rng.choice([0.005, 0.3])
            state = cube, tcp, rng.uniform(0.03, 0.08), bool(rng.integers(2))
            assert maniskill_tasks.cube_reward(task, *state) == pytest.approx(by_hand(task, *state))
        at_goal = maniskill_tasks.cube_reward(task, goal, goal, 0.04, True)
        assert at_goal == {"push_cube": 6.5, "lift_cube": 6.5, "pick_cube": 11.5}[task]


def rollout(env, seed: int):
    observations, states = [env.reset(seed=seed)[0]["image"]], [simulator(env).get_state()]
    for _ in range(4):
        observations.append(env.step(np.full(7, 0.3))[0]["image"])
        states.append(simulator(env).get_state())
    return np.stack(observations), np.stack(states)


def test_equal_seeds_give_equal_states_and_frames(make):
    frames, states = rollout(make("rms_peg_insertion_side"), 3)
    env = make("rms_peg_insertion_side")
    env.reset(seed=1)
    same_frames, same_states = rollout(env, 3)
    np.testing.assert_array_equal(frames, same_frames)
    np.testing.assert_array_equal(states, same_states)
    other_frames, other_states = rollout(env, 4)
    assert not np.array_equal(frames, other_frames) and not np.array_equal(states, other_states)


def test_rooms_change_the_image_and_nothing_else(make, rooms):
    env = make("rms_lift_cube")
    runs = [rollout(env, seed) for seed in range(5)]
    assert all(np.array_equal(states, runs[0][1]) for _, states in runs)
    distinct = {frames[0].tobytes() for frames, _ in runs}
    assert 2 <= len(distinct) <= 3
    bare = make("rms_lift_cube")
    bare.unwrapped._scenes = []
    frames, states = rollout(bare, 0)
    assert np.array_equal(states, runs[0][1])
    # Without a room the ground is invisible too: pixels other than robot and cube are empty.
    assert (frames[0].max(-1) == 0).mean() > 0.5 > 0.05 > (runs[0][0][0].max(-1) == 0).mean()


def test_actions_are_clipped_and_checked(make):
    env = make("rms_lift_cube")
    with pytest.raises(RuntimeError, match="needs reset"):
        env.unwrapped.step(np.zeros(7))
    env.reset(seed=0)
    with pytest.raises(ValueError, match="not finite"):
        env.step(np.full(7, np.nan))
    wild = env.step(np.full(7, -9.0))[0]["image"]
    env.reset(seed=0)
    np.testing.assert_array_equal(env.step(np.full(7, -1.0))[0]["image"], wild)


def test_a_worker_and_this_process_agree(rooms):
    frames = []
    for parallel in (False, True):
        options = {"action_repeat": 1, "size": SIZE, "scene_files": str(rooms)}
        vec = envs.make_vector("rms_plug_charger", 1, seed=0, stream="train", parallel=parallel, **options)
        try:
            reset = vec.reset(np.ones(1, bool))["image"]
            step, _, _, info = vec.step(np.full((1, 7), 0.5, np.float32))
            assert vec.render_mode == "rgb_array" and info["success"].shape == (1,)
            frames.append((reset, step["image"], vec.render(0)))
            if not parallel:
                state = vec.state_dict(np.ones(1, bool))
            else:  # after replaying the actions, the other environment is in the same state
                vec.reset(np.ones(1, bool))
                assert vec.load_state_dict(state).all()
                np.testing.assert_array_equal(vec.observations()["image"], step["image"])
        finally:
            vec.close()
    for one, other in zip(*frames, strict=True):
        np.testing.assert_array_equal(one, other)


def test_ground_truth_and_camera_of_the_plain_tasks(make):
    env = make("ms_LiftCube-v0")
    truth, _ = env.reset(seed=0)
    assert list(truth) == ["state"] and truth["state"].dtype == np.float32
    env = make("ms_lift_cube_rgbd")
    seen, _ = env.reset(seed=0)
    assert {key: value.shape[:2] for key, value in seen.items() if key != "state"} == {"image": SIZE, "depth": SIZE}
    assert 0.1 < seen["depth"].max() < 10 and seen["image"].std() > 5
    assert len(seen["state"]) < len(truth["state"])  # the position of the cube is in the image only
    assert env.observation_space.contains(env.step(np.zeros(7))[0])


# --- stand-ins for models that need a download ------------------------------------------------------------------------

FAUCET = """<robot name="faucet">
<link name="base"/>
<link name="link_0"><visual>{0}</visual><collision>{0}</collision></link>
<link name="link_1"><visual>{1}</visual><collision>{1}</collision></link>
<joint name="joint_0" type="fixed"><parent link="base"/><child link="link_0"/></joint>
<joint name="joint_1" type="revolute"><origin xyz="0 0 0.6"/><axis xyz="0 0 1"/><parent link="link_0"/>
<child link="link_1"/><limit lower="0" upper="1.57" effort="1" velocity="1"/></joint>
</robot>"""


def write_models(folder):
    """A faucet, a kit with one object, and an episode with two obstacles, all made of boxes."""
    import trimesh

    box = '<origin xyz="0 0 {}"/><geometry><box size="{}"/></geometry>'
    faucet = folder / "partnet_mobility/dataset/5021"
    faucet.mkdir(parents=True)
    maniskill.import_mani_skill()
    from mani_skill2 import PACKAGE_ASSET_DIR

    meta = json.loads((PACKAGE_ASSET_DIR / "partnet_mobility/meta/info_faucet_train.json").read_text())["5021"]
    switch = next(name for name, _, kind in meta["semantics"] if kind == "switch")
    text = FAUCET.format(box.format(0.3, "0.2 0.2 0.6"), box.format(0.1, "0.5 0.1 0.1"))
    (faucet / "mobility_cvx.urdf").write_text(text.replace("link_1", "X").replace("link_0", "Y").replace("X", switch))

    kits = folder / "assembling_kits"
    for path, size in {
        "kits/0": (0.3, 0.3, 0.02),
        "models/collision/00": (0.5,) * 3,
        "models/visual/00": (0.5,) * 3,
    }.items():
        (kits / path).parent.mkdir(parents=True, exist_ok=True)
        trimesh.creation.box(size).export(kits / f"{path}.obj")
    (kits / "kits/0.json").write_text(json.dumps({"objects": [{"object_id": 0, "pos": [0, 0, 0.04], "rot": 0}]}))
    episode = {"kit": 0, "spawn_pos": [0.1, 0.2, 0.05], "obj_to_place": 0, "obj_in_place": []}
    config = {"symmetry": [6.28], "color": [[1, 0, 0, 1]], "object_scale": [0.1] * 3}
    (kits / "episodes.json").write_text(json.dumps({"config": config, "episodes": [episode]}))

    (folder / "avoid_obstacles").mkdir()
    obstacle = {"half_size": [0.05] * 3}
    episode = {
        "obstacles": [obstacle | {"pose": [0.5, y, 0.5, 1, 0, 0, 0]} for y in (-0.3, 0.3)],
        "start_qpos": [0, 0.4, 0, -2, 0, 2.4, 0.8, 0.04, 0.04],
        "end_pose": [0.5, 0, 0.4, 0, 1, 0, 0],
    }
    with gzip.open(folder / "avoid_obstacles/panda_train_2k.json.gz", "wt") as file:
        json.dump([episode], file)


@pytest.mark.parametrize("task", ["turn_faucet", "assembling_kits", "panda_avoid_obstacles"])
def test_tasks_with_models_run_on_stand_ins(make, tmp_path, task):
    write_models(tmp_path / "assets/maniskill")
    env = make(f"rms_{task}")
    env.reset(seed=0)
    for _ in range(3):
        observation, reward, terminated, _, info = env.step(np.zeros(7))
        assert env.observation_space.contains(observation) and np.isfinite(reward) and not terminated
        assert info["success"] == 0.0
    if task == "turn_faucet":
        np.testing.assert_allclose(simulator(env).faucet.pose.p, [0.1, 0, 0], atol=1e-6)


def test_downloads_from_local_folders(rooms, tmp_path, monkeypatch, capfd):
    write_models(tmp_path / "models")
    assert download.main(["maniskill", "--from", str(tmp_path / "models")]) == 0
    assert all(
        realistic_maniskill.assets.find("maniskill", path) for path in realistic_maniskill.MODELS.values() if path
    )
    asked = []
    monkeypatch.setattr(download.subprocess, "run", lambda command, **_: asked.append(command[-1]) or broken)
    broken = subprocess.CompletedProcess([], 1)
    assert download.main(["maniskill"]) == 0 and asked == []  # nothing is missing
    (tmp_path / "assets/maniskill/avoid_obstacles/panda_train_2k.json.gz").unlink()
    assert download.main(["maniskill"]) == 2 and asked == ["panda_avoid_obstacles"]
    assert "error: ManiSkill2's downloader failed" in capfd.readouterr().err

    assert download.main(["matterport", "--from", str(rooms)]) == 0
    assert len(realistic_maniskill.find_scenes("nowhere")) == 3
    assert download.main(["matterport"]) == 2 and download.main(["matterport", "--from", str(tmp_path / "no")]) == 2


# --- error messages ---------------------------------------------------------------------------------------------------


def one_line(match: str, call) -> None:
    with pytest.raises(envs.EnvError, match=match) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("task", [task for task, models in realistic_maniskill.MODELS.items() if models])
def test_missing_models(make, task):
    one_line("get it with python setup/download.py maniskill", lambda: make(f"rms_{task}"))


def test_missing_models_of_a_plain_task(make):
    one_line(
        "MS2_ASSET_DIR=.* python -m mani_skill2.utils.download_asset PickSingleYCB-v0",
        lambda: make("ms_pick_single_ycb"),
    )


def test_missing_scenes(make):
    one_line(
        "no scene matches nowhere/.*--scene_files.*setup/download.py demo",
        lambda: make("rms_lift_cube", scene_files="nowhere/*.glb"),
    )


def test_generated_rooms_cause_a_warning(rooms, tmp_path):
    (tmp_path / "assets/matterport").mkdir(parents=True)
    (tmp_path / "assets/matterport/GENERATED").touch()
    (tmp_path / "assets/matterport/a.glb").touch()
    with pytest.warns(UserWarning, match="generated rooms"):
        assert len(realistic_maniskill.find_scenes("nowhere/*.glb")) == 1
    assert len(realistic_maniskill.find_scenes(str(rooms))) == 3


def test_another_python(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 12, 1))
    one_line(r"need Python 3.11.*this is 3.12.*PYTHON=python3.11 setup/run.sh", maniskill.check_simulator.__wrapped__)


def test_not_installed(monkeypatch):
    monkeypatch.setattr(maniskill.importlib.util, "find_spec", lambda name: None)
    one_line("mani_skill2 and sapien not installed.*setup/run.sh", maniskill.check_simulator.__wrapped__)


def test_no_vulkan(monkeypatch, tmp_path):
    monkeypatch.setenv("VK_ICD_FILENAMES", str(tmp_path / "none.json"))
    monkeypatch.setenv("VK_DRIVER_FILES", str(tmp_path / "none.json"))
    one_line(
        r"SAPIEN finds no Vulkan device \(Vulkan is incompatible.*setup/vulkan/install.sh",
        maniskill.check_simulator.__wrapped__,
    )


@pytest.mark.parametrize(
    "task, message",
    [
        ("rms_lift_cub", "did you mean 'rms_lift_cube'"),
        ("rms_lift_cube_video", "did you mean 'rms_lift_cube'"),
        ("ms_stack_cubes", "did you mean 'ms_stack_cube'"),
    ],
)
def test_unknown_names(task, message):
    one_line(message, lambda: envs.parse_task(task))


def test_names():
    assert envs.parse_task("ms_PegInsertionSide-v0_rgbd") == ("ms", "peg_insertion_side", "", "rgbd")
    assert envs.parse_task("rms_plug_charger") == ("rms", "plug_charger", "", "")
    assert {f"rms_{task}" for task in realistic_maniskill.MODELS} - {"rms_pick_cube"} == hrssm.REWARD_MAX.keys()


def test_task_table_matches_the_package():
    maniskill.import_mani_skill()
    from mani_skill2.utils.registration import REGISTERED_ENVS

    assert set(maniskill.TASKS.values()) == set(REGISTERED_ENVS)


# --- training --------------------------------------------------------------------------------------------------------


def test_the_command_trains(rooms, tmp_path):
    argv = f"--configs realistic_maniskill tiny --task rms_lift_cube --scene_files {rooms} --logdir {tmp_path}/log"
    argv += (
        " --envs 1 --parallel False --action_repeat 1 --time_limit 6 --steps 12 --prefill 6 --eval_every 6 --pretrain 1"
    )
    argv += " --eval_episode_num 1 --train_ratio 8 --dataset_size 1000"
    assert dreamer.main([*argv.split(), *SMALL.split()]) == 0
    rows = [json.loads(line) for line in (tmp_path / "log/metrics.jsonl").read_text().splitlines()]
    assert [row["eval/success"] for row in rows if "eval/success" in row] == [0.0, 0.0]
    video = cv2.VideoCapture(str(sorted((tmp_path / "log/video").glob("eval_policy_*.mp4"))[0]))
    assert video.read()[1].shape == (256, 256, 3)
