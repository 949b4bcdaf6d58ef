"""Downloads files that some tasks need and no package contains, to `$HRSSM_ASSETS` or `~/.cache/hrssm`.

    python setup/download.py dmcgs                  colours and videos of the dmc_*_{color,video}_{easy,hard} tasks
    python setup/download.py davis                  backgrounds of the dmc_*_distracting_cs tasks
    python setup/download.py kinetics --from DIR    clips for dmc_*_video tasks, from a local copy of Kinetics-400
    python setup/download.py matterport --from DIR  rooms (*.glb) for rms_* tasks, from a local folder
    python setup/download.py maniskill              models for turn_faucet, assembling_kits, panda_avoid_obstacles
    python setup/download.py demo                   generates stand-ins for all of these but maniskill, without download

Interrupted downloads resume. Files are verified before they are moved into place.
"""

import sys
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from setup import console  # first: before what takes seconds to import

# isort: split
import argparse
import csv
import errno
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import tempfile
import zipfile
import zlib
from collections.abc import Iterable

import numpy as np
import requests
from tqdm import tqdm

from envs import assets
from envs.distracting_cs import DAVIS, DAVIS_VALIDATION
from envs.realistic_maniskill import MODELS

DMCGS_URL = "https://raw.githubusercontent.com/nicklashansen/dmcontrol-generalization-benchmark/main/src/env/data"
DAVIS_URL = "https://data.vision.ee.ethz.ch/csergi/share/davis/DAVIS-2017-trainval-480p.zip"
MANISKILL_UIDS = {
    "turn_faucet": "partnet_mobility/5021",
    "assembling_kits": "assembling_kits",
    "panda_avoid_obstacles": "panda_avoid_obstacles",
}
LICENCES = {
    "dmcgs": "DMControl Generalization Benchmark: MIT licence; its videos are from PAD and RealEstate10K (YouTube)",
    "davis": "DAVIS 2017: see the terms at davischallenge.org; cite Pont-Tuset et al., 2017",
    "kinetics": "Kinetics-400: annotations by DeepMind, CC BY 4.0; the clips belong to their YouTube authors",
    "matterport": "Matterport3D: academic use under its own terms; the RePo authors' README links the rooms as .glb",
    "maniskill": "ManiSkill2 assets: CC BY-NC 4.0, with parts of PartNet-Mobility and the Kit Assembly data set",
    "demo": "generated here, free to use; unlike any published set, so results on it are not comparable",
}
TIMEOUT = 30  # seconds without receiving data


class DownloadError(Exception):
    """An error that the user can fix; the message is one line."""


def fetch(source: str, target: Path, git_blob: str | None = None) -> None:
    """Copy a URL or a local file to `target` through `target`.part, from which a later call resumes.

    `git_blob` is the expected git object id of the content, a hash that the public repository itself publishes.
    """
    if target.exists() and (git_blob is None or blob_name(target) == git_blob):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    try:
        if "://" in source:
            _fetch_url(source, part)
        else:
            shutil.copyfile(source, part)
    except FileNotFoundError:
        raise DownloadError(f"{source} does not exist: check --from") from None
    except OSError as error:  # includes RequestException
        if error.errno == errno.ENOSPC:
            part.unlink(missing_ok=True)
            raise DownloadError(f"no space left for {target}: free some, or set HRSSM_ASSETS elsewhere") from None
        raise DownloadError(f"cannot get {source} ({error}): run the command again to go on, or use --from") from None
    if git_blob is not None and blob_name(part) != git_blob:
        part.unlink()
        raise DownloadError(f"{source} is not the published file (wrong hash): try again, or another --from")
    part.replace(target)


def _fetch_url(url: str, part: Path) -> None:
    have = part.stat().st_size if part.exists() else 0
    with requests.get(url, stream=True, timeout=TIMEOUT, headers={"Range": f"bytes={have}-"} if have else {}) as reply:
        if reply.status_code == requests.codes.requested_range_not_satisfiable:
            return  # the file is complete already
        reply.raise_for_status()
        resumed = reply.status_code == requests.codes.partial_content
        have = have if resumed else 0
        size = int(reply.headers["Content-Length"]) + have if "Content-Length" in reply.headers else None
        bar = tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=part.stem, disable=None)
        with part.open("ab" if resumed else "wb") as file, bar:
            for chunk in reply.iter_content(1 << 16):
                file.write(chunk)
                bar.update(len(chunk))
        if size is not None and part.stat().st_size != size:
            raise OSError(f"received {part.stat().st_size} of {size} bytes")


def blob_name(path: Path) -> str:
    """The git object id (SHA-1) of a file."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def unpack(archive: Path, folder: Path, wanted: Iterable[str]) -> None:
    """Unpack the members of a zip file that start with one of `wanted` into `folder`, all or nothing.

    A damaged archive is deleted, so that it is fetched anew.
    """
    prefixes = tuple(wanted)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=folder.parent))
    try:
        with zipfile.ZipFile(archive) as file:
            members = [member for member in file.infolist() if not member.is_dir()]
            for member in members:
                path = PurePosixPath(member.filename.replace("\\", "/"))
                if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
                    raise DownloadError(
                        f"{archive} would write outside its folder ({member.filename}): do not trust it"
                    )
            for member in tqdm(members, desc=f"unpack {archive.name}", disable=None):
                if member.filename.startswith(prefixes):
                    file.extract(member, scratch)  # verifies the checksum
        if folder.exists():
            shutil.rmtree(folder)
        scratch.rename(folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # RuntimeError: encrypted
        archive.unlink()
        raise DownloadError(f"{archive} is damaged ({error}): run the command again, or with another --from") from None
    except OSError as error:
        raise DownloadError(f"cannot unpack {archive} ({error.strerror}): free some space and run it again") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def get_dmcgs(folder: Path, source: str | None) -> None:
    files = json.loads((Path(__file__).parent / "dmcgs.json").read_text())
    base = source or DMCGS_URL
    missing = []
    for name, blob in tqdm(files.items(), desc="dmcgs", disable=None):
        try:
            fetch(f"{base}/{name}", folder / name, blob)
        except DownloadError:
            # A local copy may lack some videos; the tasks use those that exist.
            if "://" in base or not name.endswith(".mp4") or Path(base, name).exists():
                raise
            missing.append(name)
    if missing:
        print(f"{base} lacks {len(missing)} videos: {', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''}")
    tables = {mode: read_colors(folder / f"{mode}.pt") for mode in ("color_easy", "color_hard")}
    write_text(folder / "colors.json", json.dumps(tables))
    (folder / assets.GENERATED).unlink(missing_ok=True)  # after all stand-ins have been replaced


def read_colors(path: Path) -> list[dict[str, list[float]]]:
    """A published colour table: a pickle of numpy arrays, loaded with nothing else allowed in it."""
    import torch

    allowed = [np.array(0).__reduce__()[0], np.ndarray, np.dtype, np.dtypes.Float64DType]
    with torch.serialization.safe_globals([*allowed, (allowed[0], "numpy.core.multiarray._reconstruct")]):
        return [{k: v.tolist() for k, v in row.items()} for row in torch.load(path, weights_only=True)]


def get_davis(folder: Path, source: str | None) -> None:
    if source and Path(source).is_dir():
        pictures = next((p for p in (Path(source), *Path(source).rglob("480p")) if (p / DAVIS[0]).is_dir()), None)
        if pictures is None:
            raise DownloadError(
                f"{source} holds no DAVIS videos such as {DAVIS[0]}: give the folder of JPEGImages/480p"
            )
        target = folder / "DAVIS/JPEGImages/480p"
        for name in tqdm((*DAVIS, *DAVIS_VALIDATION), desc="davis", disable=None):
            if (pictures / name).is_dir():
                shutil.copytree(pictures / name, target / name, dirs_exist_ok=True)
    else:
        # Each source has an archive of its own, so that what is left of one is not taken for another's.
        name = f"davis-{hashlib.sha256(source.encode()).hexdigest()[:8]}.zip" if source else Path(DAVIS_URL).name
        archive = folder.parent / name
        fetch(source or DAVIS_URL, archive)
        unpack(archive, folder, ["DAVIS/JPEGImages/480p/"])
        archive.unlink()
    # The project publishes no hashes; check against the list of videos, after the checksums in the archive.
    lacking = [name for name in DAVIS if not any((folder / "DAVIS/JPEGImages/480p" / name).glob("*.jpg"))]
    if lacking:
        raise DownloadError(f"{source or DAVIS_URL} lacks {len(lacking)} of {len(DAVIS)} videos, such as {lacking[0]}")
    (folder / assets.GENERATED).unlink(missing_ok=True)


def get_kinetics(folder: Path, source: str | None) -> None:
    if not source:
        raise DownloadError(
            "get Kinetics-400 with its own downloader first; then: python setup/download.py kinetics --from DIR"
        )
    clips = driving_car(Path(source))
    if not clips:
        raise DownloadError(f"{source} has neither a folder 'driving car' with *.mp4 nor a train.csv that lists them")
    for clip in tqdm(clips, desc="kinetics", disable=None):
        fetch(str(clip), folder / "driving_car" / clip.name)
    print(f"{len(clips)} clips: pass --resource_files '{folder / 'driving_car'}/*.mp4'")


def driving_car(root: Path) -> list[Path]:
    """Clips labelled `driving car`, in either layout of Kinetics-400: a folder per label, or flat with a CSV list."""
    folders = [p for p in root.rglob("*") if p.is_dir() and p.name.replace("_", " ") == "driving car"]
    clips = [clip for folder in folders for clip in folder.glob("*.mp4")]
    for table in [] if clips else root.rglob("train*.csv"):
        with table.open() as file:
            ids = {row.get("youtube_id") for row in csv.DictReader(file) if row.get("label") == "driving car"}
        clips += [clip for clip in root.rglob("*.mp4") if clip.stem[:11] in ids]
    return sorted(clips)


def get_matterport(folder: Path, source: str | None) -> None:
    if not source:
        raise DownloadError(
            "get the rooms from the link in github.com/zchuning/repo first; then: python setup/download.py matterport "
            "--from DIR"
        )
    rooms = sorted(Path(source).rglob("*.glb"))
    if not rooms:
        raise DownloadError(f"{source} holds no *.glb: give the folder of the rooms")
    for room in tqdm(rooms, desc="matterport", disable=None):
        fetch(str(room), folder / room.name)
    for stand_in in folder.glob("generated*.glb"):
        stand_in.unlink()
    (folder / assets.GENERATED).unlink(missing_ok=True)


def get_maniskill(folder: Path, source: str | None) -> None:
    """Runs ManiSkill2's own downloader, which verifies hashes; `source` is a folder with the layout of its result."""
    if source:
        try:
            shutil.copytree(source, folder, dirs_exist_ok=True)
        except FileNotFoundError:
            raise DownloadError(f"{source} does not exist: check --from") from None
    else:
        for task, uid in MANISKILL_UIDS.items():
            command = [sys.executable, "-m", "mani_skill2.utils.download_asset", "-y", uid]
            if (
                not (folder / MODELS[task]).exists()
                and subprocess.run(command, env=os.environ | {"MS2_ASSET_DIR": str(folder.resolve())}).returncode
            ):
                raise DownloadError(f"ManiSkill2's downloader failed for {uid}: see above, then run the command again")
    lacking = [model for model in MODELS.values() if model and not (folder / model).exists()]
    if lacking:
        raise DownloadError(f"{source or 'the download'} lacks {', '.join(lacking)}")


def get_demo(folder: Path, source: str | None) -> None:
    """Stand-ins for every set that is missing: drifting landscapes with moving blobs, and random colours."""
    import cv2

    rng = np.random.default_rng(0)
    if not (assets.root() / "dmcgs/colors.json").exists():
        target = assets.root() / "dmcgs"
        for mode in ("video_easy", "video_hard"):
            for i in range(4):
                write_video(target / mode / f"video{i}.mp4", landscape(rng, 100))
        tables = {"color_easy": random_colors(rng, 0.1), "color_hard": random_colors(rng, 0.2)}
        write_text(target / "colors.json", json.dumps(tables))
        write_text(target / assets.GENERATED, "")
    pictures = assets.root() / "davis/DAVIS/JPEGImages/480p"
    if not pictures.exists() or (assets.root() / "davis" / assets.GENERATED).exists():
        write_text(assets.root() / "davis" / assets.GENERATED, "")  # first: an interrupted call leaves a part
        for name in (*DAVIS, *DAVIS_VALIDATION):
            video_folder = pictures / name
            video_folder.mkdir(parents=True, exist_ok=True)
            for t, frame in enumerate(landscape(rng, 6)):
                cv2.imwrite(str(video_folder / f"{t:05d}.jpg"), frame[..., ::-1])
    # Rooms need trimesh, which comes with ManiSkill2.
    if importlib.util.find_spec("trimesh") and not any((assets.root() / "matterport").glob("*.glb")):
        for i in range(4):
            write_room(assets.root() / f"matterport/generated{i}.glb", rng)
        write_text(assets.root() / "matterport" / assets.GENERATED, "")
    for i in range(4):
        write_video(folder / f"clip{i}.mp4", landscape(rng, 250))
    write_text(folder / assets.GENERATED, "")
    print(f"for dmc_*_video tasks pass --resource_files '{folder}/*.mp4'")


def landscape(rng: np.random.Generator, frames: int, size: int = 128) -> np.ndarray:
    """A video (T, H, W, 3) uint8 with the spectrum of natural images: a camera drifts over two layers."""
    edge = 2 * size
    frequency = np.hypot(np.fft.fftfreq(edge)[:, None], np.fft.rfftfreq(edge)[None, :])
    frequency[0, 0] = np.inf

    def texture() -> np.ndarray:
        # Amplitudes fall as 1/f^1.2, as in photographs.
        spectrum = np.fft.rfft2(rng.standard_normal((3, edge, edge))) / frequency**1.2
        picture = np.fft.irfft2(spectrum, s=(edge, edge))
        picture = picture / picture.std() * 40 + rng.uniform(60, 190, (3, 1, 1))
        return np.moveaxis(picture, 0, -1)

    far, near = texture(), texture()
    near_mask = np.hypot(*np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j])[..., None]
    (speed, angle), turn = rng.uniform([1.0, 0.0], [3.0, 2 * np.pi]), rng.uniform(-0.02, 0.02)
    result = np.empty((frames, size, size, 3), np.uint8)
    where = np.zeros(2)
    for t in range(frames):
        where += speed * np.array([np.cos(angle + turn * t), np.sin(angle + turn * t)])
        rows, columns = ((where[i] + np.arange(size)).astype(int) % edge for i in range(2))
        behind = far[rows][:, columns]
        rows, columns = ((2.5 * where[i] + np.arange(size)).astype(int) % edge for i in range(2))
        front = near[rows][:, columns]
        share = 1 / (1 + np.exp(-(front[..., :1] - 150 - 60 * near_mask) / 10))
        result[t] = np.clip(share * front + (1 - share) * behind, 0, 255)
    return result


def write_room(path: Path, rng: np.random.Generator) -> None:
    """A furnished room of 6 x 5 x 2.8 m as .glb, z up, centred on the origin with the floor at z = 0."""
    import trimesh
    from PIL import Image

    half = np.array([3.0, 2.5, 1.4])
    parts = [[face] for face in _box(np.array([0.0, 0.0, 1.4]), -half)]  # negative: visible from inside
    for _ in range(10):
        size = rng.uniform([0.2, 0.2, 0.2], [0.6, 0.6, 0.9])
        middle = rng.uniform(-1, 1, 3) * (half - size)
        wall = rng.integers(2)
        middle[wall] = np.copysign(half - size, middle)[wall]
        parts.append(_box(np.array([*middle[:2], size[2]]), size))
    room = trimesh.Scene()
    for faces in parts:
        paint, pattern = rng.uniform(60, 220, 3), landscape(rng, 1, 64)[0]
        picture = Image.fromarray((0.75 * paint + 0.25 * pattern).astype(np.uint8))
        material = trimesh.visual.material.PBRMaterial(
            baseColorTexture=picture, metallicFactor=0.0, roughnessFactor=0.9, doubleSided=True
        )
        corners, first = np.concatenate(faces), 4 * np.arange(len(faces))[:, None, None]
        triangles = (first + [(0, 1, 2), (0, 2, 3)]).reshape(-1, 3)
        uv = np.tile([(0, 0), (1, 0), (1, 1), (0, 1)], (len(faces), 1))
        visual = trimesh.visual.TextureVisuals(uv=uv, material=material)
        room.add_geometry(trimesh.Trimesh(corners, triangles, visual=visual, process=False))
    path.parent.mkdir(parents=True, exist_ok=True)
    room.export(path)


def _box(middle: np.ndarray, half: np.ndarray) -> list[np.ndarray]:
    """Corners (4, 3) of the six faces, counter-clockwise from outside (from inside if `half` is negative)."""
    faces = []
    for axis in range(3):
        for sign in (-1, 1):
            first, second = np.eye(3)[[(axis + 1) % 3, (axis + 2) % 3]] * half
            normal = np.eye(3)[axis] * sign * half
            turn = [(-1, -1), (1, -1), (1, 1), (-1, 1)][::sign]
            faces.append(np.array([middle + normal + a * first + b * second for a, b in turn]))
    return faces


def random_colors(rng: np.random.Generator, spread: float) -> list[dict[str, list[float]]]:
    """Colours like those of the published tables: the suite's with Gaussian noise."""
    rows = []
    for _ in range(100):
        row = {
            key: np.clip(rng.normal(middle, spread), 0, 1)
            for key, middle in {
                "grid_rgb1": (0.1, 0.2, 0.3),
                "self_rgb": (0.7, 0.5, 0.3),
                "skybox_rgb": (0.4, 0.6, 0.8),
            }.items()
        }
        row["grid_rgb2"] = row["grid_rgb1"] + 0.1
        rows.append({key: value.tolist() for key, value in row.items()})
    return rows


def write_video(path: Path, frames: np.ndarray) -> None:
    import tools  # imports torch, which the other sets do not need

    path.parent.mkdir(parents=True, exist_ok=True)
    tools.save_mp4(path, frames, 25)


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


SETS = {
    "dmcgs": get_dmcgs,
    "davis": get_davis,
    "kinetics": get_kinetics,
    "matterport": get_matterport,
    "maniskill": get_maniskill,
    "demo": get_demo,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=SETS)
    parser.add_argument(
        "--from", dest="source", help="URL of a mirror, or a local folder or file, instead of the original"
    )
    arguments = parser.parse_args(argv)
    folder = assets.root() / arguments.set
    print(LICENCES[arguments.set])
    try:
        os.makedirs(folder, exist_ok=True)
        SETS[arguments.set](folder, arguments.source)
    except DownloadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot write {folder} ({error.strerror}): free some space or set HRSSM_ASSETS", file=sys.stderr)
        return 2
    print(f"{arguments.set} is in {folder}")
    return 0


if __name__ == "__main__":
    console.run(main)
