"""A folder to share a trained agent in the format of the Hugging Face Hub.

python setup/export.py ./log/walker_stand/0 ./walker_stand

It holds model.safetensors, config.json (options, commands, commit, versions), final_eval.json if there is one,
curves.csv (every evaluation), the latest evaluation video, and a model card, README.md. `--init_from ./walker_stand`
loads the weights into a run with the same --method and sizes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from setup import console  # before what takes seconds to import

# isort: split
import argparse
import csv
import json
import shutil

from safetensors.torch import save_file
from torch import Tensor

import tools


def weights(logdir: Path) -> dict[str, Tensor]:
    checkpoint = tools.load_checkpoint(logdir / "latest.pt")
    if checkpoint is None:
        raise tools.UserError(f"{logdir}/latest.pt does not exist: train first")
    # The file format wants no memory shared between tensors. What is no tensor is state of training.
    return {key: value.clone().contiguous() for key, value in checkpoint["agent"].items() if isinstance(value, Tensor)}


def evaluation_rows(logdir: Path) -> list[dict]:
    """Rows of metrics.jsonl, and of them `step` and evaluations only."""
    rows = []
    for line in (logdir / "metrics.jsonl").read_text(errors="replace").splitlines():
        try:
            row = {key: value for key, value in json.loads(line).items() if key == "step" or key.startswith("eval/")}
        except (ValueError, AttributeError):
            continue
        rows.append(row)
    return rows


def results(final: dict | None, rows: list[dict], task: str) -> list[tuple[str, str, float, float, int]]:
    """Name, task, mean, standard deviation and episodes: of the final evaluation, else of the last one in training."""
    if final:
        found = final["evaluations"].items()
        return [(name, r["task"], r["mean"], r["std"], len(r["returns"])) for name, r in found]
    last = next((row for row in reversed(rows) if len(row) > 1), {})
    names = [key.removesuffix("/return") for key in last if key.endswith("/return")]
    return [(n, task, last[f"{n}/return"], last[f"{n}/return_std"], int(last[f"{n}/episodes"])) for n in names]


def card(saved: dict, final: dict | None, rows: list[dict], video: str | None, license_name: str) -> str:
    config, started = saved["config"], saved["runs"][-1]
    found = results(final, rows, config["task"])
    metrics = [
        {"type": "mean_reward", "name": name, "value": f"{mean:.2f} +/- {std:.2f}"} for name, _, mean, std, _ in found
    ]
    entry = {"task": {"type": "reinforcement-learning", "name": "reinforcement-learning"}, "metrics": metrics}
    entry["dataset"] = {"name": config["task"], "type": config["task"]}
    header = {"license": license_name} if license_name else {}
    header |= {"library_name": "hrssm", "pipeline_tag": "reinforcement-learning"}
    header["tags"] = ["reinforcement-learning", "world-model", config["method"], config["task"]]
    header["model-index"] = [{"name": f"{config['method']}-{config['task']}", "results": [entry] if metrics else []}]
    yaml = "\n".join(f"{key}: {json.dumps(value)}" for key, value in header.items())  # JSON is YAML
    table = "\n".join(f"| {name} | {of} | {mean:.1f} | {std:.1f} | {n} |" for name, of, mean, std, n in found)
    source = "the final evaluation (`final_eval.json`)" if final else "the last evaluation during training"
    changes = {key: value for key, value in tools.flatten(config).items() if key != "logdir"}.items()
    defaults = {key: option.default for key, option in tools.read_options()[0].items()}
    options = "\n".join(f"| `{key}` | `{value}` |" for key, value in changes if value != defaults.get(key, value))
    git, steps = started["git"], rows[-1]["step"] if rows else 0
    trained = f"on `{config['task']}` for {steps:,} environment frames"
    if config.get("offline_traindir"):
        trained = f"on logged episodes for {steps:,} updates"
    versions = ", ".join(f"{name} {version}" for name, version in started["versions"].items())
    return f"""---
{yaml}
---
# {config["method"]} on {config["task"]}

A world-model agent ({config["method"]}, seed {config["seed"]}) trained {trained}.

| evaluation | task | mean return | standard deviation | episodes |
|---|---|---|---|---|
{table}

Numbers are of {source}. They are of one seed.{f" A video of an evaluation episode is `{video}`." if video else ""}

## Use

```bash
python dreamer.py --configs ... --task {config["task"]} --method {config["method"]} --logdir ./log/shared \\
  --init_from FOLDER --eval_only
```

with the options below. `config.json` has all of them and the command of the run.

## Training

Commit {git["commit"]}{" with local changes" if git["dirty"] else ""}, device {started["device"]}, {versions}.

| option other than the default | value |
|---|---|
{options}
"""


def export(logdir: Path, out: Path, license_name: str) -> None:
    saved = tools.read_config(logdir)
    if saved is None:
        raise tools.UserError(f"{logdir} holds no run")
    if out.exists() and any(out.iterdir()):
        raise tools.UserError(f"{out} is not empty: choose another folder")
    state, rows, final = weights(logdir), evaluation_rows(logdir), tools.read_final_evaluation(logdir)
    out.mkdir(parents=True, exist_ok=True)
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(logdir / "config.json", out)
    if final:
        shutil.copy(logdir / "final_eval.json", out)
    with open(out / "curves.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["step", *sorted({key for row in rows for key in row} - {"step"})])
        writer.writeheader()
        writer.writerows(row for row in rows if len(row) > 1)
    videos = sorted((logdir / "video").glob("eval*policy_*.mp4"), key=lambda path: path.stat().st_mtime)
    if videos:
        shutil.copy(videos[-1], out / "replay.mp4")  # the name that the Hub shows
    (out / "README.md").write_text(card(saved, final, rows, "replay.mp4" if videos else None, license_name))


def main(argv: list[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("logdir", type=Path, help="folder of a run")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--license", default="", help="licence of the weights, as the Hub names it (mit, ...)")
    args = parser.parse_args(argv)
    try:
        export(args.logdir, args.out, args.license)
    except (tools.UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(*sorted(args.out.iterdir()), sep="\n")
    return 0


if __name__ == "__main__":
    console.run(main)
