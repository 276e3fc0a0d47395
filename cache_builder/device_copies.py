"""Views on their way to a teacher's device, beside what it computes."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DeviceCopies:
    """On a GPU, copies run on a stream of their own: the next batch arrives while this one is computed.

    `start` is called where a batch was rendered, `wait` and `synchronize` where it is computed.
    """

    def __init__(self, teacher: nn.Module) -> None:
        self._device = next(teacher.parameters()).device
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

    def start(self, views: Tensor) -> Tensor:
        """`views` on the device, or on their way; they may be used after `wait`."""
        if self._stream is None:
            return views.to(self._device)
        with torch.cuda.stream(self._stream):
            return views.pin_memory().to(self._device, non_blocking=True)

    def wait(self, views: Tensor) -> None:
        """What this thread computes from now on comes after the copy of `views`."""
        if self._stream is not None:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_stream(self._stream)
            views.record_stream(computing)

    def synchronize(self) -> None:
        """Until what this thread computes is done, so that a clock can be read."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).synchronize()
