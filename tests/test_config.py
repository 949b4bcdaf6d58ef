"""configs.yaml, the command line, and the config kept in a run's folder."""

import json
import re
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import tools
from envs import distracting_cs
from tests.helpers import make_agent, make_batch

TEXT = tools.CONFIGS.read_text()
OPTIONS, PRESETS = tools.read_options()
DEFAULTS = {key: option.default for key, option in OPTIONS.items()}
NUMBERS = {key: value for key, value in DEFAULTS.items() if type(value) in (int, float)}
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


def test_every_option_and_preset_has_a_comment_and_every_option_a_section():
    assert [key for key, option in OPTIONS.items() if not (option.comment and option.section)] == []
    assert [name for name, preset in PRESETS.items() if not preset.comment] == []
    headings = re.findall("^  # (.+)", TEXT.split("\ndmc_vision:")[0], re.M)
    assert list(dict.fromkeys(option.section for option in OPTIONS.values())) == headings


def test_every_number_has_a_range():
    lists = [key for key, value in DEFAULTS.items() if isinstance(value, list) and value and type(value[0]) is int]
    assert [key for key in [*NUMBERS, *lists] if not OPTIONS[key].allowed] == []
    assert lists == ["size"]


def test_comments_are_read():
    assert OPTIONS["task"] == ("dmc_walker_walk", "Environment", "suite_domain_task[_variant]", ["column"])
    assert OPTIONS["encoder.cnn_keys"].section == OPTIONS["dyn_deter"].section == "World model"
    assert OPTIONS["batch_size"].section == "Training" and OPTIONS["act"].notes[0].startswith("SiLU|")
    assert OPTIONS["overlap"].may_change and OPTIONS["debug"].may_change and not OPTIONS["task"].may_change
    assert PRESETS["M"].comment == "a larger model"
    assert tools.marked("column") == ["seed", "task", "method", "mask_ratio", "nomlr", "nosimsr"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("  seed: 1\n", "line 3: found duplicate key"),
        ("  a: [\n", "line 4: expected the node content"),
        ("\tb: 3\n", "line 3: found"),
    ],
)
def test_damaged_file(tmp_path, text, message):
    path = tmp_path / "configs.yaml"
    path.write_text(f"defaults:\n  seed: 0\n{text}")
    with pytest.raises(tools.UserError) as caught:
        tools.load_config([], path)
    assert str(caught.value).startswith(f"{path}, {message}") and len(str(caught.value).splitlines()) == 1


def test_numbers_are_those_of_yaml_1_2(tmp_path):
    path = tmp_path / "configs.yaml"
    path.write_text("defaults:\n\n  # A\n  a: 1e-4  # small  [0 .. 1]\n  b: 1_000\n  c: off\n  d: [1e3]\n")
    config = vars(tools.load_config([], path))
    assert config == {"a": 1e-4, "b": 1000, "c": "off", "d": [1000.0]}
    assert [type(value) for value in config.values()] == [float, int, str, list] and type(config["d"][0]) is float


def test_no_number_is_read_as_text():
    for values in [DEFAULTS, *(preset.values for preset in PRESETS.values())]:
        for key, value in values.items():
            if isinstance(value, str):
                with pytest.raises(ValueError):
                    float(value)
                assert value not in ("True", "False"), key


def test_reading_is_fast():
    """The fastest of three, since the process's time includes what other tests have left to collect."""
    seconds = []
    for _ in range(3):
        tools._read_options.cache_clear()
        start = time.process_time()
        tools.load_config([])
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.3


def test_hidden_flags():
    assert {key: DEFAULTS[key] for key in HIDDEN} == HIDDEN


def test_presets_agree_with_the_types_of_the_defaults():
    for preset in PRESETS:
        config = tools.flatten(vars(load(f"--configs {preset}")))
        assert config.keys() == DEFAULTS.keys()
        for key, default in DEFAULTS.items():
            assert default is None or type(config[key]) is type(default), key
        for key, value in PRESETS[preset].values.items():
            assert config[key] == value


def test_defaults_pass_their_own_checks():
    def text(value):
        return ",".join(map(str, value)) if isinstance(value, list) else value

    flags = [f"--{key}={text(default)}" for key, default in DEFAULTS.items() if default is not None]
    assert tools.flatten(vars(tools.load_config(flags))) == DEFAULTS


def test_presets_merge_in_order_and_flags_win_wherever_they_stand():
    tiny = PRESETS["tiny"].values
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
        ("--expl_extr_scale -1", "expl_extr_scale", -1.0),
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


def end(text):
    """Of a range: its value at the defaults."""
    name = text.lstrip("<>")
    return float(DEFAULTS.get(name, name))


def is_whole(key):
    return type(DEFAULTS[key]) is int or key == "size"


def inside(key):
    """A strategy of what the notes of an option allow, None if they say nothing."""
    option, whole = OPTIONS[key], is_whole(key)
    if "regex" in option.notes:
        return st.sampled_from(["image", ".*", "$^", "a|b"])
    choices = []
    for allowed in option.allowed:
        if ends := tools.split_range(allowed):
            low, high = map(end, ends)
            if whole:
                choices.append(st.integers(int(low) + ends[0].startswith(">"), int(high) - ends[1].startswith("<")))
            else:
                open_ends = {"exclude_min": ends[0].startswith(">"), "exclude_max": ends[1].startswith("<")}
                choices.append(st.floats(low, high, **open_ends))
        else:
            number = int if whole else float
            choices.append(st.just(number(allowed) if key in NUMBERS else allowed.replace(":N", ":3")))
    return st.one_of(choices) if choices else None


def outside(key):
    """A strategy of what they do not."""
    option = OPTIONS[key]
    if "regex" in option.notes:
        return st.sampled_from(["(", "[", "*", "a{99999999999}", "(?P<a", "\\"])
    if key not in NUMBERS and key != "size":
        return st.text(st.characters(exclude_characters=",", exclude_categories=["Cs"]), min_size=1).filter(
            lambda text: text not in option.allowed and not re.fullmatch(r"cuda:\d+", text)
        )
    ends = [ends for allowed in option.allowed if (ends := tools.split_range(allowed))]
    numbers = st.integers() if is_whole(key) else st.floats(allow_nan=False, allow_infinity=False)
    if not ends:
        return numbers.filter(lambda number: str(number) not in option.allowed)
    (low, high), (least, most) = ends[0], map(end, ends[0])
    excluded = [least] * low.startswith(">") + [most] * high.startswith("<")
    beyond = numbers.filter(lambda number: not least <= number <= most and str(number) not in option.allowed)
    return st.one_of(beyond, *(st.just(int(number) if is_whole(key) else number) for number in excluded))


LIMITED = [key for key in OPTIONS if inside(key) is not None]


@settings(max_examples=300)
@given(st.data())
def test_values_that_an_option_allows_load(data):
    key = data.draw(st.sampled_from(LIMITED))
    value = data.draw(inside(key))
    # What other options have for an end follows.
    argv = ["--actor_max_std=100"] if key == "actor_min_std" else []
    argv += ["--actor_min_std=5e-324"] if key == "actor_max_std" and value < 0.1 else []
    argv += ["--eval_every=1e6", "--time_limit=1e6"] if key == "action_repeat" else []
    argv += ["--disag_offset=0"] if key == "batch_length" else []
    if isinstance(DEFAULTS[key], list):
        value = data.draw(st.lists(st.just(value), min_size=2, max_size=2))
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    config = tools.flatten(vars(tools.load_config([*argv, f"--{key}={text}"])))
    assert config[key] == value and type(config[key]) is type(DEFAULTS[key])


@settings(max_examples=600)
@given(st.data())
def test_other_values_end_in_one_line_that_names_the_option(data):
    key = data.draw(st.sampled_from(LIMITED))
    items = [data.draw(outside(key))] * (2 if "2 items" in OPTIONS[key].notes else 1)
    message = error([f"--{key}={','.join(map(str, items))}"])
    assert message.startswith(f"--{key} takes ") and len(message.splitlines()) == 1


@settings(max_examples=30)
@given(st.lists(st.text(st.characters(exclude_characters=",", exclude_categories=["Cs"]), min_size=1), min_size=1))
def test_lists_survive_the_command_line(words):
    assert tools.load_config([f"--eval_task={','.join(words)}"]).eval_task == words


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
        ("--size 64", "--size takes two values separated by a comma: image height and width in pixels"),
        ("--size 64,64,3", "--size takes two values"),
        ("--size 64,9999", "--size takes a whole number from 1 to 1024, not 9999"),
        ("--size 64,a", "--size takes a whole number, not 'a'"),
        ("--imag_gradient reinforc", "did you mean reinforce?"),
        ("--device gpu", "--device takes auto, cpu, cuda, cuda:N, not 'gpu'"),
        ("--precision 8", "--precision takes 32, 16"),
        ("--discount 2", "--discount takes a number from 0 to 1, not 2"),
        ("--seed -1", "--seed takes a whole number from 0 to 4e9, not -1"),
        ("--train_ratio 0", "--train_ratio takes a number from 1e-6 to 1e6, not 0"),
        ("--weight_decay 1", "--weight_decay takes a number from 0 to below 1, not 1"),
        ("--dyn_discrete 1", "--dyn_discrete takes a whole number from 2 to 1024 or 0, not 1"),
        ("--actor_min_std 2", "--actor_min_std takes a number above 0 up to actor_max_std (1.0), not 2"),
        ("--actor_max_std 0.05", "--actor_min_std takes a number above 0 up to actor_max_std (0.05), not 0.1"),
        ("--eval_every 1", "--eval_every takes a whole number from action_repeat (2) to 1e12, not 1"),
        ("--time_limit 1e15", "--time_limit takes a whole number from action_repeat (2) to 1e6, not 1000000000000000"),
        ("--batch_length 1", "--batch_length takes a whole number from 2 to"),
        ("--batch_length 5 --disag_offset 5", "takes a whole number from 0 to below batch_length (5), not 5"),
        ("--act Foo", "--act takes SiLU, ReLU, "),
        ("--encoder.act silu", "--encoder.act takes SiLU, ReLU, "),
        ("--encoder.cnn_keys (", "--encoder.cnn_keys takes a regular expression, not '(': missing )"),
        ("--grad_heads reward,image", "--grad_heads takes reward, cont, decoder, not 'image'"),
        ("--augmentation crop", "--augmentation takes none, intensity, affine, blur, shift, not 'crop'"),
        ("stray", "unexpected argument 'stray'"),
        ("-s 1", "unexpected argument '-s'"),
    ],
)
def test_errors(line, message):
    assert message in error(line)


def test_errors_in_a_preset(tmp_path):
    path = tmp_path / "configs.yaml"
    path.write_text(TEXT + "\nmine:\n  step: 3\nyours:\n  steps: 0.5\ntheirs:\n  steps: [1]\nours:\n  steps: -1\n")
    messages = {"mine": "did you mean steps?", "yours": "whole number", "theirs": "single value"}
    messages["ours"] = "takes a whole number from 0 to 1e12, not -1"
    for preset, message in messages.items():
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
    for words in ["per policy step (from 0 to 1)", "(from 0 to 1e12; may change on resume)", "no effect)", "or 0)"]:
        assert words in done.stdout
    assert "0 .. 1" not in done.stdout and "[resume]" not in done.stdout, "the notes come in words"


def test_options_without_effect_say_so(capsys):
    load("--traindir x --debug --post_mlr False --actor_temp 0.1 --seed 1")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" has no effect")[0] for line in lines] == ["warning: --traindir", "warning: --debug"]
    load("--configs debug")
    assert capsys.readouterr().err == ""


def test_choices_are_those_of_the_code():
    assert [float(x) for x in OPTIONS["distracting_cs_intensity"].allowed] == list(distracting_cs.VIDEOS)
    assert OPTIONS["opt"].allowed == list(tools.OPTIMIZERS)
    for key in ("act", "norm", "encoder.act", "encoder.norm", "decoder.act", "decoder.norm"):
        assert all(hasattr(torch.nn, name) for name in OPTIONS[key].allowed)


def structural(key):
    """Arguments with which an option of the networks or the losses takes its smallest value and each of its words."""
    option = OPTIONS[key]
    extra = ["--expl_behavior=plan2explore"] if key.startswith(("disag_", "expl_")) else []
    extra += ["--video_pred_log"] if key.startswith("decoder.") else []
    extra += ["--encoder.mlp_keys=.*"] if key.startswith("encoder.") else []
    extra += ["--dyn_discrete=0"] if key in ("dyn_mean_act", "dyn_std_act", "dyn_min_std") else []
    extra += ["--dynamics=tssm"] if key.startswith("tssm_") else []
    for allowed in option.allowed:
        ends = tools.split_range(allowed)
        low = ends[0] if ends else ""
        value = 1e-6 if low.startswith(">") else DEFAULTS.get(low, low) if ends else allowed
        if key != "actor_max_std" and value not in (str(option.default), "onehot"):
            yield [*extra, f"--{key}={value}"]


def test_all_words_and_smallest_values_make_an_update():
    sections = {OPTIONS[key].section for key in ("mask_ratio", "dyn_deter", "batch_size", "discount", "disag_units")}
    keys = [key for key in LIMITED if OPTIONS[key].section in sections and "no effect" not in OPTIONS[key].notes]
    lines = [argv for key in keys for argv in structural(key)]
    assert len(lines) > 100
    for argv in [*lines, ["--actor_dist=onehot"]]:
        discrete = "--actor_dist=onehot" in argv
        agent = make_agent(*argv, vectors=True, discrete=discrete)
        for name, value in agent.update(make_batch(discrete=discrete)).items():
            assert not isinstance(value, torch.Tensor) or value.isfinite(), (argv, name)


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


def test_an_option_younger_than_the_run_had_its_default(tmp_path):
    tools.save_config(load("--seed 1"), tmp_path, [])
    saved = tools.read_config(tmp_path)
    del saved["config"]["aug_prob"], saved["config"]["encoder"]["minres"], saved["config"]["on_nan"]
    saved["config"] |= {"forgotten": 3}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    tools.check_config(load("--seed 1 --on_nan skip"), tmp_path)
    with pytest.raises(tools.UserError) as caught:
        tools.check_config(load("--seed 1 --aug_prob 0.5 --encoder.minres 8"), tmp_path)
    message = str(caught.value)
    assert "encoder.minres was 4, now 8; aug_prob" in message or "aug_prob was 1.0, now 0.5; encoder" in message


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
