"""The robustness report: its numbers against naive loops, its pictures against real simulators, the command."""

import csv
import itertools

import numpy as np
import pytest
import torch

import dreamer
import envs
import models
import tools
from envs import paired
from envs.dmc import check_rendering
from figures import robustness
from tests.helpers import SMALL

TASK = "dmc_cartpole_balance_video"
SHORT = f"{SMALL} --task {TASK} --img_source color --size 32,32 --time_limit 16 --envs 1 --parallel False".split()


def make_agent(*argv: str):
    config = tools.load_config([*SHORT, *argv])
    env = envs.make(config.task, **dreamer.env_options(config))
    torch.manual_seed(0)
    agent = dreamer.make_agent(config, env.observation_space, env.action_space)
    env.close()
    return agent, config


@pytest.fixture(scope="module")
def rendered():
    check_rendering()
    config = tools.load_config(SHORT)
    return paired.render(TASK, dreamer.env_options(config), draws=3, episodes=2, steps=5)


def test_denoising_factor_against_its_definition():
    latent = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points = list(itertools.product(range(3), range(4)))
    same, other = [], []
    for (k, s), (j, u) in itertools.product(points, points):
        distance = float((latent[k, s] - latent[j, u]).norm())
        if s != u:
            other.append(distance)
        elif k != j:
            same.append(distance)
    same, other = np.mean(same), np.mean(other)
    assert models.denoising_factor(latent) == pytest.approx(
        {"denoising_factor": (other - same) / (other + same), "same": same, "other": other}
    )


def test_extremes():
    """1 if only the state matters; about 0 for agreement, and below 0 for the factor, if only the draw matters."""
    x = torch.randn(1, 50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    states, draws = x.expand(40, -1, -1), x[:, :40].transpose(0, 1).expand(-1, 50, -1)
    assert models.denoising_factor(states)["denoising_factor"] == pytest.approx(1.0)
    assert models.agreement(states) == pytest.approx(1.0)
    assert models.denoising_factor(draws)["denoising_factor"] < 0
    assert abs(models.agreement(draws)) < 0.05


def test_one_state_many_distractions(rendered):
    obs, actions = rendered
    assert obs["image"].shape == (3, 2, 5, 32, 32, 3) and actions.shape == (2, 5, 1)
    for key in ("position", "velocity"):
        assert (obs[key] == obs[key][:1]).all() and not (obs[key][:, :, 0] == obs[key][:, :, -1]).all()
        assert not (obs[key][:, 0] == obs[key][:, 1]).all(), "both episodes start alike"
    for a, b in itertools.combinations(range(3), 2):
        assert not (obs["image"][a] == obs["image"][b]).all()
    moved = dict(obs, position=obs["position"] + 1)
    with pytest.raises(RuntimeError, match="position differs"):
        envs.check_same_state(moved, obs)


def test_an_agent_that_sees_no_picture_is_perfectly_robust(rendered):
    vectors, _ = make_agent("--encoder.mlp_keys", ".*", "--encoder.cnn_keys", "$^")
    pixels, _ = make_agent()
    for agent in (vectors, pixels):
        torch.nn.init.normal_(agent.actor_critic.critic.out.weight)  # it starts with zeros
    before = torch.get_rng_state()
    blind, seeing = (models.measure_robustness(a.world_model, a.actor_critic, *rendered) for a in (vectors, pixels))
    assert torch.equal(before, torch.get_rng_state())
    assert [blind[name] for name in models.ROBUSTNESS] == pytest.approx([1.0] * 3)
    assert all(seeing[name] < 0.99 for name in models.ROBUSTNESS)


def test_command(tmp_path, capsys, monkeypatch):
    agent, config = make_agent()
    tools.save_config(config, tmp_path, [])
    tools.save_checkpoint(tmp_path / "latest.pt", {"agent": agent.state_dict()})
    out = tmp_path / "found.png"
    small = ["--draws", "2", "--steps", "3", "--episodes", "1", "--out", str(out)]
    assert robustness.main([str(tmp_path), *small]) == 0, capsys.readouterr().err
    with open(tmp_path / "found.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["task"]) for row in rows] == [
        (str(tmp_path), "dmc_cartpole_balance"),
        (str(tmp_path), TASK),
        (f"{tmp_path} untrained", TASK),
    ]
    # The weights are those of the same seed, so that both rows must agree but for the return.
    assert [rows[1][name] for name in models.ROBUSTNESS[:2]] == [rows[2][name] for name in models.ROBUSTNESS[:2]]
    assert float(rows[1]["of_clean"]) == pytest.approx(float(rows[1]["return"]) / float(rows[0]["return"]))
    assert out.stat().st_size > 1000
    assert "denoising_factor" in capsys.readouterr().out
    for argv, hint in {
        (str(tmp_path / "no"),): "holds no run with a checkpoint",
        (str(tmp_path), "--task", "dmc_walker_stand_video"): "give variants of dmc_cartpole_balance",
        (str(tmp_path), "--draws", "1"): "--draws and --steps take at least 2",
    }.items():
        assert robustness.main([*argv, "--out", str(out)]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and hint in err and len(err.splitlines()) == 1
