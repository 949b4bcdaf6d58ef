"""Replay against a list-based model of upstream's rules, alignment of what is sampled, and saving."""

import io
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tools


class CountingEnv:
    """Observation t of an episode is t; the reward on arrival and the action that leads there are functions of it."""

    def __init__(self, env, lengths):
        self.env, self.lengths, self.episode, self.t = env, list(lengths), -1, 0

    @property
    def done(self):
        return self.episode < 0 or self.t == self.lengths[self.episode]

    def row(self):
        """The next row; a finished episode is followed by the first row of the next one."""
        self.t = 0 if self.done else self.t + 1
        self.episode += self.t == 0
        label = 1000 * self.env + self.episode
        return {
            "image": np.full((4, 4, 1), self.t % 256, np.uint8),
            "count": np.array([self.t, label], np.float64),
            "action": np.array([float(self.t > 0) * (self.t - 1)]),
            "reward": np.float64(0.5 * self.t),
            "is_first": self.t == 0,
            "is_terminal": self.done,
            "log_extra": np.float32(1),
        }


def step(replay, envs):
    rows = [env.row() for env in envs]
    replay.add({key: np.stack([row[key] for row in rows]) for key in rows[0]}, [env.env for env in envs])


def make(capacity=10_000, batch=(4, 8), num_envs=1, seed=0, extra_rows=1000, prefetch=False):
    return tools.Replay(
        capacity=capacity,
        batch_size=batch[0],
        batch_length=batch[1],
        num_envs=num_envs,
        seed=seed,
        extra_rows=extra_rows,
        prefetch=prefetch,
    )


def fill(replay, lengths):
    """Episodes of the given numbers of transitions, one after the other in environment 0; all are over."""
    env = CountingEnv(0, lengths)
    for _ in range(sum(lengths) + len(lengths)):
        step(replay, [env])
    replay.end(0)


def contents(replay):
    """(label, t) of every row, episode by episode."""
    return [replay.storage["count"].numpy()[np.array(slots)][:, ::-1].tolist() for slots in replay.episodes.values()]


# --- what is kept ---------------------------------------------------------------------------------------------------


def survivors(episodes, running, capacity):
    """Upstream's walk over (name, transitions), oldest first; a running episode always stays."""
    kept, total = [], 0
    for name, transitions in reversed(episodes):
        if name in running or total + transitions <= capacity:
            kept.insert(0, name)
            total += transitions
    return kept


@given(
    lengths=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=8), min_size=1, max_size=3),
    capacity=st.integers(0, 40),
    steps=st.integers(1, 60),
    explicit=st.booleans(),
)
def test_the_same_episodes_are_kept_as_in_a_plain_list(lengths, capacity, steps, explicit):
    replay, envs = make(capacity, num_envs=len(lengths)), [CountingEnv(i, x) for i, x in enumerate(lengths)]
    model, running = {}, {}  # label -> transitions in order of opening; environment -> label
    for _ in range(steps):
        live = [env for env in envs if not (env.done and env.episode == len(env.lengths) - 1)]
        if not live:
            break
        for env in live:
            if env.done:
                running[env.env] = 1000 * env.env + env.episode + 1
                model[running[env.env]] = -1
        step(replay, live)
        for env in live:
            model[running[env.env]] += 1
        for env in live:
            if env.done:
                del running[env.env]
                names = survivors(list(model.items()), set(running.values()), capacity)
                model = {name: model[name] for name in names}
                replay.end(env.env)
        assert contents(replay) == [[[name, t] for t in range(n + 1)] for name, n in model.items()]
        assert replay.num_transitions == sum(model.values()) and replay.num_episodes == len(model)
        assert len(replay) == sum(model.values()) + len(model)


def test_a_discarded_episode_leaves_no_trace():
    replay, envs = make(num_envs=2), [CountingEnv(0, [9]), CountingEnv(1, [9])]
    for _ in range(4):
        step(replay, envs)
    replay.discard(0)
    replay.discard(0)
    assert contents(replay) == [[[1000, t] for t in range(4)]] and set(replay.open) == {1}
    step(replay, [CountingEnv(0, [3])])
    assert [len(episode) for episode in contents(replay)] == [4, 1]


def test_an_old_short_episode_survives_a_long_newer_one():
    replay = make(capacity=10)
    fill(replay, [2, 3, 8])
    assert [len(episode) - 1 for episode in contents(replay)] == [2, 8]


def test_the_next_first_row_ends_an_episode():
    replay, env = make(capacity=3), CountingEnv(0, [3, 3, 3])
    for _ in range(8):
        step(replay, [env])
    assert [len(episode) for episode in contents(replay)] == [4, 4]
    step(replay, [env])
    assert [len(episode) for episode in contents(replay)] == [4, 1]


def test_running_out_of_slots_drops_the_oldest_finished_episode():
    replay, env = make(capacity=10, extra_rows=2), CountingEnv(0, [4, 4, 9])
    for _ in range(5 + 5 + 2):
        step(replay, [env])
    assert [len(episode) for episode in contents(replay)] == [5, 5, 2]
    step(replay, [env])
    assert [len(episode) for episode in contents(replay)] == [5, 3]
    for _ in range(7):
        step(replay, [env])
    assert contents(replay) == [[[2, t] for t in range(10)]]


def test_an_episode_larger_than_replay_is_an_error():
    with pytest.raises(tools.UserError, match="--dataset_size 3 is too small"):
        fill(make(capacity=3, extra_rows=2), [10])


def test_slots_are_used_as_a_ring():
    replay = make(capacity=20, extra_rows=10)
    fill(replay, [4] * 50)
    assert all(values.shape[0] == 30 for values in replay.storage.values())
    assert contents(replay) == [[[episode, t] for t in range(5)] for episode in range(45, 50)]
    assert set(replay.storage) == {"image", "count", "action", "reward", "is_first", "is_terminal"}


# --- what is sampled ------------------------------------------------------------------------------------------------


def pieces(batch):
    """(first count, label, length, is at the start of its row) of each piece of a batch."""
    found = []
    for counts, flags in zip(batch["count"].numpy(), batch["is_first"].numpy(), strict=True):
        starts = np.flatnonzero(flags)
        assert starts[0] == 0
        for start, end in zip(starts, [*starts[1:], len(flags)], strict=True):
            t, label = counts[start:end].T
            # No piece crosses an episode or skips a step.
            assert (np.diff(t) == 1).all() and (label == label[0]).all()
            found.append((int(t[0]), int(label[0]), end - start, start == 0))
    return found


def test_batch_is_aligned_and_owned_by_the_caller():
    replay = make(batch=(16, 20))
    fill(replay, [7, 30, 1, 12])
    batch = replay.sample()
    t = batch["count"][..., 0]
    assert {key: value.dtype for key, value in batch.items()} == {
        "image": torch.uint8,
        "count": torch.float32,
        "action": torch.float32,
        "reward": torch.float32,
        "is_first": torch.bool,
        "is_terminal": torch.bool,
    }
    assert batch["image"].shape == (16, 20, 4, 4, 1) and batch["action"].shape == (16, 20, 1)
    assert torch.equal(batch["image"][..., 0, 0, 0].float(), t)
    assert torch.equal(batch["reward"], 0.5 * t)
    assert torch.equal(batch["action"][..., 0], (t - 1).clamp(min=0))
    lengths = torch.tensor([7, 30, 1, 12])[batch["count"][..., 1].long()]
    assert torch.equal(batch["is_terminal"], t == lengths)
    before = {key: values.clone() for key, values in replay.storage.items()}
    for value in batch.values():
        value.zero_()
    assert all(torch.equal(replay.storage[key], before[key]) for key in before)


def test_pieces_after_the_first_are_beginnings_and_end_where_they_must():
    lengths = [7, 30, 1, 12]
    replay = make(batch=(64, 20))
    fill(replay, lengths)
    for _ in range(20):
        left = 20
        for start, label, length, first in pieces(replay.sample()):
            left = 20 if first else left
            assert start == 0 or first
            assert length == min(left, lengths[label] + 1 - start)
            left -= length


def upstream_piece_frequencies(rows, length, draws, seed):
    """Upstream's sampler, naively: counts of (episode, start) of first pieces and of episodes of later ones."""
    rng, first, later = np.random.RandomState(seed), Counter(), Counter()
    probability = np.array(rows) / sum(rows)
    for _ in range(draws):
        size = 0
        while size < length:
            episode = rng.choice(len(rows), p=probability)
            if rows[episode] < 2:
                continue
            start = rng.randint(0, rows[episode] - 1) if size == 0 else 0
            (first if size == 0 else later)[(episode, start)] += 1
            size += min(length - size, rows[episode] - start)
    return first, later


def chi_square(observed, expected):
    """Statistic per degree of freedom: 1 on average, hardly above 2 for tens of cells if the distributions agree."""
    assert observed.keys() <= expected.keys()
    return sum((observed[k] - e) ** 2 / e for k, e in expected.items()) / max(1, len(expected) - 1)


def test_distribution_of_pieces():
    """Including a running episode, one of a single transition, and a running one of a single row."""
    lengths, draws = [3, 9, 1, 5], 8_000
    replay = make(batch=(1000, 6), num_envs=2)
    fill(replay, lengths)
    running = [CountingEnv(0, [100]), CountingEnv(1, [100])]
    running[0].episode, running[0].lengths = 3, [0, 0, 0, 0, 100]
    for _ in range(7):
        step(replay, running[:1])
    step(replay, running[1:])
    rows, labels = [4, 10, 2, 6, 7, 1], [0, 1, 2, 3, 4, 1000]
    assert [len(episode) for episode in contents(replay)] == rows
    first, later = Counter(), Counter()
    for _ in range(draws // 1000):
        for start, label, _, is_start in pieces(replay.sample()):
            (first if is_start else later)[(labels.index(label), start)] += 1
    # The first piece has a closed form: episode by its rows, start uniform over all positions but the last.
    expected = {
        (i, start): draws * n / (sum(rows) - 1) / (n - 1) for i, n in enumerate(rows[:-1]) for start in range(n - 1)
    }
    assert chi_square(first, expected) < 2
    total = sum(later.values())
    assert chi_square(later, {(i, 0): total * n / (sum(rows) - 1) for i, n in enumerate(rows[:-1])}) < 3
    # And so says the naive sampler; the number of later pieces too.
    model_first, model_later = upstream_piece_frequencies(rows, 6, draws, seed=1)
    assert chi_square(first, {key: model_first[key] for key in expected}) < 4
    assert total == pytest.approx(sum(model_later.values()), rel=0.05)


def test_no_transition_yet_is_an_error():
    replay = make(num_envs=3)
    with pytest.raises(tools.UserError, match="--prefill"):
        replay.sample()
    envs = [CountingEnv(i, [5]) for i in range(3)]
    step(replay, envs)
    with pytest.raises(tools.UserError, match="--prefill"):
        replay.sample()
    step(replay, envs)
    replay.sample()


def test_seed_decides_what_is_sampled():
    batches = []
    for seed in (1, 1, 2):
        replay = make(seed=seed)
        fill(replay, [20, 30])
        batches.append(replay.sample()["count"])
    assert torch.equal(batches[0], batches[1]) and not torch.equal(batches[0], batches[2])


# --- memory ---------------------------------------------------------------------------------------------------------


def test_size_is_announced(capsys):
    fill(make(capacity=90, extra_rows=10), [3])
    # 16 bytes of image, 2 + 1 + 1 float32, 2 flags
    assert capsys.readouterr().out == "Replay: 100 rows of 34 bytes, 0.00 GB in memory when full.\n"


def test_too_large_a_replay_is_refused(monkeypatch):
    monkeypatch.setattr(tools, "available_memory", lambda: 34 * 1000)
    with pytest.raises(tools.UserError, match="--dataset_size 890 fits"):
        fill(make(capacity=2000, extra_rows=10), [3])
    fill(make(capacity=890, extra_rows=10), [3])


def test_available_memory():
    assert 1e7 < tools.available_memory() < 1e14


# --- saving ---------------------------------------------------------------------------------------------------------


def through_checkpoint(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_save_and_load(tmp_path):
    replay, envs = make(num_envs=2), [CountingEnv(0, [5, 9, 4, 30]), CountingEnv(1, [40])]
    for _ in range(9):
        step(replay, envs)
    replay.save(tmp_path)
    written = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert sorted(written) == ["episodes-000000.npz", "running-000000.npz"]
    for _ in range(13):
        step(replay, envs)
    replay.sample()
    state = through_checkpoint(replay.save(tmp_path))
    # What was on disk is not written again.
    assert (tmp_path / "episodes-000000.npz").stat().st_mtime_ns == written["episodes-000000.npz"]
    with np.load(tmp_path / "episodes-000001.npz") as file:
        assert len(file["reward"]) == 10 + 5

    again = make(num_envs=2, seed=99)
    again.load(tmp_path, state)
    assert contents(again) == contents(replay)
    assert all(torch.equal(a, b) for a, b in zip(again.sample().values(), replay.sample().values(), strict=True))
    # What was running goes on.
    assert set(again.open) == {0, 1}
    for _ in range(3):
        rows = [env.row() for env in envs]
        for each in (replay, again):
            each.add({key: np.stack([row[key] for row in rows]) for key in rows[0]})
    assert contents(again) == contents(replay)
    # Saving goes on from there, and nothing is written twice.
    again.end(1)
    state = again.save(tmp_path)
    with np.load(tmp_path / "episodes-000002.npz") as file:
        assert len(file["reward"]) == 22 + 3
    third = make(num_envs=2)
    third.load(tmp_path, state)
    assert contents(third) == contents(again)


@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=20), every=st.integers(1, 25), capacity=st.integers(5, 40)
)
def test_every_save_can_be_loaded_until_two_later_ones(tmp_path_factory, lengths, every, capacity):
    folder = tmp_path_factory.mktemp("replay")
    replay, env, saved = make(capacity, extra_rows=20), CountingEnv(0, lengths), []
    for i in range(sum(lengths) + len(lengths)):
        step(replay, [env])
        if i % every == 0:
            saved.append((replay.save(folder), contents(replay)))
            for state, expected in saved[-3:]:
                again = make(capacity, extra_rows=20)
                again.load(folder, state)
                assert contents(again) == expected
            files = {file for state, _ in saved[-3:] for file, _, _ in state["episodes"]}
            assert {path.name for path in folder.iterdir()} == files


def test_a_smaller_replay_loads_the_newest_episodes(tmp_path):
    replay = make()
    fill(replay, [4] * 10)
    state = replay.save(tmp_path)
    small = make(capacity=9, extra_rows=3)
    small.load(tmp_path, state)
    assert [episode[0][0] for episode in contents(small)] == [8, 9]


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "garbage", "empty", "keys", "rows", "shape", "scalar"])
def test_damaged_files_are_skipped_with_a_warning(tmp_path, capsys, damage):
    replay = make()
    env = CountingEnv(0, [5, 6, 7])
    for count in (6, 7, 8):
        for _ in range(count):
            step(replay, [env])
        replay.end(0)
        state = replay.save(tmp_path)
    path = tmp_path / "episodes-000001.npz"
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        data[200] ^= 255
        path.write_bytes(data)
    elif damage in ("garbage", "empty"):
        path.write_bytes(b"garbage" if damage == "garbage" else b"")
    else:
        rows = dict(np.load(path))
        changed = {
            "keys": {"other": rows["reward"]},
            "rows": {key: values[:-1] for key, values in rows.items()},
            "shape": rows | {"image": rows["image"][:, :1]},
            "scalar": rows | {"reward": np.float32(1)},
        }
        np.savez(path, **changed[damage])
    again = make()
    again.load(tmp_path, state)
    assert [len(episode) for episode in contents(again)] == [6, 8]
    assert "episodes-000001.npz" in capsys.readouterr().err
    again.sample()


KILLED = """
import sys
from pathlib import Path
import numpy as np
import tools

folder = Path(sys.argv[1])
replay = tools.Replay(capacity=3000, batch_size=1, batch_length=4, num_envs=2, seed=0, extra_rows=2000)
count = 0
while True:
    first = np.full(2, count % 300 == 0)
    image = np.full((2, 32, 32, 3), count % 256, np.uint8)
    replay.add({"image": image, "count": np.full(2, count, np.float32), "is_first": first})
    count += 1
    if count % 400 == 0:
        tools.save_checkpoint(folder / "latest.pt", {"count": count, "replay": replay.save(folder / "replay")})
        print(count, flush=True)
"""


@pytest.mark.parametrize("delay", [0.0, 0.007])
def test_a_killed_process_leaves_a_checkpoint_that_loads(tmp_path, capsys, delay):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], cwd=tools.ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        reported = 0
        while reported < 2400:
            line = process.stdout.readline()
            assert line, "the process died by itself"
            reported = int(line) if line.strip().isdigit() else reported
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(delay)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    state = tools.load_checkpoint(tmp_path / "latest.pt")
    assert state["count"] >= reported
    replay = make(capacity=3000, num_envs=2, extra_rows=2000)
    replay.load(tmp_path / "replay", state["replay"])
    assert "warning" not in capsys.readouterr().err
    counts = [replay.storage["count"].numpy()[np.array(slots)] for slots in replay.episodes.values()]
    assert max(values[-1] for values in counts) == state["count"] - 1
    assert all((np.diff(values) == 1).all() and values[0] % 300 == 0 for values in counts)
    images = [replay.storage["image"].numpy()[np.array(slots), 0, 0, 0] for slots in replay.episodes.values()]
    assert all(np.array_equal(image, values % 256) for image, values in zip(images, counts, strict=True))


def test_batches_drawn_ahead_are_the_same():
    """Prefetching changes neither what is drawn nor, if the caller stops early, what is drawn next."""

    def run(prefetch: bool) -> list:
        replay = make(prefetch=prefetch)
        fill(replay, [5, 9, 7])
        found = [batch["count"].clone() for batch in replay.batches(3)]
        for number, batch in enumerate(replay.batches(5)):
            found.append(batch["count"].clone())
            if number == 1:
                break
        return [*found, replay.sample()["count"]]

    ahead, one_by_one = run(True), run(False)
    assert len(ahead) == 6
    assert all(torch.equal(a, b) for a, b in zip(ahead, one_by_one, strict=True))


# --- smoothed rewards -----------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    rewards=st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=40), kind=st.sampled_from(["gaussian", "ema"])
)
def test_smoothing_is_the_weighted_mean_it_says(rewards, kind):
    rewards = np.array(rewards, np.float32)
    steps = np.arange(len(rewards))
    if kind == "ema":
        expected = [rewards[0]]
        for reward in rewards[1:]:
            expected.append(0.33 * expected[-1] + 0.67 * reward)
    else:
        offsets = np.arange(-12, 13)
        weights = np.exp(-0.5 * (offsets / 3) ** 2)
        seen = rewards[np.clip(steps[:, None] + offsets, 0, len(rewards) - 1)]
        expected = seen @ weights / weights.sum()
    np.testing.assert_allclose(tools.smooth_rewards(rewards, kind), expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["gaussian", "ema"])
def test_with_smoothing_only_ended_episodes_are_sampled_and_their_rewards_are_filtered(kind, tmp_path):
    replay = make(num_envs=2)
    replay.smoothing = kind
    env, other = CountingEnv(0, [9, 12]), CountingEnv(1, [30])
    for _ in range(9 + 1 + 5):
        step(replay, [env, other])
    # the second episode of `env` and the only one of `other` are running
    batches = [replay.sample() for _ in range(20)]
    assert {int(label) for batch in batches for label in batch["count"][..., 1].flatten()} == {0}
    raw = 0.5 * np.arange(10, dtype=np.float32)
    smooth = tools.smooth_rewards(raw, kind)
    for batch in batches:
        np.testing.assert_array_equal(batch["reward"], smooth[batch["count"][..., 0].long()])
    # running episodes keep their rewards until they end, also over a stop
    again = make(num_envs=2)
    again.smoothing = kind
    again.load(tmp_path, replay.save(tmp_path))
    for one in (replay, again):
        one.end(1)
    assert all(torch.equal(a, b) for a, b in zip(replay.sample().values(), again.sample().values(), strict=True))
    rewards = [again.storage["reward"].numpy()[np.array(slots)] for slots in again.episodes.values()]
    np.testing.assert_array_equal(rewards[0], smooth)
    np.testing.assert_array_equal(rewards[1], tools.smooth_rewards(0.5 * np.arange(15, dtype=np.float32), kind))
    np.testing.assert_array_equal(rewards[2], raw[:5])


def test_smoothing_without_an_ended_episode_says_what_to_do():
    replay = make()
    replay.smoothing = "ema"
    step(replay, [env := CountingEnv(0, [5])])
    step(replay, [env])
    with pytest.raises(tools.UserError, match="--prefill must be at least as large as the first episodes of all"):
        replay.sample()
