"""Finds files that come with no package: in `$HRSSM_ASSETS`, then the path given by a flag, then `~/.cache/hrssm`.

`setup/download.py SET` downloads a set; this module locates it, or says how to get it.
"""

import os
import warnings
from pathlib import Path

from envs.task import EnvError

CACHE = "~/.cache/hrssm"
GENERATED = "GENERATED"  # a file of this name marks a generated stand-in


def root() -> Path:
    """The folder that `setup/download.py` fills."""
    return Path(os.environ.get("HRSSM_ASSETS") or CACHE).expanduser()


def find(name: str, relative: str, flag_path: str | None = None) -> str:
    """Path of `relative` in the asset set `name`; `flag_path` is a folder that contains the set's files directly.

    Raises:
        EnvError: not found.
    """
    folders = [Path(flag_path).expanduser()] if flag_path else []
    folders.insert(0 if os.environ.get("HRSSM_ASSETS") else len(folders), root() / name)
    for folder in [*folders, Path(CACHE).expanduser() / name]:
        if (folder / relative).exists():
            if (folder / GENERATED).exists():
                warnings.warn(f"{folder} holds generated stand-ins: results on them are not comparable", stacklevel=2)
            return str(folder / relative)
    raise EnvError(f"{relative} is not in {root() / name}: get it with python setup/download.py {name}")
