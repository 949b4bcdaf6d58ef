"""figures/gate.py: verdicts on made-up curves, and what ends in an error."""

import json

import numpy as np
import pytest

from figures import gate, plot
from tests.helpers import ROOT

TASKS = {"good": 100, "bad": 40, "few": 100, "late": 100}


def write_runs(path, level=lambda task, step: 100.0, seeds=lambda task: 3):
    rows = [
        [task, "X", seed, float(step), float(level(task, step) + seed)]
        for task in TASKS
        for seed in range(seeds(task))
        for step in range(0, 1000, 50)
    ]
    plot.write_csv(path, ["task", "method", "seed", "step", "value"], rows)
    return str(path)


@pytest.fixture
def reference(tmp_path):
    path = str(tmp_path / "reference.csv")
    assert gate.main([write_runs(tmp_path / "runs.csv"), "--write", path, "--window", "100"]) == 0
    return path


def test_a_reference_holds_mean_and_range(reference):
    windows = gate.read_reference(reference)["good"]
    assert windows[0] == (0, 100, 101, 100, 102, 3) and len(windows) == 10


def test_verdicts(reference, tmp_path, capsys):
    def level(task, step):
        return 50.0 if task == "late" and step >= 900 else TASKS[task]

    runs = write_runs(tmp_path / "other.csv", level, lambda task: 2 if task == "few" else 3)
    out = tmp_path / "summary.json"
    assert gate.main([runs, "--reference", reference, "--out", str(out)]) == 1
    found = json.loads(out.read_text())
    verdicts = {row["task"]: row["verdict"] for row in found["results"]}
    assert verdicts == {"good": "PASS", "bad": "FAIL", "few": "too few seeds", "late": "FAIL"}
    late = next(row for row in found["results"] if row["task"] == "late")
    assert late["windows_met"] == 0.9 and not found["passed"]
    assert "too few seeds" in capsys.readouterr().out
    assert gate.main([write_runs(tmp_path / "same.csv"), "--reference", reference, "--out", str(out)]) == 0


@pytest.mark.parametrize("drop, verdict", [(9.9, "PASS"), (10.5, "FAIL")])
def test_the_margin_is_a_share_of_the_best_mean(drop, verdict):
    steps = np.arange(0, 100, 10.0)
    runs = [plot.Run("t", "X", seed, steps, np.full(10, 90.0 - drop)) for seed in range(3)]
    args = gate.argparse.Namespace(min_seeds=3, margin=0.1, share=0.8)
    windows = [gate.Window(0, 50, 100, 90, 110, 5), gate.Window(50, 100, 95, 90, 110, 5)]
    assert gate.compare(runs, windows, args)["verdict"] == verdict


def test_errors_are_one_line(reference, tmp_path, capsys):
    (tmp_path / "broken.csv").write_text("task,mean\na,b\n")
    runs = str(tmp_path / "runs.csv")
    for argv in (
        [runs],
        [runs, "--reference", str(tmp_path / "broken.csv")],
        [runs, "--reference", "/nowhere.csv"],
        ["/nowhere", "--reference", reference],
        [runs, "--reference", reference, "--min_seeds", "0"],
        [runs, "--reference", str(ROOT / "figures/reference/sac.csv")],
    ):
        assert gate.main(argv) == 2
        assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()][-1] == "error"


def test_shipped_references_load():
    files = sorted((ROOT / "figures/reference").glob("*.csv"))
    assert [file.stem for file in files] == ["dreamerv3", "drqv2", "hrssm_upstream", "sac"]
    for file in files:
        for task, windows in gate.read_reference(str(file)).items():
            assert task.startswith("dmc_") and all(window.low <= window.mean <= window.high for window in windows)
