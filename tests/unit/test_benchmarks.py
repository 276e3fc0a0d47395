"""Benchmarks without tests of their own still run, those of them that are quick in their smallest form."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.inspection import ROWS_PER_SHARD, make_large_cache
from teachercache import FeatureCache

SMALLEST = [
    "build --size 32 --repeats 1 --views 1",
    "lattices --tokens 1",
    "step --size 32 --steps 1 --repeats 1 --batch-size 2",
    "windows --rows 1",
]


@pytest.mark.parametrize("words", SMALLEST)
def test_a_benchmark_ends_with_its_figures(words: str) -> None:
    name, *options = words.split()
    command = [sys.executable, "-m", f"benchmarks.{name}", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures


def test_the_cache_that_is_inspected_is_whole(tmp_path: Path) -> None:
    make_large_cache(tmp_path / "cache", shards=2, teachers=1)
    cache = FeatureCache.open(tmp_path / "cache")
    assert cache.samples.num_rows == 2 * ROWS_PER_SHARD
    assert cache.manifest.views(cache.spec).num_rows == 2 * ROWS_PER_SHARD
    assert cache.committed("teacher0").all()
