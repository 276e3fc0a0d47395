"""How fast features come from the disk into memory, beside what the bytes alone take.

    python -m benchmarks.read                    synthetic float16 features: 4 levels × 24×24 × 1024
    python -m benchmarks.read --cache PATH       rows of your own cache
    python -m benchmarks.read --s3               tars over a loopback S3: as a stream, and by ranges

Random order, memory that is reused, one process; first with a warm page cache, then cold: each pass after the
files were dropped from it (posix_fadvise), so from the disk (but those that read ahead). Every repeat takes
each reader in turn, and what is reported are medians over repeats, of the ratios too. The loaders give ready
batches, features still encoded and images left out. tensorstore, zarrs, Lance, litdata, MDS and KvikIO (to a
GPU) are measured where they are installed; they are no dependencies of ours (docs/benchmarks.md). Prints a
table and, last, one line of JSON.

The goals: reader at least 0.8 of pread, 8 times zarr-python, 5 times the tar; loader at least 0.7 of pread
and 5 times the DataLoader; a cache that is opened anew for every pass, so that each shard is touched for the
first time, at least 0.9 of one that does not look whether a shard is the one that was committed. zarr-python
verifies the crc32c of every chunk, so beside it there is also our reader with checksums, which does the same.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import read_s3
from benchmarks.readers import LOADERS, READERS, TAR, THREADS, Arrays, Workload
from teachercache.pipeline.cache import FeatureCache
from tests.make_cache import make_cache, make_images, teacher_spec

GOALS = {  # (ours, the peer, at least)
    "reader / pread": ("ours", "raw pread", 0.8),
    "reader / zarr-python": ("ours", "zarr-python", 8),
    "reader, checksums / zarr-python": ("ours, checksums", "zarr-python", 8),
    "reader, checksums / zarr-python, rows copied": ("ours, checksums", "zarr-python, rows copied", 8),
    "reader / zarr-python, rows copied": ("ours", "zarr-python, rows copied", 8),
    "reader / tar": ("ours", TAR, 5),
    "default check on / off": ("ours, opened anew each pass", "ours, opened anew, default check off", 0.9),
    "loader / pread": ("ours, FeatureLoader", "raw pread", 0.7),
    "loader / DataLoader": ("ours, FeatureLoader", "torch DataLoader, 2 workers", 5),
}
MIN_S = 0.5
COLD_REPEATS = 3
READ_AHEAD = {THREADS, *LOADERS}  # part of a pass lies in their memory before the files are dropped
SETTLE_S = 0.5  # in which the loaders make their batches ahead, not in the next reader's time
READY_BATCHES = 4  # what the loaders have made before the clock starts, and will have under way when it stops


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", type=Path, help="a local cache, with uncompressed shards")
    parser.add_argument("--teacher", help="one teacher of the cache (default: the first)")
    parser.add_argument(
        "--rows", type=int, default=96, help="rows to read; the copies take up to 4 times their bytes"
    )
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--s3", action="store_true", help="compare streaming with ranges (benchmarks.read_s3)"
    )
    arguments = parser.parse_args()
    if arguments.s3:
        read_s3.compare(arguments.rows, arguments.batch_size, arguments.repeats)
        return
    with tempfile.TemporaryDirectory() as folder:
        workload = make_workload(arguments, Path(folder))
        speeds, cold = measure(workload, arguments.repeats)
    print_results(workload, speeds, cold)


def make_workload(arguments: argparse.Namespace, folder: Path) -> Workload:
    if arguments.cache:
        cache = FeatureCache.open(arguments.cache)
    else:
        teachers = {"teacher": teacher_spec(width=1024, grid=24, codec="f16")}
        images = make_images(folder / "images", arguments.rows)
        cache = make_cache(folder / "cache", images, teachers=teachers, num_views=1, samples_per_shard=32)
    teacher = cache.check_teachers([arguments.teacher] if arguments.teacher else None)[0]
    rows = cache.index.rows(cache.valid_samples([teacher]), 0)
    chosen = np.sort(np.random.default_rng(0).permutation(rows)[: arguments.rows])
    batch_size = min(arguments.batch_size, len(chosen))
    return Workload(cache, teacher, chosen, batch_size, cache.buffers(batch_size, [teacher]), folder)


def measure(workload: Workload, repeats: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Bytes per second of each repeat, by reader, warm and cold. What is not installed is skipped."""
    readers: dict[str, Iterator[Arrays]] = {}
    for name, reader in (READERS | LOADERS).items():
        iterator = reader(workload)
        try:
            for _ in range(workload.batches_per_pass):  # from the disk, or just written
                next(iterator)
        except ImportError as error:
            print(f"{name}: skipped, {error.name} is not installed")
        else:
            readers[name] = iterator
    speeds: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(repeats):
        for name, iterator in readers.items():
            for _ in range(READY_BATCHES):
                next(iterator)
            speeds[name].append(bytes_per_s(iterator, workload))
            time.sleep(SETTLE_S)
    cold: dict[str, list[float]] = {name: [] for name in readers if name not in READ_AHEAD}
    for _ in range(min(repeats, COLD_REPEATS)):
        for name in cold:
            drop_from_page_cache(Path(workload.cache.storage.url))
            drop_from_page_cache(workload.folder)
            cold[name].append(bytes_per_s(readers[name], workload, min_s=0))
    return speeds, cold


def drop_from_page_cache(folder: Path) -> None:
    """A request to the kernel, which a tmpfs cannot follow."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())  # what is not on the disk yet stays
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_per_s(iterator: Iterator[Arrays], workload: Workload, min_s: float = MIN_S) -> float:
    start, batches = time.perf_counter(), 0
    while batches < workload.batches_per_pass or time.perf_counter() - start < min_s:
        next(iterator)
        batches += 1
    return batches * workload.batch_nbytes / (time.perf_counter() - start)


def ratio(speeds: dict[str, list[float]], ours: str, peer: str) -> float:
    """How many times as fast as the peer: the median over repeats."""
    return statistics.median(a / b for a, b in zip(speeds[ours], speeds[peer], strict=True))


def print_results(workload: Workload, speeds: dict[str, list[float]], cold: dict[str, list[float]]) -> None:
    columns = "", "MB/s, warm", "of raw pread", "MB/s, cold"
    table = Table(*columns, title="Reading features, random order", title_justify="left")
    for name, values in speeds.items():
        if name == next(iter(LOADERS)):
            table.add_section()
        share = ratio(speeds, name, "raw pread")
        warm, from_disk = (
            f"{statistics.median(each) / 1e6:,.0f}" if each else "" for each in (values, cold.get(name))
        )
        table.add_row(name, warm, f"{share:.2f}", from_disk)
    Console().print(table)
    goals = {goal: ratio(speeds, ours, peer) for goal, (ours, peer, _) in GOALS.items()}
    for goal, value in goals.items():
        print(f"{goal}: {value:.2f} (goal: at least {GOALS[goal][2]:g})")
    results = {
        "benchmark": "read",
        "row_bytes": workload.batch_nbytes // workload.batch_size,
        "rows": len(workload.rows),
        "batch_size": workload.batch_size,
        "mb_per_s": {name: statistics.median(values) / 1e6 for name, values in speeds.items()},
        "cold_mb_per_s": {name: statistics.median(values) / 1e6 for name, values in cold.items()},
        "goals": goals,
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
