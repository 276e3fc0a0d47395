"""Page-locked memory goes round without overtaking copies that a stream still makes from it."""

import pytest
import torch

from teachercache.pipeline.loading.batch_memory import BatchMemory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_block_waits_for_the_copies_made_from_it() -> None:
    memory = BatchMemory({"codes": ((1 << 24,), torch.float32)}, pin_memory=True)
    copies = []
    for value in range(6):
        torch.cuda._sleep(50_000_000)  # so that the copies queue up behind it
        codes = memory.take()["codes"]
        assert codes.is_pinned()
        copies.append(codes.fill_(value).to("cuda", non_blocking=True))
        del codes
    assert [(copy.min().item(), copy.max().item()) for copy in copies] == [(v, v) for v in range(6)]
