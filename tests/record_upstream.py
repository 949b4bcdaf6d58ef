"""Record reference numbers by running a checkout of the original HRSSM code (github.com/bit1029public/HRSSM).

    OMP_NUM_THREADS=1 python tests/record_upstream.py --upstream HRSSM --out recorded [--data DIR] [--variants NAME ...]

Upstream's own agent is built in a small configuration, given generic weights, and trained for five updates on one fixed
batch, once in float32 and once in float64. Every metric, gradient norm and parameter change, and the actions of the
evaluation policy before and after, go to `oracle_<variant>.pt` in the output folder, beside the weights (layout of
upstream's `latest.pt`) and the batch that were used. Weights and batches that `--data` holds are used instead of new
ones; if it holds the result of a variant too, the largest differences are printed. Two families of variants:

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
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from ruamel.yaml import YAML

BATCH, TIME, BLOCK, UPDATES = 4, 16, 4, 5
RETURN_RANGE = (-0.4, 1.9)
VECTORS = {"position": 5, "velocity": 4}
# fmt: off
SMALL = {
    "batch_size": BATCH, "batch_length": TIME, "size": (64, 64), "envs": 2, "num_actions": 3,
    "dyn_hidden": 64, "dyn_deter": 64, "dyn_stoch": 8, "dyn_discrete": 8, "dyn_cont_stoch_size": 16, "units": 64,
    "encoder": {"cnn_depth": 4, "mlp_units": 32}, "device": "cpu", "compile": False,
}
# Options that upstream declares in its script rather than in its configs.yaml, with the defaults found there.
SCRIPT_OPTIONS = {
    "simsr_discount": 0.99, "dynamics_tau": 0.05, "encoder_tau": 0.05, "simsr_scale": 1.0, "mbr_scale": 1.0,
    "nomlr": False, "nosimsr": False,
}
PEAKED = {
    "unimix_ratio": 0.0, "action_unimix_ratio": 0.0, "mask_ratio": 0.0, "opt_eps": 1e-4,
    "actor_min_std": 1e-7, "actor_max_std": 3e-7,
}
# fmt: on
VARIANTS = {
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
    "argmax_onehot": {"actor_dist": "onehot", "imag_gradient": "reinforce"},
    "argmax_freebits": {"kl_free": 12.0},
    "argmax_mixed": {"encoder": {"mlp_keys": "position|velocity"}},
    "argmax_clip": {"grad_clip": 1.0, "value_grad_clip": 1.0, "actor_grad_clip": 1.0},
    "peaked_default": PEAKED,
    "peaked_nomlr": PEAKED | {"nomlr": True},
    "peaked_nosimsr": PEAKED | {"nosimsr": True},
    "peaked_midfirst": PEAKED,
    "peaked_mask1": PEAKED | {"mask_ratio": 1.0},
}
BATCHES = {"argmax_midfirst": "midfirst", "argmax_rms": "rms", "peaked_midfirst": "types_midfirst"}
BATCHES |= {"argmax_onehot": "onehot", "argmax_mixed": "mixed"}
STATES = {"argmax_onehot": "argmax_onehot", "argmax_mixed": "argmax_mixed"}
NOISE = {"argmax_noise": 0.9, "argmax_both": 0.9, "argmax_reinforce": 1.1}


def import_upstream(root):
    """Upstream's script as a module, imported from the checkout `root`."""
    if not (root / "dreamer.py").is_file() or not (root / "configs.yaml").is_file():
        sys.exit(f"error: {root} is not a checkout of upstream: pass --upstream the folder that holds its dreamer.py")
    for name in ("kornia.augmentation", "kornia.filters", "imageio", "gym", "numpy.core.shape_base"):
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules.setdefault(name.split(".")[0], mock.MagicMock())
            sys.modules[name] = mock.MagicMock()
    sys.path.insert(0, str(root))
    return importlib.import_module("dreamer")


def make_config(root, options):
    """All options of a run: upstream's defaults and `dmc_vision`, the small sizes, then those of the variant."""
    presets = YAML(typ="safe").load(root / "configs.yaml")

    def merge(base, update):
        nested = {k: merge(base[k], v) for k, v in update.items() if isinstance(v, dict)}
        return base | update | nested

    return functools.reduce(merge, (presets["dmc_vision"], SMALL, SCRIPT_OPTIONS, options), presets["defaults"])


def generic_state(agent, seed=1):
    """Upstream's initial weights made generic: no zero layer, no unit norm, EMA copies that differ from the online."""
    generator = torch.Generator().manual_seed(seed)
    for name, param in agent.named_parameters():
        # Stronger logits widen the gap between the two best classes, so that rounding does not change a draw.
        param.data *= 2.5 if "stat_layer.weight" in name else 1.0
        scale = 0.1 if param.dim() == 1 else 0.2 * param.std().item() or 0.15
        param.data += scale * torch.randn(param.shape, generator=generator)
    return agent.state_dict()


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


def run(make_agent, chance, state, batch, grids, dtype):
    """Five updates of upstream from `state`. Returns the results in one precision and the draws that were made."""
    draws, updates = [], []
    with precision(dtype), watched_chance(*chance, draws):
        agent = make_agent(batch)
        agent.load_state_dict(state)
        agent._task_behavior.reward_ema.values = torch.tensor(RETURN_RANGE)
        params = dict(agent.named_parameters())
        names = {id(param): name for name, param in params.items()}
        start = {name: param.detach().double().flatten().clone() for name, param in params.items()}
        policy_before = evaluate(agent, batch)
        for update in range(UPDATES):
            if grids is not None:
                # Height and width exchanged, as in the output of upstream's masker (T, 1, 64, 64): it swaps them later.
                cell = 6 * torch.arange(64) // 64
                mask = grids[update][:, cell][:, :, cell].mT.repeat_interleave(BLOCK, 0)[:, None].float()
                agent._wm.MBR.masker = lambda mask=mask: mask
            metrics, norms = train_once(agent, batch, names)
            reward_ema = agent._task_behavior.reward_ema.values.tolist()
            updates.append({"metrics": metrics, "grad_norms": norms, "reward_ema": reward_ema})
            if update in (0, UPDATES - 1):
                updates[-1]["params"] = {name: describe(param, start[name]) for name, param in params.items()}
        result = {"updates": updates, "policy_before": policy_before, "policy_after": evaluate(agent, batch)}
    return result | {"no_grad_params": sorted(set(params) - set(norms))}, draws


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
        if "params" in a:
            note("change_norms", *({k: p["delta"]["l2"] for k, p in x["params"].items()} for x in (a, b)))
            change = [(a["params"][k]["dhead"] - p["dhead"]).abs().max().item() for k, p in b["params"].items()]
            worst["change"] = max(worst["change"], *change)
    for when in ("policy_before", "policy_after"):
        worst["action"] = max(worst["action"], (ours[when]["action"] - theirs[when]["action"]).abs().max().item())
    return worst


def read(folder, name):
    """The content of a recorded file, None if the folder (or None) does not have it."""
    if folder is None or not (folder / name).is_file():
        return None
    try:
        return torch.load(folder / name, weights_only=True)
    except Exception as error:  # damaged bytes make torch.load raise nearly any type
        sys.exit(f"error: cannot read {folder / name} ({type(error).__name__}): delete it or leave its folder out")


def record(upstream, root, name, out, data):
    """Record one variant into `out`; print how it agrees between the two precisions and with `data`."""
    config = make_config(root, VARIANTS[name])
    family, noise = name.split("_")[0], NOISE.get(name, 0.0)
    batch_kind, state_kind = BATCHES.get(name, "types" if family == "peaked" else "plain"), STATES.get(name, family)
    make_agent = functools.partial(build_agent, upstream, config)

    def get(what, kind):
        file = f"oracle_{what}_{kind}.pt"
        value = read(data, file) or read(out, file)
        if value is None and kind in ("peaked", "types"):
            sys.exit(f"error: {name} needs {file}, which is not made here: pass --data the folder that holds it")
        if value is None and what == "state":
            value = generic_state(make_agent(get("batch", batch_kind)))
        elif value is None:
            base = "types" if kind.startswith("types") else "plain"
            value = plain_batch() if kind == "plain" else changed_batch(kind, get("batch", base))
        torch.save(value, out / file)
        return value

    batch, state, given = get("batch", batch_kind), get("state", state_kind), read(data, f"oracle_{name}.pt")
    if given and given["config"] != config:
        sys.exit(f"error: {name} in {data} was recorded with another configuration: leave --data out")
    grids = None
    if config["mask_ratio"] == 0.5:
        recorded = given or read(data, "oracle_argmax_default.pt")
        grids = recorded["mask_grids"] if recorded else generic_grids()
    chance = (family == "argmax", noise)
    f32, draws32 = run(make_agent, chance, state, batch, grids, torch.float32)
    f64, draws64 = run(make_agent, chance, state, batch, grids, torch.float64)
    same = all(torch.equal(a, b) for (a, _), (b, _) in zip(draws32, draws64, strict=True))
    gap, count = min(gap for _, gap in draws64), sum(index.numel() for index, _ in draws64)
    # fmt: off
    result = {
        "variant": name, "family": family, "config": config, "noise": noise,
        "reward_ema_init": RETURN_RANGE, "f32": f32, "f64": f64, "mask_grids": grids,
        "batch_file": f"oracle_batch_{batch_kind}.pt", "state_file": f"oracle_state_{state_kind}.pt",
        "reliability": {"draws": count, "min_gap_nats_f64": gap, "same_draws_f32_f64": same},
    }
    # fmt: on
    torch.save(result, out / f"oracle_{name}.pt")
    print(f"{name}: {count} draws, smallest lead {gap:.1e} nats, same draws in f32 and f64: {same}", file=sys.stderr)
    pairs = [("f32 vs f64", f32, f64)]
    pairs += [(f"{key} vs given", result[key], given[key]) for key in ("f32", "f64") if given]
    for label, *pair in pairs:
        print(f"  {label}:", *(f"{key} {value:.0e}" for key, value in compare(*pair).items()), file=sys.stderr)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upstream", type=Path, required=True, help="checkout of upstream")
    parser.add_argument("--out", type=Path, required=True, help="folder for the recordings; made when missing")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="default: all, or the argmax ones without --data")
    parser.add_argument("--data", type=Path, help="folder with states, batches and results recorded before")
    args = parser.parse_args()
    variants = args.variants or [name for name in VARIANTS if args.data or name.startswith("argmax")]
    if unknown := sorted(set(variants) - set(VARIANTS)):
        sys.exit(f"error: unknown variant {unknown[0]}: choose from {' '.join(VARIANTS)}")
    if args.data and not args.data.is_dir():
        sys.exit(f"error: --data {args.data} is not a folder")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"error: cannot make the output folder: {error}")
    warnings.simplefilter("ignore")
    # Upstream prints its layer shapes and reward range; the report goes to stderr.
    with contextlib.redirect_stdout(io.StringIO()):
        upstream = import_upstream(args.upstream.resolve())
        for name in variants:
            record(upstream, args.upstream, name, args.out, args.data)


if __name__ == "__main__":
    main()
