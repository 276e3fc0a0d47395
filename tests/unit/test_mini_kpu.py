"""The miniature of KPU's tables: every part runs, on what it should, and what is printed follows from it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.mini_kpu import CLIP, GROUNDING_DINO, PAPER, ROWS, SCORES, SENTINEL
from benchmarks.mini_teachers import TEACHERS


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mini_kpu")
    command = [
        sys.executable,
        "-m",
        "benchmarks.mini_kpu",
        "--smoke",
        "--device",
        "cpu",
        "--output",
        str(folder),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == json.loads((folder / "results.json").read_text())
    for title in ("Table 2 in miniature", "Table 3 in miniature", "Figure 4 in miniature", "The gap"):
        assert title in done.stdout
    return folder


@pytest.fixture(scope="module")
def results(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "results.json").read_text())
    return found


def test_every_row_has_every_score_and_overall_is_their_mean(results: dict[str, Any]) -> None:
    assert results["scores"].keys() == ROWS.keys() == PAPER.keys()
    for row in results["scores"].values():
        assert row.keys() == {*SCORES, "overall"}
        (overall,) = row["overall"]
        assert all(math.isfinite(value) for values in row.values() for value in values)
        assert overall == pytest.approx(sum(row[name][0] for name in SCORES) / len(SCORES))
    claim = results["claims"]["KPU above Base_b (Table 2)"]
    ours = results["scores"]
    assert claim["differences"] == pytest.approx([ours["KPU"]["overall"][0] - ours["Base_b"]["overall"][0]])
    assert claim["paper"] == pytest.approx(59.325 - 58.9)
    assert all(
        space >= 1 for spaces in results["gap"].values() for values in spaces.values() for space in values
    )


@pytest.mark.parametrize("row", ROWS)
def test_each_row_distils_what_its_name_says(output: Path, row: str) -> None:
    name = f"distil {row}".replace(" ", "_")
    line = json.loads((output / f"seed_0/runs/{name}/metrics.jsonl").read_text().splitlines()[0])
    wanted = {"CLIP alone": {CLIP}, "GroundingDINO alone": {GROUNDING_DINO}, "Base_a": set(TEACHERS)}
    found = {teacher for teacher in TEACHERS if any(f"/{teacher}" in key for key in line)}
    assert found == wanted.get(row, {CLIP, GROUNDING_DINO}), sorted(line)


def test_the_sentinel_s_weights_are_those_of_the_teacher_that_saw_images_alone(output: Path) -> None:
    teacher = load_file(output / f"seed_0/teachers/{SENTINEL}.safetensors")
    student = load_file(output / "seed_0/runs/distil_KPU/student/model.safetensors")
    for name, weights in student.items():
        if name.startswith("stem.vit."):
            assert torch.equal(weights, teacher[name.removeprefix("stem.vit.")]), name
