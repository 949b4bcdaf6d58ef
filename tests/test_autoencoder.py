"""The autoencoder regimes: what each loss moves and, to the last bit, what it does not; and a world they learn."""

import gymnasium
import numpy as np
import pytest
import torch

import dreamer
import exploration
import models
import tools
from envs.episodes import write_episode
from tests.helpers import SMALL, make_agent, make_batch, make_config

REGIMES = ["internal", "external", "frozen"]
OPTIONS = ["--ae_code", "12", "--ae_batch", "6", "--decoder.cnn_depth", "4", "--decoder.mlp_units", "24"]


def make(regime: str, *argv: str, **options) -> dreamer.Agent:
    return make_agent("--autoencoder", regime, *OPTIONS, *argv, **options)


def make_pictures(**options) -> dict:
    return {key: value for key, value in make_batch(**options).items() if key not in ("position", "velocity")}


def gradients(loss: torch.Tensor, module: torch.nn.Module) -> list[torch.Tensor]:
    """Of those parameters that the loss depends on."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return [gradient for gradient in found if gradient is not None]


def snapshot(module: torch.nn.Module) -> list[torch.Tensor]:
    return [x.clone() for x in (*module.parameters(), *module.buffers())]


def unchanged(module: torch.nn.Module, before: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip((*module.parameters(), *module.buffers()), before, strict=True))


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("method", ["rssm", "hrssm", "r2dreamer"])
def test_gradients_go_where_the_table_says(regime, method):
    agent = make(regime, "--method", method)
    model, batch = agent.world_model, make_pictures()
    if model.autoencoder is not None:
        agent.update_autoencoder(batch)
    total, filtered, metrics = model.loss(batch)
    data = model.preprocess(batch)
    data["image"].requires_grad_()
    decoded = model.decoder(filtered.feat)
    ((name, loss),) = model.reconstruction_loss(decoded, data).items()
    assert name == ("code" if regime == "external" else "image") and f"{name}_loss" in metrics
    # The reconstruction loss trains encoder, dynamics and decoder in all of them.
    for part in (model.representation.encoder, model.dynamics, model.decoder):
        assert any(gradient.abs().max() > 0 for gradient in gradients(loss, part))
    assert bool(model.representation.encoder.image_shapes) == (regime == "internal")
    # Pixels are the target of all but external.
    (pixels,) = torch.autograd.grad(loss, data["image"], allow_unused=True, retain_graph=True)
    assert (pixels is None) == (regime == "external")
    if regime == "internal":
        assert model.autoencoder is None
        return
    # The autoencoder is a constant of everything that the world model minimises.
    assert gradients(total, model.autoencoder) == [] and not data["code"].requires_grad
    before = snapshot(model.autoencoder)
    model.update(batch)
    assert unchanged(model.autoencoder, before)
    others = [snapshot(part) for part in (model.representation, model.decoder)]
    agent.update_autoencoder(batch)
    assert not unchanged(model.autoencoder, before)
    assert unchanged(model.representation, others[0]) and unchanged(model.decoder, others[1])


def test_frozen_compares_pictures_through_the_decoder():
    """By hand: the decoded code, on the autoencoder's own scale, and a gradient that reaches the latent."""
    agent = make("frozen", "--method", "rssm", "--decoder_scale", "3")
    model, batch = agent.world_model, make_pictures()
    for _ in range(5):
        agent.update_autoencoder(batch)
    torch.manual_seed(0)
    _, filtered, metrics = model.loss(batch)
    image, feat = model.pixels(batch["image"]), filtered.feat.detach().requires_grad_()
    autoencoder = model.autoencoder
    raw = model.decoder(feat)["code"] * autoencoder.variance.sqrt() + autoencoder.mean
    picture = autoencoder.decoder(raw)["image"]
    expected = (picture - image).square().sum((2, 3, 4)).mean()
    assert torch.isclose(metrics["image_loss"], 3 * expected, rtol=1e-5)
    assert torch.autograd.grad(expected, feat)[0].abs().min(-1).values.max() > 0
    assert torch.allclose(model.draw(feat), picture, atol=1e-6)
    # Of a picture's own code the decoder makes what the autoencoder makes of the picture.
    direct = autoencoder.decoder(autoencoder.raw_code(image))["image"]
    assert torch.allclose(autoencoder.decode(autoencoder.encode(image)), direct, atol=1e-5)


def test_what_moves_weighs_more():
    """A pixel that jumps from dark to bright between rows 1 and 2, in a picture of 16; not where an episode begins."""
    image = torch.zeros(2, 4, 4, 4, 2)
    image[:, 2:, 1, 2, 1] = 0.2
    image[:, 3, 0, 0, :] = 0.09
    first = torch.tensor([[True, False, False, False], [True, False, True, False]])
    weights = models.pixel_weights(image, first, 50.0)
    assert weights.shape == (2, 4, 4, 4, 1) and torch.allclose(weights.mean((2, 3, 4)), torch.ones(2, 4))
    expected = torch.ones(4, 4)
    expected[1, 2] = 51.0
    assert torch.allclose(weights[0, 2, :, :, 0], expected * 16 / 66)
    assert torch.equal(weights[0, [0, 1, 3]], torch.ones(3, 4, 4, 1)) and torch.equal(
        weights[1], torch.ones(4, 4, 4, 1)
    )


@pytest.mark.parametrize("argv", ["--method dreamer", "--autoencoder internal", "--autoencoder frozen"])
def test_motion_weight_is_in_the_image_loss(argv):
    """By hand, from what the decoder draws."""
    argv = f"{'' if 'dreamer' in argv else '--method rssm'} {argv} --motion_weight 7 --decoder_scale 3".split()
    batch = make_pictures(resets=((0, 0), (1, 0), (1, 3)))
    # Half of the pixels stay.
    batch["image"][:, :, :32] = batch["image"][:, :1, :32]
    model = make_agent(*argv, *OPTIONS).world_model
    _, filtered, metrics = model.loss(batch)
    image = model.pixels(batch["image"])
    weights = models.pixel_weights(image, batch["is_first"], 7.0)
    assert weights[0, 1, 40:].mean() > 4 * weights[0, 1, :32].mean() > 0
    error = (model.draw(filtered.feat) - image).square()
    assert torch.isclose(metrics["image_loss"], 3 * (error * weights).sum((2, 3, 4)).mean(), rtol=1e-5)
    assert not torch.isclose(metrics["image_loss"], 3 * error.sum((2, 3, 4)).mean(), rtol=1e-3)


def test_codes_are_standardised():
    """By the mean and deviation of what the autoencoder has seen, here always the same."""
    agent = make("external", "--method", "rssm", "--ae_batch", "1000", "--ae_lr", "0")
    batch = make_pictures(rows=4, steps=8)
    model = agent.world_model
    raw = model.autoencoder.raw_code(model.pixels(batch["image"])).flatten(0, 1)
    assert torch.equal(model.preprocess(batch)["code"].flatten(0, 1), raw)
    for _ in range(3):
        agent.update_autoencoder(batch)
    code = model.preprocess(batch)["code"].flatten(0, 1)
    assert torch.allclose(code, (raw - raw.mean(0)) / raw.std(0, correction=0), atol=1e-4)


@pytest.mark.parametrize("regime", REGIMES)
def test_everything_that_reads_a_world_model_works(regime):
    """Acting, updates of all parts, a probe, and vectors beside the code."""
    agent = make(regime, "--encoder.mlp_keys", "pos.*", "--decoder.mlp_keys", "pos.*", "--video_pred_log", vectors=True)
    encoder = agent.world_model.representation.encoder
    assert set(encoder.vector_shapes) == ({"position"} if regime == "internal" else {"code", "position"})
    batch = make_batch()
    metrics = agent.update(batch)
    assert all(torch.as_tensor(value).isfinite() for value in metrics.values())
    assert ("ae_loss" in metrics) == (regime != "internal") and "probe_loss" in metrics
    obs = {key: value[:, 0].numpy() for key, value in batch.items() if key != "action"}
    action, carry = agent.policy(obs, None)
    assert action.shape == (2, 3) and carry is not None
    assert agent.probe.open_loop(agent.world_model, batch, context=3).shape == (2, 8, 192, 64, 3)


def test_the_autoencoder_rests_after_ae_until(tmp_path):
    agent = make("frozen", "--method", "rssm")
    replay = tools.Replay(capacity=100, batch_size=2, batch_length=8, num_envs=1, seed=0)
    batch = make_pictures(resets=((0, 0),))
    replay.extend({key: value[0].numpy() for key, value in batch.items()})
    config = make_config(ae_pretrain=3, ae_until=2)
    learner = dreamer.Learner(agent, replay, tools.Logger(tmp_path, simple=True, total_steps=9), config)
    autoencoder, counts = agent.world_model.autoencoder, []
    for _ in range(4):
        learner.owed = 1
        assert learner.learn(0)
        counts.append(int(autoencoder.updates))
    assert counts == [4, 5, 5, 5]
    # Interrupted while it learns alone, it goes on there.
    stops = iter([False, True, False, False, False, False])
    again = make("frozen", "--method", "rssm")
    replay.rng = np.random.default_rng(0)
    learner = dreamer.Learner(again, replay, tools.Logger(tmp_path, simple=True, total_steps=9), config)
    torch.manual_seed(1)
    learner.owed = 1
    assert not learner.learn(0, lambda: next(stops)) and learner.updates == 0
    assert learner.learn(0, lambda: next(stops)) and learner.updates == 1
    assert int(again.world_model.autoencoder.updates) == 4


def test_combinations_that_cannot_be():
    for regime in ("external", "frozen"):
        with pytest.raises(tools.UserError, match=f"use --method rssm with --autoencoder {regime}"):
            make(regime, "--method", "dreamer")
    # It draws from latents anyway.
    assert make("internal", "--method", "dreamer").world_model.decoder is None
    spaces = gymnasium.spaces.Dict({"state": gymnasium.spaces.Box(-1, 1, (3,))})
    config = tools.load_config([*SMALL.split(), "--autoencoder", "internal", "--encoder.mlp_keys", ".*"])
    with pytest.raises(tools.UserError, match="--autoencoder internal needs pictures, there are: state"):
        dreamer.make_agent(config, spaces, gymnasium.spaces.Box(-1, 1, (2,)))


# --- a world of squares ---------------------------------------------------------------------------------------------


def play_square(rng: np.random.Generator, length: int = 40, size: int = 16, edge: int = 5) -> dict[str, np.ndarray]:
    """A bright square whose speed follows the action; it stops at the walls."""
    limit, place, speed = size - edge, rng.uniform(0, size - edge, 2), rng.uniform(-1, 1, 2)
    images, actions = np.full((length, size, size, 1), 30, np.uint8), np.zeros((length, 2), np.float32)
    for t in range(length):
        if t:
            # Held for five steps each.
            actions[t] = rng.uniform(-1, 1, 2) if t % 5 == 1 else actions[t - 1]
            speed = 0.4 * speed + 0.8 * actions[t]
            inside = np.clip(place + speed, 0, limit)
            speed, place = np.where(inside == place + speed, speed, 0.0), inside
        y, x = place.round().astype(int)
        images[t, y : y + edge, x : x + edge] = 220
    return {"image": images, "action": actions}


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("squares"), np.random.default_rng(0)
    for _ in range(40):
        write_episode(folder, play_square(rng))
    return folder


WORLD = "--size 16,16 --device cpu --method rssm --batch_size 8 --batch_length 20 --dyn_deter 64 --dyn_hidden 64"
WORLD += " --dyn_stoch 8 --dyn_discrete 8 --encoder.cnn_depth 8 --decoder.cnn_depth 8 --encoder.mlp_units 64"
WORLD += " --decoder.mlp_units 64 --decoder.mlp_layers 1 --encoder.mlp_layers 1 --units 32 --ae_code 16"
WORLD += " --reward_scale 0 --model_lr 3e-3 --ae_lr 3e-3 --ae_pretrain 150 --decoder_scale 5 --dyn_scale 2 --kl_free 0"
# Shorter than a batch: an imagination of 30 steps goes on beyond the beginning of its sequence, so training must too.
WORLD += " --tssm_ff 128 --tssm_window 10"


@pytest.mark.parametrize("regime", ["internal", "frozen"])
@pytest.mark.parametrize("dynamics", ["rssm", "tssm"])
def test_a_model_of_squares_beats_both_baselines(dynamics, regime, squares):
    """600 updates; imagined from actions alone, better than the last picture and than the mean one."""
    options = [*WORLD.split(), "--dynamics", dynamics, "--autoencoder", regime]
    config = tools.load_config([*options, "--offline_traindir", str(squares)])
    torch.manual_seed(0)
    logged = exploration.load_logged(config)
    agent = dreamer.make_agent(config, logged.spaces, gymnasium.spaces.Box(-1, 1, (2,)))
    if regime == "frozen":
        for batch in logged.replay.batches(config.ae_pretrain):
            agent.update_autoencoder(batch)
    for batch in logged.replay.batches(600):
        agent.update(batch, behavior=False)
    found = models.measure_windows(agent.world_model, agent.painter[0], logged.held_out, logged.mean_frames["image"])
    metrics, curves = models.summarise_windows(found)
    assert len(curves["open_mse"]) == 30
    assert metrics["open_mse"] < 0.9 * min(metrics["copy_mse"], metrics["mean_mse"])
    assert metrics["open_mse_10"] < 0.95 * min(metrics["copy_mse_10"], metrics["mean_mse_10"])
    # It heeds the actions, and pictures help.
    assert metrics["shuffled_mse"] > 1.3 * metrics["open_mse"] > 1.3 * metrics["recon_mse"]
