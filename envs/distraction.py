"""What a distraction may do to an environment of the control suite: the base class of all, and their common tools."""

from xml.etree import ElementTree

import numpy as np

# file -> (tag, name) -> attributes to set
Edits = dict[str, dict[tuple[str, str], dict[str, str]]]


class Distraction:
    """Hooks that `envs.dmc.ControlSuite` calls, in this order, around its simulator. All do nothing here.

    `lasting` names the attributes that carry over from one episode to the next (see `envs.task.get_state`).
    """

    lasting: tuple[str, ...] = ()

    def seed(self, seed: int) -> None:
        """Start the random stream anew."""

    def attach(self, xml: str, assets: dict[str, bytes]) -> None:
        """What the simulator's model was built from, once, before anything else."""

    def before_reset(self, physics) -> None:
        """An episode is about to begin."""

    def after_reset(self, physics) -> None:
        """The simulator stands in its first state; its picture has not been taken."""

    def after_step(self, physics, last: bool) -> None:
        """The simulator has moved by one frame, the `last` before a picture or not."""

    def paint(self, image: np.ndarray, first: bool) -> np.ndarray:
        """The observed picture (H, W, 3) uint8 made from the rendered one; `first` in an episode or not."""
        return image


def upload_texture(physics, index: int) -> None:
    """Show a texture that was changed in `physics.model.tex_data`; each GL context has a copy of its own."""
    import mujoco  # not before MUJOCO_GL is chosen

    call_gl(physics, mujoco.mjr_uploadTexture, physics.model.ptr, physics.contexts.mujoco.ptr, index)


def call_gl(physics, function, *args):
    """`function(*args)` where the simulator's GL context is current."""
    with physics.contexts.gl.make_current() as context:
        return context.call(function, *args)


def edit_assets(assets: dict[str, bytes], edits: Edits) -> dict[str, bytes]:
    """A copy of XML `assets` with attributes changed."""
    edited = dict(assets)
    for file, elements in edits.items():
        root = ElementTree.fromstring(assets[file])
        for (tag, name), attributes in elements.items():
            root.find(f".//{tag}[@name='{name}']").attrib.update(attributes)
        edited[file] = ElementTree.tostring(root)
    return edited
