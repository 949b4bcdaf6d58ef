"""setup/sweep.sh and setup/slurm.sh with a stand-in for training: same exit codes, signals and metrics.jsonl."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SWEEP = Path(__file__).resolve().parents[1] / "setup" / "sweep.sh"
TRAIN = """
import json, pathlib, signal, sys, time
argv = [part for word in sys.argv[1:] for part in (word.split("=", 1) if word.startswith("--") else [word])]
options = dict(zip(argv[::2], argv[1::2]))
logdir = pathlib.Path(options["--logdir"])
logdir.mkdir(parents=True, exist_ok=True)
with open(logdir.parents[2] / "starts.jsonl", "a") as file:
    file.write(json.dumps([options, time.time()]) + "\\n")
if options["--seed"] == "13":
    sys.exit("error: thirteen")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
with open(logdir / "metrics.jsonl", "a") as file:
    file.write('{"step": 40, "eval/return": -12.5}\\n{"step": 60, "fps/step": 1.0}\\n')
time.sleep(float(options.get("--sleep", 0)))
with open(logdir.parents[2] / "ends.jsonl", "a") as file:
    file.write(json.dumps(time.time()) + "\\n")
"""


@pytest.fixture
def sweep(tmp_path):
    """A function that starts sweep.sh on the folder `my runs`, in a checkout where dreamer.py is the stand-in."""
    (tmp_path / "setup").mkdir()
    shutil.copy(SWEEP, tmp_path / "setup")
    (tmp_path / "dreamer.py").write_text(TRAIN)
    processes = []

    def start(arguments):
        environ = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        command = [tmp_path / "setup/sweep.sh", "--logdir", tmp_path / "my runs", *arguments.split()]
        processes.append(
            subprocess.Popen(
                command,
                env=environ,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
                # A test may itself run in the background of a shell, where SIGINT is ignored, and a script cannot trap
                # a signal that it inherits as ignored.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        )
        return processes[-1]

    yield start
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.mark.parametrize(
    "arguments",
    ["--tasks ..", "--tasks a,../b", "--tasks x,x", "--tasks gym_a/b,gym_a:b", "--tasks a --seeds 1,1", "--tasks a,"],
)
def test_names_that_share_a_folder_or_leave_it(arguments, sweep, tmp_path):
    code, out, err = finish(sweep(arguments))
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and not list(tmp_path.rglob("sweep.lock"))


def test_a_sign_of_life(sweep, monkeypatch):
    monkeypatch.setenv("SWEEP_SECONDS", "0.3")
    code, out, err = finish(sweep("--tasks dmc_a -- --sleep 1.5"))
    assert code == 0 and out.count("dmc_a/full/0:") >= 2, (out, err)


def finish(process):
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def started(tmp_path):
    path = tmp_path / "my runs" / "starts.jsonl"
    return [json.loads(line)[0] for line in path.read_text().splitlines()] if path.exists() else []


def test_every_combination_runs_once(sweep, tmp_path):
    arguments = "--tasks a_b,gym_m:X/Y-v0 --seeds 0,1 --methods full,nomlr,neither,mask_ratio=0.3+block_size=2"
    code, out, err = finish(sweep(f"{arguments} --jobs 4 -- --configs tiny"))
    assert (code, err) == (0, "")
    keys = ("--task", "--seed", "--nomlr", "--nosimsr", "--mask_ratio", "--block_size")
    runs = {tuple(options.get(key) for key in keys) for options in started(tmp_path)}
    methods = [(None,) * 4, ("True", None, None, None), ("True", "True", None, None), (None, None, "0.3", "2")]
    assert runs == {(task, seed, *m) for task in ("a_b", "gym_m:X/Y-v0") for seed in "01" for m in methods}
    assert len(started(tmp_path)) == 16 and {o["--configs"] for o in started(tmp_path)} == {"tiny"}
    assert "/my runs/gym_m_X_Y-v0/mask_ratio=0.3+block_size=2/1" in out
    assert [line.split()[:3] for line in out.splitlines()[1:]] == [["finished", "60", "-12.5"]] * 16
    # The same command does nothing; another budget is another command.
    assert finish(sweep(f"{arguments} -- --configs tiny"))[0] == 0 and len(started(tmp_path)) == 16
    assert finish(sweep("--tasks a_b -- --configs tiny --steps 9"))[0] == 0 and len(started(tmp_path)) == 17


def test_methods_by_name(sweep, tmp_path):
    """Every value of --method, alone and joined with options and ablations."""
    names = ["hrssm", "dreamer", "rssm", "repo", "r2dreamer", "infonce"]
    code, _, err = finish(sweep(f"--tasks t --jobs 8 --methods {','.join(names)},repo+mask_ratio=0.3,full+nomlr"))
    assert (code, err) == (0, "")
    keys = ("--method", "--mask_ratio", "--nomlr")
    runs = {tuple(options.get(key) for key in keys) for options in started(tmp_path)}
    expected = {(name, None, None) for name in names} | {("repo", "0.3", None), (None, None, "True")}
    assert runs == expected
    assert (tmp_path / "my runs/t/dreamer/0/sweep.done").exists()


def test_a_failed_run_does_not_stop_the_others_and_is_retried(sweep, tmp_path):
    code, out, _ = finish(sweep("--tasks t --seeds 13,1"))
    assert code == 1
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["failed", "error:", "finished"]
    assert finish(sweep("--tasks t --seeds 13,1"))[0] == 1
    assert [o["--seed"] for o in started(tmp_path)] == ["13", "1", "13"]


def test_number_of_jobs_and_two_sweeps_sharing_the_work(sweep, tmp_path):
    both = [sweep("--tasks t --seeds 0,1,2,3 --jobs 1 -- --sleep 1.2") for _ in range(2)]
    assert [finish(process)[0] for process in both] == [0, 0]
    assert sorted(o["--seed"] for o in started(tmp_path)) == ["0", "1", "2", "3"]
    begins = [json.loads(line)[1] for line in (tmp_path / "my runs/starts.jsonl").read_text().splitlines()]
    ends = [json.loads(line) for line in (tmp_path / "my runs/ends.jsonl").read_text().splitlines()]
    at_once = [sum(b <= moment for b in begins) - sum(e <= moment for e in ends) for moment in begins]
    assert max(at_once) <= 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_sweep_stops_its_runs_and_resumes_later(sweep, tmp_path, number):
    process = sweep("--tasks t --seeds 0,1 -- --sleep 30")
    deadline = time.monotonic() + 60
    while not (tmp_path / "my runs/t/full/0/metrics.jsonl").exists():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.05)
    code, out, _ = finish(sweep("--tasks t --seeds 0,1 --status -- --sleep 30"))
    assert code == 0 and [line.split()[0] for line in out.splitlines()[1:]] == ["running", "waiting"]
    time.sleep(0.2)
    process.send_signal(number)
    code, out, _ = finish(process)
    assert code == 128 + number
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["interrupted", "waiting"]
    (tmp_path / "dreamer.py").write_text(TRAIN.replace("time.sleep(", "("))
    assert finish(sweep("--tasks t --seeds 0,1 -- --sleep 30"))[0] == 0
    assert [o["--seed"] for o in started(tmp_path)] == ["0", "0", "1"]


SLURM = Path(__file__).resolve().parents[1] / "setup" / "slurm.sh"


@pytest.mark.parametrize(
    "number, code, expected",
    [(0, 0, "0 dmc_a 0"), (3, 143, "0 gym_b:X/Y-v0 1 requeue 7_3"), (1, 2, "2 dmc_a 1"), (4, 0, "2"), ("", 0, "1")],
)
def test_slurm_array(tmp_path, number, code, expected):
    """With stand-ins for Slurm's commands: a stopped run is requeued; a failed or finished one is not."""
    stand_ins = {
        "srun": f'while [ "$1" != --task ]; do shift; done; echo "$2 $4" >> {tmp_path}/log; exit {code}',
        "scontrol": f'echo "$@" >> {tmp_path}/log',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environ = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": str(number)}
    environ["SLURM_ARRAY_JOB_ID"] = "7"
    command = [SLURM, "./runs", "dmc_a,gym_b:X/Y-v0", "2", "--configs", "tiny"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    log = (tmp_path / "log").read_text().split() if (tmp_path / "log").exists() else []
    assert " ".join([str(done.returncode), *log]) == expected, done.stderr
    assert done.returncode != 2 or log or done.stderr == "error: --array goes to 3 at most\n"


@pytest.mark.parametrize(
    "arguments, message",
    {
        "": "--tasks is missing",
        "--tasks t --methods foo": "unknown method 'foo'",
        "--tasks t --methods full,=3": "unknown method '=3'",
        "--tasks t --methods dreamer+": "unknown method 'dreamer+'",
        "--tasks t --methods dreamer++nomlr": "unknown method 'dreamer++nomlr'",
        "--tasks t --methods dreamerv3": "unknown method 'dreamerv3'",
        "--tasks t --seeds a": "--seeds takes numbers",
        "--tasks t --jobs 0": "--jobs takes a number",
        "--tasks t --mask_ratio 3": "unknown option --mask_ratio",
        "--tasks": "--tasks needs a value",
    }.items(),
)
def test_mistakes(sweep, tmp_path, arguments, message):
    code, out, err = finish(sweep(arguments))
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith("error: ") and message in err
    assert started(tmp_path) == []
