"""Copy views to a teacher's device, and codes from it, while it computes."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


class DeviceCopies:
    """On a GPU, copies run on a stream of their own: the next batch arrives while this one is computed.

    The thread that renders a batch calls `start`; the one that computes it calls `wait` and `synchronize`.
    """

    def __init__(self, teacher: nn.Module) -> None:
        self._device = next(teacher.parameters()).device
        self.on_gpu = self._device.type == "cuda"
        streams = [torch.cuda.Stream(self._device) if self.on_gpu else None for _ in range(2)]
        self._stream, self._back = streams

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

    def to_host(self, *groups: Mapping[str, Tensor]) -> tuple[list[dict[str, Tensor]], Callable[[], object]]:
        """The tensors on the host, once what is returned beside them was called, in whichever thread.

        They are copied behind what this thread has computed, and beside what it computes next, into
        page-locked memory, of which PyTorch keeps a ring.
        """
        if self._back is None:
            return [dict(group) for group in groups], lambda: None
        self._back.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._back):
            copies = [{name: one.to("cpu", non_blocking=True) for name, one in g.items()} for g in groups]
        for group in groups:
            for tensor in group.values():
                tensor.record_stream(self._back)
        return copies, self._back.record_event().synchronize
