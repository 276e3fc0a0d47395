"""Memory goes round, and never while somebody looks at it."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from torch import Tensor

from teachercache.pipeline.loading.batch_memory import BatchMemory, TensorLayout

LAYOUTS: dict[object, TensorLayout] = {
    "codes": ((2, 3), torch.float16),
    ("a", "bits"): ((5,), torch.uint16),
    (8, 8): ((2, 3, 8, 8), torch.uint8),
    "scalar": ((), torch.float32),
}


def place(tensors: dict[object, Tensor]) -> int:
    return tensors["codes"].untyped_storage().data_ptr()


@pytest.mark.parametrize("layouts", [LAYOUTS, {}])
def test_tensors_are_as_asked_and_apart(layouts: dict[object, TensorLayout]) -> None:
    tensors = BatchMemory(layouts).take()
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == layouts
    for value, tensor in enumerate(tensors.values()):
        assert tensor.is_contiguous()
        tensor.fill_(value)
    for value, tensor in enumerate(tensors.values()):
        assert (tensor.float() == value).all()


def test_memory_goes_round_when_the_last_view_is_gone() -> None:
    memory = BatchMemory(LAYOUTS)
    first = memory.take()
    used = place(first)
    view = first["codes"][0]
    del first
    assert place(memory.take()) != used, "a view is left"
    del view
    again = [memory.take() for _ in range(2)]
    assert used in {place(tensors) for tensors in again}


def test_a_tensor_that_autograd_saved_is_in_use() -> None:
    memory = BatchMemory(LAYOUTS)
    tensors = memory.take()
    used = place(tensors)
    target = tensors["codes"].fill_(3)
    weight = torch.ones(2, 3, dtype=torch.float16, requires_grad=True)
    loss = (weight * target).sum()
    del tensors, target
    for _ in range(3):
        memory.take()["codes"].fill_(7)
    loss.backward()
    assert weight.grad is not None
    assert (weight.grad == 3).all()
    del loss
    gc.collect()
    assert used in {place(tensors) for tensors in [memory.take() for _ in range(2)]}


def test_sets_may_outlive_the_memory_and_end_in_any_thread() -> None:
    memory = BatchMemory(LAYOUTS)
    sets = [memory.take() for _ in range(20)]
    for number, tensors in enumerate(sets):
        tensors["codes"].fill_(number)
    threads = [threading.Thread(target=sets.pop) for _ in range(15)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    new = [memory.take() for _ in range(15)]
    assert len({place(tensors) for tensors in [*sets, *new]}) == 20
    del memory
    assert [int(tensors["codes"][0, 0]) for tensors in sets] == [0, 1, 2, 3, 4]
