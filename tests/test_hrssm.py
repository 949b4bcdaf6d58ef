"""The paper's parts: masks as properties, losses against naive loops, what does and does not receive gradient."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hrssm
from tests.bench import projection
from tests.helpers import make_agent, make_batch

# --- masks ----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(8, 96),
    patch=st.integers(1, 24),
    block=st.integers(1, 9),
    ratio=st.floats(0, 1),
    steps=st.integers(1, 30),
)
def test_cubes_are_whole_and_share_is_exact(size, patch, block, ratio, steps):
    patch = min(patch, size)
    mask = hrssm.CubeMask(size, size, patch=patch, block=block, ratio=ratio)
    drawn = mask.draw(steps)
    grid = size // patch
    assert drawn.shape == (steps, size, size) and drawn.dtype == torch.bool
    cell = np.arange(size) * grid // size
    first = [np.flatnonzero(cell == i)[0] for i in range(grid)]
    for t in range(steps):
        # frames of a block share one mask; a pixel has the value of its cell; the number of hidden cells is exact
        assert torch.equal(drawn[t], drawn[t - t % block])
        coarse = drawn[t][first][:, first]
        assert torch.equal(drawn[t], coarse[cell][:, cell])
        assert int(coarse.sum()) == int(ratio * grid * grid)


def test_mask_distribution_is_uniform_and_blocks_are_independent():
    """Each cell is hidden with probability k/36, and a cell's masks in two blocks are uncorrelated (5 sigma)."""
    torch.manual_seed(0)
    mask = hrssm.CubeMask(64, 64, patch=10, block=4, ratio=0.5)
    drawn = torch.stack([mask.draw(8) for _ in range(3000)]).float()
    cells = [0, 11, 22, 32, 43, 54]
    cells = drawn[:, :, cells][:, :, :, cells]
    assert (cells.mean((0, 1)) - 0.5).abs().max() < 5 * 0.5 / math.sqrt(6000)
    first, second = cells[:, 0].flatten(1) - 0.5, cells[:, 4].flatten(1) - 0.5
    assert (first * second).mean(0).abs().max() < 5 * 0.25 / math.sqrt(3000)
    # without replacement: two cells of one mask are negatively correlated, cov = -p(1-p)/(n-1)
    covariance = (first[:, 0] * first[:, 35]).mean()
    assert abs(covariance + 0.25 / 35) < 5 * 0.25 / math.sqrt(3000)


def test_cell_widths_of_the_default():
    rows = hrssm.CubeMask(64, 64, patch=10, block=4, ratio=0.5)
    grids = torch.eye(6, dtype=torch.bool)[None]
    assert rows.expand(grids, 1)[0].sum(1).tolist() == [11] * 22 + [10] * 10 + [11] * 22 + [10] * 10


@pytest.mark.parametrize("ratio, share", [(0.0, 0), (0.3, 10), (0.5, 18), (0.7, 25), (1.0, 36)])
def test_hidden_cells(ratio, share):
    assert hrssm.CubeMask(64, 64, patch=10, block=4, ratio=ratio).hidden == share


@pytest.mark.parametrize("option", [{"ratio": 1.5}, {"patch": 65}, {"patch": 0}, {"block": 0}])
def test_bad_mask_options(option):
    with pytest.raises(ValueError, match="--"):
        hrssm.CubeMask(64, 64, **({"patch": 10, "block": 4, "ratio": 0.5} | option))


def guided(ratio, by="motion"):
    return hrssm.GuidedMask(12, 12, patch=4, block=2, ratio=ratio, by=by)


def test_guided_masks_hide_as_many_cells_in_whole_cubes():
    mask = guided(0.5).draw_by(torch.rand(3, 5, 12, 12))
    cells = mask[:, ::4, ::4]
    assert torch.equal(mask, cells.repeat_interleave(4, 1).repeat_interleave(4, 2))
    assert cells.flatten(1).sum(1).tolist() == [4] * 5
    assert torch.equal(mask[0], mask[1]) and torch.equal(mask[2], mask[3])


def test_guided_masks_draw_in_proportion_to_relevance():
    """One of nine cells is hidden; its frequency over 4000 masks is its share of the relevance (5 sigma)."""
    torch.manual_seed(0)
    share = torch.arange(1.0, 10.0) / 45
    relevance = share.reshape(3, 3).repeat_interleave(4, 0).repeat_interleave(4, 1).expand(2, 4000, 12, 12)
    drawn = guided(0.12).draw_by(relevance)[::2, ::4, ::4].flatten(1).float()
    assert (drawn.sum(1) == 1).all()
    expected = (share + 1e-3 / 9) / (1 + 1e-3)
    assert ((drawn.mean(0) - expected).abs() < 5 * (expected * (1 - expected) / 2000).sqrt()).all()
    # and if nothing is relevant, evenly
    even = guided(0.12).draw_by(torch.zeros(1, 4000, 12, 12))[::2, ::4, ::4].flatten(1).float().mean(0)
    assert ((even - 1 / 9).abs() < 5 * math.sqrt(8 / 81 / 2000)).all()


def test_what_is_relevant():
    image, first = torch.rand(2, 4, 6, 6, 3), torch.zeros(2, 4, dtype=torch.bool)
    first[0, 2] = True
    moved = hrssm.motion(image, first)
    assert not moved[:, 0].any() and not moved[0, 2].any()
    torch.testing.assert_close(moved[1, 2], (image[1, 2] - image[1, 1]).abs().mean(-1))
    weight = torch.randn(6, 6, 3)
    found = hrssm.influence(image, lambda x: (x * weight).sum())
    torch.testing.assert_close(found, weight.abs().sum(-1).expand(2, 4, 6, 6))


@pytest.mark.parametrize("by", ["motion", "reward", "value"])
def test_agents_draw_masks_by_relevance(by, monkeypatch):
    """What moves is hidden first; with reward and value, masks come from gradients that leave no trace in the agent."""
    agent, batch = make_agent("--mask_by", by, mask_ratio=0.03), make_batch()
    batch["image"][:] = 90
    batch["image"][:, 1::2, 20:30, 40:50] = 200
    if by != "motion":  # both heads begin as constants
        head = agent.world_model.reward_head if by == "reward" else agent.actor_critic.critic
        torch.nn.init.normal_(head.out.weight)
    cubes, relevance = agent.world_model.representation.cube_mask, []
    draw_by = cubes.draw_by
    monkeypatch.setattr(cubes, "draw_by", lambda x: relevance.append(x) or draw_by(x))
    mask = agent.draw_mask(batch)
    assert relevance[0].any()  # the other head, still a constant, would have no influence
    assert mask.shape == (8, 64, 64) and mask.any((1, 2)).all()
    assert all(p.grad is None for p in agent.parameters())
    if by == "motion":
        assert mask[:, 24, 44].all()
    agent.update(batch)
    assert make_agent().draw_mask(batch) is None


def test_hidden_pixels_are_mid_grey_and_the_rest_is_untouched():
    agent, batch = make_agent(), make_batch()
    hybrid = agent.world_model.representation
    obs = agent.world_model.preprocess(batch)
    mask = hybrid.cube_mask.draw(obs["image"].shape[1])
    seen = hybrid.hide(obs, mask)["image"]
    for b in range(len(seen)):
        assert (seen[b][mask] == 0).all()
        assert torch.equal(seen[b][~mask], obs["image"][b][~mask])


@pytest.mark.parametrize("name", hrssm.AUGMENTATIONS)
def test_augmentations_keep_shape_and_range(name):
    torch.manual_seed(0)
    image = torch.rand(2, 3, 64, 64, 3) - 0.5
    before = image.clone()
    out = hrssm.augment(image, [name])
    assert out.shape == image.shape and torch.equal(image, before)
    assert (name == "none") == torch.equal(out, image)
    assert out.abs().max() <= 0.5 * 1.1 + 1e-6
    assert torch.equal(hrssm.augment(image, [name], prob=0.0), image)


def test_shift_translates():
    torch.manual_seed(0)
    ramp = torch.arange(64.0).reshape(1, 64, 1, 1).expand(50, 64, 64, 1)
    moved = hrssm.augment(ramp, ["shift"])
    offsets = (moved - ramp)[:, 8:-8].flatten(1)
    assert (offsets == offsets[:, :1]).all()
    assert set(offsets[:, 0].tolist()) == set(range(-4, 5))


# --- losses ---------------------------------------------------------------------------------------------------------


def cosine(x, y, eps):
    return float(x @ y) / (max(float(x.norm()), eps) * max(float(y.norm()), eps))


def test_latent_reconstruction_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    expected = np.mean([2 - 2 * cosine(u[b, t], v[b, t], 1e-3) for b in range(3) for t in range(4)])
    assert float(hrssm.latent_reconstruction_loss(u, v)) == pytest.approx(expected, rel=1e-12)


def test_latent_reconstruction_of_vanishing_features():
    """Below the norm 1e-3 a vector is divided by 1e-3, not blown up to length one."""
    u = torch.tensor([[[1e-4, 0.0]]], dtype=torch.float64)
    v = torch.tensor([[[0.0, 1.0]]], dtype=torch.float64)
    assert float(hrssm.latent_reconstruction_loss(u, v)) == pytest.approx(0.1**2 + 1.0)


def test_bisimulation_against_a_double_loop():
    generator = torch.Generator().manual_seed(0)
    B, T, F = 2, 4, 6
    post, raw_post, prior, raw_prior = torch.randn(4, B, T, F, generator=generator, dtype=torch.float64)
    reward = 3 * torch.rand(B, T, generator=generator, dtype=torch.float64)
    pairs = [(b, t) for b in range(B) for t in range(T - 1)]
    total = 0.0
    for b, t in pairs:
        for c, s in pairs:
            distance = 1 - cosine(post[b, t], raw_post[c, s], 1e-12)
            successor = 1 - cosine(prior[b, t + 1], raw_prior[c, s + 1], 1e-12)
            error = abs(distance - (abs(float(reward[b, t] - reward[c, s])) + 0.9 * successor))
            total += 0.5 * error**2 if error < 1 else error - 0.5
    loss = hrssm.bisimulation_loss(post, raw_post, prior, raw_prior, reward, 0.9)
    assert float(loss) == pytest.approx(total / len(pairs) ** 2, rel=1e-12)


def test_bisimulation_gradient_reaches_the_masked_posterior_alone():
    inputs = [torch.randn(2, 3, 4, requires_grad=True) for _ in range(4)]
    hrssm.bisimulation_loss(*inputs, torch.rand(2, 3), 0.99).backward()
    assert inputs[0].grad.abs().sum() > 0
    assert all(x.grad is None for x in inputs[1:])


def test_reward_scale_of_the_bisimulation_loss():
    assert hrssm.bisimulation_reward_scale("rms_lift_cube") == 2 / 6.5
    assert hrssm.bisimulation_reward_scale("rms_pick_cube") == 1
    assert hrssm.bisimulation_reward_scale("dmc_walker_walk") == 1
    assert hrssm.bisimulation_reward_scale("rms_lift_cube", reward_max=8.0) == 0.25


def test_the_bisimulation_loss_sees_rewards_up_to_the_named_maximum_as_up_to_two():
    loss = {}
    for name, factor, flags in [("paper", 1.0, {}), ("larger", 4.0, {}), ("scaled", 4.0, {"simsr_reward_max": 8.0})]:
        agent, batch = make_agent(**flags), make_batch()
        batch["reward"] *= factor
        torch.manual_seed(0)
        loss[name] = float(agent.world_model.loss(batch)[2]["simsr_loss"])
    assert loss["scaled"] == pytest.approx(loss["paper"], rel=1e-5) and loss["larger"] > 1.5 * loss["paper"]


# --- branches -------------------------------------------------------------------------------------------------------


def test_raw_branch_shares_history_and_shifts_by_one(monkeypatch):
    """Its posterior sits on the mask branch's recurrent state; its prior is one EMA step from the shifted posterior."""
    agent, batch = make_agent(), make_batch(resets=[(0, 0), (1, 0), (1, 5)])
    hybrid = agent.world_model.representation
    data = agent.world_model.preprocess(batch)
    with torch.no_grad():
        for parameter in hybrid.raw_dynamics.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        out = hybrid(data)
        raw = hybrid.raw_dynamics
        initial = raw.initial(())
        assert torch.equal(out.raw_post.deter, out.post.deter)
        for b in range(2):
            for t in range(8):
                previous = initial if data["is_first"][b, t] or t == 0 else out.raw_post.map(lambda x: x[b, t - 1])  # noqa: B023
                action = torch.zeros(3) if data["is_first"][b, t] else data["action"][b, t]
                deter = raw.img_step(previous, action).deter
                torch.testing.assert_close(out.raw_prior.deter[b, t], deter, rtol=1e-4, atol=1e-5)


def test_gradient_routing():
    """The world-model loss trains encoder, RSSM and heads; never the raw branch, the actor or the critics."""
    agent, batch = make_agent(), make_batch()
    loss, branches, _ = agent.world_model.loss(batch)
    loss.backward()
    without = {".".join(name.split(".")[:3]) for name, p in agent.named_parameters() if p.grad is None}
    raw = {f"world_model.representation.raw_{part}" for part in ("encoder", "dynamics", "projector")}
    assert {name for name in without if name.startswith("world_model")} == raw
    assert all(p.grad is None for p in agent.actor_critic.parameters())
    assert all(p.grad.any() for p in agent.world_model.representation.parameters() if p.requires_grad)
    assert not any(x.requires_grad for x in (*branches.raw_post[:3], *branches.raw_prior[:3]))


@pytest.mark.parametrize("flags, trained", [({}, True), ({"nomlr": True}, False)])
def test_projector_is_trained_by_latent_reconstruction_alone(flags, trained):
    agent = make_agent(**flags)
    agent.world_model.loss(make_batch())[0].backward()
    assert (agent.world_model.representation.projector.weight.grad is not None) == trained


def test_ema_follows_with_its_rates():
    agent, batch = make_agent(encoder_tau=0.25, dynamics_tau=0.5), make_batch()
    hybrid = agent.world_model.representation
    before = {k: v.clone() for k, v in hybrid.state_dict().items()}
    agent.world_model.update(batch)
    for part, raw, rate in (("encoder", "raw_encoder", 0.25), ("dynamics", "raw_dynamics", 0.5)):
        for name, online in getattr(hybrid, part).named_parameters():
            expected = rate * online + (1 - rate) * before[f"{raw}.{name}"]
            torch.testing.assert_close(getattr(hybrid, raw).get_parameter(name), expected.detach())
            assert not torch.equal(online, before[f"{part}.{name}"])


def test_what_the_projection_reads():
    """The branches differ in the stochastic part alone: a projection of the rest is the same in both."""
    agent, batch = make_agent(), make_batch()
    masked, other, share, kl = projection.compare(agent, batch)
    assert masked < 0.99 and other < 0.99 and 0.01 < share < 100 and kl > 0.001
    width = agent.world_model.dynamics.stoch_size
    for unread, expected in [(slice(width), 0.0), (slice(width, None), math.inf)]:
        agent = make_agent()
        branches = agent.world_model.representation
        for projector in (branches.projector, branches.raw_projector):
            projector.weight.data[:, unread] = 0.0
        masked, _, share, _ = projection.compare(agent, batch)
        assert share == expected and (masked > 1 - 1e-6) == (expected == 0)


@pytest.mark.parametrize("classes", ["0", "4"])
def test_the_branches_agree_without_a_mask(classes):
    agent = make_agent("--mask_ratio", "0", "--dyn_discrete", classes)
    assert projection.compare(agent, make_batch())[3] == pytest.approx(0, abs=1e-6)
