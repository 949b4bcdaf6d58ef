"""Operations per update, each one launch of a GPU kernel or more, and the fast parts beside their plain versions."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import models
import networks
from tests.helpers import make_agent, make_batch

FREE = "detach|alias|empty|new_empty|empty_like|empty_strided|new_empty_strided|_unsafe_view|lift_fresh|set_|squeeze_|"
FREE = set(
    f"{FREE}unsqueeze_|transpose_|_local_scalar_dense|_record_function_enter_new|_record_function_exit".split("|")
)


class Launches(TorchDispatchMode):
    """Counts what is dispatched, apart from views and allocations."""

    def __init__(self):
        super().__init__()
        self.names: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and name not in FREE:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


def launches(steps: int, horizon: int, *argv: str, **options) -> int:
    agent = make_agent("--dyn_discrete", "8", "--imag_horizon", str(horizon), *argv, **options)
    batch = make_batch(steps=steps, discrete=options.get("discrete", False))
    agent.update(batch)
    with Launches() as counted:
        agent.update(batch)
    return counted.names.total()


# Launches of one step of the recurrence, one of imagination, and of the rest of an update, forward and backward.
LIMITS = {
    "": (35, 69, 720),
    "--method dreamer": (35, 69, 600),
    "--method r2dreamer": (35, 69, 630),
    "--method repo": (35, 69, 600),
    "--dyn_shared True": (87, 84, 790),
}


@pytest.mark.parametrize("argv", LIMITS)
def test_launches_per_update(argv):
    start, longer, further = (launches(*sizes, *argv.split()) for sizes in ((3, 3), (4, 3), (3, 4)))
    found = (longer - start, further - start, start - 3 * (longer - start) - 3 * (further - start))
    assert all(number <= limit for number, limit in zip(found, LIMITS[argv], strict=True)), found
    total = found[0] * 64 + found[1] * 15 + found[2]
    print(f"{argv or 'defaults'}: {found[0]} x 64 + {found[1]} x 15 + {found[2]} = {total}")
    assert argv or total < 4000


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """The parts that are plain on a CPU, too."""
    monkeypatch.setattr(networks.RSSM, "fast_on_cpu", True)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def fix_draws(monkeypatch) -> None:
    monkeypatch.setattr(networks, "draw_onehot", lambda p, *_: F.one_hot(p.argmax(-1), p.shape[-1]).to(p))
    monkeypatch.setattr(networks, "draw_normal", lambda mean: torch.full_like(mean, 0.3))


def assert_both_equal(run, switch, rtol: float = 1e-9) -> None:
    """Tensors that `run` returns are the same after `switch`."""
    fast = run()
    switch()
    for ours, plain in zip(fast, run(), strict=True):
        assert ours.dtype == plain.dtype
        torch.testing.assert_close(ours, plain, rtol=rtol, atol=rtol * float(plain.detach().abs().max()))


@pytest.mark.parametrize("classes", [2, 8])
def test_fast_steps_equal_the_plain_rssm(classes, double, monkeypatch):
    """Values and gradients of filter and imagination, resets and learned initial state included; also twice."""
    fix_draws(monkeypatch)
    rssm = make_agent("--dyn_discrete", str(classes)).world_model.dynamics
    for parameter in rssm.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    batch = make_batch(resets=[(0, 0), (1, 0), (1, 3), (0, 7)])
    embed, action = torch.randn(2, 8, rssm.embed, requires_grad=True), batch["action"].double().requires_grad_()

    def run():
        post, prior = rssm.observe(embed, action, batch["is_first"])
        step, state = rssm.imagination(16, 2), post.map(lambda x: x.flatten(0, 1))
        for _ in range(2):
            state = step(state, action.flatten(0, 1))
        values = [*post, *prior, *state]
        loss = sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in values)
        inputs = [embed, action, *rssm.parameters()]
        return [*values, *(x for _ in range(2) for x in torch.autograd.grad(loss, inputs, retain_graph=True))]

    assert rssm.fast
    assert_both_equal(run, lambda: setattr(rssm, "fast", False))


def test_gradients_of_fast_steps(double, monkeypatch):
    """Against finite differences, with draws that are constant and without their surrogate gradient."""
    monkeypatch.setattr(networks, "draw_onehot", lambda p, *_: F.one_hot(torch.zeros_like(p[..., 0]).long(), 4).to(p))
    rssm = make_agent("--dyn_deter=3", "--dyn_hidden=3", "--dyn_stoch=2").world_model.dynamics
    first = torch.tensor([[True, False, True], [True, True, False]])
    draws, start = rssm._prepare_draws(3, 2), rssm.initial((2,)).detach()
    rssm.unimix = 1.0  # the surrogate's weight is 1 - unimix
    weights = [x.detach().requires_grad_() for x in rssm._post_weights()]
    parts = [torch.randn(2, 3, 3, requires_grad=True) for _ in range(2)]
    deter = start.deter.clone().requires_grad_()

    def run(deter, action_part, embed_part, *weights):
        state = rssm._fast_steps(
            start._replace(deter=deter), action_part, networks.StepWeights(*weights), *draws, embed_part, first
        )
        return state.deter, state.logit

    assert torch.autograd.gradcheck(run, (deter, *parts, *weights))


def test_fast_steps_in_bf16_stay_close(monkeypatch):
    """Products in bfloat16: as far from float32 as the plain code is, about."""
    fix_draws(monkeypatch)
    rssm = make_agent().world_model.dynamics
    embed, batch = torch.randn(2, 8, rssm.embed), make_batch()

    def run(low: bool):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            post, _ = rssm.observe(embed, batch["action"], batch["is_first"])
        grads = torch.autograd.grad(post.deter.square().sum() + post.logit.square().sum(), rssm.post_head.weight)
        return [post.deter, post.logit, *grads]

    for low, full in zip(run(True), run(False), strict=True):
        assert low.dtype == torch.float32
        assert (low - full).norm() <= 0.05 * full.norm()


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_sequence_mlp_is_an_mlp(layers, double):
    mlp = networks.MLP(5, 4, layers=layers, units=6, act="SiLU", norm="LayerNorm")
    x = torch.randn(3, 7, 5)

    def run(make):
        call = make(mlp)
        loss = sum(call(part).sin().sum() * (k + 1) for k, part in enumerate(x))
        return [
            loss,
            *(g for _ in range(2) for g in torch.autograd.grad(loss, list(mlp.parameters()), retain_graph=True)),
        ]

    assert networks.SequenceMLP.serves(mlp)
    assert not networks.SequenceMLP.serves(networks.MLP(5, 4, layers=1, units=6, act="ELU", norm="LayerNorm"))
    for ours, plain in zip(run(networks.SequenceMLP), run(lambda mlp: mlp), strict=True):
        torch.testing.assert_close(ours, plain)


def test_lambda_return_gradients(double):
    inputs = [torch.rand(5, 3, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *x: models.lambda_return(*x, 0.9), inputs)


def test_draws_prepared_in_advance():
    """Same numbers, same draws; the memory may be used again."""
    probs = torch.softmax(torch.randn(4, 6, 5), -1)
    below = networks.below_threshold(probs)
    for _ in range(3):
        uniform = torch.rand(4, 6, 1)
        found = networks.draw_onehot(probs, uniform, below)
        index = (probs.cumsum(-1)[..., :-1] <= uniform).sum(-1)
        assert torch.equal(found, F.one_hot(index, 5).float())
    assert torch.equal(
        networks.draw_onehot(probs, torch.zeros(4, 6, 1)).argmax(-1), torch.zeros(4, 6, dtype=torch.long)
    )
    # not a number picks the first class and nothing else
    assert networks.draw_onehot(probs * torch.nan).sum() == 24
