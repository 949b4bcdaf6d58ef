"""Record TransDreamer (Chen et al., 2022), whose transformer `--dynamics tssm` has, by running the original code.

    PYTHONPATH=PACKAGES python tests/upstream/transdreamer.py --upstream CHECKOUT [--out transdreamer.npz]

CHECKOUT is one of github.com/changchencc/TransDreamer at commit 393007a. PACKAGES is a folder with its imports that are
not ours: `pip install --no-deps --target PACKAGES einops yacs`.

The original's world model is built at a small size, without and with gates, given weights and inputs that follow from
names (`formula.py`), and run in float64 without dropout; a draw of a latent returns the most probable class. Stored are
the outputs of all transformer layers, the logits of prior and posterior, the KL loss, and the norm of its gradient for
each parameter of the dynamics. `tests/test_tssm.py` compares.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch

if __name__ == "__main__":
    # Without this script's own folder, whose `envs.py` would hide the original's folder `envs`.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from upstream import formula
else:
    from tests.upstream import formula

RECORDED = Path(__file__).resolve().with_name("recorded") / "transdreamer.npz"
ROWS, STEPS, ACTIONS, EMBED = 2, 8, 3, 1536  # the last is the original's
LAYERS, HEADS, HEAD_SIZE, WIDTH, FF, HIDDEN, GROUPS, CLASSES = 3, 3, 8, 20, 28, 16, 4, 5
HORIZON, BALANCE = (
    15,
    0.8,
)  # its losses are sums over time divided by the horizon; share of the KL that trains the prior


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (B,T,E) of frames and actions (B,T,A)."""
    return tuple(
        torch.from_numpy(formula.uniform(name, (ROWS, STEPS, size)))
        for name, size in (("embed", EMBED), ("action", ACTIONS))
    )


def read(gate: bool) -> tuple[dict[str, list[int]], dict[str, torch.Tensor]]:
    """Shape of each parameter of the dynamics, and the results."""
    with np.load(RECORDED, allow_pickle=False) as file:
        shapes = json.loads(file["about"].tobytes())["gate" if gate else "sum"]
        prefix = "gate_" if gate else "sum_"
        results = {k.removeprefix(prefix): torch.from_numpy(file[k]) for k in file.files if k.startswith(prefix)}
    return shapes, results


def run(modules, config, gate: bool) -> tuple[dict, dict]:
    """Shapes of the parameters of the original's dynamics, and what it makes of `inputs`."""
    transformer = {"num_heads": HEADS, "d_model": WIDTH, "d_inner": HEAD_SIZE, "d_ff_inner": FF, "n_layers": LAYERS}
    config.arch.world_model.transformer.update(transformer | {"gating": gate})
    config.arch.world_model.RSSM.update({"stoch_size": CLASSES, "stoch_discrete": GROUPS, "hidden_size": HIDDEN})
    config.arch.world_model.reward_layer = 0  # features hold all layers
    config.env.action_size, config.train.batch_length, config.loss.kl_scale = ACTIONS, STEPS, 1.0
    world_model = modules.TransformerWorldModel(config).eval()
    assert (world_model.H, world_model.kl_balance, world_model.free_nats) == (HORIZON, BALANCE, 0)
    embed, action = inputs()
    world_model.dynamic.img_enc = torch.nn.Identity()
    world_model.dynamic.img_enc.forward = lambda image: embed
    parameters = dict(world_model.dynamic.named_parameters())
    with torch.no_grad():
        for parameter in world_model.parameters():
            parameter.zero_()  # of heads, so that the KL alone has gradients
        for name, parameter in parameters.items():
            parameter.copy_(formula.weight(name, tuple(parameter.shape)))
    traj = {"image": torch.zeros(ROWS, STEPS, 1, 64, 64), "action": action}
    traj |= {"reward": torch.zeros(ROWS, STEPS), "done": torch.zeros(ROWS, STEPS)}
    prior, post = world_model.dynamic(traj, None, None)
    loss, logs = world_model.world_model_loss(0, traj, prior, post, None)
    loss.backward()
    results = {"deter": prior["deter"], "prior": prior["logits"], "post": post["logits"]}
    results |= {"kl": torch.tensor(logs["model_kl_loss"])}
    results |= {"gradients": torch.stack([parameter.grad.norm() for parameter in parameters.values()])}
    return {name: list(p.shape) for name, p in parameters.items()}, {k: x.detach() for k, x in results.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upstream", type=Path, required=True, help="checkout of TransDreamer")
    parser.add_argument("--out", type=Path, default=RECORDED, help="file to write")
    args = parser.parse_args()
    if not (args.upstream / "model/modules_transformer.py").is_file():
        sys.exit(f"error: {args.upstream} is not a checkout of TransDreamer")
    sys.path.insert(0, str(args.upstream.resolve()))
    import configs
    from model import modules_transformer as modules

    torch.set_default_dtype(torch.float64)
    draw = lambda dist, shape=(): torch.nn.functional.one_hot(dist.logits.argmax(-1), CLASSES).double()  # noqa: E731
    # Its casts of scores and logits to float32 would hide smaller differences.
    widened = mock.patch.object(torch.Tensor, "float", torch.Tensor.double)
    with widened, mock.patch.object(modules.OneHotCategorical, "sample", draw):
        results = {name: run(modules, configs.cfg.clone(), gate) for name, gate in (("sum", False), ("gate", True))}
    commit = subprocess.run(["git", "-C", args.upstream, "rev-parse", "HEAD"], capture_output=True, text=True)
    about = {"source": f"changchencc/TransDreamer {commit.stdout.strip()}"}
    about |= {name: shapes for name, (shapes, _) in results.items()}
    arrays = {f"{name}_{key}": x.numpy() for name, (_, found) in results.items() for key, x in found.items()}
    np.savez_compressed(args.out, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **arrays)


if __name__ == "__main__":
    main()
