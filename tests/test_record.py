"""Recording episodes: what is written is what was played, and a world model learns from it."""

import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest

import dreamer
import envs
import tools
from envs import EnvError, record
from envs.episodes import find_files, load_episodes, write_episode
from setup import expert
from tests.centre_task import Centre
from tests.helpers import SMALL

CHEETAH = "gym_HalfCheetah-v5?width=32&height=32&camera_name=track"
SHORT = f"--size 16,16 --action_repeat 1 --time_limit 5 --device cpu --threads 1 --task {CHEETAH}"


def make_env(task: str = CHEETAH, **options) -> gymnasium.Env:
    return envs.make(task, size=(16, 16), action_repeat=1, time_limit=5, **options)


def call(folder: Path, *argv: str) -> int:
    return dreamer.main([*SHORT.split(), "--record", str(folder), *argv])


def load(folder: Path) -> list[dict]:
    """In the order of their numbers."""
    return [rows for _, rows in load_episodes(find_files(folder), size=(16, 16))][::-1]


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recorded") / "random"
    assert call(folder, "--record_policy", "random", "--record_episodes", "3") == 0
    return folder


def test_recorder_loader_and_replay_change_nothing(recorded):
    env, found = make_env(), load(recorded)
    replay = tools.Replay(capacity=100, batch_size=1, batch_length=2, num_envs=1, seed=0)
    assert len(found) == 3
    for number, rows in enumerate(found):
        seed = int(np.random.SeedSequence((0, envs.STREAMS.index("record"), number)).generate_state(1)[0])
        live = record.play(env, record.random_policy(env, seed), seed)
        assert live["image"].shape == (6, 16, 16, 3) and live["state"].shape == (6, 17)
        assert equal(rows, {key: live[key] for key in rows}) and live.keys() == rows.keys()
        assert equal(replay.rows(replay.extend(rows)), rows)
        # The action of a row led to its observation: the simulator agrees.
        env.reset(seed=seed)
        for t in range(1, 6):
            observation, reward, *_ = env.step(rows["action"][t])
            assert np.array_equal(observation["image"], rows["image"][t]) and np.float32(reward) == rows["reward"][t]
    env.close()


def test_a_second_call_goes_on_counting(recorded, tmp_path):
    for _ in range(2):
        assert call(tmp_path, "--record_policy", "random", "--record_episodes", "1") == 0
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["episode-000000.npz", "episode-000001.npz"]
    assert all(equal(a, b) for a, b in zip(load(tmp_path), load(recorded), strict=False))


def test_agent_is_trained_on_a_record_and_recorded(recorded, tmp_path, capsys):
    """Its run's options are taken, its weights too; another task of the same robot may be named."""
    argv = [*SHORT.split(), *SMALL.split(), "--patch_size", "4", "--offline_traindir", str(recorded), "--steps", "2"]
    argv += ["--offline_evaldir", str(tmp_path / "long"), "--batch_length", "4", "--eval_every", "2", "--nosimsr"]
    rows = load(recorded)[0]
    write_episode(
        tmp_path / "long",
        {key: np.concatenate([x, x, x]) for key, x in rows.items()}
        | {"is_first": np.arange(18) == 0, "action": np.concatenate([rows["action"]] * 3)},
    )
    assert dreamer.main([*argv, "--logdir", str(tmp_path / "log")]) == 0
    more = ["--record_episodes", "1", "--device", "cpu"]
    assert dreamer.main(["--record", str(tmp_path / "a"), "--logdir", str(tmp_path / "log"), *more]) == 0
    (found,) = load(tmp_path / "a")
    assert found["image"].shape == (6, 16, 16, 3) and np.abs(found["action"][1:]).max() > 0
    assert (
        dreamer.main([*argv, "--record", str(tmp_path / "b"), "--init_from", str(tmp_path / "log/latest.pt"), *more])
        == 0
    )
    assert equal(found, load(tmp_path / "b")[0])
    assert call(tmp_path / "c") == 2 and "--logdir is missing" in capsys.readouterr().err


def test_linear_and_imported_policies(tmp_path, monkeypatch, capsys):
    weight = np.random.default_rng(0).normal(size=(6, 17))
    np.savez(tmp_path / "linear.npz", W=weight, mean=np.full(17, 0.1), std=np.full(17, 2.0))
    assert call(tmp_path / "a", "--record_policy", str(tmp_path / "linear.npz"), "--record_episodes", "1") == 0
    (rows,) = load(tmp_path / "a")
    expected = np.clip((rows["state"][:-1] - 0.1) / 2.0 @ weight.T, -1, 1)
    assert np.allclose(rows["action"][1:], expected, atol=1e-5)
    np.savez(tmp_path / "linear.npz", W=weight[:, 1:], mean=np.zeros(16), std=np.ones(16))
    assert call(tmp_path / "b", "--record_policy", str(tmp_path / "linear.npz")) == 2
    assert "maps 16 numbers to 6 actions, the environment has a state of 17" in capsys.readouterr().err

    source = (
        "import numpy as np\ndef make(task):\n    assert 'Cheetah' in task\n    return lambda obs: np.full(6, 0.25)\n"
    )
    (tmp_path / "my_policy.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert call(tmp_path / "c", "--record_policy", "my_policy:make", "--record_episodes", "1") == 0
    assert (load(tmp_path / "c")[0]["action"][1:] == 0.25).all()
    for name in ("my_policy:absent", "no_such_module:make", "missing.npz"):
        assert call(tmp_path / "d", "--record_policy", name) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_discrete_actions_are_one_hot(tmp_path):
    class Two(gymnasium.Env):
        observation_space = gymnasium.spaces.Dict({"place": gymnasium.spaces.Box(-9, 9, (1,))})
        action_space = gymnasium.spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            self.place = 0
            return {"place": np.array([0.0])}, {}

        def step(self, action):
            self.place += 2 * action - 1
            return {"place": np.array([self.place])}, 1.0, abs(self.place) > 2, False, {}

    rows = record.play(Two(), lambda observation: 1, 0)
    assert rows["action"].tolist() == [[0, 0], [0, 1], [0, 1], [0, 1]]
    assert rows["is_terminal"].tolist() == [False, False, False, True]
    write_episode(tmp_path, rows)
    ((_, found),) = load_episodes(find_files(tmp_path), discrete=True)
    assert equal(found, {key: rows[key] for key in found})


def test_breakout_says_where_its_ball_is(tmp_path):
    """In what the player recorded, the ball's pixels are where the RAM says; the plain game records its RAM."""
    pytest.importorskip("ale_py", reason="Atari games need the package ale-py: pip install ale-py")
    # Quickly, and as large as the game's own pictures: bricks, walls and paddle are left out.
    argv = ["--size", "210,160", "--time_limit", "60", "--actor_dist", "onehot", "--imag_gradient", "reinforce"]
    player = ["--record_policy", "setup.breakout:player", "--task", "gym_setup.breakout:BreakoutBall-v0"]
    assert call(tmp_path / "ball", *argv, *player, "--record_episodes", "2") == 0
    episodes = [rows for _, rows in load_episodes(find_files(tmp_path / "ball"), size=(210, 160), discrete=True)]
    found = 0
    for rows in episodes:
        assert rows["action"][1].argmax() == 1, "it fires at once"
        for picture, ram, (x, y) in zip(rows["image"], rows["ram"], rows["ball"], strict=True):
            assert (x < 0) == (ram[101] == 0)
            bright = np.argwhere((picture[93:188, 8:152] == (200, 72, 72)).all(-1)) + (93, 8)
            if x > 0 and len(bright):
                assert np.abs(bright.mean(0) + 0.5 - (210 * y, 160 * x)).max() < 1.5
                found += 1
    assert found > 60
    assert not np.array_equal(episodes[0]["ram"], episodes[1]["ram"])
    plain = ["--task", "gym_ALE/Breakout-v5?obs_type=ram", "--record_policy", "random", "--record_episodes", "1"]
    assert call(tmp_path / "ram", *argv, *plain) == 0
    ((_, rows),) = load_episodes(find_files(tmp_path / "ram"), size=(210, 160), discrete=True)
    assert rows["state"].shape == (61, 128) and rows["image"].std() > 10


def test_a_missing_atari_package_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "ale_py", None)
    assert call(tmp_path, "--task", "gym_ALE/Breakout-v5?obs_type=ram", "--record_policy", "random") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Atari games need the package ale-py: pip install ale-py" in error


def test_arguments_of_an_environment():
    """The camera of the picture is chosen; what is no argument, or unknown to the environment, is one line."""
    pictures = [
        make_env(task).reset(seed=0)[0]["image"] for task in (CHEETAH, CHEETAH.replace("&camera_name=track", ""))
    ]
    assert not np.array_equal(*pictures)
    for query in ("camera_name", "=3", "no_such=1"):
        with pytest.raises(EnvError, match="is no argument|cannot be built") as caught:
            make_env(f"gym_HalfCheetah-v5?{query}")
        assert "\n" not in str(caught.value)


def test_states_of_a_dataset_are_shown():
    """As live ones if the simulator repeats them, and nearly so from stored states; others are refused."""
    task = make_env().unwrapped
    rng = np.random.default_rng(0)
    actions, live = rng.uniform(-1, 1, (8, 6)).astype(np.float32), []
    states = [task.inner.reset(seed=5)[0]]
    live.append(task.observe(states[0])["image"])
    for action in actions:
        states.append(task.inner.step(action)[0])
        live.append(task.observe(states[-1])["image"])
    states, live = np.stack(states), np.stack(live).astype(int)
    shown = [row["image"] for row in record._repeat(task, states, actions, 5)]
    assert np.array_equal(live, shown)
    assert np.allclose(task.outer_action(actions[0]), actions[0], atol=1e-6)
    with pytest.warns(UserWarning, match="another version of the simulator"):
        rows = record._repeat(task, states + 1e-5 * rng.normal(size=states.shape), actions, 5)
    differences = np.abs(np.stack([row["image"] for row in rows]) - live)
    assert differences.mean() < 0.1 * np.abs(np.diff(live, axis=0)).mean()  # of edges that fall into other pixels
    with pytest.raises(EnvError, match="lead elsewhere here"):
        record._repeat(task, states, actions[::-1], 5)
    with pytest.raises(EnvError, match="do not determine"):
        record._repeat(task, states[:, :9], actions, None)
    task.close()


def test_minari_dataset_is_recorded(tmp_path, monkeypatch):
    """Of the real package, with a dataset of its own recorder."""
    minari = pytest.importorskip("minari", reason="minari is not installed: pip install 'minari[hdf5,create]'")
    pytest.importorskip("jax", reason="recording with minari needs jax")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env = minari.DataCollector(gymnasium.make("HalfCheetah-v5", max_episode_steps=6))
    rng = np.random.default_rng(0)
    for seed in (3, 4):
        env.reset(seed=seed)
        while not env.step(rng.uniform(-1, 1, 6).astype(np.float32))[3]:
            pass
    env.create_dataset("test/cheetah-v0")
    found = list(record.from_minari("test/cheetah-v0", make_env()))
    for rows, episode in zip(found, minari.load_dataset("test/cheetah-v0").iterate_episodes(), strict=True):
        assert np.allclose(rows["state"], episode.observations) and np.allclose(rows["action"][1:], episode.actions)
        assert np.allclose(rows["reward"][1:], episode.rewards) and rows["image"].shape == (7, 16, 16, 3)
    (last,) = record.from_minari("test/cheetah-v0", make_env(), 1)
    assert equal(last, found[1])
    for rows in found:
        write_episode(tmp_path / "data", rows)
    assert all(equal({key: a[key] for key in b}, b) for a, b in zip(found, load(tmp_path / "data"), strict=True))


def test_expert_is_searched(tmp_path, capsys):
    """A pendulum that must be held up: the search beats the policy that does nothing within seconds."""
    out = tmp_path / "expert.npz"
    argv = ["--task", "gym_InvertedPendulum-v5", "--steps", "100", "--directions", "4", "--out", str(out)]
    assert expert.main([*argv, "--minutes", "0.05"]) == 0
    best = float(capsys.readouterr().out.rpartition("return ")[2].split()[0])
    with np.load(out) as file:
        assert file["W"].shape == (1, 4) and file["mean"].shape == file["std"].shape == (4,)
    env = gymnasium.make("InvertedPendulum-v5")
    env.reset(seed=0)
    nothing = expert.play(env, np.zeros((1, 4)), np.zeros(4), np.ones(4), 100, [])
    assert best > 2 * nothing
    assert expert.main([*argv, "--directions", "0"]) == 2 and "at least 1" in capsys.readouterr().err
    assert expert.main(["--task", "dmc_walker_walk"]) == 2 and "only gym_ tasks" in capsys.readouterr().err
    assert expert.main(["--task", "gym_NoSuch-v0"]) == 2 and "unknown task" in capsys.readouterr().err

    class Picture(Centre):
        observation_space = gymnasium.spaces.Box(0, 255, (16, 16, 3), np.uint8)

    gymnasium.register("Picture-v0", Picture)
    assert expert.main(["--task", "gym_Picture-v0"]) == 2 and "needs a vector observation" in capsys.readouterr().err
