"""Background frames for distracted tasks: from videos, images, a colour or noise.

A source is called once per observation as `source(first)`, with `first` true after a reset, and returns a uint8 frame
that broadcasts to (H, W, 3). Clips are decoded once, to grey frames of the observation size, into a file that all
workers memory-map. A source holds only paths and a position, so it is cheap to pickle.
"""

import atexit
import functools
import glob
import hashlib
import mimetypes
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import av
import cv2
import numpy as np

from envs.assets import GENERATED
from envs.task import EnvError

Clip = tuple[str, int]  # .npy file of frames (N, H, W) uint8, and the number of frames to use
Decoder = Callable[[str, tuple[int, int]], list[np.ndarray]]


def make_source(kind: str, *, total_frames: int, size: tuple[int, int], clip_seed: int, seed: int, **clips):
    """The source `kind` (video, images, color or noise) with frames of `size` (H, W).

    `clip_seed` selects from the files of `find_clips(kind, **clips)`, `seed` seeds everything else.

    Raises:
        EnvError: unknown kind, no file matches, or none of them can be read.
    """
    if kind in DECODERS:
        files = find_clips(kind, **clips)
        return Clips(select(files, total_frames, size, np.random.default_rng(clip_seed), DECODERS[kind]), seed)
    if kind == "color":
        return Colour(seed)
    if kind == "noise":
        return Noise(size, seed)
    raise EnvError(f"unknown --img_source {kind!r}: there is {', '.join(DECODERS)}, color, noise")


class Clips:
    """Grey frames of concatenated clips, one frame per observation, from a random start.

    Resets do not change the position: the sequence continues across episodes and wraps around at its end.
    """

    lasting = ("position",)

    def __init__(self, clips: Sequence[Clip], seed: int):
        self.clips = clips
        self.ends = np.cumsum([count for _, count in clips])
        # One file at a time, since there may be more clips than files that a process may open; and from its first use
        # on, in the worker process: pickling a memory map would copy its data.
        self._open: tuple[str, np.ndarray] | None = None
        self.seed(seed)

    def seed(self, seed: int) -> None:
        self.position = int(np.random.default_rng(seed).integers(self.ends[-1]))

    def __call__(self, first: bool) -> np.ndarray:
        clip = int(np.searchsorted(self.ends, self.position, side="right"))
        path, count = self.clips[clip]
        if self._open is None or self._open[0] != path:
            self._open = path, np.load(path, mmap_mode="r")
        frame = self._open[1][self.position - self.ends[clip] + count]
        self.position = (self.position + 1) % int(self.ends[-1])
        return frame[..., None]


class Colour:
    """One random colour for the whole frame, redrawn at each reset."""

    lasting = ("_rng",)

    def __init__(self, seed: int):
        self.seed(seed)

    def seed(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def __call__(self, first: bool) -> np.ndarray:
        if first:
            self._colour = self._rng.integers(0, 256, (1, 1, 3), np.uint8)
        return self._colour


class Noise:
    """Uniform random pixels, redrawn for each observation."""

    lasting = ("_rng",)

    def __init__(self, size: tuple[int, int], seed: int):
        self._shape = (*size, 3)
        self.seed(seed)

    def seed(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def __call__(self, first: bool) -> np.ndarray:
        return self._rng.integers(0, 256, self._shape, np.uint8)


def find_clips(
    kind: str, *, resource_files: str, holdout_clips: float, eval_resource_files: str, unseen: bool
) -> list[str]:
    """The files for training, or with `unseen` those that only evaluation shows. Raises EnvError if there are none."""
    files = find_files(kind, resource_files)
    if not eval_resource_files:
        return split(files, holdout_clips, unseen)
    named = find_files(kind, eval_resource_files, "--eval_resource_files")
    if unseen:
        return named
    excluded = {os.path.realpath(file) for file in named}
    files = [file for file in files if os.path.realpath(file) not in excluded]
    if not files:
        raise EnvError(f"--eval_resource_files {eval_resource_files} leaves no clip of {resource_files} to train on")
    return files


def split(files: Sequence[str], share: float, unseen: bool) -> list[str]:
    """The files that are held out (`unseen`), or the others. Raises EnvError if there are none."""
    chosen = [file for file in files if is_held_out(file, share) == unseen]
    if not chosen:
        count = "none" if unseen else "all"
        raise EnvError(f"--holdout_clips {share} holds out {count} of the {len(files)} clips: choose another share")
    return chosen


def is_held_out(file: str, share: float) -> bool:
    """True for about `share` of all names. It depends on the name alone, so more clips do not change the split."""
    digest = hashlib.sha256(os.path.basename(file).encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def find_files(kind: str, pattern: str, option: str = "--resource_files") -> list[str]:
    """Sorted files that match a glob, or those of a folder. Raises EnvError if there are none."""
    expanded = os.path.expanduser(pattern)
    folder = os.path.isdir(expanded)
    if folder:
        expanded = os.path.join(glob.escape(expanded), "*")
    files = sorted(path for path in glob.glob(expanded, recursive=True) if os.path.isfile(path))
    if folder:  # where a licence or a thumbnail may lie beside the clips, which ffmpeg would decode too
        wanted = "video/" if kind == "video" else "image/"
        files = [path for path in files if (mimetypes.guess_type(path)[0] or wanted).startswith(wanted)]
    if not files:
        noun, example = ("video", "DIR/*.mp4") if kind == "video" else ("picture", "DIR/*.jpg")
        raise EnvError(f"no {noun} matches {pattern}: put files there or pass {option} '{example}'")
    if any((Path(folder) / GENERATED).exists() for folder in {os.path.dirname(path) for path in files}):
        warnings.warn(f"{pattern} are generated stand-ins: results on them are not comparable", stacklevel=2)
    return files


def select(
    files: Sequence[str], total_frames: int, size: tuple[int, int], rng: np.random.Generator, decode: Decoder
) -> list[Clip]:
    """Whole clips in random order until they have `total_frames` frames; the last clip is cut.

    If the list runs out, it is shuffled again. `total_frames` 0 takes every clip once. Files that cannot be decoded are
    skipped with a warning.
    """
    clips, gathered, usable = [], 0, list(files)
    while usable:
        for path in map(str, rng.permutation(usable)):
            clip = cached(path, size, decode)
            if clip is None:
                warnings.warn(f"skipping {path}: it cannot be decoded", stacklevel=2)
                usable.remove(path)
                continue
            name, count = clip
            if total_frames:
                count = min(count, total_frames - gathered)
            clips.append((name, count))
            gathered += count
            if gathered == total_frames:
                return clips
        if clips and not total_frames:
            return clips
    raise EnvError(f"none of the {len(files)} files such as {files[0]} can be decoded: replace them")


def cached(path: str, size: tuple[int, int], decode: Decoder) -> Clip | None:
    """The decoded frames of a file as a .npy file in the cache, and their number; None if it cannot be decoded."""
    stat = os.stat(path)
    height, width = size
    key = f"{os.path.realpath(path)}|{stat.st_size}|{stat.st_mtime_ns}|{height}x{width}|{decode.__name__}"
    folder = cache_dir(os.environ.get("HRSSM_CACHE") or "~/.cache/hrssm")
    target = folder / f"{Path(path).stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"
    count = count_frames(target, size)
    if not count:
        frames = decode(path, size)
        if not frames:
            return None
        print(f"decoded {path}: {len(frames)} frames of {height}x{width}", file=sys.stderr)
        _write(target, np.stack(frames))
        count = len(frames)
    return str(target), count


def count_frames(target: Path, size: tuple[int, int]) -> int:
    """The number of decoded frames in a file of the cache; 0 if it is missing, truncated or holds something else."""
    try:
        frames = np.load(target, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return 0
    return len(frames) if frames.shape[1:3] == tuple(size) and frames.dtype == np.uint8 else 0


@functools.cache
def cache_dir(root: str) -> Path:
    """The folder `video` in `root`; if it is not writable, a temporary one that is deleted when this process ends."""
    folder = Path(root).expanduser() / "video"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror
    else:
        if os.access(folder, os.W_OK):
            return folder
        reason = "not writable"
    warnings.warn(f"cannot keep decoded videos in {folder} ({reason}): set HRSSM_CACHE to a folder", stacklevel=2)
    folder = tempfile.mkdtemp(prefix="hrssm-video-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def decode_video(path: str, size: tuple[int, int]) -> list[np.ndarray]:
    """All frames (H, W) uint8 of a video; [] if any part of it is damaged.

    Converted to ffmpeg's `gray` format (full range), then scaled bilinearly without keeping the aspect ratio.
    """
    height, width = size
    try:
        with av.open(path) as container:
            if container.streams.video:
                container.streams.video[0].thread_type = "AUTO"
            return [cv2.resize(frame.to_ndarray(format="gray"), (width, height)) for frame in container.decode(video=0)]
    except (av.FFmpegError, IndexError):  # IndexError: no video stream
        return []


def decode_picture(path: str, size: tuple[int, int]) -> list[np.ndarray]:
    """The single frame (H, W) uint8 of an image; [] if it is damaged."""
    height, width = size
    picture = cv2.imread(path, cv2.IMREAD_GRAYSCALE)
    return [] if picture is None else [cv2.resize(picture, (width, height))]


DECODERS: dict[str, Decoder] = {"video": decode_video, "images": decode_picture}


def _write(target: Path, frames: np.ndarray) -> None:
    # Several runs may decode the same clip at once: each writes its own file, and the last rename wins.
    partial = target.with_suffix(f".{os.getpid()}.tmp")
    try:
        with partial.open("wb") as file:
            np.save(file, frames)
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise EnvError(f"cannot write {target} ({error.strerror}): free some space or set HRSSM_CACHE") from None
