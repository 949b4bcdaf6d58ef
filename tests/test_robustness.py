"""Robustness: measures against naive loops, paired observations in real simulators, the command and its picture."""

import copy
import csv
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dreamer
import envs
import models
import tools
from envs import paired
from envs.dmc import check_rendering
from figures import robustness
from tests.helpers import SMALL

TASK = "dmc_cartpole_balance_video"
SHORT = f"{SMALL} --task {TASK} --img_source color --size 32,32 --time_limit 64 --envs 1 --parallel False".split()
ONCE = torch.ones(1, 4, dtype=torch.float64)  # weights of four episodes


def make_agent(*argv: str):
    config = tools.load_config([*SHORT, *argv])
    env = envs.make(config.task, **dreamer.env_options(config))
    torch.manual_seed(0)
    agent = dreamer.make_agent(config, env.observation_space, env.action_space)
    env.close()
    return agent, config


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def diagnose(agent: dreamer.Agent, episodes: paired.Paired) -> dict[str, models.Estimate]:
    return models.diagnose(agent.world_model, agent.actor_critic, *episodes)


@pytest.fixture(scope="module")
def rendered():
    check_rendering()
    config = tools.load_config(SHORT)
    return paired.render(TASK, dreamer.env_options(config), draws=3, episodes=6, steps=16)


# --- measures -------------------------------------------------------------------------------------------------------


def test_denoising_factor_against_its_definition():
    latent = noise(3, 2, 2, 6)
    points = list(itertools.product(range(3), range(2), range(2)))
    same, other = [], []
    for (k, *s), (j, *u) in itertools.product(points, points):
        distance = float((latent[k, *s] - latent[j, *u]).norm())
        if s != u:
            other.append(distance)
        elif k != j:
            same.append(distance)
    same, other = np.mean(same), np.mean(other)
    assert models.denoising_factor(latent, ONCE[:, :2]).item() == pytest.approx((other - same) / (other + same))


def test_prediction_consistency_against_its_definition():
    """With P in units of the spread of the clean imaginations, and the radius relative to other states."""
    clean, distracted = noise(4, 2, 3, 5), noise(2, 4, 2, 3, 5, seed=1)
    spread = clean.reshape(-1, 5).var(0).sum().sqrt()
    states = list(itertools.product(range(4), range(2)))

    def acpc(z, other):
        return math.sqrt(np.mean([float((z[h] - other[h]).square().sum()) for h in range(3)]))

    pairs = [acpc(clean[s], distracted[k, *s]) for k in range(2) for s in states]
    between = np.mean([acpc(clean[s], clean[u]) for s, u in itertools.product(states, states) if s != u])
    value, radius = models.prediction_consistency(clean, distracted, ONCE)
    assert value.item() == pytest.approx(np.mean(pairs) / float(spread))
    assert radius.item() == pytest.approx(sorted(pairs)[math.ceil(0.95 * len(pairs)) - 1] / between)
    unrelated = models.prediction_consistency(
        noise(40, 2, 3, 50), noise(2, 40, 2, 3, 50, seed=1), torch.ones(1, 40).double()
    )
    assert [x.item() for x in unrelated] == pytest.approx([math.sqrt(2), 1.0], abs=0.15)


def test_a_probe_reads_what_is_linear_in_the_latent_and_nothing_else():
    state, weights = noise(12, 20, 2), torch.ones(1, 12).double()
    readable = torch.cat([state @ noise(2, 6, seed=1), noise(12, 20, 30, seed=2)], -1)[None] * 100.0 + 5.0
    assert models.probe_r2(readable, state, weights).item() > 0.95
    assert models.probe_r2(readable[..., 6:], state, weights).item() < 0.05
    half = torch.cat([readable[..., :6] + 1e3, readable[..., 6:]], -1)
    with_constant = torch.cat([state[..., :1], torch.full_like(state[..., :1], 3.0)], -1)
    assert models.probe_r2(half, with_constant, weights).item() > 0.95  # a constant coordinate does not count


def test_weights_count_episodes():
    """A bootstrap sample is measured like the episodes in it; what occurs twice is no pair of different states."""
    latent, other, x = noise(3, 4, 5, 6), noise(3, 4, 2, 3, 6, seed=1), noise(3, 4, 5, 2, seed=2)
    weights, kept = torch.tensor([[1.0, 0.0, 1.0, 1.0]]).double(), [0, 2, 3]
    twice, drawn = torch.tensor([[2.0, 0.0, 1.0, 1.0]]).double(), [0, 0, 2, 3]

    def measures(episodes, weights):
        yield models.denoising_factor(latent[:, episodes], weights)
        yield from models.prediction_consistency(other[0, episodes], other[1:, episodes], weights)
        yield models.agreement(x[:, episodes], weights)
        yield models.r2(x[:, episodes], latent[0, episodes, :, :2], weights)

    everything = [0, 1, 2, 3]
    assert [m.item() for m in measures(everything, weights)] == pytest.approx(
        [m.item() for m in measures(kept, torch.ones(1, 3).double())]
    )
    for a, b in list(zip(measures(everything, twice), measures(drawn, ONCE), strict=True))[3:]:
        assert a.item() == pytest.approx(b.item())
    # Pairs of different states: within an episode as often as it was drawn, across two as often as they meet.
    times, sums = twice[0], torch.zeros(2, 2).double()  # same and other: sum and number
    states = list(itertools.product(range(4), range(5)))
    for (e, s), (f, t), k, j in itertools.product(states, states, range(3), range(3)):
        if (e, s) != (f, t) or k != j:
            times_seen = times[e] * times[f] if e != f else times[e]
            own = int((e, s) != (f, t))
            sums[own] += times_seen * torch.stack([(latent[k, e, s] - latent[j, f, t]).norm(), torch.tensor(1.0)])
    same, other_state = sums[:, 0] / sums[:, 1]
    expected = (other_state - same) / (other_state + same)
    assert models.denoising_factor(latent, twice).item() == pytest.approx(expected.item())


def test_intervals_cover_the_truth():
    """The agreement of draws with half the variance is 1/2; most intervals from 16 episodes contain it."""
    weights, hits = models.episode_weights(16), 0
    assert (weights.sum(1) == 16).all() and torch.equal(weights, models.episode_weights(16))
    for seed in range(60):
        x = noise(1, 16, 10, 1, seed=seed) + noise(3, 16, 10, 1, seed=1000 + seed)
        found = models.estimate(models.agreement(x, weights))
        assert found.low < found.value < found.high
        hits += found.low < 0.5 < found.high
    assert hits >= 50


def test_extremes():
    """1 if only the state matters; agreement about 0 and factor below 0 if only the draw matters."""
    x, weights = noise(1, 10, 5, 3), torch.ones(1, 10).double()
    states, draws = x.expand(40, -1, -1, -1), x[:, :8].reshape(40, 1, 1, 3).expand(-1, 10, 5, -1)
    assert models.denoising_factor(states[:4], weights).item() == pytest.approx(1.0)
    assert models.agreement(states, weights).item() == pytest.approx(1.0)
    assert models.denoising_factor(draws[:4], weights).item() < 0
    assert abs(models.agreement(draws, weights).item()) < 0.05


def test_rounding_is_no_variation():
    """A constant latent whose rounding happens to depend on the state alone would look perfect."""
    x = 1.0 + 1e-9 * noise(1, 4, 5, 3).expand(3, -1, -1, -1)
    assert models.denoising_factor(x, ONCE).isnan() and models.agreement(x, ONCE).isnan()
    paths = x[:, :, :, None]
    assert all(value.isnan() for value in models.prediction_consistency(paths[0], paths, ONCE))
    assert models.probe_r2(x, noise(4, 5, 3), ONCE) < 0.01


# --- agents ---------------------------------------------------------------------------------------------------------


def test_one_state_under_many_distractions(rendered):
    clean, distracted, actions, rewards = rendered
    assert distracted["image"].shape == (3, 6, 16, 32, 32, 3) and clean["image"].shape == (6, 16, 32, 32, 3)
    assert actions.shape == (6, 16, 1) and (rewards[:, 0] == 0).all() and (rewards[:, 1:] > 0).all()
    for key in ("position", "velocity"):
        values = distracted[key]
        assert (values == clean[key]).all() and not (values[:, :, 0] == values[:, :, -1]).all()
        assert not (values[:, 0] == values[:, 1]).all(), "both episodes start alike"
    for a, b in itertools.combinations([*distracted["image"], clean["image"]], 2):
        assert not (a == b).all()
    moved = dict(distracted, position=distracted["position"] + 1)
    with pytest.raises(RuntimeError, match="position differs"):
        envs.check_same_state(moved, distracted)


def test_an_agent_that_sees_no_picture_is_perfectly_robust(rendered):
    vectors, _ = make_agent("--encoder.mlp_keys", ".*", "--encoder.cnn_keys", "$^")
    pixels, _ = make_agent()
    for agent in (vectors, pixels):
        torch.nn.init.normal_(agent.actor_critic.critic.out.weight)  # initialised to zero
        agent.actor_critic.updates += 1
    before = torch.get_rng_state()
    blind, seeing = (diagnose(agent, rendered) for agent in (vectors, pixels))
    assert torch.equal(before, torch.get_rng_state())
    ideal = {"denoising_factor": 1, "acpc": 0, "invariance_radius": 0, "action_agreement": 1, "value_agreement": 1}
    for name, value in ideal.items():
        assert blind[name] == pytest.approx((value, value, value), abs=1e-5)
        assert abs(seeing[name].value - value) > 0.01 and seeing[name].low < seeing[name].value < seeing[name].high
    assert blind["probe_r2"].value > 0.5 > seeing["probe_r2"].value


def train(agent: dreamer.Agent, episodes: paired.Paired, updates: int) -> None:
    """Learn from distracted episodes; the actor in the last ten updates only."""
    rng, count, steps = np.random.default_rng(0), len(episodes.actions), episodes.actions.shape[1]
    obs = {key: value.reshape(-1, *value.shape[2:]) for key, value in episodes.distracted.items()}
    for update in range(updates):
        rows = rng.choice(len(obs["image"]), 8, replace=False)
        batch = {key: torch.as_tensor(value[rows]) for key, value in obs.items()}
        batch["action"] = torch.as_tensor(episodes.actions[rows % count])
        batch["reward"] = torch.as_tensor(episodes.rewards[rows % count])
        batch["is_first"] = (torch.arange(steps) == 0).repeat(8, 1)
        batch["is_terminal"] = torch.zeros(8, steps, dtype=torch.bool)
        agent.update(batch, behavior=update >= updates - 10)


def test_a_trained_an_untrained_and_a_constant_network(rendered):
    """Trained to know the state from distracted pictures; a network with a constant latent looks good nowhere."""
    method = "--method dreamer --decoder.mlp_keys .* --decoder.cnn_keys $^ --model_lr 2e-3 --encoder.cnn_depth 8"
    trained, config = make_agent(*method.split())
    untrained = copy.deepcopy(trained)
    constant = copy.deepcopy(trained)
    for parameter in constant.world_model.dynamics.parameters():
        parameter.data.zero_()
    train(trained, paired.render(TASK, dreamer.env_options(config), draws=2, episodes=12, steps=16, seed=1), 300)
    constant.actor_critic.updates += 1
    good, random, none = (diagnose(agent, rendered) for agent in (trained, untrained, constant))
    assert good["denoising_factor"].value > random["denoising_factor"].high
    assert (
        good["acpc"].value < random["acpc"].value
        and good["invariance_radius"].value < random["invariance_radius"].value
    )
    assert good["probe_r2"].value > max(0.1, random["probe_r2"].value)
    assert good["reward_r2"].value > random["reward_r2"].value
    assert math.isfinite(good["action_agreement"].value)  # ten updates make no policy
    assert math.isnan(random["action_agreement"].value) and math.isnan(random["value_agreement"].value)
    for name in models.DIAGNOSTICS:
        if name in ("probe_r2", "reward_r2"):
            assert none[name].value < 0.01
        else:
            assert all(map(math.isnan, none[name])), name


@pytest.mark.parametrize("method", dreamer.METHODS)
def test_every_method_is_measured(method, rendered):
    agent, _ = make_agent("--method", method, "--dyn_discrete", "0" if method == "rssm" else "4")
    found = diagnose(agent, rendered)
    assert list(found) == list(models.DIAGNOSTICS)
    undefined = {name for name, estimate in found.items() if math.isnan(estimate.value)}
    assert undefined == {"action_agreement", "value_agreement"}  # no actor is trained
    clean = diagnose(agent, rendered._replace(distracted=None))
    assert list(clean) == ["probe_r2", "reward_r2"] and all(map(math.isfinite, clean["probe_r2"]))


# --- the command ----------------------------------------------------------------------------------------------------


def row(run: str, measure: str, value: float, clips: str = "") -> dict:
    return dict(zip(robustness.COLUMNS, (run, TASK, clips, measure, value, value - 0.1, value + 0.2, 16), strict=True))


def test_picture():
    """Two trained runs and their untrained networks have four styles; what no run has a value of has no axes."""
    runs = [run + name for run in ("log/a/0", "log/b/0") for name in ("", " untrained")]
    rows = [row(run, "acpc", 0.5, clips) for clips in ("seen", "unseen") for run in runs]
    rows += [row(run, "value_agreement", np.nan if "untrained" in run else 0.9) for run in runs]
    rows += [row(run, "action_agreement", np.nan) for run in runs]
    figure = robustness.draw(rows, {"video seen": np.zeros((4, 32, 32, 3), np.uint8)})
    acpc, agreement = figure.subfigs[1].axes
    assert [label.get_text() for label in acpc.get_xticklabels()] == ["video\nseen", "video\nunseen"]
    assert [text.get_text().strip() for text in agreement.texts] == ["undefined"] * 2
    styles = {(bar.get_facecolor(), bar.get_hatch()) for bar in acpc.patches}
    assert len(styles) == 4 and len(acpc.collections) == 4
    ends = acpc.collections[0].get_segments()[0][:, 1]
    assert ends == pytest.approx([0.4, 0.7])
    labels = [text.get_text() for text in figure.subfigs[1].legends[0].get_texts()]
    assert labels == ["a/0", "a/0, untrained", "b/0", "b/0, untrained"]
    robustness.plot.plt.close(figure)
    assert robustness.short_names(["x/log/full/0"]) == {"x/log/full/0": "full/0"}


def test_command(tmp_path, capsys):
    """A dark clip and a bright one, which is held out; runs without and with a trained actor."""
    for level in (20, 140):
        frames = [np.full((64, 64, 3), shade, np.uint8) for shade in range(level, level + 100, 10)]
        tools.save_mp4(tmp_path / f"{level}.mp4", np.stack(frames), 10)
    clips = f"--img_source video --resource_files {tmp_path}/*.mp4 --eval_resource_files {tmp_path}/140.mp4".split()
    agent, config = make_agent(*clips)
    for name in ("offline", "run"):
        (tmp_path / name).mkdir()
        tools.save_config(config, tmp_path / name, [])
        tools.save_checkpoint(tmp_path / name / "latest.pt", {"agent": agent.state_dict()})
        agent.actor_critic.updates += 1
    out = tmp_path / "found.png"
    small = ["--draws", "2", "--trajectories", "3", "--steps", "3", "--episodes", "2", "--out", str(out)]
    runs = [str(tmp_path / name) for name in ("offline", "run")]
    assert robustness.main([*runs, *small, "--player", runs[1]]) == 0, capsys.readouterr().err
    with open(tmp_path / "found.csv") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == robustness.COLUMNS
    found = {(row["run"], row["task"], row["clips"], row["measure"]): row for row in rows}
    assert len(found) == len(rows)
    clean = TASK.removesuffix("_video")
    places = [(clean, ""), (TASK, "seen"), (TASK, "unseen")]
    for run, where in itertools.product([*runs, *(f"{run} untrained" for run in runs)], places):
        measured = {key[3] for key in found if key[:3] == (run, *where)} - {"return"}
        assert measured == ({"probe_r2", "reward_r2"} if where[0] == clean else set(models.DIAGNOSTICS))
    assert [key[:3] for key in found if key[3] == "return"] == [(runs[1], *where) for where in places]
    # The weights of all have the same seed.
    factors = {(key[2], row["value"]) for key, row in found.items() if key[3] == "denoising_factor"}
    assert len(factors) == 2 and len({value for _, value in factors}) == 2
    first = found[runs[1], TASK, "seen", "denoising_factor"]
    assert float(first["low"]) < float(first["value"]) < float(first["high"]) and first["n"] == "3"
    assert out.stat().st_size > 1000 and out.with_suffix(".pdf").exists()
    printed = capsys.readouterr().out
    assert all(f"{name}: {meaning}" in printed for name, meaning in robustness.MEASURES.items())
    assert "undefined: what the measure relates to" in printed
    for argv, hint in {
        (str(tmp_path / "no"),): "holds no run",
        (runs[0], "--task", "dmc_walker_stand_video"): "give variants of dmc_cartpole_balance",
        (runs[0], "--draws", "1"): "--draws and --steps take at least 2",
        (runs[0], "--out", "x.gif"): "must be one of .png, .pdf, .svg",
    }.items():
        assert robustness.main(["--out", str(out), *argv]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and hint in err and len(err.splitlines()) == 1


@given(every=st.integers(1, 90), gaps=st.lists(st.integers(1, 60), min_size=1, max_size=10))
def test_measured_at_the_first_evaluation_and_after_each_multiple(every, gaps):
    """Whatever the distance of evaluations; here a policy step is two frames."""
    config, before = SimpleNamespace(robustness_every=every, action_repeat=2), -1
    for now in np.cumsum(gaps).tolist():
        run = SimpleNamespace(config=config, rank=0, evaluated=before, step=2 * now)
        passed = any(frame % every == 0 for frame in range(2 * before + 1, 2 * now + 1))
        assert dreamer.Run.robustness_due(run) == (passed or before < 0)
        before = now
