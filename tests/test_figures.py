"""Plots and report: statistics, binning, grouping, files, labels, unfinished and broken runs."""

import base64
import csv
import gzip
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dreamer
import tools
from figures import grid, openloop, plot, report, robustness


def write_run(folder, values, *, steps=None, task="dmc_walker_stand", seed=0, key="eval/return", **options):
    """The files of a run as dreamer.py writes them, with `values` at `steps` (default every 100 frames)."""
    config = tools.load_config(["--eval_every", "100", "--steps", "500"])
    vars(config).update(task=task, seed=seed, logdir=str(folder), **options)
    tools.save_config(config, folder, ["--seed", str(seed)])
    steps = steps or [100 * (i + 1) for i in range(len(values))]
    rows = [json.dumps({"step": s, key: v, "time": 36.0}) for s, v in zip(steps, values, strict=True)]
    # Other rows in between, as in real runs.
    (folder / "metrics.jsonl").write_text("\n".join(['{"step": 1, "episode/return": 1.0}', *rows]) + "\n")
    return folder


@pytest.fixture
def sweep(tmp_path):
    """2 tasks x 2 methods x 2 seeds; one run is unfinished, and one was killed while writing a line."""
    for task, level in [("dmc_walker_stand", 100.0), ("dmc_cheetah_run", 500.0)]:
        for seed in range(2):
            full = write_run(tmp_path / task / "full" / str(seed), [level + seed, level + 10], task=task, seed=seed)
            values = [level / 2] * (1 if seed else 2)
            write_run(tmp_path / task / "neither" / str(seed), values, task=task, seed=seed, nomlr=True, nosimsr=True)
    with open(full / "metrics.jsonl", "a") as file:
        file.write('{"step": 300, "eval/ret')
    return tmp_path


# --- statistics


def test_iqm_is_the_mean_of_the_middle_half():
    assert plot.iqm([np.array([0.0, 10.0, 20.0, 1000.0])])[0] == 15
    assert plot.iqm([np.array([0.0, 10.0]), np.array([20.0, 1000.0])])[0] == 15
    assert plot.iqm([np.array([1.0, 2.0, 6.0])])[0] == 3  # too few for quartiles


def test_the_interval_covers_the_true_mean_about_as_often_as_stated():
    rng = np.random.default_rng(1)
    draws = rng.normal(size=(200, 20))
    covered = [low <= 0 <= high for _, low, high in (plot.iqm([draw]) for draw in draws)]
    assert 0.86 < np.mean(covered) < 0.99


def test_the_bootstrap_is_stratified():
    """Runs are resampled within their task: the gap between two tasks must not widen the interval."""
    rng = np.random.default_rng(0)
    easy, hard = rng.normal(900, 5, 6), rng.normal(100, 5, 6)
    mean, low, high = plot.iqm([easy, hard])
    assert low <= mean <= high and high - low < 40
    _, low, high = plot.iqm([np.concatenate([easy, hard])])
    assert high - low > 100


def test_one_run_has_no_interval():
    assert plot.iqm([np.array([5.0])])[0] == 5 and np.isnan(plot.iqm([np.array([5.0])])[1:]).all()


def test_bins():
    """Closed on the left; a run counts once, with the mean of its rows; `complete` is false where a run is missing."""
    one = plot.Run("t", "m", 0, np.array([99.0, 100.0, 150.0, 200.0]), np.array([1.0, 2.0, 4.0, 8.0]))
    two = plot.Run("t", "m", 1, np.array([100.0]), np.array([5.0]))
    points = plot.curve([one, two], 100)
    assert [(p.step, p.iqm, p.runs, p.complete) for p in points] == [
        (99, 1, 1, False),
        (112.5, 4, 2, True),
        (200, 8, 1, False),
    ]


def test_lines_are_faded_where_a_run_is_missing():
    """A run that begins late: the full line holds only the bins of both."""
    runs = [plot.Run("t", "m", i, np.arange(50.0 + 100 * i, 400, 100), np.ones(4 - i)) for i in range(2)]
    axis = plot.plt.figure().add_subplot()
    plot.draw_curve(axis, plot.curve(runs, 100), "m", "black", "o")
    full, faded = axis.lines
    assert np.isfinite(full.get_ydata()).tolist() == [False, True, True, True]
    assert np.isfinite(faded.get_ydata()).all() and faded.get_alpha() < 0.5 < (full.get_alpha() or 1)
    plot.plt.close("all")


# --- reading


def test_runs_are_grouped_by_task_and_by_what_differs(sweep):
    groups = plot.group(plot.read_runs([sweep]))
    assert {name: len(runs) for name, runs in groups.items()} == {
        (task, method): 2
        for task in ("dmc_walker_stand", "dmc_cheetah_run")
        for method in ("HRSSM", "HRSSM without both losses")
    }


def test_names_of_methods(tmp_path, capsys):
    write_run(tmp_path / "a", [1.0], mask_ratio=0.3, threads=2)
    write_run(tmp_path / "b", [1.0], mask_ratio=0.7, threads=4)
    write_run(
        tmp_path / "c", [1.0], task="dmc_cheetah_run", mask_ratio=0.7, action_repeat=4
    )  # with the task, not within
    methods = [run.method for run in plot.read_runs([tmp_path], method="ours")]
    assert methods == ["ours mask ratio 0.3", "ours mask ratio 0.7", "ours mask ratio 0.7"]
    write_run(tmp_path / "d", [1.0], mask_ratio=0.3, patch_size=8, block_size=2, encoder_tau=0.1)
    assert {run.method for run in plot.read_runs([tmp_path])} == {"HRSSM #1", "HRSSM #2", "HRSSM #3"}
    assert "HRSSM #1: mask ratio 0.3, patch size 10" in capsys.readouterr().out


def test_methods_have_names_and_options_of_their_own(tmp_path, capsys):
    """A decoder is part of `dreamer` and a probe elsewhere; runs from before the option `method` are HRSSM."""
    write_run(tmp_path / "a", [1.0])
    saved = json.loads((tmp_path / "a/config.json").read_text())
    saved["config"].pop("method", None)
    (tmp_path / "a/config.json").write_text(json.dumps(saved))
    write_run(tmp_path / "b", [1.0], method="hrssm", nosimsr=True, decoder={"cnn_depth": 8})
    write_run(tmp_path / "c", [1.0], method="dreamer", decoder={"cnn_depth": 8})
    write_run(tmp_path / "d", [1.0], method="dreamer")
    write_run(tmp_path / "e", [1.0], method="repo")
    write_run(tmp_path / "f", [1.0], method="hrssm", nomlr=True, mask_ratio=0.3)
    assert capsys.readouterr().err == ""
    runs = plot.read_runs([tmp_path])
    assert [run.method for run in runs] == [
        "HRSSM mask ratio 0.5",
        "HRSSM without bisimulation, mask ratio 0.5",
        "DreamerV3 decoder cnn depth 8",
        "DreamerV3 decoder cnn depth 32",
        "RePo",
        "HRSSM without latent reconstruction, mask ratio 0.3",
    ]
    assert capsys.readouterr().err == ""


def test_the_decoder_of_an_autoencoder_is_part_of_the_method(tmp_path):
    for depth in (8, 32):
        write_run(tmp_path / f"{depth}", [1.0], method="rssm", autoencoder="internal", decoder={"cnn_depth": depth})
    names = {run.method for run in plot.read_runs([tmp_path])}
    assert names == {"RSSM decoder cnn depth 8", "RSSM decoder cnn depth 32"}


def test_every_method_has_a_display_name_and_a_name_in_sweep():
    assert plot.METHODS.keys() == dreamer.METHODS.keys()
    sweep = (tools.ROOT / "setup/sweep.sh").read_text()
    assert f"{' | '.join(plot.METHODS)})" in sweep and f"{', '.join(plot.METHODS)} " in sweep


def test_unequal_settings_of_two_methods_cost_a_warning(tmp_path, capsys):
    write_run(tmp_path / "a", [1.0], method="hrssm", batch_size=8)
    write_run(tmp_path / "b", [1.0], method="dreamer", batch_size=16)
    assert [run.method for run in plot.read_runs([tmp_path])] == ["HRSSM", "DreamerV3"]
    assert "the methods do not share all their settings: batch_size" in capsys.readouterr().err


@pytest.mark.parametrize(
    "suffix, start", [(".svg", b"<?xml"), (".pdf", b"%PDF"), (".png", b"\x89PNG"), ("", b"\x89PNG")]
)
def test_the_suffix_of_out_decides_the_format(sweep, tmp_path, suffix, start):
    assert plot.main([str(sweep), "--out", str(tmp_path / f"c{suffix}")]) == 0
    assert (tmp_path / f"c{suffix or '.png'}").read_bytes().startswith(start)


def test_unknown_format(sweep, capsys):
    assert plot.main([str(sweep), "--out", str(sweep / "c.html")]) == 2
    assert "must be one of .png, .pdf, .svg" in capsys.readouterr().err


@pytest.mark.parametrize("tasks, methods", [(1, 4), (2, 2), (3, 8), (5, 3)])
def test_text_stays_inside_the_picture(tmp_path, tasks, methods):
    """Titles and labels of the axes within the figure, neighbouring panels apart."""
    for task, method, seed in itertools.product(range(tasks), range(methods), range(2)):
        folder = tmp_path / f"{task}_{method}_{seed}"
        name = f"{'gym' if task else 'dmc'}_walker{task}_stand_distracting_cs"
        write_run(folder, [1.0, 2.0], task=name, seed=seed, mask_ratio=method / 10, steps=[100000, 400000])
    _, results = plot.load(plot.arguments("", "x").parse_args([str(tmp_path)]))
    figure = plot.draw(results)
    figure.canvas.draw()
    boxes = [axis.get_tightbbox() for axis in figure.axes]
    width, height = figure.canvas.get_width_height()
    for box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    plot.plt.close(figure)


def test_a_repeated_row_replaces_the_first_and_null_is_no_value(tmp_path):
    write_run(tmp_path / "a", [1.0, 2.0, 3.0, None], steps=[100, 200, 200, 300])
    (run,) = plot.read_runs([tmp_path / "a"])
    assert (run.steps.tolist(), run.values.tolist()) == ([100, 200], [1, 3])


def test_runs_that_cannot_be_used_cost_a_warning(sweep, capsys):
    broken = write_run(sweep / "broken", [1.0])
    (broken / "config.json").write_text("{")
    write_run(sweep / "empty", [])
    (write_run(sweep / "gone", [1.0]) / "metrics.jsonl").unlink()
    assert len(plot.read_runs([sweep, sweep / "nowhere"])) == 8
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 4
    for name, reason in [("broken", "cannot read"), ("empty", "no eval/return yet"), ("gone", "no eval/return yet")]:
        assert any(name in line and reason in line for line in warnings), warnings


def test_the_same_run_named_twice_counts_once(sweep, capsys):
    assert len(plot.read_runs([sweep, sweep / "dmc_cheetah_run"])) == 8
    write_run(sweep / "again", [1.0], seed=1)
    plot.read_runs([sweep])
    assert "2 runs of dmc_walker_stand, HRSSM, seed 1" in capsys.readouterr().err


@pytest.mark.parametrize("script", [plot, report])
def test_nothing_to_plot(script, tmp_path, capsys):
    assert script.main([str(tmp_path), "--out", str(tmp_path / "x.png")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: nothing to plot")
    assert script.main([str(write_run(tmp_path / "a", [1.0])), "--metric", "eval/nope"]) == 2


# --- files


def rows(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_files(sweep, tmp_path):
    published = [
        {"task": "dmc_walker_stand", "method": "other", "seed": s, "xs": [50, 150, 9000], "ys": [7.0, s, 9.0]}
        for s in range(4)
    ]
    (tmp_path / "p.json.gz").write_bytes(gzip.compress(json.dumps(published).encode()))
    assert plot.main([str(sweep), "--out", str(tmp_path / "c.png"), "--published", str(tmp_path / "p.json.gz")]) == 0
    picture = np.asarray(Image.open(tmp_path / "c.png").convert("RGB"))
    for color in plot.COLORS[:2]:
        rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert (picture == rgb).all(-1).sum() > 50  # lines of two methods
    assert (tmp_path / "c.pdf").read_bytes().startswith(b"%PDF")

    points = {(r["source"], r["task"], r["method"], float(r["step"])): r for r in rows(tmp_path / "c.csv")}
    assert float(points["run", "dmc_walker_stand", "HRSSM", 100]["iqm"]) == 100.5
    assert points["run", "dmc_walker_stand", "HRSSM without both losses", 200]["runs"] == "1"
    assert float(points["published", "dmc_walker_stand", "other", 150]["iqm"]) == 1.5
    assert max(step for *_, step in points) == 200  # published curves end where ours do

    final = {(r["task"], r["method"]): r for r in rows(tmp_path / "c_final.csv")}
    assert float(final["dmc_walker_stand", "HRSSM"]["step"]) == 100  # one run is unfinished
    assert float(final["all tasks", "HRSSM"]["iqm"]) == pytest.approx(np.mean([100, 101, 500, 501][1:3]))
    assert final["all tasks", "HRSSM"]["runs"] == "4"


def test_returns_of_different_scales_are_not_averaged(sweep, capsys):
    write_run(sweep / "gym", [-5.0], task="gym_Pendulum-v1")
    args = plot.arguments("", "x").parse_args([str(sweep)])
    assert ("all tasks", "HRSSM") not in plot.load(args)[1].final
    assert "--same_scale" in capsys.readouterr().err
    args.same_scale = True
    assert ("all tasks", "HRSSM") in plot.load(args)[1].final


def test_rows_of_another_form_are_left_out(tmp_path):
    run = write_run(tmp_path / "run", [10, 20])
    with open(run / "metrics.jsonl", "a") as file:
        for step in ('"many"', "null", "[]", "-1", "NaN", "true"):
            file.write(f'{{"step": {step}, "eval/return": 5}}\n')
        for value in ('"high"', "[1]", "{}", "true", "NaN", "1e400"):
            file.write(f'{{"step": 300, "eval/return": {value}}}\n')
        file.write("3\n[]\n" + "[" * 9999 + "\n")
    (found,) = plot.read_runs([str(tmp_path)])
    assert found.steps.tolist() == [100, 200] and found.values.tolist() == [10, 20]
    assert report.main([str(tmp_path), "--out", str(tmp_path / "r.html")]) == 0


PUBLISHED = ["", "3", "{}", "[1]", '[{"task": "t", "method": "m", "seed": 0, "xs": [1, 2], "ys": [1]}]']
PUBLISHED += ['[{"task": [], "method": "m", "seed": 0, "xs": [1], "ys": [1]}]', "[" * 9999]
PUBLISHED += ['[{"task": "t", "method": "m", "seed": 0, "xs": [[1]], "ys": [[1]]}]']
PUBLISHED += ['[{"task": "t", "method": "m", "seed": 0, "xs": [NaN], "ys": [1]}]']


@pytest.mark.parametrize("text", PUBLISHED)
def test_published_curves_of_another_form(text, tmp_path):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(tools.UserError, match="cannot read --published"):
        plot.read_published(str(tmp_path / "p.json"))


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "run,task\n", "run,task,return\nx\n", "\0"])
def test_a_robustness_table_of_another_form(text, tmp_path, capsys):
    write_run(tmp_path / "run", [10, 20])
    (tmp_path / "r.csv").write_text(text)
    argv = [str(tmp_path), "--robustness", str(tmp_path / "r.csv"), "--out", str(tmp_path / "r.html")]
    assert report.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "r.csv" in error


PROGRAMS = [plot.main, report.main, robustness.main, openloop.main]


@pytest.mark.parametrize("main", PROGRAMS, ids=lambda main: main.__module__)
def test_out_is_checked_before_the_work(main, tmp_path, capsys, monkeypatch):
    for module, name in ((plot, "read_runs"), (robustness, "load")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("it has begun to work"))
    assert main(["x", "--out", str(tmp_path / "absent/x.png")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --out ") and error.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device without space")
@pytest.mark.parametrize("main", [plot.main, report.main], ids=lambda main: main.__module__)
def test_a_full_disk_is_one_line(main, sweep, tmp_path, capsys):
    (tmp_path / "full.png").symlink_to("/dev/full")
    assert main([str(sweep), "--out", str(tmp_path / "full.png")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "No space left" in error and error.count("\n") == 1


def test_published_csv(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("task,method,seed,step,value\nt,m,0,20,2\nt,m,0,10,1\nt,m,1,10,3\n")
    one, two = plot.read_published(str(path))
    assert (one.seed, one.steps.tolist(), one.values.tolist(), two.seed) == (0, [10, 20], [1, 2], 1)
    for text in ("a,b\n1,2\n", "task,method,seed,step,value\nt,m,0,x,2\n"):
        path.write_text(text)
        with pytest.raises(tools.UserError, match="columns task, method, seed, step, value"):
            plot.read_published(str(path))


def test_report_is_one_self_contained_page(sweep):
    run = sweep / "dmc_walker_stand" / "full" / "0"
    (run / "video").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16, 3), dtype=np.uint8)
    for step, frames in zip((900, 1000), noise, strict=True):
        tools.save_mp4(run / "video" / f"eval_policy_{step}.mp4", frames, 10)
    Image.new("RGB", (12 * 64, 3 * 64)).save(run / "video" / "eval_openloop_900.png")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 300, "robustness/video/denoising_factor": 0.4321}\n')
    write_run(sweep / "<b>", [1.0], task="dmc_<b>_run")
    (sweep / "rb.csv").write_text("run,task,denoising_factor\nlog,dmc_walker_stand_video,0.8765\n")
    Image.new("RGB", (8, 8)).save(sweep / "rb.png")
    argv = [str(sweep), "--out", str(sweep / "r.html"), "--robustness", str(sweep / "rb.csv")]
    assert report.main(argv) == 0
    page = (sweep / "r.html").read_text()
    (video,) = re.findall(r'src="data:video/mp4;base64,([^"]+)"', page)
    assert base64.b64decode(video) == (run / "video" / "eval_policy_1000.mp4").read_bytes()  # the latest
    assert len(re.findall(r'<img [^>]*src="data:image/png;base64', page)) == 3  # curves, open loop, robustness
    assert "0.4321" in page and "0.8765" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "dmc_<b>" not in page and "dmc_&lt;b&gt;" in page
    assert "<tr><td>nomlr</td>" in page and tools.package_version("torch") in page


def test_a_grid_enlarges_without_smoothing_and_labels_rows_and_columns():
    frame = np.full((8, 8, 3), 200, np.uint8)
    frame[0, 0] = 10
    picture = np.asarray(grid.draw([[frame, None], [frame, frame]], ["one", "two"], ["a", "b"], tile=20))
    values, counts = np.unique(picture[(picture == picture[..., :1]).all(-1)][:, 0], return_counts=True)
    pixels = dict(zip(values.tolist(), counts.tolist(), strict=True))
    assert pixels[200] >= 3 * 63 * 9 and 3 * 9 <= pixels[10] < 4 * 9  # three tiles of 8 x 8 cells of 3 x 3 pixels
    left, top = picture.shape[1] - 2 * (24 + grid.GAP), picture.shape[0] - 2 * (24 + grid.GAP)
    assert (picture[:top, left:] < 100).any() and (picture[top:, :left] < 100).any()  # both kinds of label
    assert (picture[top : top + 24, -24 - grid.GAP :] == 255).all()  # the blank tile


@pytest.mark.parametrize("rows", [3, 4])
def test_open_loop_strip(rows, monkeypatch):
    """A row per part of the video, the observed frame only where there are four; a line after the frames seen."""
    calls = []
    monkeypatch.setattr(grid, "draw", lambda *args, **options: calls.append((args, options)))
    columns = np.arange(rows * 16, dtype=np.uint8)[None, :, None, None] * np.ones((12, 1, 16, 3), np.uint8)
    grid.open_loop(columns, 16)
    ((tiles, labels, titles), options) = calls[0]
    assert labels == ["observed", "truth", "model", "error"][-rows:] and options == {"rule": 2}
    assert titles[:3] == ["seen t=0", "seen t=5", "imagined t=10"] and len(titles) == 12
    assert [tile[0][0, 0, 0] for tile in tiles] == [16 * i for i in range(rows)]
