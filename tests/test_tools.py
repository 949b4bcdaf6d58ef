"""Seeding, clocks, optimiser, logger and checkpoint."""

import io
import json
import math
import os
import random
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import tools

# --- seeding --------------------------------------------------------------------------------------------------------


def draws():
    return [random.random(), *np.random.normal(size=3), *torch.randn(3).tolist()]


def test_seed_and_generator_state():
    tools.seed_everything(3)
    first = draws()
    buffer = io.BytesIO()
    torch.save(tools.rng_state(), buffer)
    second = draws()
    tools.seed_everything(4)
    assert draws() != first
    buffer.seek(0)
    tools.set_rng_state(torch.load(buffer, weights_only=True))
    assert draws() == second
    tools.seed_everything(3)
    assert draws() == first


def test_deterministic_run(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        tools.enable_deterministic()
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"]
    finally:
        torch.use_deterministic_algorithms(False)


def test_default_threads():
    cores = tools.default_threads(0)
    assert cores >= 1
    assert tools.default_threads(cores - 1) == tools.default_threads(cores + 5) == 1


# --- clocks ---------------------------------------------------------------------------------------------------------


def test_updates_owed_with_the_defaults():
    """16 sequences of 64 steps at a train ratio of 512 are an update every 2 steps; 4 environments step together."""
    once, every = tools.Once(), tools.Every(16 * 64 / 512)
    owed = [100 if once() else every(step) for step in range(2500, 2520, 4)]
    assert owed == [100, 1, 2, 2, 2]


@given(st.integers(1, 50), st.lists(st.integers(1, 30), min_size=1, max_size=50), st.integers(0, 50))
def test_every_keeps_what_is_left_over(period, strides, cut):
    clock, steps = tools.Every(period), np.cumsum(strides).tolist()
    counts = []
    for i, step in enumerate(steps):
        if i == cut:
            state, clock = clock.state_dict(), tools.Every(period)
            clock.load_state_dict(state)
        counts.append(clock(step))
    assert sum(counts) == 1 + (steps[-1] - steps[0]) // period


def test_other_clocks():
    assert [tools.Every(0)(step) for step in range(3)] == [0, 0, 0]
    once = tools.Once()
    assert [once(), once()] == [True, False]
    again = tools.Once()
    again.load_state_dict(once.state_dict())
    assert not again()
    assert [tools.Until(5)(step) for step in (0, 4, 5)] == [True, True, False]
    assert tools.Until(0)(10**9)


# --- optimiser ------------------------------------------------------------------------------------------------------


def parameters(dtype=torch.float64):
    return [nn.Parameter(torch.tensor(x, dtype=dtype)) for x in ([1.0, 2.0], [3.0], [5.0])]


def optimizer(params, **changes):
    return tools.Optimizer("net", params, **{"lr": 0.1, "eps": 1e-8, "clip": 100.0} | changes)


def loss_of(params):
    # The gradient of the first is (3, 4), of the second 12; the third has none.
    return params[0] @ torch.tensor([3.0, 4.0], dtype=torch.float64) + 12.0 * params[1].sum()


@pytest.mark.parametrize("clip", [0.0, 100.0, 1.3])
def test_gradient_norm_and_clipping(clip):
    params = parameters()
    metrics = optimizer(params, opt="sgd", clip=clip).step(loss_of(params))
    assert list(metrics) == ["net_loss", "net_grad_norm"]
    assert metrics["net_loss"] == 47.0 and not metrics["net_loss"].requires_grad
    assert metrics["net_grad_norm"].shape == () and metrics["net_grad_norm"] == pytest.approx(13.0)
    scale = 0.1 if clip == 1.3 else 1.0
    torch.testing.assert_close(
        params[0].data, torch.tensor([1 - 0.3 * scale, 2 - 0.4 * scale]).double(), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(params[1].data, torch.tensor([3 - 1.2 * scale]).double(), rtol=1e-6, atol=0)
    assert params[2] == 5.0


def test_gradients_of_earlier_steps_do_not_count():
    params = parameters()
    opt = optimizer(params, opt="sgd")
    loss_of(params).backward()
    assert opt.step(loss_of(params))["net_grad_norm"] == pytest.approx(13.0)
    assert opt.step(params[2].sum())["net_grad_norm"] == pytest.approx(1.0)
    assert params[0].grad is None


def test_adam_is_adam():
    params, moments = parameters(), np.zeros((2, 3))
    opt, values = optimizer(params, lr=0.01, clip=0.0), np.array([1.0, 2.0, 3.0])
    for t in range(1, 6):
        target = torch.cat(params[:2]) * t
        opt.step((target**2).sum())
        grad = 2 * t**2 * values
        moments = np.array([[0.9], [0.999]]) * moments + np.array([[0.1], [0.001]]) * np.array([grad, grad**2])
        mean, square = moments[0] / (1 - 0.9**t), moments[1] / (1 - 0.999**t)
        values = values - 0.01 * mean / (np.sqrt(square) + 1e-8)
        np.testing.assert_allclose(torch.cat(params[:2]).detach(), values, rtol=1e-12)
    assert params[2] == 5.0


def test_weight_decay_spares_weights_without_gradient():
    params = parameters()
    optimizer(params, lr=0.0, weight_decay=0.25).step(loss_of(params))
    assert [p.tolist() for p in params] == [[0.75, 1.5], [2.25], [5.0]]


@pytest.mark.parametrize("name", list(tools.OPTIMIZERS))
def test_optimisers_go_downhill_and_resume(name):
    def run(split):
        params = parameters(torch.float32)
        opt = optimizer(params, opt=name, lr=0.01)
        for i in range(20):
            if i == split:
                state, opt = opt.state_dict(), optimizer(params, opt=name, lr=0.01)
                opt.load_state_dict(state)
            loss = opt.step(sum((p**2).sum() for p in params))["net_loss"]
        return loss

    assert run(None) < 38.0
    assert run(10) == run(None)


def test_every_optimiser_can_be_chosen():
    for name in tools.OPTIMIZERS:
        assert tools.load_config(["--opt", name]).opt == name


# --- logger ---------------------------------------------------------------------------------------------------------


def rows(logdir):
    return [
        json.loads(line, parse_constant=pytest.fail) for line in (logdir / "metrics.jsonl").read_text().splitlines()
    ]


def timeless(row):
    return {key: value for key, value in row.items() if key != "time" and not key.startswith("fps/")}


@pytest.fixture
def logger(tmp_path):
    logger = tools.Logger(tmp_path, simple=True, total_steps=1000)
    yield logger
    logger.close()


def test_rows_hold_averages_of_new_values(tmp_path, logger):
    logger.scalars({"loss/a": 1.0, "loss/b": torch.tensor(10.0)})
    logger.scalars(
        {"loss/a": torch.tensor(2.0, requires_grad=True), "count": 7, "precise": torch.tensor(1 / 3).double()}
    )
    logger.scalars({"loss/a": 6})
    logger.write(20, update=3, episode=1)
    logger.scalars({"loss/b": torch.tensor(4)})
    logger.write(40, update=5, episode=1)
    first, second = rows(tmp_path)
    expected = {"step": 20, "update": 3, "episode": 1, "loss/a": 3.0, "loss/b": 10.0, "count": 7.0}
    assert timeless(first) == pytest.approx(expected | {"precise": 1 / 3})
    assert timeless(second) == {"step": 40, "update": 5, "episode": 1, "loss/b": 4.0}
    assert "fps/step" not in first and second["fps/step"] > 0 and second["fps/update"] > 0
    assert second["fps/step"] == pytest.approx(10 * second["fps/update"])
    assert 0 <= first["time"] <= second["time"]


def test_part_of_the_values_can_be_written(tmp_path, logger):
    for value in (1.0, 3.0):
        logger.scalars({"loss/a": torch.tensor(value), "train/b": torch.tensor(value)})
        logger.scalars({"episode/return": 10 * value, "episode/length": 5})
        logger.write(20, only="episode/", update=1)
    logger.write(30, only="loss/")
    logger.write(40)
    assert [timeless(row) for row in rows(tmp_path)] == [
        {"step": 20, "update": 1, "episode/return": 10.0, "episode/length": 5.0},
        {"step": 20, "update": 1, "episode/return": 30.0, "episode/length": 5.0},
        {"step": 40, "loss/a": 2.0, "train/b": 2.0},
    ]


def test_later_changes_of_a_tensor_do_not_count(tmp_path, logger):
    value = torch.tensor(1.0)
    logger.scalars({"x": value})
    value.fill_(5.0)
    logger.write(1)
    assert rows(tmp_path)[0]["x"] == 1.0


def test_values_not_yet_written_are_part_of_a_checkpoint(tmp_path, logger):
    other = tools.Logger(tmp_path / "other", simple=True, total_steps=1000)
    for i, value in enumerate((0.1, 0.2, 0.7)):
        for each in (logger, other):
            each.scalars({"loss/a": torch.tensor(value), "count": value})
        if i == 1:
            state = json.loads(json.dumps(logger.state_dict()))
            logger.sums = {}
            logger.load_state_dict(state)
    logger.write(10)
    other.write(10)
    assert timeless(rows(tmp_path)[0]) == timeless(rows(tmp_path / "other")[0])


def test_nothing_new_nothing_written(tmp_path, logger):
    logger.write(10, update=1)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_values_that_are_not_finite_are_null(tmp_path, logger):
    logger.scalars({"a": math.nan, "b": torch.tensor(math.inf), "c": 1.0})
    logger.write(1)
    assert timeless(rows(tmp_path)[0]) == {"step": 1, "a": None, "b": None, "c": 1.0}


def test_console_line(logger, capsys):
    for step, update in ((100, 10), (100, 10), (300, 110)):
        logger.scalars({"episode/return": 1.5 * step})
        logger.write(step, update=update)
    logger.close()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0] == "step 100/1,000 | episode/return 150.0", "rows of one step make one line"
    assert lines[1].startswith("step 300/1,000 | episode/return 450.0 | ")
    assert all(word in lines[1] for word in (" ms/update | ", " fps | ", "ETA 0:"))


def test_resume_drops_what_came_after_the_checkpoint(tmp_path):
    def start():
        return tools.Logger(tmp_path, simple=True, total_steps=100)

    def write(logger, step):
        logger.scalars({"x": step})
        logger.write(step)

    logger = start()
    write(logger, 10)
    write(logger, 20)
    state = logger.state_dict()
    # Same step as the checkpoint, but after it.
    write(logger, 20)
    write(logger, 30)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "x"')

    logger = start()
    logger.load_state_dict(json.loads(json.dumps(state)) | {"seconds": 1000.0})
    assert logger.step == 20
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5
    write(logger, 25)
    assert [row["x"] for row in rows(tmp_path)] == [10, 20, 25]
    assert rows(tmp_path)[-1]["time"] >= 1000

    # Without a checkpoint the run begins anew, and so does its file.
    logger = start()
    write(logger, 5)
    assert [row["x"] for row in rows(tmp_path)] == [5]


def events(logdir):
    """(tag, step, value) of all TensorBoard events; values are numbers or encoded images."""
    from tensorboard.compat.proto.event_pb2 import Event

    found = []
    for path in sorted(logdir.glob("events.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + size])
            found += [
                (v.tag, event.step, v.image.encoded_image_string if v.HasField("image") else v.simple_value)
                for v in event.summary.value
            ]
            at += 12 + size + 4
    return found


@pytest.mark.parametrize("size", [(32, 48), (15, 17)])
def test_tensorboard_and_videos(tmp_path, size):
    import av

    level = np.array([20, 120, 220], np.uint8)
    frames = np.broadcast_to(level[:, None, None, None], (3, *size, 3))
    logger = tools.Logger(tmp_path, total_steps=100)
    logger.scalars({"eval/return": 3.0})
    logger.video("eval/policy", frames, fps=10)
    logger.write(50, update=2)
    logger.scalars({"eval/return": 4.0})
    logger.write(60, update=2)
    logger.close()

    assert [path.name for path in (tmp_path / "video").iterdir()] == ["eval_policy_50.mp4"]
    with av.open(str(tmp_path / "video" / "eval_policy_50.mp4")) as file:
        assert file.streams.video[0].average_rate == 10
        decoded = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    assert [frame.shape[:2] for frame in decoded] == [(size[0] + size[0] % 2, size[1] + size[1] % 2)] * 3
    np.testing.assert_allclose([frame.mean() for frame in decoded], level, atol=6)

    found = events(tmp_path)
    assert ("eval/return", 50, 3.0) in found and ("eval/return", 60, 4.0) in found and ("update", 50, 2.0) in found
    (gif,) = [value for tag, step, value in found if (tag, step) == ("eval/policy", 50)]
    image = Image.open(io.BytesIO(gif))
    assert (image.format, image.n_frames, image.size) == ("GIF", 3, size[::-1])


def test_simple_logger_has_neither(tmp_path, logger):
    logger.video("eval/policy", np.zeros((2, 8, 8, 3), np.uint8))
    logger.scalars({"x": 1.0})
    logger.write(1)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


# --- checkpoint -----------------------------------------------------------------------------------------------------


def test_checkpoint_keeps_the_one_before(tmp_path):
    path = tmp_path / "latest.pt"
    assert tools.load_checkpoint(path) is None
    for i in range(3):
        tools.save_checkpoint(path, {"weights": torch.full((2,), float(i)), "names": ["a"], "count": i})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest.prev.pt", "latest.pt"]
    state = tools.load_checkpoint(path)
    assert (state["count"], state["names"], state["weights"].tolist()) == (2, ["a"], [2.0, 2.0])
    assert torch.load(tmp_path / "latest.prev.pt", weights_only=True)["count"] == 1


DAMAGES = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "text": lambda data: b"weights",
    "pickle": lambda data: b"\x80\x02e.",
    "flipped": lambda data: data.replace(b"weights", b"Weights", 1),
}


class DiskFull:
    def __reduce__(self):
        raise OSError("disk full")


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_unreadable_checkpoint(tmp_path, capsys, damage):
    path, previous = tmp_path / "latest.pt", tmp_path / "latest.prev.pt"
    for i in range(2):
        tools.save_checkpoint(path, {"count": i, "name": "weights"})
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert tools.load_checkpoint(path)["count"] == 0
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ") and str(path) in warning and str(previous) in warning
    # The next save may be cut short too: until it is there, the good one stays.
    with pytest.raises(OSError, match="disk full"):
        tools.save_checkpoint(path, DiskFull())
    assert tools.load_checkpoint(path)["count"] == 0
    path.write_bytes(b"x")
    previous.write_bytes(b"x")
    with pytest.raises(tools.UserError, match="unreadable") as caught:
        tools.load_checkpoint(path)
    assert str(path) in str(caught.value) and str(previous) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_checkpoint_with_one_before(tmp_path, capsys):
    for i in range(2):
        tools.save_checkpoint(tmp_path / "latest.pt", {"count": i})
    (tmp_path / "latest.pt").unlink()
    assert tools.load_checkpoint(tmp_path / "latest.pt")["count"] == 0
    assert "is missing" in capsys.readouterr().err


class Trap:
    def __reduce__(self):
        return (open, ("trapped", "w"))


def test_a_checkpoint_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"trap": Trap()}, tmp_path / "latest.pt")
    with pytest.raises(tools.UserError, match="unreadable"):
        tools.load_checkpoint(tmp_path / "latest.pt")
    assert not (tmp_path / "trapped").exists()


CLAIM = """
import pathlib, sys, tools
claim = tools.lock(pathlib.Path(sys.argv[1]))
print("claimed", flush=True)
sys.stdin.read()
"""


def test_a_folder_is_claimed_until_the_process_ends(tmp_path):
    command = [sys.executable, "-c", CLAIM, str(tmp_path / "log")]
    process = subprocess.Popen(command, cwd=tools.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"claimed\n"
        with pytest.raises(tools.UserError, match="another process is training in"):
            tools.lock(tmp_path / "log")
    finally:
        process.kill()  # nothing is tidied up, and still nothing is in the way
        process.communicate()
    os.close(tools.lock(tmp_path / "log"))


@pytest.mark.parametrize("size", [1, 10**6])
def test_a_full_disk_is_one_line(tmp_path, size):
    path = tmp_path / "latest.pt"
    tools.save_checkpoint(path, {"count": 1})
    (tmp_path / "latest.pt.part").symlink_to("/dev/full")
    with pytest.raises(tools.UserError, match="No space left on device") as caught, tools.writing(tmp_path):
        tools.save_checkpoint(path, {"weights": torch.zeros(size)})
    assert "\n" not in str(caught.value)
    assert tools.load_checkpoint(path)["count"] == 1


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "latest.pt"
    tools.save_checkpoint(path, {"count": 1})

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        tools.write_atomic(path, fail)
    assert tools.load_checkpoint(path)["count"] == 1
