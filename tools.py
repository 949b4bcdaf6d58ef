"""Configuration, seeding, clocks, optimiser, replay, logger and checkpoint. Knows nothing about world models."""

import contextlib
import copy
import ctypes
import difflib
import fcntl
import functools
import hashlib
import importlib.metadata
import inspect
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import zipfile
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

# The first optimiser loads this anyway, and with it Triton, whose LLVM crashes if Mesa's LLVM (a renderer in this
# process) is there before it.
import torch._dynamo
import torch.distributed as dist
import torch.utils._pytree as pytree
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import MarkedYAMLError
from scipy import ndimage, signal
from torch import Tensor, nn
from tqdm import tqdm


class UserError(Exception):
    """An error the user can fix; the message is one line that says how."""


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file atomically: `path` is replaced only after the new content is synced to disk."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        part.unlink(missing_ok=True)  # do not leave a full disk fuller
        raise
    os.replace(part, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn disk errors while writing to `folder` into a UserError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save raises another one over it
        if not isinstance(cause, OSError):
            raise
        raise UserError(
            f"cannot write to {folder} ({cause.strerror or cause}): make room or make it writable; the same command "
            "then goes on from the last checkpoint"
        ) from error


@contextlib.contextmanager
def reading(what: str, fix: str) -> Iterator[None]:
    """Turn errors from file contents of another structure into the UserError `what: REASON; fix`."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError) as error:
        # The first line of torch's own errors only names the class.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[min(1, len(lines) - 1)][:200] if lines else ""
        raise UserError(f"{what}: {type(error).__name__}: {reason}; {fix}") from error


def check_out(path: str | Path) -> None:
    """Raise UserError if no file can be written at `path`; to be called before the work that fills it."""
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"--out {path} cannot be written: name a file in a folder that exists and is writable")


class Heartbeat:
    """Says when a log file, which shows no progress bar, should get a sign of life."""

    SECONDS = 30.0

    def __init__(self):
        self.last = time.monotonic()

    def due(self) -> bool:
        if time.monotonic() - self.last < self.SECONDS or sys.stdout.isatty():
            return False
        self.last = time.monotonic()
        return True


def say(text: str) -> None:
    print(text, flush=True)


def lock(folder: Path) -> int:
    """Create `folder` and lock it for this process. The lock is released when the returned file descriptor is closed
    or the process exits for any reason.

    Raises UserError if another process holds the lock or the folder is not writable. On file systems without locks
    (some NFS) it only warns.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is training in {folder}: wait for it, or choose another --logdir") from None
    except OSError as error:
        warn(f"{folder} cannot be locked ({error.strerror}): make sure that only one process trains there")
    return file


# --- configuration --------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent
CONFIGS = ROOT / "configs.yaml"
PACKAGES = ("torch", "numpy", "mujoco", "dm_control", "gymnasium")

# The notes of configs.yaml that are not allowed values, and what --help prints of them.
NOTES = {"resume": "may change on resume", "no effect": "no effect", "regex": "", "column": "", "2 items": ""}


class Option(NamedTuple):
    """What configs.yaml says about an option. Its header explains the notes in brackets."""

    default: object
    section: str
    comment: str
    notes: list[str]

    @property
    def allowed(self) -> list[str]:
        """Words, numbers and ranges; empty if any value will do."""
        return [value for note in self.notes if note not in NOTES for value in note.split("|")]

    @property
    def may_change(self) -> bool:
        """Whether a resumed run may change it, since it does not alter what has been learnt so far."""
        return not {"resume", "no effect"}.isdisjoint(self.notes)


class Preset(NamedTuple):
    comment: str
    values: dict


def read_options(path: Path = CONFIGS) -> tuple[dict[str, Option], dict[str, Preset]]:
    """Options by dotted name, and presets, of a configuration file; shared, not to be changed. Raises UserError."""
    try:
        return _read_options(path.read_text())
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise UserError(f"{path}, line {line}: {' '.join(str(error.problem).split())}") from error


@functools.cache
def _read_options(text: str) -> tuple[dict[str, Option], dict[str, Preset]]:
    blocks = YAML().load(text)  # round trip: keeps comments, and makes nothing but plain data
    options: dict[str, Option] = {}
    section = ""

    def comments(node: CommentedMap, key: str) -> list[str]:
        """The comment beside a key, and those on the lines between it and the next key."""
        token = node.ca.items.get(key, [None] * 3)[2]
        return [line.strip().removeprefix("# ") for line in token.value.split("\n")] if token else [""]

    def read(node: CommentedMap, prefix: str) -> None:
        nonlocal section
        for key, value in node.items():
            comment, *headings = comments(node, key)
            if isinstance(value, CommentedMap):
                read(value, f"{prefix}{key}.")
            else:
                comment, bracket, rest = comment.partition("  [")
                notes = rest.removesuffix("]").split("] [") if bracket else []
                options[prefix + key] = Option(convert(value, value, key), section, comment, notes)
            section = next(filter(None, reversed(headings)), section)

    first = blocks["defaults"].ca.comment
    section = first[1][-1].value.strip().removeprefix("# ") if first and first[1] else ""
    read(blocks["defaults"], "")
    names = [name for name in blocks if name != "defaults"]
    return options, {name: Preset(comments(blocks, name)[0], flatten(blocks[name])) for name in names}


def marked(note: str) -> list[str]:
    """Names of the options with this note."""
    return [key for key, option in read_options()[0].items() if note in option.notes]


def flatten(tree: dict, prefix: str = "") -> dict:
    """Nested dictionaries to one level, keys joined by dots."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def unflatten(flat: dict) -> dict:
    """Inverse of `flatten`."""
    tree = {}
    for key, value in flat.items():
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def convert(value, default, name: str):
    """Convert `value`, text or YAML, to the type of `default`: bool, int, float, str, a list of these; None means str.

    Integers may be written 1e3. Lists are separated by commas; an empty default makes a list of str. Raises UserError.
    """
    if isinstance(default, list):
        items = value if isinstance(value, list) else str(value).split(",") if value != "" else []
        return [convert(item, default[0] if default else "", name) for item in items]
    if isinstance(value, list | dict):
        raise UserError(f"{name} takes a single value, not {value!r}")
    if default is None or isinstance(default, str):
        return value if value is None and default is None else str(value)
    text = str(value).strip()
    if isinstance(default, bool):
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise UserError(f"{name} takes True or False, not {value!r}")
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if isinstance(default, int):
        if number.is_integer():
            return int(number)
        raise UserError(f"{name} takes a whole number, not {value!r}")
    if math.isfinite(number):
        return number
    raise UserError(f"{name} takes a number, not {value!r}")


def options_of(constructor: Callable, config, *prefixes: str) -> dict:
    """Keyword arguments for `constructor`: the options of `config` named `prefix_name` or else `name`."""
    options = {}
    for name, parameter in inspect.signature(constructor).parameters.items():
        known = [option for option in (*(f"{prefix}_{name}" for prefix in prefixes), name) if hasattr(config, option)]
        if known and parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            options[name] = getattr(config, known[0])
    return options


def did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, known, 1)
    return f"did you mean {close[0]}?" if close else "--help lists what exists"


def split_range(text: str) -> tuple[str, str] | None:
    """Ends of the range `low .. high`, "" where it has none; None if `text` is no range."""
    low, dots, high = (part.strip() for part in text.partition(".."))
    return (low, high) if dots else None


def is_allowed(value, allowed: str, config: dict) -> bool:
    """Whether `value` is a word, a number or in a range of the notes. Ends may be options of the flat `config`."""
    ends = split_range(allowed)
    if ends is None:
        if isinstance(value, str):
            return re.fullmatch(re.escape(allowed).replace(":N", r":\d+"), value) is not None
        return value == float(allowed)
    low, high = (end.lstrip("<>") for end in ends)
    least, most = (float(config.get(end, end or math.nan)) for end in (low, high))
    too_low = value <= least if ends[0].startswith(">") else value < least
    too_high = value >= most if ends[1].startswith("<") else value > most
    return not too_low and not too_high


def describe_allowed(option: Option, config: dict | None = None) -> str:
    """The allowed values in words; with `config` also the values of options that are ends of a range."""

    def end(text: str) -> str:
        name = text.lstrip("<>")
        return f"{name} ({config[name]})" if config and name in config else name

    def words(allowed: str) -> str:
        ends = split_range(allowed)
        if ends is None:
            return allowed
        low, high = ends
        above, below = low.startswith(">"), high.startswith("<")
        lower = f"{'above' if above else 'from'} {end(low)}" if low else ""
        upper = f"{'up to' if above or not low else 'to'} {'below ' if below else ''}{end(high)}" if high else ""
        return f"{lower} {upper}".strip()

    ranges = sorted(filter(split_range, option.allowed))
    others = [allowed for allowed in option.allowed if allowed not in ranges]
    return " or ".join(filter(None, [*map(words, ranges), ", ".join(others)]))


def check_value(name: str, value, option: Option, config: dict) -> None:
    """Raise UserError if `value` of the option, which the user knows as `name`, is not what its notes allow."""
    items = value if isinstance(value, list) else [value]
    if "2 items" in option.notes and len(items) != 2:
        raise UserError(f"{name} takes two values separated by a comma: {option.comment}")
    for item in items:
        if "regex" in option.notes:
            try:
                re.compile(item)
            except (re.error, OverflowError, RecursionError) as error:
                raise UserError(f"{name} takes a regular expression, not {item!r}: {error}") from None
        if option.allowed and not any(is_allowed(item, allowed, config) for allowed in option.allowed):
            kind = {int: "a whole number ", float: "a number "}.get(type(item), "")
            kind = kind if any(map(split_range, option.allowed)) else ""
            shown = repr(item).removesuffix(".0")
            close = difflib.get_close_matches(str(item), option.allowed, 1) if isinstance(item, str) else []
            hint = f": did you mean {close[0]}?" if close else ""
            raise UserError(f"{name} takes {kind}{describe_allowed(option, config)}, not {shown}{hint}")


def parse_flags(argv: list[str], defaults: dict) -> tuple[list[str], dict[str, str]]:
    """Preset names and flags (dotted key -> text) of a command line. Raises UserError."""
    tokens, presets, flags = deque(argv), [], {}

    def has_value() -> bool:
        return bool(tokens) and not tokens[0].startswith("--")

    while tokens:
        token = tokens.popleft()
        if not token.startswith("--"):
            raise UserError(f"unexpected argument {token!r}: options are written --key value")
        key, equals, value = token[2:].partition("=")
        if key == "configs":
            names = [value] if equals else []
            while has_value():
                names.append(tokens.popleft())
            if not names:
                raise UserError("--configs needs the name of at least one preset")
            presets += names
            continue
        if key not in defaults:
            parts = [name for name in defaults if name.startswith(f"{key}.")]
            if parts:
                raise UserError(f"--{key} is a group: set its entries, --{' --'.join(parts)}")
            raise UserError(f"unknown option --{key}: {did_you_mean(key, [*defaults, 'configs'])}")
        if not equals:
            if has_value():
                value = tokens.popleft()
            elif isinstance(defaults[key], bool):
                value = "True"
            else:
                raise UserError(f"--{key} needs a value")
        flags[key] = value
    return presets, flags


def load_config(argv: list[str], path: Path = CONFIGS) -> SimpleNamespace:
    """Defaults of `path`, presets of `--configs A B` in order, then flags; nested groups are plain dictionaries.

    Flags: `--key value`, `--key=value`, `--group.key value`, bare `--switch` for True. `--help` prints all and exits.
    `--eval_only` takes the options of the run in `--logdir` in place of presets, unless `--init_from` names weights.
    Raises UserError for unknown presets and options, and for values of a wrong type or other than the notes of `path`
    allow. Warns of flags without effect.
    """
    options, blocks = read_options(path)
    if not {"-h", "--help"}.isdisjoint(argv):
        print(help_text(options, blocks))
        sys.exit(0)
    defaults = {key: option.default for key, option in options.items()}
    presets, flags = parse_flags(argv, defaults)
    config = copy.deepcopy(defaults)
    names = {key: f"--{key}" for key in defaults}

    def update(key: str, value, name: str) -> None:
        if key not in defaults:
            raise UserError(f"unknown option {name}: {did_you_mean(key, defaults)}")
        config[key], names[key] = convert(value, defaults[key], name), name

    saved = saved_options(flags)
    for key, value in saved.items():
        if key in defaults:
            update(key, value, f"{key} in {flags['logdir']}/config.json")
    for preset in presets:
        if preset not in blocks:
            raise UserError(f"unknown preset {preset}: there are {', '.join(blocks)}; {did_you_mean(preset, blocks)}")
        if saved:
            continue
        for key, value in blocks[preset].values.items():
            update(key, value, f"{key} in preset {preset}")
    for key, value in flags.items():
        update(key, value, f"--{key}")
    for key in sorted(options, key=lambda key: key not in flags):  # what was just typed first
        option = options[key]
        check_value(names[key], config[key], option, config)
        if key in flags and "no effect" in option.notes and config[key] != option.default:
            warn(f"--{key} has no effect: it is accepted so that upstream's command lines run")
    return SimpleNamespace(**unflatten(config))


def saved_options(flags: dict[str, str]) -> dict:
    """Options by dotted name of the run that `--eval_only` evaluates or `--record` plays, else {}."""
    plays = flags.get("eval_only", "").lower() == "true"
    plays = plays or (bool(flags.get("record")) and flags.get("record_policy", "agent") == "agent")
    if not plays or "init_from" in flags or "logdir" not in flags:
        return {}
    saved = read_config(Path(flags["logdir"]).expanduser())
    # A final evaluation under other options must not take the place of the run's own unless it is asked for.
    own = {"logdir", "init_from", "fresh", "eval_only", "final_episodes"}
    return {key: value for key, value in flatten(saved["config"]).items() if key not in own} if saved else {}


def run_config(logdir: str | Path) -> SimpleNamespace:
    """The options of the run in `logdir`; those added since it was made have their defaults. Raises UserError."""
    if read_config(Path(logdir).expanduser()) is None:
        raise UserError(f"{logdir} holds no run")
    return load_config(["--eval_only", f"--logdir={logdir}"])


def help_text(options: dict[str, Option], presets: dict[str, Preset]) -> str:
    lines = [
        "usage: python dreamer.py [--configs PRESET ...] [--key value ...]",
        "",
        "Presets (as many as wanted; later ones win)",
    ]
    lines += [f"  {name:<22} {preset.comment}" for name, preset in presets.items()]
    section = ""
    for key, (default, heading, comment, notes) in options.items():
        if heading != section:
            lines, section = [*lines, "", heading], heading
        kind = type(default).__name__ if default is not None else "str"
        shown = ",".join(map(str, default)) if isinstance(default, list) else default
        remarks = [describe_allowed(options[key]), *(NOTES.get(note, "") for note in notes)]
        remark = "; ".join(filter(None, remarks))
        lines.append(f"  {f'--{key} {kind} = {shown}':<42} {comment}" + (f" ({remark})" if remark else ""))
    return "\n".join(lines)


def git_state(folder: Path) -> dict:
    """Commit of the checkout at `folder` and whether it has uncommitted changes; both None without git."""

    def git(*args: str) -> str | None:
        try:
            return subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    changes = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def read_config(logdir: Path) -> dict | None:
    """The config.json of a run: {config, runs: [{command, time, device, git, versions}]}; None if there is none yet."""
    path = Path(logdir) / "config.json"
    try:
        saved = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path} ({error}): use another --logdir") from error
    parts = [saved.get("config"), saved.get("runs")] if isinstance(saved, dict) else []
    if list(map(type, parts)) != [dict, list] or not all(isinstance(start, dict) for start in parts[1]):
        raise UserError(f"{path} was not written by this program: use another --logdir")
    return saved


def provenance(config: SimpleNamespace) -> dict:
    """When, where and with which code a result is made."""
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "git": git_state(ROOT),
        "versions": {"python": sys.version.split()[0], **{name: package_version(name) for name in PACKAGES}},
    }


def config_hash(config: SimpleNamespace) -> str:
    """Of the options that a resumed run may not change."""
    options, flat = read_options()[0], flatten(vars(config))
    text = json.dumps({key: flat[key] for key in sorted(flat) if not options[key].may_change})
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_final_evaluation(logdir: Path) -> dict | None:
    """final_eval.json of a run (see `dreamer.final_evaluation`), None if there is none or it is not readable."""
    try:
        found = json.loads((Path(logdir) / "final_eval.json").read_text())
        return found if {"step", "episodes", "evaluations"} <= found.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def save_config(config: SimpleNamespace, logdir: Path, argv: list[str]) -> None:
    """Write the resolved config to logdir/config.json and add this start to its list of runs. Raises UserError."""
    logdir = Path(logdir)
    saved = read_config(logdir) or {"runs": []}
    run = {"command": [sys.argv[0], *argv], **provenance(config)}
    text = json.dumps({"config": vars(config), "runs": [*saved["runs"], run]}, indent=2)
    try:
        logdir.mkdir(parents=True, exist_ok=True)
        write_atomic(logdir / "config.json", lambda file: file.write(text.encode()))
    except OSError as error:
        raise UserError(f"cannot write to --logdir {logdir}: {error.strerror}") from error


def differences(config: SimpleNamespace, logdir: Path) -> dict[str, str]:
    """What `config` changes in the run in `logdir`, as `seed was 0, now 1`, by option."""
    saved = read_config(logdir)
    if saved is None:
        return {}
    # A run started before an option existed used its default.
    old = {key: option.default for key, option in read_options()[0].items()} | flatten(saved["config"])
    new = flatten(vars(config))
    return {key: f"{key} was {old[key]!r}, now {new[key]!r}" for key in old if key in new and old[key] != new[key]}


def check_config(config: SimpleNamespace, logdir: Path) -> None:
    """Raise UserError, listing the differences, if `logdir` holds a run with another configuration."""
    changes = differences(config, logdir)
    fixed = [changes[key] for key, option in read_options()[0].items() if key in changes and not option.may_change]
    if fixed:
        raise UserError(
            f"{logdir} holds a run with another configuration ({'; '.join(fixed)}): give the old values to resume it, "
            "choose another --logdir, or start anew there with --fresh"
        )


# All that a run writes to its folder, apart from locks.
RUN_FILES = ("config.json", "metrics.jsonl", "latest*.pt", "replay", "video", "events.out.tfevents*", "nan_*.npz")
RUN_FILES += ("openloop.csv", "trace.json", "eval_only.json", "final_eval.json", "rank[0-9]*")
REPLACED = "replaced"


def replace_run(logdir: Path) -> None:
    """`--fresh`: move the files of the run in `logdir`, if there is one, to logdir/replaced/N."""
    paths = [path for pattern in RUN_FILES for path in logdir.glob(pattern)]
    if not paths:
        return
    file = lock(logdir)
    try:
        with writing(logdir):
            number = next(n for n in range(1, 10**6) if not (logdir / REPLACED / str(n)).exists())
            target = logdir / REPLACED / str(number)
            target.mkdir(parents=True)
            for path in paths:
                path.rename(target / path.name)
    finally:
        os.close(file)
    say(f"The run that was in {logdir} is now in {target}; delete it if you do not need it.")


def check_checkpoint_lost(logdir: Path) -> None:
    """Raise UserError if a run without a checkpoint left files in `logdir`. A run saves one before anything else."""
    if any(logdir.glob("replay/*.npz")) or (logdir / "metrics.jsonl").exists():
        raise UserError(
            f"{logdir} holds metrics or replay of a run, but neither latest.pt nor latest.prev.pt: restore one of "
            "them, or start anew with --fresh, which moves these files away"
        )


# --- seeding and threads --------------------------------------------------------------------------------------------


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def enable_deterministic() -> None:
    """Make results repeatable for a given seed, on CUDA too; operations without a deterministic version raise."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    # By default torch then also fills new memory with NaN, which is slow and only helps debugging.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def rng_state() -> dict:
    """State of the global random generators of python, numpy and torch; can be loaded with `weights_only`."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": json.dumps(random.getstate()),
        "numpy": json.dumps([kind, np.asarray(keys).tolist(), position, has_gauss, gauss]),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict) -> None:
    version, internal, gauss = json.loads(state["python"])
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(json.loads(state["numpy"]))
    torch.set_rng_state(state["torch"].cpu())
    # On a machine with another number of GPUs the generators there keep their state.
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([generator.cpu() for generator in state["cuda"]])


def keep_memory() -> None:
    """Make glibc keep freed memory instead of returning large blocks to the kernel.

    Activations are freed and reallocated every update; keeping their memory made updates 1.15 times faster. Without
    glibc this does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for parameter, value in ((-3, 2**30), (-1, 2**31 - 1), (-2, 2**28)):  # mmap threshold, trim threshold, top pad
        mallopt(parameter, value)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Move to `device`; copies to a GPU are asynchronous."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and not x.is_cuda else x.to(device)


def has_bfloat16() -> bool:
    """Whether the CPU has bfloat16 instructions."""
    return any(has for name, has in torch.cpu.get_capabilities().items() if "bf16" in name)


def default_threads(workers_busy: int) -> int:
    """Number of cores available to this process minus those used by busy workers; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores - workers_busy)


def start_trace(path: Path, steps: int) -> torch.profiler.profile:
    """A profiler that skips two steps and writes the next `steps` to `path`, for perfetto.dev; call its `step`."""

    def export(profiler: torch.profiler.profile) -> None:
        with writing(path.parent):
            profiler.export_chrome_trace(str(path))
        say(f"Profile: {path}, to be opened at https://ui.perfetto.dev.")

    trace = torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1),
        on_trace_ready=export,
    )
    trace.start()
    return trace


# --- ranks: processes that train together ---------------------------------------------------------------------------


def start_ranks(device: torch.device) -> tuple[int, int]:
    """Join the process group if torchrun started this process; returns rank and number of ranks, (0, 1) without it."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # Long, because all ranks wait while rank 0 evaluates.
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=timedelta(hours=6))
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def stop_ranks() -> None:
    """At the end of a run that went well; after an error the others are not there to say goodbye to."""
    if several_ranks():
        dist.destroy_process_group()


def several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextlib.contextmanager
def communicating():
    """Raise UserError where another rank is not there any more; its error is the one to read."""
    try:
        yield
    except RuntimeError as error:
        raise UserError("another process of this run has ended: see what it says") from error


def gather_ranks(x: Tensor, gradient: bool = False) -> Tensor:
    """Rows (n, ...) of every rank -> (ranks * n, ...).

    With `gradient` the own rows carry theirs, times the number of ranks: averaged over ranks (`average_ranks`), the
    gradient of a loss on all rows is then that of one process.
    """
    if not several_ranks():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    with communicating():
        dist.all_gather(parts, x.detach().contiguous())
    if gradient:
        parts[dist.get_rank()] = x + (len(parts) - 1) * (x - x.detach())
    return torch.cat(parts)


def average_ranks(tensors: list[Tensor]) -> None:
    """Replace each tensor by its mean over all ranks."""
    if not several_ranks() or not tensors:
        return
    flat = torch.cat([x.flatten() for x in tensors])
    with communicating():
        dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for x, mean in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
        x.copy_(mean.view_as(x))


def any_rank(flag: bool) -> bool:
    """Whether `flag` is set on any rank; a collective call."""
    if not several_ranks():
        return flag
    flags = torch.tensor(float(flag))
    with communicating():
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


# --- clocks ---------------------------------------------------------------------------------------------------------


class Every:
    """Counts how often something is due: once at the first call, then every `every` steps; 0 means never.

    Remainders carry over to the next period, so the average rate is right for any stride of `step`.
    """

    def __init__(self, every: float):
        self.every, self.last = every, None

    def __call__(self, step: int) -> int:
        if not self.every:
            return 0
        if self.last is None:
            self.last = step
            return 1
        count = int((step - self.last) / self.every)
        self.last += self.every * count
        return count

    def state_dict(self) -> dict:
        return {"last": self.last}

    def load_state_dict(self, state: dict) -> None:
        self.last = state["last"]


class Once:
    """True at the first call only."""

    def __init__(self):
        self.once = True

    def __call__(self) -> bool:
        due, self.once = self.once, False
        return due

    def state_dict(self) -> dict:
        return {"once": self.once}

    def load_state_dict(self, state: dict) -> None:
        self.once = state["once"]


class Until:
    """True while `step` is below `until`; always true if `until` is 0. Stateless."""

    def __init__(self, until: int):
        self.until = until

    def __call__(self, step: int) -> bool:
        return not self.until or step < self.until


# --- optimiser ------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    # One kernel for all tensors, on the CPU too.
    "adam": lambda params, lr, eps: torch.optim.Adam(params, lr=lr, eps=eps, fused=True),
    "adamax": lambda params, lr, eps: torch.optim.Adamax(params, lr=lr, eps=eps),
    "nadam": lambda params, lr, eps: torch.optim.NAdam(params, lr=lr, eps=eps),
    "sgd": lambda params, lr, eps: torch.optim.SGD(params, lr=lr),
    "momentum": lambda params, lr, eps: torch.optim.SGD(params, lr=lr, momentum=0.9),
}


class Optimizer:
    """Backward pass, clipping of the global gradient norm, weight decay and step, in this order.

    Parameters without gradient are skipped. `clip` 0 means no clipping. `weight_decay` is the fraction of a weight
    removed per update, independent of the learning rate.
    """

    def __init__(
        self,
        name: str,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        eps: float,
        clip: float,
        weight_decay: float = 0.0,
        opt: str = "adam",
    ):
        self.name, self.params = name, list(params)
        self.clip, self.weight_decay = clip or math.inf, weight_decay
        self.optimizer = OPTIMIZERS[opt](self.params, lr, eps)

    def step(self, loss: Tensor, retain_graph: bool = False) -> dict[str, Tensor]:
        """One update; returns the loss and the gradient norm before clipping, both 0-d tensors.

        Gradients are computed for this optimiser's parameters only.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward(inputs=self.params, retain_graph=retain_graph)
        average_ranks([p.grad for p in self.params if p.grad is not None])
        norm = nn.utils.clip_grad_norm_(self.params, self.clip)
        # What is made during a recording would be made anew by every replay.
        assert not (CudaGraphs.recording and self._without_state()), f"{self.name}: make_capturable comes first"
        if self.weight_decay:
            with torch.no_grad():
                torch._foreach_mul_([p for p in self.params if p.grad is not None], 1.0 - self.weight_decay)
        self.optimizer.step()
        return {f"{self.name}_loss": loss.detach(), f"{self.name}_grad_norm": norm.detach()}

    def make_capturable(self) -> None:
        """Let a CUDA graph hold the step: counters on the device, and all that the first step would make made now."""
        # Of the steps before a recording.
        warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
        for group in self.optimizer.param_groups:
            group["capturable"] = True
        self._make_state()

    def _without_state(self) -> list[nn.Parameter]:
        """Parameters whose state the next step with a gradient would make."""
        groups = [group for group in self.optimizer.param_groups if group.get("momentum") != 0]  # plain SGD has none
        return [p for group in groups for p in group["params"] if not self.optimizer.state.get(p)]

    def _make_state(self) -> None:
        """The state of each parameter that has none as it is before the first step: a step with gradients of 0."""
        if not (missing := self._without_state()):
            return
        own: list[Tensor] = list(missing)
        weights = [p.detach().clone() for p in missing]
        gradients = [p.grad for p in self.params]
        self.optimizer.zero_grad(set_to_none=True)
        for p in missing:
            p.grad = torch.zeros_like(p)
        self.optimizer.step()
        for p, gradient in zip(self.params, gradients, strict=True):
            p.grad = gradient
        with torch.no_grad():
            torch._foreach_copy_(own, weights)
            for p in missing:
                for name, value in self.optimizer.state[p].items():
                    value.fill_(1.0 if name == "mu_product" else 0.0)  # NAdam's product of momenta

    def state_dict(self) -> dict:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict) -> None:
        own = self.optimizer.state_dict()["state"]
        if not own or own.keys() != state["state"].keys():
            kept = [group.get("capturable") for group in self.optimizer.param_groups]
            self.optimizer.load_state_dict(state)
            # The checkpoint may come from another kind of device.
            for group, capturable in zip(self.optimizer.param_groups, kept, strict=True):
                group["capturable"] = capturable
            if any(kept):
                self._make_state()
            return
        # In place: what has been recorded on a GPU goes on with the same tensors.
        for index, values in own.items():
            for key, value in values.items():
                value.copy_(state["state"][index][key])


@torch.no_grad()
def ema_update(target: nn.Module, online: nn.Module, rate: float | Tensor) -> None:
    """target <- rate * online + (1 - rate) * target for all parameters; a tensor `rate` is not synchronised."""
    targets: list[Tensor] = list(target.parameters())
    values: list[Tensor] = list(online.parameters())
    if isinstance(rate, Tensor):
        torch._foreach_lerp_(targets, values, [rate] * len(targets))
    else:
        torch._foreach_lerp_(targets, values, rate)


# --- CUDA graphs ----------------------------------------------------------------------------------------------------


class CudaGraphs:
    """Runs `function` as a CUDA graph: thousands of kernels cost the host one launch.

    Arguments are tensors, values that decide what is done, and nests of both. For each combination of values and shapes
    the first calls run as they are, the next is recorded, and from then on the recording is replayed. So the function
    must do the same every time: fixed shapes, no look at a tensor's value, no state on the host. Results lie in memory
    that the next call of the same kind overwrites. Raises UserError if the recording fails: what CUDA and the allocator
    then hold is unknown, so there is no going on without.
    """

    WARMUP = 3
    recording = False
    # Held while one thread records, and by other threads while they use the device: a recording fails if memory is
    # allocated meanwhile, on the device or pinned.
    lock = threading.Lock()

    def __init__(self, function: Callable):
        self.function, self.calls, self.graphs = function, {}, {}
        self.stream = torch.cuda.Stream()

    def __call__(self, *args, **kwargs):
        leaves, structure = pytree.tree_flatten((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        key = (structure, *(x.shape if isinstance(x, Tensor) else x for x in leaves))
        self.calls[key] = self.calls.get(key, 0) + 1
        if self.calls[key] <= self.WARMUP:
            # Not on the default stream, where allocations and library workspaces would differ from those recorded.
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                outputs = self.function(*args, **kwargs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return outputs
        if key not in self.graphs:
            inputs = [x.clone() for x in tensors]
            static = iter(inputs)
            args, kwargs = structure.unflatten([next(static) if isinstance(x, Tensor) else x for x in leaves])
            self.graphs[key] = *self._record(args, kwargs), inputs
        graph, outputs, inputs = self.graphs[key]
        torch._foreach_copy_(inputs, tensors, non_blocking=True)
        graph.replay()
        return outputs

    def _record(self, args: tuple, kwargs: dict) -> tuple:
        """The graph, and where it leaves its results."""
        graph = torch.cuda.CUDAGraph()
        with CudaGraphs.lock:
            CudaGraphs.recording = True
            try:
                # Not "global", which would forbid the threads of NCCL and of pinned memory their calls.
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    outputs = self.function(*args, **kwargs)
            except RuntimeError as error:
                first: BaseException = error
                while isinstance(
                    first.__context__, RuntimeError
                ):  # the end of a broken recording raises another error over it
                    first = first.__context__
                reason = (str(first).strip() or repr(first)).splitlines()[0]
                raise UserError(f"recording a CUDA graph failed ({reason}): use --compile off") from error
            finally:
                CudaGraphs.recording = False
        return graph, outputs


# --- replay ---------------------------------------------------------------------------------------------------------


def available_memory() -> int | None:
    """Bytes available without swapping; None if unknown."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def describe_rows(values: Tensor | np.ndarray) -> list:
    """Shape and type of one row of an array of replay, as JSON types."""
    return [list(values.shape[1:]), str(values.dtype).removeprefix("torch.")]


GPU_SHARE = 0.7  # fraction of a GPU's free memory that replay may use


def use_device(device: torch.device) -> None:
    """Make a GPU the current one of this thread."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


@contextlib.contextmanager
def alone_on(device: torch.device) -> Iterator[None]:
    """Of a user's processes on one GPU only one is inside at a time."""
    file = None
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device).uuid  # its number depends on CUDA_VISIBLE_DEVICES
        with contextlib.suppress(OSError):
            file = open(Path(tempfile.gettempdir()) / f"hrssm-{os.getuid()}-{card}.lock", "w")  # noqa: SIM115
            fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if file is not None:
            file.close()


def smooth_rewards(reward: np.ndarray, kind: str) -> np.ndarray:
    """Rewards (T,) of an episode filtered along time, with the widths of DreamSmooth (Lee et al., 2024).

    'gaussian' has a deviation of 3 steps, ends repeated; 'ema' keeps 0.33 of the step before.
    """
    if kind == "gaussian":
        return ndimage.gaussian_filter1d(reward, 3.0, mode="nearest")
    return signal.lfilter([0.67], [1.0, -0.33], reward, zi=[0.33 * reward[0]])[0].astype(reward.dtype)


class Replay:
    """Episodes in one preallocated array per key, sampled with upstream's distribution.

    An episode is a list of slots (row numbers of the arrays). Free slots form a queue, so the arrays are used as a ring
    and their memory is only touched as it fills. Two rules decide what is kept:

    - When an episode ends, episodes are visited from the newest to the oldest and kept while the sum of their
      transitions (rows - 1) stays within `capacity`; one that does not fit is dropped, and older ones are still
      considered. Running episodes count and are never dropped.
    - There are `capacity + extra_rows` slots, room for running episodes and the additional row of each episode. If
      they run out before an episode ends, the oldest finished episode is dropped immediately.

    A batch row starts in an episode drawn with probability proportional to its length, at a uniform position other than
    the last, and is completed with the beginnings of other episodes drawn so. Single-row episodes are ignored.

    Batches are on `device`. On a GPU with enough memory all rows are kept there; otherwise in host memory, and
    the next batch is assembled and copied while the caller uses the current one (`prefetch`).

    With `smoothing` ('gaussian' or 'ema', see `smooth_rewards`) an episode is sampled only once it has ended, with
    filtered rewards.
    """

    def __init__(
        self,
        *,
        capacity: int,
        batch_size: int,
        batch_length: int,
        num_envs: int,
        seed: int,
        extra_rows: int = 0,
        device: torch.device | str = "cpu",
        prefetch: bool | None = None,
        smoothing: str = "none",
    ):
        self.smoothing = smoothing
        self.capacity, self.batch_size, self.batch_length = capacity, batch_size, batch_length
        self.num_envs, self.slots = num_envs, capacity + extra_rows
        self.device = torch.device(device)
        # On the CPU the learner uses all cores, and a batch is cheap.
        self.prefetch = self.device.type == "cuda" if prefetch is None else prefetch
        self.thread = ThreadPoolExecutor(1, "replay", use_device, (self.device,)) if self.prefetch else None
        self.rng = np.random.default_rng(seed)
        self.storage: dict[str, Tensor] = {}
        self.fresh, self.free = 0, deque()
        self.episodes: dict[int, array] = {}  # episode number -> slots, in order of opening
        self.open: dict[int, int] = {}  # environment -> number of its running episode
        self.opened = 0
        self.on_disk: dict[int, tuple[str, int]] = {}  # episode number -> file and first row there
        self.saves, self.recent_files = 0, []

    def __len__(self) -> int:
        """Number of stored rows."""
        return sum(map(len, self.episodes.values()))

    @property
    def num_episodes(self) -> int:
        return len(self.episodes)

    @property
    def num_transitions(self) -> int:
        return len(self) - self.num_episodes

    def add(self, rows: dict[str, np.ndarray], env_ids: Iterable[int] | None = None) -> None:
        """Append one row (n, ...) to the running episode of each of n environments, by default of all.

        Keys must not change; `is_first` (n,) starts a new episode. Floats are stored as float32; keys that begin with
        `log_` are dropped. Raises UserError if there is not enough memory.
        """
        env_ids = range(self.num_envs) if env_ids is None else env_ids
        slots = []
        for env, is_first in zip(env_ids, rows["is_first"], strict=True):
            if is_first:
                self.end(env)
                self.open[env] = self._new_episode(array("q"))
            slots.append(self._take_slot())
            self.episodes[self.open[env]].append(slots[-1])
        self._store(slots, rows)

    def extend(self, rows: dict[str, np.ndarray]) -> int:
        """Add a finished episode (T, ...) and return its number. Evicts nothing while there are slots."""
        slots = array("q", (self._take_slot() for _ in range(len(rows["is_first"]))))
        self._store(slots, rows)
        return self._new_episode(slots)

    def rows(self, number: int, start: int = 0, stop: int | None = None) -> dict[str, np.ndarray]:
        """Rows (T, ...) of an episode."""
        slots = torch.from_numpy(np.array(self.episodes[number][start:stop], np.int64))
        return {key: values[slots.to(values.device)].cpu().numpy() for key, values in self.storage.items()}

    def end(self, env: int) -> None:
        """Mark the running episode of `env` as complete and evict old ones. Implied by the next `is_first`."""
        if (number := self.open.pop(env, None)) is not None:
            if self.smoothing != "none":
                reward = self.storage["reward"]
                slots = torch.tensor(self.episodes[number], device=reward.device)
                smooth = smooth_rewards(reward[slots].cpu().numpy(), self.smoothing)
                reward[slots] = torch.from_numpy(smooth).to(reward)
            self._evict()

    def discard(self, env: int) -> None:
        """Forget the running episode of `env`, if there is one."""
        if (number := self.open.pop(env, None)) is not None:
            self._drop(number)

    def sample(self) -> dict[str, Tensor]:
        """A batch of new tensors (B,T,*), dtypes as stored; `is_first` is also True where a row starts or is spliced.

        Raises UserError if no episode has two rows.
        """
        return self._gather(*self._draw())

    def batches(self, count: int) -> Iterator[dict[str, Tensor]]:
        """Like `count` calls of `sample`. Add nothing until the last batch is out."""
        if not self.prefetch:
            yield from (self.sample() for _ in range(count))
            return
        coming = self.thread.submit(self._gather, *self._draw()) if count else None
        for left in reversed(range(count)):
            batch, before = coming.result(), self.rng.bit_generator.state
            if left:
                coming = self.thread.submit(self._gather, *self._draw())
            try:
                yield batch
            except GeneratorExit:  # the caller stops early: undo the draw made ahead
                self.rng.bit_generator.state = before
                raise

    def _draw(self) -> tuple[np.ndarray, np.ndarray]:
        """Slots (B,T) of a batch, and a mask (B,T) of where pieces of episodes start."""
        running = set() if self.smoothing == "none" else set(self.open.values())
        episodes = [slots for number, slots in self.episodes.items() if number not in running]
        rows = np.fromiter(map(len, episodes), np.int64, len(episodes))
        # Zero weight for episodes of one row is equivalent to redrawing when one comes up.
        ends = np.cumsum(np.where(rows < 2, 0, rows))
        if not len(ends) or not ends[-1]:
            until = "as --envs" if self.smoothing == "none" else "as the first episodes of all --envs are long together"
            raise UserError(f"replay holds nothing to sample yet: --prefill must be at least as large {until}")
        index = np.empty((self.batch_size, self.batch_length), np.int64)
        starts = np.zeros((self.batch_size, self.batch_length), bool)
        for b in range(self.batch_size):
            t = 0
            while t < self.batch_length:
                slots = episodes[np.searchsorted(ends, self.rng.integers(ends[-1]), side="right")]
                first = 0 if t else int(self.rng.integers(len(slots) - 1))
                piece = slots[first : first + self.batch_length - t]
                index[b, t : t + len(piece)] = piece
                starts[b, t] = True
                t += len(piece)
        return index, starts

    def _gather(self, index: np.ndarray, starts: np.ndarray) -> dict[str, Tensor]:
        with CudaGraphs.lock:
            return self._copy_rows(index, starts)

    def _copy_rows(self, index: np.ndarray, starts: np.ndarray) -> dict[str, Tensor]:
        place = self.storage["is_first"].device
        pinned = self.device.type == "cuda" and place.type == "cpu"
        slots = to_device(torch.from_numpy(index.ravel()), place)
        batch = {}
        for key, values in self.storage.items():
            rows = torch.empty((len(slots), *values.shape[1:]), dtype=values.dtype, device=place, pin_memory=pinned)
            torch.index_select(values, 0, slots, out=rows)
            batch[key] = rows.reshape(*index.shape, *values.shape[1:]).to(self.device, non_blocking=True)
        batch["is_first"] |= to_device(torch.from_numpy(starts), self.device)
        return batch

    def save(self, folder: Path) -> dict:
        """Write episodes that are not on disk yet to `folder`; returns the state for the checkpoint.

        Finished episodes go to one new file per save, running ones to another, since they may grow. Files that neither
        this save nor the two before it refer to are deleted, so the two latest checkpoints stay complete even if the
        process dies before the next one is written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        running = set(self.open.values())
        finished = [number for number in self.episodes if number not in running and number not in self.on_disk]
        self.on_disk |= self._write(folder, f"episodes-{self.saves:06d}.npz", finished)
        places = self.on_disk | self._write(folder, f"running-{self.saves:06d}.npz", list(self.open.values()))
        self.saves += 1
        entries = [[*places[number], len(slots)] for number, slots in self.episodes.items()]
        numbers = list(self.episodes)
        self.recent_files = [sorted({file for file, _, _ in entries}), *self.recent_files[:2]]
        for path in folder.glob("*.npz*"):
            if not any(path.name in files for files in self.recent_files):
                path.unlink()
        return {
            "episodes": entries,
            "capacity": self.capacity,
            "open": [[int(env), numbers.index(number)] for env, number in self.open.items()],
            "recent_files": self.recent_files,
            "saves": self.saves,
            "kinds": {key: describe_rows(values) for key, values in self.storage.items()},
            "rng": json.dumps(self.rng.bit_generator.state),
        }

    def load(self, folder: Path, state: dict) -> None:
        """Restore an empty replay from `save`, including running episodes; damaged files are skipped with a warning."""
        assert not self.episodes, "load into an empty replay"
        self.saves, self.recent_files = state["saves"], state["recent_files"]
        self.rng.bit_generator.state = json.loads(state["rng"])
        last_use = {file: i for i, (file, _, _) in enumerate(state["episodes"])}
        envs, files = {index: env for env, index in state["open"]}, {}
        kinds, needed = state.get("kinds"), {}
        for file, start, length in state["episodes"]:
            needed[file] = max(start + length, needed.get(file, 0))
        for i, (file, start, length) in enumerate(state["episodes"]):
            if file not in files:
                files[file] = self._read(Path(folder) / file, needed[file], kinds)
                kinds = kinds or {key: describe_rows(values) for key, values in files[file].items()}
            if rows := {key: values[start : start + length] for key, values in files[file].items()}:
                number = self.extend(rows)
                if i in envs:
                    self.open[envs[i]] = number
                else:
                    self.on_disk[number] = (file, start)
            if i == last_use[file]:
                del files[file]
        if state["episodes"] and not self.episodes:
            raise UserError(
                f"no file of {folder} is readable: restore them from a copy, or start anew with --fresh, which moves "
                "the run away"
            )
        if self.capacity < state["capacity"]:
            self._evict()

    def _new_episode(self, slots: array) -> int:
        self.opened += 1
        self.episodes[self.opened] = slots
        return self.opened

    def _take_slot(self) -> int:
        if self.fresh < self.slots:
            self.fresh += 1
            return self.fresh - 1
        if not self.free:
            running = set(self.open.values())
            oldest = next((number for number in self.episodes if number not in running), None)
            if oldest is None:
                raise UserError(f"--dataset_size {self.capacity} is too small for the episodes in progress")
            self._drop(oldest)
        return self.free.popleft()

    def _drop(self, number: int) -> None:
        self.free.extend(self.episodes.pop(number))
        self.on_disk.pop(number, None)

    def _evict(self) -> None:
        kept, running = 0, set(self.open.values())
        for number, slots in reversed(list(self.episodes.items())):
            if number in running or kept + len(slots) - 1 <= self.capacity:
                kept += len(slots) - 1
            else:
                self._drop(number)

    def _store(self, slots: list[int] | array, rows: dict[str, np.ndarray]) -> None:
        rows = {key: np.asarray(values) for key, values in rows.items() if not key.startswith("log_")}
        if not self.storage:
            self._allocate(rows)
        assert rows.keys() == self.storage.keys(), f"replay holds {list(self.storage)}, got {list(rows)}"
        slots = torch.from_numpy(np.array(slots, np.int64))
        for key, values in rows.items():
            stored = self.storage[key]
            stored[slots.to(stored.device)] = torch.from_numpy(values).to(stored)

    def _allocate(self, rows: dict[str, np.ndarray]) -> None:
        kinds = {
            key: (values.shape[1:], np.float32 if values.dtype.kind == "f" else values.dtype)
            for key, values in rows.items()
        }
        row_bytes = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in kinds.values())
        total = row_bytes * self.slots
        size = f"{self.slots:,} rows of {row_bytes:,} bytes, {total / 1e9:.2f} GB"
        # Otherwise processes that start together would count the same free memory.
        with alone_on(self.device):
            room = GPU_SHARE * torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 0
            if total < room:
                print(f"Replay: {size} on {self.device} when full.", flush=True)
                for key, (shape, dtype) in kinds.items():
                    kind = torch.from_numpy(np.empty(0, dtype)).dtype
                    self.storage[key] = torch.zeros((self.slots, *shape), dtype=kind, device=self.device)
                return
        free = available_memory()
        if free is not None and total > free:
            fits = max(0, int(0.9 * free / row_bytes) - (self.slots - self.capacity))
            raise UserError(
                f"replay needs {total / 1e9:.1f} GB ({self.slots:,} rows of {row_bytes:,} bytes), "
                f"{free / 1e9:.1f} GB are free: --dataset_size {fits} fits"
            )
        reason = f": {self.device} has room for {room / 1e9:.2f} GB" if self.device.type == "cuda" else ""
        print(f"Replay: {size} in memory when full{reason}.", flush=True)
        for key, (shape, dtype) in kinds.items():
            # Unlike torch.zeros this touches no memory yet.
            self.storage[key] = torch.from_numpy(np.zeros((self.slots, *shape), dtype))

    def _write(self, folder: Path, name: str, numbers: list[int]) -> dict[int, tuple[str, int]]:
        """Write episodes to one file; returns the file and first row of each."""
        if not numbers:
            return {}
        slots = torch.from_numpy(np.concatenate([self.episodes[number] for number in numbers]).astype(np.int64))
        rows = {key: values[slots.to(values.device)].cpu().numpy() for key, values in self.storage.items()}
        write_atomic(folder / name, lambda file: np.savez(file, **rows))
        ends = np.cumsum([len(self.episodes[number]) for number in numbers]).tolist()
        return {number: (name, start) for number, start in zip(numbers, [0, *ends], strict=False)}

    def _read(self, path: Path, rows: int, kinds: dict | None) -> dict[str, np.ndarray]:
        """The arrays of a file, at least `rows` rows of `kinds`; {} with a warning if they are not there."""
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            if any(values.ndim < 1 or len(values) < rows for values in arrays.values()) or "is_first" not in arrays:
                raise ValueError(f"it does not hold {rows} rows")
            found = {key: describe_rows(values) for key, values in arrays.items()}
            if kinds and found != kinds:
                raise ValueError(f"it holds other arrays: {', '.join(found)}")
            return arrays
        except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            warn(f"replay goes on without the episodes of {path}: {error}")
            return {}


# --- logger ---------------------------------------------------------------------------------------------------------


def finite_or_none(value):
    """`value` for JSON, which has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def encode_gif(frames: np.ndarray, fps: int) -> bytes:
    """Animated GIF of uint8 frames (T,H,W,3)."""
    from PIL import Image

    first, *others = [Image.fromarray(frame) for frame in frames]
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=1000 / fps, loop=0)
    return buffer.getvalue()


def save_mp4(path: Path, frames: np.ndarray, fps: int) -> None:
    """Write uint8 frames (T,H,W,3) as H.264, or as MPEG-4 if FFmpeg lacks that encoder."""
    import av

    # The encoders' 4:2:0 pixel format needs even sizes.
    height, width = frames.shape[1:3]
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=fps)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))  # type: ignore[arg-type]
        file.mux(stream.encode())


class Logger:
    """Averages metrics between writes: rows of `metrics.jsonl`, TensorBoard, a console line and a progress bar.

    `step` counts environment frames. Only `time` (seconds of training, including earlier starts of the run) and
    `fps/...` depend on the clock. `simple` disables TensorBoard and videos. `options` become the columns of
    TensorBoard's HPARAMS tab, beside the last eval/return.

    After `load_state_dict` the file is continued; the first write drops rows newer than the checkpoint, or all rows if
    there was no checkpoint.
    """

    LOSSES = ("model_loss", "actor_loss", "value_loss")  # on the console

    def __init__(
        self, logdir: Path, *, step: int = 0, simple: bool = False, total_steps: int, options: dict | None = None
    ):
        self.options = options
        self.logdir, self.step, self.simple, self.total_steps = Path(logdir), step, simple, total_steps
        self.path = self.logdir / "metrics.jsonl"
        self.rows, self.seconds_before, self.started = 0, 0.0, time.perf_counter()
        self.sums: dict[tuple[str, ...], tuple] = {}
        self.videos: dict[str, tuple[np.ndarray, int, int]] = {}
        self.returns: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.losses: dict[str, float] = {}
        self.unprinted: tuple[int, dict[str, float]] | None = None  # rows of the same step make one line
        self.updates = 0
        self.heartbeat = Heartbeat()
        self.opened = False
        self.writer: Any = None  # TensorBoard's
        # disable=None: no bar where nobody watches a terminal.
        self.bar = tqdm(total=total_steps, initial=step, unit="step", unit_scale=True, dynamic_ncols=True, disable=None)

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def state_dict(self) -> dict:
        """What a resumed run needs to continue the files, including values not yet written."""
        sums = [[list(names), values.tolist(), count] for names, (values, count) in self.sums.items()]
        return {"step": self.step, "rows": self.rows, "seconds": self.seconds, "sums": sums}

    def load_state_dict(self, state: dict) -> None:
        self.step, self.rows, self.seconds_before = state["step"], state["rows"], state["seconds"]
        self.sums = {tuple(names): (np.array(values), count) for names, values, count in state["sums"]}
        self.started = time.perf_counter()
        self.progress(self.step)

    def scalars(self, values: Mapping[str, float | Tensor]) -> None:
        """Add numbers and 0-d tensors to the averages of the next write. Tensors stay on their device until then."""
        tensors = {key: value.detach() for key, value in values.items() if isinstance(value, Tensor)}
        numbers = {key: float(value) for key, value in values.items() if key not in tensors}
        # One sum per set of keys: two kernels per call for any number of metrics.
        if tensors:
            self._add(tuple(tensors), torch.stack(list(tensors.values())).double())
        if numbers:
            self._add(tuple(numbers), np.array(list(numbers.values())))

    def video(self, name: str, frames: np.ndarray, fps: int = 30, strip: int = 0) -> None:
        """Encode frames uint8 (T,H,W,C), C 1 or 3, at the next write, to `video/NAME_STEP.mp4` and TensorBoard.

        `strip` adds NAME_STEP.png with every `strip`-th frame side by side.
        """
        if not self.simple:
            self.videos[name] = (np.repeat(frames, 3 // frames.shape[-1], -1), fps, strip)

    def progress(self, step: int, updates: int | None = None) -> None:
        """Move the progress bar, or now and then print a line where there is none; cheap enough for every step."""
        self.bar.update(step - self.bar.n)
        if self.unprinted and step > self.unprinted[0]:
            self._print_row()
        self.updates = self.updates if updates is None else updates
        if self.heartbeat.due():
            self.say(step)

    def say(self, step: int, text: str = "") -> None:
        """Print a line between two writes."""
        self._print_row()
        self._print(self._console_line(step, self._averages("", keep=True), text))

    def write(self, step: int, only: str = "", **counters: float) -> None:
        """Write the averages of all values since the last write, if there are any.

        With `only`, write just the calls of `scalars` whose keys all have this prefix; the others keep accumulating.
        Keys without new values are absent. Values that are not finite are written as null.
        """
        metrics = self._averages(only)
        if not metrics and not self.videos:
            return
        if not self.opened:
            self._open()
        self.step = step
        metrics |= self._rates({"step": step, **counters})
        row = {"step": step, **counters, **metrics, "time": round(self.seconds, 3)}
        row = {key: finite_or_none(value) for key, value in row.items()}
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows += 1
        if self.writer:
            for key, value in (counters | metrics).items():
                self.writer.add_scalar(key, value, step)
            for name, video in self.videos.items():
                self._write_video(name, *video)
            self.writer.flush()
        self.videos = {}
        self.heartbeat.last = time.monotonic()
        self.progress(step)
        self.returns |= {key: value for key, value in metrics.items() if key.endswith("return")}
        self.unprinted = step, (self.unprinted[1] if self.unprinted else {}) | metrics

    def close(self) -> None:
        self._print_row()
        self.bar.close()
        if self.writer:
            self.writer.close()

    def _add(self, names: tuple[str, ...], values) -> None:
        total, count = self.sums.get(names, (0.0, 0))
        if isinstance(values, Tensor) and isinstance(total, np.ndarray):  # of a checkpoint
            total = torch.from_numpy(total).to(values.device)
        self.sums[names] = (total + values, count + 1)

    def _averages(self, only: str, keep: bool = False) -> dict[str, float]:
        totals = {}
        chosen = [names for names in self.sums if all(name.startswith(only) for name in names)]
        for names in chosen:
            values, count = self.sums[names] if keep else self.sums.pop(names)
            for name, value in zip(names, values.tolist(), strict=True):
                before, n = totals.get(name, (0.0, 0))
                totals[name] = (before + value, n + count)
        return {name: total / count for name, (total, count) in totals.items()}

    def _rates(self, counters: dict[str, float]) -> dict[str, float]:
        """Counts per second since the last write at an earlier step, including evaluation."""
        last, now = self.last, {**counters, "seconds": self.seconds}
        if last and last["step"] == now["step"]:
            return {}
        self.last = now
        names = [name for name in ("step", "update") if now.get(name, 0) > last.get(name, math.inf)]
        return {f"fps/{name}": (now[name] - last[name]) / (now["seconds"] - last["seconds"]) for name in names}

    def _print_row(self) -> None:
        if self.unprinted:
            self._print(self._console_line(*self.unprinted))
            self.unprinted = None

    def _print(self, line: str) -> None:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    def _console_line(self, step: int, metrics: dict[str, float], text: str = "") -> str:
        self.losses |= {name: metrics[f"loss/{name}"] for name in self.LOSSES if f"loss/{name}" in metrics}
        parts = [f"step {step:,}/{self.total_steps:,}"]
        parts += [f"update {self.updates:,}"] if self.updates else []
        parts += [f"{key} {value:.1f}" for key, value in self.returns.items()]
        parts += [f"{name} {value:.3g}" for name, value in self.losses.items()]
        parts += [text] if text else []
        if "fps/update" in metrics:
            parts.append(f"{1000 / metrics['fps/update']:.0f} ms/update")
        if fps := metrics.get("fps/step"):
            left = max(0, self.total_steps - step) / fps
            parts += [f"{fps:.0f} fps", f"ETA {timedelta(seconds=round(left))}"]
        return " | ".join(parts)

    def _open(self) -> None:
        self.opened = True
        self.logdir.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            kept = self.path.read_bytes().splitlines(keepends=True)[: self.rows]
            write_atomic(self.path, lambda file: file.writelines(kept))
        if not self.simple:
            # Imported here because it takes seconds.
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(self.logdir, purge_step=self.step + 1 if self.rows else 0)
            if self.options:
                self._write_options()

    def _write_options(self) -> None:
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
        from torch.utils.tensorboard.summary import hparams

        values = {k: str(v) if isinstance(v, list | None) else v for k, v in self.options.items()}
        # The writer's own add_hparams would create a second run.
        columns, start, _ = hparams(values, {"eval/return": None})
        # TensorBoard shows five columns at first: those that are marked as differing, then in alphabetical order.
        plugin = columns.value[0].metadata.plugin_data
        data = HParamsPluginData.FromString(plugin.content)
        first = marked("column")
        for info in data.experiment.hparam_infos:
            info.differs = info.name in first
        plugin.content = data.SerializeToString()
        for summary in (columns, start):
            self.writer.file_writer.add_summary(summary)

    def _write_video(self, name: str, frames: np.ndarray, fps: int, strip: int) -> None:
        from PIL import Image
        from tensorboard.compat.proto.summary_pb2 import Summary

        path = self.logdir / "video" / f"{name.replace('/', '_')}_{self.step}.mp4"
        path.parent.mkdir(exist_ok=True)
        save_mp4(path, frames, fps)
        if strip:
            Image.fromarray(np.concatenate(frames[::strip], 1)).save(path.with_suffix(".png"))
        # TensorBoard's own add_video needs moviepy.
        image = Summary.Image(
            height=frames.shape[1], width=frames.shape[2], colorspace=3, encoded_image_string=encode_gif(frames, fps)
        )
        self.writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), self.step)


# --- checkpoint -----------------------------------------------------------------------------------------------------


def save_checkpoint(path: Path, state: dict) -> None:
    """Write `state` (tensors, numbers, strings, dicts and lists of these); the previous file becomes STEM.prev.pt."""
    previous = path.with_suffix(".prev.pt")
    if path.exists():
        # Give the old file a second name first, so that `path` exists at every moment.
        part = path.with_name(previous.name + ".part")
        part.unlink(missing_ok=True)
        try:
            os.link(path, part)
        except OSError:
            shutil.copyfile(path, part)
        os.replace(part, previous)
    write_atomic(path, lambda file: torch.save(state, file))


def read_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict:
    """The checkpoint at `path`: data only, never code. Raises UserError if it is unreadable."""
    try:
        if zipfile.is_zipfile(path) and (part := zipfile.ZipFile(path).testzip()):  # torch does not check
            raise ValueError(f"wrong checksum of {part}")
        state = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(state, dict) or not state:
            raise ValueError(f"it holds {type(state).__name__} {str(state)[:20]}")
        return state
    except Exception as error:  # a damaged file makes torch raise almost anything
        raise UserError(f"{path} is unreadable ({repr(error).splitlines()[0][:100]})") from error


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict | None:
    """The checkpoint at `path`, or the previous one, with a warning, if it is unreadable; None if there is neither.

    A damaged file is renamed to STEM.damaged.pt, so that the next save does not keep it as the previous checkpoint.
    Raises UserError if no existing file is readable.
    """
    paths = [p for p in (path, path.with_suffix(".prev.pt")) if p.exists()]
    problems = []
    for candidate in paths:
        try:
            state = read_checkpoint(candidate, device)
        except UserError as error:
            problems.append(str(error))
            continue
        if candidate != path:
            warn(f"{problems[0] if problems else f'{path} is missing'}; going on from {candidate}")
            with contextlib.suppress(OSError):
                path.replace(path.with_suffix(".damaged.pt"))
        return state
    if problems:
        raise UserError(f"{'; '.join(problems)}: restore it from a copy, or start anew with --fresh")
    return None
