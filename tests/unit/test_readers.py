"""What `benchmarks.read` compares gives the same rows, each reader in the order that it states."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.read import GOALS, ratio
from benchmarks.readers import LOADERS, READERS, TAR, Workload, feature_loader
from tests.make_cache import features, make_cache, make_images, teacher_spec

TESTED = READERS | {"loader": feature_loader}
ROWS = np.array([1, 2, 5, 6, 8, 11])


@pytest.fixture
def workload(tmp_path: Path) -> Workload:
    cache = make_cache(
        tmp_path / "cache", make_images(tmp_path / "images", 6), teachers={"t": teacher_spec(codec="f16")}
    )
    (tmp_path / "copies").mkdir()
    return Workload(cache, "t", ROWS, 2, cache.buffers(2), tmp_path / "copies")


def test_goals_compare_with_zarr_python_under_checksums_too() -> None:
    pairs = {(ours, peer) for ours, peer, _ in GOALS.values()}
    assert {("ours", "zarr-python"), ("ours, checksums", "zarr-python")} <= pairs
    assert {name for pair in pairs for name in pair} <= (READERS | LOADERS).keys()


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of webdataset and MDS
@pytest.mark.parametrize("name", TESTED)
def test_readers_give_the_rows(workload: Workload, name: str) -> None:
    codes = features(workload.cache.spec, "t")["codes"]
    in_order = np.arange(len(ROWS)).reshape(-1, 2)
    orders = in_order if name == TAR else islice(workload.orders(), 3)
    reader = TESTED[name](workload)
    for order in orders:
        try:
            batch = next(reader)
        except ImportError as error:
            pytest.skip(f"{error.name} is not installed")
        assert torch.equal(torch.as_tensor(batch["codes"]).cpu(), codes[ROWS[order]])


def test_ratios_are_medians_of_ratios() -> None:
    assert ratio({"a": [1, 8, 30], "b": [1, 2, 3]}, "a", "b") == 4
