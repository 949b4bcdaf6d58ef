"""Run the DMC-GS environments of a checkout of upstream (github.com/bit1029public/HRSSM) on current libraries."""

import functools
import importlib
import importlib.util
import sys
import types
from pathlib import Path

import gymnasium
import numpy as np
import torch
from PIL import Image


class Wrapper:
    """As gym's: public names are looked up in the wrapped environment, private ones are not."""

    def __init__(self, env):
        self.env = env

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.env, name)


def load(root: Path):
    """Upstream's module `env.wrappers`, with stand-ins for what is gone from gym, numpy, MuJoCo and dm_control."""
    from dm_control import suite
    from dm_control.mujoco import wrapper
    from dm_control.suite import common

    specs = {}

    def register(id, entry_point, kwargs, max_episode_steps):
        specs[id] = entry_point, kwargs, max_episode_steps

    def make(id):
        entry_point, kwargs, max_episode_steps = specs.pop(id)  # or the next one would get this one's settings
        module, name = entry_point.split(":")
        env = getattr(importlib.import_module(module), name)(**kwargs)
        env._max_episode_steps = max_episode_steps
        return env

    def module(name, **members):
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(members)
        return sys.modules[name]

    registration = module("gym.envs.registration", register=register)
    registry = module("gym.envs", registry=types.SimpleNamespace(env_specs=specs), registration=registration)
    core = module("gym.core", Env=object)
    module("gym", Wrapper=Wrapper, Env=object, spaces=gymnasium.spaces, core=core, envs=registry, make=make)
    to_pil_image = lambda picture: Image.fromarray(picture.permute(1, 2, 0).numpy())  # noqa: E731
    functional = module("torchvision.transforms.functional", to_pil_image=to_pil_image)
    module("torchvision.transforms", functional=functional)
    module("torchvision", transforms=sys.modules["torchvision.transforms"])

    np.int = int
    wrapper.MjModel.tex_rgb = property(lambda model: model.tex_data)
    if not hasattr(common, "settings"):
        path = root / "setup/dm_control/dm_control/suite/common/settings.py"
        spec = importlib.util.spec_from_file_location("dm_control.suite.common.settings", path)
        common.settings = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(common.settings)
        xml = common.settings.get_model_and_assets_from_setting_kwargs
        common.settings.get_model_and_assets_from_setting_kwargs = lambda *args: _as_bytes(*xml(*args))
        stock = suite.load
        suite.load = lambda *args, setting_kwargs=None, **kwargs: stock(*args, **kwargs)
    sys.path.insert(0, str(root))
    loaded = importlib.import_module("env.wrappers")
    loaded.torch = types.SimpleNamespace(**vars(torch) | {"load": functools.partial(torch.load, weights_only=False)})
    return loaded


def _as_bytes(model, assets):
    """MuJoCo no longer takes text as an asset."""
    return model, {name: text.encode() if isinstance(text, str) else text for name, text in assets.items()}
