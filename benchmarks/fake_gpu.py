"""A GPU that is not there: the product's own code on fake CUDA tensors, and a count of what it asks of one.

Fake tensors have shapes and no values. An operation that is no view is one kernel that reads its inputs and
writes its outputs once; it takes at least the longest of its bytes at 3.0 TB/s, its products at 700 TFLOP/s
(bfloat16), 350 (TF32, of the decoding kernel) or 50 (float32 and wider), and 2 µs: an H100. So all times are
lower bounds. The search of rings takes its instructions, as ptxas makes them, at one a clock and lane.
Copies run beside the kernels; they take bandwidth of the memory, and 25 GB/s of a bus.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

BYTES_PER_S, TENSOR_FLOPS, TF32_FLOPS, OTHER_FLOPS = 3.0e12, 700e12, 350e12, 50e12
BUS_BYTES_PER_S = 25e9  # to page-locked memory
LEAST_S, LAUNCH_S = 2e-6, 6e-6  # of a kernel: on the device, and to launch it from Python

LANES, CLOCK = 132 * 128, 1.755e9
RING_INSTRUCTIONS = 374 + 51  # of `nearest_rings` a value: on the way there and on the way back, for sm_90
RING_TRIES = 4  # at once, of those tokens that did not fit: a tenth at 4 bits and more, at fewer a half

aten: Any = torch.ops.aten
_FREE = {"detach", "lift_fresh", "_unsafe_view", "device", "new_empty"}
_FREE |= {"empty", "empty_like", "empty_strided"}
_OVERWRITE = {"copy_", "fill_", "zero_"}  # what they write they do not read
_GATHER = {"index_select", "index", "gather", "embedding"}  # read as much of their source as they write
_SCATTER = {"index_put_", "scatter_"}  # touch of their target the places that they set
_WAIT = {"nonzero", "masked_select", "_unique2"}  # for the size of their output


@dataclass
class Work:
    """`bound_s`: the sum of the kernels' own bounds, and what copies take of the device's memory.

    Copies to the device and to the host are in bytes.
    """

    kernels: int = 0
    nbytes: int = 0
    flops: int = 0
    bound_s: float = 0.0
    synchronisations: int = 0
    to_device: int = 0
    to_host: int = 0
    by_kernel: Counter[str] = field(default_factory=Counter)
    nbytes_by_kernel: Counter[str] = field(default_factory=Counter)

    @property
    def bus_s(self) -> float:
        """What the copies to the host take, beside the kernels or behind them."""
        return self.to_host / BUS_BYTES_PER_S

    def add(self, name: str, nbytes: int, flops: int = 0, flops_per_s: float = 1.0) -> None:
        """One kernel."""
        self.kernels += 1
        self.nbytes += nbytes
        self.flops += flops
        self.bound_s += max(nbytes / BYTES_PER_S, flops / flops_per_s, LEAST_S)
        self.by_kernel[name] += 1
        self.nbytes_by_kernel[name] += nbytes

    def add_rings(self, tokens: Tensor, bits: int) -> None:
        """The two launches of `nearest_rings`, without what they write; none is shorter than one thread."""
        for tries in (1.0, RING_TRIES * (0.1 if bits >= 4 else 0.5)):
            values = int(tokens.numel() * tries)
            steps = max(values, LANES * tokens.shape[-1]) * RING_INSTRUCTIONS
            self.add("nearest_rings", values * (2 * 4 + 2 * 8), steps, LANES * CLOCK)  # tokens twice, choices

    def include(self, other: Work) -> None:
        for part in fields(self):
            setattr(self, part.name, getattr(self, part.name) + getattr(other, part.name))

    def record(self) -> dict[str, float]:
        return {
            "kernels": self.kernels,
            "GB": self.nbytes / 1e9,
            "TFLOP": self.flops / 1e12,
            "waits": self.synchronisations,
            "MB in": self.to_device / 1e6,
            "MB out": self.to_host / 1e6,
            "ms": 1e3 * self.bound_s,
            "ms of launches": 1e3 * LAUNCH_S * self.kernels,
        }


class Roofline(TorchDispatchMode):
    """Adds up what operations ask of `device`, by stage; of the values that they ask for, flags are true."""

    def __init__(self, device: str = "cuda") -> None:
        super().__init__()
        self._device = device
        self.stages: dict[str, Work] = {}
        self.work, self._counts = Work(), True

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        outer, self.work = self.work, self.stages.setdefault(name, Work())
        yield
        self.work = outer

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Without counting."""
        before, self._counts = self._counts, False
        try:
            yield
        finally:
            self._counts = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if not self._counts:
            return func(*args, **(kwargs or {}))
        if name == "_local_scalar_dense":
            self.work.synchronisations += 1
            return args[0].dtype == torch.bool or 1.0
        out = func(*args, **(kwargs or {}))
        inputs, outputs = tensors_of((args, kwargs)), tensors_of(out)
        devices = {tensor.device.type for tensor in inputs + outputs if tensor.numel()}
        if name in ("_to_copy", "copy_") and len(devices) > 1:
            self._copied(outputs[0])
        elif name not in _FREE and not _is_view(func) and self._device in devices:
            count = flop_registry.get(func.overloadpacket)
            flops = int(count(*args, **(kwargs or {}), out_val=out)) if count else 0
            self._ran(name, args, inputs, _written(func, args), outputs, flops)
            for index in inputs if name in _GATHER else ():
                if index.device.type != self._device:  # a copy that blocks
                    self.work.synchronisations += 1
                    self.work.to_device += nbytes_of(index)
        return out

    def _copied(self, output: Tensor) -> None:
        nbytes = nbytes_of(output)
        self.work.bound_s += nbytes / BYTES_PER_S
        if output.device.type == "cuda":
            self.work.to_device += nbytes
        else:
            self.work.to_host += nbytes

    def _ran(
        self,
        name: str,
        args: tuple[Any, ...],
        inputs: list[Tensor],
        written: list[Tensor],
        outputs: list[Tensor],
        flops: int,
    ) -> None:
        work, read = self.work, sum(map(nbytes_of, inputs))
        if name in _OVERWRITE:
            read -= sum(map(nbytes_of, written))
        elif name in _GATHER:
            read -= max(nbytes_of(inputs[0]) - sum(map(nbytes_of, outputs)), 0)
        nbytes = read + sum(map(nbytes_of, written or outputs))
        if name in _SCATTER:
            nbytes = sum(map(nbytes_of, inputs[1:])) + inputs[-1].numel() * inputs[0].element_size()
        wide = {torch.float32, torch.float64} & {tensor.dtype for tensor in inputs}
        flops_per_s = OTHER_FLOPS if wide else TENSOR_FLOPS
        if name == "decode_hadamard":
            *_, left, right = inputs
            flops, flops_per_s = 2 * outputs[0].numel() * (len(left) + len(right)), TF32_FLOPS
            work.add("restore", 0)  # the outliers
        if name == "nearest_rings":
            work.add_rings(inputs[0], bits=args[3])
            nbytes = sum(map(nbytes_of, outputs))  # and what gathers the tokens that are left
        work.add(name, nbytes, flops, flops_per_s)
        work.synchronisations += name in _WAIT


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def nbytes_of(tensor: Tensor) -> int:
    """Of what lies in memory: an expanded tensor is there once."""
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or not size else 1
    return count


def _is_view(func: Any) -> bool:
    return any(
        value.alias_info is not None and not value.alias_info.is_write for value in func._schema.returns
    )


def _written(func: Any, args: tuple[Any, ...]) -> list[Tensor]:
    schema = zip(func._schema.arguments, args, strict=False)
    return tensors_of(
        [value for argument, value in schema if argument.alias_info and argument.alias_info.is_write]
    )


def _attention(
    plain: Callable[..., Tensor], fused: bool, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any
) -> Tensor:
    """As torch 2.11 chooses on a GPU: fused for (B, heads, tokens, width), not in three dimensions (SAM)."""
    if q.device.type == "meta" or (q.ndim < 4 and not fused):
        return plain(q, k, v, *rest, **options)
    if q.ndim < 4:
        bias = options["attn_mask"][None]
        return _attention(plain, fused, q[None], k[None], v[None], attn_mask=bias)[0]
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (tensor.to(torch.bfloat16) for tensor in (q, k, v))
    bias = options.get("attn_mask", rest[0] if rest else None)
    if q.device.type == "cpu":
        out: Tensor = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]
    elif bias is None:
        out = aten._scaled_dot_product_flash_attention(q, k, v)[0]
    else:
        out = aten._scaled_dot_product_efficient_attention(q, k, v, bias.to(q.dtype), False)[0]
    return out


@contextmanager
def fake_gpu(fused: bool = False) -> Iterator[FakeTensorMode]:
    """CUDA seems to be there. Without inference mode, in which torch tells whole functions, not kernels."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with ExitStack() as stack:
        for target, name, new in (
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
            (torch, "inference_mode", lambda mode=True: torch.no_grad() if mode else nullcontext()),
            (F, "scaled_dot_product_attention", partial(_attention, F.scaled_dot_product_attention, fused)),
        ):
            stack.enter_context(patch.object(target, name, new))
        yield fake


def give_fake_weights(module: nn.Module, fake: FakeTensorMode, device: str) -> None:
    """Give a module on the meta device fake weights on `device`."""
    with fake:
        for part in module.modules():
            kinds: tuple[dict[str, Any], ...] = part._parameters, part._buffers
            for kind in kinds:
                for name, old in kind.items():
                    if old is not None:
                        new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device=device)
                        kind[name] = nn.Parameter(new, old.requires_grad) if kind is kinds[0] else new
