"""What can be known about the GPU path without a GPU: see `fake_gpu.py` and `cuda_tape.py` for how."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import dreamer
import envs
import models
import tools
from envs import dmc
from tests import cuda_tape, fake_gpu
from tests.bench.soak import DOT
from tests.helpers import ROOT, make_agent, make_batch

VECTORS = "--encoder.mlp_keys .* --decoder.mlp_keys .*"
DISCRETE = "--actor_dist onehot --imag_gradient both --imag_gradient_mix 0.1"
CHECKED = [
    f"{VECTORS} --video_pred_log --decoder.cnn_depth 4 --expl_amount 0.3 --eval_noise 0.1 --eval_state_mean",
    f"{VECTORS} --method dreamer --decoder.cnn_depth 4 --value_decay 0.1 --weight_decay 1e-3 --opt momentum",
    f"--method rssm {DISCRETE} --expl_behavior random --expl_amount 0.3 --eval_noise 0.1 --future_entropy",
    "--method repo --dyn_discrete 0 --reward_head normal --value_head normal --opt adamax",
    "--method r2dreamer --dyn_shared --actor_dist trunc_normal --actor_state_entropy 0.01 --imag_sample False",
    "--method infonce --dyn_rec_depth 2 --initial zeros --reward_EMA False --slow_value_target False",
    "--expl_behavior plan2explore --disag_models 2 --disag_action_cond --expl_extr_scale 1 --slow_target_update 2",
    f"{DISCRETE} --nomlr --nosimsr --opt nadam --dyn_temp_post False --dyn_cell gru --behavior_stop_grad False",
    "--augmentation intensity,affine,blur,shift --aug_prob 0.5 --imag_gradient reinforce",
    f"{VECTORS} --dynamics tssm --tssm_gate --tssm_window 4 --imag_starts 3",
]


def fake_gpu_program(*argv: str) -> str:
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests/fake_gpu.py"), *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# --- on a device without data ---------------------------------------------------------------------------------------


def test_nothing_leaves_the_gpu():
    """No CPU tensor, no look at a value and no operation without deterministic CUDA code, in updates and acting."""
    assert {re.search(r"--method (\w+)|$", line)[1] or "hrssm" for line in CHECKED} == set(dreamer.METHODS)
    assert fake_gpu_program("check", *CHECKED).count("launches") == len(CHECKED)


SYMPTOMS = {
    "look_at_a_value": "aten._local_scalar_dense",
    "index_by_a_mask": "aten.nonzero",
    "make_a_tensor_on_the_cpu": "met a tensor on cpu",
    "make_a_tensor_of_a_number": "met a tensor on cpu",
    "pad_by_reflection": "aten.reflection_pad1d_backward.default has no deterministic CUDA code",
    "make_state_while_recording": "make_capturable comes first",
}


def test_each_mutant_is_caught_on_the_gpu():
    assert SYMPTOMS.keys() == fake_gpu.MUTANTS.keys()
    outcomes = dict(re.findall(r"^(\w+): (.*)$", fake_gpu_program("mutants", "--method rssm"), re.MULTILINE))
    for mutant, symptom in SYMPTOMS.items():
        assert symptom in outcomes[mutant], (mutant, outcomes)


def test_list_of_operations_is_that_of_the_pinned_torch():
    pinned = re.search(r"^torch==(\S+)", (ROOT / "setup/requirements.txt").read_text(), re.MULTILINE)[1]
    assert pinned == fake_gpu.TORCH


def test_launches_per_update_do_not_grow():
    """At the default size. Fewer is better: then lower the bounds."""
    found = {key: int(value) for key, value in re.findall(r"(\w[a-z ]*)=(\d+)", fake_gpu_program("count", ""))}
    assert found["update"] == found["recurrence step"] * 64 + found["imagination step"] * 15 + found["rest"]
    for part, bound in LAUNCHES.items():
        assert found[part] <= bound, found


LAUNCHES = {"update": 3999, "recurrence step": 38, "imagination step": 54, "rest": 738}


# --- recorded -------------------------------------------------------------------------------------------------------


@pytest.fixture
def emulated(monkeypatch):
    cuda_tape.install(monkeypatch)
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield monkeypatch
    torch.use_deterministic_algorithms(deterministic)


def learn(argv: list[str], recorded: bool, updates: int = 14, start: int = 6) -> tuple:
    """Metrics of each update, weights and random state of an agent that acts and learns; behaviour from `start` on."""
    discrete = "onehot" in argv
    agent = make_agent(*argv, vectors=True, discrete=discrete)
    if recorded:
        agent.record()
    torch.manual_seed(1)
    metrics, carry = [], None
    for k in range(updates):
        batch = make_batch(seed=k, discrete=discrete)
        found = agent.update(batch, behavior=k >= start)
        obs = {key: value[:, 0].numpy() for key, value in batch.items() if key not in ("action", "reward")}
        action, carry = agent.policy(obs, carry, step=k)
        metrics.append({key: float(value) for key, value in found.items()} | {"action": action.tolist()})
    if recorded:
        assert len(agent.update.graphs) == 2 and len(agent.act.graphs) == 1
    weights = {key: value for key, value in agent.state_dict().items() if isinstance(value, torch.Tensor)}
    return metrics, weights, torch.get_rng_state()


def assert_recorded_is_eager(argv: list[str]) -> None:
    (eager, weights, rng), (recorded, other_weights, other_rng) = learn(argv, False), learn(argv, True)
    assert eager == recorded and torch.equal(rng, other_rng)
    for key, value in weights.items():
        assert torch.equal(value, other_weights[key]), key


RECORDED = [
    "--slow_target_update 3 --encoder.mlp_keys .*",
    "--method repo --beta_lr 0.01 --actor_dist onehot --imag_gradient both --expl_behavior random --opt sgd",
    "--method dreamer --decoder.cnn_depth 4 --expl_behavior plan2explore --disag_models 2 --opt momentum",
    "--method r2dreamer --video_pred_log --decoder.cnn_depth 4",
    "--method infonce --augmentation shift --expl_amount 0.3",
    "--method rssm --dyn_discrete 0",
    "--dynamics tssm --tssm_window 4 --imag_starts 3",
]


@pytest.mark.parametrize("line", RECORDED)
def test_recorded_updates_are_those_that_run(line, emulated):
    """Bit for bit: metrics, actions, weights and random numbers, across the update at which behaviour begins."""
    assert_recorded_is_eager(line.split())


def count_on_the_host(monkeypatch) -> None:
    def update_slow_critic(self):
        self.number = getattr(self, "number", -1) + 1
        rate = self.slow_target_fraction * (self.number % self.slow_target_update == 0)
        tools.ema_update(self.slow_critic, self.critic, torch.tensor(rate))
        self.updates += 1

    monkeypatch.setattr(models.ActorCritic, "update_slow_critic", update_slow_critic)


def replace_a_buffer(monkeypatch) -> None:
    def forward(self, returns):
        levels = torch.tensor(self.LEVELS)
        self.quantiles = self.quantiles.lerp(torch.quantile(returns.detach(), levels), self.rate)
        low, high = self.quantiles.unbind()
        return low, (high - low).clamp(min=1.0)

    monkeypatch.setattr(models.ReturnNorm, "forward", forward)


def look_at_a_loss(monkeypatch) -> None:
    step = tools.Optimizer.step

    def mutant(self, loss, retain_graph=False):
        return step(self, loss, retain_graph) if loss.item() < 1e9 else {}

    monkeypatch.setattr(tools.Optimizer, "step", mutant)


def make_state_late(monkeypatch) -> None:
    monkeypatch.setattr(tools.Optimizer, "_make_state", lambda self: self.optimizer.state.clear())
    monkeypatch.setattr(tools.CudaGraphs, "WARMUP", 0)


@pytest.mark.parametrize("mutant", [count_on_the_host, replace_a_buffer, look_at_a_loss, make_state_late])
def test_each_mutant_is_caught_in_the_recording(mutant, emulated):
    with emulated.context() as patch:
        mutant(patch)
        with pytest.raises((AssertionError, tools.UserError)):
            assert_recorded_is_eager(["--slow_target_update", "3"])


def rows_of(logdir: Path) -> list[dict]:
    rows = [json.loads(line) for line in (logdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "time" and not k.startswith("fps/")} for row in rows]


def test_recorded_run_has_the_rows_of_an_eager_one(emulated, tmp_path):
    """The whole command with prefetched batches, stopped by SIGTERM among replayed updates and resumed."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    line = f"{DOT} --pretrain 4 --actor_start 8 --deterministic_run False --save_every 0"
    argv = [*line.split(), "--slow_target_update", "3", "--logdir"]
    learn, init, agents = dreamer.Learner.learn, tools.Replay.__init__, []

    def stop_once(self, *args):
        if self.updates == 24 and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return learn(self, *args)

    try:
        assert dreamer.main([*argv, str(tmp_path / "eager")]) == 0
        emulated.setattr(dreamer.Agent, "speed_up", lambda self, mode: (self.record(), agents.append(self)))
        emulated.setattr(tools.Replay, "__init__", lambda self, **options: init(self, **options, prefetch=True))
        emulated.setattr(dreamer.Learner, "learn", stop_once)
        assert dreamer.main([*argv, str(tmp_path / "recorded")]) == 128 + signal.SIGTERM
        assert dreamer.main([*argv, str(tmp_path / "recorded")]) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert [len(agent.update.graphs) for agent in agents] == [2, 1] and all(len(a.act.graphs) == 2 for a in agents)
    eager, recorded = (rows_of(tmp_path / name) for name in ("eager", "recorded"))
    assert len(eager) > 10 and any("loss/actor_loss" in row for row in eager)
    assert recorded == eager


# --- guards ---------------------------------------------------------------------------------------------------------


def test_no_batch_is_gathered_during_a_recording(emulated):
    replay = tools.Replay(capacity=50, batch_size=2, batch_length=4, num_envs=1, seed=0, prefetch=True)
    for t in range(40):
        replay.add({"reward": np.zeros(1, np.float32), "is_first": np.array([t == 0])})
    events, copy_rows = [], replay._copy_rows

    def slow(*args):
        events.append("gather")
        time.sleep(0.1)
        batch = copy_rows(*args)
        events.append("gathered")
        return batch

    def function(x):
        if tools.CudaGraphs.recording:
            events.append("record")
            time.sleep(0.3)
            events.append("recorded")
        return x + 1.0

    replay._copy_rows = slow
    recorded = tools.CudaGraphs(function)
    for _ in replay.batches(7):
        recorded(torch.zeros(2))
    pairs = list(zip(events[::2], events[1::2], strict=True))
    assert set(pairs) == {("gather", "gathered"), ("record", "recorded")} and len(pairs) == 8
    assert 0 < pairs.index(("record", "recorded")) < 7, "no gather waited for it"


def test_failed_recording_is_one_line(emulated):
    recorded = tools.CudaGraphs(lambda x: x * x.sum().item())
    for _ in range(tools.CudaGraphs.WARMUP):
        recorded(torch.ones(2))
    with pytest.raises(
        tools.UserError, match="recording a CUDA graph failed .*looks at a value.*--compile off"
    ) as error:
        recorded(torch.ones(2))
    assert "\n" not in str(error.value) and not tools.CudaGraphs.recording and not tools.CudaGraphs.lock.locked()


@pytest.mark.parametrize("opt", tools.OPTIMIZERS)
def test_state_made_ahead_is_that_of_the_first_step(opt):
    """The same weights as without; undoing an update, or loading one from before the first, leaves none to be made."""
    weights = []
    for ahead in (False, True):
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        optimizer = tools.Optimizer("layer", layer.parameters(), lr=0.1, eps=1e-8, clip=0.0, opt=opt)
        empty = optimizer.state_dict()
        if ahead:
            before = [p.detach().clone() for p in layer.parameters()]
            optimizer._make_state()
            assert all(map(torch.equal, layer.parameters(), before)) and not optimizer._without_state()
            # Torch refuses this on a CPU to those that are not fused.
            optimizer.optimizer.param_groups[0]["capturable"] = opt == "adam"
            optimizer.load_state_dict(empty)
            assert bool(optimizer._without_state()) == (opt not in ("adam", "sgd"))
            optimizer._make_state()
        for _ in range(3):
            optimizer.step(layer(torch.ones(4, 3)).square().sum())
        weights.append(layer.weight.detach())
    assert torch.equal(*weights)


def test_warm_up_updates_may_all_be_undone(emulated, tmp_path):
    """`--on_nan skip`: the state that they would have made is there when the next update is recorded."""
    emulated.setattr(dreamer.Agent, "speed_up", lambda self, mode: self.record())
    config = tools.load_config([*f"{DOT} --on_nan skip".split(), "--logdir", str(tmp_path)])
    tools.seed_everything(0)
    run = dreamer.Run(config, tmp_path, torch.device("cpu"))
    try:
        dreamer.train(run, lambda: run.count["policy_step"] == 20)
        run.learner.actor_start, drawn = 0, run.replay.sample()
        for scale in (np.nan, np.nan, np.nan, 1.0, 1.0):
            batch = drawn | {"reward": drawn["reward"] * scale}
            emulated.setattr(run.replay, "batches", lambda count, batch=batch: iter([batch]))
            run.learner.owed = 1
            assert run.learner.learn(run.step)
    finally:
        run.close()
    assert run.learner.skipped == 3 and len(run.agent.update.graphs) == 1
    steps = {float(values["step"]) for values in run.agent.optimizers["model"].optimizer.state.values()}
    assert 2.0 in steps and steps <= {0.0, 2.0}


def test_absent_card_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    with pytest.raises(tools.UserError, match="--device cuda:9: there is no cuda:9 here; there are 2.*cuda:1$"):
        dreamer.pick_device("cuda:9")
    assert dreamer.pick_device("auto") == torch.device("cuda:0") and dreamer.pick_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert dreamer.pick_device("cuda") == torch.device("cuda:1") and current == [0, 1]


def test_replay_that_does_not_fit_on_the_card(monkeypatch, capsys, tmp_path):
    """It stays in memory and says so; the thread that copies batches over uses the learner's card."""
    current = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: current.append((threading.current_thread().name, device))
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("Card", (), {"uuid": "test"}))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    monkeypatch.setattr(tools.tempfile, "gettempdir", lambda: str(tmp_path))
    sizes = {"capacity": 50, "batch_size": 2, "batch_length": 4, "num_envs": 1, "seed": 0}
    replay = tools.Replay(**sizes, device=torch.device("cuda:1"))
    replay.add({"image": np.zeros((1, 100), np.uint8), "is_first": np.ones(1, bool)})
    line = capsys.readouterr().out
    assert "in memory when full: cuda:1 has room for 0.00 GB" in line and line.count("\n") == 1
    assert replay.storage["image"].device.type == "cpu"
    replay.thread.submit(int).result()
    assert current == [("replay_0", torch.device("cuda:1"))]


def test_processes_measure_a_card_one_at_a_time(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("Card", (), {"uuid": "test"}))
    monkeypatch.setattr(tools.tempfile, "gettempdir", lambda: str(tmp_path))
    inside = []

    def enter(number: int) -> None:
        with tools.alone_on(torch.device("cuda:0")):
            inside.append(number)
            time.sleep(0.1)
            inside.append(number)

    threads = [threading.Thread(target=enter, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside[::2] == inside[1::2] and sorted(inside[::2]) == [0, 1, 2]
    with tools.alone_on(torch.device("cpu")):
        pass


def test_acceptance_script_needs_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("it would run for minutes")
    script = ROOT / "tests/bench/gpu_acceptance.sh"
    environ = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run([script], env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: this needs a GPU that torch can use, and there is none\n"


# --- rendering ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "gpu, visible, chosen, expected",
    [
        ("1", None, None, "1"),
        ("1", "4,6", None, "6"),
        ("1", "GPU-aa,GPU-bb", None, None),
        ("3", "4,6", None, None),
        ("1", "", None, "1"),
        ("1", None, "5", None),
    ],
)
def test_card_that_renders(gpu, visible, chosen, expected, monkeypatch):
    for name, value in (("CUDA_VISIBLE_DEVICES", visible), ("MUJOCO_EGL_DEVICE_ID", chosen)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert dmc.egl_device(gpu) == expected


RENDER = """
import os, sys, envs
from envs import dmc
envs.render_on(int(sys.argv[1]))
env = envs.make("dmc_walker_stand")
assert env.reset()[0]["image"].std() > 1
print(os.environ.get("MUJOCO_EGL_DEVICE_ID"), os.environ["HRSSM_RENDER_DEVICE"])
"""


def test_simulator_starts_on_the_chosen_card():
    """Here, where EGL has one device. A card that cannot render costs a warning."""
    dmc.check_rendering()
    if os.environ["MUJOCO_GL"] != "egl":
        pytest.skip("only EGL can choose a card")
    environ = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_EGL_DEVICE_ID", "CUDA_VISIBLE_DEVICES")}
    for gpu, device in (("0", "0"), ("7", "None")):
        command = [sys.executable, "-c", RENDER, gpu]
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300)
        assert done.stdout.split() == [device, gpu], done.stderr
    assert "MUJOCO_EGL_DEVICE_ID=7" in done.stderr and "rendering with MUJOCO_GL=egl" in done.stderr


@pytest.mark.parametrize("device, ranks, expected", [("cuda:1", "", 1), ("auto", "", None), ("auto", "1", 1)])
def test_environments_render_where_learning_goes(device, ranks, expected, monkeypatch):
    """Said before anything of the simulator is loaded; a run that names no card leaves the choice to EGL."""
    said = []

    def stop(*_, **__):
        raise envs.EnvError("far enough")

    monkeypatch.setattr(envs, "render_on", said.append)
    monkeypatch.setattr(envs, "prepare", stop)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    if ranks:
        monkeypatch.setenv("LOCAL_RANK", ranks)
    with pytest.raises(envs.EnvError, match="far enough"):
        dreamer.prepare(tools.load_config(["--device", device, "--logdir", "unused"]))
    assert said == [number for number in [expected] if number is not None]


def test_where_to_render_can_be_said_before(monkeypatch):
    monkeypatch.setenv("HRSSM_RENDER_DEVICE", "2")
    envs.render_on(1)
    assert os.environ["HRSSM_RENDER_DEVICE"] == "2"
