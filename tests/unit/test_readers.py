"""What `benchmarks.read` compares gives the same rows, each reader in the order that it states."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.read import ratio
from benchmarks.readers import READERS, Workload, feature_loader, theia_tar
from pipeline.loader import Batch
from tests.make_cache import features, make_cache, make_images, teacher_spec

ROWS = np.array([1, 2, 5, 6, 8, 11])


@pytest.fixture
def workload(tmp_path: Path) -> Workload:
    cache = make_cache(
        tmp_path / "cache", make_images(tmp_path / "images", 6), teachers={"t": teacher_spec(codec="f16")}
    )
    (tmp_path / "copies").mkdir()
    return Workload(cache, "t", ROWS, 2, cache.buffers(2), tmp_path / "copies")


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("name", READERS)
def test_readers_fill_the_buffers_with_the_rows(workload: Workload, name: str) -> None:
    codes = features(workload.cache.spec, "t")["codes"]
    in_order = READERS[name] is theia_tar
    orders = np.arange(len(ROWS)).reshape(-1, 2) if in_order else islice(workload.orders(), 3)
    reader = READERS[name](workload)
    for order in orders:
        try:
            next(reader)
        except ImportError as error:
            pytest.skip(f"{error.name} is not installed")
        assert torch.equal(workload.tensors["codes"], codes[ROWS[order]])


def test_the_loader_gives_the_rows(workload: Workload) -> None:
    codes = features(workload.cache.spec, "t")["codes"]
    loader = feature_loader(workload)
    for order, batch in zip(islice(workload.orders(), 4), loader, strict=False):
        assert isinstance(batch, Batch)
        assert batch.rows.tolist() == ROWS[order].tolist()
        assert torch.equal(batch.features["t"].tensors()["codes"], codes[batch.rows])


def test_ratios_are_medians_of_ratios() -> None:
    assert ratio({"a": [1, 8, 30], "b": [1, 2, 3]}, "a", "b") == 4
