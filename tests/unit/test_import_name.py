"""`teachercache` is the one name to import; tests/e2e/test_wheel.py has the same of a wheel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import teachercache
from teachercache import cache_builder, pipeline, student
from teachercache.student import losses

ROOT = Path(__file__).parents[2]
PACKAGES = ("pipeline", "cache_builder", "student", "jobs")


def python(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_face_offers_what_it_names() -> None:
    for name in teachercache.__all__:
        assert getattr(teachercache, name).__module__.startswith("teachercache.")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = teachercache.nothing


def test_packages_offer_what_they_name() -> None:
    """The names of `docs/design.md` stay where they are, whatever module holds them."""
    for package in (pipeline, cache_builder, student, losses):
        for name in package.__all__:
            assert getattr(package, name).__name__ == name
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            _ = package.nothing
    assert {"SAK", "KPU", "build_student", "load_student", "push_to_hub"} < set(student.__all__)
    assert "DistillationLoss" in losses.__all__


def test_importing_it_is_light(tmp_path: Path) -> None:
    code = "import sys, teachercache; assert not {'torch', 'numpy', 'zarr', 'ray'} & set(sys.modules)"
    done = python("-c", f"{code}; teachercache.pipeline, teachercache.student", folder=tmp_path)
    assert done.returncode == 0, done.stderr


def test_an_old_name_is_one_line_that_says_the_new_one(tmp_path: Path) -> None:
    done = python("-c", "import student.train", folder=tmp_path)
    assert done.stderr.splitlines()[-1] == "ImportError: `student` is imported as `teachercache.student`"
    for package in PACKAGES:
        assert f"imported as `teachercache.{package}`" in (ROOT / package / "__init__.py").read_text()


def test_modules_of_the_user_that_bear_the_old_names_are_in_nobodys_way(tmp_path: Path) -> None:
    for package in PACKAGES:
        (tmp_path / f"{package}.py").write_text("raise SystemExit('the wrong module')")
    code = (
        "from teachercache import FeatureCache, load_student; from teachercache.jobs.cli import main; main()"
    )
    done = python("-c", code, "--help", folder=tmp_path)
    assert done.returncode == 0, done.stderr


def test_scripts_see_the_checkout_that_they_lie_in(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for name in ("teachercache", *PACKAGES):
        shutil.copytree(
            ROOT / name, checkout / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    face = checkout / "teachercache/__init__.py"
    face.write_text(face.read_text() + "\nprint('the copy')\n")
    done = python(str(checkout / "jobs/train_student.py"), "--help", folder=tmp_path)
    assert (done.returncode, done.stdout.split("\n")[0]) == (0, "the copy"), done.stderr
    (lines,) = re.findall(
        r"^if not __package__:.*\n(?: .*\n)+", (checkout / "jobs/train_student.py").read_text(), re.M
    )
    assert lines in (ROOT / "jobs/cache_teachers.py").read_text()


def test_the_map_names_every_room() -> None:
    page = (ROOT / "docs/design.md").read_text()
    for package in PACKAGES:
        part = page.split(f"\n{package}/ ")[1].split("\n\n")[0]
        rooms = {path.parent.relative_to(ROOT / package) for path in (ROOT / package).rglob("__init__.py")}
        missing = [f"{room}/" for room in rooms if room.name and f"{room}/" not in part]
        missing += [path.name for path in (ROOT / package).glob("[!_]*.py") if path.name not in part]
        assert not missing, f"docs/design.md says nothing of {missing} in {package}/"
        files = {path.name for path in (ROOT / package).rglob("*.*")}
        assert set(re.findall(r"[\w-]+\.(?:py|yaml)", part)) <= files
