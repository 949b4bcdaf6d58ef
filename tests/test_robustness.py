"""Robustness: measures against naive loops, paired observations in real simulators, the command and its picture."""

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


def test_errors_are_jackknife_errors_over_draws(rendered):
    """Against a loop that leaves out one draw at a time; there are none for two draws."""
    agent, _ = make_agent()
    torch.nn.init.normal_(agent.actor_critic.critic.out.weight)
    (obs, actions), networks = rendered, (agent.world_model, agent.actor_critic)
    metrics = models.measure_robustness(*networks, obs, actions)
    left_out = []
    for k in range(3):
        pair = {key: np.delete(value, k, 0) for key, value in obs.items()}
        left_out.append(models.measure_robustness(*networks, pair, actions))
        assert not any(key.endswith("_error") for key in left_out[-1])
    for name in models.ROBUSTNESS:
        values = np.array([numbers[name] for numbers in left_out])
        error = np.sqrt(2 / 3 * ((values - values.mean()) ** 2).sum())
        assert error > 1e-4 and metrics[f"{name}_error"] == pytest.approx(error, rel=1e-3)


def test_extremes():
    """1 if only the state matters; agreement about 0 and factor below 0 if only the draw matters."""
    x = torch.randn(1, 50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    states, draws = x.expand(40, -1, -1), x[:, :40].transpose(0, 1).expand(-1, 50, -1)
    assert models.denoising_factor(states)["denoising_factor"] == pytest.approx(1.0)
    assert models.agreement(states) == pytest.approx(1.0)
    assert models.denoising_factor(draws)["denoising_factor"] < 0
    assert abs(models.agreement(draws)) < 0.05


def test_one_state_under_many_distractions(rendered):
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
        torch.nn.init.normal_(agent.actor_critic.critic.out.weight)  # initialised to zero
    before = torch.get_rng_state()
    blind, seeing = (models.measure_robustness(a.world_model, a.actor_critic, *rendered) for a in (vectors, pixels))
    assert torch.equal(before, torch.get_rng_state())
    assert [blind[name] for name in models.ROBUSTNESS] == pytest.approx([1.0] * 3)
    assert [blind[f"{name}_error"] for name in models.ROBUSTNESS] == pytest.approx([0.0] * 3, abs=1e-6)
    assert all(seeing[name] < 0.99 for name in models.ROBUSTNESS)


def test_picture():
    """Two trained runs and their untrained networks have four styles, and every bar its interval."""
    rows = []
    for run, name in itertools.product(("log/a/0", "log/b/0"), ("", " untrained")):
        numbers = dict.fromkeys(models.ROBUSTNESS, 0.5) | {f"{key}_ci": 0.1 for key in models.ROBUSTNESS}
        rows.append({"run": run + name, "task": TASK} | numbers | {"value_agreement": np.nan})
    figure = robustness.draw(rows, {TASK: np.zeros((4, 32, 32, 3), np.uint8)})
    *_, bars = figure.subfigs[1].axes
    assert len(figure.subfigs[1].axes) == 2  # the value agreement of a constant value is NaN
    styles = {(bar.get_facecolor(), bar.get_hatch()) for bar in bars.patches}
    assert len(styles) == 4 and len(bars.collections) == 4
    labels = [text.get_text() for text in figure.subfigs[1].legends[0].get_texts()]
    assert labels == ["a/0", "a/0, untrained", "b/0", "b/0, untrained"]
    robustness.plot.plt.close(figure)
    assert robustness.short_names(["x/log/full/0"]) == {"x/log/full/0": "full/0"}


def test_command(tmp_path, capsys, monkeypatch):
    agent, config = make_agent()
    tools.save_config(config, tmp_path, [])
    tools.save_checkpoint(tmp_path / "latest.pt", {"agent": agent.state_dict()})
    out = tmp_path / "found.png"
    small = ["--draws", "3", "--steps", "3", "--episodes", "2", "--out", str(out)]
    assert robustness.main([str(tmp_path), *small]) == 0, capsys.readouterr().err
    with open(tmp_path / "found.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["task"]) for row in rows] == [
        (str(tmp_path), "dmc_cartpole_balance"),
        (str(tmp_path), TASK),
        (f"{tmp_path} untrained", TASK),
    ]
    # The weights have the same seed, so both rows agree except for the return.
    assert [rows[1][name] for name in models.ROBUSTNESS[:2]] == [rows[2][name] for name in models.ROBUSTNESS[:2]]
    assert float(rows[1]["of_clean"]) == pytest.approx(float(rows[1]["return"]) / float(rows[0]["return"]))
    assert float(rows[1]["denoising_factor_ci"]) > 0 and float(rows[1]["return_ci"]) >= 0
    assert out.stat().st_size > 1000 and out.with_suffix(".pdf").exists()
    assert "denoising_factor" in capsys.readouterr().out
    for argv, hint in {
        (str(tmp_path / "no"),): "holds no run",
        (str(tmp_path), "--task", "dmc_walker_stand_video"): "give variants of dmc_cartpole_balance",
        (str(tmp_path), "--draws", "1"): "--draws and --steps take at least 2",
        (str(tmp_path), "--out", "x.gif"): "must be one of .png, .pdf, .svg",
    }.items():
        assert robustness.main(["--out", str(out), *argv]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and hint in err and len(err.splitlines()) == 1
