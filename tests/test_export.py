"""setup/export.py: the folder, the card, and that the weights come back."""

import json

import pytest
import torch
from ruamel.yaml import YAML

import dreamer
import tools
from setup import export
from tests.helpers import SMALL
from tests.test_train import start_in_process

SHORT = "--configs tiny --task dmc_cartpole_balance --envs 1 --time_limit 16 --steps 80 --eval_every 80 --prefill 20"
SHORT += " --pretrain 1 --actor_start 0 --train_ratio 1 --eval_episode_num 2 --parallel False --overlap False"
SHORT += f" --final_episodes 3 {SMALL}"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    assert dreamer.main([*SHORT.split(), "--logdir", str(folder / "log")]) == 0
    assert export.main([str(folder / "log"), str(folder / "out"), "--license", "mit"]) == 0
    return folder / "log", folder / "out"


def test_folder_and_card(exported):
    logdir, out = exported
    names = {"model.safetensors", "config.json", "final_eval.json", "curves.csv", "replay.mp4", "README.md"}
    assert {path.name for path in out.iterdir()} == names
    _, header, text = (out / "README.md").read_text().split("---\n", 2)
    card = YAML(typ="safe").load(header)
    mean = tools.read_final_evaluation(logdir)["evaluations"]["eval"]["mean"]
    assert card["license"] == "mit" and card["pipeline_tag"] == "reinforcement-learning"
    result = card["model-index"][0]["results"][0]
    assert result["metrics"][0]["value"].startswith(f"{mean:.2f} +/- ")
    assert result["dataset"]["type"] == "dmc_cartpole_balance"
    assert f"| eval | dmc_cartpole_balance | {mean:.1f} |" in text and "| `task` |" in text
    assert (out / "curves.csv").read_text().startswith("step,eval/")
    assert "trained on `dmc_cartpole_balance` for 80 environment frames" in text
    saved = tools.read_config(logdir)
    saved["config"]["offline_traindir"] = "demos"  # where steps are updates
    assert "trained on logged episodes for 80 updates" in export.card(saved, None, [{"step": 80}], None, "")


def test_weights_come_back(exported, tmp_path):
    logdir, out = exported
    run = start_in_process(f"{SHORT} --init_from {out}", tmp_path / "log")
    try:
        saved = tools.load_checkpoint(logdir / "latest.pt")["agent"]
        own = run.agent.state_dict()
        tensors = {key for key, value in saved.items() if isinstance(value, torch.Tensor)}
        assert tensors and all(torch.equal(saved[key], own[key]) for key in tensors)
    finally:
        run.close()


def test_errors_are_one_line(exported, tmp_path, capsys):
    logdir, out = exported
    (tmp_path / "model.safetensors").write_bytes(b"no")
    assert export.main([str(tmp_path), str(tmp_path / "x")]) == 2
    assert export.main([str(logdir), str(out)]) == 2
    arguments = [*SHORT.split(), "--logdir", str(tmp_path / "log"), "--eval_only", "--init_from"]
    assert dreamer.main([*arguments, str(tmp_path)]) == 2
    assert dreamer.main([*arguments, str(out), "--dyn_deter", "32"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if line.startswith("error: ")]) == 4
    assert json.loads((out / "config.json").read_text())["config"]["seed"] == 0
