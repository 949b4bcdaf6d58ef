"""Upstream's own program trains and logs like a run of ours. Needs a checkout: HRSSM_UPSTREAM=DIR."""

import os
import subprocess
import sys

import pytest

import tools
from figures import plot
from tests.helpers import ROOT

UPSTREAM = os.environ.get("HRSSM_UPSTREAM")


@pytest.mark.skipif(not UPSTREAM, reason="set HRSSM_UPSTREAM to a checkout of upstream")
def test_a_run_of_upstream_is_drawn_like_ours(tmp_path):
    """Two evaluations, at prefill and at --steps, and nothing after the last one."""
    options = ["--task=dmc_cartpole_balance", "--envs=2", "--time_limit=40", "--eval_episode_num=2", "--pretrain=2"]
    options += ["--prefill=40", "--eval_every=160", "--log_every=80", "--steps=320", "--actor_start=0"]
    program = str(ROOT / "tests/upstream/train.py")
    for _ in range(2):  # the second time it starts again
        command = [sys.executable, program, UPSTREAM, "--configs", "tiny", *options, "--logdir", str(tmp_path / "run")]
        subprocess.run(command, check=True, timeout=300, capture_output=True)
    assert tools.read_config(tmp_path / "run")["config"]["prefill"] == 40
    rows = plot.read_rows(tmp_path / "run")
    assert [row["step"] for row in rows if "eval/return" in row] == [160, 320] and rows[-1]["step"] == 320
    assert {"episode/return", "model_loss"} <= {key for row in rows for key in row}
    [run] = plot.read_runs([str(tmp_path / "run")])
    assert len(run.values) == 2
