"""Batches on the device that trains, copied beside what it computes."""

import torch
from torch import Tensor

from teachercache.pipeline.loading.loader import Batch


class DeviceBatches:
    """On a GPU, copies run on a stream of their own: while the host is a step ahead, the next batch arrives
    beside the step that is computed. Elsewhere a batch stays as it is, for those who use it to move."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        """`batch` on its way to the device: what this thread computes from now on comes after."""
        if self._stream is None:
            return batch
        computing = torch.cuda.current_stream(self._device)

        def copy(tensor: Tensor) -> Tensor:
            copied = tensor.to(self._device, non_blocking=True)
            copied.record_stream(computing)  # which may use it until it is done, whoever lets it go
            return copied

        with torch.cuda.stream(self._stream):
            copied = batch.map(copy)
        computing.wait_stream(self._stream)
        return copied
