"""Distracting Control Suite (Stone et al., 2021) as in DMControl-GS: background video, camera and colour distractions.

All three change every second frame. `distracting_cs` has all of them, `sensor_cs` the camera alone. The difficulty
scales every range. Each has its own random stream, consumed in a fixed order.
"""

import ctypes
import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import mujoco
import numpy as np
from PIL import Image

from envs import assets, video
from envs.distraction import Distraction, call_gl, upload_texture
from envs.task import EnvError

DOMAINS = ("ball_in_cup", "cartpole", "cheetah", "finger", "reacher", "walker")
# difficulty -> number of DAVIS videos, from the start of a list
VIDEOS = {0.025: 2, 0.05: 2, 0.1: 4, 0.15: 6, 0.2: 8, 0.3: 60, 0.4: 60, 0.5: 60}
GROUND_ALPHA = {"reacher": 0.0, "walker": 1.0, "cheetah": 1.0}  # others 0.3
SKY = 0  # index of the sky among the textures of these domains
SKY_EDGE = 800  # pixels
LEVELS = 5  # mipmap levels below the full size: 800 is halved exactly down to 25 pixels

# fmt: off
# The training list of DAVIS 2017.
DAVIS = (
    "bear", "bmx-bumps", "boat", "boxing-fisheye", "breakdance-flare", "bus", "car-turn", "cat-girl", "classic-car",
    "color-run", "crossing", "dance-jump", "dancing", "disc-jockey", "dog-agility", "dog-gooses", "dogs-scale",
    "drift-turn", "drone", "elephant", "flamingo", "hike", "hockey", "horsejump-low", "kid-football", "kite-walk",
    "koala", "lady-running", "lindy-hop", "longboard", "lucia", "mallard-fly", "mallard-water", "miami-surf",
    "motocross-bumps", "motorbike", "night-race", "paragliding", "planes-water", "rallye", "rhino", "rollerblade",
    "schoolgirls", "scooter-board", "scooter-gray", "sheep", "skate-park", "snowboard", "soccerball", "stroller",
    "stunt", "surf", "swing", "tennis", "tractor-sand", "train", "tuk-tuk", "upside-down", "varanus-cage", "walking",
)
# Its validation list.
DAVIS_VALIDATION = (
    "bike-packing", "blackswan", "bmx-trees", "breakdance", "camel", "car-roundabout", "car-shadow", "cows",
    "dance-twirl", "dog", "dogs-jump", "drift-chicane", "drift-straight", "goat", "gold-fish", "horsejump-high",
    "india", "judo", "kite-surf", "lab-coat", "libby", "loading", "mbike-trick", "motocross-jump",
    "paragliding-launch", "parkour", "pigs", "scooter-black", "shooting", "soapbox",
)
# fmt: on


def check(domain: str, difficulty: float) -> None:
    """Raises EnvError for domains and difficulties that the benchmark does not define."""
    if domain not in DOMAINS:
        raise EnvError(f"distracting_cs and sensor_cs have no {domain}: there is {', '.join(DOMAINS)}")
    if difficulty not in VIDEOS:
        raise EnvError(f"--distracting_cs_intensity {difficulty} is not defined: use {', '.join(map(str, VIDEOS))}")


def make_distraction(
    mode: str,
    domain: str,
    difficulty: float,
    dynamic: bool,
    camera: int,
    resource_path: str,
    seed: int,
    unseen: bool = False,
) -> "Together":
    """The distraction `distracting_cs` or `sensor_cs`. Raises EnvError for missing videos or undefined settings."""
    check(domain, difficulty)
    parts: list[Distraction] = [Camera(domain, difficulty, dynamic, camera)]
    if mode == "distracting_cs":
        folders = find_videos(resource_path, difficulty, unseen)
        clips = [video.cached(folder, (SKY_EDGE, SKY_EDGE), decode_sky) for folder in folders]
        parts = [Background(clips, GROUND_ALPHA.get(domain, 0.3), dynamic), *parts, Color(difficulty, dynamic)]
    return Together(parts, seed)


def find_videos(resource_path: str, difficulty: float, unseen: bool = False) -> list[str]:
    """Folders of the first DAVIS training videos, or validation videos (`unseen`), that the benchmark uses."""
    root = Path(assets.find("davis", "DAVIS/JPEGImages/480p", resource_path))
    names = (DAVIS_VALIDATION if unseen else DAVIS)[: VIDEOS[difficulty]]
    missing = [name for name in names if not next((root / name).glob("*.jpg"), None)]
    if missing:
        raise EnvError(
            f"{root} lacks {len(missing)} of {len(names)} videos ({missing[0]}): run python setup/download.py davis"
        )
    return [str(root / name) for name in names]


class Together(Distraction):
    """Several distractions applied in order, each with its own random stream."""

    lasting = ("parts",)

    def __init__(self, parts: Sequence[Distraction], seed: int):
        self.parts = parts
        self.seed(seed)

    def seed(self, seed: int) -> None:
        for part, own in zip(self.parts, np.random.SeedSequence(seed).generate_state(len(self.parts)), strict=True):
            part.seed(int(own))

    def after_reset(self, physics) -> None:
        for part in self.parts:
            part.after_reset(physics)

    def after_step(self, physics, last: bool) -> None:
        for part in self.parts:
            part.after_step(physics, last)


class _Drifting(Distraction):
    """A distraction that changes at every second frame."""

    lasting = ("rng",)

    def seed(self, seed: int) -> None:
        self.rng = np.random.RandomState(seed)

    def after_reset(self, physics) -> None:
        self._frame = 0
        self.start(physics)

    def after_step(self, physics, last: bool) -> None:
        self._frame += 1
        if self._frame % 2 == 0:
            self.move(physics)
        if last:
            self.show(physics)

    def start(self, physics) -> None:
        """Draw and apply the initial setting of an episode."""

    def move(self, physics) -> None:
        """One random step."""

    def show(self, physics) -> None:
        """Write the current setting to the simulator before it renders."""


class Background(_Drifting):
    """A DAVIS video as the sky, played back and forth from a random frame. `dynamic` False: a single random frame."""

    def __init__(self, clips: Sequence[video.Clip], ground_alpha: float, dynamic: bool):
        self._clips, self._ground_alpha, self._dynamic = clips, ground_alpha, dynamic
        self._context = None

    def start(self, physics) -> None:
        physics.named.model.mat_rgba["grid", "a"] = self._ground_alpha
        if physics.model.tex_type[SKY] != mujoco.mjtTexture.mjTEXTURE_SKYBOX:
            raise RuntimeError("the first texture of this model is not its sky")
        # The sky texture stacks six square faces. With the height of one face it is repeated on all six.
        physics.model.tex_height[SKY] = SKY_EDGE
        path, count = self._clips[self.rng.choice(len(self._clips))]
        first, end = 0, count
        if not self._dynamic:
            first = self.rng.choice(count)
            end = first + 1
        # Memory-mapped, 1.9 MB per frame: workers share the memory.
        self._frames = np.load(path, mmap_mode="r")[first:end]
        self._index = self.rng.choice(len(self._frames))
        self._direction = self.rng.choice([-1, 1])
        self._shown = None
        self._levels = {}  # computed when first shown, 0.9 MB per frame
        self.show(physics)

    def move(self, physics) -> None:
        if not self._dynamic:
            return
        self._index += self._direction
        if self._index <= 0:
            self._index, self._direction = 0, 1
        if self._index >= len(self._frames):
            self._index, self._direction = len(self._frames) - 1, -1

    def show(self, physics) -> None:
        context = physics.contexts.mujoco
        known, self._context = context is self._context, context
        if known and self._shown == self._index:
            return
        frame, self._shown = self._frames[self._index], self._index
        start = physics.model.tex_adr[SKY]
        physics.model.tex_data[start : start + frame.size] = frame.reshape(-1)
        texture = int(context.ptr.texture[SKY])
        if known and self._quick:
            if self._index not in self._levels:
                self._levels[self._index] = halve(frame)
            call_gl(physics, upload_levels, texture, self._levels[self._index])
        else:
            upload_texture(physics, SKY)
        if not known:
            self._quick = small_levels_suffice(physics) and call_gl(physics, holds_levels, texture, halve(frame))


# Uploading a whole sky takes longer than rendering, because OpenGL builds mipmaps of all six faces down to one pixel.
# Small images sample only some of these levels. They are computed here, once for all faces, if the bytes are the same.


def small_levels_suffice(physics) -> bool:
    """Whether camera 0 samples only mipmap levels that `halve` computes: true for image edges of 51 to 87 pixels.

    The sky is infinitely far away, so its texels per pixel depend on angles alone. The bounds cover all directions and
    every level that OpenGL allows a driver to choose.
    """
    view, edge = physics.model.vis.global_, math.tan(math.radians(physics.model.cam_fovy[0]) / 2)
    middle = SKY_EDGE * edge / view.offheight  # texels per pixel where the camera faces the sky head-on
    corner = 1 + edge**2 * (1 + (view.offwidth / view.offheight) ** 2)
    return middle / corner / math.sqrt(2) >= 2 and middle * math.sqrt(24) <= 2**LEVELS


def halve(frame: np.ndarray) -> list[np.ndarray]:
    """Mipmap levels 1 to LEVELS of an image (W, W, 3): (W/2, 2W) uint8, (W/4, W) ... with four bytes RGBA per pixel.

    Horizontal pairs are averaged, then vertical ones, rounding up both times, like Mesa's software renderer.
    """

    def mean(a, b):  # of all four bytes of an integer at once
        return (a | b) - (((a ^ b) >> 1) & 0x7F7F7F7F)

    pixels, levels = cv2.cvtColor(frame, cv2.COLOR_RGB2RGBA).view(np.uint32)[..., 0], []
    for _ in range(LEVELS):
        pairs = mean(pixels[:, ::2], pixels[:, 1::2])
        pixels = mean(pairs[::2], pairs[1::2])
        levels.append(pixels.view(np.uint8))
    return levels


def holds_levels(texture: int, levels: Sequence[np.ndarray]) -> bool:
    """Whether all six faces of the texture in the current GL context have exactly these mipmap levels."""
    from OpenGL import GL, error  # imported after MUJOCO_GL is chosen

    try:
        GL.glBindTexture(GL.GL_TEXTURE_CUBE_MAP, texture)
        for level, pixels in enumerate(levels, start=1):
            for face in range(6):
                held = np.zeros_like(pixels)
                GL.glGetTexImage(GL.GL_TEXTURE_CUBE_MAP_POSITIVE_X + face, level, GL.GL_RGBA, GL.GL_UNSIGNED_BYTE, held)
                if not np.array_equal(held, pixels):
                    return False
    except error.Error:  # PyOpenGL cannot use this context
        return False
    return True


def upload_levels(texture: int, levels: Sequence[np.ndarray]) -> None:
    """Replace these mipmap levels on all six faces of the texture in the current GL context."""
    from OpenGL import GL
    from OpenGL.raw.GL.VERSION.GL_1_1 import (
        glTexSubImage2D,
    )  # unwrapped: the wrapper doubles the time of these 30 calls

    GL.glBindTexture(GL.GL_TEXTURE_CUBE_MAP, texture)
    for level, pixels in enumerate(levels, start=1):
        size, data = len(pixels), pixels.ctypes.data_as(ctypes.c_void_p)
        for face in range(6):
            target = GL.GL_TEXTURE_CUBE_MAP_POSITIVE_X + face
            glTexSubImage2D(target, level, 0, 0, size, size, GL.GL_RGBA, GL.GL_UNSIGNED_BYTE, data)


def decode_sky(path: str, size: tuple[int, int]) -> list[np.ndarray]:
    """All images (H, W, 3) uint8 of a folder in name order, scaled bicubically."""
    height, width = size
    frames = []
    for file in video.find_files("images", f"{path}/*.jpg"):
        try:
            with Image.open(file) as picture:
                frames.append(np.asarray(picture.convert("RGB").resize((width, height))))
        except OSError:
            raise EnvError(f"{file} is damaged: get it again with python setup/download.py davis") from None
    return frames


class Camera(_Drifting):
    """The camera drifts around its target: azimuth, polar angle, distance and roll change.

    Positions are (radius, azimuth, polar angle) about the world's origin, or about the robot's centre of mass if the
    camera tracks it. Angles are in radians, lengths in metres, velocities per change (two frames).
    """

    def __init__(self, domain: str, difficulty: float, dynamic: bool, camera: int):
        s = difficulty
        self._camera = camera
        self._reach = np.array([0.0, math.pi / 2 * s, math.pi / 2 * s])  # half-range of azimuth and polar angle
        self._zoom = 0.5 * s, 1.5 * s  # fractions of the radius, inward and outward
        self._max_roll = math.pi / 2 * s
        moving = s if dynamic else 0.0
        self._speed_std, self._max_speed = 0.1 * moving, 0.4 * moving
        self._roll_speed_std, self._max_roll_speed = math.pi / 300 * moving, math.pi / 50 * moving
        self._upper_quadrant = domain != "reacher"

    def start(self, physics) -> None:
        # As in the benchmark, the mode of camera 0 decides; it is the camera in use.
        mode = physics.model.cam_mode[0]
        if mode not in (mujoco.mjtCamLight.mjCAMLIGHT_FIXED, mujoco.mjtCamLight.mjCAMLIGHT_TRACKCOM):
            raise RuntimeError("only fixed cameras and those that track a centre of mass are supported")
        self._tracks = mode == mujoco.mjtCamLight.mjCAMLIGHT_TRACKCOM
        self._target = self._looked_at(physics)
        radius, azimuth, polar = to_sphere(physics.data.cam_xpos[self._camera] - self._centre(physics))
        self._scale = radius / 4.0  # most cameras are 4 metres away; closer ones move less
        middle = np.array([radius, azimuth, polar])
        self._low, self._high = middle - self._reach, middle + self._reach
        self._low[0], self._high[0] = max(radius - radius * self._zoom[0], 0.0), radius + radius * self._zoom[1]
        if self._upper_quadrant:
            self._low[1], self._high[1] = max(self._low[1], -math.pi), min(self._high[1], 0.0)
            self._low[2], self._high[2] = max(self._low[2], 0.0), min(self._high[2], math.pi / 2)
        rng = self.rng
        azimuth = rng.uniform(self._low[1], self._high[1])
        polar = rng.uniform(self._low[2], self._high[2])
        radius = rng.uniform(self._low[0], self._high[0])
        self._position = np.array([radius, azimuth, polar])
        self._roll = rng.uniform(-self._max_roll, self._max_roll)
        direction = rng.randn(3)
        self._velocity = direction / np.sqrt(np.sum(direction**2)) * rng.uniform(0.0, self._max_speed)
        self._roll_velocity = rng.uniform(-self._max_roll_speed, self._max_roll_speed)
        self.move(physics)
        self.show(physics)

    def move(self, physics) -> None:
        self._velocity = self._velocity + self.rng.randn(3) * self._speed_std * self._scale
        self._roll_velocity += self.rng.randn() * self._roll_speed_std
        speed, limit = np.sqrt(np.sum(self._velocity**2)), self._max_speed * self._scale
        if speed > limit:
            self._velocity = self._velocity * (limit / speed)
        self._roll_velocity = np.clip(self._roll_velocity, -self._max_roll_speed, self._max_roll_speed)
        # The velocity is what remains after clipping to the limits.
        before = from_sphere(self._position)
        self._position = np.clip(to_sphere(before + self._velocity), self._low, self._high)
        self._velocity = from_sphere(self._position) - before
        roll = np.clip(self._roll + self._roll_velocity, -self._max_roll, self._max_roll)
        self._roll_velocity, self._roll = roll - self._roll, roll

    def show(self, physics) -> None:
        # Every simulator step resets the camera to the pose of the model.
        position = from_sphere(self._position) + self._centre(physics)
        target = self._looked_at(physics) if self._tracks else self._target
        look = look_at_level if self._upper_quadrant else look_at
        cos, sin = math.cos(self._roll), math.sin(self._roll)
        roll = np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
        physics.data.cam_xpos[self._camera] = position
        physics.data.cam_xmat[self._camera] = (look(target - position) @ roll).reshape(-1)

    def _centre(self, physics) -> np.ndarray:
        return physics.data.subtree_com[1] if self._tracks else np.zeros(3)

    def _looked_at(self, physics) -> np.ndarray:
        """The point on the camera's axis as far away as the robot's centre of mass."""
        position = physics.data.cam_xpos[self._camera]
        distance = np.sqrt(np.sum((position - physics.data.subtree_com[1]) ** 2))
        return position - distance * physics.data.cam_xmat[self._camera].reshape(3, 3)[:, 2]


class Color(_Drifting):
    """The colours of all materials drift around the original ones."""

    def __init__(self, difficulty: float, dynamic: bool):
        self._reach, self._std = difficulty, 0.03 * difficulty if dynamic else 0.0
        self._original = None

    def start(self, physics) -> None:
        if self._original is None:
            self._original = physics.model.mat_rgba[:, :3].copy()
        self._low = np.clip(self._original - self._reach, 0.0, 1.0)
        self._high = np.clip(self._original + self._reach, 0.0, 1.0)
        self._rgb = self._low + self.rng.uniform(size=self._low.shape) * (self._high - self._low)
        self.show(physics)

    def move(self, physics) -> None:
        self._rgb = np.clip(self._rgb + self.rng.randn(*self._rgb.shape) * self._std, self._low, self._high)

    def show(self, physics) -> None:
        physics.model.mat_rgba[:, :3] = self._rgb


def to_sphere(point: np.ndarray) -> np.ndarray:
    """(x, y, z) -> (radius, azimuth, polar angle from +z)."""
    x, y, z = point
    flat = np.sqrt(np.sum(point[:2] ** 2))
    return np.array([np.sqrt(np.sum(point**2)), np.arctan2(y, x), np.arctan2(flat, z)])


def from_sphere(position: np.ndarray) -> np.ndarray:
    radius, azimuth, polar = position
    return radius * np.array([np.sin(polar) * np.cos(azimuth), np.sin(polar) * np.sin(azimuth), np.cos(polar)])


def look_at_level(direction: np.ndarray) -> np.ndarray:
    """Rotation (3, 3) of a camera looking along `direction` with a level horizon; unstable for straight down."""
    x, y, z = direction / np.sqrt(np.sum(direction**2))
    yaw, pitch = -np.arctan2(x, y), np.arctan2(z, np.sqrt(x**2 + y**2)) + math.pi / 2
    about_z = np.array([[np.cos(yaw), -np.sin(yaw), 0.0], [np.sin(yaw), np.cos(yaw), 0.0], [0.0, 0.0, 1.0]])
    about_x = np.array([[1.0, 0.0, 0.0], [0.0, np.cos(pitch), -np.sin(pitch)], [0.0, np.sin(pitch), np.cos(pitch)]])
    return about_z @ about_x


def look_at(direction: np.ndarray) -> np.ndarray:
    """Rotation (3, 3) of a camera looking along `direction`, by the shortest rotation from straight down (reacher)."""
    direction = direction / np.sqrt(np.sum(direction**2))
    axis = np.cross([0.0, 0.0, -1.0], direction)
    sin, cos = np.sqrt(np.sum(axis**2)), -direction[2]
    a = axis / (sin + 1e-4)  # slightly shorter than 1: the benchmark's guard against division by zero
    cross = np.array([[0.0, -a[2], a[1]], [a[2], 0.0, -a[0]], [-a[1], a[0], 0.0]])
    return cos * np.eye(3) + (1.0 - cos) * np.outer(a, a) + sin * cross
