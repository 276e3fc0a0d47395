"""The path of the benchmark, on a teacher with random weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.view_curve import ARMS, CEILING, CODES, of_the_way


def view_curve(output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.view_curve", "--smoke", "--random-teacher"]
    command += ["--processes", "1", "--output", str(output), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("view_curve")
    done = view_curve(folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def results(output: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((output / "results.json").read_text())
    return loaded


def test_every_arm_has_its_figures_at_both_lengths(results: dict[str, Any]) -> None:
    for length in ("short", "long"):
        rows = results["figures"][length]
        assert list(rows) == list(results["settings"]["arms"])
        assert all(-1 <= row["similarity"][0] <= 1 for row in rows.values())
        assert all(("semseg" in row) == (length == "long") for row in rows.values())
    plain, wide, ceiling = (rows[name]["bytes_per_image"] for name in ("1 view", "1 wide, 16 px", CEILING))
    assert plain < wide < ceiling, "a wide row costs more than a plain one, and less than a view an epoch"


def test_a_plot_is_drawn(output: Path) -> None:
    with Image.open(output / "curve.png") as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 50


def test_what_is_done_so_far_can_be_told(output: Path, results: dict[str, Any]) -> None:
    told = view_curve(output, "--report", "--seeds", "3")
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout.splitlines()[-1])["figures"] == results["figures"]


def test_the_same_command_takes_up_what_is_done(output: Path, results: dict[str, Any]) -> None:
    for name in results["settings"]["arms"][:1]:
        (output / "results" / f"measure_{name};_long;_0.json".replace(" ", "_")).unlink()
    again = view_curve(output)
    assert "[1/1," in again.stderr, "one part was left to do"
    assert json.loads((output / "results.json").read_text())["figures"] == results["figures"]


def test_another_experiment_does_not_go_into_the_same_folder(output: Path) -> None:
    other = view_curve(output, "--long-steps", "5")
    assert other.returncode != 0
    assert "states another experiment" in other.stderr


def test_the_share_of_the_way_counts_from_one_plain_view_by_means() -> None:
    rows: dict[str, Any] = {
        "1 view": {"similarity": [0.2, 0.2]},
        "2 views": {"similarity": [0.3, 0.5, 0.4]},
        "1 wide, 32 px": {"similarity": [0.1, 0.2]},
        CEILING: {"similarity": [0.5, 0.7]},
    }
    assert of_the_way(rows) == pytest.approx(
        {"1 view": 0, "2 views": 50, "1 wide, 32 px": -12.5, CEILING: 100}
    )
    assert of_the_way({"2 views": rows["2 views"]}) == {}


def test_arms_of_one_cache_share_it() -> None:
    assert ARMS["1 view"].cache == ARMS["1 view, jitter"].cache
    assert len({one.cache for one in CODES.values()}) == len(CODES)
