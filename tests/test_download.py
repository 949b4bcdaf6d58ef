"""setup/download.py against a real web server, real archives and real write errors."""

import contextlib
import hashlib
import http.server
import os
import resource
import subprocess
import sys
import threading
import zipfile

import cv2
import numpy as np
import pytest

import envs
from envs import distracting_cs
from setup import download
from tests.helpers import ROOT

CONTENT = bytes(range(256)) * 2000
BLOB = hashlib.sha1(b"blob %d\0" % len(CONTENT) + CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT at any path but /absent; the first response breaks off after `breaks_after` bytes."""

    def __init__(self, breaks_after=None, ranges=True):
        super().__init__(("127.0.0.1", 0), Handler)
        self.breaks_after, self.ranges, self.starts = breaks_after, ranges, []


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/absent":
            self.send_error(404)
            return
        start = int(self.headers.get("Range", "bytes=0-")[6:-1]) if self.server.ranges else 0
        self.server.starts.append(start)
        if start >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        self.wfile.write(CONTENT[start : self.server.breaks_after])
        self.server.breaks_after = None

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(**options):
    with Server(**options) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_resumes(tmp_path, ranges):
    target = tmp_path / "file"
    with serving(breaks_after=200_000, ranges=ranges) as (server, url):
        with pytest.raises(download.DownloadError, match="run the command again"):
            download.fetch(f"{url}/file", target, BLOB)
        assert names(tmp_path) == ["file.part"]
        download.fetch(f"{url}/file", target, BLOB)
        assert target.read_bytes() == CONTENT and names(tmp_path) == ["file"]
        download.fetch(f"{url}/file", target, BLOB)  # present: not requested again
        first, second = server.starts
        assert first == 0 and (100_000 < second <= 200_000 if ranges else second == 0)


def test_a_download_interrupted_after_its_last_byte(tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT)
    with serving() as (_, url):
        download.fetch(f"{url}/file", tmp_path / "file", BLOB)
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("part", [b"", b"something else"])
def test_wrong_content_is_discarded(tmp_path, part):
    if part:
        (tmp_path / "file.part").write_bytes(part)
    with serving() as (_, url), pytest.raises(download.DownloadError, match="wrong hash"):
        download.fetch(f"{url}/file", tmp_path / "file", BLOB if part else "0" * 40)
    assert names(tmp_path) == []


def test_missing_source(tmp_path):
    with serving() as (_, url), pytest.raises(download.DownloadError, match="404"):
        download.fetch(f"{url}/absent", tmp_path / "file")
    with pytest.raises(download.DownloadError, match="check --from"):
        download.fetch(str(tmp_path / "absent"), tmp_path / "file")
    assert names(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a device without space")
def test_no_space_left(tmp_path):
    (tmp_path / "file.part").symlink_to("/dev/full")
    with serving() as (_, url), pytest.raises(download.DownloadError, match="no space left.*HRSSM_ASSETS"):
        download.fetch(f"{url}/file", tmp_path / "file")
    assert names(tmp_path) == []


# --- whole sets -----------------------------------------------------------------------------------------------------


def run(assets, *argv, **options):
    """(exit status, standard error) of the command in a subprocess."""
    environ = os.environ | {"HRSSM_ASSETS": str(assets)}
    command = [sys.executable, ROOT / "setup/download.py", *argv]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, **options)
    return done.returncode, done.stderr


def davis_archive(path, extra=None, videos=distracting_cs.DAVIS):
    picture = cv2.imencode(".jpg", np.zeros((48, 85, 3), np.uint8))[1].tobytes()
    with zipfile.ZipFile(path, "w") as file:
        for name in videos:
            file.writestr(f"DAVIS/JPEGImages/480p/{name}/00000.jpg", picture)
        file.writestr("DAVIS/Annotations/480p/bear/00000.png", b"not wanted")
        if extra:
            file.writestr(extra, b"evil")
    return path


def assert_refused(result, message, assets):
    code, stderr = result
    lines = stderr.splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], stderr
    assert not list(assets.rglob("*.jpg")) and not list(assets.glob(".unpacking-*"))


def test_davis_from_an_archive(tmp_path):
    archive = davis_archive(tmp_path / "davis.zip")
    assert run(tmp_path / "assets", "davis", "--from", str(archive)) == (0, "")
    assert names(tmp_path / "assets") == ["davis"]
    assert names(tmp_path / "assets/davis/DAVIS") == ["JPEGImages"]
    assert len(distracting_cs.find_videos(str(tmp_path / "assets/davis"), 0.3)) == 60


@pytest.mark.parametrize("member", ["../evil", "DAVIS/../../evil", "/evil", "..\\evil", "C:/evil"])
def test_an_archive_that_would_write_outside_its_folder(tmp_path, member):
    archive = davis_archive(tmp_path / "davis.zip", extra=member)
    assert_refused(run(tmp_path / "assets", "davis", "--from", str(archive)), "outside its folder", tmp_path / "assets")
    assert not list(tmp_path.rglob("evil")) and not os.path.exists("/evil")


def test_a_truncated_archive(tmp_path):
    archive = davis_archive(tmp_path / "davis.zip")
    archive.write_bytes(archive.read_bytes()[:-2000])
    assert_refused(run(tmp_path / "assets", "davis", "--from", str(archive)), "is damaged", tmp_path / "assets")


def test_another_source_after_a_damaged_archive(tmp_path):
    """Neither a damaged archive nor half of one stands in the way of the next --from."""
    bad, good = tmp_path / "bad.zip", davis_archive(tmp_path / "davis.zip")
    bad.write_bytes(good.read_bytes()[:-2000])
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets/DAVIS-2017-trainval-480p.zip").write_bytes(bad.read_bytes())
    assert_refused(run(tmp_path / "assets", "davis", "--from", str(bad)), "is damaged", tmp_path / "assets")
    assert run(tmp_path / "assets", "davis", "--from", str(good)) == (0, "")
    assert len(distracting_cs.find_videos(str(tmp_path / "assets/davis"), 0.3)) == 60


def test_an_archive_that_does_not_fit(tmp_path):
    archive = davis_archive(tmp_path / "davis.zip", extra="DAVIS/JPEGImages/480p/bear/large.jpg")
    with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("DAVIS/JPEGImages/480p/bear/larger.jpg", bytes(1 << 22))
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 21, 1 << 21))  # noqa: E731
    result = run(tmp_path / "assets", "davis", "--from", str(archive), preexec_fn=limit)
    assert_refused(result, "free some space", tmp_path / "assets")


def test_an_archive_without_the_videos(tmp_path):
    archive = davis_archive(tmp_path / "davis.zip", videos=distracting_cs.DAVIS[:59])
    code, stderr = run(tmp_path / "assets", "davis", "--from", str(archive))
    assert code == 2 and "lacks 1 of 60 videos, such as walking" in stderr


def test_kinetics_from_either_layout(tmp_path):
    for clip in ("by_label/driving car/a.mp4", "by_label/running/b.mp4", "flat/abcdefghijk_000001_000011.mp4"):
        path = tmp_path / clip
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"clip")
    (tmp_path / "flat/train.csv").write_text("label,youtube_id\ndriving car,abcdefghijk\nrunning,lmnopqrstuv\n")
    assert run(tmp_path / "1", "kinetics", "--from", str(tmp_path / "by_label"))[0] == 0
    assert names(tmp_path / "1/kinetics/driving_car") == ["a.mp4"]
    assert run(tmp_path / "2", "kinetics", "--from", str(tmp_path / "flat"))[0] == 0
    assert names(tmp_path / "2/kinetics/driving_car") == ["abcdefghijk_000001_000011.mp4"]
    code, stderr = run(tmp_path / "3", "kinetics", "--from", str(tmp_path / "by_label/running"))
    assert code == 2 and "driving car" in stderr


def test_published_files_are_verified_by_hash(tmp_path):
    source = tmp_path / "mirror"
    source.mkdir()
    (source / "color_easy.pt").write_bytes(b"another file of that name")
    code, stderr = run(tmp_path / "assets", "dmcgs", "--from", str(source))
    assert code == 2 and "color_easy.pt is not the published file (wrong hash)" in stderr
    assert not list((tmp_path / "assets/dmcgs").glob("color_easy*"))


def test_dmcgs_from_a_local_copy(tmp_path, test_data):
    code, stderr = run(tmp_path, "dmcgs", "--from", str(test_data / "dmcgs"))
    assert code == 0, stderr
    assert (tmp_path / "dmcgs/colors.json").exists() and not list(tmp_path.rglob("*.part"))


def test_stand_ins_are_announced_where_they_are_used(tmp_path, monkeypatch):
    """Results on them are not comparable. A failed download is no set, and a real set takes their place for good."""
    assert run(tmp_path, "davis", "--from", str(tmp_path / "none.zip"))[0] == 2
    code, stderr = run(tmp_path, "demo")
    assert code == 0, stderr
    monkeypatch.setenv("HRSSM_ASSETS", str(tmp_path))
    monkeypatch.setenv("HRSSM_CACHE", str(tmp_path / "cache"))
    for variant in ("color_easy", "video_hard", "distracting_cs", "video"):
        with pytest.warns(UserWarning, match="generated stand-ins"):
            envs.prepare(f"dmc_walker_stand_{variant}", resource_files=str(tmp_path / "demo/*.mp4"))
    assert run(tmp_path, "davis", "--from", str(davis_archive(tmp_path / "davis.zip"))) == (0, "")
    pictures = {path: path.read_bytes() for path in (tmp_path / "davis").rglob("00000.jpg")}
    assert not (tmp_path / "davis/GENERATED").exists() and run(tmp_path, "demo") == (0, "")
    assert all(path.read_bytes() == content for path, content in pictures.items())
