"""A small agent and a random batch, shared by the tests."""

from pathlib import Path

import gymnasium
import numpy as np
import torch

import dreamer
import tools

ROOT = Path(__file__).parents[1]
SMALL = (
    "--dyn_deter 24 --dyn_hidden 24 --dyn_stoch 4 --dyn_discrete 4 --units 24 --dyn_cont_stoch_size 8 --imag_horizon 5"
)
SMALL += " --encoder.cnn_depth 4 --encoder.mlp_units 24 --batch_size 2 --batch_length 8 --device cpu"


def make_config(*argv: str, **options):
    """Defaults at a small size; `argv` as on the command line, `options` by keyword."""
    config = tools.load_config([*SMALL.split(), *argv])
    vars(config).update(options)
    return config


def make_agent(*argv: str, vectors: bool = False, discrete: bool = False, seed: int = 0, **options) -> dreamer.Agent:
    torch.manual_seed(seed)
    if discrete:
        argv = ("--actor_dist", "onehot", "--imag_gradient", "reinforce", *argv)
    box = gymnasium.spaces.Box
    spaces = {"image": box(0, 255, (64, 64, 3), np.uint8)}
    if vectors:
        spaces |= {"position": box(-np.inf, np.inf, (4,)), "velocity": box(-np.inf, np.inf, (2,))}
    action = gymnasium.spaces.Discrete(3) if discrete else box(-1, 1, (3,))
    return dreamer.make_agent(make_config(*argv, **options), gymnasium.spaces.Dict(spaces), action)


def make_batch(rows: int = 2, steps: int = 8, resets=((0, 0), (1, 0)), discrete: bool = False, seed: int = 0) -> dict:
    """Random experience (B,T,*) with is_first at the (row, step) pairs of `resets`; actions reach beyond [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    rand = torch.rand(rows, steps, 10, generator=generator)
    first = torch.zeros(rows, steps, dtype=torch.bool)
    for row, step in resets:
        first[row, step] = True
    action = rand[..., :3] * 3 - 1.5
    if discrete:
        action = torch.nn.functional.one_hot(action.argmax(-1), 3).float()
    return {
        "image": torch.randint(0, 256, (rows, steps, 64, 64, 3), dtype=torch.uint8, generator=generator),
        "position": rand[..., 3:7] * 4 - 2,
        "velocity": rand[..., 7:9] * 100 - 50,
        "action": action,
        "reward": rand[..., 9] * 2,
        "is_first": first,
        "is_terminal": torch.zeros(rows, steps, dtype=torch.bool),
    }
