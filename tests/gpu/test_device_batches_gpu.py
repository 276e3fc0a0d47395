"""Batches that arrive beside what is computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from teachercache.pipeline.loading.loader import Batch
from teachercache.student.training.loop import DeviceBatches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_what_is_computed_from_a_batch_comes_after_its_copy() -> None:
    device = torch.device("cuda")
    on_device = DeviceBatches(device)
    sums = []
    for value in range(8):
        views = torch.full((64, 3, 512, 512), value, dtype=torch.uint8).pin_memory()
        windows = np.zeros((64, 2), np.int64)
        batch = Batch(value, np.arange(64), [], windows, views, {(512, 512): views}, {}, {}, {}, {})
        sums.append(on_device(batch).renders[512, 512].sum(dtype=torch.int64))
    assert [int(found) for found in sums] == [value * 64 * 3 * 512 * 512 for value in range(8)]
