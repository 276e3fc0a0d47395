"""The miniature of SAK's tables: every part runs, on what it should, and what is printed follows from it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from benchmarks.mini_sak import (
    PAPER_GAIN,
    SMOKE,
    STAGE_1,
    STAGE_2,
    TASKS,
    compare,
    ignorant_teachers,
)
from benchmarks.mini_teachers import IMAGE_SIZE, MINI_VIT, TEACHERS, alikeness, hidden
from benchmarks.studies import claim_folder
from teachercache.pipeline.cache import FeatureCache


def mini_sak(output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.mini_sak", "--smoke", "--device", "cpu"]
    return subprocess.run(
        [*command, "--output", str(output), *options], capture_output=True, text=True, timeout=500
    )


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mini_sak")
    done = mini_sak(folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == json.loads((folder / "results.json").read_text())
    assert "No better than a guess: " in done.stdout
    for title in ("Table 17 in miniature", "Table 3 in miniature", "Table 4 in miniature"):
        assert title in done.stdout
    return folder


@pytest.fixture(scope="module")
def results(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "results.json").read_text())
    return found


def test_every_row_of_the_tables_is_there_and_finite(results: dict[str, Any]) -> None:
    assert results["similarity"].keys() == {*STAGE_1, "stem"}
    for row in results["similarity"].values():
        assert row.keys() == {*TEACHERS, "mean"}
        assert all(-1 <= value <= 1 for values in row.values() for value in values)
    assert results["scores"].keys() == {*STAGE_2, "single"}
    for row in results["scores"].values():
        assert row.keys() == set(TASKS)
        assert all(math.isfinite(value) for value in chain(*row.values()))
    assert results["gain"].keys() == STAGE_2.keys() == PAPER_GAIN.keys()
    assert {name: set(tasks) for name, tasks in results["teachers"].items()} == {
        name: set(tasks) for name, tasks in TEACHERS.items()
    }


def test_gains_and_differences_follow_from_the_scores(results: dict[str, Any]) -> None:
    single = {task: values[0] for task, values in results["scores"]["single"].items()}
    for row, (gain,) in results["gain"].items():
        scores = {task: values[0] for task, values in results["scores"][row].items()}
        errors = {"normals", "depth"}
        signs = {task: -1 if task in errors else 1 for task in TASKS}
        shares = [signs[task] * (scores[task] - single[task]) / single[task] for task in TASKS]
        assert gain == pytest.approx(100 * sum(shares) / len(TASKS))
    claim = results["claims"]["MoR above sum (Table 3)"]
    assert claim["differences"] == pytest.approx([results["gain"]["mor"][0] - results["gain"]["sum"][0]])
    assert claim["paper"] == pytest.approx(2.0)


@pytest.mark.parametrize("name", TEACHERS)
def test_the_cache_is_of_the_trained_teacher(output: Path, name: str) -> None:
    model: Any = timm.create_model(MINI_VIT).eval()
    model.load_state_dict(load_file(output / f"seed_0/teachers/{name}.safetensors"))
    sample = FeatureCache.open(output / "seed_0/caches/labelled")[0]
    pixels_1HW3 = torch.from_numpy(sample.pixels())[None].float() / 127.5 - 1
    with torch.inference_mode():
        levels = model.forward_intermediates(
            pixels_1HW3.permute(0, 3, 1, 2), indices=[1, 3, 5, 7], norm=False, intermediates_only=True
        )
    features_SHWC = torch.cat(levels).permute(0, 2, 3, 1)
    torch.testing.assert_close(sample.features(name).float(), features_SHWC, rtol=2e-3, atol=2e-3)


def test_teachers_are_not_one_another(output: Path, results: dict[str, Any]) -> None:
    assert len(results["alikeness"]) == 3
    assert all(0 <= value < 0.999 for values in results["alikeness"].values() for value in values)
    features = FeatureCache.open(output / "seed_0/caches/held_out")[0].features
    for a, b in combinations(TEACHERS, 2):
        assert not torch.allclose(features(a), features(b), atol=0.1)


def test_nothing_is_measured_on_scenes_that_were_trained_on(output: Path) -> None:
    places = [f"{root}/images/{split}" for root in ("many", "labelled") for split in ("train", "val")]
    images = [
        {path.read_bytes() for path in (output / "seed_0/scenes" / place).glob("*.png")} for place in places
    ]
    assert [len(found) for found in images] == [16, 4, 8, 4]
    assert len(set[bytes]().union(*images)) == 32


def terms(output: Path, run: str) -> dict[str, float]:
    """What the first step of a run logged."""
    line = (output / f"seed_0/runs/{run}/metrics.jsonl").read_text().splitlines()[0]
    found: dict[str, float] = json.loads(line)
    return found


@pytest.mark.parametrize(
    ("run", "distils", "routes"),
    [
        ("mor", True, True),
        ("sum", True, False),
        ("no_paths", True, False),
        ("stage_1_alone", False, True),
        ("stage_2_alone", True, True),
        ("neither", False, False),
        ("single_normals", False, False),
    ],
)
def test_each_row_trains_what_its_name_says(output: Path, run: str, distils: bool, routes: bool) -> None:
    keys = terms(output, run).keys()
    assert any(key.startswith("cosine/") for key in keys) == distils
    assert any(key.startswith("gate/") for key in keys) == routes
    tasks = {"normals"} if run.startswith("single") else set(TASKS)
    assert {task for task in TASKS if f"loss/{task}" in keys} == tasks


def test_stage_2_starts_from_stage_1(output: Path) -> None:
    """The first batches are the same, so a teacher's loss differs only where the student does."""
    first = {run: terms(output, run).get("loss/labels/level0") for run in ("mor", "sum", "stage_2_alone")}
    assert first["mor"] == pytest.approx(first["sum"])
    assert first["mor"] != pytest.approx(first["stage_2_alone"])


def test_what_is_done_is_not_done_again(output: Path) -> None:
    kept = {path: path.stat().st_mtime_ns for path in (output / "seed_0").rglob("*") if path.is_file()}
    before = json.loads((output / "results.json").read_text())
    again = mini_sak(output, "--processes", "1")
    assert again.returncode == 0, again.stderr
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    after = json.loads((output / "results.json").read_text())
    assert after["scores"] == before["scores"]
    assert after["seconds"] == before["seconds"]


def test_a_folder_holds_one_experiment(output: Path) -> None:
    claim_folder(output, SMOKE)
    with pytest.raises(SystemExit, match="another experiment"):
        claim_folder(output, replace(SMOKE, stage_2_steps=3))


@pytest.mark.parametrize(
    ("better", "worse", "verdict"),
    [
        ([2.0, 3.0], [1.0, 1.0], "agrees"),
        ([1.0, 1.0], [2.0, 3.0], "contradicts"),
        ([1.0, 3.0], [2.0, 2.0], "undecided"),
        ([2.0], [1.0], "one seed says nothing"),
    ],
)
def test_a_verdict_needs_every_seed(better: list[float], worse: list[float], verdict: str) -> None:
    found = compare(better, worse, paper=1.0)
    assert found["verdict"] == verdict
    assert found["differences"] == [b - w for b, w in zip(better, worse, strict=True)]


def test_a_teacher_that_does_not_beat_a_guess_is_named() -> None:
    teachers = {
        "labels": {"semseg": {"score": [30.0, 2.0], "guess": [2.0, 3.0]}},
        "edges": {"boundary": {"score": [40.0, 41.0], "guess": [28.0, 29.0]}},
    }
    assert ignorant_teachers(teachers) == ["labels"]


def test_half_of_each_image_is_hidden_in_squares() -> None:
    hidden_B1HW = hidden(6, torch.Generator().manual_seed(0))
    assert hidden_B1HW.shape == (6, 1, *IMAGE_SIZE)
    assert hidden_B1HW.flatten(1).float().mean(1).tolist() == [0.5] * 6
    squares = hidden_B1HW.unfold(2, 16, 16).unfold(3, 16, 16).flatten(4).float().mean(-1)
    assert set(squares.unique().tolist()) == {0.0, 1.0}
    assert len(squares.flatten(1).unique(dim=0)) > 1


def test_alikeness_sees_through_turns_and_scales_only() -> None:
    generator = torch.Generator().manual_seed(0)
    x_nD, other_nD = torch.randn(2, 2000, 8, generator=generator)
    turn_DD, _ = torch.linalg.qr(torch.randn(8, 8, generator=generator))
    found = alikeness({"x": x_nD, "turned": 3 * x_nD @ turn_DD + 1, "other": other_nD})
    assert found["x, turned"] == pytest.approx(1)
    assert found["x, other"] < 0.05
