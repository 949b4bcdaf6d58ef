"""Logged episodes: the file format, reading those of other projects, writing our own. numpy only.

An episode is a dict of arrays whose row t holds observation o_t, the action a_t that led to it and the reward r_t on
arrival (T rows, `arrival` convention):

    image, clean_image  uint8 (T,H,W,C), C 1 or 3     action       float32 (T,A) in [-1, 1], or one-hot; row 0 zeros
    any other name      float32 (T,n)                 reward       float32 (T,), absent where none was logged
                                                      is_first, is_terminal  bool (T,)

Files: `*.npz`, one episode or several one after the other (dreamerv3-torch, HRSSM upstream, V-D4RL at 64 pixels, the
replay folder of a run, `write_episode`), and `*.hdf5` of V-D4RL at 84 pixels, which needs h5py.
"""

import os
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from envs.task import EnvError, one_line

NOT_STORED = {"is_last", "discount", "logprob", "success", "step_type"}
STEPS = ("action", "reward", "discount", "is_terminal")  # what a departure file holds once per step, not per picture
OWN = ("running-", "episodes-")  # how the names of a run's replay files begin
HDF5_ROWS = 501  # of an episode in a V-D4RL file that does not mark the first ones
UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


class File(NamedTuple):
    """A file and where its episodes begin and end; `rows` of departure data may be one too many."""

    path: Path
    pieces: list[tuple[int, int]]

    @property
    def rows(self) -> int:
        return sum(stop - start for start, stop in self.pieces)


def find_files(folder: str | Path, limit: float = float("inf")) -> list[File]:
    """Files of episodes, newest names first until they hold `limit` transitions; reads what is small in them.

    Unreadable files are skipped with a warning. Raises EnvError if there are no files or most are unreadable.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise EnvError(f"{folder} is no folder of episodes: there is no such folder")
    paths = sorted([*folder.glob("*.npz"), *folder.glob("*.hdf5")], reverse=True)
    # Of a run's replay: an older file of running episodes repeats what newer ones hold.
    number = {path: path.stem.rpartition("-")[2] for path in paths if path.stem.startswith(OWN)}
    paths = [path for path in paths if not path.stem.startswith("running-") or number[path] == max(number.values())]
    if not paths:
        hint = f"; the episodes of this run are in {folder}/replay" if (folder / "replay").is_dir() else ""
        raise EnvError(f"{folder} holds no episodes (*.npz or *.hdf5){hint}")
    files, skipped, total = [], 0, 0
    for path in paths:
        if total >= limit:
            break
        try:
            files.append(File(path, _hdf5_pieces(path) if path.suffix == ".hdf5" else _npz_pieces(path)))
            total += files[-1].rows - len(files[-1].pieces)
        except EnvError:
            raise
        except UNREADABLE as error:
            warnings.warn(f"{path} is skipped, it cannot be read: {one_line(error)}", stacklevel=2)
            skipped += 1
    _check_skipped(folder, skipped, len(files) + skipped)
    return files


def load_episodes(
    files: list[File],
    *,
    actions: str = "arrival",
    discrete: bool = False,
    size: tuple[int, int] = (64, 64),
) -> Iterator[tuple[Path, dict[str, np.ndarray]]]:
    """The episodes of `files` in this order, each with its file, checked and in the format above.

    Args:
        actions: what row t of a file holds: `arrival` the action that led to o_t, `departure` the one taken there
            (T or T+1 observations with T actions; a last action without outcome is dropped).
        discrete: actions must be one-hot.
        size: height and width that pictures must have; those of 84-pixel files are scaled to it.

    Raises:
        EnvError: whatever is wrong with a file; unreadable ones are skipped with a warning, unless most are.
    """
    first: dict[str, tuple] = {}
    skipped = short = nonzero = count = 0
    for file in files:
        try:
            for rows in _read_hdf5(file, size) if file.path.suffix == ".hdf5" else _read_npz(file, actions):
                count += 1
                nonzero += actions == "arrival" and bool(np.any(rows["action"][:1]))
                rows = _convert(rows, file.path, actions, discrete, size)
                kinds = {key: values.shape[1:] for key, values in rows.items()}
                first = first or kinds
                _check_same(kinds, first, file.path, files[0].path)
                if len(rows["action"]) > 1:
                    yield file.path, rows
                else:
                    short += 1
        except EnvError:
            raise
        except UNREADABLE as error:
            warnings.warn(f"{file.path} is skipped, it cannot be read: {one_line(error)}", stacklevel=2)
            skipped += 1
    _check_skipped(files[0].path.parent, skipped, len(files))
    if nonzero > count / 2:
        raise EnvError(
            f"{files[0].path.parent}: {nonzero} of {count} episodes begin with an action that is not zero, so row t "
            "seems to hold the action taken in o_t: use --offline_actions departure"
        )
    if short:
        warnings.warn(f"{files[0].path.parent}: {short} episodes of a single row are left out", stacklevel=2)


def hold_out(count: int, seed: int) -> set[int]:
    """Numbers of the episodes held out of `count`: a tenth, at least one, drawn by `seed`."""
    return set(np.random.default_rng(seed).permutation(count)[: max(1, count // 10)].tolist())


def next_number(folder: str | Path) -> int:
    """Of the episode that `write_episode` writes next."""
    names = (path.stem.removeprefix("episode-") for path in Path(folder).glob("episode-*.npz"))
    return max((int(name) + 1 for name in names if name.isdecimal()), default=0)


def write_episode(folder: str | Path, rows: dict[str, np.ndarray]) -> Path:
    """Write an episode atomically as the next number of `folder`, which is made if necessary."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"episode-{next_number(folder):06d}.npz"
    part = path.with_suffix(".npz.part")
    try:
        with open(part, "wb") as file:
            np.savez_compressed(file, **rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _check_skipped(folder: Path, skipped: int, count: int) -> None:
    if skipped > count / 2:
        raise EnvError(f"{folder}: {skipped} of {count} files cannot be read: restore them from a copy")


def _pieces(is_first: np.ndarray, rows: int) -> list[tuple[int, int]]:
    """Split `rows` where `is_first` is set, and at their beginning."""
    starts = [0, *(np.flatnonzero(is_first[1:rows]) + 1).tolist()]
    return list(zip(starts, [*starts[1:], rows], strict=True))


def _npz_pieces(path: Path) -> list[tuple[int, int]]:
    with np.load(path, allow_pickle=False) as archive:
        if "action" not in archive:
            raise EnvError(f"{path} holds no action, only {', '.join(archive.files) or 'nothing'}")
        is_first = archive["is_first"] if "is_first" in archive else np.zeros(1, bool)
        return _pieces(is_first, max(len(archive["action"]), len(is_first)))


def _read_npz(file: File, actions: str) -> Iterator[dict[str, np.ndarray]]:
    with np.load(file.path, allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files if not key.startswith("log_") and key != "logprob"}
    if scalars := [key for key, values in arrays.items() if not values.ndim]:
        raise EnvError(f"{file.path}: {scalars[0]} is a single number, not one per row: leave it out")
    lengths = {key: len(values) for key, values in arrays.items()}
    observed = max(lengths.values())
    one_less = {key for key, length in lengths.items() if length == observed - 1}
    if (
        one_less
        and one_less <= {*STEPS, "is_first", "is_last"}
        and one_less | {key for key, length in lengths.items() if length == observed} == set(arrays)
    ):
        if actions == "arrival":
            raise EnvError(
                f"{file.path} holds {observed} observations and {observed - 1} actions: use --offline_actions departure"
            )
        arrays = {k: np.concatenate([v, np.zeros_like(v[:1])]) if k in one_less else v for k, v in arrays.items()}
        # What has an entry per picture stays with it: `_convert` will shift it the other way.
        arrays |= {k: np.concatenate([arrays[k][1:], arrays[k][-1:]]) for k in ({*STEPS} & arrays.keys()) - one_less}
    elif len(set(lengths.values())) > 1:
        raise EnvError(f"{file.path} holds keys of different lengths: {lengths}")
    for start, stop in _pieces(arrays.get("is_first", np.zeros(1, bool)), observed):
        yield {key: values[start:stop] for key, values in arrays.items()}


def _hdf5(path: Path):
    try:
        import h5py
    except ImportError as error:
        raise EnvError(f"reading {path} needs the package h5py: pip install h5py") from error
    return h5py.File(path)


def _hdf5_pieces(path: Path) -> list[tuple[int, int]]:
    with _hdf5(path) as arrays:
        for key in ("observation", "action"):
            if key not in arrays:
                raise EnvError(f"{path} holds no {key}, only {', '.join(arrays) or 'nothing'}")
        lengths = {key: len(values) if values.ndim else 0 for key, values in arrays.items()}
        if len(set(lengths.values())) > 1:
            raise EnvError(f"{path} holds keys of different lengths: {lengths}")
        rows = lengths["action"]
        is_first = arrays["step_type"][()].ravel() == 0 if "step_type" in arrays else np.arange(rows) % HDF5_ROWS == 0
        return _pieces(is_first, rows)


def _read_hdf5(file: File, size: tuple[int, int]) -> Iterator[dict[str, np.ndarray]]:
    with _hdf5(file.path) as arrays:
        for start, stop in file.pieces:
            rows = {key: values[start:stop] for key, values in arrays.items()}
            image = np.moveaxis(rows.pop("observation"), 1, -1)
            if image.ndim != 4 or image.dtype != np.uint8:
                raise EnvError(f"{file.path}: observation is {image.dtype} with {image.ndim} axes, not uint8 (N,C,H,W)")
            frames = [cv2.resize(np.ascontiguousarray(x), size[::-1], interpolation=cv2.INTER_AREA) for x in image]
            yield rows | {"image": np.stack(frames).reshape(len(image), *size, -1)}


def _convert(
    arrays: dict[str, np.ndarray], path: Path, actions: str, discrete: bool, size: tuple[int, int]
) -> dict[str, np.ndarray]:
    """One episode of a file in the format of this module. Raises EnvError."""
    length, rows = len(arrays["action"]), {}
    for key, values in arrays.items():
        if key in NOT_STORED or key in ("is_first", "is_terminal"):
            continue
        if values.ndim == 4 and key != "action":
            rows[key] = _check_picture(values, key, path, size)
            continue
        if key == "image":
            raise EnvError(f"{path}: image has {values.ndim - 1} axes, not height, width and channels")
        if values.dtype.kind not in "fiub":
            raise EnvError(f"{path}: {key} holds {values.dtype}, not numbers")
        values = values.astype(np.float32)
        if not np.isfinite(values).all():
            raise EnvError(f"{path}: {key} holds values that are not finite")
        rows[key] = values.reshape(length) if key == "reward" else values.reshape(length, -1)
    terminal = arrays.get("is_terminal", arrays["discount"] == 0 if "discount" in arrays else np.zeros(length))
    rows["is_terminal"] = np.asarray(terminal, bool).reshape(length)
    if actions == "departure":
        for key in {*STEPS} & rows.keys():
            rows[key] = np.concatenate([np.zeros_like(rows[key][:1]), rows[key][:-1]])
    rows["action"] = _check_action(rows["action"], path, discrete)
    rows["is_first"] = np.arange(length) == 0
    if not rows.keys() - {*STEPS, "is_first"}:
        raise EnvError(f"{path} holds no observation, only {', '.join(arrays)}")
    return rows


def _check_picture(values: np.ndarray, key: str, path: Path, size: tuple[int, int]) -> np.ndarray:
    shape = f"{values.shape[1]}x{values.shape[2]}x{values.shape[3]}"
    if values.dtype != np.uint8:
        raise EnvError(f"{path}: {key} is {values.dtype}: pictures must be uint8, from 0 to 255")
    if values.shape[-1] not in (1, 3):
        first = values.shape[1] in (1, 3)
        reason = "channels come first: move them last" if first else "it needs one or three channels, in the last axis"
        raise EnvError(f"{path}: {key} has rows of {shape}: {reason}")
    if values.shape[1:3] != tuple(size):
        height, width = values.shape[1:3]
        raise EnvError(f"{path}: {key} has {height}x{width} pixels: use --size {height},{width}")
    return values


def _check_action(action: np.ndarray, path: Path, discrete: bool) -> np.ndarray:
    """`action` with zeros in row 0, where nothing led to the observation."""
    action = action.copy()
    action[:1] = 0.0
    if discrete and not (np.allclose(action[1:].sum(-1), 1.0) and np.isin(action, (0.0, 1.0)).all()):
        raise EnvError(f"{path}: actions are not one-hot, as --actor_dist onehot expects: use --actor_dist normal")
    largest = float(np.abs(action).max(initial=0.0))
    # A policy's samples may lie outside; a run's replay holds them as they were drawn.
    if largest > 1.0 + 1e-3 and not path.stem.startswith(OWN):
        raise EnvError(f"{path}: the largest action is {largest:.4g}: scale actions to [-1, 1]")
    return action


def _check_same(kinds: dict[str, tuple], first: dict[str, tuple], path: Path, first_path: Path) -> None:
    if kinds.keys() != first.keys():
        differ = ", ".join(sorted(kinds.keys() ^ first.keys()))
        raise EnvError(f"{path} and {first_path} hold different keys: {differ} is in one of them only")
    for key, shape in kinds.items():
        if shape != first[key]:
            raise EnvError(f"{path}: rows of {key} have shape {shape}, those in {first_path} {first[key]}")
