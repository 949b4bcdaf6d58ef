"""Some updates beside recorded runs of the original code: metrics, gradients, parameter changes and actions must agree.

The recordings in `tests/upstream/recorded` are always compared. Larger ones, of more variants, are read from
`$HRSSM_ORACLE`, else from `$HRSSM_TEST_DATA/oracle` (HRSSM) and `oracle_baselines` (other methods).
`tests/upstream/record.py` makes both from a checkout of HRSSM or of dreamerv3-torch.
"""

import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import gymnasium
import numpy as np
import pytest
import torch

import dreamer
import networks
import tools
from tests.helpers import ROOT
from tests.upstream import formula, transdreamer

ARGMAX = ["default", "nomlr", "nosimsr", "ablate2", "midfirst", "mask0", "mask1", "rms", "noise", "reinforce", "both"]
ARGMAX += ["onehot", "freebits", "mixed", "clip"]
PEAKED = ["default", "nomlr", "nosimsr", "midfirst", "mask1"]
VARIANTS = [f"argmax_{name}" for name in ARGMAX] + [f"peaked_{name}" for name in PEAKED]
BASELINES = [f"dreamer_{name}" for name in ("default", "midfirst", "mixed", "onehot", "clip", "sigmoid")]
BASELINES += [f"rssm_{name}" for name in ("default", "midfirst", "nograd", "freebits")]
BASELINES += ["r2dreamer_default", "r2dreamer_midfirst", "infonce_default"]
SHIPPED = sorted(set((ROOT / "tests/upstream/recorded").glob("*.npz")) - {transdreamer.RECORDED})


class Limits(NamedTuple):
    """How far we may be from a recording. Relative to the number (`*_rtol`), or absolute (`*_atol`)."""

    metric_rtol: float
    metric_atol: float
    norm_rtol: float
    change_rtol: float
    change_atol: float
    element_atol: float
    action_atol: float


ARGMAX_LIMITS = {
    "f64": Limits(1e-9, 1e-11, 1e-9, 1e-9, 1e-12, 1e-12, 1e-11),
    "f32": Limits(1e-4, 1e-6, 1e-4, 1e-3, 1e-5, 2e-6, 1e-5),
}
# Peaked recordings leave real draws in place, so they agree only as far as upstream agrees with itself.
PEAKED_LIMITS = {
    "f64": Limits(1e-5, 1e-5, 1e-4, 2e-5, 1e-8, 1e-8, 1e-8),
    "f32": Limits(1e-5, 1e-5, 1e-4, 2e-5, 1e-8, 1e-8, 1e-5),
}


def load(name: str, folder: str = "oracle"):
    """A file of `$HRSSM_ORACLE` or else of a folder in `$HRSSM_TEST_DATA`; skips the test if there is none."""
    root, data = os.environ.get("HRSSM_ORACLE"), os.environ.get("HRSSM_TEST_DATA")
    path = Path(root or Path(data or "none", folder), name)
    if not path.exists():
        pytest.skip(f"{name} is not recorded: run tests/upstream/record.py and set HRSSM_ORACLE")
    return torch.load(path, weights_only=True)


@pytest.fixture(params=["f64", "f32"])
def precision(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if request.param == "f64" else torch.float32)
    yield request.param
    torch.set_default_dtype(before)


def close(ours, theirs, rtol: float, atol: float, what: str) -> None:
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=rtol, atol=atol, err_msg=what)


def our_config(recorded: dict, method: str) -> SimpleNamespace:
    """Our defaults with the options of a recording that exist here."""
    defaults = vars(tools.load_config([]))

    def overlay(base: dict, update: dict) -> dict:
        known = {key: value for key, value in update.items() if key in base}
        return base | {k: overlay(base[k], v) if isinstance(v, dict) else v for k, v in known.items()}

    # The probe decoder of `video_pred_log` would add metrics; dreamerv3-torch makes its pictures without one.
    return SimpleNamespace(**overlay(defaults, recorded) | {"method": method, "video_pred_log": False})


class Replica:
    """Our agent with the configuration, weights, batch, return range and masks of a recording."""

    def __init__(self, config: dict, state: dict, batch: dict, return_range, grids=None, method: str = "hrssm"):
        self.batch, self.grids = batch, grids
        box = gymnasium.spaces.Box
        shapes = {k: v.shape[2:] for k, v in batch.items() if v.dim() > 2 and k != "action"}
        obs_space = {k: box(-np.inf, np.inf, shape) for k, shape in shapes.items()}
        actions = config["num_actions"]
        discrete = config["actor_dist"] == "onehot"
        act_space = gymnasium.spaces.Discrete(actions) if discrete else box(-1, 1, (actions,))
        self.agent = dreamer.make_agent(our_config(config, method), gymnasium.spaces.Dict(obs_space), act_space)
        self.agent.load_upstream(state)
        self.agent.actor_critic.return_norm.quantiles.copy_(torch.tensor(return_range))
        # our name -> upstream's
        self.names = dreamer.upstream_names({key: key for key in state})
        self.start = {k: v.detach().clone() for k, v in self.agent.named_parameters()}
        self.grad_norms = {}
        for name, parameter in self.agent.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p, name=name: self.record(name, p.grad))

    def record(self, name, grad) -> None:
        self.grad_norms[self.names[name]] = float(grad.norm())

    def update(self, index: int) -> dict[str, float]:
        self.grad_norms.clear()
        mask = None
        if self.grids is not None:
            steps = self.batch["reward"].shape[1]
            mask = self.agent.world_model.representation.cube_mask.expand(self.grids[index].bool(), steps)
        return {k: float(v) for k, v in self.agent.update(self.batch, mask).items()}

    def act(self) -> dict[str, torch.Tensor]:
        """Evaluation actions for rows 0 and 1, t = 0..5; environment 1 is reset before step 3."""
        carry, found = None, {"action": [], "deter": [], "idx": []}
        for t in range(6):
            obs = {k: v[:2, t].numpy() for k, v in self.batch.items() if k not in ("action", "reward", "discount")}
            obs["is_first"] = np.array([t == 0, t in (0, 3)])
            action, carry = self.agent.policy(obs, carry, training=False)
            found["action"].append(action)
            found["deter"].append(carry.state.deter)
            found["idx"].append(carry.state.stoch.argmax(-1))
        return {k: torch.stack(v) for k, v in found.items()}


def summary(x: torch.Tensor) -> dict[str, float]:
    flat = x.double().flatten()
    wave = torch.cos(0.7 * torch.arange(len(flat), dtype=torch.float64) + 0.3)
    return {"l2": float(flat.norm()), "proj": float((flat * wave).sum())}


def fix_draws(monkeypatch, noise: float) -> None:
    """The most probable class and constant noise, as in the recordings."""
    monkeypatch.setattr(
        networks,
        "draw_onehot",
        lambda probs: torch.nn.functional.one_hot(probs.argmax(-1), probs.shape[-1]).to(probs.dtype),
    )
    monkeypatch.setattr(networks, "draw_normal", lambda mean: torch.full_like(mean, noise))


def assert_equal_run(replica: Replica, expected: dict, limits: Limits, gradients: bool = True) -> None:
    """Act, train and act again. Without `gradients` neither these nor the changes they make are compared."""

    def check_policy(key: str) -> None:
        found = replica.act()
        assert torch.equal(found["idx"], expected[key]["idx"].long()), key
        close(found["action"], expected[key]["action"], 0, limits.action_atol, f"{key} action")
        if "deter" in expected[key]:
            close(found["deter"], expected[key]["deter"], 0, limits.action_atol * 10, f"{key} deter")

    check_policy("policy_before")
    for index, update in enumerate(expected["updates"]):
        metrics = replica.update(index)
        # dreamerv3-torch does not report the extremes of the reward.
        assert metrics.keys() - update["metrics"].keys() <= {"min_reward", "max_reward"}
        assert update["metrics"].keys() <= metrics.keys()
        for name, value in update["metrics"].items():
            close(metrics[name], value, limits.metric_rtol, limits.metric_atol, f"update {index}: {name}")
        quantiles = update["reward_ema"] if "reward_ema" in update else update["return_range"]
        ours = replica.agent.actor_critic.return_norm.quantiles
        close(ours, quantiles, limits.metric_rtol, limits.metric_atol, "return quantiles")
        if not gradients:
            continue
        assert replica.grad_norms.keys() == update["grad_norms"].keys()
        for name, value in update["grad_norms"].items():
            close(replica.grad_norms[name], value, limits.norm_rtol, 1e-12, f"update {index}: {name}")
        if "params" not in update:
            continue
        for name, parameter in replica.agent.named_parameters():
            theirs = update["params"][replica.names[name]]
            change = parameter.detach() - replica.start[name]
            what, ours, atol = f"update {index}: change of {name}", summary(change), limits.change_atol
            close(ours["l2"], theirs["delta"]["l2"], limits.change_rtol, atol, what)
            # A projection may be near zero: what is relative is so to the norm.
            atol += limits.change_rtol * theirs["delta"]["l2"]
            close(ours["proj"], theirs["delta"]["proj"], 0, atol, f"{what}, projected")
            elements = change.flatten()[: len(theirs["dhead"])]
            close(elements, theirs["dhead"], 0, limits.element_atol, f"update {index}: head of {name}")
    check_policy("policy_after")


@pytest.mark.parametrize("variant", VARIANTS)
def test_five_updates_equal_upstream(variant, precision, monkeypatch):
    oracle = load(f"oracle_{variant}.pt")
    peaked = oracle["family"] == "peaked"
    if not peaked:
        fix_draws(monkeypatch, oracle["noise"] or 0.0)
    torch.manual_seed(0)
    state, batch = load(oracle["state_file"]), load(oracle["batch_file"])
    replica = Replica(oracle["config"], state, batch, oracle["reward_ema_init"], oracle["mask_grids"])
    limits = (PEAKED_LIMITS if peaked else ARGMAX_LIMITS)[precision]
    # The gradients of saturated latents are rounding noise in float32.
    assert_equal_run(replica, oracle[precision], limits, gradients=not peaked or precision == "f64")


@pytest.mark.parametrize("variant", BASELINES)
def test_baselines_equal_their_originals(variant, precision, monkeypatch):
    method = variant.split("_")[0]
    oracle = load(f"{variant}.pt", "oracle_baselines")
    fix_draws(monkeypatch, oracle["noise"])
    state, batch = (load(oracle[f"{what}_file"], "oracle_baselines") for what in ("state", "batch"))
    replica = Replica(oracle["config"], state, batch, oracle["return_range_init"], method=method)
    assert_equal_run(replica, oracle[precision], ARGMAX_LIMITS[precision])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_updates_equal_the_recordings_in_the_repository(path, precision, monkeypatch):
    recording = formula.read(path)
    config, method = recording["config"], recording["method"]
    fix_draws(monkeypatch, formula.NOISE)
    state = {name: formula.weight(name, shape) for name, shape in recording["shapes"].items()}
    batch = formula.batch(config["num_actions"], config["actor_dist"] == "onehot", recording["vectors"])
    grids = formula.grids() if method == "hrssm" else None
    replica = Replica(config, state, batch, recording["return_range_init"], grids, method)
    assert_equal_run(replica, recording[precision], ARGMAX_LIMITS[precision])


def test_recordings_are_there():
    assert [path.stem for path in SHIPPED] == ["dreamer", "hrssm", "hrssm_nomlr_nosimsr", "hrssm_onehot", "rssm"]


def test_key_names_of_compiled_checkpoints():
    """`_orig_mod.` in the keys changes nothing."""
    plain, compiled = load("oracle_state_argmax.pt"), load("oracle_state_argmax_compiled_keys.pt")
    plain, compiled = dreamer.upstream_names(plain), dreamer.upstream_names(compiled)
    assert plain.keys() == compiled.keys()
    assert all(torch.equal(plain[k], compiled[k]) for k in plain)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_key_names_of_compiled_parts(path):
    """The same for every part that upstream's `compile` wraps, in the recordings of the repository."""
    state = {name: formula.weight(name, shape) for name, shape in formula.read(path)["shapes"].items()}
    compiled = {re.sub(r"^(\w+\.)", r"\1_orig_mod.", name): value for name, value in state.items()}
    assert compiled.keys() != state.keys()
    found = dreamer.upstream_names(compiled)
    assert found and found.keys() == dreamer.upstream_names(state).keys()
