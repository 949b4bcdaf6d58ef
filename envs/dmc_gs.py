"""DMControl Generalization Benchmark (Hansen & Wang, ICRA 2021): random colours, and videos on a green screen.

`color_easy`, `color_hard`: each episode draws one of 100 published settings of floor, robot and sky colours.
`video_easy`: the sky is a green screen; `video_hard`: the floor too. Each episode shows the next video.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import av
import mujoco
import numpy as np

from envs import assets, video
from envs.distraction import Distraction, Edits, edit_assets, upload_texture
from envs.task import EnvError

COLORS, VIDEOS = ("color_easy", "color_hard"), ("video_easy", "video_hard")
GREEN = (0.2, 0.8, 0.2)
GREEN_SCREEN = {
    "video_easy": dict.fromkeys(("skybox_rgb", "skybox_rgb2", "skybox_markrgb"), GREEN),
    "video_hard": {
        f"{part}_{key}": GREEN
        for part, keys in {"skybox": ("rgb", "rgb2", "markrgb"), "grid": ("rgb1", "rgb2", "markrgb")}.items()
        for key in keys
    },
}
"""Settings by mode, with the keys of the colour tables."""

# key of the colour tables -> file, tag, name, attribute
_ATTRIBUTES = {
    "grid_rgb1": ("./common/materials.xml", "texture", "grid", "rgb1"),
    "grid_rgb2": ("./common/materials.xml", "texture", "grid", "rgb2"),
    "grid_markrgb": ("./common/materials.xml", "texture", "grid", "markrgb"),
    "grid_texrepeat": ("./common/materials.xml", "material", "grid", "texrepeat"),
    "self_rgb": ("./common/materials.xml", "material", "self", "rgba"),
    "skybox_rgb": ("./common/skybox.xml", "texture", "skybox", "rgb1"),
    "skybox_rgb2": ("./common/skybox.xml", "texture", "skybox", "rgb2"),
    "skybox_markrgb": ("./common/skybox.xml", "texture", "skybox", "markrgb"),
}


def look(settings: dict[str, Sequence[float]]) -> Edits:
    """The edits to the shared XML assets for one row of a colour table."""
    edits: Edits = {}
    for key, numbers in settings.items():
        file, tag, name, attribute = _ATTRIBUTES[key]
        numbers = [*numbers, 1.0] if attribute == "rgba" else numbers
        edits.setdefault(file, {}).setdefault((tag, name), {})[attribute] = " ".join(str(float(x)) for x in numbers)
    return edits


def load_colors(mode: str) -> list[dict[str, list[float]]]:
    """The 100 settings of `color_easy` or `color_hard`."""
    path = assets.find("dmcgs", "colors.json")
    table = json.loads(Path(path).read_text()).get(mode)
    if not table:
        raise EnvError(f"{path} has no table {mode}: get it again with python setup/download.py dmcgs")
    return table


class Colors(Distraction):
    """One row of the colour table per episode, drawn uniformly with replacement."""

    lasting = ("_rng",)

    def __init__(self, table: list[dict], seed: int):
        self._table = table
        self.seed(seed)

    def attach(self, xml: str, assets: dict[str, bytes]) -> None:
        self._xml, self._assets = xml, assets

    def seed(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def before_reset(self, physics) -> None:
        self.apply(physics, self._table[self._rng.integers(len(self._table))])

    def apply(self, physics, settings: dict) -> None:
        """Copy the colours of a model compiled with `settings` into the running simulator.

        The pixels equal those of a reloaded simulator, whose new rendering context would take three times as long.
        """
        model = mujoco.MjModel.from_xml_string(self._xml, edit_assets(self._assets, look(settings)))
        for name in ("tex_data", "mat_rgba", "mat_texrepeat", "geom_rgba", "site_rgba"):
            getattr(physics.model, name)[:] = getattr(model, name)
        for index in range(physics.model.ntex):
            upload_texture(physics, index)


class GreenScreen(Distraction):
    """Videos behind the robot: one per episode, in order, from its first frame. Seed 0 starts with the second video."""

    lasting = ("_episode",)

    def __init__(self, clips: Sequence[video.Clip]):
        self._clips = clips
        self.seed(0)

    def seed(self, seed: int) -> None:
        self._episode = seed  # nothing is random here

    def before_reset(self, physics) -> None:
        self._episode = (self._episode + 1) % len(self._clips)
        # Memory-mapped: workers share the memory, and each environment has one clip open.
        self._frames = np.load(self._clips[self._episode][0], mmap_mode="r")
        self._step = 0

    def paint(self, image: np.ndarray, first: bool) -> np.ndarray:
        frame = self._frames[self._step % len(self._frames)]
        self._step += 1
        return np.where(is_green(image)[..., None], frame, image)


def is_green(image: np.ndarray) -> np.ndarray:
    """Mask (H, W) of the pixels of `image` (H, W, 3) uint8 that the background replaces.

    These are hues of 100 to 185 degrees, saturations of 80 to 255 and values of 70 to 255, in double precision and in
    this order of operations: another order, integers or OpenCV's HSV differ at the boundaries.
    """
    red, green, blue = np.moveaxis(image / 255.0, -1, 0)
    value, low = image.max(-1) / 255.0, image.min(-1) / 255.0
    spread = value - low
    with np.errstate(divide="ignore", invalid="ignore"):
        saturation = spread / value
        to_red, to_green, to_blue = (value - red) / spread, (value - green) / spread, (value - blue) / spread
    hue = np.where(red == value, to_blue - to_green, 4.0 + to_green - to_red)
    hue = np.where((red != value) & (green == value), 2.0 + to_red - to_blue, hue)
    hue = (hue / 6.0) % 1.0 * 360
    saturation, value = saturation * 255, value * 255
    # Grey pixels have hue NaN (0/0), and comparisons with NaN are False.
    return (hue >= 100) & (hue <= 185) & (saturation >= 80) & (saturation <= 255) & (value >= 70) & (value <= 255)


def find_files(mode: str, holdout_clips: float = 0.0, unseen: bool = False) -> list[str]:
    """Videos of `video_easy` or `video_hard` in the order of their numbers: for training, or the held-out ones."""
    folder = Path(assets.find("dmcgs", mode))
    numbers = {path: path.stem.removeprefix("video") or "0" for path in folder.glob("video*.mp4")}
    files = sorted((path for path in numbers if numbers[path].isdecimal()), key=lambda path: int(numbers[path]))
    if not files:
        raise EnvError(f"no video in {folder}: get them with python setup/download.py dmcgs")
    return video.split([str(file) for file in files], holdout_clips, unseen)


def find_clips(mode: str, size: tuple[int, int], holdout_clips: float = 0.0, unseen: bool = False) -> list[video.Clip]:
    """The decoded videos of `find_files`."""
    files = find_files(mode, holdout_clips, unseen)
    clips = [clip for file in files if (clip := video.cached(file, size, decode_rgb))]
    if not clips:
        raise EnvError(f"{files[0]} cannot be decoded, nor the others: get them with python setup/download.py dmcgs")
    return clips


def decode_rgb(path: str, size: tuple[int, int]) -> list[np.ndarray]:
    """All frames (H, W, 3) uint8 of a video; [] if any part of it is damaged."""
    try:
        with av.open(path) as container:
            container.streams.video[0].thread_type = "AUTO"
            return [shrink(frame.to_ndarray(format="rgb24"), size) for frame in container.decode(video=0)]
    except (av.FFmpegError, IndexError):  # IndexError: no video stream
        return []


def shrink(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear scaling of (H, W, 3) uint8 with half-pixel centres and without antialiasing, truncated to integers.

    The benchmark uses torch's `interpolate`. The order of operations and the fused multiply-adds below are those of
    torch on a CPU, so that results agree bit for bit (for widths that are multiples of 8).
    """
    (top, bottom, up, down), (left, right, west, east) = (
        _taps(*edges) for edges in zip(frame.shape[:2], size, strict=True)
    )
    pixels = frame[np.concatenate([top, bottom])][:, np.concatenate([left, right])].astype(np.float32) / np.float32(255)
    height, width = size
    upper, lower = pixels[:height], pixels[height:]
    x = _multiply_add(upper[:, :width], up[:, None] * west, upper[:, width:] * (up[:, None] * east)[..., None])
    x = _multiply_add(lower[:, :width], down[:, None] * west, x)
    x = _multiply_add(lower[:, width:], down[:, None] * east, x)
    return (x * np.float32(255)).astype(np.uint8)


def _taps(before: int, after: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The two neighbours among `before` positions of each of `after`, and their weights."""
    ratio = np.float32(before) / np.float32(after)
    where = np.maximum(ratio * (np.arange(after, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5), np.float32(0))
    first = where.astype(int)
    share = where - first.astype(np.float32)
    return first, np.minimum(first + 1, before - 1), np.float32(1) - share, share


def _multiply_add(x: np.ndarray, weight: np.ndarray, plus: np.ndarray) -> np.ndarray:
    """x * weight + plus, rounded once: the product of two float32 is exact in float64."""
    return (x.astype(np.float64) * weight[..., None].astype(np.float64) + plus).astype(np.float32)
