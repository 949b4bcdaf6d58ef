"""Logged episodes: every accepted format, every error, the metrics, and training from them by the real command."""

import csv
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import dreamer
import exploration
import models
import tools
from envs import EnvError
from envs.episodes import find_files, load_episodes, write_episode
from figures import openloop
from tests.helpers import SMALL, make_agent, make_config

Rows = dict[str, np.ndarray]


def make_rows(length: int = 5, size: tuple[int, int] = (16, 16), seed: int = 0) -> Rows:
    """An episode in our format."""
    rng = np.random.default_rng(seed)
    action = rng.uniform(-1, 1, (length, 2)).astype(np.float32)
    action[0] = 0.0
    return {
        "image": rng.integers(0, 256, (length, *size, 3), dtype=np.uint8),
        "state": rng.normal(size=(length, 4)).astype(np.float32),
        "action": action,
        "reward": rng.normal(size=length).astype(np.float32),
        "is_first": np.arange(length) == 0,
        "is_terminal": np.arange(length) == length - 1,
    }


def load(folder: Path, limit: float = float("inf"), size=(16, 16), **options) -> list[Rows]:
    return [rows for _, rows in load_episodes(find_files(folder, limit), size=size, **options)]


def same(a: Rows, b: Rows) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a)


# --- formats --------------------------------------------------------------------------------------------------------


def ours(folder: Path, rows: Rows) -> Rows:
    write_episode(folder, rows)
    return rows


def upstream(folder: Path, rows: Rows) -> Rows:
    """dreamerv3-torch and HRSSM: further keys, and names that say when."""
    more = {"is_last": rows["is_terminal"], "discount": np.ones(len(rows["action"]), np.float32)}
    more |= {"logprob": rows["reward"], "log_speed": rows["reward"], "height": rows["reward"].astype(np.float64)}
    np.savez_compressed(folder / f"20240101T000000-0a0b-{len(rows['action'])}.npz", **rows, **more)
    return rows | {"height": rows["reward"][:, None]}


def old_vd4rl(folder: Path, rows: Rows) -> Rows:
    """No is_terminal: it follows from the discount."""
    discount = (~rows["is_terminal"]).astype(np.float32)
    np.savez(folder / "a.npz", discount=discount, **{k: v for k, v in rows.items() if k != "is_terminal"})
    return rows


def bare(folder: Path, rows: Rows) -> Rows:
    """Pictures and actions alone; a grey one."""
    rows = {"image": rows["image"][..., :1], "action": rows["action"].astype(np.float64)}
    np.savez(folder / "a.npz", **rows)
    length = len(rows["action"])
    flags = {"is_first": np.arange(length) == 0, "is_terminal": np.zeros(length, bool)}
    return {"image": rows["image"], "action": rows["action"].astype(np.float32)} | flags


def departure(folder: Path, rows: Rows) -> Rows:
    """As many actions as pictures: the last action is dropped, what it brought as well."""
    moved = {key: np.concatenate([rows[key][1:], rows[key][:1]]) for key in ("action", "reward", "is_terminal")}
    np.savez(folder / "a.npz", **rows | moved)
    return rows | {"reward": np.concatenate([[np.float32(0)], rows["reward"][1:]])}


def minari(folder: Path, rows: Rows) -> Rows:
    """One picture more than actions."""
    late = {key: rows[key][1:] for key in ("action", "reward", "is_terminal")}
    np.savez(folder / "a.npz", **rows | late)
    return rows | {"reward": np.concatenate([[np.float32(0)], rows["reward"][1:]])}


def minari_ends(folder: Path, rows: Rows) -> Rows:
    """The same, but whether a state is terminal stands beside its picture."""
    late = {key: rows[key][1:] for key in ("action", "reward")}
    np.savez(folder / "a.npz", **rows | late)
    return rows | {"reward": np.concatenate([[np.float32(0)], rows["reward"][1:]])}


def vd4rl_84(folder: Path, rows: Rows) -> Rows:
    """84 pixels, channel first; a picture of constant colour stays so when it is scaled."""
    h5py = pytest.importorskip("h5py")
    image = np.repeat(np.repeat(rows["image"][:, :1, :1], 84, 1), 84, 2)
    with h5py.File(folder / "a.hdf5", "w") as file:
        file["observation"] = np.moveaxis(image, -1, 1)
        file["step_type"] = np.where(rows["is_first"], 0, np.where(rows["is_terminal"], 2, 1))
        file["discount"] = (~rows["is_terminal"]).astype(np.float32)
        file["action"], file["reward"] = rows["action"].astype(np.float64), rows["reward"]
    return {k: v for k, v in rows.items() if k != "state"} | {"image": image[:, :16, :16]}


FORMATS = [ours, upstream, old_vd4rl, bare, departure, minari, minari_ends, vd4rl_84]


@pytest.mark.parametrize("write", FORMATS, ids=lambda write: write.__name__)
def test_format_is_read(write, tmp_path):
    expected = write(tmp_path, make_rows())
    actions = "departure" if write in (departure, minari, minari_ends) else "arrival"
    (found,) = load(tmp_path, actions=actions)
    assert same(found, {key: found[key] for key in expected} | expected)


def test_replay_of_a_run_is_read(tmp_path):
    """Several episodes per file, one of them running; older files of running episodes hold nothing new."""
    replay = tools.Replay(capacity=100, batch_size=1, batch_length=2, num_envs=2, seed=0)
    rows = [make_rows(6, seed=seed) for seed in range(3)]
    rows[0]["action"][2] = 1.3  # a policy's samples may lie outside

    def play(episode: int, env: int, steps: range) -> None:
        for t in steps:
            replay.add({key: values[t : t + 1] for key, values in rows[episode].items()}, [env])

    play(0, 0, range(6))
    play(1, 1, range(3))
    replay.end(0)
    replay.save(tmp_path)
    play(1, 1, range(3, 6))
    play(2, 0, range(4))
    replay.end(1)
    replay.save(tmp_path)
    assert len(list(tmp_path.glob("running-*"))) == 2
    found = load(tmp_path)
    rows[2] = {key: values[:4] for key, values in rows[2].items()}
    assert len(found) == 3
    assert all(any(same(a, {key: a[key] for key in b} | b) for a in found) for b in rows)


def test_one_hot_actions_and_a_limit(tmp_path):
    for seed in range(3):
        rows = make_rows(seed=seed)
        rows["action"] = np.eye(2, dtype=np.float32)[(rows["action"][:, 0] > 0).astype(int)]
        rows["action"][0] = 0.0
        write_episode(tmp_path, rows)
    assert [path.stem for path in sorted(tmp_path.iterdir())] == [f"episode-00000{i}" for i in range(3)]
    assert len(load(tmp_path, discrete=True)) == 3
    # Four transitions each; the newest names come first.
    newest = load(tmp_path, limit=5, discrete=True)
    assert len(newest) == 2 and same(newest[0], rows)


def test_vd4rl_without_step_types_is_cut_at_501_rows(tmp_path):
    with pytest.importorskip("h5py").File(tmp_path / "a.hdf5", "w") as file:
        file["observation"] = np.zeros((1002, 3, 8, 8), np.uint8)
        file["action"], file["reward"] = np.zeros((1002, 1)), np.arange(1002.0)
    assert [rows["reward"][0] for rows in load(tmp_path)] == [0, 501]


# --- errors ---------------------------------------------------------------------------------------------------------


def change(**values):
    """Two episodes, the second with other values (None: absent)."""

    def write(folder: Path) -> None:
        write_episode(folder, make_rows(seed=0))
        rows = {key: value for key, value in (make_rows(seed=1) | values).items() if value is not None}
        write_episode(folder, rows)

    return write


def damaged(folder: Path) -> None:
    for i in range(3):
        write_episode(folder, make_rows())
        if i:
            (folder / f"episode-00000{i}.npz").write_bytes(b"PK\x03\x04 and nothing else")


def both(**values):
    def write(folder: Path) -> None:
        for seed in range(2):
            write_episode(folder, make_rows(seed=seed) | values)

    return write


LATE = np.full((5, 2), 0.5, np.float32)
ERRORS = {
    "missing": (lambda folder: folder.rmdir(), {}, "there is no such folder"),
    "empty": (lambda folder: None, {}, "holds no episodes"),
    "run": (lambda folder: (folder / "replay").mkdir(), {}, "the episodes of this run are in .*/replay"),
    "unreadable": (damaged, {}, "2 of 3 files cannot be read"),
    "no action": (change(action=None), {}, "episode-000001.npz holds no action"),
    "no observation": (both(image=None, state=None), {}, None),
    "keys": (change(state=None), {}, "hold different keys: state is in one"),
    "single number": (change(gamma=np.float32(0.9)), {}, "gamma is a single number"),
    "lengths": (change(reward=np.zeros(3)), {}, "keys of different lengths: .*'reward': 3"),
    "late": (change(action=LATE[1:], reward=np.zeros(4)), {}, "use --offline_actions departure"),
    "vector size": (change(state=np.zeros((5, 3))), {}, r"rows of state have shape \(4,\), those in .* \(3,\)"),
    "action size": (change(action=np.zeros((5, 3))), {}, r"rows of action have shape \(2,\), those in .* \(3,\)"),
    "float image": (change(image=np.zeros((5, 16, 16, 3), np.float32)), {}, "image is float32: pictures must be uint8"),
    "channel first": (change(image=np.zeros((5, 3, 16, 16), np.uint8)), {}, "channels come first"),
    "channels": (change(image=np.zeros((5, 16, 16, 4), np.uint8)), {}, "one or three channels"),
    "image axes": (change(image=np.zeros((5, 16, 16), np.uint8)), {}, "image has 2 axes"),
    "not finite": (change(state=np.full((5, 4), np.nan)), {}, "state holds values that are not finite"),
    "no numbers": (change(state=np.full((5, 4), "x")), {}, "state holds <U1, not numbers"),
    "large action": (change(action=LATE * np.arange(5)[:, None]), {}, "npz: the largest action is 2: scale"),
    "not one-hot": (change(), {"discrete": True}, "not one-hot, as --actor_dist onehot expects"),
    "size": (change(), {"size": (16, 32)}, "image has 16x16 pixels: use --size 16,16"),
    "convention": (both(action=LATE), {}, "2 of 2 episodes begin with an action that is not zero"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error_is_one_line_that_says_what_to_do(name, tmp_path):
    write, options, message = ERRORS[name]
    folder = tmp_path / "data"
    folder.mkdir()
    if name == "no observation":
        np.savez(folder / "a.npz", **{key: make_rows()[key] for key in ("action", "reward", "is_first")})
        message = "holds no observation, only action"
    else:
        write(folder)
    with pytest.warns() if name == "unreadable" else pytest.raises(EnvError, match=message) as caught:
        if name == "unreadable":
            with pytest.raises(EnvError, match=message) as caught:
                load(folder)
        else:
            load(folder, **options)
    assert "\n" not in str(caught.value)


def test_what_can_be_skipped_is_skipped_with_a_warning(tmp_path):
    for seed in range(3):
        write_episode(tmp_path, make_rows(length=1 if seed == 1 else 5, seed=seed))
    content = bytearray((tmp_path / "episode-000002.npz").read_bytes())
    content[200] ^= 255  # inside the pictures: only reading them shows it
    (tmp_path / "episode-000002.npz").write_bytes(bytes(content))
    with pytest.warns(UserWarning) as caught:
        (found,) = load(tmp_path)
    assert same(found, {key: found[key] for key in found} | make_rows(seed=0))
    messages = [str(warning.message) for warning in caught]
    assert "episode-000002.npz is skipped, it cannot be read" in messages[0]
    assert "1 episodes of a single row are left out" in messages[1]


# --- metrics --------------------------------------------------------------------------------------------------------


def test_ssim_against_a_loop():
    rng = np.random.default_rng(0)
    x, y = rng.random((2, 13, 12, 2)), rng.random((2, 13, 12, 2))
    kernel = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    weight = np.outer(kernel, kernel) / kernel.sum() ** 2
    expected = np.zeros(2)
    for n, i, j, c in itertools.product(range(2), range(3), range(2), range(2)):
        a, b = x[n, i : i + 11, j : j + 11, c], y[n, i : i + 11, j : j + 11, c]
        ma, mb = (weight * a).sum(), (weight * b).sum()
        va, vb, cov = (
            (weight * (a - ma) ** 2).sum(),
            (weight * (b - mb) ** 2).sum(),
            (weight * (a - ma) * (b - mb)).sum(),
        )
        value = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
        expected[n] += value / 12
    found = models.ssim(torch.tensor(x), torch.tensor(y))
    assert np.allclose(found, expected, atol=1e-12)
    assert torch.allclose(models.ssim(torch.tensor(x), torch.tensor(x)), torch.ones(2, dtype=torch.float64))


def test_windows():
    assert models.choose_windows([10, 11, 35]) == [(1, 0), (2, 0), (2, 10), (2, 20)]
    many = models.choose_windows([1000, 5000])
    assert len(many) == models.WINDOWS and many[0] == (0, 0) and many[-1] == (1, 4980)
    episodes = [make_rows(30, seed=0), make_rows(15, seed=1)]
    window = models.cut_window(episodes, 0, 10)
    assert window["valid"].tolist() == [True] * 10 + [False] * 80
    assert np.array_equal(window["image"][:20], episodes[0]["image"][10:])
    assert (window["image"][20:] == episodes[0]["image"][-1]).all()
    assert window["is_first"].tolist() == [True] + [False] * 99
    # Actions of the other episode, round and round, without its first row.
    assert np.array_equal(window["other_action"][:3], episodes[1]["action"][[11, 12, 13]])
    assert np.array_equal(window["other_action"][4:6], episodes[1]["action"][[1, 2]])


def test_errors_of_a_window():
    """Against frames that are known: a model that draws mid grey, and the baselines by hand."""
    agent = make_agent("--size", "64,64")
    length = 14
    rows = make_rows(length, size=(64, 64), seed=0) | {"action": np.zeros((length, 3), np.float32)}
    mean = torch.full((64, 64, 3), 0.25)

    def grey(feat):
        return torch.zeros(*feat.shape[:-1], 64, 64, 3)

    found = models.measure_windows(agent.world_model, grey, [rows], mean, state="state")
    image = rows["image"].astype(np.float64) / 255.0
    for h in range(4):
        truth = image[10 + h]
        assert np.isclose(found["open_mse"][0, h], ((truth - 0.5) ** 2).mean(), rtol=1e-5)
        assert np.isclose(found["copy_mse"][0, h], ((truth - image[9]) ** 2).mean(), rtol=1e-5)
        assert np.isclose(found["mean_mse"][0, h], ((truth - 0.25) ** 2).mean(), rtol=1e-5)
        moving = np.abs(truth - image[9 + h]).max(-1) > 0.1
        error = ((truth - 0.5) ** 2).mean(-1)
        assert np.isclose(found["moving_mse"][0, h], error[moving].mean(), rtol=1e-4)
        assert np.isclose(found["still_mse"][0, h], error[~moving].mean(), rtol=1e-4)
    assert np.isnan(found["open_mse"][:, 4:]).all() and found["episode"].tolist() == [0]
    metrics, curves = models.summarise_windows(found)
    assert {len(curve) for curve in curves.values()} == {4}
    assert np.isclose(metrics["open_psnr_1"], -10 * np.log10(found["open_mse"][0, 0]), rtol=1e-5)
    assert np.isclose(metrics["copy_mse"], found["copy_mse"][0, :4].mean()) and "open_mse_5" not in metrics
    reward, predicted = found["reward"][0, :4], found["reward_pred"][0, :4]
    assert np.allclose(reward, rows["reward"][10:])
    expected = 1 - ((reward - predicted) ** 2).sum() / ((reward - reward.mean()) ** 2).sum()
    assert np.isclose(metrics["reward_r2"], expected, atol=1e-5)
    assert np.array_equal(found["state"][0, :4], rows["state"][10:])


def test_an_object_is_measured_apart():
    """A red square on grey, drawn whole, half as red, or not at all."""
    agent, length = make_agent(), 14
    rows = make_rows(length, size=(64, 64)) | {"action": np.zeros((length, 3), np.float32)}
    rows["image"] = np.full((length, 64, 64, 3), 100, np.uint8)
    rows["image"][:, 10:20, 30:40] = (200, 100, 100)
    empty = torch.full((64, 64, 3), 100 / 255)
    for share in (1.0, 0.5, 0.0):
        picture = torch.tensor(rows["image"][0]) / 255.0 * share + empty * (1 - share) - 0.5
        picture[0, 0] += 0.2

        def draw(feat, picture=picture):
            return picture.expand(*feat.shape[:-1], 64, 64, 3)

        part = models.object_rule("r-b>40")
        found = models.measure_windows(agent.world_model, draw, [rows], empty, part=part, background=empty)
        metrics, _ = models.summarise_windows(found)
        assert np.isclose(metrics["object_presence"], share, atol=1e-5)
        assert np.isclose(metrics["closed_object_presence"], share, atol=1e-5)
        assert np.isclose(metrics["object_mse"], ((1 - share) * 100 / 255) ** 2 / 3, atol=1e-6)
        assert np.isclose(metrics["rest_mse"], 0.04 / (64 * 64 - 100), rtol=1e-3)
        assert metrics["copy_object_mse"] == 0
        assert np.isclose(metrics["mean_object_mse"], (100 / 255) ** 2 / 3, rtol=1e-5)
    for text in ("red", "r-b", "r-b>x", "ball:4", "ball:"):
        with pytest.raises(tools.UserError, match="write its colour as r-b>40, or the vector"):
            models.object_rule(text)


def test_an_object_is_found_by_its_place():
    """The square around a position, cut at the border; nothing, and no position to learn, where it is away."""
    rule, picture = models.object_rule("ball:3"), torch.zeros(4, 6, 10, 3)
    ball = torch.tensor([[0.55, 0.5], [0.0, 0.99], [-1.0, -1.0], [1.0, 0.5]])
    mask = rule.mask(picture, {"ball": ball})
    assert [found.nonzero().tolist() for found in mask] == [
        [[y, x] for y in (2, 3, 4) for x in (4, 5, 6)],
        [[y, x] for y in (4, 5) for x in (0, 1)],
        [],
        [],
    ]
    with pytest.raises(tools.UserError, match="--offline_object puck:3: the episodes hold no vector puck of two"):
        models.object_rule("puck:3").mask(picture, {"ball": ball})
    rows = make_rows(14, size=(64, 64)) | {"action": np.zeros((14, 3), np.float32)}
    rows["ball"] = np.tile(np.float32([[0.2, 0.3]]), (14, 1))
    rows["ball"][12] = -1
    found = models.measure_windows(make_agent().world_model, None, [rows], state="ball", part=rule)
    assert np.isfinite(found["state"][0, :4]).all(-1).tolist() == [True, True, False, True]


def test_imagination_sees_the_context_alone_and_its_actions():
    agent = make_agent()
    rows = make_rows(20, size=(64, 64)) | {
        "action": np.random.default_rng(0).uniform(-1, 1, (20, 3)).astype(np.float32)
    }
    later = rows["image"].copy()
    later[10:] = 0
    action = rows["action"].copy()
    action[15] = -action[15]

    def feat(**changes):
        return models.measure_windows(agent.world_model, None, [rows | changes])["feat"][0, :10]

    base = feat()
    assert np.array_equal(base, feat(image=later))
    changed = np.abs(base - feat(action=action)).max(-1) > 0
    assert changed.tolist() == [False] * 5 + [True] * 5


def test_readout_finds_what_is_linear_and_nothing_in_noise():
    rng = np.random.default_rng(0)
    feat, weight = rng.normal(size=(2, 20, 90, 6)), rng.normal(size=(6, 3))
    # The filter's features hold the first entry of the state alone.
    split = [
        {"feat": x, "closed_feat": x @ weight[:, :1], "state": x @ weight + 5.0, "episode": np.arange(20)} for x in feat
    ]
    split[0]["state"][:3, 50:] = np.nan
    split[1]["state"][0, 3] = np.nan
    found = models.readout_r2(*split)
    closed, *entries = (found.pop(key) for key in ("0", "0_0", "0_1", "0_2"))
    assert entries[0] > 0.999 > 0.9 > max(entries[1:])
    assert [key for key in found if "_" not in key] == [str(h) for h in models.HORIZONS]
    assert len(found) == 4 * len(models.HORIZONS) and all(value > 0.999 for value in found.values())
    known = split[0]["state"][np.isfinite(split[0]["state"]).all(-1)]
    assert np.isclose(closed, (np.corrcoef(known.T)[0] ** 2).mean(), atol=0.05)
    noise = models.readout_r2(split[0], split[1] | {"state": rng.normal(size=(20, 90, 3))})
    assert all(value < 0.1 for value in noise.values())
    # As many features as rows, of which one says something, and noise in the state: the penalty is not the smallest.
    feat = rng.normal(size=(2, 4, 90, 300))
    wide = [
        {"feat": x, "closed_feat": x, "state": x[..., :1] + 0.5 * rng.normal(size=(4, 90, 1)), "episode": np.arange(4)}
        for x in feat
    ]
    assert models.readout_r2(*wide)["0"] > 0.4


# --- training -------------------------------------------------------------------------------------------------------

OFFLINE = "--task dmc_no_such --size 16,16 --patch_size 4 --batch_size 2 --batch_length 4 --log_every 2 --eval_every 4"
OFFLINE = f"{SMALL} {OFFLINE} --action_repeat 1 --steps 8 --threads 1"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for seed in range(4):
        write_episode(folder, make_rows(24, seed=seed))
    return folder


def run(logdir: Path, *argv: str) -> int:
    return dreamer.main([*OFFLINE.split(), "--logdir", str(logdir), *argv])


def read_rows(logdir: Path) -> list[dict]:
    rows = [json.loads(line) for line in (logdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "time" and not k.startswith("fps/")} for row in rows]


@pytest.mark.parametrize("method", ["hrssm", "dreamer"])
def test_training_goes_on_as_if_never_stopped(method, data, tmp_path, capsys):
    """No environment is needed: the task does not exist. A probe draws for the method without decoder."""
    options = [f"--offline_traindir={data}", f"--method={method}", "--video_pred_log", "--offline_state=state"]
    for logdir, steps in (("once", "8"), ("twice", "4"), ("twice", "8")):
        assert run(tmp_path / logdir, *options, "--steps", steps) == 0
    rows = read_rows(tmp_path / "once")
    assert rows == read_rows(tmp_path / "twice")
    assert [row["update"] for row in rows if "offline/kl" in row] == [0, 4, 8]
    assert [row["step"] for row in rows if "loss/model_loss" in row] == [2, 4, 6, 8]
    last = rows[-1]
    for key in ("recon_psnr", "open_mse_10", "copy_mse_10", "mean_mse_10", "shuffled_mse", "reward_r2", "state_r2_1"):
        assert np.isfinite(last[f"offline/{key}"]), key
    assert not any("actor" in key for row in rows for key in row)
    curves = (tmp_path / "once/openloop.csv").read_text()
    assert curves == (tmp_path / "twice/openloop.csv").read_text()
    assert [line.split(",")[:2] for line in curves.splitlines()[1:]] == [
        [u, str(h)] for u in "048" for h in range(1, 15)
    ]
    ours, theirs = (tools.read_checkpoint(tmp_path / name / "latest.pt") for name in ("once", "twice"))
    weights = {key: value for key, value in ours["agent"].items() if isinstance(value, torch.Tensor)}
    assert all(torch.equal(value, theirs["agent"][key]) for key, value in weights.items())
    assert (tmp_path / "once/video/offline_openloop_8.png").exists()
    assert "4 episodes, 1 of them held out: 96 rows" in capsys.readouterr().out


def test_changed_episodes_are_refused(data, tmp_path, capsys):
    for seed in range(3):
        write_episode(tmp_path / "data", make_rows(24, seed=seed))
    options = ["--offline_traindir", str(tmp_path / "data"), "--offline_evaldir", str(data)]
    assert run(tmp_path / "log", *options, "--steps", "4") == 0
    write_episode(tmp_path / "data", make_rows(24, seed=9))
    assert run(tmp_path / "log", *options) == 2
    message = "training episode-000003.npz had not been there, now"
    assert message in capsys.readouterr().err


def test_an_added_measure_has_a_column_of_its_own(data, tmp_path):
    """`--offline_object` may come with a resumed run; what was measured before stays where it was."""
    options = [f"--offline_traindir={data}", "--method=dreamer"]
    assert run(tmp_path, *options, "--steps", "4") == 0
    with open(tmp_path / "openloop.csv") as file:
        before = list(csv.DictReader(file))
    assert run(tmp_path, *options, "--offline_object", "r-b>40") == 0
    with open(tmp_path / "openloop.csv") as file:
        after = list(csv.DictReader(file))
    assert [{key: row[key] for key in before[0]} for row in after[: len(before)]] == before
    assert after[0]["object_mse"] == "" and np.isfinite(float(after[-1]["object_mse"])) and len(after) > len(before)


def test_grey_episodes_are_filmed(tmp_path):
    for seed in range(2):
        rows = make_rows(24, seed=seed)
        write_episode(tmp_path / "data", rows | {"image": rows["image"][..., :1]})
    options = [f"--offline_traindir={tmp_path / 'data'}", "--method=dreamer", "--steps=4"]
    assert run(tmp_path / "log", *options) == 0
    assert len(list((tmp_path / "log/video").glob("*.mp4"))) == 2


@pytest.mark.parametrize("options, message", [
    ("--offline_state reward", "these episodes hold state, and pictures, rewards and flags"),
    ("--offline_state image", "these episodes hold state"),
    ("--offline_object r-b>40", "have no colours"),
    ("--offline_evaldir {other}", "do not fit: action, state differs in shape"),
    ("--offline_evaldir {bare}", "do not fit: reward differs in shape or is in one of them only"),
])  # fmt: skip
def test_what_does_not_fit_the_episodes_is_refused(options, message, tmp_path, capsys):
    for seed in range(2):
        rows = make_rows(24, seed=seed)
        rows["image"] = rows["image"][..., :1]
        write_episode(tmp_path / "data", rows)
        write_episode(tmp_path / "bare", {key: rows[key] for key in rows.keys() - {"reward"}})
        other = {"action": np.pad(rows["action"], ((0, 0), (0, 1))), "state": rows["state"][:, :3]}
        write_episode(tmp_path / "other", rows | other)
    options = options.format(other=tmp_path / "other", bare=tmp_path / "bare").split()
    options += [f"--offline_traindir={tmp_path / 'data'}", "--method=dreamer", "--simple_log"]
    assert run(tmp_path / "log", *options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_without_rewards_two_losses_are_left_out(tmp_path, capsys):
    for seed in range(3):
        rows = make_rows(16, seed=seed)
        del rows["reward"]
        write_episode(tmp_path / "data", rows)
    assert run(tmp_path / "log", "--offline_traindir", str(tmp_path / "data"), "--steps", "4") == 0
    row = next(row for row in read_rows(tmp_path / "log") if "loss/model_loss" in row)
    assert "loss/simsr_loss" not in row and row["loss/reward_loss"] == 0 and row["loss/mbr_loss"] > 0
    assert "No rewards were logged" in capsys.readouterr().out


def test_hold_out(data, tmp_path):
    config = make_config(*OFFLINE.split(), "--offline_traindir", str(data))
    logged = exploration.load_logged(config)
    assert (logged.replay.num_episodes, len(logged.held_out)) == (3, 1)
    trained = [logged.replay.rows(number) for number in logged.replay.episodes]
    assert not any(same(rows, logged.held_out[0]) for rows in trained)
    mean = np.concatenate([rows["image"] for rows in trained]).mean(0) / 255
    assert np.allclose(logged.mean_frames["image"], mean)
    assert logged.files[0][0] == "training episode-000003.npz" and logged.files[0][2] == 24
    single = tmp_path / "single"
    write_episode(single, make_rows(24))
    with pytest.raises(tools.UserError, match="holds 1 episodes: two are needed"):
        exploration.load_logged(make_config(*OFFLINE.split(), "--offline_traindir", str(single)))
    write_episode(single, make_rows(10))
    write_episode(single, make_rows(10))
    with_short = tmp_path / "with_short"
    for length in [1] * 8 + [6, 7]:
        write_episode(with_short, make_rows(length))
    for seed in range(4):  # episodes of one row have no part in the draw
        options = [*OFFLINE.split(), "--offline_traindir", str(with_short), "--seed", str(seed)]
        with pytest.warns(UserWarning, match="8 episodes of a single row"):
            logged = exploration.load_logged(make_config(*options))
        assert (logged.replay.num_episodes, len(logged.held_out)) == (1, 1)
    short = exploration.load_logged(make_config(*OFFLINE.split(), "--offline_traindir", str(single), "--seed", "1"))
    with pytest.raises(tools.UserError, match="no held-out episode has more than 10 rows"):
        models.measure_windows(make_agent().world_model, None, short.held_out)


def test_a_policy_that_is_trained_offline_is_evaluated_in_its_task(tmp_path, capsys):
    """`--offline_behavior` with the episodes of another task says what differs."""
    for seed in range(2):
        write_episode(tmp_path / "data", make_rows(24, seed=seed))
    options = ["--offline_traindir", str(tmp_path / "data"), "--offline_behavior", "--parallel=False"]
    options += ["--task", "dmc_cartpole_balance", "--eval_episode_num", "1", "--time_limit", "6", "--imag_horizon=3"]
    assert run(tmp_path / "log", *options) == 2
    assert "takes actions Box(-1.0, 1.0, (1,), float32), the logged episodes hold" in capsys.readouterr().err
    for number, seed in enumerate(range(2)):
        rows = make_rows(24, seed=seed)
        rows |= {"position": rows["state"][:, :3], "velocity": rows["state"][:, :2], "action": rows["action"][:, :1]}
        del rows["state"]
        np.savez(tmp_path / "data" / f"episode-00000{number}.npz", **rows)
    assert run(tmp_path / "log", *options, "--steps", "4") == 0
    rows = read_rows(tmp_path / "log")
    assert sum("eval/return" in row for row in rows) == 2 and any("loss/actor_loss" in row for row in rows)
    # A stop does not repeat the starts of the evaluation.
    assert run(tmp_path / "log", *options, "--steps", "8") == run(tmp_path / "once", *options, "--steps", "8") == 0
    assert read_rows(tmp_path / "log") == read_rows(tmp_path / "once")
    assert dreamer.main(["--eval_only", "--simple_log", "--logdir", str(tmp_path / "once")]) == 0
    assert json.loads((tmp_path / "once/eval_only.json").read_text())["step"] == 8


def test_runs_are_compared_on_logged_episodes(data, tmp_path, capsys):
    """Two seeds are one line over the episodes that each held out; another folder is used whole."""
    logdirs = [str(tmp_path / name) for name in ("internal/0", "internal/1", "dreamer")]
    common = ["--offline_traindir", str(data), "--steps", "4", "--simple_log", "--dyn_cont_stoch_size=8"]
    for logdir, seed, method in zip(logdirs, "010", ("rssm", "rssm", "dreamer"), strict=True):
        extra = ["--autoencoder", "internal"] if method == "rssm" else []
        assert run(Path(logdir), *common, *extra, "--seed", seed, "--method", method) == 0
    out = tmp_path / "compared.png"
    assert openloop.main(["--data", str(data), "--runs", *logdirs, "--out", str(out)]) == 0
    with open(out.with_suffix(".csv")) as file:
        rows = list(csv.DictReader(file))
    assert {row["run"] for row in rows} == {"internal", "dreamer", "last picture seen", "mean picture"}
    found = {(row["run"], row["metric"], row["horizon"]): row for row in rows}
    assert max(int(row["horizon"]) for row in rows) == 14 and out.exists() and out.with_suffix(".pdf").exists()
    # What the runs logged themselves: a window of each of the held-out episodes.
    logged = [read_rows(Path(logdir))[-1]["offline/open_mse_10"] for logdir in logdirs]
    assert np.isclose(float(found["internal", "mse", "10"]["mean"]), np.mean(logged[:2]), rtol=1e-4)
    one = found["dreamer", "mse", "10"]
    assert np.isclose(float(one["mean"]), logged[2], rtol=1e-4) and one["low"] == one["high"] == one["mean"]
    two = found["internal", "mse", "10"]
    assert float(two["low"]) <= float(two["mean"]) <= float(two["high"])
    write_episode(tmp_path / "other", make_rows(24, seed=9))
    write_episode(tmp_path / "other", make_rows(24, seed=10))
    capsys.readouterr()
    assert openloop.main(["--data", str(tmp_path / "other"), "--runs", logdirs[2], "--out", str(out)]) == 0
    assert "6 episodes, 2 of them held out" in capsys.readouterr().out
    # Held out now may be what was trained on, once the folder holds more.
    write_episode(tmp_path / "grown", make_rows(24, seed=1))
    write_episode(tmp_path / "grown", make_rows(24, seed=2))
    grown = ["--offline_traindir", str(tmp_path / "grown"), "--steps", "4", "--simple_log", "--method", "dreamer"]
    assert run(tmp_path / "log", *grown) == 0
    write_episode(tmp_path / "grown", make_rows(24, seed=3))
    argv = ["--data", str(tmp_path / "grown"), "--runs", str(tmp_path / "log"), "--out", str(out)]
    assert openloop.main(argv) == 2 and "the logged episodes are not those of this run" in capsys.readouterr().err
    for argv in (["--data", str(data)], [logdirs[0], "--data", str(data), "--runs", logdirs[0]], []):
        assert openloop.main([*argv, "--out", str(out)]) == 2
        assert "name a LOGDIR, or --data with --runs" in capsys.readouterr().err


def measured(logdir: str, values: np.ndarray, **options) -> openloop.Compared:
    """A run with squared errors (episodes, horizons)."""
    config = make_config(*OFFLINE.split(), *(f"--{key}={value}" for key, value in options.items()))
    found = {"open_mse": values, "kl": np.zeros_like(values), "episode": np.arange(len(values))}
    return openloop.Compared(logdir, config, found, np.zeros(0), np.zeros(0))


def test_compared_runs_are_grouped_by_what_differs():
    """Folders do not decide, nor is a run on other episodes or of other length a further seed."""
    values = np.zeros((2, 3))
    runs = [measured(f"log/{m}{s}", values, seed=s, method=m) for m in ("rssm", "hrssm") for s in (0, 1)]
    runs += [measured("log/other", values, offline_traindir="other"), measured("log/long", values, steps=80)]
    groups = {name: [run.logdir for run in found] for name, found in openloop.group(runs).items()}
    assert groups == {
        "rssm0": ["log/rssm0", "log/rssm1"],
        "hrssm0": ["log/hrssm0", "log/hrssm1"],
        "other": ["log/other"],
        "long": ["log/long"],
    }


def test_seeds_measured_on_the_same_episodes_add_no_episodes():
    """Of equal runs the interval is that of one: that of a baseline, which is the same for each."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(10, 1)) + np.zeros(3)
    values[0, 2] = np.nan  # an episode that ends
    one, many = (openloop.curve([measured("a", values)] * n, "open_mse") for n in (1, 15))
    assert np.allclose(one[0], np.nanmean(values, 0)) and np.allclose(one[0], many[0])
    half = (one[2] - one[1]) / 2
    assert np.allclose((many[2] - many[1]) / 2, half, rtol=0.1)
    assert np.allclose(half, 1.96 * np.nanstd(values, 0) / np.sqrt([10, 10, 9]), rtol=0.15)
    # Runs that differ count as well: three whose means are -1, 0 and 1.
    spread = openloop.curve([measured("a", values + shift) for shift in (-1, 0, 1)], "open_mse")
    assert np.allclose(spread[0], one[0]) and (spread[2] - spread[1] > 1.5 * (one[2] - one[1])).all()
