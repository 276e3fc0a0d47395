"""The package as `python -m build` makes it: an sdist, from that a wheel, installed in a folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_NOT_SENT = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info", "build", "dist", "tests", "benchmarks")


@dataclass(frozen=True)
class Wheel:
    """`log` is what the builds printed; `folder` holds the installed files, and nothing else."""

    sdist: Path
    archive: Path
    folder: Path
    log: str

    @property
    def environment(self) -> Mapping[str, str]:
        variables = {"PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        return os.environ | variables | {"HF_HUB_OFFLINE": "1"}

    def python(self, *arguments: object, folder: Path) -> str:
        """What `python …` prints in `folder`, where it must not find the checkout, and ends with status 0."""
        return _run(*arguments, folder=folder, environment=self.environment)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    place = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT, place / "checkout", symlinks=True, ignore=_NOT_SENT)
    log = _build("sdist", place / "checkout", place / "dist")
    (sdist,) = (place / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(place / "unpacked", filter="data")
    (unpacked,) = (place / "unpacked").iterdir()
    log += _build("wheel", unpacked, place / "dist")
    (archive_path,) = (place / "dist").glob("*.whl")
    pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index")
    _run(*pip, "--target", place / "installed", archive_path, folder=place, environment=os.environ)
    return Wheel(sdist, archive_path, place / "installed", log)


def _build(kind: str, source: Path, output: Path) -> str:
    code = f"from setuptools.build_meta import build_{kind}; build_{kind}({str(output)!r})"
    variables = {key: os.environ[key] for key in os.environ if key != "PYTHONDONTWRITEBYTECODE"}  # it warns
    return _run("-W", "error", "-c", code, folder=source, environment=variables)


def _run(*arguments: object, folder: Path, environment: Mapping[str, str]) -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr
