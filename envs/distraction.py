"""The base class of all distractions of the control suite, and helpers they share."""

from xml.etree import ElementTree

import numpy as np

# file -> (tag, name) -> attributes to set
Edits = dict[str, dict[tuple[str, str], dict[str, str]]]


class Distraction:
    """Hooks that `envs.dmc.ControlSuite` calls in this order. By default they do nothing.

    `lasting` names the attributes that carry over between episodes (see `envs.task.get_state`).
    """

    lasting: tuple[str, ...] = ()

    def seed(self, seed: int) -> None:
        """Reseed the random stream."""

    def attach(self, xml: str, assets: dict[str, bytes]) -> None:
        """Called once, first, with the XML and assets from which the model was built."""

    def before_reset(self, physics) -> None:
        """Before the simulator is reset."""

    def after_reset(self, physics) -> None:
        """After the simulator is reset, before it renders."""

    def after_step(self, physics, last: bool) -> None:
        """After every simulator step; `last` if it renders next."""

    def paint(self, image: np.ndarray, first: bool) -> np.ndarray:
        """Turn the rendered image (H, W, 3) uint8 into the observed one; `first` after a reset."""
        return image


def upload_texture(physics, index: int) -> None:
    """Upload a texture after `physics.model.tex_data` has changed; each GL context has its own copy."""
    import mujoco  # imported after MUJOCO_GL is chosen

    call_gl(physics, mujoco.mjr_uploadTexture, physics.model.ptr, physics.contexts.mujoco.ptr, index)


def call_gl(physics, function, *args):
    """Call `function(*args)` with the simulator's GL context current."""
    with physics.contexts.gl.make_current() as context:
        return context.call(function, *args)


def edit_assets(assets: dict[str, bytes], edits: Edits) -> dict[str, bytes]:
    """A copy of the XML `assets` with `edits` applied."""
    edited = dict(assets)
    for file, elements in edits.items():
        root = ElementTree.fromstring(assets[file])
        for (tag, name), attributes in elements.items():
            root.find(f".//{tag}[@name='{name}']").attrib.update(attributes)
        edited[file] = ElementTree.tostring(root)
    return edited
