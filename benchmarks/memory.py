"""How much of a GPU's memory a teacher's forward pass takes, counted without one.

    python -m benchmarks.memory                                  SAM-L at 1024², 16 views, eager, bfloat16
    python -m benchmarks.memory --teachers dinov2_large --batch-size 32

On fake CUDA tensors (`benchmarks.fake_gpu`): the weights, and the most bytes that tensors hold at once beside
them. What a kernel takes for itself (a convolution's workspace), the allocator's rounding and CUDA's own
context of about half a GB come on top. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.fake_gpu import fake_gpu, give_fake_weights
from teachercache.cache_builder.teachers import resolve_teacher
from teachercache.cache_builder.teachers.registry import kind_of
from teachercache.cache_builder.teachers.teacher_recipe import TeacherRecipe
from teachercache.pipeline.records.strict import Size


class Peak(TorchDispatchMode):
    """The most bytes that tensors on a GPU hold at once, of those that are made under it."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type == "cuda":
                self._hold(tensor.untyped_storage())
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.held += nbytes
            self.most = max(self.most, self.held)
            weakref.finalize(storage, self._let_go, key, nbytes)

    def _let_go(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.held -= nbytes


def peak_of(preset: str, size: Size, batch_size: int) -> tuple[int, int]:
    """(bytes of the weights, most bytes beside them) of an eager forward pass in bfloat16."""
    recipe = TeacherRecipe(preset=preset, pretrained=False, precision="bfloat16")
    spec = resolve_teacher(preset, recipe, size)
    with fake_gpu() as fake:
        with torch.device("meta"):
            teacher = kind_of(spec.model)(spec)
        give_fake_weights(teacher, fake, "cuda")
        peak = Peak()
        with fake, torch.no_grad():
            views = torch.empty(batch_size, 3, *spec.render_size, dtype=torch.uint8, device="cuda")
            teacher(views)  # makes what is kept from one pass to the next
            with peak:
                teacher(views)
    weights = sum(tensor.nbytes for tensor in teacher.state_dict().values())
    return weights, peak.most


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teachers", nargs="+", default=["sam_large"], help="presets")
    parser.add_argument("--size", type=int, default=384, help="side of the views, in pixels")
    parser.add_argument("--batch-size", type=int, default=16)
    arguments = parser.parse_args()
    found = {}
    for preset in arguments.teachers:
        weights, most = peak_of(preset, (arguments.size, arguments.size), arguments.batch_size)
        sizes = f"{weights / 1e9:.2f} GB of float32 weights, {most / 1e9:.2f} beside them"
        print(f"{preset}, {arguments.batch_size} views: {sizes}")
        found[preset] = {"weights_GB": weights / 1e9, "beside_GB": most / 1e9}
    print(json.dumps({"benchmark": "memory", "batch_size": arguments.batch_size, "teachers": found}))


if __name__ == "__main__":
    main()
