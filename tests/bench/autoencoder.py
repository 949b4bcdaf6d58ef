"""Cost of an update of the world model in each regime of --autoencoder, in CPU time of one thread.

python tests/bench/autoencoder.py --configs offline

CPU time, so that other programs on the machine disturb it little; the fastest of --updates. The options of dreamer.py
that follow choose the sizes. Batches are random.
"""

import argparse
import sys
import time
from pathlib import Path

import gymnasium
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import dreamer
import models
import tools


def cost(argv: list[str], updates: int) -> float:
    """Seconds per update, that of the autoencoder included."""
    config = tools.load_config([*argv, "--device", "cpu"])
    batch, steps, size = config.batch_size, config.batch_length, tuple(config.size)
    space, box = gymnasium.spaces.Box(-1.0, 1.0, (6,)), gymnasium.spaces.Box(0, 255, (*size, 3), np.uint8)
    agent = dreamer.make_agent(config, gymnasium.spaces.Dict({"image": box}), space)
    none = torch.zeros(batch, steps, dtype=torch.bool)
    rows = {"image": torch.randint(0, 256, (batch, steps, *size, 3), dtype=torch.uint8), "is_first": none}
    rows |= {"action": torch.rand(batch, steps, 6), "reward": torch.rand(batch, steps), "is_terminal": none}
    times = []
    for _ in range(updates + 1):
        start = time.process_time()
        agent.update(rows, behavior=False)
        times.append(time.process_time() - start)
    return min(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=4, help="updates of which the fastest counts (4)")
    args, argv = parser.parse_known_args()
    torch.set_num_threads(1)
    tools.keep_memory()
    seconds = {regime: cost([*argv, "--autoencoder", regime], args.updates) for regime in models.REGIMES}
    for regime, value in seconds.items():
        print(f"{regime:9} {1000 * value:6.0f} ms  {value / seconds['none']:.2f}")


if __name__ == "__main__":
    main()
