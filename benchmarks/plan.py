"""What a plan of ImageNet's size costs, and what it costs to open and to schedule it.

    python -m benchmarks.plan [--samples 1281167] [--views 4] [--rows-per-shard 256] [--scheduled 500]

The sample table is made up; everything behind it is what a build does: unique keys, the fingerprint, views,
the plan and the list of shards, the tables on disk. Opening: another process opens the cache with all its
commit records. Scheduling: runners with workers that do nothing. Goals: the plan in 60 s and 2 GB on two
cores, the cache open in 1 s, 5 ms a shard.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
from rich.console import Console
from rich.table import Table

from teachercache import FeatureCache
from teachercache.cache_builder import builder
from teachercache.cache_builder.build_recipe import BuildRecipe, RunnerRecipe
from teachercache.cache_builder.extract import ShardExtractor
from teachercache.cache_builder.plan import pending
from teachercache.cache_builder.ray_runner import RayRunner, RayWorker
from teachercache.cache_builder.runner import LocalRunner, Runner, Task
from teachercache.cache_builder.worker import Worker
from teachercache.pipeline.places.open_storage import open_storage
from teachercache.pipeline.records.manifest import CommitRecord, FileRecord, Manifest
from teachercache.pipeline.records.spec import CacheSpec
from teachercache.pipeline.sources.image_folder import ImageFolderSource
from teachercache.pipeline.sources.keys import OK, with_unique_keys

TEACHER = "teacher"


def main() -> None:
    if sys.argv[1:2] == ["--open"]:
        print(json.dumps(open_seconds(sys.argv[2])))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=1_281_167)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--rows-per-shard", type=int, default=256)
    parser.add_argument("--scheduled", type=int, default=500, help="shards given to workers that do nothing")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="plan") as folder:
        facts = measure(Path(folder), arguments)
    table = Table(title="Planning, opening, scheduling", title_justify="left", show_header=False)
    for name, value in facts.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else f"{value:,}")
    Console().print(table)
    print(json.dumps(facts))


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    (folder / "images").mkdir()
    recipe = BuildRecipe.model_validate(
        {
            "cache": str(folder / "cache"),
            "source": {"path": str(folder / "images"), "kind": ImageFolderSource.kind},
            "teachers": {TEACHER: {"model": "vit_large_patch14_dinov2", "pretrained": False}},
            "views": {"num_views": arguments.views},
            "rows_per_shard": arguments.rows_per_shard,
        }
    )
    facts: dict[str, float] = {"samples": arguments.samples}
    before_gb, start = peak_gb(), time.perf_counter()
    with sample_table(scanned_rows(arguments.samples)):
        drafted, spec, _ = builder.prepare(recipe, Console(quiet=True))
    storage = open_storage(recipe.cache)
    manifest = Manifest(storage)
    tasks = [Task(shard, names) for shard, names in pending(manifest, spec, [TEACHER]).items()]
    facts["plan (s)"] = time.perf_counter() - start
    spec = with_weights(spec)
    manifest.create(spec, drafted.samples, drafted.views)
    facts["plan and tables on disk (s)"] = time.perf_counter() - start
    facts["peak memory (GB)"] = peak_gb()
    facts["of it before the plan (GB)"] = before_gb
    facts["rows"], facts["shards"] = spec.num_rows, len(tasks)
    facts["tables (MB)"] = sum(storage.size(name) or 0 for name in ("samples.parquet", "views.parquet")) / 1e6
    write_commits(manifest, spec)
    command = [sys.executable, "-m", "benchmarks.plan", "--open", recipe.cache]
    facts |= json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    tasks = tasks[: arguments.scheduled]
    for name, runner in idle_runners():
        with runner:
            runner.run(recipe.cache, recipe.source.path, tasks[:1], lambda records: None)  # actors start
            start = time.perf_counter()
            failed = runner.run(recipe.cache, recipe.source.path, tasks, lambda records: None)
            facts[f"scheduling, {name} (ms a shard)"] = (time.perf_counter() - start) / len(tasks) * 1e3
            assert not failed, failed
    return facts


def scanned_rows(count: int) -> pa.Table:
    """What a scan of ImageNet's folders would give, before keys are made unique; not in the order of keys."""
    generator = np.random.default_rng(0)
    number = generator.permutation(count)
    keys = pa.array([f"n{n % 1000:08d}/n{n % 1000:08d}_{n}" for n in number.tolist()])
    paths = pa.array([f"{key}.JPEG" for key in keys.to_pylist()])
    side = generator.integers(200, 600, (2, count), np.int32)
    return pa.table(
        {
            "key": keys,
            "path": paths,
            "offset": np.zeros(count, np.int64),
            "nbytes": generator.integers(10_000, 200_000, count),
            "width": side[0],
            "height": side[1],
            "label": pa.array([key[:9] for key in keys.to_pylist()]),
            "status": pa.array([OK] * count),
            "head_hash": generator.integers(0, 2**63, count).astype(np.uint64),
            "qualified_key": paths,
        }
    )


@contextmanager
def sample_table(rows: pa.Table) -> Iterator[None]:
    """Let folders have these images: the disk's share of a scan is none of the plan's."""
    scan = ImageFolderSource.scan
    ImageFolderSource.scan = lambda self, **_: with_unique_keys(rows).sort_by("key").combine_chunks()  # type: ignore[method-assign]
    try:
        yield
    finally:
        ImageFolderSource.scan = scan  # type: ignore[method-assign]


def with_weights(spec: CacheSpec) -> CacheSpec:
    teachers = {
        name: teacher.model_copy(update={"weights_hash": "0" * 32}) for name, teacher in spec.teachers.items()
    }
    return CacheSpec.model_validate(spec.model_dump() | {"teachers": teachers, "cache_id": ""})


def write_commits(manifest: Manifest, spec: CacheSpec) -> None:
    """Records as a build writes them, some with invalid rows."""
    files = {f"teachers/{TEACHER}/codes/c/0/0/0/0/0": FileRecord(nbytes=1 << 30, checksum="0" * 32)}
    content_id = spec.content_id(TEACHER)
    for shard in range(spec.num_shards):
        rows = spec.shard_rows(shard)
        manifest.commit(
            CommitRecord(
                teacher=TEACHER,
                shard=shard,
                content_id=content_id,
                first_row=rows.start,
                num_rows=len(rows),
                invalid_rows=tuple(rows[: spec.views.num_views]) if shard % 100 == 0 else (),
                files=files,
                source_checksum="0" * 32,
                seconds=dict.fromkeys(("read", "decode", "forward", "encode", "write", "wall"), 1.0),
                host="node-1",
                versions=spec.versions,
                finished="2026-01-01T00:00:00+00:00",
            )
        )


def open_seconds(cache: str) -> dict[str, float]:
    start = time.perf_counter()
    opened = FeatureCache.open(cache)
    done = opened.committed(TEACHER).sum()
    facts = {"open, and see which shards there are (s)": time.perf_counter() - start}
    assert done == opened.spec.num_shards
    start = time.perf_counter()
    opened.valid_samples()
    facts["valid samples, from every commit record (s)"] = time.perf_counter() - start
    start = time.perf_counter()
    opened.key(0), opened.view(0)
    facts["first sample and view, from the tables (s)"] = time.perf_counter() - start
    return facts


class IdleExtractor(ShardExtractor):
    """Has every shard done at once."""

    def extract(self, shard: int, names: Collection[str], replace: bool = False) -> dict[str, CommitRecord]:
        return {}


class IdleWorker(Worker):
    """A worker without teachers."""

    def open(self, url: str, images: str | None = None) -> ShardExtractor:
        return IdleExtractor(FeatureCache.open(url, images), {})


class IdleRayWorker(RayWorker):
    def fill(self, url: str, images: str, loaded: object) -> str:
        return ""

    def extract(self, shard: int, names: Collection[str]) -> dict[str, CommitRecord]:
        return {}


class IdleLocalRunner(LocalRunner):
    worker = IdleWorker


class IdleRayRunner(RayRunner):
    worker = IdleRayWorker


def idle_runners() -> Iterator[tuple[str, Runner]]:
    yield "in one process", IdleLocalRunner(RunnerRecipe(), {})
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="error")
    yield "on Ray", IdleRayRunner(RunnerRecipe(kind="ray", gpus_per_actor=0, num_actors=2), {})


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


if __name__ == "__main__":
    main()
