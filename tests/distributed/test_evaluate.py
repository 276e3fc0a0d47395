"""`teachercache evaluate` under torchrun: two real processes (gloo) against one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from teachercache import build_student, load_student
from teachercache.student.datasets import open_dataset
from teachercache.student.datasets.scenes import write_scenes
from teachercache.student.measuring.evaluate import evaluate

NUM_IMAGES = 5  # no multiple of two


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, train=1, val=NUM_IMAGES, size=(40, 56))
    return folder


@pytest.fixture(scope="module")
def student(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    tasks = open_dataset("scenes", scenes, "val").tasks
    teachers = {"one": 64, "two": 48}
    build_student(
        "sak", stem="test_vit", teacher_dims=teachers, image_size=(32, 48), tasks=tasks
    ).save_pretrained(folder)
    return folder


def evaluate_on_two(student: Path, scenes: Path, output: Path, *options: str) -> tuple[dict[str, Any], str]:
    """What two processes wrote to `scores.json`, and what they printed."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [
            *launch,
            "-m",
            "teachercache.jobs.cli",
            "evaluate",
            student,
            "scenes",
            scenes,
            "-o",
            output,
            *options,
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    scores: dict[str, Any] = json.loads((output / "scores.json").read_text())
    return scores, done.stdout


def images_in(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*/*.png"))


def test_a_process_may_have_no_image(student: Path, scenes: Path, tmp_path: Path) -> None:
    found, _ = evaluate_on_two(student, scenes, tmp_path, "--max-images", "1")
    assert (found["processes"], found["num_images"]) == (2, 1)
    assert found["gates"].keys() == found["scores"].keys()


@pytest.mark.usefixtures("fresh_accelerate")
def test_two_processes_give_the_scores_of_one(student: Path, scenes: Path, tmp_path: Path) -> None:
    one = evaluate(load_student(student), open_dataset("scenes", scenes, "val"), output=tmp_path / "one")
    two, printed = evaluate_on_two(student, scenes, tmp_path / "two")
    assert (one.processes, two["processes"]) == (1, 2)
    assert two["num_images"] == one.num_images == NUM_IMAGES
    assert two["scores"] == pytest.approx(one.scores, rel=1e-5)
    for task, gates_SE in one.gates.items():
        assert np.allclose(two["gates"][task], gates_SE, rtol=1e-4)
    assert printed.count("RMSE") == 1  # one of them prints
    assert images_in(tmp_path / "two") == images_in(tmp_path / "one")
