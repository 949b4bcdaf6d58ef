"""Weights, batches and masks that follow from names and shapes, so that a recording of them holds only results.

`record.py --formula` runs the original repositories on them, `tests/test_fidelity.py` runs our agent on the same. All
numbers are multiples of 2**-23 times a constant and therefore the same on every machine.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch

UPDATES, BLOCK, ELEMENTS = 3, 4, 4
SALT = "10"  # of 60 tried, the one with the largest lead of the class that is drawn
NOISE = 0.9
RETURN_RANGES = {"rssm": (0.3, 0.9)}  # narrower than 1: the scale of returns is bounded there
RETURN_RANGE = (-0.4, 1.9)  # of all others
# Resets per row: only at the start; at the start and inside, after a terminal step; inside only.
RESETS, TERMINAL = ([0], [0, 5], [3]), (1, 4)
ROWS, STEPS = len(RESETS), 8
LISTED = ("metrics", "grad_norms")


def uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers in [-1, 1) from a hash (SplitMix64) of the name and each element's index."""
    x = np.arange(math.prod(shape), dtype=np.uint64) + np.uint64(zlib.crc32(f"{SALT}{name}".encode()) << 32)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    x = x ^ (x >> np.uint64(31))
    return ((x >> np.uint64(40)).astype(np.float64) / 2**23 - 1).reshape(shape)


def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The parameter that the original code calls `name`: unit variance from layer to layer, and nothing zero or equal.

    The logits of the latents are larger, so that rounding does not change the most probable class.
    """
    x = uniform(name, shape)
    if len(shape) == 1:
        return torch.from_numpy(0.2 * x + name.endswith("weight"))
    gain = 3.0 if "stat_layer" in name else 1.0
    return torch.from_numpy(gain * math.sqrt(3 / math.prod(shape[1:])) * x)


def batch(actions: int, discrete: bool, vectors: dict[str, int]) -> dict[str, torch.Tensor]:
    """A batch (B,T,*) with moving, noisy pictures, actions beyond [-1, 1] and episodes that start inside rows."""
    t, y, x = np.ogrid[:STEPS, :64, :64]
    slope = (40 * uniform("slope", (ROWS, 3, 3))).astype(int)
    wave = [[dt * t + dy * y + dx * x + 150 * row for dt, dy, dx in slope[row]] for row in range(ROWS)]
    wave = np.abs(np.moveaxis(np.array(wave), 1, -1) % 512 - 256)
    noise = (20 * uniform("noise", wave.shape)).astype(int)
    first, terminal = np.zeros((2, ROWS, STEPS), bool)
    for row, steps in enumerate(RESETS):
        first[row, steps] = True
    terminal[TERMINAL] = True
    action = 1.4 * uniform("action", (ROWS, STEPS, actions))
    if discrete:
        action = np.eye(actions)[action.argmax(-1)]
    found = {
        "image": (wave + noise).clip(0, 255).astype(np.uint8),
        "action": action.astype(np.float32),
        "reward": (1 + uniform("reward", (ROWS, STEPS))).astype(np.float32),
        "discount": np.ones((ROWS, STEPS), np.float32),
        "is_first": first,
        "is_terminal": terminal,
    }
    found |= {key: (5 * uniform(key, (ROWS, STEPS, size))).astype(np.float32) for key, size in vectors.items()}
    return {key: torch.from_numpy(value) for key, value in found.items()}


def grids() -> torch.Tensor:
    """Patch grids (update, block, row, column), uint8: 1 where masked, which are half of the 36 cells of each block."""
    order = uniform("grids", (UPDATES, STEPS // BLOCK, 36)).argsort(-1).argsort(-1)
    return torch.from_numpy((order < 18).astype(np.uint8)).reshape(UPDATES, -1, 6, 6)


def write(path: Path, about: dict, results: dict[str, dict]) -> None:
    """Store `about` and, per precision, what `run` of `record.py` returns. float32 results are stored as such.

    Of a parameter's change: norm, projection on a wave, and the first `ELEMENTS` elements (zeros if it has fewer).
    """
    about, arrays = about | {key: list(results["f64"]["updates"][0][key]) for key in LISTED}, {}
    for precision, result in results.items():
        updates, policies = result["updates"], (result["policy_before"], result["policy_after"])
        change = np.zeros((len(updates), len(about["shapes"]), 2 + ELEMENTS))
        for update, rows in zip(updates, change, strict=True):
            for name, row in zip(about["shapes"], rows, strict=True):
                row[:2] = update["params"][name]["delta"]["l2"], update["params"][name]["delta"]["proj"]
                elements = update["params"][name]["dhead"][:ELEMENTS]
                row[2 : 2 + len(elements)] = elements
        found = {key: np.array([[x[key][name] for name in about[key]] for x in updates]) for key in LISTED}
        found |= {"return_range": np.array([x["return_range"] for x in updates]), "change": change}
        found |= {key: np.stack([policy[key].numpy() for policy in policies]) for key in ("action", "idx")}
        for key, x in found.items():
            arrays[f"{precision}_{key}"] = x.astype(np.float32) if precision == "f32" and x.dtype.kind == "f" else x
    np.savez_compressed(path, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **arrays)


def read(path: Path) -> dict:
    """What `record.py` stored, as it stores it in larger files: `about` and a result per precision."""
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    about = json.loads(arrays["about"].tobytes())
    for precision in ("f64", "f32"):
        found = {key: arrays[f"{precision}_{key}"] for key in (*LISTED, "return_range", "change", "action", "idx")}
        updates = []
        for i, change in enumerate(found["change"]):
            update = {key: dict(zip(about[key], found[key][i].tolist(), strict=True)) for key in LISTED}
            params = {}
            for (name, shape), row in zip(about["shapes"].items(), change.tolist(), strict=True):
                elements = row[2 : 2 + min(ELEMENTS, math.prod(shape))]
                params[name] = {"delta": {"l2": row[0], "proj": row[1]}, "dhead": torch.tensor(elements)}
            updates.append(update | {"return_range": found["return_range"][i].tolist(), "params": params})
        policies = [{key: torch.from_numpy(found[key][i]) for key in ("action", "idx")} for i in range(2)]
        about[precision] = {"updates": updates, "policy_before": policies[0], "policy_after": policies[1]}
    return about
