"""What all programs share on a command line: Ctrl-C, and output that nobody can take any more.

Import it before modules that take seconds to load. From then on Ctrl-C ends a program at once, without a traceback,
until `run` calls its `main`. When one of these files is imported by another program, nothing changes.
"""

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = {ROOT / "dreamer.py", *ROOT.glob("setup/*.py"), *ROOT.glob("figures/*.py")}


class Stream:
    """A text stream that survives its reader: after the first error everything is written to /dev/null."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> int:
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def _attempt(self, function: Callable, *args) -> None:
        try:
            function(*args)
        except OSError:
            with contextlib.suppress(OSError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)


def fill_closed_streams() -> None:
    """Open /dev/null for standard streams that are closed, or the next file that is opened would take their place."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def run(main: Callable[[], int | None]) -> NoReturn:
    """Exit with the code that `main` returns; with 130 and no traceback after Ctrl-C."""
    sys.stdout, sys.stderr = Stream(sys.stdout), Stream(sys.stderr)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = main()
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        code = 128 + signal.SIGINT
    finally:
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # nor a traceback while the interpreter shuts down
        sys.stdout.flush()
        sys.stderr.flush()
    sys.exit(code)


if Path(getattr(sys.modules["__main__"], "__file__", None) or ".").resolve() in PROGRAMS:
    fill_closed_streams()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # background jobs ignore it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
