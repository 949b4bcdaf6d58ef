"""Record reference numbers by running the original code: HRSSM's, or the dreamerv3-torch from which that was forked.

    export OMP_NUM_THREADS=1
    python tests/upstream/record.py --upstream CHECKOUT --out recorded [--data DIR] [--variants NAME ...]
    python tests/upstream/record.py --upstream CHECKOUT --formula [--out tests/upstream/recorded]

CHECKOUT is one of github.com/bit1029public/HRSSM or of github.com/NM512/dreamerv3-torch at commit 49d12ba, with a
decoder (variants `dreamer_*`) and without (`rssm_*`).

The original agent is built in a small configuration, given generic weights, and trained for five updates (three of
dreamerv3-torch) on one fixed batch, once in float32 and once in float64. Every metric, gradient norm and parameter
change, and the actions of the evaluation policy before and after, go to `oracle_<variant>.pt` (dreamerv3-torch:
`<variant>.pt`) in the output folder, beside the weights and the batch that were used. Weights are a state dict of the
original, of dreamerv3-torch without repeated tensors. Weights and batches that `--data` holds are used instead of new
ones; if it holds the result of a variant too, the largest differences are printed.

`--formula` writes the small recordings that are part of the repository: weights, batch and masks come from
`formula.py`, so that only results are stored.

Two families of variants of HRSSM (dreamerv3-torch is recorded as argmax, with noise 0.9):

argmax: drawing a class returns the most probable one and standard-normal noise is the constant `noise` of the variant.
peaked: nothing is replaced; the weights make every draw certain (one class leads by about 25 nats or more). They are
        not made here but taken from `--data`. Gradients that vanish, as the encoder's, are rounding noise in float32.

Libraries that upstream imports for parts that do not run here (augmentations, gym, video) may be absent.
"""

import argparse
import contextlib
import copy
import functools
import importlib
import io
import subprocess
import sys
import types
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import gymnasium
import numpy as np
import torch
from ruamel.yaml import YAML

if __name__ == "__main__":
    # Without this script's own folder, whose `envs.py` would hide the upstream folder `envs`.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
from upstream import formula
from upstream.envs import Wrapper

RECORDED = Path(__file__).resolve().with_name("recorded")
BATCH, TIME, BLOCK, UPDATES = 4, 16, 4, 5
RETURN_RANGE = (-0.4, 1.9)
VECTORS = {"position": 5, "velocity": 4}
# fmt: off
SMALL = {
    "batch_size": BATCH, "batch_length": TIME, "size": (64, 64), "envs": 2, "num_actions": 3,
    "dyn_hidden": 64, "dyn_deter": 64, "dyn_stoch": 8, "dyn_discrete": 8, "units": 64,
    "encoder": {"cnn_depth": 4, "mlp_units": 32}, "device": "cpu", "compile": False,
}
SMALLER = {
    "batch_size": formula.ROWS, "batch_length": formula.STEPS,
    "dyn_hidden": 32, "dyn_deter": 32, "dyn_stoch": 4, "dyn_discrete": 6, "units": 32, "encoder": {"mlp_units": 16},
}
# Options that upstream declares in its script rather than in its configs.yaml, with the defaults found there.
SCRIPT_OPTIONS = {
    "simsr_discount": 0.99, "dynamics_tau": 0.05, "encoder_tau": 0.05, "simsr_scale": 1.0, "mbr_scale": 1.0,
    "nomlr": False, "nosimsr": False,
}
HRSSM = {"dyn_cont_stoch_size": 16} | SCRIPT_OPTIONS
DREAMER = {"decoder": {"cnn_depth": 4, "mlp_units": 32}}
NO_DECODER = {"decoder": {"cnn_keys": "$^"}, "grad_heads": ["reward", "cont"]}
DISCRETE = {"actor_dist": "onehot", "imag_gradient": "reinforce"}
CLIPPED = {"grad_clip": 1.0, "value_grad_clip": 1.0, "actor_grad_clip": 1.0}
PEAKED = {
    "unimix_ratio": 0.0, "action_unimix_ratio": 0.0, "mask_ratio": 0.0, "opt_eps": 1e-4,
    "actor_min_std": 1e-7, "actor_max_std": 3e-7,
}
# fmt: on
HRSSM_VARIANTS = {
    "argmax_default": {},
    "argmax_nomlr": {"nomlr": True},
    "argmax_nosimsr": {"nosimsr": True},
    "argmax_ablate2": {"nomlr": True, "nosimsr": True},
    "argmax_midfirst": {},
    "argmax_mask0": {"mask_ratio": 0.0},
    "argmax_mask1": {"mask_ratio": 1.0},
    "argmax_rms": {"task": "rms_turn_faucet"},
    "argmax_noise": {},
    "argmax_reinforce": {"imag_gradient": "reinforce"},
    "argmax_both": {"imag_gradient": "both", "imag_gradient_mix": 0.1},
    "argmax_onehot": DISCRETE,
    "argmax_freebits": {"kl_free": 12.0},
    "argmax_mixed": {"encoder": {"mlp_keys": "position|velocity"}},
    "argmax_clip": CLIPPED,
    "peaked_default": PEAKED,
    "peaked_nomlr": PEAKED | {"nomlr": True},
    "peaked_nosimsr": PEAKED | {"nosimsr": True},
    "peaked_midfirst": PEAKED,
    "peaked_mask1": PEAKED | {"mask_ratio": 1.0},
}
DREAMER_VARIANTS = {
    "dreamer_default": {},
    "dreamer_midfirst": {},
    "dreamer_mixed": {"encoder": {"mlp_keys": "position|velocity"}, "decoder": {"mlp_keys": "position|velocity"}},
    "dreamer_onehot": DISCRETE,
    "dreamer_clip": CLIPPED,
    "dreamer_sigmoid": {"decoder": {"cnn_sigmoid": True}},
    "rssm_default": NO_DECODER,
    "rssm_midfirst": NO_DECODER,
    "rssm_nograd": NO_DECODER | {"grad_heads": ["cont"]},
    "rssm_freebits": NO_DECODER | {"kl_free": 12.0},
}
# Where the name of a variant does not say it: the kind of its batch, of its weights, and the noise.
BATCHES = {"peaked_midfirst": "types_midfirst"}
STATES = {"argmax_onehot": "argmax_onehot", "argmax_mixed": "argmax_mixed"}
STATES |= {"dreamer_onehot": "onehot", "dreamer_mixed": "mixed"}
NOISE = {"argmax_noise": 0.9, "argmax_both": 0.9, "argmax_reinforce": 1.1}


class Origin(NamedTuple):
    """What differs between the two repositories: options, files and the layout of a recording."""

    repository: str
    options: dict
    variants: dict[str, dict]
    formula_variants: dict[str, dict]
    prefix: str  # of file names
    updates: int
    described: tuple[int, ...]  # updates whose parameter changes are recorded
    range_name: str
    repeats_tensors: bool  # in the state that is saved


ORIGINS = {
    "hrssm": Origin(
        repository="bit1029public/HRSSM",
        options=HRSSM,
        variants=HRSSM_VARIANTS,
        formula_variants={
            "hrssm": {},
            "hrssm_nomlr_nosimsr": {"nomlr": True, "nosimsr": True},
            "hrssm_onehot": DISCRETE,
        },
        prefix="oracle_",
        updates=UPDATES,
        described=(0, UPDATES - 1),
        range_name="reward_ema",
        repeats_tensors=True,
    ),
    "dreamer": Origin(
        repository="NM512/dreamerv3-torch",
        options=DREAMER,
        variants=DREAMER_VARIANTS,
        # Vectors beside pictures; a floor of the KL below which about half of its elements are.
        formula_variants={"dreamer": DREAMER_VARIANTS["dreamer_mixed"], "rssm": NO_DECODER | {"kl_free": 4.5}},
        prefix="",
        updates=3,
        described=(0, 1, 2),
        range_name="return_range",
        repeats_tensors=False,
    ),
}


def import_upstream(root):
    """The original's script as a module, imported from the checkout `root`."""
    if not (root / "dreamer.py").is_file() or not (root / "configs.yaml").is_file():
        sys.exit(f"error: {root} is not a checkout of upstream: name the folder that holds its dreamer.py")
    for name in ("kornia.augmentation", "kornia.filters", "imageio", "gym", "numpy.core.shape_base"):
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules.setdefault(name.split(".")[0], mock.MagicMock())
            sys.modules[name] = mock.MagicMock()
    sys.path.insert(0, str(root))
    return importlib.import_module("dreamer")


def import_program(root):
    """The same with those parts of gym that its training program needs, from gymnasium."""
    gym = types.ModuleType("gym")
    gym.spaces, gym.Env, gym.Wrapper = gymnasium.spaces, object, Wrapper
    sys.modules["gym"] = gym
    return import_upstream(root)


def read_presets(root):
    """The presets of the checkout's configuration file."""
    return YAML(typ="safe").load(root / "configs.yaml")


class Checkout(NamedTuple):
    """An original that can be run."""

    script: object  # its dreamer.py as a module
    presets: dict
    origin: Origin
    source: str


def open_checkout(root):
    """Import the checkout `root` and recognise which of the two repositories it is."""
    script, presets = import_upstream(root), read_presets(root)
    options = presets["defaults"].keys()
    if "actor_dist" not in options:
        sys.exit(f"error: {root} is another version of dreamerv3-torch: check out commit 49d12ba")
    origin = ORIGINS["hrssm" if "mask_ratio" in options else "dreamer"]
    commit = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    return Checkout(script, presets, origin, f"{origin.repository} {commit or 'of unknown commit'}")


def make_config(presets, *changes):
    """All options of a run: the original's defaults and `dmc_vision`, then the changes in order."""

    def merge(base, update):
        nested = {k: merge(base[k], v) for k, v in update.items() if isinstance(v, dict)}
        return base | update | nested

    return functools.reduce(merge, (presets["dmc_vision"], *changes), presets["defaults"])


def generic_state(agent, seed=1):
    """Upstream's initial weights made generic: no zero layer, no unit norm, EMA copies that differ from the online."""
    generator = torch.Generator().manual_seed(seed)
    for name, param in agent.named_parameters():
        # Stronger logits widen the gap between the two best classes, so that rounding does not change a draw.
        param.data *= 2.5 if "stat_layer.weight" in name else 1.0
        scale = 0.1 if param.dim() == 1 else 0.2 * param.std().item() or 0.15
        param.data += scale * torch.randn(param.shape, generator=generator)
    return agent.state_dict()


def named_once(agent):
    """The parameters under the first of their names."""
    return {name: param.detach().clone() for name, param in agent.named_parameters()}


def plain_batch(seed=2):
    """A dict of tensors (B, T, ...): smooth moving images, actions that reach beyond +-1, one terminal row."""
    uniform = functools.partial(torch.rand, generator=torch.Generator().manual_seed(seed))
    y, x = torch.meshgrid(torch.arange(64) / 64, torch.arange(64) / 64, indexing="ij")
    t = torch.arange(TIME)[:, None, None, None]
    frequency, phase = 1 + 8 * uniform(2, BATCH, 1, 1, 1, 3), 6.3 * uniform(BATCH, 1, 1, 1, 3)
    wave = torch.sin(frequency[0] * x[..., None] + frequency[1] * y[..., None] + phase + 0.2 * t)
    first, terminal = torch.zeros(2, BATCH, TIME, dtype=torch.bool)
    first[:, 0] = terminal[2, -1] = True
    return {
        "image": (128 + 80 * wave + 30 * (uniform(wave.shape) - 0.5)).to(torch.uint8),
        "action": 1.4 * (2 * uniform(BATCH, TIME, 3) - 1),
        "reward": 2 * uniform(BATCH, TIME),
        "discount": torch.ones(BATCH, TIME),
        "is_first": first,
        "is_terminal": terminal,
    }


def changed_batch(kind, batch, seed=3):
    """The batch with what `kind` changes: reward range, discrete actions, vector inputs or episode boundaries."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "rms":
        return batch | {"reward": 5 * batch["reward"]}
    if kind == "onehot":
        index = torch.randint(3, (BATCH, TIME), generator=generator)
        return batch | {"action": torch.nn.functional.one_hot(index, 3).float()}
    if kind == "mixed":
        return batch | {key: 3 * torch.randn(BATCH, TIME, n, generator=generator) for key, n in VECTORS.items()}
    # Rows: no start at all; a terminal and a start inside; starts side by side and at the end; one start inside.
    first, terminal = torch.zeros(2, BATCH, TIME, dtype=torch.bool)
    for row, steps in enumerate(([], [0, 7], [0, 3, 4, 15], [9])):
        first[row, steps] = True
    terminal[1, 6] = terminal[3, 15] = True
    return batch | {"is_first": first, "is_terminal": terminal}


def generic_grids(seed=4):
    """Patch grids (update, block, row, column), uint8, 1 where masked: half of the 36 cells in each block."""
    blocks = UPDATES * TIME // BLOCK
    cells = np.random.default_rng(seed).permuted(np.tile([0, 1], (blocks, 18)), axis=1)
    return torch.from_numpy(cells.astype(np.uint8)).reshape(UPDATES, -1, 6, 6)


def build_agent(upstream, config, batch):
    """Upstream's agent for 64x64x3 images and the vector keys of `batch`, gradients off as in upstream's main."""
    shapes = {"image": (64, 64, 3)} | {key: batch[key].shape[2:] for key in VECTORS if key in batch}
    space = SimpleNamespace(spaces={key: SimpleNamespace(shape=shape) for key, shape in shapes.items()})
    torch.manual_seed(config["seed"])
    np.random.seed(config["seed"])
    agent = upstream.Dreamer(space, None, SimpleNamespace(**copy.deepcopy(config)), SimpleNamespace(step=0), None)
    return agent.requires_grad_(False)


@contextlib.contextmanager
def precision(dtype):
    """Run upstream in `dtype`: as default dtype, and with its explicit casts to float32 widened to it."""
    torch.set_default_dtype(dtype)
    try:
        with mock.patch.object(torch.Tensor, "float", lambda tensor: tensor.to(dtype)):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def watched_chance(replaced, noise, draws):
    """Collect (class, smallest lead in nats) of each categorical draw; if `replaced`, take chance away."""
    draw, draw_noise = torch.multinomial, torch.distributions.normal._standard_normal

    def multinomial(probs, num_samples, replacement=False):
        best = probs.topk(2, dim=-1).values
        most_probable = probs.argmax(-1, keepdim=True).expand(-1, num_samples)
        index = most_probable if replaced else draw(probs, num_samples, replacement)
        draws.append((index.clone(), (best[..., 0] / best[..., 1]).log().min().item()))
        return index

    def standard_normal(shape, dtype, device):
        if replaced:
            return torch.full(shape, noise, dtype=dtype, device=device)
        return draw_noise(shape, dtype, device)

    normal = mock.patch.object(torch.distributions.normal, "_standard_normal", standard_normal)
    with mock.patch.object(torch, "multinomial", multinomial), normal:
        yield


def train_once(agent, batch, names):
    """One upstream update on a copy of the batch. Returns its metrics and the gradient norms before clipping."""
    clip, norms = torch.nn.utils.clip_grad_norm_, {}

    def spy(params, max_norm):
        params = list(params)
        norms.update({names[id(p)]: p.grad.double().norm().item() for p in params if p.grad is not None})
        return clip(params, max_norm)

    agent._metrics = {}
    with mock.patch.object(torch.nn.utils, "clip_grad_norm_", spy):
        agent._train({key: value.numpy().copy() for key, value in batch.items()})
    return {key: float(value) for key, (value,) in agent._metrics.items()}, norms


def evaluate(agent, batch, steps=6):
    """The evaluation policy through the complete agent call on batch rows 0 and 1; row 1 is reset before step 3."""
    state, rows = None, []
    for t in range(steps):
        reset = np.array([t == 0, t in (0, 3)])
        obs = {key: batch[key][:2, t].numpy() for key in ("image", *VECTORS) if key in batch}
        obs |= {"is_first": reset, "is_terminal": np.zeros(2, bool)}
        output, state = agent(obs, reset, state, training=False)
        row = {"action": output["action"], **{key: state[0][key] for key in ("deter", "logit", "stoch")}}
        # Cloned, because upstream's next call rescales actions and resets states in place.
        rows.append({key: value.clone() for key, value in row.items()})
    action, deter, logit, stoch = (torch.stack([row[key] for row in rows]) for key in rows[0])
    idx = stoch.argmax(-1).to(torch.uint8)
    return {"action": action.double(), "deter": deter.double(), "logit": logit.to(torch.float32), "idx": idx}


def checksum(x):
    """{sum, l2, proj} of a float64 vector; proj notices exchanged elements, which the others do not."""
    wave = torch.cos(0.7 * torch.arange(len(x), dtype=torch.float64) + 0.3)
    return {"sum": x.sum().item(), "l2": x.norm().item(), "proj": (x * wave).sum().item()}


def describe(value, start):
    """Checksums and the first 24 elements of a parameter, and of its change since `start`."""
    value = value.detach().double().flatten()
    delta = value - start
    head, dhead = value[:24].clone(), delta[:24].clone()
    return {"value": checksum(value), "delta": checksum(delta), "head": head, "dhead": dhead}


def run(make_agent, origin, chance, state, batch, grids, dtype, updates, start_range=RETURN_RANGE):
    """Updates of the original from `state`. Returns the results in one precision and the draws that were made."""
    draws, rows = [], []
    with precision(dtype), watched_chance(*chance, draws):
        agent = make_agent(batch)
        params = dict(agent.named_parameters())
        unknown = agent.load_state_dict(state, strict=False).unexpected_keys
        if unknown or params.keys() - state.keys():
            sys.exit("error: the weights do not fit: delete those in --out, or leave --data out")
        agent._task_behavior.reward_ema.values = torch.tensor(start_range)
        names = {id(param): name for name, param in params.items()}
        start = {name: param.detach().double().flatten().clone() for name, param in params.items()}
        policy_before = evaluate(agent, batch)
        for update in range(updates):
            if grids is not None:
                # Height and width exchanged, as in the output of upstream's masker (T, 1, 64, 64): it swaps them later.
                cell = 6 * torch.arange(64) // 64
                mask = grids[update][:, cell][:, :, cell].mT.repeat_interleave(BLOCK, 0)[:, None].float()
                agent._wm.MBR.masker = lambda mask=mask: mask
            metrics, norms = train_once(agent, batch, names)
            return_range = agent._task_behavior.reward_ema.values.tolist()
            rows.append({"metrics": metrics, "grad_norms": norms, origin.range_name: return_range})
            if update in origin.described:
                rows[-1]["params"] = {name: describe(param, start[name]) for name, param in params.items()}
        result = {"updates": rows, "policy_before": policy_before, "policy_after": evaluate(agent, batch)}
    return result | {"no_grad_params": sorted(set(params) - set(norms))}, draws


def reliability(draws32, draws64):
    """Number of draws, smallest lead in nats of the class drawn, and if both precisions drew the same."""
    same = all(torch.equal(a, b) for (a, _), (b, _) in zip(draws32, draws64, strict=True))
    gap = min(gap for draws in (draws32, draws64) for _, gap in draws)
    return {"draws": sum(index.numel() for index, _ in draws64), "min_gap_nats": gap, "same_draws_f32_f64": same}


def compare(ours, theirs):
    """Largest difference of two results per kind: relative for metrics and norms, absolute for single elements."""
    worst = dict.fromkeys(("metrics", "grad_norms", "change_norms", "change", "action"), 0.0)

    def note(kind, a, b, floor=1e-30):
        if a.keys() != b.keys():
            sys.exit(f"error: the recordings differ in {kind}: {' '.join(sorted(a.keys() ^ b.keys()))}")
        worst[kind] = max(worst[kind], *(abs(a[k] - b[k]) / max(abs(a[k]), abs(b[k]), floor) for k in a))

    for a, b in zip(ours["updates"], theirs["updates"], strict=True):
        note("metrics", a["metrics"], b["metrics"], floor=0.01)
        note("grad_norms", a["grad_norms"], b["grad_norms"])
        if "params" in a and "params" in b:
            note("change_norms", *({k: p["delta"]["l2"] for k, p in x["params"].items()} for x in (a, b)))
            change = [(a["params"][k]["dhead"] - p["dhead"]).abs().max().item() for k, p in b["params"].items()]
            worst["change"] = max(worst["change"], *change)
    for when in ("policy_before", "policy_after"):
        worst["action"] = max(worst["action"], (ours[when]["action"] - theirs[when]["action"]).abs().max().item())
    return worst


def report(name, reliable, pairs):
    """Print how certain the draws are, and the largest differences of pairs of results."""
    print(
        f"{name}: {reliable['draws']} draws, smallest lead {reliable['min_gap_nats']:.1e} nats, "
        f"same draws in f32 and f64: {reliable['same_draws_f32_f64']}",
        file=sys.stderr,
    )
    for label, *pair in pairs:
        print(f"  {label}:", *(f"{key} {value:.0e}" for key, value in compare(*pair).items()), file=sys.stderr)


def read(folder, name):
    """The content of a recorded file, None if the folder (or None) does not have it."""
    if folder is None or not (folder / name).is_file():
        return None
    try:
        return torch.load(folder / name, weights_only=True)
    except Exception as error:  # damaged bytes make torch.load raise nearly any type
        sys.exit(f"error: cannot read {folder / name} ({type(error).__name__}): delete it or leave its folder out")


def record(checkout, name, out, data):
    """Record one variant into `out`; print how it agrees between the two precisions and with `data`."""
    origin = checkout.origin
    config = make_config(checkout.presets, SMALL, origin.options, origin.variants[name])
    family, kind = name.split("_")
    noise = NOISE.get(name, 0.0) if family in ("argmax", "peaked") else 0.9
    plain = "types" if family == "peaked" else "plain"
    batch_kind = BATCHES.get(name, kind if kind in ("midfirst", "mixed", "onehot", "rms") else plain)
    state_kind = STATES.get(name, {"dreamer": "image", "rssm": "nodecoder"}.get(family, family))
    batch_file, state_file = f"{origin.prefix}batch_{batch_kind}.pt", f"{origin.prefix}state_{state_kind}.pt"
    make_agent = functools.partial(build_agent, checkout.script, config)

    def get(file, make):
        value = read(data, file) or read(out, file)
        if value is None and family == "peaked":
            sys.exit(f"error: {name} needs {file}, which is not made here: pass --data the folder that holds it")
        value = value or make()
        torch.save(value, out / file)
        return value

    def make_batch():
        base = get(f"{origin.prefix}batch_plain.pt", plain_batch)
        return base if batch_kind == "plain" else changed_batch(batch_kind, base)

    def make_state():
        agent = make_agent(batch)
        state = generic_state(agent)
        return state if origin.repeats_tensors else named_once(agent)

    batch = get(batch_file, make_batch)
    state, given = get(state_file, make_state), read(data, f"{origin.prefix}{name}.pt")
    if given and given["config"] != config:
        sys.exit(f"error: {name} in {data} was recorded with another configuration: leave --data out")
    grids = None
    if config.get("mask_ratio") == 0.5:
        recorded = given or read(data, "oracle_argmax_default.pt")
        grids = recorded["mask_grids"] if recorded else generic_grids()
    one_run = functools.partial(
        run, make_agent, origin, (family != "peaked", noise), state, batch, grids, updates=origin.updates
    )
    (f32, draws32), (f64, draws64) = one_run(dtype=torch.float32), one_run(dtype=torch.float64)
    reliable = reliability(draws32, draws64)
    # fmt: off
    result = {
        "variant": name, "family": family, "config": config, "noise": noise, "source": checkout.source,
        f"{origin.range_name}_init": RETURN_RANGE, "f32": f32, "f64": f64, "mask_grids": grids,
        "batch_file": batch_file, "state_file": state_file, "reliability": reliable,
    }
    # fmt: on
    torch.save(result, out / f"{origin.prefix}{name}.pt")
    pairs = [("f32 vs f64", f32, f64)]
    pairs += [(f"{key} vs given", result[key], given[key]) for key in ("f32", "f64") if given]
    report(name, reliable, pairs)


def record_by_formula(checkout, name, out):
    """Record one variant with weights, batch and masks by formula."""
    origin = checkout.origin._replace(range_name="return_range", described=range(formula.UPDATES))
    config = make_config(checkout.presets, SMALL, origin.options, SMALLER, origin.formula_variants[name])
    make_agent = functools.partial(build_agent, checkout.script, config)
    vectors = VECTORS if config["encoder"]["mlp_keys"] != "$^" else {}
    batch = formula.batch(config["num_actions"], config["actor_dist"] == "onehot", vectors)
    shapes = {key: list(param.shape) for key, param in make_agent(batch).named_parameters()}
    state = {key: formula.weight(key, shape) for key, shape in shapes.items()}
    grids, chance = formula.grids() if "mask_ratio" in config else None, (True, formula.NOISE)
    return_range = formula.RETURN_RANGES.get(name, formula.RETURN_RANGE)
    one_run = functools.partial(
        run, make_agent, origin, chance, state, batch, grids, updates=formula.UPDATES, start_range=return_range
    )
    (f32, draws32), (f64, draws64) = one_run(dtype=torch.float32), one_run(dtype=torch.float64)
    # fmt: off
    about = {
        "variant": name, "method": name.split("_")[0], "source": checkout.source, "config": config, "vectors": vectors,
        "return_range_init": return_range, "shapes": shapes, "reliability": reliability(draws32, draws64),
    }
    # fmt: on
    formula.write(out / f"{name}.npz", about, {"f64": f64, "f32": f32})
    report(name, about["reliability"], [("f32 vs f64", f32, f64)])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upstream", type=Path, required=True, help="checkout of HRSSM or of dreamerv3-torch")
    parser.add_argument("--out", type=Path, help="folder for the recordings; made when missing")
    parser.add_argument("--formula", action="store_true", help="make the recordings that are in the repository")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="default: all; peaked ones only with --data")
    parser.add_argument("--data", type=Path, help="folder with states, batches and results recorded before")
    args = parser.parse_args()
    if args.formula and args.data:
        sys.exit("error: --formula needs no --data")
    out = args.out or (RECORDED if args.formula else sys.exit("error: pass --out the folder for the recordings"))
    if args.data and not args.data.is_dir():
        sys.exit(f"error: --data {args.data} is not a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"error: cannot make the output folder: {error}")
    warnings.simplefilter("ignore")
    # The originals print their layer shapes and reward range; the report goes to stderr.
    with contextlib.redirect_stdout(io.StringIO()):
        checkout = open_checkout(args.upstream.resolve())
        known = checkout.origin.formula_variants if args.formula else checkout.origin.variants
        variants = args.variants or [name for name in known if args.data or not name.startswith("peaked")]
        if unknown := sorted(set(variants) - set(known)):
            sys.exit(f"error: unknown variant {unknown[0]}: choose from {' '.join(known)}")
        for name in variants:
            if args.formula:
                record_by_formula(checkout, name, out)
            else:
                record(checkout, name, out, args.data)


if __name__ == "__main__":
    main()
