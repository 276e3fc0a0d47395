"""What the product's own code asks of a GPU, counted without one: kernels, bytes, products, synchronisations.

    python -m benchmarks.roofline                                    three ViT-L teachers, ViT-B student, 384²
    python -m benchmarks.roofline --teachers dinov2_small --size 224 --stem vit_small_patch16_224

The code runs on fake CUDA tensors, which have shapes and no values. An operation that is no view is one
kernel that reads its inputs and writes its outputs once; it takes at least the longest of its bytes at
3.0 TB/s, its products at 700 TFLOP/s (bfloat16), 350 (TF32, of the decoding kernel) or 50 (float32 and
wider), and 2 µs: an H100, eager. Copies to the host go into pageable memory on the stream that computes, at
10 GB/s. So all milliseconds are lower bounds. "Waits" are synchronisations of the thread that computes. The
second run counts, when tables and constants are on the device. Autograd runs on no fake GPU, so the student's
step is counted on fake CPU tensors: its attention is fused too, its copies are not seen, and one
synchronisation a step, in which the loop reads what it logs, comes on top. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from accelerate.utils import convert_outputs_to_fp32
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from teachercache import build_student
from teachercache.cache_builder import compute
from teachercache.cache_builder.teachers import resolve_teacher
from teachercache.cache_builder.teachers.registry import kind_of
from teachercache.cache_builder.teachers.teacher_recipe import TeacherRecipe
from teachercache.pipeline.codecs import Codec, Encoded, get_codec, torch_dtype
from teachercache.pipeline.records.spec import TeacherSpec
from teachercache.pipeline.records.strict import Size
from teachercache.pipeline.stores.feature_store import teacher_layouts
from teachercache.student.losses.distillation import AdjointTarget, DistillationLoss, Target
from teachercache.student.training.objectives import Objective

TEACHERS = ["dinov2_large", "sak_clip_large", "sam_large"]
BYTES_PER_S, TENSOR_FLOPS, TF32_FLOPS, OTHER_FLOPS = 3.0e12, 700e12, 350e12, 50e12
HOST_BYTES_PER_S = 10e9
LEAST_S, LAUNCH_S = 2e-6, 6e-6  # of a kernel: on the device, and to launch it from Python

aten: Any = torch.ops.aten
_FREE = {"detach", "lift_fresh", "_unsafe_view", "device", "new_empty"}
_FREE |= {"empty", "empty_like", "empty_strided"}
_OVERWRITE = {"copy_", "fill_", "zero_"}  # what they write they do not read
_GATHER = {"index_select", "index", "gather", "embedding"}  # read as much of their source as they write
_WAIT = {"nonzero", "masked_select", "_unique2"}  # for the size of their output


@dataclass
class Work:
    """`bound_s`: the sum of the kernels' own bounds. Copies to the device and to the host are in bytes."""

    kernels: int = 0
    nbytes: int = 0
    flops: int = 0
    bound_s: float = 0.0
    synchronisations: int = 0
    to_device: int = 0
    to_host: int = 0
    by_kernel: Counter[str] = field(default_factory=Counter)

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
        self._work = Work()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        outer, self._work = self._work, self.stages.setdefault(name, Work())
        yield
        self._work = outer

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense":
            self._work.synchronisations += 1
            return args[0].dtype == torch.bool or 1.0
        out = func(*args, **(kwargs or {}))
        inputs, outputs = _tensors((args, kwargs)), _tensors(out)
        devices = {tensor.device.type for tensor in inputs + outputs if tensor.numel()}
        if name in ("_to_copy", "copy_") and len(devices) > 1:
            self._copied(outputs[0])
        elif name not in _FREE and not _is_view(func) and self._device in devices:
            count = flop_registry.get(func.overloadpacket)
            flops = int(count(*args, **(kwargs or {}), out_val=out)) if count else 0
            self._ran(name, inputs, _written(func, args), outputs, flops)
            for index in inputs if name in _GATHER else ():
                if index.device.type != self._device:  # a copy that blocks
                    self._work.synchronisations += 1
                    self._work.to_device += _nbytes(index)
        return out

    def _copied(self, output: Tensor) -> None:
        if output.device.type == "cuda":
            self._work.to_device += _nbytes(output)
        else:
            self._work.to_host += _nbytes(output)
            self._work.bound_s += _nbytes(output) / HOST_BYTES_PER_S

    def _ran(
        self, name: str, inputs: list[Tensor], written: list[Tensor], outputs: list[Tensor], flops: int
    ) -> None:
        work, read = self._work, sum(map(_nbytes, inputs))
        if name in _OVERWRITE:
            read -= sum(map(_nbytes, written))
        elif name in _GATHER:
            read -= max(_nbytes(inputs[0]) - sum(map(_nbytes, outputs)), 0)
        nbytes = read + sum(map(_nbytes, written or outputs))
        wide = {torch.float32, torch.float64} & {tensor.dtype for tensor in inputs}
        flops_per_s = OTHER_FLOPS if wide else TENSOR_FLOPS
        if name == "decode_hadamard":
            *_, left, right = inputs
            flops = 2 * outputs[0].numel() * (len(left) + len(right))
            flops_per_s = TF32_FLOPS
            work.kernels, work.bound_s = work.kernels + 1, work.bound_s + LEAST_S  # that of the outliers
        work.kernels += 1
        work.nbytes += nbytes
        work.flops += flops
        work.bound_s += max(nbytes / BYTES_PER_S, flops / flops_per_s, LEAST_S)
        work.by_kernel[name] += 1
        work.synchronisations += name in _WAIT


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _nbytes(tensor: Tensor) -> int:
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
    return _tensors(
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


def _fake(module: nn.Module, fake: FakeTensorMode, device: str) -> None:
    """Give a module on the meta device fake weights on `device`."""
    with fake:
        for part in module.modules():
            kinds: tuple[dict[str, Any], ...] = part._parameters, part._buffers
            for kind in kinds:
                for name, old in kind.items():
                    if old is not None:
                        new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device=device)
                        kind[name] = nn.Parameter(new, old.requires_grad) if kind is kinds[0] else new


def _second_run(
    fake: FakeTensorMode, work: Callable[[Roofline], None], device: str = "cuda"
) -> dict[str, Work]:
    for _ in range(2):
        roofline = Roofline(device)
        with fake, roofline:
            work(roofline)
    return roofline.stages


class _Copies:
    """`DeviceCopies` without streams; to synchronise is to ask for a value."""

    def __init__(self, teacher: nn.Module) -> None: ...

    def wait(self, views: Tensor) -> None: ...

    def synchronize(self) -> None:
        torch.empty((), device="cuda").item()

    def to_host(self, *groups: dict[str, Tensor]) -> Any:
        return list(groups), None


def count_build(fake: FakeTensorMode, spec: TeacherSpec, batch_size: int) -> dict[str, Work]:
    """A batch of one teacher: "forward", "encode", "statistics", and "write", the copies to the host."""
    with torch.device("meta"):
        teacher = kind_of(spec.model)(spec.model_copy(update={"pretrained": False}))
    _fake(teacher, fake, "cuda")
    codec = _codec(spec)
    of_cache = SimpleNamespace(teachers={"teacher": spec}, covariance=False)
    cache: Any = SimpleNamespace(spec=of_cache, codec=lambda _: codec)
    with patch.object(compute, "DeviceCopies", _Copies):
        computing = compute.Computing(cache, {"teacher": teacher})

    def batch(roofline: Roofline) -> None:
        views = torch.empty(batch_size, 3, *spec.render_size, dtype=torch.uint8, device="cuda")
        computed = computing._compute(["teacher"], views, roofline)["teacher"]  # type: ignore[arg-type]
        with roofline.stage("write"):
            for tensor in computed.tensors.values():
                tensor.cpu()

    stages = _second_run(fake, batch)
    computing.close()
    return stages


def _codec(spec: TeacherSpec) -> Codec:
    return get_codec(spec.codec).calibrate(torch.randn(2, spec.num_levels, *spec.stored_grid, spec.width))


def count_decode(fake: FakeTensorMode, spec: TeacherSpec, batch_size: int) -> tuple[Work, int]:
    """Codes of a batch to targets on the device, as training takes them, and how many values these are."""
    codec, layouts = _codec(spec), teacher_layouts(spec)

    def decode(roofline: Roofline) -> None:
        arrays = {
            name: torch.empty(batch_size, *layout.shape, dtype=torch_dtype(layout.dtype))
            for name, layout in layouts.items()
        }
        with roofline.stage("decode"):
            Encoded(codec, arrays).decode("cuda", codec.dtype)

    values = math.prod((batch_size, spec.num_levels, *spec.stored_grid, spec.width))
    return _second_run(fake, decode)["decode"], values


def count_step(
    fake: FakeTensorMode, stem: str, specs: dict[str, TeacherSpec], size: Size, batch_size: int
) -> dict[str, Work]:
    """A step of stage 1 on targets that are there: "forward" (with the loss), "backward", "optimizer"."""
    dims = {name: spec.width for name, spec in specs.items()}
    with torch.device("meta"):
        student = build_student("sak", stem=stem, teacher_dims=dims, image_size=size)
    _fake(student, fake, "cpu")
    parameters = list(student.parameters())
    optimizer = AdamW(parameters, fused=True)

    def model(*args: Any, **options: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return student(*args, **options)

    def target(spec: TeacherSpec) -> Target:
        maps = torch.empty(batch_size, spec.num_levels, *spec.stored_grid, spec.width)
        if spec.grid.kind != "adjoint":
            return Target(maps)
        return AdjointTarget(maps, norms_BS=torch.empty(maps.shape[:2]), grid=spec.native_grid)

    def step(roofline: Roofline) -> None:
        targets = {name: target(spec) for name, spec in specs.items()}
        wrapped: Any = convert_outputs_to_fp32(model)  # as accelerate does
        objective = Objective(wrapped, student, [lambda _: targets], DistillationLoss())  # type: ignore[list-item]
        pixels = torch.empty(batch_size, 3, *size, dtype=torch.uint8)
        batch: Any = SimpleNamespace(labels={}, images=pixels)
        loss, _ = objective([batch], roofline)  # type: ignore[arg-type]
        with roofline.stage("backward"):
            loss.backward()
        with roofline.stage("optimizer"):
            torch.nn.utils.clip_grad_norm_(parameters, float("inf"))
            optimizer.step()
            optimizer.zero_grad()

    return _second_run(fake, step, "cpu")


def measure(arguments: argparse.Namespace) -> tuple[dict[str, dict[str, Work]], dict[str, float]]:
    """Work by section and stage, and the ratios that the goals are about."""
    size, sections, facts = (arguments.size, arguments.size), dict[str, dict[str, Work]](), dict[str, float]()
    with fake_gpu(arguments.fused) as fake:
        for codec in arguments.codecs:
            specs, decoded, forward, rest, values = {}, Work(), 0.0, 0.0, 0
            for preset in arguments.teachers:
                recipe = TeacherRecipe(
                    preset=preset, pretrained=False, precision="bfloat16", grid=arguments.grid, codec=codec
                )
                specs[preset] = spec = resolve_teacher(preset, recipe, size)
                stages = sections[f"build {preset} {codec}"] = count_build(fake, spec, arguments.batch_size)
                forward += stages["forward"].bound_s
                rest += sum(work.bound_s for stage, work in stages.items() if stage != "forward")
                work, count = count_decode(fake, spec, arguments.batch_size)
                sections[f"read {preset} {codec}"] = {"decode": work}
                decoded.bound_s, values = decoded.bound_s + work.bound_s, values + count
            facts[f"build / bare, {codec}"] = 1 + rest / forward
            if decoded.bound_s:  # plain codes are features as they arrive
                facts[f"decode, {codec} (GB/s of float16)"] = 2e-9 * values / decoded.bound_s
            if not facts.get("step in memory (ms)"):
                stages = count_step(fake, arguments.stem, specs, size, arguments.batch_size)
                sections[f"step {arguments.stem}"] = stages
                facts["step in memory (ms)"] = 1e3 * sum(work.bound_s for work in stages.values())
            facts[f"cached / in memory, {codec}"] = 1 + 1e3 * decoded.bound_s / facts["step in memory (ms)"]
    return sections, facts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teachers", nargs="+", default=TEACHERS, help="presets")
    parser.add_argument("--codecs", nargs="+", default=["int4-hadamard", "f16"])
    parser.add_argument("--grid", default="adjoint", help="native, adjoint or bilinear")
    parser.add_argument("--stem", default="vit_base_patch16_384", help="of the student")
    parser.add_argument("--size", type=int, default=384, help="side of the views, in pixels")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--fused", action="store_true", help="as if SAM's attention were one kernel, too")
    sections, facts = measure(parser.parse_args())
    table = Table(title="Lower bounds of an H100, eager", title_justify="left")
    for column in ("", "stage", *Work().record()):
        table.add_column(column, justify="left" if column in ("", "stage") else "right")
    for section, stages in sections.items():
        for stage, work in stages.items():
            if work.kernels or work.to_host:
                table.add_row(section, stage, *(f"{value:,.4g}" for value in work.record().values()))
        table.add_section()
    console = Console()
    console.print(table)
    for name, value in facts.items():
        console.print(f"{name}: {value:.4g}", highlight=False)
    records = {
        name: {stage: work.record() | {"by kernel": dict(work.by_kernel)} for stage, work in stages.items()}
        for name, stages in sections.items()
    }
    print(json.dumps({"sections": records, "facts": facts}))


if __name__ == "__main__":
    main()
