"""Data-parallel training with two gloo processes on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing

import dreamer
import hrssm
import networks
import tools
from tests.helpers import ROOT, make_agent, make_batch

ROWS = 4


METHODS = {
    "hrssm": [],
    "dreamer": ["--decoder.cnn_depth", "4"],
    "repo": ["--kl_target", "0.5", "--beta_init", "0.1", "--beta_lr", "0.01"],
    "r2dreamer": [],
    "infonce": [],
}


def learn(part: slice) -> dict[str, dict]:
    """By method: metrics and changed weights of two updates on rows `part` of a fixed batch, all chance replaced."""
    networks.draw_onehot = lambda probs: torch.nn.functional.one_hot(probs.argmax(-1), probs.shape[-1]).to(probs)
    networks.draw_normal = hrssm.draw_normal = torch.zeros_like
    batch = make_batch(rows=ROWS, resets=[(row, row) for row in range(ROWS)])
    mask = torch.rand(8, 64, 64, generator=torch.Generator().manual_seed(0)) < 0.5
    results = {}
    for method, argv in METHODS.items():
        agent = make_agent("--method", method, *argv)
        metrics = [agent.update({key: value[part] for key, value in batch.items()}, mask) for _ in range(2)]
        weights = {key: value.clone() for key, value in agent.state_dict().items() if isinstance(value, torch.Tensor)}
        results[method] = {"metrics": [{k: float(v) for k, v in m.items()} for m in metrics], "weights": weights}
    return results


def as_rank(rank: int, address: str, folder: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    half = ROWS // 2
    torch.save(learn(slice(rank * half, (rank + 1) * half)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_learn_what_one_process_learns(tmp_path):
    """Halves of a batch on two ranks: mean losses, gradient norms and weights are those of the whole batch."""
    torch.multiprocessing.spawn(as_rank, (f"file://{tmp_path}/meet", str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    before = torch.get_default_dtype(), networks.draw_onehot, networks.draw_normal
    torch.set_default_dtype(torch.float64)
    try:
        whole = learn(slice(None))
    finally:
        torch.set_default_dtype(before[0])
        networks.draw_onehot, networks.draw_normal = before[1:]
        hrssm.draw_normal = before[2]
    for method in METHODS:
        for step, expected in enumerate(whole[method]["metrics"]):
            for name, value in expected.items():
                values = [part[method]["metrics"][step][name] for part in (first, second)]
                if name.endswith("_loss"):
                    np.testing.assert_allclose(
                        np.mean(values), value, rtol=1e-9, atol=1e-12, err_msg=f"{method} {name}"
                    )
                elif name.endswith("grad_norm") or name.startswith("EMA") or name == "beta":
                    np.testing.assert_allclose(values, value, rtol=1e-9, atol=1e-12, err_msg=f"{method} {name}")
        for key, value in whole[method]["weights"].items():
            assert torch.equal(first[method]["weights"][key], second[method]["weights"][key]), key
            torch.testing.assert_close(first[method]["weights"][key], value, rtol=1e-7, atol=1e-10)


def leave(rank: int, address: str, folder: str) -> None:
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    tools.any_rank(False)
    if rank == 1:
        os._exit(0)
    try:
        while True:
            tools.any_rank(False)
    except tools.UserError as error:
        (Path(folder) / "said").write_text(str(error))


def test_the_end_of_another_rank_is_one_line(tmp_path):
    torch.multiprocessing.spawn(leave, (f"file://{tmp_path}/meet", str(tmp_path)), nprocs=2)
    assert (tmp_path / "said").read_text() == "another process of this run has ended: see what it says"


def test_torchrun_trains_and_resumes(tmp_path, capsys):
    """`torchrun` shares the environments and batches of one run; the same command goes on where it ended."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "dreamer.py"), "--configs", "tiny", "--task", "dmc_cartpole_balance", "--envs", "2"]
    options = "--time_limit 80 --prefill 40 --pretrain 1 --actor_start 0 --eval_every 80 --eval_episode_num 1"
    options += f" --batch_size 4 --imag_horizon 3 --device cpu --threads 1 --logdir {tmp_path}"
    command += options.split()
    environ = os.environ | {"OMP_NUM_THREADS": "1"}

    def run(steps: int, *more: str) -> list[dict]:
        done = subprocess.run(
            [*command, "--steps", f"{steps}", *more], capture_output=True, text=True, env=environ, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]

    rows = run(160)
    assert "eval/return" in rows[-1] and rows[-1]["step"] >= 160
    again = run(320)
    assert again[: len(rows)] == rows and again[-1]["step"] >= 320
    shards = [torch.load(tmp_path / f"{folder}latest.pt", weights_only=True) for folder in ("", "rank1/")]
    for key, value in shards[0]["agent"].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, shards[1]["agent"][key]), key
    assert shards[0]["replay"]["rng"] != shards[1]["replay"]["rng"]
    # Killed twice between their saves: rank 1 is ahead, goes back, and keeps what rank 0 has.
    first = torch.load(tmp_path / "latest.prev.pt", weights_only=True)["count"]["policy_step"]
    (tmp_path / "latest.prev.pt").replace(tmp_path / "latest.pt")
    rows = run(320)
    assert rows[-1]["step"] >= 320
    kept = [tools.load_checkpoint(tmp_path / f"rank1/{name}.pt")["count"]["policy_step"] for name in ("latest.prev",)]
    assert kept == [first]
    alone = [*command[command.index(str(ROOT / "dreamer.py")) + 1 :], "--steps", "400"]
    assert dreamer.main(alone) == 2
    assert "a run of 2 processes, not 1" in capsys.readouterr().err.splitlines()[-1]
    anew = run(80, "--fresh")  # both ranks leave the old run together
    assert [row["step"] for row in anew][-1] < 160 and anew[0] != rows[-1]
    for folder in ("", "rank1/"):
        assert (tmp_path / "replaced" / "1" / folder / "latest.pt").exists() and (
            tmp_path / folder / "latest.pt"
        ).exists()


def test_an_uneven_share_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tools, "start_ranks", lambda device: (0, 2))
    argv = ["--configs", "tiny", "--task", "dmc_cartpole_balance", "--batch_size", "3", "--logdir", str(tmp_path)]
    assert dreamer.main(argv) == 2
    assert "--batch_size 3 cannot be shared evenly by 2 ranks" in capsys.readouterr().err
