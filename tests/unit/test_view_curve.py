"""The path of the benchmark, on a teacher with random weights."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.studies import claim_folder
from benchmarks.view_arms import ARMS, CEILING, CODES, FORMS, GPU_ARMS, SMOKE, Settings, disk, phases, plan
from benchmarks.view_curve import Curve, collect, of_the_way, parse, train_images
from teachercache.pipeline.units import human_bytes
from tests.images import encode, write_parquet


def view_curve(output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.view_curve", "--smoke", "--random-teacher"]
    command += ["--processes", "1", "--output", str(output), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)


def labelled(folder: Path) -> list[str]:
    """Images of two classes that their colour tells apart, to train on and to test."""
    colours = ["red", "blue"] * 10
    images = [encode(Image.new("RGB", (32, 32), colour)) for colour in colours]
    labels = [colours.index(colour) for colour in colours]
    files = [write_parquet(folder / f"{part}.parquet", images, labels) for part in ("train", "test")]
    return ["--labelled", *map(str, files)]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("view_curve")
    done = view_curve(folder, *labelled(folder))
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
        for key in ("semseg", "top1", "knn"):
            assert all((key in row) == (length == "long") for row in rows.values())
        assert all(row[key] == [100] for row in rows.values() for key in ("top1", "knn") if key in row)
    plain, wide, ceiling = (rows[name]["bytes_per_image"] for name in ("1 view", "1 wide, 16 px", CEILING))
    assert plain < wide < ceiling, "a wide row costs more than a plain one, and less than a view an epoch"


def test_a_plot_is_drawn(output: Path) -> None:
    with Image.open(output / "curve.png") as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 50


def test_what_is_done_so_far_can_be_told(output: Path, results: dict[str, Any]) -> None:
    told = view_curve(output, "--report", "--seeds", "3", *labelled(output))
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout.splitlines()[-1])["figures"] == results["figures"]


def test_the_same_command_takes_up_what_is_done(output: Path, results: dict[str, Any]) -> None:
    for name in results["settings"]["arms"][:1]:
        (output / "results" / f"measure_{name};_long;_0.json".replace(" ", "_")).unlink()
    again = view_curve(output, *labelled(output))
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


def test_the_larger_form_trains_and_measures_too(tmp_path: Path) -> None:
    options = ["--form", "gpu", "--smoke", "--random-teacher", "--output", str(tmp_path)]
    settings = parse(options)[1]
    curve = Curve(tmp_path, settings)
    for step, names in phases(settings, [0]).items():
        for name in names:
            curve.do(step, name)
    found = collect(curve, [0])["figures"]
    assert all(list(found[length]) == list(settings.arms) for length in ("short", "long"))
    assert not list((tmp_path / "runs").iterdir()), "a student that is measured takes no more disk"
    held_out = tmp_path / "caches" / "held_out"
    files = (file for file in (tmp_path / "caches").glob("*/teachers/**/c/**/*") if file.is_file())
    written = sum(file.stat().st_size for file in files if held_out not in file.parents)
    planned = disk(settings, train_images(settings))[1]
    assert planned < written < 1.1 * planned, "beside an index that has places for more rows"


@pytest.mark.parametrize("form", FORMS)
def test_either_form_takes_50_000_steps_in_all(form: str) -> None:
    parts = [part.split("; ") for part in phases(FORMS[form], range(3))["measure"]]
    assert sum(FORMS[form].steps(length) for _, length, _ in parts) == 49_950


def test_a_plan_states_runs_steps_views_and_bytes() -> None:
    told = plan(SMOKE["gpu"], [0], 7)
    assert told.startswith("2 runs (1 of 2 and 1 of 3 steps), 5 steps in all, which see 10 views; ")
    nbytes = disk(SMOKE["gpu"], 7)[1]
    assert told.endswith(f"; caches of 7 images: 7 views, {human_bytes(nbytes)}")


def test_the_margins_of_both_forms_cost_as_much() -> None:
    def costs(arms: dict[str, Any], size: int) -> list[float]:
        margins = sorted({arm.margin for arm in arms.values()} - {0})
        return [(1 + margin / size) ** 2 for margin in margins]

    assert costs(GPU_ARMS, FORMS["gpu"].size) == pytest.approx(costs(ARMS, FORMS["cpu"].size), rel=0.05)


def test_a_folder_of_before_the_forms_goes_on(tmp_path: Path) -> None:
    later = {"held_out_images", "size", "stem", "mixed_precision"}
    stated = {key: value for key, value in asdict(Settings()).items() if key not in later}
    (tmp_path / "settings.json").write_text(json.dumps(stated))
    with pytest.raises(SystemExit, match="states another experiment"):
        claim_folder(tmp_path, FORMS["gpu"])
    claim_folder(tmp_path, FORMS["cpu"])
