"""How long it takes to look into a cache.

    python -m benchmarks.inspection [--shards 5000] [--teachers 3] [--cache FOLDER]

`inspect` is timed as a user meets it, in a fresh process, on a cache of ImageNet's size: real tables and
commit records, shard files of the right size that hold nothing. The goal: at most 1 s for the page, and for
one shard, one row and one key.
"""

from __future__ import annotations

import argparse
import json
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

from pipeline.cache import FeatureCache
from pipeline.manifest import CommitRecord, FileRecord, Manifest
from pipeline.sources import SAMPLE_SCHEMA
from pipeline.spec import CacheSpec, DatasetSpec, Segment, TeacherSpec, ViewPolicy
from pipeline.storage import Storage
from pipeline.stores.base import teacher_layouts
from pipeline.stores.shard_format import CHECKSUM_NBYTES, index_nbytes
from pipeline.stores.zarr_store import shard_file
from pipeline.views import draw_views

ROWS_PER_SHARD = 256
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
        print_results(measure(cache, arguments.shards, arguments.repeats))


def measure(cache: Path, shards: int, repeats: int) -> dict[str, float]:
    """Median seconds of each question, asked in turns."""
    key = f"n{shards // 2 * ROWS_PER_SHARD:08d}/image"
    questions = {
        "the page": [],
        "--json": ["--json"],
        "--shard": ["--shard", str(shards // 2)],
        "--row": ["--row", str(shards * ROWS_PER_SHARD // 2)],
        "--key": ["--key", key],
    }
    seconds: dict[str, list[float]] = {name: [] for name in questions}
    for _ in range(repeats + 1):
        for name, options in questions.items():
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "jobs.cli", "inspect", str(cache), *options],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def make_large_cache(folder: Path, shards: int, teachers: int) -> FeatureCache:
    """A complete cache of `shards` × `ROWS_PER_SHARD` samples whose features were never computed."""
    num_samples = shards * ROWS_PER_SHARD
    keys = [f"n{index:08d}/image" for index in range(num_samples)]
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
            kind="image_folder", location="/data/imagenet", num_samples=num_samples, fingerprint="0" * 32
        ),
        views=ViewPolicy(),
        rows_per_shard=ROWS_PER_SHARD,
        segments=(Segment(first_row=0, samples=(0, num_samples), views=(0, 1)),),
        teachers={f"teacher{index}": teacher for index in range(teachers)},
        created="2026-01-01T00:00:00+00:00",
        versions={"torch": "2.15.0", "timm": "1.0.31"},
    )
    cache = FeatureCache(Storage.at(folder), spec)
    for name in spec.teachers:
        cache.store.create(spec, name)
        for shard in range(shards):
            commit_empty_shard(cache, folder, name, shard)
    sizes = np.full(num_samples, 480)
    views = draw_views(spec.views, keys, sizes, sizes, (0, 1))
    Manifest(cache.storage).create(spec, sample_table(keys, sizes), views)
    return cache


def commit_empty_shard(cache: FeatureCache, folder: Path, teacher: str, shard: int) -> None:
    files = {}
    for array, layout in teacher_layouts(cache.spec.teachers[teacher]).items():
        chunk_nbytes = int(np.prod(layout.shape)) * layout.dtype.itemsize + CHECKSUM_NBYTES
        nbytes = ROWS_PER_SHARD * chunk_nbytes + index_nbytes(ROWS_PER_SHARD)
        name = shard_file(teacher, array, shard, len(layout.shape))
        files[name] = FileRecord(nbytes=nbytes, checksum="0" * 32)
        (folder / name).parent.mkdir(parents=True)
        with (folder / name).open("wb") as file:
            file.truncate(nbytes)
    record = CommitRecord(
        teacher=teacher,
        shard=shard,
        content_id=cache.spec.content_id(teacher),
        first_row=shard * ROWS_PER_SHARD,
        num_rows=ROWS_PER_SHARD,
        files=files,
        source_checksum="0" * 32,
        seconds=STAGES,
        host=f"node{shard % 8}",
        versions={"torch": "2.15.0", "timm": "1.0.31", "numpy": "2.4.6", "zarr": "3.1.6"},
        finished=f"2026-01-{1 + shard // 1440 % 28:02d}T{shard // 60 % 24:02d}:{shard % 60:02d}:00+00:00",
    )
    path = folder / "commits" / teacher / f"{shard:05d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(record.model_dump_json() + "\n")


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


def print_results(seconds: dict[str, float]) -> None:
    table = Table("teachercache inspect", "seconds")
    for name, value in seconds.items():
        table.add_row(name, f"{value:.2f}")
    console = Console()
    console.print(table)
    console.print_json(json.dumps(seconds))


if __name__ == "__main__":
    main()
