"""How long it takes to look into a cache.

    python -m benchmarks.inspection [--shards 5000] [--teachers 3] [--cache FOLDER]

`inspect` is timed as a user meets it, in a fresh process, on a cache of ImageNet's size: real tables and
commit records, shard files of the right size that hold nothing. `report` and the clicks in `view` are timed
on 12 images with features of the size of DINOv2-L, CLIP-L and SAM-L (noise, which makes the largest page);
a click counts from the mouse's press in a headless Chromium until the new maps are in the page.

The goals: `inspect` at most 1 s, for the page, one shard, one row and one key; `report` at most 60 s and
8 MB; a click at most 300 ms. Prints a table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from teachercache.jobs.inspection.summary import summarize
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.places.open_storage import open_storage
from teachercache.pipeline.records.manifest import CommitRecord, FileRecord, Manifest
from teachercache.pipeline.records.spec import CacheSpec, DatasetSpec, Segment, TeacherSpec
from teachercache.pipeline.records.tables import SAMPLE_SCHEMA, dataset_fingerprint
from teachercache.pipeline.records.view_policy import ViewPolicy
from teachercache.pipeline.stores.feature_store import teacher_layouts
from teachercache.pipeline.stores.shard_format import CHECKSUM_NBYTES, index_nbytes
from teachercache.pipeline.stores.zarr_store import shard_file
from teachercache.pipeline.views import draw_views
from tests.make_cache import make_cache, make_images, teacher_spec

ROWS_PER_SHARD = 256
SAMPLES, CLICKS = 12, 20
GOALS = {"report, MB": 8.0, "report, s": 60.0, "a click, s": 0.3, "the slowest click, s": 0.3}  # else: 1 s
STAGES = {"read": 0.4, "decode": 9.0, "forward": 61.0, "encode": 2.0, "write": 3.0, "wall": 64.0}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=5000, help=f"of {ROWS_PER_SHARD} rows")
    parser.add_argument("--teachers", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cache", type=Path, help="keep the cache here, or use the one that is here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cache = arguments.cache or Path(folder) / "cache"
        if not (cache / "cache.json").exists():
            make_large_cache(cache, arguments.shards, arguments.teachers)
        require_sound(cache)
        results = measure_inspect(cache, arguments.shards, arguments.repeats)
        viewed = make_viewed_cache(Path(folder))
        results |= measure_report(viewed, Path(folder) / "report.html") | measure_clicks(viewed)
        print_results(results)


def require_sound(cache: Path) -> None:
    """A cache whose records are refused is looked through faster than one whose records are right."""
    found = summarize(open_storage(cache))
    assert not found["problems"], found["problems"][:3]


def measure_inspect(cache: Path, shards: int, repeats: int) -> dict[str, float]:
    """Median seconds of each question, asked in turns."""
    key = f"n{shards // 2 * ROWS_PER_SHARD:08d}/image"
    questions = {
        "inspect, s": [],
        "inspect --json, s": ["--json"],
        "inspect --shard, s": ["--shard", str(shards // 2)],
        "inspect --row, s": ["--row", str(shards * ROWS_PER_SHARD // 2)],
        "inspect --key, s": ["--key", key],
    }
    seconds: dict[str, list[float]] = {name: [] for name in questions}
    for _ in range(repeats + 1):
        for name, options in questions.items():
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "teachercache.jobs.cli", "inspect", str(cache), *options],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def measure_report(cache: Path, page: Path) -> dict[str, float]:
    start = time.perf_counter()
    command = [sys.executable, "-m", "teachercache.jobs.cli", "report", str(cache), "-o", str(page)]
    subprocess.run([*command, "--samples", str(SAMPLES)], check=True, stdout=subprocess.DEVNULL)
    return {"report, s": time.perf_counter() - start, "report, MB": page.stat().st_size / 1e6}


def measure_clicks(cache: Path) -> dict[str, float]:
    """Nothing where there is no Chromium or no Playwright."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None or importlib.util.find_spec("playwright") is None:
        print("clicks are not measured: they need chromium and the package playwright", file=sys.stderr)
        return {}
    from playwright.sync_api import sync_playwright

    command = [sys.executable, "-m", "teachercache.jobs.cli", "view", str(cache)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, sync_playwright() as driver:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().split()[0]
            browser = driver.chromium.launch(executable_path=chromium, args=["--headless", "--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 720})
            page.goto(url)
            page.locator("#board img.map").first.wait_for(timeout=60_000)
            box = page.locator("#board .pick").first.bounding_box()
            assert box is not None
            seconds = []
            for number in range(CLICKS + 1):
                maps = page.locator("#board img.map").nth(1).get_attribute("src")
                where = (number % 7 + 0.5) / 7, (number % 5 + 0.5) / 5
                start = time.perf_counter()
                page.mouse.click(box["x"] + where[0] * box["width"], box["y"] + where[1] * box["height"])
                page.wait_for_function(
                    "maps => document.querySelectorAll('#board img.map')[1]?.src != maps", arg=maps
                )
                seconds.append(time.perf_counter() - start)
                page.wait_for_timeout(100)
            browser.close()
        finally:
            server.terminate()
    return {"a click, s": statistics.median(seconds[1:]), "the slowest click, s": max(seconds[1:])}


def make_viewed_cache(folder: Path) -> Path:
    images = make_images(folder / "images", SAMPLES, (500, 375))
    grids = {"dinov2": 27, "clip": 24, "sam": 64}
    teachers = {name: teacher_spec(1024, grid, "f16") for name, grid in grids.items()}
    make_cache(
        folder / "viewed",
        images,
        teachers=teachers,
        num_views=1,
        samples_per_shard=SAMPLES,
        view_size=(384, 384),
    )
    return folder / "viewed"


def make_large_cache(folder: Path, shards: int, teachers: int) -> FeatureCache:
    """A complete cache of `shards` × `ROWS_PER_SHARD` samples whose features were never computed."""
    num_samples = shards * ROWS_PER_SHARD
    keys = [f"n{index:08d}/image" for index in range(num_samples)]
    sizes = np.full(num_samples, 480)
    samples = sample_table(keys, sizes)
    teacher = TeacherSpec(
        model="vit_large_patch14_dinov2.lvd142m",
        weights_hash="0" * 32,
        image_size=(378, 378),
        render_size=(378, 378),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        block_indices=(5, 11, 17, 23),
        native_grid=(27, 27),
        width=1024,
        codec="f16",
    )
    spec = CacheSpec(
        dataset=DatasetSpec(
            kind="image_folder",
            location="/data/imagenet",
            num_samples=num_samples,
            fingerprint=dataset_fingerprint(samples),
        ),
        views=ViewPolicy(),
        rows_per_shard=ROWS_PER_SHARD,
        segments=(Segment(first_row=0, samples=(0, num_samples), views=(0, 1)),),
        teachers={f"teacher{index}": teacher for index in range(teachers)},
        created="2026-01-01T00:00:00+00:00",
        versions={"torch": "2.15.0", "timm": "1.0.31"},
    )
    cache = FeatureCache(open_storage(folder), spec)
    for name in spec.teachers:
        cache.store.create(name)
        for shard in range(shards):
            commit_empty_shard(cache, folder, name, shard)
    views = draw_views(spec.views, keys, sizes, sizes, (0, 1))
    Manifest(cache.storage).create(spec, samples, views)
    return cache


def commit_empty_shard(cache: FeatureCache, folder: Path, teacher: str, shard: int) -> None:
    files = {}
    for array, layout in teacher_layouts(cache.spec.teachers[teacher]).items():
        chunk_nbytes = layout.row_nbytes + CHECKSUM_NBYTES
        nbytes = ROWS_PER_SHARD * chunk_nbytes + index_nbytes(ROWS_PER_SHARD)
        name = shard_file(teacher, array, shard, len(layout.shape))
        files[name] = FileRecord(nbytes=nbytes, checksum="0" * 32)
        (folder / name).parent.mkdir(parents=True)
        with (folder / name).open("wb") as file:
            file.truncate(nbytes)
    record = CommitRecord(
        teacher=teacher,
        shard=shard,
        content_id=cache.spec.shard_content_id(teacher, shard),
        first_row=shard * ROWS_PER_SHARD,
        num_rows=ROWS_PER_SHARD,
        files=files,
        source_checksum="0" * 32,
        seconds=STAGES,
        host=f"node{shard % 8}",
        versions={"torch": "2.15.0", "timm": "1.0.31", "numpy": "2.4.6", "zarr": "3.1.6"},
        finished=f"2026-01-{1 + shard // 1440 % 28:02d}T{shard // 60 % 24:02d}:{shard % 60:02d}:00+00:00",
    )
    Manifest(cache.storage).commit(record)


def sample_table(keys: list[str], sizes: np.ndarray) -> pa.Table:
    count = len(keys)
    return pa.table(
        {
            "key": keys,
            "path": [f"{key}.JPEG" for key in keys],
            "offset": np.zeros(count, np.int64),
            "nbytes": np.full(count, 110_000),
            "width": sizes.astype(np.int32),
            "height": sizes.astype(np.int32),
            "label": [key[:9] for key in keys],
            "status": ["ok"] * count,
            "head_hash": np.arange(count, dtype=np.uint64),
        },
        schema=SAMPLE_SCHEMA,
    )


def print_results(results: dict[str, float]) -> None:
    table = Table("what", "measured", "goal, at most", "kept")
    for name, value in results.items():
        goal = GOALS.get(name, 1.0)
        table.add_row(name, f"{value:.2f}", f"{goal:g}", "yes" if value <= goal else "no")
    Console().print(table)
    print(json.dumps({name: round(value, 3) for name, value in results.items()}))


if __name__ == "__main__":
    main()
