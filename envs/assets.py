"""Where files that no package brings are looked for: `$HRSSM_ASSETS`, then the path of a flag, then `~/.cache/hrssm`.

`setup/download.py SET` puts a set there; this module says where it is or how to get it.
"""

import os
import warnings
from pathlib import Path

from envs.task import EnvError

CACHE = "~/.cache/hrssm"
GENERATED = "GENERATED"  # a file of this name marks a set that was made up for trying out


def root() -> Path:
    """The folder that `setup/download.py` fills."""
    return Path(os.environ.get("HRSSM_ASSETS") or CACHE).expanduser()


def find(name: str, relative: str, flag_path: str | None = None) -> str:
    """Path of `relative` in the asset set `name`; `flag_path` is a folder that holds the set's files directly.

    Raises:
        EnvError: it is nowhere.
    """
    folders = [root() / name, *([Path(flag_path).expanduser()] if flag_path else []), Path(CACHE).expanduser() / name]
    for folder in folders:
        if (folder / relative).exists():
            if (folder / GENERATED).exists():
                warnings.warn(f"{folder} holds generated stand-ins: results compare with nothing", stacklevel=2)
            return str(folder / relative)
    raise EnvError(f"{relative} is not in {folders[0]}: get it with python setup/download.py {name}")
