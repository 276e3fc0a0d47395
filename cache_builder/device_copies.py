"""Copy views to a teacher's device while it computes."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DeviceCopies:
    """On a GPU, copies run on a stream of their own: the next batch arrives while this one is computed.

    The thread that renders a batch calls `start`; the one that computes it calls `wait` and `synchronize`.
    """

    def __init__(self, teacher: nn.Module) -> None:
        self._device = next(teacher.parameters()).device
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

    def start(self, views: Tensor) -> Tensor:
        """`views` on the device, perhaps still being copied; use them after `wait`."""
        if self._stream is None:
            return views.to(self._device)
        with torch.cuda.stream(self._stream):
            return views.pin_memory().to(self._device, non_blocking=True)

    def wait(self, views: Tensor) -> None:
        """Order everything that this thread computes from now on after the copy of `views`."""
        if self._stream is not None:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_stream(self._stream)
            views.record_stream(computing)

    def synchronize(self) -> None:
        """Wait until this thread's computations are done, so that times are right."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).synchronize()
