"""setup/study.sh plans runs that dreamer.py accepts and counts those that are finished; figures/study.py's tables."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import tools
from figures import study
from tests.helpers import ROOT
from tests.test_figures import write_run

RECORD = "import json, sys\nopen({path!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n"


@pytest.fixture
def checkout(tmp_path):
    """The scripts in a checkout whose dreamer.py writes down its arguments, and a function that runs study.sh there."""
    (tmp_path / "setup").mkdir()
    for name in ("study.sh", "sweep.sh"):
        shutil.copy(ROOT / "setup" / name, tmp_path / "setup")
    (tmp_path / "dreamer.py").write_text(RECORD.format(path=str(tmp_path / "calls.jsonl")))

    def run(arguments):
        environ = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        command = [tmp_path / "setup/study.sh", "--out", tmp_path / "study", *arguments.split()]
        return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)

    return run


def counts(result):
    assert result.returncode == 0, result.stderr
    return {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines()[1:]}


def test_every_planned_run_has_options_that_exist(checkout, tmp_path):
    tasks = "dmc_walker_stand_video,dmc_walker_stand,dmc_cartpole_balance,dmc_ball_in_cup_catch"
    done = checkout(f"--seeds 3 --tasks {tasks} --jobs 8 data representation control masks sparse")
    assert done.returncode == 0, done.stderr
    calls = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    assert len(calls) == 1 + 10 + 3 * 4 + 5 + 3
    for call in calls:
        config = tools.load_config(call)
        assert config.seed == (0 if "/data/" in config.logdir else 3)
        assert bool(config.holdout_clips) == ("video" in config.task)
        data = str(tmp_path / "study/data/dmc_walker_stand_video/full/0/replay")
        assert config.offline_traindir == (data if "/representation/" in config.logdir else "")
        assert config.size == [64, 64] or "cartpole" not in config.task
    methods = {tools.load_config(call).method for call in calls}
    assert methods == {"hrssm", "dreamer", "rssm", "repo", "r2dreamer"}
    # the same command again finds everything done
    assert checkout("--seeds 3 --tasks dmc_walker_stand --jobs 8 control").returncode == 0
    assert len((tmp_path / "calls.jsonl").read_text().splitlines()) == len(calls)


def test_a_part_on_logged_episodes_records_them_first(checkout, tmp_path):
    """What is there already is not recorded again; the runs differ in what their methods say and in no other option."""
    folder = tmp_path / "study/data/gym_BreakoutBall-v0"
    (folder / "train").mkdir(parents=True)
    for number in range(28):
        (folder / "train" / f"{number}.npz").write_text("")
    done = checkout("--seeds 3 --jobs 8 breakout")
    assert done.returncode == 0, done.stderr
    calls = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    recorded, runs = [tools.load_config(call) for call in calls[:2]], [tools.load_config(call) for call in calls[2:]]
    assert [(Path(config.record).name, config.record_episodes) for config in recorded] == [
        ("train", 2),
        ("held_out", 6),
    ]
    assert recorded[0].seed != recorded[1].seed and {config.action_repeat for config in recorded} == {1}
    assert all(config.size == [64, 64] for config in recorded + runs)
    drawing = [config for config in runs if config.autoencoder == "internal"]
    weights = sorted((config.decoder_scale, config.motion_weight) for config in drawing if config.dynamics == "rssm")
    assert weights == [(scale, motion) for scale in (1, 10, 100) for motion in (0, 50)]
    methods = sorted((c.method, c.nomlr, c.nosimsr) for c in runs if c.autoencoder == "none")
    assert methods == [*(("hrssm", a, b) for a in (False, True) for b in (False, True)), ("rssm", False, False)]
    assert len(runs) == 12 and {(c.actor_dist, c.seed, c.offline_object) for c in runs} == {("onehot", 3, "ball:5")}


def test_upstream_gets_the_options_of_our_runs(checkout, tmp_path):
    """An evaluation at the same frames of both, and no option of ours that upstream's program could not follow."""
    (tmp_path / "tests/upstream").mkdir(parents=True)
    (tmp_path / "tests/upstream/train.py").write_text(RECORD.format(path=str(tmp_path / "theirs.jsonl")))
    without = checkout("--seeds 3 upstream")
    assert without.returncode == 0 and "--upstream" in without.stderr and not (tmp_path / "calls.jsonl").exists()
    for _ in range(2):  # the second time everything is done
        done = checkout(f"--seeds 3,4 --upstream {tmp_path / 'original'} upstream")
        assert done.returncode == 0, done.stderr
    texts = [(tmp_path / f"{name}.jsonl").read_text() for name in ("calls", "theirs")]
    calls = [json.loads(line) for text in texts for line in text.splitlines()]
    assert [call.pop(0) for call in calls[2:]] == [str(tmp_path / "original")] * 2
    ours, *others = (vars(tools.load_config(call)) for call in calls)
    for config in others:
        assert {key for key in ours if config[key] != ours[key]} <= {"seed", "logdir"}
    assert [call[-1].split("/")[-2:] for call in calls] == [[m, s] for m in ("hrssm", "upstream") for s in "34"]
    assert ours["shared_env_seed"] and not ours["overlap"] and ours["actor_start"] == ours["imag_starts"] == 0
    assert (ours["steps"] - ours["prefill"] * ours["action_repeat"]) % ours["eval_every"] == 0


def test_status_counts_runs_here_and_in_the_committed_table(checkout, tmp_path):
    assert counts(checkout("--status --seeds 0,1"))["control"] == ["0", "48"]
    (tmp_path / "figures/results").mkdir(parents=True)
    table = "part,task,method,seed,steps,hours,commit,device,command\n"
    table += "control,dmc_walker_stand,hrssm,1,40000,1,c,cpu,x\ncontrol,dmc_walker_stand,hrssm,10,40000,1,c,cpu,x\n"
    (tmp_path / "figures/results/study_runs.csv").write_text(table)
    run = tmp_path / "study/control/dmc_walker_stand/rssm/0"
    run.mkdir(parents=True)
    (run / "sweep.done").write_text("")
    found = counts(checkout("--status --seeds 0,1"))
    assert found["control"] == ["2", "48"] and found["representation"] == ["0", "60"]


def test_a_failed_run_does_not_hold_up_the_others(checkout, tmp_path):
    """The rest of the part, the other seeds and the tables still come, and the exit status says that one failed."""
    program = tmp_path / "dreamer.py"
    program.write_text(program.read_text() + "sys.exit('/hrssm/3' in ' '.join(sys.argv))\n")
    for name in ("figures/robustness.py", "figures/study.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(RECORD.format(path=str(tmp_path / f"{Path(name).stem}.jsonl")))
    done = checkout("--seeds 3,4 --tasks dmc_walker_stand --methods hrssm,rssm control measure tables")
    assert done.returncode == 1
    calls = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    runs = [tools.load_config(call).logdir.split("/")[-2:] for call in calls]
    assert runs == [["hrssm", "3"], ["rssm", "3"], ["hrssm", "4"], ["rssm", "4"]]
    assert (tmp_path / "study.jsonl").exists(), "nothing to measure is no error"
    assert not (tmp_path / "robustness.jsonl").exists()


def test_data_are_collected_whatever_the_methods(checkout, tmp_path):
    found = counts(checkout("--status --seeds 0 --methods rssm,dreamer"))
    assert (found["data"][1], found["representation"][1], found["masks"][1]) == ("3", "6", "0")


@pytest.mark.parametrize(
    "arguments", ["--seeds x", "--frames 3", "controls", "--jobs", "--tasks walker", "--status --methods hrssm,drssm"]
)
def test_bad_arguments(arguments, checkout):
    done = checkout(arguments)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.fixture
def runs(tmp_path):
    """Two methods with three seeds each: HRSSM 10 above its twin of the same seed, whatever the seed."""
    for seed, level in enumerate((100.0, 200.0, 600.0)):
        for method, extra in (("hrssm", 10.0), ("dreamer", 0.0)):
            folder = tmp_path / "study/control/dmc_walker_stand" / method / str(seed)
            values = [1.0, level + extra, -5.0][: 2 + (seed == 2)]  # one run is further than the others
            write_run(folder, values, seed=seed, method=method)
            (folder / "sweep.done").write_text("")
    return tmp_path


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_tables(runs, capsys):
    out = runs / "out"
    assert study.main([str(runs / "study"), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "| | HRSSM (3 runs) | DreamerV3 (3 runs) |" in text and "eval/return at 200 frames" in text
    assert "| HRSSM minus this |  | 10.0 [10.0, 10.0] |" in text  # paired: seeds differ much more than methods
    assert "| 310.0 [110.0, 610.0] | 300.0 [100.0, 600.0] |" in text
    assert len(rows(out / "study_runs.csv")) == 6 and len(rows(out / "study_values.csv")) == 14
    commands = [row["command"] for row in rows(out / "study_runs.csv")]
    assert not any(str(runs) in command for command in commands) and all("--seed" in command for command in commands)
    assert {path.name for path in out.glob("*.png")} == {"study_control.png"}


def test_parts_are_in_order_and_unknown_ones_last(runs, capsys):
    for part in ("upstream", "a_part_of_mine"):
        shutil.copytree(runs / "study/control", runs / "study" / part)
    assert study.main([str(runs / "study"), "--out", str(runs / "out")]) == 0
    parts = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("## ")]
    assert parts == ["control,", "upstream,", "a_part_of_mine,"]


def test_a_method_has_one_colour_in_all_pictures():
    some, more = study.colored(["dreamer", "hrssm"]), study.colored(["rssm", "untrained", "hrssm", "x", "dreamer"])
    assert list(some) == ["hrssm", "dreamer"] and list(more) == ["hrssm", "rssm", "dreamer", "x", "untrained"]
    assert all(more[method] == color for method, color in some.items()) and len(set(more.values())) == 5


def test_final_evaluations_are_in_the_tables(runs, capsys):
    for seed, (seen, unseen) in enumerate(((50.0, 30.0), (70.0, 60.0))):
        found = {"eval/seen": {"mean": seen}, "eval/unseen": {"mean": unseen}}
        path = runs / f"study/control/dmc_walker_stand/hrssm/{seed}/final_eval.json"
        path.write_text(json.dumps({"step": 200, "episodes": 5, "evaluations": found}))
    assert study.main([str(runs / "study"), "--out", str(runs / "out")]) == 0
    text = capsys.readouterr().out
    assert "| final/seen/return at 200 frames | 60.0 [50.0, 70.0] |  |" in text
    assert "| final/unseen/return at 200 frames | 45.0 [30.0, 60.0] |  |" in text
    picture = Image.open(runs / "out/study_control.png")
    assert picture.height > picture.width, "bars stand below the curves"


def test_tables_keep_runs_of_other_machines_and_take_new_values(runs, capsys):
    out = runs / "out"
    assert study.main([str(runs / "study"), "--out", str(out)]) == 0
    before = (out / "study_values.csv").read_text()
    shutil.rmtree(runs / "study/control/dmc_walker_stand/dreamer")
    path = runs / "study/control/dmc_walker_stand/hrssm/0"
    write_run(path, [1.0, 111.0], seed=0, method="hrssm")
    assert study.main([str(runs / "study"), "--out", str(out)]) == 0
    after = (out / "study_values.csv").read_text()
    assert after == before.replace("hrssm,0,200,eval/return,110", "hrssm,0,200,eval/return,111") != before
    assert study.main(["--out", str(out)]) == 0 and (out / "study_values.csv").read_text() == after
    write_run(path, [1.0], seed=0, method="hrssm")  # measured again, shorter: no row of the longer one stays
    assert study.main([str(runs / "study"), "--out", str(out)]) == 0
    assert "hrssm,0,200," not in (out / "study_values.csv").read_text()


def test_robustness_of_runs_is_taken_over(runs, capsys, monkeypatch):
    logdir = runs / "study/control/dmc_walker_stand"
    lines = ["run,task,clips,measure,value,low,high,n"]
    for run, value in (("hrssm/0", 0.5), ("dreamer/0", 0.25), ("hrssm/0 untrained", 0.1), ("dreamer/0 untrained", 0.1)):
        lines.append(f"{logdir}/{run},dmc_walker_stand,unseen,denoising_factor,{value},0,1,8")
    (runs / "study/robustness_a.csv").write_text("\n".join(lines))
    monkeypatch.chdir(runs / "study")
    for folder in (runs / "study", ".", "../study"):  # however it was written
        (runs / "out/study_robustness.csv").unlink(missing_ok=True)
        assert study.main([str(folder), "--out", str(runs / "out")]) == 0
        text = capsys.readouterr().out
        assert "denoising factor, unseen clips | 0.50 | 0.25 | 0.10 |" in text
        assert "| HRSSM minus this |  | 0.25 | 0.40 |" in text


def test_masks_are_compared_with_the_runs_of_control():
    rows = [
        {"part": part, "task": "a", "method": method, "seed": "0", "step": "10", "metric": "eval/return", "value": v}
        for part, method, v in (("control", "hrssm", "5"), ("control", "rssm", "1"), ("masks", "mask_ratio=0.3", "2"))
    ]
    text = study.table(study.last_values(rows, [])["masks", "a"], study.BASE)
    assert text[0] == "| | HRSSM (1 run) | mask_ratio=0.3 (1 run) |" and text[-1] == "| HRSSM minus this |  | 3.0 |"


def test_baselines_of_pictures_are_columns_beside_the_models():
    """Each metric next to the same one of a method that needs no model, differences paired by seed included."""
    names = {"open_mse": 1.0, "copy_mse": 3.0, "open_mse_5": 2.0, "mean_mse_5": 2.5, "moving_mse": 1.5,
             "copy_moving_mse": 4.5, "reward_r2": 0.5}  # fmt: skip
    values = [
        {"part": "offline", "task": "a", "method": study.BASES["offline"], "seed": str(seed), "step": "10",
         "metric": f"offline/{name}", "value": str(value + seed)}
        for seed in range(2) for name, value in names.items()
    ]  # fmt: skip
    results = study.last_values(values, [])["offline", "a"]
    assert list(results) == [
        f"offline/{n} at 10 updates" for n in ("open_mse", "open_mse_5", "moving_mse", "reward_r2")
    ]
    text = "\n".join(study.table(results, study.BASES["offline"]))
    assert "| | autoencoder=internal (2 runs) | last picture seen | mean picture |" in text
    assert "| autoencoder=internal minus this |  | -2.0000 [-2.0000, -2.0000] |  |" in text
    assert "| offline/open_mse_5 at 10 updates | 2.5000 [2.0000, 3.0000] |  | 3.0000 |" in text


def test_nothing_to_tabulate(tmp_path, capsys):
    assert study.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: no run of the study")
