"""The real command as a subprocess: it trains, repeats itself, survives a kill, and refuses bad input in one line."""

import copy
import functools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import dreamer
import envs
import tools
from envs.vector import Vector
from figures import openloop, plot
from tests.bench import projection
from tests.bench.soak import DOT
from tests.helpers import ROOT, SMALL, make_agent, make_config
from tests.test_envs import Counter

SHORT = "--configs tiny --task dmc_cartpole_balance --envs 2 --action_repeat 2 --time_limit 40 --steps 280"
SHORT += " --eval_every 80 --prefill 60 --log_every 20 --pretrain 2 --actor_start 2 --train_ratio 16"
SHORT += " --eval_episode_num 2 --parallel False " + SMALL


def command(logdir: Path, *argv: str) -> list[str]:
    return [sys.executable, str(ROOT / "dreamer.py"), *SHORT.split(), "--logdir", str(logdir), *argv]


def run(logdir: Path, *argv: str, timeout: int = 900, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(command(logdir, *argv), capture_output=True, text=True, timeout=timeout, **kwargs)


def read_rows(logdir: Path) -> list[dict]:
    """Rows of metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (logdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "time" and not k.startswith("fps/")} for row in rows]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    logdir = tmp_path_factory.mktemp("run") / "log"
    done = run(logdir)
    assert done.returncode == 0, done.stderr
    return logdir


def test_run_leaves_what_the_readme_says(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"config.json", "metrics.jsonl", "latest.pt", "latest.prev.pt", "replay", "video"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert len(list((trained / "video").glob("eval_policy_*.mp4"))) == 3
    rows = read_rows(trained)
    # prefill is 60 policy steps = 120 frames; then every 80 frames until 240
    assert [row["step"] for row in rows if "eval/return" in row] == [120, 200, 280]
    assert all(row["eval/length"] == 20 for row in rows if "eval/return" in row)
    episodes = [row for row in rows if "episode/return" in row]
    assert [row["step"] for row in episodes] == [80, 160, 240] and episodes[-1]["episode"] == 6
    learned = [row for row in rows if "loss/model_loss" in row]
    assert learned[0]["update"] == 2 and all(np.isfinite(row["loss/model_loss"]) for row in learned)
    assert ["loss/actor_loss" in row for row in learned] == [False] + [True] * (len(learned) - 1)
    # Updates: 2 at the first of 40 training calls, 1 at the second, then one per policy step, that is 2 per call.
    assert rows[-1]["update"] == 2 + 1 + 38 * 2
    assert [row["step"] for row in learned] == list(range(120, 280, 20))


def test_every_logged_metric_is_explained(trained):
    readme = (ROOT / "figures/README.md").read_text()
    keys = {key for row in read_rows(trained) for key in row} | {"time", "fps/step", "fps/update"}

    def explained(key: str) -> bool:
        base = key.rsplit("_", 1)[0]
        return f"`{key}`" in readme or f"`{base}_{{mean,std,min,max}}`" in readme

    assert [key for key in sorted(keys) if not explained(key)] == []


def test_same_seed_gives_the_same_metrics(trained, tmp_path):
    """Serial and parallel environments, without and with a probe, two runs: identical rows apart from times."""
    done = run(tmp_path / "log", "--parallel", "True", "--video_pred_log")
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / "log")
    probe = [row.pop("loss/probe_loss") for row in rows if row.pop("opt/probe_grad_norm", None)]
    assert rows == read_rows(trained)
    assert len(probe) > 2 and probe[-1] < probe[0]
    ours, theirs = (tools.load_checkpoint(folder / "latest.pt") for folder in (trained, tmp_path / "log"))
    weights = {key: value for key, value in ours["agent"].items() if isinstance(value, torch.Tensor)}
    assert all(torch.equal(value, theirs["agent"][key]) for key, value in weights.items())
    assert torch.equal(ours["rng"]["torch"], theirs["rng"]["torch"])
    assert len(list((tmp_path / "log/video").glob("eval_openloop_*.mp4"))) == 3
    # Every fifth of 20 rows; truth, model and error of 32 x 32 pixels
    assert Image.open(tmp_path / "log/video/eval_openloop_280.png").size == (4 * 32, 3 * 32)
    # Its weights serve a run without a probe.
    done = run(tmp_path / "log", "--eval_only")
    assert done.returncode == 0, done.stderr


def test_another_seed_gives_other_metrics(trained, tmp_path):
    done = run(tmp_path / "log", "--seed", "1", "--steps", "120")
    assert done.returncode == 0, done.stderr
    assert read_rows(tmp_path / "log")[0] != read_rows(trained)[0]


def wait_for(condition, process: subprocess.Popen, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "the run made no progress"
        time.sleep(0.05)


def rows_written(logdir: Path, step: int) -> bool:
    path = logdir / "metrics.jsonl"
    lines = path.read_text().splitlines()[:-1] if path.exists() else []
    return any(json.loads(line)["step"] > step for line in lines)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_stopped_run_resumes(number, trained, tmp_path):
    """A kill loses at most the work since the last checkpoint; SIGTERM loses nothing. The same command goes on.

    Its rows are those of a run that was never stopped and in which all happened in one process.
    """
    logdir = tmp_path / "log"
    argv = ["--steps", "400", "--parallel", "True"]
    process = start_program(" ".join(command(logdir, *argv)[1:]), tmp_path)
    wait_for(lambda: (logdir / "latest.prev.pt").exists() and rows_written(logdir, 220), process)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    before = read_rows(logdir)
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number and f"Stopped by {number.name}; saved" in out
    saved = tools.load_checkpoint(logdir / "latest.pt")
    kept = saved["logger"]["rows"]
    assert before[-1]["step"] - 2 * saved["count"]["policy_step"] <= 80

    done = run(logdir, *argv)
    assert done.returncode == 0, done.stderr
    assert f"Resumed {logdir} at step {2 * saved['count']['policy_step']}" in done.stdout
    after = read_rows(logdir)
    never_stopped = read_rows(trained)
    assert after[: len(never_stopped)] == never_stopped and after[:kept] == before[:kept]
    steps, updates = [row["step"] for row in after], [row["update"] for row in after]
    assert steps == sorted(steps) and updates == sorted(updates), "no row is written twice"
    assert [row["step"] for row in after if "eval/return" in row] == [120, 200, 280, 360, 400]
    final = tools.load_checkpoint(logdir / "latest.pt")
    assert final["count"]["policy_step"] == 200 and final["agent"]["actor_critic._extra_state"] == updates[-1] - 2


def start_in_process(line: str, logdir: Path) -> dreamer.Run:
    """What the command does before it trains."""
    config = tools.load_config([*line.split(), "--logdir", str(logdir)])
    tools.seed_everything(config.seed)
    return dreamer.Run(config, logdir, torch.device("cpu"))


def assert_same(one, other, path: str = "") -> None:
    assert type(one) is type(other), path
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict | list):
        assert len(one) == len(other), path
        for key in one if isinstance(one, dict) else range(len(one)):
            assert_same(one[key], other[key], f"{path}/{key}")
    else:
        assert one == other, path


def final_state(logdir: Path) -> dict:
    """The last checkpoint without clocks, the rows of its replay, and metrics.jsonl."""
    state = tools.load_checkpoint(logdir / "latest.pt")
    del state["logger"]["seconds"]
    replay = tools.Replay(capacity=1000, batch_size=1, batch_length=2, num_envs=2, seed=0)
    replay.load(logdir / "replay", saved := state.pop("replay"))
    state["replay"] = [
        {key: values[list(slots)] for key, values in replay.storage.items()} for slots in replay.episodes.values()
    ]
    return state | {"sampler": saved["rng"], "open": saved["open"], "rows": read_rows(logdir)}


STOPS = {
    "in prefill, in an episode": lambda run: run.count["policy_step"] == 22,
    "right after an evaluation": lambda run: run.count["evaluated"] == run.count["policy_step"] == 60,
    "between two updates of a step": lambda run: run.count["update"] == 1,
    "in an episode": lambda run: run.count["policy_step"] == 90,
    "in an evaluation": lambda run: run.count["policy_step"] == 100 and len(run.eval_envs[""]._actions[0]) == 3,
}


def test_a_run_stopped_anywhere_goes_on_bit_for_bit(trained, tmp_path):
    """One run, stopped at five moments, against one that was never stopped."""
    logdir = tmp_path / "log"
    logdir.mkdir()
    tools.enable_deterministic()
    for stop in [*STOPS.values(), None]:
        run = start_in_process(SHORT, logdir)
        dreamer.train(run, lambda stop=stop, run=run: stop is not None and stop(run))
        assert run.finished == (stop is None) and (run.finished or stop(run))
        run.close()
    assert_same(final_state(logdir), final_state(trained))


def test_learning_beside_the_environments(tmp_path, capsys):
    """`--overlap` and `--profile`: repeatable, also if stopped in between, and as many updates as without."""
    states, updates = [], []
    options, plain = f"{DOT} --parallel True --profile 1", f"{DOT} --overlap False"
    for folder, line, stops in (("one", options, [30]), ("two", options, []), ("plain", plain, [])):
        logdir = tmp_path / folder
        logdir.mkdir()
        for stop in [*stops, 10**9]:
            run = start_in_process(f"{line} --save_every 0", logdir)
            dreamer.train(run, lambda run=run, stop=stop: run.count["policy_step"] >= stop)
            run.close()
        states.append(final_state(logdir))
        updates.append(run.count["update"])
    assert f"Profile: {tmp_path / 'two' / 'trace.json'}, to be opened at" in capsys.readouterr().out
    trace = json.loads((tmp_path / "two" / "trace.json").read_text())["traceEvents"]
    assert any(event.get("name") == "aten::native_layer_norm" for event in trace)
    assert_same(states[0], states[1])
    assert updates[0] == updates[2]
    assert states[1]["rows"] != states[2]["rows"]


@pytest.mark.parametrize("method", [name for name in dreamer.METHODS if name != "hrssm"])
def test_every_method_resumes_bit_for_bit(method, tmp_path):
    """Also the weight of RePo's constraint and its optimiser; one stop in the middle of the updates that are owed."""
    states = []
    for folder, stops in (("stopped", [lambda run: run.learner.updates == 3]), ("whole", [])):
        logdir = tmp_path / folder
        logdir.mkdir()
        line = f"{DOT} --save_every 0 --steps 100 --pretrain 6 --method {method} --beta_init 0.1 --decoder.minres 2"
        for stop in [*stops, None]:
            run = start_in_process(f"{line} --decoder.cnn_depth 2", logdir)
            dreamer.train(run, lambda run=run, stop=stop: stop is not None and stop(run))
            assert run.finished == (stop is None)
            run.close()
        states.append(final_state(logdir))
    assert_same(*states)
    assert ("beta" in states[0]["optimizers"]) == (method == "repo")


def test_a_run_from_before_methods_goes_on(tmp_path, monkeypatch):
    """tests/data/run_before_methods was written when the options were fewer and many tensors had other names."""
    logdir = tmp_path / "log"
    shutil.copytree(ROOT / "tests/data/run_before_methods", logdir)
    before, saved = read_rows(logdir), json.loads((logdir / "config.json").read_text())["config"]
    defaults = vars(tools.load_config([]))
    config = SimpleNamespace(**defaults | saved | {"logdir": str(logdir), "steps": 300})
    run, lock = dreamer.start(config, torch.device("cpu"), [])
    try:
        assert run.step == 280 and run.learner.updates == before[-1]["update"]
        dreamer.train(run, lambda: False)
    finally:
        run.close()
        os.close(lock)
    after = read_rows(logdir)
    assert after[: len(before)] == before and after[-1]["step"] == 304 and after[-1]["update"] > before[-1]["update"]
    assert np.isfinite(after[-1]["eval/return"])
    weights = tools.load_checkpoint(logdir / "latest.pt")["agent"]
    assert not any("hybrid" in name or "rssm" in name for name in weights)
    config.method = "dreamer"
    with pytest.raises(tools.UserError, match="method was 'hrssm', now 'dreamer'"):
        tools.check_config(config, logdir)


def test_evaluating_a_run_from_before_methods(tmp_path, capsys):
    saved = json.loads((ROOT / "tests/data/run_before_methods/config.json").read_text())["config"]
    logdir = tmp_path / "log"
    shutil.copytree(ROOT / "tests/data/run_before_methods", logdir)
    assert dreamer.main(["--eval_only", "--logdir", str(logdir), "--device", "cpu"]) == 0
    assert saved["task"] in capsys.readouterr().out


# --- faults ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def dots(tmp_path):
    """A function that starts a run on an environment that costs nothing, and one started so, with two checkpoints."""
    logdir = tmp_path / "log"
    started = []

    def start(*argv: str) -> dreamer.Run:
        started.append(start_in_process(" ".join([DOT, *argv]), logdir))
        return started[-1]

    logdir.mkdir()
    run = start()
    dreamer.train(run, lambda: run.count["update"] >= 4)
    yield start, run, logdir
    for run in started:
        run.close()


def learn_from(run: dreamer.Run, batch: dict) -> None:
    """One update, with the given batch."""
    drawn, run.replay.batches = run.replay.batches, lambda count: iter([batch] * count)
    run.learner.owed = 1
    assert run.learner.learn(run.step)
    run.replay.batches = drawn


def test_nan_stops_the_run_and_keeps_the_batch(dots):
    _, run, logdir = dots
    before = (logdir / "latest.pt").read_bytes()
    run.config.save_every = 0
    run.replay.storage["reward"][:] = np.nan
    with pytest.raises(tools.UserError) as caught:
        dreamer.train(run, lambda: False)
    message, number = str(caught.value), run.count["update"]
    assert (
        f"update {number} at step {run.step} is not finite (reward_loss, simsr_loss, min_reward, max_reward, model_loss"
        in message
    )
    assert "\n" not in message and "--on_nan skip" in message
    with np.load(logdir / f"nan_{number}.npz", allow_pickle=False) as batch:
        assert np.isnan(batch["reward"]).all() and batch["image"].shape == (2, 8, 16, 16, 3)
    assert (logdir / "latest.pt").read_bytes() == before


def test_nan_can_be_skipped(dots, capsys):
    start, run, logdir = dots
    run.learner.undo = True
    batch, before = run.replay.sample(), copy.deepcopy(run.learner.state_dict())
    learn_from(run, batch | {"reward": batch["reward"] * np.inf})
    assert_same(run.learner.state_dict(), before)
    assert run.count["skipped"] == 1 and "simsr_loss" in capsys.readouterr().err
    learn_from(run, batch)
    assert run.count["skipped"] == 1 and run.agent.actor_critic.updates > 0
    weight = "world_model.reward_head.out.weight"
    assert not torch.equal(run.learner.state_dict()["agent"][weight], before["agent"][weight])
    run.write()
    assert read_rows(logdir)[-1]["skipped"] == 1 and np.isfinite(read_rows(logdir)[-1]["loss/model_loss"])


@pytest.mark.parametrize("method", ["hrssm", "repo"])
def test_nan_in_the_very_first_update_can_be_skipped(method, tmp_path):
    run = start_in_process(f"{DOT} --on_nan skip --method {method}", tmp_path)
    dreamer.train(run, lambda: run.count["policy_step"] == 20)
    batch, before = run.replay.sample(), copy.deepcopy(run.learner.state_dict())
    learn_from(run, batch | {"reward": batch["reward"] * np.nan})
    assert_same(run.learner.state_dict(), before)
    run.close()


def test_a_disk_that_fills_up_costs_nothing(dots):
    """The limit on the size of a file makes the kernel refuse to write on, as a full disk does."""
    start, run, logdir = dots
    before = (logdir / "latest.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
        with pytest.raises(tools.UserError, match="cannot write to .* make room") as caught:
            dreamer.train(run, lambda: False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value) and not list(logdir.rglob("*.part"))
    step = run.count["policy_step"]
    again = start()
    assert step - 2 <= again.count["policy_step"] <= step and again.replay.num_transitions == again.count["policy_step"]


def test_damaged_running_episodes_end_there(dots, capsys):
    start, run, logdir = dots
    state = tools.load_checkpoint(logdir / "latest.pt")
    (path,) = {logdir / "replay" / file for file, _, _ in state["replay"]["episodes"] if file.startswith("running")}
    path.write_bytes(path.read_bytes()[:100])
    again = start()
    assert path.name in capsys.readouterr().err and not again.replay.open and again.rollout.over.all()
    dreamer.train(again, lambda: again.count["policy_step"] >= run.count["policy_step"] + 4)
    assert [len(slots) for slots in again.replay.episodes.values()] == [9, 9, 3, 3]


def test_a_worker_that_dies_costs_its_episode_and_the_folder_is_locked(tmp_path, capsys):
    logdir = tmp_path / "log"
    argv = ["--parallel", "True", "--steps", "280", "--eval_every", "160", "--worker_timeout", "60"]
    process = subprocess.Popen(command(logdir, *argv), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: rows_written(logdir, 70), process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [pid for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(int(workers[0]), signal.SIGKILL)
    with pytest.raises(tools.UserError, match="another process is training"):
        tools.lock(logdir)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert "the worker of environment 0 ended (exit code -9" in error
    assert read_rows(logdir)[-1]["worker_restarts"] == 1


def test_resumed_run_restores_everything(trained):
    """Weights, EMA twin, optimisers, return statistics, counters, clocks, random state and replay come back."""
    saved = tools.load_checkpoint(trained / "latest.pt")
    config = tools.load_config([*SHORT.split(), "--logdir", str(trained)])
    restored = dreamer.Run(config, trained, torch.device("cpu"))
    try:
        state = restored.agent.state_dict()
        for key, value in saved["agent"].items():
            assert torch.equal(torch.as_tensor(state[key]), torch.as_tensor(value)), key
        for name, optimizer in restored.agent.optimizers.items():
            new_state = optimizer.state_dict()["state"]
            assert len(new_state) == len(saved["optimizers"][name]["state"]) > 0
            for index, old in saved["optimizers"][name]["state"].items():
                new = new_state[index]
                assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old), name
        assert float(state["actor_critic.return_norm.quantiles"].abs().sum()) > 0
        assert restored.count == saved["count"] and restored.count["policy_step"] == 140
        assert {k: v.state_dict() for k, v in restored.clocks.items()} == saved["clocks"]
        assert torch.equal(torch.get_rng_state(), saved["rng"]["torch"])
        assert restored.replay.num_transitions == 140
        batch = restored.replay.sample()
        assert batch["image"].dtype == torch.uint8 and batch["image"].float().std() > 1
    finally:
        restored.close()


def test_finished_run_stays_finished(trained):
    before = read_rows(trained)
    done = run(trained)
    assert done.returncode == 0 and "Finished" in done.stdout and "give a larger --steps" in done.stdout, done.stderr
    assert read_rows(trained) == before


def test_evaluate_only(trained):
    before = read_rows(trained)
    done = run(trained, "--eval_only")
    assert done.returncode == 0, done.stderr
    header, row, written = done.stdout.splitlines()[-3:]
    assert header.split()[:4] == ["task", "episodes", "return", "std"]
    assert row.split()[:2] == ["dmc_cartpole_balance", "2"] and all(float(x) >= 0 for x in row.split()[2:4])
    assert read_rows(trained) == before and "Finished" not in done.stdout
    saved = json.loads((trained / "eval_only.json").read_text())
    assert saved["step"] == 280 and saved["evaluations"]["eval"]["mean"] == pytest.approx(
        float(row.split()[2]), abs=0.05
    )
    assert (trained / "video/eval_only_dmc_cartpole_balance_280.mp4").exists() and "eval_only.json" in written


def test_evaluation_takes_its_options_from_the_folder(trained, capsys):
    """Only --logdir is needed; another task says so, a robot that the agent does not know is refused."""

    def evaluate(*argv: str) -> tuple[int, str, str]:
        return dreamer.main(["--eval_only", "--logdir", str(trained), *argv]), *capsys.readouterr()

    code, out, err = evaluate("--eval_episode_num", "1")
    assert code == 0 and "dmc_cartpole_balance         1" in out and "other options" not in out, err
    code, out, err = evaluate("--task", "dmc_cartpole_swingup", "--eval_episode_num", "1", "--time_limit", "20")
    assert code == 0 and "dmc_cartpole_swingup         1" in out and "dmc_cartpole_balance  " not in out, err
    assert "eval_task was [], now ['dmc_cartpole_swingup']" in out and "time_limit was 40, now 20" in out
    assert_one_line_error(*evaluate("--task", "dmc_walker_stand")[::2], "can act in cartpole only")
    assert_one_line_error(*evaluate("--units", "16")[::2], "does not fit these options")


def test_a_trained_agent_acts_in_three_lines(trained, capsys):
    agent = dreamer.load(trained)
    obs, _ = agent.env.reset(seed=0)
    action = agent.act(obs)
    assert agent.env.action_space.contains(action) and not np.array_equal(action, agent.act(obs)), "it remembers"
    agent.reset()
    torch.manual_seed(0)
    first = agent.act(obs)
    agent.reset()
    torch.manual_seed(0)
    assert np.array_equal(first, agent.act(obs))
    agent.env.close()
    with pytest.raises(tools.UserError, match="holds no run"):
        dreamer.load(trained / "video")
    with pytest.raises(tools.UserError, match="unknown option eval_nois: did you mean eval_noise?"):
        dreamer.load(trained, eval_nois=0.3)


def test_open_loop_of_a_finished_run(trained, tmp_path, capsys):
    before = (trained / "latest.pt").read_bytes()
    assert openloop.main([str(trained), "--updates", "3", "--out", str(tmp_path / "o.png")]) == 0, capsys.readouterr()
    # Every fifth of 20 rows; truth, model and error of 32 x 32 pixels, enlarged four times and labelled
    width, height = Image.open(tmp_path / "o.png").size
    assert 4 * 128 < width < 5 * 128 and 3 * 128 < height < 4 * 128 and (tmp_path / "o.mp4").exists()
    assert (trained / "latest.pt").read_bytes() == before
    assert openloop.main([str(tmp_path)]) == 2 and "holds no run" in capsys.readouterr().err


def test_projections_of_a_finished_run(trained, capsys):
    """A row for untrained weights and one for the run's, which differ."""
    assert projection.main([str(trained), "--batches", "1"]) == 0
    untrained, own = capsys.readouterr().out.splitlines()[-2:]
    assert untrained.endswith("untrained") and own.endswith(str(trained))
    assert all(float(number) > 0 for row in (untrained, own) for number in row.split()[2:4])
    assert untrained.split()[:4] != own.split()[:4]
    assert projection.main([str(trained / "video")]) == 2 and "holds no run" in capsys.readouterr().err


def test_evaluation_on_other_tasks(tmp_path):
    tasks = "dmc_cartpole_balance,dmc_cartpole_balance_sensor_cs,dmc_cartpole_swingup_sensor_cs"
    done = run(tmp_path, "--steps", "100", "--eval_task", tasks, "--robustness_every", "100")
    assert done.returncode == 0, done.stderr
    names = ["clean", "sensor_cs", "swingup_sensor_cs"]
    rows = [row for row in read_rows(tmp_path) if "eval/clean/return" in row]
    assert rows and all(f"eval/{name}/return" in row for row in rows for name in names)
    assert "eval/return" not in rows[-1]
    found = [row for row in read_rows(tmp_path) if "robustness/sensor_cs/denoising_factor" in row]
    assert [row["step"] for row in found] == [100]
    assert all("robustness/swingup_sensor_cs/denoising_factor" in row for row in found)
    assert all(list((tmp_path / "video").glob(f"*{name}*")) for name in names)
    table = run(tmp_path, "--eval_only", "--eval_task", tasks).stdout.splitlines()[-4:-1]
    assert [line.split()[0] for line in table] == tasks.split(",")


def test_evaluation_on_another_robot_is_refused(tmp_path):
    done = run(tmp_path, "--eval_task", "dmc_walker_stand")
    assert done.returncode == 2 and "can act in cartpole only" in done.stderr


def test_weights_of_a_run_start_another(trained, tmp_path):
    done = run(tmp_path / "log", "--init_from", str(trained / "latest.pt"), "--steps", "100")
    assert done.returncode == 0, done.stderr
    assert "Loaded the weights of" in done.stdout


# --- loses no work ---------------------------------------------------------------------------------------------------


def test_steps_are_met_exactly(tmp_path, dots):
    """Also between two evaluations, and a longer run evaluates where it would have without the stop.

    Exactly: at the first step of all environments, here 2 of 4 frames each, that reaches them.
    """
    start, run, logdir = dots
    for steps in (304, 400):
        run = start("--steps", str(steps))
        dreamer.train(run, lambda: False)
        assert run.step == steps and run.finished
        run.close()
    # Prefill is 20 policy steps of 4 frames.
    assert [row["step"] for row in read_rows(logdir) if "eval/return" in row] == [80, 184, 280, 304, 384, 400]


def test_a_lost_checkpoint_is_not_a_new_run(dots, capsys):
    start, run, logdir = dots
    run.close()
    for path in logdir.glob("latest*.pt"):
        path.unlink()
    before = {path.name: path.read_bytes() for path in [logdir / "metrics.jsonl", *logdir.glob("replay/*.npz")]}
    argv = [*DOT.split(), "--logdir", str(logdir), "--steps", "100"]
    assert_one_line_error(dreamer.main(argv), capsys.readouterr().err, "start anew with --fresh")
    assert dreamer.main([*argv, "--fresh"]) == 0
    (kept,) = (logdir / "replaced").iterdir()
    for name, content in before.items():
        assert next(kept.rglob(name)).read_bytes() == content
    assert [row["step"] for row in read_rows(logdir) if "eval/return" in row] == [80, 104]
    assert "is now in" in capsys.readouterr().out
    # The same command again starts anew again; without --fresh it goes on.
    assert dreamer.main(argv) == 0 and "Resumed" in capsys.readouterr().out
    assert not json.loads((logdir / "config.json").read_text())["config"]["fresh"]
    assert plot.find_runs([str(logdir)]) == [logdir]


def test_a_run_killed_before_its_first_evaluation_goes_on(tmp_path):
    run = start_in_process(DOT, tmp_path)
    dreamer.train(run, lambda: run.count["policy_step"] == 18)
    run.close()
    assert (tmp_path / "metrics.jsonl").exists()
    again = start_in_process(DOT, tmp_path)
    assert again.count["policy_step"] == 18
    again.close()


def test_replay_without_a_readable_file(dots, capsys):
    start, run, logdir = dots
    for path in logdir.glob("replay/*.npz"):
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(tools.UserError, match="no file of .*replay is readable.*--fresh"):
        start()


STREAMS = {
    "the reader of stdout is gone": "exec {python} {argv} | true",
    "a full disk, and no stderr": "exec {python} {argv} >/dev/full 2>&-",
    "no stdout": "exec {python} {argv} >&-",
}


@pytest.mark.parametrize("name", STREAMS)
def test_output_that_nobody_takes_does_not_end_a_run(name, tmp_path):
    """And SIGHUP, of a terminal that was closed, saves like SIGTERM."""
    logdir = tmp_path / "log"
    argv = f"{ROOT}/dreamer.py {DOT} --steps 100000000 --logdir {logdir}"
    shell = f"set -o pipefail; {STREAMS[name].format(python=sys.executable, argv=argv)}"
    # Tests may themselves run where SIGHUP is ignored (nohup), which a run respects.
    heed = functools.partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)
    process = subprocess.Popen(["bash", "-c", shell], stdin=subprocess.DEVNULL, cwd=ROOT, preexec_fn=heed)
    try:
        wait_for(lambda: rows_written(logdir, 120), process)
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split() or [process.pid]:
            os.kill(int(pid), signal.SIGHUP)
        assert process.wait(timeout=120) == 128 + signal.SIGHUP
    finally:
        process.kill()
    saved = tools.load_checkpoint(logdir / "latest.pt")
    assert read_rows(logdir)[-1]["step"] in range(120, 4 * saved["count"]["policy_step"] + 1)
    assert saved["logger"]["rows"] == len(read_rows(logdir))


def start_program(line: str, folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *line.split()],
        cwd=ROOT,
        env=os.environ | {"HRSSM_ASSETS": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test may run in the background of a shell, where SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def imports(process: subprocess.Popen) -> bool:
    """Whether it has come to numpy, which every program imports after `setup.console`, or is over."""
    maps = Path(f"/proc/{process.pid}/maps")
    return process.poll() is not None or "/numpy" in maps.read_text(errors="replace")


@pytest.mark.parametrize("program", ["dreamer.py --help", "figures/plot.py x", "setup/download.py demo"])
@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_ctrl_c_prints_no_traceback(program, seconds, tmp_path):
    """Not in the interpreter's own start, where nothing can be done."""
    process = start_program(program, tmp_path)
    while not imports(process):
        time.sleep(0.005)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in out + err and "KeyboardInterrupt" not in out + err


def test_a_program_ends_with_130_after_ctrl_c(tmp_path):
    (tmp_path / "program.py").write_text(
        "import os, signal, time\nfrom setup import console\n"
        "console.run(lambda: (os.kill(os.getpid(), signal.SIGINT), time.sleep(60)))\n"
    )
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py")], env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
        capture_output=True, timeout=30, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert done.returncode == 130 and done.stderr == "Interrupted.\n"


def test_ctrl_c_in_every_other_program(tmp_path):
    names = ("report", "robustness", "openloop", "observations", "variants", "gate", "study")
    names = [f"figures/{name}.py" for name in names] + [f"setup/{name}.py" for name in ("doctor", "export", "expert")]
    started = [start_program(f"{name} --help", tmp_path) for name in names]
    for process in started:
        while not imports(process):
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
    for name, process in zip(names, started, strict=True):
        out, err = process.communicate(timeout=120)
        assert "Traceback" not in out + err and "KeyboardInterrupt" not in out + err, name


def test_a_log_shows_life(dots, capsys, monkeypatch):
    """Where no terminal shows a bar: lines with losses, during updates and evaluations too."""
    _, run, _ = dots
    monkeypatch.setattr(tools.Heartbeat, "SECONDS", 0.0)
    run.learner.owed = 2
    run.learner.learn(run.step)
    run.evaluate(lambda: False)
    lines = capsys.readouterr().out.splitlines()
    assert sum("model_loss" in line for line in lines) > 2 and any("evaluation: 1 of 1" in line for line in lines)
    assert all(lines), "no empty lines"


# --- malformed files --------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_structure_is_one_line(dots):
    start, run, logdir = dots
    good = tools.load_checkpoint(logdir / "latest.pt")
    broken = [
        {"count": 3},
        good | {"agent": {}},
        good | {"agent": {"x": "y"}},
        good | {"count": {"policy_step": 1}},
    ]
    broken += [good | {"optimizers": {}}, good | {"replay": []}, good | {"envs": "{"}, good | {"logger": None}]
    name, weight = next((k, v) for k, v in good["agent"].items() if isinstance(v, torch.Tensor) and v.ndim > 1)
    broken.append(good | {"agent": good["agent"] | {name: weight[:1, :1]}})
    for state in broken:
        torch.save(state, logdir / "latest.pt")
        with pytest.raises(tools.UserError, match="latest.pt") as caught:
            start()
        assert "\n" not in str(caught.value)
    (logdir / "latest.prev.pt").unlink()
    for state in ({}, [1], torch.zeros(2), 5):
        torch.save(state, logdir / "latest.pt")
        with pytest.raises(tools.UserError, match="unreadable"):
            start()


@pytest.mark.parametrize("content", ["tensor", "list", "list inside", "agent is a list", "text"])
def test_weights_of_another_form(content, tmp_path):
    path = tmp_path / "latest.pt"
    state = {"tensor": torch.zeros(3), "list": [1, 2], "list inside": {"_wm.dynamics.W": [1.0]}}
    state |= {"agent is a list": {"agent": [1]}}
    torch.save(state[content], path) if content in state else path.write_text("weights")
    with pytest.raises(tools.UserError, match="latest.pt") as caught:
        dreamer.load_weights(make_agent(), str(path))
    assert "\n" not in str(caught.value) and path.exists(), "a file of the user keeps its name"


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"config": [], "runs": []}', '{"config": {}, "runs": {}}', "{", "[" * 9999]
)
def test_a_config_of_another_form(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(tools.UserError, match="config.json"):
        tools.run_config(tmp_path)


def test_a_config_with_impossible_values(trained, tmp_path):
    saved = json.loads((trained / "config.json").read_text())
    for key, value in (("units", "many"), ("size", 3), ("encoder", 5), ("act", "Foo"), ("seed", None)):
        (tmp_path / "config.json").write_text(json.dumps(saved | {"config": saved["config"] | {key: value}}))
        if key == "encoder":  # a group that is none has its defaults
            tools.run_config(tmp_path)
            continue
        with pytest.raises(tools.UserError, match=f"{key}.* in .*config.json"):
            tools.run_config(tmp_path)


# --- bad input ------------------------------------------------------------------------------------------------------

BAD_INPUT = {
    "unknown domain": (["--task", "dmc_waker_stand"], "walker"),
    "unknown suite": (["--task", "dcm_walker_stand"], "dmc"),
    "unknown task of a domain": (["--task", "dmc_walker_stnad"], "stand"),
    "unknown preset": (["--configs", "tinny"], "tiny"),
    "unknown flag": (["--batch_sise", "4"], "did you mean batch_size"),
    "wrong type": (["--batch_size", "four"], "whole number"),
    "impossible value": (["--mask_ratio", "1.5"], "--mask_ratio"),
    "missing videos": (["--task", "dmc_walker_stand_video", "--resource_files", "nowhere/*.mp4"], "nowhere/*.mp4"),
    "nothing to be robust to": (["--robustness_every", "100"], "--robustness_every needs"),
    "no episodes": (["--eval_only", "True", "--eval_episode_num", "0"], "--eval_episode_num"),
    "absent device": (["--device", "cuda:7"], "cuda:7"),
    "absent weights": (["--init_from", "nowhere.pt"], "nowhere.pt"),
}


def assert_one_line_error(code: int, stderr: str, hint: str) -> None:
    assert code == 2, (code, stderr)
    errors = [line for line in stderr.splitlines() if not line.startswith("warning:")]
    assert len(errors) == 1 and errors[0].startswith("error: ") and hint in errors[0], stderr


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line(name, tmp_path, capsys):
    argv, hint = BAD_INPUT[name]
    if name == "absent device" and torch.cuda.is_available():
        pytest.skip("this machine may have that device")
    code = dreamer.main(command(tmp_path / "log", *argv)[2:])
    assert_one_line_error(code, capsys.readouterr().err, hint)
    assert not (tmp_path / "log" / "metrics.jsonl").exists()


def test_logdir_missing(capsys):
    assert_one_line_error(dreamer.main([]), capsys.readouterr().err, "--logdir")


def test_logdir_of_another_config(trained, capsys):
    before = (trained / "config.json").read_bytes()
    code = dreamer.main(command(trained, "--mbr_scale", "2")[2:])
    assert_one_line_error(code, capsys.readouterr().err, "mbr_scale was 0.1, now 2.0")
    assert (trained / "config.json").read_bytes() == before


def test_unwritable_logdir(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert_one_line_error(dreamer.main(command(tmp_path / "file" / "log")[2:]), capsys.readouterr().err, "cannot")


def test_damaged_checkpoint_falls_back_then_refuses(trained, tmp_path):
    logdir = tmp_path / "log"
    shutil.copytree(trained, logdir)
    damaged = (logdir / "latest.pt").read_bytes()[:1000]
    (logdir / "latest.pt").write_bytes(damaged)
    done = run(logdir)
    assert done.returncode == 0 and "latest.prev.pt" in done.stderr, done.stderr
    assert (logdir / "latest.damaged.pt").read_bytes() == damaged
    assert [row["step"] for row in read_rows(logdir) if "eval/return" in row] == [120, 200, 280]
    for name in ("latest.pt", "latest.prev.pt"):
        (logdir / name).write_bytes(damaged)
    done = run(logdir)
    assert_one_line_error(done.returncode, done.stderr, "unreadable")


def test_no_way_to_render(tmp_path):
    done = run(tmp_path / "log", env={**os.environ, "MUJOCO_GL": "nonsense"})
    assert_one_line_error(done.returncode, done.stderr, "MUJOCO_GL")


def test_weights_that_do_not_fit(tmp_path):
    torch.save({"_wm.dynamics.W": torch.zeros(1, 7)}, tmp_path / "latest.pt")
    agent = make_agent()
    with pytest.raises(tools.UserError, match=r"initial_deter \(1, 24\) here, \(1, 7\) there"):
        dreamer.load_weights(agent, str(tmp_path / "latest.pt"))


# --- parts of the loop ----------------------------------------------------------------------------------------------


def test_evaluation_averages_the_first_to_finish():
    """Of two environments the one with shorter episodes finishes more of them."""
    policy = lambda obs, carry, training: (torch.zeros(2, 1), None)  # noqa: E731
    vec, finished = Vector([lambda: Counter(2, True), lambda: Counter(3, True)], parallel=False), []
    metrics, frames = dreamer.evaluate(SimpleNamespace(policy=policy), vec, 4, finished=finished)
    assert finished == [(4.0, 2, 1.0), (6.0, 3, 1.0), (4.0, 2, 1.0), (4.0, 2, 1.0), (6.0, 3, 1.0)]
    assert (metrics["return"], metrics["length"], metrics["success"]) == (4.5, 2.25, 1.0) and frames is None
    assert metrics["return_std"] == pytest.approx(np.std([4, 6, 4, 4]))


def test_evaluation_films_an_episode():
    config = make_config("--task", "dmc_cartpole_balance", "--time_limit", "20", "--envs", "2", "--parallel", "False")
    vec = dreamer.make_envs(config, "eval")
    try:
        agent = dreamer.make_agent(config, vec.observation_space, vec.action_space)
        metrics, frames = dreamer.evaluate(agent, vec, 3)
        assert metrics["episodes"] == 3 and metrics["length"] == 10
        assert frames.shape == (10, 64, 64, 3) and frames.dtype == np.uint8
    finally:
        vec.close()


def test_resumed_environments_do_not_repeat_their_start():
    config = make_config("--task", "dmc_cartpole_balance", "--envs", "1", "--parallel", "False")
    frames = []
    for start in (0, 0, 500):
        vec = dreamer.make_envs(config, "train", start)
        frames.append(vec.reset(np.ones(1, bool))["position"])
        vec.close()
    assert np.array_equal(frames[0], frames[1]) and not np.array_equal(frames[0], frames[2])


def test_environment_errors_are_one_line():
    with pytest.raises(envs.EnvError) as error:
        dreamer.make_envs(make_config("--task", "dmc_cartpole_fly"), "train")
    assert "\n" not in str(error.value)
