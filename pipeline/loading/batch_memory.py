"""Memory that batches are made in: used again as soon as nothing refers to the batch any more.

Filling fresh memory costs several times what reading does, because the kernel hands it out page by page.
"""

import math
import weakref
from collections import deque
from collections.abc import Hashable, Mapping

import torch
from torch import Tensor

TensorLayout = tuple[tuple[int, ...], torch.dtype]  # (shape, dtype)

_ALIGNMENT = 64


class BatchMemory:
    """Sets of tensors of the same layout, by name; all tensors of a set lie in one block.

    A block returns when the last tensor over it, view or not, is gone: nothing that is still in use is
    ever overwritten, and the number of blocks is the largest number of sets that were in use at once.
    Page-locked blocks also wait for the copies of the CUDA stream that was current in `take`.
    """

    def __init__(self, layouts: Mapping[Hashable, TensorLayout], pin_memory: bool = False) -> None:
        self._places: dict[Hashable, tuple[slice, TensorLayout]] = {}
        self._nbytes = 0
        for name, (shape, dtype) in layouts.items():
            stop = self._nbytes + math.prod(shape) * dtype.itemsize
            self._places[name] = slice(self._nbytes, stop), (shape, dtype)
            self._nbytes = -(-stop // _ALIGNMENT) * _ALIGNMENT
        self._pin_memory = pin_memory
        self._free: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def take(self) -> dict[Hashable, Tensor]:
        """A set of tensors that nothing else refers to; what they hold is undefined."""
        try:
            block, copied = self._free.popleft()
            if copied is not None:
                copied.synchronize()
        except IndexError:  # two threads may take the last
            block = torch.empty(self._nbytes, dtype=torch.uint8, pin_memory=self._pin_memory)
        lent = block.numpy()  # a new object, which the tensors below keep alive between them
        stream = torch.cuda.current_stream() if self._pin_memory else None
        weakref.finalize(lent, self._give_back, block, stream).atexit = False
        memory = torch.from_numpy(lent)
        return {
            name: memory[place].view(dtype).view(shape)
            for name, (place, (shape, dtype)) in self._places.items()
        }

    def _give_back(self, block: Tensor, stream: torch.cuda.Stream | None) -> None:
        self._free.append((block, None if stream is None else stream.record_event()))
