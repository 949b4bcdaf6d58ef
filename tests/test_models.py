"""Networks, world model and actor-critic as parts: distributions, returns, gradient routing, variants that must run."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import models
import networks
import tools
from tests.helpers import make_agent, make_batch, make_config

# --- distributions --------------------------------------------------------------------------------------------------


@given(st.floats(-1e5, 1e5), st.integers(0, 2**31))
def test_twohot_against_its_definition(y, seed):
    buckets = torch.linspace(-20, 20, 255, dtype=torch.float64)
    logits = torch.randn(1, 255, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = math.copysign(math.log1p(abs(y)), y)
    position = (x + 20) / (40 / 254)
    low = min(max(math.floor(position), 0), 254)
    high, share = min(low + 1, 254), position - low
    log_probs = torch.log_softmax(logits, -1)[0]
    expected = (1 - share) * log_probs[low] + share * log_probs[high]
    found = networks.TwoHot(logits, buckets).log_prob(torch.tensor([y], dtype=torch.float64))
    assert float(found) == pytest.approx(float(expected), rel=1e-6, abs=1e-9)


def test_twohot_beyond_its_range_takes_the_last_bucket():
    head = networks.TwoHot(torch.randn(2, 255), torch.linspace(-20, 20, 255))
    found = head.log_prob(torch.tensor([1e12, -1e12]))
    expected = torch.log_softmax(head.logits, -1)[[0, 1], [254, 0]]
    torch.testing.assert_close(found, expected)


def test_twohot_of_nan_is_nan_and_several_targets_share_a_head():
    head = networks.TwoHot(torch.randn(3, 255), torch.linspace(-20, 20, 255))
    x = torch.tensor([[1.0, torch.nan, -3.0], [2.0, 0.5, torch.inf]])
    found = head.log_prob(x)
    assert found.isnan().tolist() == [[False, True, False], [False] * 3]
    torch.testing.assert_close(found, torch.stack([head.log_prob(row) for row in x]), equal_nan=True)


def test_twohot_mean_inverts_its_target():
    """Fitting the log-likelihood of one value makes the mean that value."""
    logits = torch.zeros(1, 255, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.5)
    buckets = torch.linspace(-20, 20, 255)
    for _ in range(300):
        loss = -networks.TwoHot(logits, buckets).log_prob(torch.tensor([123.0])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(networks.TwoHot(logits, buckets).mode.detach()) == pytest.approx(123.0, rel=0.01)


def test_initial_heads_predict_zero_with_loss_log_255():
    metrics = make_agent().world_model.loss(make_batch())[2]
    assert float(metrics["reward_loss"]) == pytest.approx(math.log(255), rel=1e-5)


def test_onehot_samples_are_exact_and_follow_the_mixed_distribution():
    torch.manual_seed(0)
    logits = torch.tensor([3.0, 0.0, -50.0]).repeat(20000, 1)
    dist = networks.OneHot(logits, unimix=0.3)
    sample = dist.sample()
    assert set(sample.unique().tolist()) == {0.0, 1.0} and (sample.sum(-1) == 1).all()
    expected = 0.7 * torch.softmax(logits[0], -1) + 0.1
    assert (sample.mean(0) - expected).abs().max() < 5 * 0.5 / math.sqrt(20000)
    torch.testing.assert_close(dist.probs[0], expected)


def test_straight_through_gradients():
    """Samples pass the gradient of the probabilities, modes that of the log-probabilities."""
    logits, weight = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)
    for value, surrogate in (
        (networks.OneHot(logits, 0.01).sample(), lambda d: d.probs),
        (networks.OneHot(logits, 0.01).mode, lambda d: d.log_probs),
    ):
        found = torch.autograd.grad((value * weight).sum(), logits)[0]
        expected = torch.autograd.grad((surrogate(networks.OneHot(logits, 0.01)) * weight).sum(), logits)[0]
        torch.testing.assert_close(found, expected)


def test_distributions_agree_with_torch():
    mean, std, x = torch.randn(3, 4, 5).unbind()
    std = std.exp()
    ours, theirs = networks.Normal(mean, std), torch.distributions.Normal(mean, std)
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x).sum(-1))
    torch.testing.assert_close(ours.entropy(), theirs.entropy().sum(-1))
    other = torch.distributions.Normal(x, std.flip(0))
    torch.testing.assert_close(
        ours.kl(networks.Normal(x, std.flip(0))), torch.distributions.kl_divergence(theirs, other).sum(-1)
    )
    ours, theirs = networks.OneHot(mean, 0.0), torch.distributions.Categorical(logits=mean)
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    other = torch.distributions.Categorical(logits=x)
    torch.testing.assert_close(ours.kl(networks.OneHot(x)), torch.distributions.kl_divergence(theirs, other))
    bernoulli = networks.Bernoulli(mean)
    torch.testing.assert_close(
        bernoulli.log_prob((x > 0).float()),
        -F.binary_cross_entropy_with_logits(mean, (x > 0).float(), reduction="none"),
    )


@pytest.mark.parametrize("classes", [2, 7, 8, 32])
def test_softmax_of_short_rows(classes):
    x = torch.randn(5, 3, classes, requires_grad=True)
    ours, theirs = networks.softmax(x), torch.softmax(x, -1)
    assert ours.is_contiguous()
    torch.testing.assert_close(ours, theirs)
    slope = torch.randn_like(ours)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, slope)[0] for y in (ours, theirs)))


@pytest.mark.parametrize(
    ("steps", "bias", "bf16"), [(1, True, False), (7, True, False), (7, False, False), (7, True, True)]
)
def test_sequence_linear_is_a_linear_layer(steps, bias, bf16):
    """Values and all gradients of a recurrence, also of a second backward pass, are those of `F.linear` in float32."""
    weight = (0.4 * torch.randn(6, 4)).requires_grad_()
    offset = torch.randn(6, requires_grad=True) if bias else None
    start = torch.randn(3, 4, requires_grad=True)
    leaves, results = [x for x in (weight, offset, start) if x is not None], []
    for make, low in ((networks.SequenceLinear, bf16), (networks.linear_layer, False)):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            linear, x, total = make(weight, offset), start, 0.0
            for _ in range(steps):
                y = linear(x)
                x, total = torch.tanh(y[:, :4]), total + y.float().square().mean()
        assert y.dtype == (torch.bfloat16 if low else torch.float32)
        first, second = (torch.autograd.grad(total, leaves, retain_graph=True) for _ in range(2))
        results.append([total, *first, *second])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).norm() <= (0.05 if bf16 else 1e-5) * theirs.norm()


def test_bound_action_clips_and_keeps_a_scaled_gradient():
    action = torch.tensor([-3.0, -0.5, 0.0, 1.0, 2.0], requires_grad=True)
    bounded = networks.bound_action(action)
    bounded.sum().backward()
    assert bounded.tolist() == [-1.0, -0.5, 0.0, 1.0, 1.0]
    torch.testing.assert_close(action.grad, torch.tensor([1 / 3, 1.0, 1.0, 1.0, 0.5]))


# --- networks -------------------------------------------------------------------------------------------------------


def test_parameter_counts_of_the_default_size():
    agent = make_agent(
        "--dyn_deter=512", "--dyn_hidden=512", "--dyn_stoch=32", "--dyn_discrete=32", "--units=512",
        "--dyn_cont_stoch_size=32", "--encoder.cnn_depth=32",
    )  # fmt: skip

    def count(module):
        return sum(p.numel() for p in module.parameters())

    representation = agent.world_model.representation
    assert count(representation.encoder) == 690_624
    assert count(representation.dynamics) + count(representation.projector) == 5_825_024 + 512 * 3
    assert count(agent.world_model.reward_head) == 1_181_439
    assert count(agent.world_model.cont_head) == 1_051_137
    assert count(agent.actor_critic.actor) == 1_050_624 + 1_026 * 3
    assert count(agent.actor_critic.critic) == count(agent.actor_critic.slow_critic) == 1_181_439


def test_initialisation_scales():
    torch.manual_seed(0)
    layer = torch.nn.Linear(300, 500).requires_grad_(False)
    networks.init_truncated(layer)
    std = math.sqrt(2 / 800)
    assert float(layer.weight.std()) == pytest.approx(std, rel=0.01)
    assert float(layer.weight.abs().max()) <= 2 * std / networks.TRUNCATED_STD + 1e-6
    networks.init_uniform(layer, 1.0)
    assert float(layer.weight.abs().max()) == pytest.approx(math.sqrt(3 / 400), rel=0.01)
    conv = torch.nn.Conv2d(64, 128, 4, bias=False).requires_grad_(False)
    networks.init_truncated(conv)
    assert float(conv.weight.std()) == pytest.approx(math.sqrt(2 / (16 * 192)) / networks.TRUNCATED_STD, rel=0.01)


@pytest.mark.parametrize("size", [32, 48, 64, 84, 96, (64, 96)])
def test_encoder_sizes(size):
    height, width = size if isinstance(size, tuple) else (size, size)
    options = {"act": "SiLU", "norm": "LayerNorm", "kernel": 4, "minres": 4}
    encoder = networks.ConvEncoder((height, width, 3), depth=2, **options)
    assert encoder(torch.zeros(2, 3, height, width, 3)).shape == (2, 3, encoder.outdim)


def test_decoder_learns_to_reconstruct():
    torch.manual_seed(0)
    obs = make_agent(vectors=True).world_model.preprocess(make_batch())
    obs["image"] = torch.rand(2, 8, 1, 1, 3).expand(2, 8, 64, 64, 3) - 0.5
    options = dict(tools.load_config([]).decoder, cnn_depth=8, mlp_units=8, mlp_keys="position")
    decoder = networks.Decoder(16, {"image": (64, 64, 3), "position": (4,), "velocity": (2,)}, **options)
    feat = torch.randn(2, 8, 16)
    assert decoder(feat)["image"].shape == (2, 8, 64, 64, 3) and decoder(feat)["position"].shape == (2, 8, 4)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        parts = decoder.losses(decoder(feat), obs)
        assert parts.keys() == {"image", "position"} and all(part.shape == (2, 8) for part in parts.values())
        loss = sum(parts.values())
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        losses.append(float(loss.mean().detach()))
    assert losses[-1] < 0.3 * losses[0]


def test_reset_inside_a_sequence_forgets_everything_before():
    agent = make_agent(unimix_ratio=0.0)
    rssm = agent.world_model.dynamics
    embed, action = torch.randn(1, 6, rssm.embed), torch.randn(1, 6, 3)
    first = torch.tensor([[True, False, False, True, False, False]])
    torch.manual_seed(1)
    with torch.no_grad():
        post, prior = rssm.observe(embed, action, first)
        changed = embed.clone()
        changed[:, :3] += 1
        torch.manual_seed(1)
        other, _ = rssm.observe(changed, action * 0.9, first)
        torch.testing.assert_close(post.deter[:, 3], other.deter[:, 3], rtol=0, atol=0)
        assert not torch.equal(post.deter[:, 2], other.deter[:, 2])
        # right after a reset neither the action nor the past matters
        expected = rssm.img_step(rssm.initial((1,)), torch.zeros(1, 3)).deter
        torch.testing.assert_close(post.deter[:, 3], expected)
    torch.testing.assert_close(prior.deter, post.deter)


# --- returns --------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**31), st.integers(2, 12), st.floats(0, 1))
def test_lambda_return_against_its_sum(seed, horizon, lambda_):
    """The recursion equals the lambda-weighted mixture of n-step returns."""
    generator = torch.Generator().manual_seed(seed)
    reward, value, discount = torch.rand(3, horizon, 2, generator=generator, dtype=torch.float64)
    found = models.lambda_return(reward, value, discount, lambda_)
    for k in range(horizon - 1):
        n_max = horizon - 1 - k
        total, n_step, gamma = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), 1.0
        for n in range(1, n_max + 1):
            n_step = n_step + gamma * reward[k + n]
            gamma = gamma * discount[k + n]
            weight = (1 - lambda_) * lambda_ ** (n - 1) if n < n_max else lambda_ ** (n - 1)
            total = total + weight * (n_step + gamma * value[k + n])
        torch.testing.assert_close(found[k], total, rtol=1e-9, atol=1e-12)


def test_return_norm():
    norm = models.ReturnNorm()
    returns = torch.linspace(0, 1000, 1001)
    offset, scale = norm(returns)
    assert float(offset) == pytest.approx(0.5) and float(scale) == pytest.approx(9.0)
    offset, scale = models.ReturnNorm()(returns / 1000)
    assert float(scale) == 1.0, "the scale is never below 1"
    assert "quantiles" in norm.state_dict()


# --- learning -------------------------------------------------------------------------------------------------------


def test_actor_critic_gradients_stay_at_home(monkeypatch):
    """The actor learns from the actor loss alone, the critic from the value loss alone, and nothing else learns."""
    monkeypatch.setattr(networks, "draw_onehot", lambda p: torch.nn.functional.one_hot(p.argmax(-1), p.shape[-1]).to(p))
    monkeypatch.setattr(networks, "draw_normal", torch.zeros_like)
    agent, batch = make_agent(), make_batch()
    behavior, start = agent.actor_critic, agent.world_model.loss(batch)[1].start
    losses = behavior.loss(agent.world_model, start.map(lambda x: x.flatten(0, 1)))[:2]
    parts = (behavior.actor, behavior.critic)
    expected = [
        torch.autograd.grad(loss, list(part.parameters()), retain_graph=True)
        for loss, part in zip(losses, parts, strict=True)
    ]
    behavior.return_norm.quantiles.zero_()
    behavior.update(agent.world_model, start)
    with_grad = {n.split(".")[1] for n, p in agent.named_parameters() if p.grad is not None}
    assert with_grad == {"actor", "critic"}
    for part, grads in zip(parts, expected, strict=True):
        for parameter, grad in zip(part.parameters(), grads, strict=True):
            torch.testing.assert_close(parameter.grad, grad)
    fixed = {".".join(n.split(".")[:3]) for n, p in agent.named_parameters() if not p.requires_grad}
    raw = {f"world_model.representation.raw_{part}" for part in ("encoder", "dynamics", "projector")}
    assert {n for n in fixed if "slow_critic" not in n} == raw, "nothing stays frozen that is trained"


@pytest.mark.parametrize("stop", [True, False])
def test_policy_gradient_through_later_decisions(stop):
    """With `behavior_stop_grad` an action does not influence later actions' inputs as far as gradients go."""
    agent = make_agent(behavior_stop_grad=stop)
    rssm = agent.world_model.dynamics
    start = rssm.initial((3,)).detach()
    seen = []
    agent.actor_critic.actor.layers.register_forward_hook(lambda _, inputs, out: seen.append(inputs[0].requires_grad))
    agent.actor_critic.imagine(rssm, start)
    assert seen == [False] * 5 if stop else seen == [False] + [True] * 4


VARIANTS = {
    "plain": {},
    "discrete actions": {"discrete": True},
    "both": {"imag_gradient": "both", "imag_gradient_mix": 0.1},
    "vectors": {"vectors": True, "argv": ["--encoder.mlp_keys", "position|velocity"]},
    "vectors only": {"vectors": True, "argv": ["--encoder.mlp_keys", ".*", "--encoder.cnn_keys", "$^"]},
    "gaussian latents": {"dyn_discrete": 0, "reward_head": "normal", "value_head": "normal"},
    "gaussian softplus": {"dyn_discrete": 0, "dyn_std_act": "softplus", "dyn_mean_act": "tanh5"},
    "shared": {"dyn_shared": True},
    "no recurrent posterior": {"dyn_temp_post": False},
    "deep recurrence": {"dyn_rec_depth": 2},
    "plain gru": {"dyn_cell": "gru", "initial": "zeros"},
    "no return norm": {"reward_EMA": False},
    "few starts": {"imag_starts": 3},
    "no slow critic": {"slow_value_target": False},
    "value decay": {"value_decay": 0.1},
    "future entropy": {"future_entropy": True, "actor_state_entropy": 0.01},
    "state entropy": {"actor_state_entropy": 0.01},
    "imagined modes": {"imag_sample": False},
    "normal_1": {"actor_dist": "normal_1"},
    "trunc_normal": {"actor_dist": "trunc_normal"},
    "ablations": {"nomlr": True, "nosimsr": True},
    "detached heads": {"grad_heads": []},
    "augmented": {"augmentation": ["shift", "intensity"], "aug_prob": 0.5},
    "bf16": {"precision": 16},
    "weight decay": {"weight_decay": 1e-3, "opt": "momentum"},
    "random": {"expl_behavior": "random"},
    "plan2explore": {"expl_behavior": "plan2explore", "expl_extr_scale": 1.0, "disag_models": 3, "disag_units": 16},
    "plan2explore feat": {"expl_behavior": "plan2explore", "disag_target": "feat", "disag_action_cond": True},
    "noise and modes": {"expl_amount": 0.3, "eval_noise": 0.1, "collect_dyn_sample": False, "eval_state_mean": True},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_learns_and_acts(name):
    options = dict(VARIANTS[name])
    discrete = options.get("discrete", False)
    agent = make_agent(*options.pop("argv", []), **options)
    batch = make_batch(discrete=discrete, resets=[(0, 0), (1, 3)])
    copies = {k: v.clone() for k, v in batch.items()}
    before = {k: v.clone() for k, v in agent.named_parameters()}
    for _ in range(2):
        metrics = agent.update(batch)
    for key, value in metrics.items():
        assert np.isfinite(float(value)), key
    assert all(torch.equal(batch[k], copies[k]) for k in batch), "the batch was written to"
    for part in (
        "world_model.representation.dynamics",
        "world_model.representation.raw_dynamics",
        "actor_critic.actor",
        "actor_critic.critic",
    ):
        changed = [not torch.equal(v, before[k]) for k, v in agent.named_parameters() if k.startswith(part + ".")]
        assert any(changed), f"{part} did not move"
    carry = None
    for t in range(3):
        obs = {k: v[:, t].numpy() for k, v in batch.items() if k not in ("action", "reward")}
        for training in (True, False):
            action, carry = agent.policy(obs, carry, training=training)
            assert action.shape == (2, 3) and torch.isfinite(action).all()
            if discrete:
                assert torch.equal(action.sort(-1).values, torch.tensor([[0.0, 0.0, 1.0]] * 2))


LOSSES = {
    "both": {"imag_gradient": "both", "imag_gradient_mix": 0.3},
    "value decay": {"value_decay": 0.1},
    "future entropy": {"future_entropy": True, "actor_entropy": 0.2, "actor_state_entropy": 0.3},
    "state entropy": {"actor_state_entropy": 0.3},
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_actor_and_critic_against_their_definition(name, monkeypatch):
    """Of one imagined trajectory of distinct rewards, values and continuations, by loops."""
    agent = make_agent(reward_EMA=False, **LOSSES[name])
    world_model, behavior, config = agent.world_model, agent.actor_critic, make_config(**LOSSES[name])
    for head in (world_model.reward_head, world_model.cont_head, behavior.critic, behavior.slow_critic):
        torch.nn.init.normal_(head.out.weight)
    start = world_model.update(make_batch())[0].start.detach().flatten()
    logits, feat, action, policy = drawn = behavior.imagine(world_model.dynamics, start)
    monkeypatch.setattr(behavior, "imagine", lambda *args: drawn)
    actor_loss, value_loss, _ = behavior.loss(world_model, start)

    reward, value = (head(feat).mode.squeeze(-1) for head in (world_model.reward_head, behavior.critic))
    discount = 0.997 * world_model.cont_head(feat).mean.squeeze(-1)
    entropy = config.actor_entropy * policy.entropy()
    if config.actor_state_entropy:
        probs = 0.99 * torch.stack(logits).softmax(-1) + 0.01 / 4  # four classes, mixed with one per cent
        entropy = entropy - config.actor_state_entropy * (probs * probs.log()).sum((-1, -2))
    if config.future_entropy:
        reward, entropy = reward + entropy, 0.0 * entropy
    horizon = len(feat)
    returns, weight = [value[-1]], [torch.ones_like(discount[0])]
    for k in reversed(range(horizon - 1)):
        returns.insert(0, reward[k + 1] + discount[k + 1] * (0.05 * value[k + 1] + 0.95 * returns[0]))
    for k in range(horizon - 2):
        weight.append(weight[k] * discount[k])
    log_prob, critic = policy.log_prob(action), behavior.critic.distribution(behavior.critic.outputs(feat))
    objective, losses = [], []
    for k in range(horizon - 1):
        score = returns[k] - value[k]
        if config.imag_gradient == "both":
            score = 0.3 * returns[k] + 0.7 * log_prob[k] * score
        objective.append(weight[k] * (score + entropy[k]))
    slow = behavior.slow_critic(feat).mode.squeeze(-1)
    for target in (torch.stack([*returns[:-1], value[-1]]), slow):
        losses.append(-critic.log_prob(target)[:-1])
    expected = torch.stack(weight) * (sum(losses) + config.value_decay * value[:-1])
    torch.testing.assert_close(actor_loss, -torch.stack(objective).mean())
    torch.testing.assert_close(value_loss, expected.mean())


def test_plan2explore_predicts_later_latents_and_seeks_disagreement():
    options = {"disag_offset": 2, "disag_target": "deter", "disag_models": 3, "disag_units": 16, "expl_until": 40}
    agent = make_agent(expl_behavior="plan2explore", disag_action_cond=True, **options)
    explorer, batch = agent.explorer, make_batch()
    filtered, action = agent.world_model.update(batch)[0], batch["action"]
    errors = []
    for head, b, t in itertools.product(explorer.ensemble, range(2), range(6)):
        shown = torch.cat([filtered.feat[b, t], networks.bound_action(action[b, t])])
        wrong = head(shown) - filtered.start.deter[b, t + 2]
        errors.append(0.5 * wrong.square().sum() + 0.5 * len(wrong) * math.log(2 * math.pi))
    torch.testing.assert_close(explorer.ensemble_loss(filtered, action), torch.stack(errors).mean())
    feat, action = filtered.feat[0], action[0]
    shown = torch.cat([feat, networks.bound_action(action)], -1)
    apart = np.std([head(shown).detach().numpy() for head in explorer.ensemble], 0, ddof=1).mean(-1)
    found = explorer.disagreement(feat, action).detach().numpy()
    np.testing.assert_allclose(found, np.log(apart), rtol=1e-4)

    # What it adds to the behaviour's reward has the sign of `expl_intr_scale`; it acts until `expl_until`.
    rewards = []
    explorer.behavior.update = lambda world_model, start, reward_fn: rewards.append(reward_fn(feat, action)) or {}
    explorer.update(agent.world_model, filtered, batch["action"])
    torch.testing.assert_close(rewards[0], make_config().expl_intr_scale * explorer.disagreement(feat, action))
    seen, act = [], agent.act
    agent.act = lambda *args, explore, **kwargs: seen.append(explore) or act(*args, explore=explore, **kwargs)
    obs = {k: v[:, 0].numpy() for k, v in batch.items() if k not in ("action", "reward")}
    for step, training in ((0, True), (19, True), (20, True), (0, False)):  # 40 frames are 20 decisions
        agent.policy(obs, None, step, training=training)
    assert seen == [True, True, False, False]


def test_learning_fits_a_batch():
    """Ninety updates on one batch: the reward is predicted and the latent consistent."""
    agent, batch = make_agent("--model_lr=3e-3"), make_batch()
    losses = [agent.world_model.update(batch)[1] for _ in range(90)]
    assert float(losses[-1]["reward_loss"]) < 0.6 * float(losses[0]["reward_loss"])
    assert float(losses[-1]["mbr_loss"]) < 0.5 * float(losses[0]["mbr_loss"])


def test_free_bits_cut_the_gradient():
    agent = make_agent(kl_free=1e6, nomlr=True, nosimsr=True, grad_heads=[])
    agent.world_model.loss(make_batch())[0].backward()
    assert all(p.grad is None or not p.grad.any() for p in agent.world_model.representation.parameters())


@pytest.mark.parametrize("starts, states", [(0, 16), (3, 3), (99, 16)])
def test_imagination_begins_from_some_states_of_the_batch(starts, states, monkeypatch):
    agent, batch, seen = make_agent(imag_starts=starts), make_batch(), []
    imagine = agent.actor_critic.imagine
    monkeypatch.setattr(agent.actor_critic, "imagine", lambda *args: (seen.append(args[1].deter), imagine(*args))[1])
    for _ in range(2):
        agent.update(batch)
    assert [len(deter) for deter in seen] == [states, states]


def test_slow_critic_cadence():
    agent, batch = make_agent(slow_target_update=2, slow_target_fraction=0.5), make_batch()
    slow = agent.actor_critic.slow_critic.out.weight
    before, moved = slow.clone(), []
    for _ in range(4):
        agent.update(batch)
        moved.append(not torch.equal(slow, before))
        before = slow.clone()
    # it moves at the start of updates 0 (onto an equal critic), 2, ...
    assert moved == [False, False, True, False]


def test_acting_resets_only_where_told():
    agent = make_agent("--collect_dyn_sample=False")
    obs = {k: v[:, 0].numpy() for k, v in make_batch().items() if k not in ("action", "reward")}
    obs["is_first"] = np.array([True, True])
    _, start = agent.policy(obs, None, training=False)
    obs["is_first"] = np.array([False, False])
    _, carry = agent.policy(obs, start, training=False)
    obs["is_first"] = np.array([True, False])
    _, after = agent.policy(obs, carry, training=False)
    torch.testing.assert_close(after.state.deter[0], start.state.deter[0])
    assert not torch.allclose(after.state.deter[1], start.state.deter[1])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mask_ratio": 2.0}, "--mask_ratio"),
        ({"patch_size": 65}, "--patch_size"),
        ({"augmentation": ["crop"]}, "--augmentation"),
        ({"batch_length": 1}, "--batch_length"),
        ({"grad_heads": ["image"]}, "--grad_heads"),
        ({"discrete": True, "actor_dist": "normal"}, "--actor_dist onehot"),
        ({"argv": ["--encoder.cnn_keys", "$^"]}, "--encoder.cnn_keys"),
        ({"dyn_rec_depth": 2, "dyn_hidden": 32}, "--dyn_rec_depth"),
    ],
)
def test_options_that_cannot_work_say_so(options, message):
    options = dict(options)
    with pytest.raises(tools.UserError, match=message) as error:
        make_agent(*options.pop("argv", []), **options)
    assert "\n" not in str(error.value)


# --- probe ----------------------------------------------------------------------------------------------------------


def test_probe_learns_the_clean_picture_and_leaves_the_rest_alone():
    batch = make_batch()
    batch["clean_image"] = batch["image"] // 2
    sizes = {"--decoder.cnn_depth": "4", "--decoder.mlp_keys": "position"}
    plain = make_agent(vectors=True)
    probed = make_agent("--video_pred_log", *sum(sizes.items(), ()), vectors=True)
    losses, states = [], []
    for agent in (plain, probed):
        torch.manual_seed(0)
        losses.append([float(agent.update(batch).get("probe_loss", 0.0)) for _ in range(5)])
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    for key, value in plain.state_dict().items():
        assert not isinstance(value, torch.Tensor) or torch.equal(value, probed.state_dict()[key]), key
    assert losses[1][0] > losses[1][-1]
    target = probed.probe.target(probed.world_model.preprocess(batch))["image"]
    torch.testing.assert_close(target, batch["clean_image"] / 255.0 - 0.5)


def test_open_loop_sees_the_context_alone():
    agent = make_agent("--video_pred_log", "--decoder.cnn_depth", "4", vectors=True)
    batch = make_batch(rows=1, steps=8, resets=((0, 0),))
    torch.nn.init.normal_(agent.probe.decoder.cnn.linear.weight)

    def rows(**changes):
        found = agent.probe.open_loop(agent.world_model, batch | changes, context=3)
        return found[0].reshape(8, -1, 64, 64, 3).unbind(1)

    before = torch.get_rng_state()
    truth, model, error = rows()
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(truth, batch["image"][0])
    expected = (model.double() - truth.double()) / 2 + 127.5
    assert float((error.double() - expected).abs().max()) <= 1.0

    image, action = batch["image"].clone(), batch["action"].clone()
    image[:, 3:] = 0
    assert torch.equal(rows(image=image)[1], model)
    image[:, 2] = 0
    assert not torch.equal(rows(image=image)[1][3:], model[3:])
    action[:, 5] = -action[:, 5]
    changed = rows(action=action)[1]
    assert torch.equal(changed[:5], model[:5]) and not torch.equal(changed[5:], model[5:])
    assert torch.equal(rows(clean_image=batch["image"] // 2)[1], batch["image"][0] // 2), "clean is the truth then"


def test_probe_needs_pictures():
    with pytest.raises(tools.UserError, match="decoder.cnn_keys image"):
        make_agent("--video_pred_log", "--decoder.cnn_keys", "$^")


# --- speed ----------------------------------------------------------------------------------------------------------


def test_losses_and_acting_are_one_graph():
    """What is recorded or compiled looks at no value on the way: each of the three is traced without a break.

    Tracing takes plain linear layers in place of `SequenceLinear`.
    """
    agent = make_agent(imag_horizon=3)
    batch = {key: value[:, :3] for key, value in make_batch().items()}

    def trace(function):
        return torch.compile(function, fullgraph=True, backend="eager", dynamic=False)

    loss, filtered, _ = trace(agent.world_model.loss)(batch)
    assert torch.isfinite(loss)
    start = filtered.start.map(lambda x: x.detach().flatten(0, 1))
    with models.frozen(agent.world_model):
        actor_loss, value_loss, _ = trace(agent.actor_critic.loss)(agent.world_model, start)
    assert torch.isfinite(actor_loss) and torch.isfinite(value_loss)
    agent.act = trace(agent.act)
    action, _ = agent.policy({key: value[:, 0].numpy() for key, value in batch.items() if key != "reward"}, None)
    assert action.shape == (2, 3)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def filtered(
    rssm: networks.RSSM, embed: torch.Tensor, action: torch.Tensor, first: torch.Tensor, by_steps: bool
) -> list:
    """Posterior of a sequence and the gradients of all that it depends on, twice."""
    if by_steps:
        state, posts = rssm.initial(first.shape[:1]), []
        for t in range(first.shape[1]):
            state = rssm.obs_step(state, action[:, t], embed[:, t], first[:, t])
            posts.append(state)
        post = networks.stack_states(posts, 1)
    else:
        post, _ = rssm.observe(embed, action, first)
    used = [p for name, p in rssm.named_parameters() if not name.startswith("prior_h")]
    loss = sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in post[:3])
    inputs = [embed, action, *used]
    return [*post[:3], *(g for _ in range(2) for g in torch.autograd.grad(loss, inputs, retain_graph=True))]


def test_gradients_by_hand_are_those_of_their_functions(double):
    check, pre, h = (
        torch.autograd.gradcheck,
        torch.randn(2, 9, requires_grad=True),
        torch.randn(2, 3, requires_grad=True),
    )
    assert check(
        models.DiscountedSum.apply, [torch.rand(*shape, requires_grad=True) for shape in ((4, 2), (4, 2), (2,))]
    )
    assert check(lambda x: networks.Pick.apply(x, torch.tensor([[1, 0], [2, 1]])), [pre])
    assert check(networks.symexp, [pre])
    slopes, kept = networks.GRUCell.slopes(pre.detach(), h.detach())
    new = networks.GRUCell.gates(pre, h)
    by_pre, by_h = torch.autograd.grad(new, [pre, h], torch.ones_like(new))
    torch.testing.assert_close(slopes.flatten(1), by_pre, rtol=0, atol=1e-12)
    torch.testing.assert_close(kept, by_h, rtol=0, atol=1e-12)


@pytest.mark.parametrize("classes", [2, 8])
def test_gradient_of_the_filter_is_that_of_its_steps(classes, double, monkeypatch):
    """With resets amid a sequence and a learned initial state."""
    monkeypatch.setattr(networks, "draw_onehot", lambda p: F.one_hot(p.argmax(-1), p.shape[-1]).to(p))
    rssm = make_agent("--dyn_discrete", str(classes)).world_model.dynamics
    for parameter in rssm.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    batch = make_batch(resets=[(0, 0), (1, 3), (0, 7)])
    embed, action = torch.randn(2, 8, rssm.embed, requires_grad=True), batch["action"].double().requires_grad_()
    assert rssm.default_structure
    runs = [filtered(rssm, embed, action, batch["is_first"], by_steps) for by_steps in (False, True)]
    for ours, plain in zip(*runs, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12 * max(1.0, float(plain.detach().abs().max())))


def test_gradient_of_the_filter_in_bf16_stays_close(monkeypatch):
    monkeypatch.setattr(networks, "draw_onehot", lambda p: F.one_hot(0 * p.argmax(-1), p.shape[-1]).to(p))
    rssm, batch = make_agent().world_model.dynamics, make_batch()
    embed, action = torch.randn(2, 8, rssm.embed, requires_grad=True), batch["action"].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        low = filtered(rssm, embed, action, batch["is_first"], by_steps=False)
    for ours, full in zip(low, filtered(rssm, embed, action, batch["is_first"], by_steps=True), strict=True):
        assert ours.dtype == full.dtype and (ours - full).norm() <= 0.05 * full.norm()


ACTORS = {
    "normal": [],
    "trunc_normal": ["--actor_dist", "trunc_normal", "--imag_gradient", "both", "--imag_gradient_mix", "0.3"],
    "onehot": ["--actor_dist", "onehot", "--imag_gradient", "both", "--imag_gradient_mix", "0.3"],
    "linear": ["--actor_layers", "0", "--future_entropy"],
    "tssm": ["--dynamics", "tssm", "--tssm_ff", "32", "--tssm_window", "4"],
}


@pytest.mark.parametrize("name", ACTORS)
def test_gradient_of_the_actor_is_that_of_its_steps(name, double, monkeypatch):
    agent = make_agent(*ACTORS[name], discrete=name == "onehot")
    behavior, start, runs = agent.actor_critic, agent.world_model.dynamics.initial((6,)).detach(), []
    torch.nn.init.normal_(behavior.critic.out.weight)
    for at_once in (True, False):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda at_once=at_once: not at_once)
        behavior.return_norm.quantiles.zero_()
        torch.manual_seed(0)
        with models.frozen(agent.world_model):
            loss = behavior.loss(agent.world_model, start)[0]
        runs.append([loss, *torch.autograd.grad(loss, list(behavior.actor.parameters()))])
    for ours, plain in zip(*runs, strict=True):
        assert plain.abs().max() > 1e-6
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12 * max(1.0, float(plain.detach().abs().max())))


def test_draws_have_one_source(monkeypatch):
    """Whoever replaces `networks.draw_onehot` by a function of the probabilities alone gets it everywhere."""
    monkeypatch.setattr(networks, "draw_onehot", lambda p: F.one_hot(p.argmin(-1), p.shape[-1]).to(p))
    agent, batch = make_agent(discrete=True), make_batch(discrete=True)
    dynamics, leaves = agent.world_model.dynamics, []
    post, prior = agent.world_model.loss(batch)[1][1:3]
    logits, feat, action, policy = agent.actor_critic.imagine(dynamics, post.detach().flatten(), leaves)
    carry = agent.policy({key: value[:, 0].numpy() for key, value in batch.items() if key != "reward"}, None)[1]
    stoch, _ = feat.tensor_split([dynamics.stoch_size], -1)
    imagined = networks.State(feat, stoch.unflatten(-1, dynamics.stoch_shape), torch.stack(logits))
    for state in (post, prior, imagined, carry.state):
        assert torch.equal(state.stoch.argmax(-1), dynamics.dist(state.logit).probs.argmin(-1))
    for taken in (action, torch.stack([action for action, _ in leaves])):
        assert torch.equal(taken.argmax(-1), policy.probs.argmin(-1))


def test_bf16_learns_like_float32():
    """Over 200 updates on the same batches and draws, each loss stays within 5% or 0.05 of float32, on average."""
    found = {}
    for precision in ("32", "16"):
        agent = make_agent("--precision", precision, "--model_lr", "1e-3", imag_horizon=3)
        torch.manual_seed(0)
        batches = [{k: v[:, :4] for k, v in make_batch(seed=seed).items()} for seed in range(4)]
        rows = [agent.update(batches[i % 4]) for i in range(200)]
        found[precision] = {k: torch.stack([row[k] for row in rows]) for k in rows[0] if k.endswith("_loss")}
    assert found["32"]["reward_loss"][-20:].mean() < 0.8 * found["32"]["reward_loss"][:20].mean(), "nothing was learnt"
    for name, losses in found["32"].items():
        gap = (found["16"][name].view(10, 20).mean(1) - losses.view(10, 20).mean(1)).abs()
        bound = (0.05 * losses.abs().view(10, 20).mean(1)).clamp(min=0.05)
        assert (gap <= bound).all(), (name, gap, bound)
