"""The `_video` variant of the control suite: blue floor and sky, and every blue pixel replaced by a video frame.

The colours are functional: they decide which pixels are replaced. They are those of "Learning Invariant Representations
for Reinforcement Learning without Reconstruction" (Zhang et al., ICLR 2021), which later work on natural-video
distractors, including HRSSM, trains on.
"""

import numpy as np

from envs.distraction import Distraction, Edits

MATERIALS, SKYBOX = "./common/materials.xml", "./common/skybox.xml"

# Decoration is brown, so that parts such as the caps of `finger` are not replaced.
BLUE_FLOOR = {
    ("texture", "grid"): {"rgb1": ".1 .1 .4", "rgb2": ".2 .2 .8", "markrgb": ".1 .1 .4"},
    ("material", "decoration"): {"rgba": ".7 .5 .3 1"},
}
GREY_FLOOR = {("texture", "grid"): {"rgb1": ".1 .1 .1", "rgb2": ".2 .2 .2", "markrgb": ".1 .1 .1"}}
GREY_FLOOR_DOMAINS = ("cheetah", "hopper", "stacker", "walker")
BLACK_STARS = {("texture", "skybox"): {"markrgb": "0 0 0"}}


def look(domain: str) -> Edits:
    """Edits to the shared assets of the suite for one domain. (`fish` has its own sky, which stays.)"""
    return {MATERIALS: GREY_FLOOR if domain in GREY_FLOOR_DOMAINS else BLUE_FLOOR, SKYBOX: BLACK_STARS}


def matte(image: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """Replace the pixels of `image` (H, W, 3) whose blue exceeds red and green by those of `frame` (broadcast)."""
    red, green, blue = np.moveaxis(image, -1, 0)
    keyed = (blue > green) & (blue > red)
    return np.where(keyed[..., None], frame, image)


class NaturalVideo(Distraction):
    """Frames of an `envs.video` source where the image is blue."""

    lasting = ("source",)

    def __init__(self, source):
        self.source = source

    def seed(self, seed: int) -> None:
        self.source.seed(seed)

    def paint(self, image: np.ndarray, first: bool) -> np.ndarray:
        return matte(image, self.source(first))
