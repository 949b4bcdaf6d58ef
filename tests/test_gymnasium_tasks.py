"""Any gymnasium environment as a task: spaces, actions, images, episode ends, seeds and errors."""

import importlib.util
import os
import subprocess
import sys

import gymnasium
import numpy as np
import pytest

import envs
from envs.gymnasium_tasks import GymnasiumTask
from tests.helpers import ROOT, SMALL


class Odd(gymnasium.Env):
    """Unequal and missing bounds, a matrix of actions, a Dict with an image, and episodes of three steps."""

    metadata = {"render_modes": ["rgb_array"]}
    action_space = gymnasium.spaces.Box(
        np.array([[0, -10], [-np.inf, -1]], np.float32), np.array([[1, 30], [np.inf, 1]], np.float32)
    )
    observation_space = gymnasium.spaces.Dict(
        {
            "place": gymnasium.spaces.Discrete(3, start=1),
            "camera": gymnasium.spaces.Box(0, 255, (20, 30, 1), np.uint8),
            "pose": gymnasium.spaces.Box(-1, 1, (2, 2), np.float64),
        }
    )
    ends = (True, False)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def observe(self):
        return {"place": 2, "camera": np.full((20, 30, 1), 70, np.uint8), "pose": np.eye(2) * self.start}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.start = 0, self.np_random.uniform()
        return self.observe(), {}

    def step(self, action):
        self.t, self.action = self.t + 1, action
        end = self.ends if self.t == 3 else (False, False)
        return self.observe(), 1.0, *end, {"is_success": self.t == 3}

    def render(self):
        picture = np.zeros((100, 200, 3), np.uint8)
        picture[:, 100:] = 255, 0, 0  # the right half is red
        return picture


class Buttons(Odd):
    action_space = gymnasium.spaces.Discrete(4, start=-1)
    observation_space = gymnasium.spaces.Box(0, 255, (20, 30, 3), np.uint8)
    ends = (False, True)

    def observe(self):
        return np.full((20, 30, 3), (1, 2, 3), np.uint8)


class Silent(Odd):
    """Does not render."""

    def render(self):
        return None


class Taken(Odd):
    observation_space = gymnasium.spaces.Dict({"reward": gymnasium.spaces.Box(-1, 1, (1,))})


class Floats(Odd):
    observation_space = gymnasium.spaces.Dict({"image": gymnasium.spaces.Box(0.0, 1.0, (8, 8, 3))})


class Words(Odd):
    action_space = gymnasium.spaces.Text(3)


@pytest.fixture(autouse=True, scope="module")
def registered():
    for env in (Odd, Buttons, Silent, Taken, Words, Floats):
        gymnasium.register(f"Test{env.__name__}-v0", env)
    yield
    for env in (Odd, Buttons, Silent, Taken, Words, Floats):
        del gymnasium.registry[f"Test{env.__name__}-v0"]


def test_observations_are_flattened_images_scaled_and_the_rendering_added():
    env = GymnasiumTask("TestOdd-v0", size=(10, 16))
    observation, _ = env.reset()
    assert env.observation_space.contains(observation)
    np.testing.assert_array_equal(observation["place"], [0, 1, 0])
    assert observation["pose"].shape == (4,)
    np.testing.assert_array_equal(observation["camera"], np.full((10, 16, 1), 70))
    np.testing.assert_array_equal(observation["image"][:, :8], np.zeros((10, 8, 3)))
    np.testing.assert_array_equal(observation["image"][:, 8:], np.broadcast_to([255, 0, 0], (10, 8, 3)))


def test_actions_are_mapped_to_the_bounds():
    env = GymnasiumTask("TestOdd-v0")
    env.reset()
    inner = env.inner.unwrapped
    assert env.action_space == gymnasium.spaces.Box(-1.0, 1.0, (4,), np.float32)
    for action, expected in [([-1] * 4, [[0, -10], [-1, -1]]), ([1, 0.5, 0.3, 7], [[1, 20], [0.3, 1]])]:
        env.step(np.array(action, np.float32))
        np.testing.assert_allclose(inner.action, expected, rtol=1e-6)
        assert inner.action.dtype == np.float32
    with pytest.raises(ValueError, match="not finite"):
        env.step(np.full(4, np.nan, np.float32))


@pytest.mark.parametrize("name, ends", [("Odd", (True, False)), ("Buttons", (False, True))])
def test_episode_ends_rewards_and_success_with_repeated_actions(name, ends):
    env = envs.make(f"gym_Test{name}-v0", action_repeat=2)
    env.reset()
    outcomes = [env.step(env.action_space.sample())[1:] for _ in range(2)]
    assert outcomes == [(2.0, False, False, {"success": 0.0}), (1.0, *ends, {"success": 1.0})]
    with pytest.raises(RuntimeError, match="reset"):
        env.step(env.action_space.sample())


def test_discrete_actions_and_an_image_as_the_only_observation():
    env = GymnasiumTask("TestButtons-v0", size=(8, 8))
    observation, _ = env.reset()
    assert env.action_space == gymnasium.spaces.Discrete(4)
    assert observation.keys() == {"image"}
    np.testing.assert_array_equal(observation["image"], np.broadcast_to([1, 2, 3], (8, 8, 3)))
    env.step(np.int64(3))
    assert env.inner.unwrapped.action == 2


def test_seeds():
    def poses(env, episodes=2, **options):
        return [env.reset(**options)[0]["pose"][0] for _ in range(episodes)]

    one, same, other = (envs.make("gym_TestOdd-v0", seed=seed) for seed in (3, 3, 4))
    first, second = poses(one)
    assert first != second  # the next episode is different
    assert poses(same) == [first, second]
    assert first not in poses(other)
    assert len(set(poses(one, seed=5))) == 1


@pytest.mark.parametrize(
    "task, message",
    {
        "gym_HalfCheeta-v5": "HalfCheetah",
        "gym_HalfCheetah-v99": "v5",
        "gym_no_such_module:X-v0": "no_such_module.*PYTHONPATH",
        "gym_": "unknown task",
        "gym_TestSilent-v0": "renders NoneType",
        "gym_TestTaken-v0": "'reward', a name taken",
        "gym_TestWords-v0": "only Box of floats and Discrete",
        "gym_TestFloats-v0": "observes image as Box.*not uint8",
        "gym_TestOdd-v0?a=[1": "'\\[1' is no value",
        "gym_./my_env:Reach-v0": "unknown task 'gym_./my_env:Reach-v0'.*PYTHONPATH",
    }.items(),
)
def test_unsupported_environments_give_a_one_line_error(task, message):
    with pytest.raises(envs.EnvError, match=message) as error:
        envs.make(task).reset()
    assert "\n" not in str(error.value)


@pytest.mark.skipif(importlib.util.find_spec("pygame") is not None, reason="pygame is there")
def test_a_missing_package_is_named():
    with pytest.raises(envs.EnvError, match="pip install"):
        envs.make("gym_Pendulum-v1").reset()


def test_mujoco_environment_in_workers():
    vec = envs.make_vector("gym_InvertedPendulum-v5", 2, seed=0, stream="train", parallel=True, size=(32, 32))
    try:
        obs = vec.reset(np.ones(2, bool))
        assert obs["image"].shape == (2, 32, 32, 3) and obs["image"].std() > 5
        assert (obs["state"][0] != obs["state"][1]).any()
        while not obs["is_last"].any():
            obs, *_ = vec.step(np.ones((2, 1), np.float32))
        assert obs["is_terminal"].any()  # the robot fell
    finally:
        vec.close()


def test_discrete_actions_train(tmp_path):
    (tmp_path / "buttons.py").write_text(
        "import gymnasium\nfrom tests.test_gymnasium_tasks import Buttons\ngymnasium.register('Press-v0', Buttons)\n"
    )
    options = (
        f"--task gym_buttons:Press-v0 --logdir {tmp_path}/log --actor_dist onehot --imag_gradient reinforce {SMALL}"
    )
    options += " --steps 40 --prefill 8 --eval_every 40 --eval_episode_num 1 --pretrain 1 --train_ratio 1 --envs 1"
    done = subprocess.run(
        [sys.executable, str(ROOT / "dreamer.py"), *options.split(), "--parallel=False", "--dataset_size=1000"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "eval/return 3.0" in done.stdout
