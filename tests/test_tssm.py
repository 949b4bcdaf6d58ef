"""The transformer state-space model: one pass against step by step, causality, TransDreamer, whole runs."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

import dreamer
import models
import networks
import tools
from exploration import Carry
from figures import openloop
from networks import TSSM, Block, Memory, State
from tests.bench.soak import DOT
from tests.helpers import make_agent, make_batch
from tests.test_train import assert_same, final_state, start_in_process
from tests.upstream import formula, transdreamer

B, T, A, E = 2, 16, 3, 10
RESETS = [(0, 0), (0, 3), (0, 4), (1, 7), (1, 15)]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
ARGV = ["--dynamics", "tssm", "--tssm_ff", "32"]


@pytest.fixture(params=TOLERANCE, ids=str)
def dtype(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make(window: int = T, gate: bool = False, **options) -> TSSM:
    torch.manual_seed(0)
    sizes = {"actions": A, "embed": E, "stoch": 4, "discrete": 5, "deter": 24, "hidden": 20, "layers": 3, "heads": 4}
    model = TSSM(**sizes | {"ff": 32, "window": window, "gate": gate} | options)
    with torch.no_grad():
        model.bias.normal_()
        model.initial_deter.normal_()
    return model


def sequence(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings (B,T,E), actions (B,T,A), is_first (B,T)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, T, E + A, generator=generator, dtype=torch.get_default_dtype())
    first = torch.zeros(B, T, dtype=torch.bool)
    for row, step in RESETS:
        first[row, step] = True
    return x[..., :E], x[..., E:], first


def close(x: torch.Tensor, y: torch.Tensor, tolerance: float) -> None:
    assert x.shape == y.shape
    assert (x - y).abs().max() <= tolerance


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("window", [64, T, 5, 1])
def test_one_pass_is_step_by_step(window, gate, dtype):
    model, (embed, action, first) = make(window, gate, input_layers=2), sequence()
    post, prior = model.observe(embed, action, first, sample=False)
    state = model.initial((B,))
    for t in range(T):
        state = model.obs_step(state, action[:, t], embed[:, t], first[:, t], sample=False)
        for name in ("deter", "stoch", "logit"):
            close(getattr(state, name), getattr(post, name)[:, t], TOLERANCE[dtype])
    again = model.img_step(model.shift(post, first), torch.where(first.unsqueeze(-1), 0.0, action), sample=False)
    close(again.logit, prior.logit, TOLERANCE[dtype])


@pytest.mark.parametrize("window", [T + 4, 5, 2])
def test_imagination_on_the_shared_past_is_one_pass(window, dtype):
    """Four steps from every state, and from some of them, against a pass over the same latents."""
    model, (embed, action, first) = make(window), sequence()
    start, _ = model.observe(embed, action, first, sample=False)
    actions = torch.randn(4, B * T, A)
    index = torch.randperm(B * T)[:7]
    states, some = [start.detach().flatten()], [start.detach().flatten().select(index)]
    for k in range(4):
        states.append(model.img_step(states[k], actions[k], sample=False))
        some.append(model.img_step(some[k], actions[k][index], sample=False))
        close(some[-1].feat, states[-1].feat[index], TOLERANCE[dtype])
    # A posterior that copies the latent out of the embedding
    size = model.stoch_size
    model.posterior = lambda deter, embed, sample: State(deter, *[embed.unflatten(-1, model.stoch_shape)] * 2)
    imagined = torch.stack([state.stoch.reshape(B, T, size) for state in states[1:]], 2)
    for t in range(T):
        latents = torch.cat([start.stoch[:, : t + 1].flatten(2), imagined[:, t]], 1)
        taken = torch.cat([action[:, : t + 1], actions.reshape(4, B, T, A)[:, :, t].transpose(0, 1)], 1)
        begun = torch.cat([first[:, : t + 1], first.new_zeros(B, 4)], 1)
        post, _ = model.observe(latents, taken, begun, sample=False)
        for k in range(1, 5):
            close(states[k].deter.reshape(B, T, -1)[:, t], post.deter[:, t + k], TOLERANCE[dtype])


@pytest.mark.parametrize("step", [10, 3, 7])
def test_causality(step):
    """A random change of an action changes what follows in its episode and nothing else, exactly."""
    model, (embed, action, first) = make(), sequence()
    changed = action.clone().requires_grad_()
    with torch.no_grad():
        changed[:, step] += torch.randn(B, A)
    before, after = (
        model.observe(embed, action, first, sample=False),
        model.observe(embed, changed, first, sample=False),
    )
    episode = first.cumsum(1)
    expected = (episode == episode[:, step : step + 1]) & (torch.arange(T) >= step) & ~first[:, step : step + 1]
    for one, other in zip(before, after, strict=True):
        assert torch.equal((one.deter != other.deter).any(-1), expected)
    assert after[0].deter.requires_grad and not after[0].memory.past.requires_grad
    (gradient,) = torch.autograd.grad(after[0].deter[:, step, 0].sum(), changed)
    seen = (episode == episode[:, step : step + 1]) & (torch.arange(T) <= step) & ~first
    assert torch.equal(gradient.any(-1), seen)


def test_window_limits_what_a_layer_sees():
    model, (embed, action, _) = make(5, layers=1), sequence()
    changed = action.clone()
    changed[:, 6] += torch.randn(B, A)
    none = torch.zeros(B, T, dtype=torch.bool)
    one, other = (model.observe(embed, a, none, sample=False)[0].deter for a in (action, changed))
    steps = (one != other).any(-1).any(0).nonzero().flatten().tolist()
    assert steps == [6, 7, 8, 9, 10]


def test_recent_steps_weigh_more_at_the_start():
    bias = TSSM(actions=A, embed=E, stoch=4, discrete=5, deter=24, hidden=20, heads=4, window=3).bias
    assert torch.equal(
        bias, torch.tensor([[0.0] * 4, [-1 / 4, -1 / 16, -1 / 64, -1 / 256], [-1 / 2, -1 / 8, -1 / 32, -1 / 128]])
    )


def test_raw_branch_attends_to_what_the_mask_branch_computed(double):
    """Its prior is one step of the moving average, from its own last latent, on the mask branch's keys and values."""
    agent, batch = make_agent(*ARGV), make_batch(resets=[(0, 0), (1, 0), (1, 5)])
    hybrid = agent.world_model.representation
    data = agent.world_model.preprocess(batch)
    with torch.no_grad():
        for parameter in hybrid.raw_dynamics.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        out = hybrid(data)
        raw, memory = hybrid.raw_dynamics, out.post.memory
        assert torch.equal(out.raw_post.deter, out.post.deter) and not memory.past.requires_grad
        for b in range(2):
            for t in range(8):
                reset = bool(data["is_first"][b, t])
                first = max(step for step in (0, 5 * b) if step <= t)
                seen = Memory(
                    memory.past[b : b + 1, first:t], torch.zeros(1), torch.full((1,), t - first), memory.own[b, :1]
                )
                last = raw.initial((1,)) if reset else State(*(x[b, t - 1 : t] for x in out.raw_post[:3]))
                action = torch.zeros(1, 3) if reset else data["action"][b, t : t + 1]
                prior = raw.img_step(last._replace(memory=seen), action)
                close(prior.logit[0], out.raw_prior.logit[b, t], 1e-12)


def test_shapes_do_not_depend_on_resets_and_everything_traces():
    model, (embed, action, first) = make(), sequence()

    def walk(first):
        start, _ = model.observe(embed, action, first)
        states = [start, start.flatten(), model.obs_step(model.initial((B,)), action[:, 0], embed[:, 0], first[:, 0])]
        return [*states, *(model.img_step(state, torch.zeros(*state.deter.shape[:-1], A)) for state in states)]

    found = [[x.shape for x in tree_leaves(walk(flags))] for flags in (first, ~first, first | True)]
    assert found[0] == found[1] == found[2] and len(found[0]) == 6 * 7
    agent = make_agent(*ARGV, "--tssm_layers", "1", "--tssm_gate", imag_horizon=3)
    agent.update = torch.compile(lambda batch: traced(agent, batch), fullgraph=True, backend="eager", dynamic=False)
    assert all(torch.isfinite(x) for x in agent.update(make_batch()))


def traced(agent: dreamer.Agent, batch: dict) -> list[torch.Tensor]:
    loss, filtered, _ = agent.world_model.loss(batch)
    index = torch.rand(16).argsort()[:3]
    start = filtered.start.detach().flatten().select(index)
    return [loss, *agent.actor_critic.loss(agent.world_model, start)[:2]]


def test_memory_survives_a_checkpoint():
    model, (embed, action, first) = make(), sequence()
    found = model.obs_step(model.initial((B,)), action[:, 0], embed[:, 0], first[:, 0])
    for state in (found, State(*found[:3])):
        carry = Carry(state, action[:, 0])
        tensors = carry.tensors()
        assert all(isinstance(x, torch.Tensor) for x in tensors)
        again = Carry.from_tensors(tensors)
        assert all(x is y for x, y in zip(tree_leaves(again), tree_leaves(carry), strict=True))


# --- TransDreamer ---------------------------------------------------------------------------------------------------


def copy_block(block: Block, weights: dict[str, torch.Tensor]) -> None:
    """Weights of one layer of the original, by their names in it."""

    def join(*names: str) -> torch.Tensor:
        return torch.cat([weights[f"{name}.net.weight"] for name in names])

    state = {"attention.qkv.weight": join("mah.q_net", "mah.k_net", "mah.v_net")}
    state |= {"attention.out.weight": join("mah.out_net")}
    for i, part in enumerate(("mah", "pos_ff")):
        state |= {f"norms.{i}.{kind}": weights[f"{part}.layer_norm.{kind}"] for kind in ("weight", "bias")}
    for i in (0, 2):
        state |= {f"ff.{i}.{kind}": weights[f"pos_ff.CoreNet.{i}.net.{kind}"] for kind in ("weight", "bias")}
    for i, gate in enumerate(["gate1", "gate2"] if block.gates else []):
        state[f"gates.{i}.y.weight"] = join(f"{gate}.Wr", f"{gate}.Wz", f"{gate}.Wg")
        state[f"gates.{i}.x.weight"] = join(f"{gate}.Ur", f"{gate}.Uz", f"{gate}.Ug")
        state[f"gates.{i}.bias"] = weights[f"{gate}.Uz.net.bias"] - 0.1
    block.load_state_dict(state)


def gradient_norms(block: Block) -> dict[str, torch.Tensor]:
    """Norms of gradients by the original's names."""
    gradients = {name: p.grad for name, p in block.named_parameters()}
    qkv = gradients["attention.qkv.weight"].chunk(3)
    found = {f"mah.{part}_net.net.weight": x for part, x in zip("qkv", qkv, strict=True)}
    found |= {"mah.out_net.net.weight": gradients["attention.out.weight"]}
    for kind in ("weight", "bias"):
        found |= {
            f"{part}.layer_norm.{kind}": gradients[f"norms.{i}.{kind}"] for i, part in enumerate(("mah", "pos_ff"))
        }
        found |= {f"pos_ff.CoreNet.{i}.net.{kind}": gradients[f"ff.{i}.{kind}"] for i in (0, 2)}
    for i, gate in enumerate(["gate1", "gate2"] if block.gates else []):
        for side, letter in (("y", "W"), ("x", "U")):
            parts = zip("rzg", gradients[f"gates.{i}.{side}.weight"].chunk(3), strict=True)
            found |= {f"{gate}.{letter}{part}.net.weight": x for part, x in parts}
        found[f"{gate}.Uz.net.bias"] = gradients[f"gates.{i}.bias"]
    return {name: x.norm() for name, x in found.items()}


@pytest.mark.parametrize("gate", [False, True])
def test_blocks_and_kl_equal_transdreamer(gate, double, monkeypatch):
    """With the original's weights: outputs of all layers, logits, KL loss, and gradients of every parameter."""
    shapes, recorded = transdreamer.read(gate)
    size, layers = transdreamer.WIDTH, transdreamer.LAYERS
    monkeypatch.setattr(networks, "draw_onehot", lambda p: F.one_hot(p.argmax(-1), p.shape[-1]).to(p))
    weights = {name: formula.weight(name, tuple(shape)).requires_grad_() for name, shape in shapes.items()}
    model = TSSM(
        actions=A,
        embed=E,
        stoch=transdreamer.GROUPS,
        discrete=transdreamer.CLASSES,
        deter=size,
        heads=1,
        unimix_ratio=0,
    )
    sizes = {"heads": transdreamer.HEADS, "head_size": transdreamer.HEAD_SIZE, "ff": transdreamer.FF}
    with torch.no_grad():
        model.bias.zero_()  # It has none.
    blocks = [Block(size, **sizes, act="ReLU", norm="LayerNorm", gate=gate, eps=1e-5) for _ in range(layers)]
    with torch.no_grad():
        for i, block in enumerate(blocks):
            prefix = f"cell.layers.{i}."
            copy_block(block, {k.removeprefix(prefix): x for k, x in weights.items() if k.startswith(prefix)})

    def mlp(name: str, x: torch.Tensor) -> torch.Tensor:
        for i in (0, 2):
            x = F.linear(
                F.elu(x) if i else x, weights[f"{name}.enc.{i}.net.weight"], weights[f"{name}.enc.{i}.net.bias"]
            )
        return x.unflatten(-1, model.stoch_shape)

    embed, action = transdreamer.inputs()
    post = mlp("post_stoch_mlp", embed)
    close(post.detach(), recorded["post"], 1e-10)
    # Its first token holds the first latent and the action after it; ours has another before.
    stoch = model.dist(post).sample()[:, :-1].flatten(2)
    x = torch.cat([action[:, 1:], stoch], -1)
    x = F.elu(F.linear(x, weights["act_stoch_mlp.net.weight"], weights["act_stoch_mlp.net.bias"]))
    step = torch.arange(x.shape[1])
    angle = step[:, None] / 10000 ** (torch.arange(0, size, 2) / size)
    x, outputs = x + torch.cat([angle.sin(), angle.cos()], -1), []
    mask = model._mask(step[:, None] - step, torch.ones(len(step), len(step), dtype=torch.bool))
    for block in blocks:
        x, _ = block(x, mask.unsqueeze(0))
        outputs.append(x)
    deter = torch.cat(outputs, -1)
    prior = mlp("prior_stoch_mlp", deter)
    close(deter.detach(), recorded["deter"], 1e-10)
    close(prior.detach(), recorded["prior"], 1e-10)

    one, other = model.dist(post[:, 1:]), model.dist(prior)
    rep, dyn = model.kl(one, other.detach()), model.kl(one.detach(), other)
    share = transdreamer.BALANCE
    loss = ((1 - share) * rep + share * dyn).sum(1).mean() / transdreamer.HORIZON
    close(loss.detach(), recorded["kl"], 1e-10)
    loss.backward()
    found = {name: x.grad.norm() for name, x in weights.items() if x.grad is not None}
    found |= {
        f"cell.layers.{i}.{name}": x for i, block in enumerate(blocks) for name, x in gradient_norms(block).items()
    }
    assert found.keys() == shapes.keys()
    for name, norm in zip(shapes, recorded["gradients"], strict=True):
        assert math.isclose(found[name], norm, rel_tol=1e-8, abs_tol=1e-12), name


# --- agents ---------------------------------------------------------------------------------------------------------

VARIANTS = {
    **{method: ["--method", method] for method in dreamer.METHODS},
    "gate, few starts": ["--tssm_gate", "--imag_starts", "5"],
    "gaussian": ["--dyn_discrete", "0", "--dyn_input_layers", "2"],
    "discrete": ["--actor_dist", "onehot", "--imag_gradient", "reinforce"],
    "bf16": ["--precision", "16", "--method", "rssm"],
    "norms": ["--norm", "RMSNorm", "--act", "ReLU", "--initial", "zeros", "--behavior_stop_grad", "False"],
    "plan2explore": ["--expl_behavior", "plan2explore", "--disag_models", "2", "--disag_target", "feat"],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_method_learns_and_acts(name):
    # Without free nats the prior always learns.
    argv = [*ARGV, *VARIANTS[name], "--decoder.cnn_depth", "4", "--model_lr", "3e-3", "--imag_horizon", "6"]
    argv += ["--kl_free", "0"]
    discrete = name == "discrete"
    agent, batch = make_agent(*argv, discrete=discrete), make_batch(resets=[(0, 0), (1, 3)], discrete=discrete)
    losses = [float(agent.update(batch, behavior=False)["model_loss"]) for _ in range(15)]
    assert losses[-1] < losses[0] and all(map(math.isfinite, losses))
    metrics = agent.update(batch)
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["actor_grad_norm"] > 0
    for p in (p for p in agent.world_model.representation.parameters() if p.requires_grad):
        assert p.grad.any() and torch.isfinite(p.grad).all()
    carry = None
    for t in range(8):
        obs = {k: v[:, t].numpy() for k, v in batch.items() if k not in ("action", "reward")}
        action, carry = agent.policy(obs, carry, training=t % 2 == 0)
        assert action.shape == (2, 3) and torch.isfinite(action).all()


def test_acting_filters_like_learning():
    """The policy's latent after eight steps is that of the batch, with modes."""
    agent, batch = (
        make_agent(*ARGV, "--method", "rssm", collect_dyn_sample=False),
        make_batch(resets=[(0, 0), (1, 0), (1, 5)]),
    )
    carry, data = None, agent.world_model.preprocess(batch)
    with torch.no_grad():
        embed = agent.world_model.representation.encoder(data)
        post, _ = agent.world_model.dynamics.observe(embed, data["action"], data["is_first"], sample=False)
    for t in range(8):
        obs = {k: v[:, t].numpy() for k, v in batch.items() if k not in ("action", "reward")}
        _, carry = agent.policy(obs, carry, training=False)
        close(carry.state.feat, post.feat[:, t], 1e-5)
        carry = carry._replace(action=batch["action"][:, min(t + 1, 7)])


def test_probe_predicts_open_loop():
    """Beyond the window and the batch, deterministic, and from the actions."""
    agent = make_agent(*ARGV, "--video_pred_log", "--decoder.cnn_depth", "4", "--tssm_window", "4")
    batch = make_batch(steps=30)
    agent.update(batch)
    frames = agent.probe.open_loop(agent.world_model, batch)
    assert frames.shape == (2, 30, 3 * 64, 64, 3) and torch.equal(
        frames, agent.probe.open_loop(agent.world_model, batch)
    )
    assert agent.world_model.dynamics.window == 4


def test_robustness_is_measured():
    """Of draws that do not differ it is complete, of noise it is not; imagination sees its own episode."""
    agent = make_agent(*ARGV)
    networks, batch = (agent.world_model, agent.actor_critic), make_batch(rows=6, steps=14, resets=[])
    noise = {key: batch[key].unflatten(0, (3, 2)).numpy() for key in ("image", "position")}
    equal = {key: np.repeat(values[:1], 3, 0) for key, values in noise.items()}
    clean, action, reward = {key: x[0] for key, x in noise.items()}, batch["action"][:2].numpy(), batch["reward"][:2]
    found, ideal = (models.diagnose(*networks, clean, seen, action, reward.numpy()) for seen in (noise, equal))
    assert ideal["denoising_factor"].value == pytest.approx(1.0, abs=1e-6) and found["denoising_factor"].value < 0.9
    assert ideal["acpc"].value == pytest.approx(0.0, abs=1e-6) and found["acpc"].value > 0.01
    both = models.react(*networks, clean, action).imagined
    alone = [models.react(*networks, {k: x[[e]] for k, x in clean.items()}, action[[e]]).imagined for e in range(2)]
    assert both.shape[:3] == (2, 2, models.ACPC_STEPS)
    torch.testing.assert_close(both, torch.cat(alone), rtol=0, atol=1e-5)


def test_actor_gradient_goes_through_tokens():
    """What an action does two steps later reaches it only through the keys and values of its token."""
    model, (embed, action, first) = make(layers=1), sequence()
    start = model.observe(embed, action, first, sample=False)[0].detach().flatten()
    first_action = torch.zeros(B * T, A, requires_grad=True)
    state = model.img_step(start, first_action, sample=False)
    state = state._replace(stoch=state.stoch.detach(), deter=state.deter.detach())
    state = model.img_step(state, torch.zeros(B * T, A), sample=False)
    (gradient,) = torch.autograd.grad(state.deter.square().sum(), first_action)
    assert gradient.any(-1).all()


def test_runs_resume_bit_for_bit(tmp_path):
    """Stopped among updates and in an episode; with exploration, probe and `--overlap`."""
    line = f"{DOT} {' '.join(ARGV)} --steps 160 --pretrain 6 --save_every 0 --configs tiny tssm --overlap"
    line += " --video_pred_log --decoder.minres 2 --decoder.cnn_depth 2 --imag_starts 5"
    line += " --expl_behavior plan2explore --disag_models 2 --disag_units 8"
    stops = [lambda run: run.learner.updates == 3, lambda run: run.policy_step == 32]
    states = []
    for folder, moments in (("stopped", stops), ("whole", [])):
        logdir = tmp_path / folder
        logdir.mkdir()
        for stop in [*moments, None]:
            run = start_in_process(line, logdir)
            dreamer.train(run, lambda run=run, stop=stop: stop is not None and stop(run))
            assert run.finished == (stop is None)
            run.close()
        states.append(final_state(logdir))
    assert_same(*states)
    picture = tmp_path / "openloop.png"
    tools.save_config(run.config, logdir, [])
    assert openloop.main([str(logdir), "--updates", "2", "--out", str(picture)]) == 0 and picture.exists()
    assert states[0]["live"][-1][3].shape[1:] == (8, 2, 2, 8, 3)


# --- options --------------------------------------------------------------------------------------------------------


def test_options_reach_the_model():
    agent = make_agent("--configs", "tssm", "--tssm_layers", "3", "--tssm_heads", "4", "--tssm_ff", "7", "--tssm_gate")
    model = agent.world_model.dynamics
    assert isinstance(model, TSSM) and len(model.blocks) == 3 and model.blocks[0].ff[0].out_features == 7
    assert isinstance(model.input[-1], torch.nn.Linear), "tokens are not activated"
    assert model.bias.shape == (8, 4) and model.blocks[0].gates is not None, "the window is cut to the batch"
    assert not model.temp_post and make_agent().world_model.dynamics.temp_post


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--tssm_heads", "7"], "--tssm_heads must divide --dyn_deter 24; 7 does not"),
        (["--dyn_shared"], "--dyn_shared and --dyn_rec_depth need --dynamics rssm"),
        (["--dyn_rec_depth", "2"], "--dyn_shared and --dyn_rec_depth need --dynamics rssm"),
        (["--tssm_layers", "0"], "--tssm_layers takes a whole number from 1 to 100, not 0"),
        (["--tssm_window", "0"], "--tssm_window takes a whole number from 1 to 65536, not 0"),
        (["--dynamics", "tsm"], "--dynamics takes rssm, tssm, not 'tsm': did you mean tssm"),
    ],
)
def test_what_cannot_work_is_one_line(argv, message):
    with pytest.raises(tools.UserError, match=message) as error:
        make_agent(*ARGV, *argv)
    assert "\n" not in str(error.value)


def test_flags_of_the_other_dynamics_are_named(capsys):
    flags = ["--tssm_layers", "3", "--dyn_cell=gru", "--dyn_temp_post", "False", "--dyn_deter", "8"]
    dreamer.warn_idle_options("hrssm", flags, dynamics="tssm")
    dreamer.warn_idle_options("hrssm", flags)
    assert capsys.readouterr().err.splitlines() == [
        "warning: --dyn_cell has no effect with --dynamics tssm",
        "warning: --dyn_temp_post has no effect with --dynamics tssm",
        "warning: --tssm_layers has no effect with --dynamics rssm",
    ]
