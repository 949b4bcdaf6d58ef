"""configs.yaml, the command line, and the config kept in a run's folder."""

import json
import re
import subprocess
import sys

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import tools

PATH = tools.ROOT / "configs.yaml"
TEXT = PATH.read_text()
BLOCKS = yaml.safe_load(TEXT)
DEFAULTS = tools.flatten(BLOCKS["defaults"])
PRESETS = [name for name in BLOCKS if name != "defaults"]
# Flags that upstream defines in its script rather than in its configuration file.
HIDDEN = {
    "simsr_discount": 0.99,
    "dynamics_tau": 0.05,
    "encoder_tau": 0.05,
    "simsr_scale": 1.0,
    "mbr_scale": 1.0,
    "img_source": "video",
    "resource_files": "../distractors/*.mp4",
    "total_frames": 1000,
    "ds_resource_path": "..",
    "simple_log": False,
    "nomlr": False,
    "nosimsr": False,
    "post_mlr": False,
}


def load(line=""):
    return tools.load_config(line.split())


def error(argv):
    with pytest.raises(tools.UserError) as caught:
        tools.load_config(argv.split() if isinstance(argv, str) else argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_key_has_a_comment():
    comments = tools.config_comments(TEXT)
    paths = {f"defaults.{key}" for key in DEFAULTS} | {"defaults.encoder", "defaults.decoder"} | set(PRESETS)
    assert paths <= comments.keys()
    assert [path for path in paths if not comments[path][1]] == []


def test_keys_are_not_repeated():
    keys = re.findall(r"^  (\w+):", TEXT.split("\ndmc_vision:")[0], re.M)
    assert sorted(keys) == sorted(BLOCKS["defaults"])


def test_no_number_is_read_as_text():
    for block in BLOCKS.values():
        for key, value in tools.flatten(block).items():
            if isinstance(value, str):
                with pytest.raises(ValueError):
                    float(value)
                assert value not in ("True", "False"), key


def test_hidden_flags():
    assert {key: DEFAULTS[key] for key in HIDDEN} == HIDDEN


def test_presets_agree_with_the_types_of_the_defaults():
    for preset in PRESETS:
        config = tools.flatten(vars(load(f"--configs {preset}")))
        assert config.keys() == DEFAULTS.keys()
        for key, default in DEFAULTS.items():
            assert default is None or type(config[key]) is type(default), key
        for key, value in tools.flatten(BLOCKS[preset]).items():
            assert config[key] == value


def test_defaults_pass_their_own_checks():
    def text(value):
        return ",".join(map(str, value)) if isinstance(value, list) else value

    flags = [f"--{key}={text(default)}" for key, default in DEFAULTS.items() if default is not None]
    assert tools.flatten(vars(tools.load_config(flags))) == DEFAULTS


def test_presets_merge_in_order_and_flags_win_wherever_they_stand():
    tiny = BLOCKS["tiny"]
    assert load("--configs M tiny").dyn_hidden == tiny["dyn_hidden"] != 1024
    assert load("--configs tiny M").dyn_hidden == 1024
    config = load("--dyn_hidden 7 --configs tiny M --encoder.cnn_depth 3")
    assert (config.dyn_hidden, config.batch_size) == (7, tiny["batch_size"])
    assert config.encoder["cnn_depth"] == 3 and config.encoder["mlp_units"] == 640 and config.encoder["minres"] == 4
    assert load("--configs dmc_proprio").encoder["cnn_depth"] == 32


def test_upstream_command_line():
    config = load("--configs dmc_vision  --task dmc_walker_stand --seed 0 --logdir ./log")
    assert (config.task, config.seed, config.logdir, config.envs) == ("dmc_walker_stand", 0, "./log", 4)


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("--steps 1e3", "steps", 1000),
        ("--steps=2_000", "steps", 2000),
        ("--model_lr 1e-4", "model_lr", 1e-4),
        ("--expl_amount 1", "expl_amount", 1.0),
        ("--expl_amount -1", "expl_amount", -1.0),
        ("--nomlr", "nomlr", True),
        ("--nomlr --seed 3", "nomlr", True),
        ("--parallel false", "parallel", False),
        ("--parallel TRUE", "parallel", True),
        ("--size 32,48", "size", [32, 48]),
        ("--grad_heads reward", "grad_heads", ["reward"]),
        ("--grad_heads=", "grad_heads", []),
        ("--augmentation intensity,shift", "augmentation", ["intensity", "shift"]),
        ("--augmentation=", "augmentation", []),
        ("--traindir x=y", "traindir", "x=y"),
        ("--compile True", "compile", "True"),
        ("--device cuda:1", "device", "cuda:1"),
    ],
)
def test_values(line, key, value):
    found = getattr(load(line), key)
    assert found == value and type(found) is type(value)


@settings(max_examples=30)
@given(st.integers(-(10**12), 10**12), st.floats(allow_nan=False, allow_infinity=False), st.booleans())
def test_numbers_survive_the_command_line(whole, real, switch):
    config = tools.load_config([f"--steps={whole}", "--model_lr", repr(real), f"--nosimsr={switch}"])
    assert (config.steps, config.model_lr, config.nosimsr) == (whole, real, switch)


@settings(max_examples=30)
@given(st.lists(st.text(st.characters(exclude_characters=",", exclude_categories=["Cs"]), min_size=1), min_size=1))
def test_lists_survive_the_command_line(words):
    assert tools.load_config([f"--augmentation={','.join(words)}"]).augmentation == words


PIECES = [
    "--seed",
    "--seed=3",
    "--configs",
    "tiny",
    "--encoder",
    "--nomlr",
    "--encoder.cnn_depth",
    "=",
    "-1",
    "1e3",
    "--",
]


@settings(max_examples=60)
@given(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=5)), max_size=5))
def test_any_command_line_is_a_config_or_one_line(argv):
    assume(not {"-h", "--help"} & set(argv))
    try:
        config = tools.flatten(vars(tools.load_config(argv)))
    except tools.UserError as error:
        assert len(str(error).splitlines()) == 1
    else:
        for key, default in DEFAULTS.items():
            assert default is None or type(config[key]) is type(default), key


@settings(max_examples=30)
@given(st.floats().filter(lambda x: not x.is_integer()))
def test_whole_numbers_only(value):
    assert "takes a whole number" in error([f"--steps={value!r}"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--task_name x", "unknown option --task_name"),
        ("--simsr_scal 1", "did you mean simsr_scale?"),
        ("--encoder.cnn_dept 1", "did you mean encoder.cnn_depth?"),
        ("--encoder 3", "--encoder is a group: set its entries, --encoder.mlp_keys"),
        ("--configs dmc_vison", "unknown preset dmc_vison: there are dmc_vision,"),
        ("--configs", "--configs needs the name"),
        ("--configs --seed 1", "--configs needs the name"),
        ("--seed", "--seed needs a value"),
        ("--seed --nomlr", "--seed needs a value"),
        ("--seed one", "--seed takes a whole number, not 'one'"),
        ("--seed True", "--seed takes a whole number"),
        ("--model_lr nan", "--model_lr takes a number"),
        ("--parallel yes", "--parallel takes True or False, not 'yes'"),
        ("--size 64", "--size takes height and width"),
        ("--size 64,a", "--size takes a whole number, not 'a'"),
        ("--imag_gradient reinforc", "did you mean reinforce?"),
        ("--device gpu", "--device takes auto, cpu, cuda, cuda:N, not 'gpu'"),
        ("--precision 8", "--precision takes 32, 16"),
        ("stray", "unexpected argument 'stray'"),
        ("-s 1", "unexpected argument '-s'"),
    ],
)
def test_errors(line, message):
    assert message in error(line)


def test_errors_in_a_preset(tmp_path):
    path = tmp_path / "configs.yaml"
    path.write_text(TEXT + "\nmine:\n  step: 3\nyours:\n  steps: 0.5\ntheirs:\n  steps: [1]\n")
    for preset, message in [("mine", "did you mean steps?"), ("yours", "whole number"), ("theirs", "single value")]:
        with pytest.raises(tools.UserError, match=re.escape(message)) as caught:
            tools.load_config(["--configs", preset], path)
        assert f"in preset {preset}" in str(caught.value)


def test_help_lists_everything():
    code = "import sys, tools; tools.load_config(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, "--help"], cwd=tools.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for key in DEFAULTS:
        assert f"--{key} " in done.stdout
    for words in [*PRESETS, "frames between evaluations", "(dynamics, reinforce, both)", "Exploration"]:
        assert words in done.stdout


# --- the run's folder -----------------------------------------------------------------------------------------------


def test_config_of_a_run(tmp_path):
    config = load("--configs tiny --device cpu --seed 5")
    tools.check_config(config, tmp_path)
    tools.save_config(config, tmp_path / "new" / "run", ["--seed", "5"])
    saved = json.loads((tmp_path / "new" / "run" / "config.json").read_text())
    assert saved["config"] == vars(config)
    (run,) = saved["runs"]
    assert run["command"][1:] == ["--seed", "5"] and run["device"] == "cpu"
    assert run["versions"]["python"] and run["versions"]["torch"]
    tools.save_config(config, tmp_path / "new" / "run", ["again"])
    assert len(tools.read_config(tmp_path / "new" / "run")["runs"]) == 2


def test_a_folder_belongs_to_one_configuration(tmp_path):
    tools.save_config(load("--seed 1 --units 64"), tmp_path, [])
    tools.check_config(load("--seed 1 --units 64 --steps 9 --device cpu --parallel False"), tmp_path)
    with pytest.raises(tools.UserError) as caught:
        tools.check_config(load("--seed 2 --units 64 --encoder.cnn_depth 8"), tmp_path)
    message = str(caught.value)
    assert "seed was 1, now 2; encoder.cnn_depth was 32, now 8" in message
    assert "units" not in message and "\n" not in message and "--logdir" in message


@pytest.mark.parametrize("text", ["{", "[]", '{"seed": 1}'])
def test_foreign_config_file(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    for attempt in (tools.check_config, lambda config, logdir: tools.save_config(config, logdir, [])):
        with pytest.raises(tools.UserError, match="another --logdir"):
            attempt(load(), tmp_path)


def test_unwritable_logdir(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(tools.UserError, match="cannot .* another --logdir|cannot write to --logdir"):
        tools.save_config(load(), tmp_path / "file" / "run", [])
