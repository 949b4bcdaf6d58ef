"""Held-out background clips: how they are chosen, that training never sees them, and the final evaluation."""

import json
import shutil

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dreamer
import envs
import tools
from envs import distracting_cs, video
from figures import plot, report
from tests.helpers import SMALL, make_config
from tests.test_train import start_in_process

LEVELS = range(20, 240, 20)  # grey levels of the clips
TASK = "dmc_walker_stand_video"


@pytest.fixture(scope="module", params=["video", "images"])
def clips(request, tmp_path_factory):
    """The name of the source, and a folder of clips that each show one grey level of their own."""
    folder = tmp_path_factory.mktemp("clips")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HRSSM_CACHE", str(folder / "cache"))
        for level in LEVELS:
            frame = np.full((64, 64, 3), level, np.uint8)
            if request.param == "images":
                cv2.imwrite(str(folder / f"{level}.png"), frame)
            else:
                tools.save_mp4(folder / f"{level}.mp4", np.stack([frame] * 4), 10)
        yield request.param, folder / f"*.{'png' if request.param == 'images' else 'mp4'}"


def backgrounds(images: np.ndarray) -> set[int]:
    """The levels shown by images (T,H,W,3): each one's most frequent colour, which is that of the sky."""
    levels = [np.bincount(image[..., 0].ravel(), minlength=256).argmax() for image in images]
    return {min(LEVELS, key=lambda known, shown=shown: abs(known - shown)) for shown in np.unique(levels)}


# --- the choice -----------------------------------------------------------------------------------------------------


@given(st.lists(st.text("abcdef0123456789", min_size=1), min_size=1, unique=True), st.floats(0, 1), st.randoms())
def test_the_split_depends_on_the_name_alone(names, share, random):
    held_out = [name for name in names if video.is_held_out(f"a/{name}", share)]
    shuffled = random.sample(names, len(names))
    assert {name for name in shuffled if video.is_held_out(f"/b/c/{name}", share)} == set(held_out)
    assert all(video.is_held_out(name, min(1.0, share + 0.1)) for name in held_out)  # a larger share holds them too
    assert not any(video.is_held_out(name, 0.0) for name in names)


def test_the_share_is_met():
    assert sum(video.is_held_out(f"clip{i}.mp4", 0.2) for i in range(10_000)) == pytest.approx(2000, abs=150)


def test_both_sides_have_clips():
    for unseen, count in ((True, "none"), (False, "all")):
        share = 1e-9 if unseen else 1 - 1e-9
        with pytest.raises(envs.EnvError, match=f"holds out {count} of the 3 clips"):
            video.split(["a", "b", "c"], share, unseen)


def test_named_clips_are_taken_from_training(clips, tmp_path):
    kind, pattern = clips
    file = sorted(pattern.parent.glob(pattern.name))[0]
    options = {"holdout_clips": 0.0, "resource_files": str(pattern), "eval_resource_files": str(file)}
    assert video.find_clips(kind, **options, unseen=True) == [str(file)]
    assert str(file) not in video.find_clips(kind, **options, unseen=False)
    shutil.copy(file, tmp_path)
    (tmp_path / "link").symlink_to(file)
    options["eval_resource_files"] = str(tmp_path / "link")  # another name for the same file
    assert str(file) not in video.find_clips(kind, **options, unseen=False)
    with pytest.raises(envs.EnvError, match="leaves no clip"):
        video.find_clips(kind, **options | {"resource_files": str(file)}, unseen=False)
    with pytest.raises(envs.EnvError, match="no .* matches .*--eval_resource_files"):
        video.find_clips(kind, **options | {"eval_resource_files": "/nowhere/*"}, unseen=True)


def test_names_of_evaluations():
    def names(*argv):
        return {name: tuple(it) for name, it in dreamer.evaluations(make_config(*argv)).items()}

    clean, split = "dmc_walker_stand", ("--distracting_cs_split", "--task", "dmc_walker_stand_distracting_cs")
    assert names("--task", TASK) == {"": (TASK, "")}
    assert names("--task", TASK, "--holdout_clips", "0.2") == {"seen": (TASK, "seen"), "unseen": (TASK, "unseen")}
    assert names("--task", TASK, "--holdout_clips", "0.2", "--img_source", "noise") == {"": (TASK, "")}
    both = names("--task", clean, "--eval_task", f"{clean},{TASK}", "--eval_resource_files", "x")
    assert list(both) == ["clean", "video/seen", "video/unseen"]
    assert list(names(*split)) == ["seen", "unseen"]
    assert list(names(*split[1:])) == [""]
    assert dreamer.evaluation_metrics("seen", {"return": 1.0}) == {"eval/seen/return": 1.0, "eval/return": 1.0}
    assert dreamer.evaluation_metrics("unseen", {"return": 1.0}) == {"eval/unseen/return": 1.0}


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--task dmc_walker_stand --holdout_clips 0.2", "need a --task or --eval_task that shows clips"),
        (f"--task {TASK} --img_source noise --eval_resource_files x", "need a --task or --eval_task that shows clips"),
        (f"--task {TASK} --holdout_clips 0.2 --eval_resource_files x", "give one of them"),
        (f"--task {TASK} --holdout_clips 1", "from 0 to below 1"),
    ],
)
def test_settings_that_hold_out_nothing_are_refused(argv, message, capsys, tmp_path):
    assert dreamer.main([*argv.split(), "--logdir", str(tmp_path / "log")]) == 2
    assert message in capsys.readouterr().err


# --- the Distracting Control Suite ----------------------------------------------------------------------------------


def test_lists_of_the_distracting_control_suite():
    train, validation = distracting_cs.DAVIS, distracting_cs.DAVIS_VALIDATION
    assert (len(set(train)), len(set(validation)), set(train) & set(validation)) == (60, 30, set())
    assert list(train) == sorted(train) and list(validation) == sorted(validation)


@pytest.mark.parametrize("preset, seen, unseen", [("dcs_easy", 4, 4), ("dcs_medium", 8, 8), ("dcs_hard", 60, 30)])
def test_presets_of_the_distracting_control_suite(preset, seen, unseen, tmp_path, monkeypatch):
    for name in (*distracting_cs.DAVIS, *distracting_cs.DAVIS_VALIDATION):
        folder = tmp_path / "DAVIS/JPEGImages/480p" / name
        folder.mkdir(parents=True)
        (folder / "0.jpg").touch()
    monkeypatch.setenv("HRSSM_ASSETS", str(tmp_path / "none"))
    task = "dmc_cheetah_run_distracting_cs"
    config = make_config("--configs", preset, "--task", task, "--ds_resource_path", str(tmp_path))
    shown = [
        envs.clip_names(task, **dreamer.env_options(config) | {"unseen": found.clips == "unseen"})
        for found in dreamer.evaluations(config).values()
    ]
    assert shown == [list(distracting_cs.DAVIS[:seen]), list(distracting_cs.DAVIS_VALIDATION[:unseen])]


# --- runs -----------------------------------------------------------------------------------------------------------

SHORT = f"--configs tiny --task {TASK} --envs 2 --size 64,64 --time_limit 16 --steps 160 --eval_every 80 --prefill 20"
SHORT += " --log_every 0 --pretrain 1 --actor_start 0 --train_ratio 1 --eval_episode_num 2 --parallel False"
SHORT += f" --overlap False --total_frames 0 {SMALL} --holdout_clips 0.4"


def test_no_frame_of_a_held_out_clip_enters_replay(clips, tmp_path):
    kind, pattern = clips
    run = start_in_process(f"{SHORT} --img_source {kind} --resource_files {pattern}", tmp_path / "log")
    try:
        dreamer.train(run, lambda: False)
        names = {
            unseen: envs.clip_names(TASK, **dreamer.env_options(run.config) | {"unseen": unseen})
            for unseen in (False, True)
        }
        seen, unseen = ({int(name.split(".")[0]) for name in names[side]} for side in (False, True))
        assert seen | unseen == set(LEVELS) and not seen & unseen and len(unseen) > 2
        # All that replay ever held, in memory and on disk.
        stored = run.replay.storage["image"][: run.replay.fresh].numpy()
        assert len(stored) > 40
        assert backgrounds(stored) == seen
        for file in (tmp_path / "log/replay").glob("*.npz"):
            assert backgrounds(np.load(file)["image"]) <= seen
        # The evaluation on them does show them.
        for name, levels in (("seen", seen), ("unseen", unseen)):
            _, frames = dreamer.evaluate(run.agent, run.eval_envs[name], 2)
            assert backgrounds(frames) <= levels
    finally:
        run.close()
    rows = [json.loads(line) for line in (tmp_path / "log/metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "eval/seen/return" in row]
    assert len(rows) == 2
    assert all(row["eval/return"] == row["eval/seen/return"] and "eval/unseen/return" in row for row in rows)
    assert len(list((tmp_path / "log/video").glob("eval_unseen_policy_*.mp4"))) == 2


# --- the final evaluation -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with a final evaluation on seen and held-out clips, and its arguments."""
    folder = tmp_path_factory.mktemp("final")
    for level in LEVELS:
        cv2.imwrite(str(folder / f"{level}.png"), np.full((64, 64, 3), level, np.uint8))
    argv = f"{SHORT} --img_source images --resource_files {folder}/*.png --final_episodes 5 --logdir {folder / 'log'}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HRSSM_CACHE", str(folder / "cache"))
        assert dreamer.main(argv.split()) == 0
        yield folder / "log", argv.split()


def test_final_evaluation(finished):
    logdir, argv = finished
    found = tools.read_final_evaluation(logdir)
    assert (found["step"], found["episodes"], found["seed"], found["method"]) == (160, 5, 0, "hrssm")
    assert found["config_hash"] == tools.config_hash(tools.load_config(argv))
    assert found["git"]["commit"] and found["versions"]["torch"]
    assert list(found["evaluations"]) == ["eval/seen", "eval/unseen"]
    names = [set(result["clips"]["names"]) for result in found["evaluations"].values()]
    assert not names[0] & names[1] and len(names[0] | names[1]) == len(LEVELS)
    for result in found["evaluations"].values():
        returns = np.array(result["returns"])
        assert len(returns) == len(result["lengths"]) == 5
        assert (result["mean"], result["std"]) == pytest.approx((returns.mean(), returns.std()))
        for name in ("mean", "iqm"):
            low, high = result[f"{name}_interval"]
            assert low <= result[name] <= high


def test_final_evaluation_is_made_once_and_repeats(finished, capsys):
    logdir, argv = finished
    path = logdir / "final_eval.json"
    first, when = tools.read_final_evaluation(logdir), path.stat().st_mtime_ns
    assert dreamer.main(argv) == 0
    assert path.stat().st_mtime_ns == when, "the same command does not evaluate again"
    for again in ([*argv, "--eval_only"], argv):
        path.unlink()
        assert dreamer.main(again) == 0
        assert tools.read_final_evaluation(logdir)["evaluations"] == first["evaluations"]
    before = path.read_text()
    assert dreamer.main(["--eval_only", "--eval_noise", "0.9", "--logdir", str(logdir)]) == 0
    assert path.read_text() == before, "only --final_episodes asks for another"
    assert "dmc_walker_stand_video unseen" in capsys.readouterr().out


def test_summary_of_returns():
    summary = dreamer.summarise(np.array([0.0, 10, 20, 30, 40, 50, 60, 1000]))
    assert summary["iqm"] == 35 and summary["mean"] == pytest.approx(151.25)
    equal = dreamer.summarise(np.full(10, 7.0))
    assert (equal["mean"], equal["mean_interval"], equal["iqm_interval"]) == (7, [7, 7], [7, 7])
    single = dreamer.summarise(np.array([7.0]))
    assert (single["mean"], single["mean_interval"], single["iqm_interval"]) == (7, None, None)


def test_plot_and_report_read_it(finished, tmp_path):
    logdir, _ = finished
    found = tools.read_final_evaluation(logdir)["evaluations"]
    for metric, name in (("eval/return", "eval/seen"), ("eval/unseen/return", "eval/unseen")):
        runs = plot.read_runs([logdir], metric=metric)
        results = plot.analyse(runs, [], metric=metric, width=0, same_scale=False)
        assert [(point.step, point.iqm) for point in results.final.values()] == [(160, found[name]["mean"])]
    (logdir / "final_eval.json").rename(tmp_path / "kept")
    assert plot.read_runs([logdir])[0].final is None
    (tmp_path / "kept").rename(logdir / "final_eval.json")
    assert report.main([str(logdir), "--out", str(tmp_path / "report.html")]) == 0
    assert "eval/unseen (held-out clips)" in (tmp_path / "report.html").read_text()
