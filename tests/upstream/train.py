"""Train upstream's own program, for curves beside ours: figures/plot.py reads its folder like a run of dreamer.py.

    python tests/upstream/train.py CHECKOUT [options of dreamer.py]

CHECKOUT is one of github.com/bit1029public/HRSSM. Its loop, agent, replay and environments run as they are, in this
process. Ours are the command line and the log, and the end: after the evaluation at --steps upstream would train for
one more interval. An interrupted run starts again.

Options that upstream does not have are ignored. For equal settings give our run `--shared_env_seed True --overlap False
--actor_start 0 --imag_starts 0 --shadow_size 2048`.
"""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

if __name__ == "__main__":
    # Without this script's own folder, whose `envs.py` would hide the upstream folder `envs`.
    sys.path[:1] = [str(Path(__file__).resolve().parents[level]) for level in (2, 1)]
from upstream.record import import_program

import tools

NAMES = {
    "eval_return": "eval/return",
    "eval_length": "eval/length",
    "eval_episodes": "eval/episodes",
    "train_return": "episode/return",
    "train_length": "episode/length",
}


class Log:
    """In place of upstream's SimpleLogger: the same rows under our names, in DIR/metrics.jsonl.

    Exits after the evaluation at `steps` frames.
    """

    full_log = False

    def __init__(self, logdir: Path, steps: int):
        self.step = 0
        self._path, self._steps = logdir / "metrics.jsonl", steps
        self._start, self._row = time.monotonic(), {}
        self._path.unlink(missing_ok=True)

    def scalar(self, name: str, value: float) -> None:
        self._row[NAMES.get(name, name)] = float(value)

    def video(self, name: str, value) -> None:
        pass

    def write(self, fps: bool = False, step: int | None = None) -> None:
        row, self._row = self._row, {}
        if not row:
            return
        row = {"step": step or self.step, **row, "time": time.monotonic() - self._start}
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if "eval/return" in row:
            print(f"step {row['step']:,}/{self._steps:,} | eval/return {row['eval/return']:.1f}", flush=True)
            if row["step"] >= self._steps:
                sys.exit()


def main(argv: list[str]) -> None:
    if not argv or argv[0].startswith("-"):
        sys.exit("usage: python tests/upstream/train.py CHECKOUT [options of dreamer.py]")
    root = Path(argv[0]).resolve()
    try:
        config = tools.load_config(argv[1:])
        if not config.logdir:
            raise tools.UserError("--logdir is missing")
        logdir = Path(config.logdir).resolve()
        (logdir / "config.json").unlink(missing_ok=True)
        tools.save_config(config, logdir, argv)
    except tools.UserError as error:
        sys.exit(f"error: {error}")
    device = config.device if config.device != "auto" else "cuda:0" if torch.cuda.is_available() else "cpu"
    settings = vars(config) | {"device": device, "size": tuple(config.size), "logdir": str(logdir / "upstream")}
    settings |= {"compile": False, "parallel": False, "video_pred_log": False, "simple_log": True}
    torch.set_num_threads(config.threads or torch.get_num_threads())
    del sys.modules["tools"], sys.path[0]  # upstream has modules of the same names
    upstream = import_program(root)
    upstream.tools.SimpleLogger = lambda _, step: Log(logdir, config.steps)
    upstream.main(SimpleNamespace(**settings))


if __name__ == "__main__":
    main(sys.argv[1:])
