"""Single checks of `gpu_acceptance.sh`; each ends with a line for its table, and exit status 1 if it fails.

python tests/bench/gpu_checks.py gpus                       how many there are; fails without any
python tests/bench/gpu_checks.py train pinned OPTIONS       `dreamer.py OPTIONS`, replay in memory although it fits
python tests/bench/gpu_checks.py train resident OPTIONS     the same, replay on the GPU
python tests/bench/gpu_checks.py rows LOGDIR LOGDIR         two runs have the same metrics
python tests/bench/gpu_checks.py syncs OPTIONS              updates and acting never wait for the GPU; peak memory
python tests/bench/gpu_checks.py run LOGDIR                 a run has learnt from finite losses; its speed
"""

import json
import math
import sys
from pathlib import Path

import gymnasium
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import dreamer
import tools
from tests.bench import program


def rows_of(logdir: str) -> list[dict]:
    return [json.loads(line) for line in (Path(logdir) / "metrics.jsonl").read_text().splitlines()]


def gpus() -> str:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        sys.exit("error: this needs a GPU that torch can use, and there is none")
    return str(count)


def train(place: str, *argv: str) -> str:
    # Nothing fits into a share of 0; what does not fit into all of it fails.
    tools.GPU_SHARE = {"pinned": 0.0, "resident": 1.0}[place]
    if code := dreamer.main(list(argv)):
        sys.exit(code)
    return "trained"


def rows(one: str, other: str) -> str:
    tables = []
    for logdir in (one, other):
        found = [{k: v for k, v in row.items() if k != "time" and not k.startswith("fps/")} for row in rows_of(logdir)]
        tables.append(found)
    if tables[0] == tables[1]:
        return f"{len(tables[0])} rows, equal bit for bit"
    for a, b in zip(*tables, strict=False):
        for key in sorted(a.keys() | b.keys()):
            if a.get(key) != b.get(key):
                sys.exit(f"first difference at step {a.get('step')}: {key} {a.get(key)} and {b.get(key)}")
    sys.exit(f"{len(tables[0])} and {len(tables[1])} rows")


def syncs(*argv: str) -> str:
    device = dreamer.pick_device(tools.load_config(list(argv)).device)
    tools.enable_deterministic()
    for mode in ("off", "auto"):
        config = tools.load_config(list(argv))
        tools.seed_everything(0)
        act_space = gymnasium.spaces.Box(-1, 1, (program.ACTIONS,))
        agent = dreamer.make_agent(config, gymnasium.spaces.Dict(program.spaces(config.size)), act_space, device)
        agent.speed_up(mode)
        rng = np.random.default_rng(0)
        episodes = [program.episode(config.size, rng) for _ in range(config.batch_size)]
        rows = {key: np.stack([episode[key][: config.batch_length] for episode in episodes]) for key in episodes[0]}
        batch = {key: torch.as_tensor(value).to(device) for key, value in rows.items()}
        obs = {key: value[:, 0] for key, value in rows.items() if key not in ("action", "reward")}
        _, carry = agent.policy(obs, None)
        torch.cuda.reset_peak_memory_stats()
        for number in range(8):
            torch.cuda.set_sync_debug_mode("error" if number >= 5 else "default")  # after the recording
            agent.update(batch)
            _, carry = agent.policy(obs, carry)
        torch.cuda.set_sync_debug_mode("default")
    return f"none; peak {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB of tensors, recorded"


def run(logdir: str) -> str:
    found = rows_of(logdir)
    losses = [value for row in found for key, value in row.items() if key.startswith(("loss/", "opt/"))]
    if not losses or not all(value is not None and math.isfinite(value) for value in losses):
        sys.exit(f"{len(losses)} losses and gradient norms, not all finite")
    last = next(row for row in reversed(found) if "fps/update" in row)
    returns = [row["eval/return"] for row in found if "eval/return" in row]
    return (
        f"{found[-1]['step']} frames, {found[-1]['update']} updates in {found[-1]['time']:.0f} s, "
        f"{last['fps/step']:.0f} fps, eval/return {returns[0]:.0f} to {returns[-1]:.0f}"
    )


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    print({check.__name__: check for check in (gpus, train, rows, syncs, run)}[command](*arguments))
