"""`make demo` on a folder of somebody's images, in real processes: twice, and then its last line."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from tests.images import encode, photo, write_folder

ROOT = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_TOKEN": secrets.token_hex(32),  # or Ray leaves one in the home folder
    }


def demo(folder: Path) -> str:
    """What `python -m teachercache.jobs.demo --images images` prints in `folder`, for steps of two images."""
    keys = "--train", "global_batch_size=2", "--train", "batch_size_per_process=2"
    ran = subprocess.run(
        [sys.executable, "-m", "teachercache.jobs.demo", "--images", "images", *keys],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    return ran.stdout


def written(*folders: Path) -> dict[Path, int]:
    """When each file below `folders` was written."""
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return {path: path.stat().st_mtime_ns for path in files}


def test_the_demo_makes_pictures_and_computes_once(tmp_path: Path) -> None:
    names = ("a.jpg", "b/c.jpg", "d.jpg", "e.jpg", "new\nline.jpg")
    write_folder(tmp_path / "images", {name: encode(photo(64, 48, i)) for i, name in enumerate(names)})

    first = demo(tmp_path)
    (folder,) = (tmp_path / "demo").iterdir()
    copies = [path.name for path in sorted((folder / "images").iterdir())]
    assert copies == ["000_a.jpg", "001_c.jpg", "002_d.jpg", "003_e.jpg"]
    assert "8 in 1 shards" in first
    for name in ("pca_maps.png", "loss.png"):
        with Image.open(folder / name) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        assert min(pixels.shape[:2]) > 100
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20

    computed = written(folder / "cache", folder / "run" / "checkpoints")
    assert computed
    second = demo(tmp_path)
    assert list((tmp_path / "demo").iterdir()) == [folder]
    assert written(folder / "cache", folder / "run" / "checkpoints") == computed
    assert "Nothing to do: all" in second
    assert "No step was left to take." in second

    *_, last = second.splitlines()
    command = last.removeprefix("Look further: ")
    look = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert look.returncode == 0, look.stderr
    assert "(0 invalid)" in look.stdout
