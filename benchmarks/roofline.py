"""What the product's own code asks of a GPU, counted without one: kernels, bytes, products, synchronisations.

    python -m benchmarks.roofline                                    three ViT-L teachers, ViT-B student, 384²
    python -m benchmarks.roofline --teachers dinov2_small --size 224 --stem vit_small_patch16_224

    python -m benchmarks.roofline --compiled                         as a GPU runs it by default (4 minutes)
    python -m benchmarks.roofline --teachers dinov2_large --grid native --codecs f16 --stem no

The code runs on fake CUDA tensors; `benchmarks/fake_gpu.py` says how times are bounded. Compiled, kernels
are those that Inductor fuses (`benchmarks/inductor.py`). "Waits" are synchronisations of the thread that
computes. The second run counts, when tables and constants are on the device. Codes leave on a stream of
their own: a build takes what its kernels take or what the bus takes, whichever is longer; what it would take
if kernels waited for the bus is stated beside it. Autograd runs on no fake GPU, so the student's step is
counted on fake CPU tensors, from which compiled graphs are moved to the GPU: its copies are not seen, and
one synchronisation a step, in which the loop reads what it logs, comes on top. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from accelerate.utils import convert_outputs_to_fp32
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import get_total_norm
from torch.optim import AdamW

from benchmarks import signals
from benchmarks.fake_gpu import Roofline, Work, fake_gpu, give_fake_weights
from benchmarks.inductor import compiled, trained
from teachercache import build_student
from teachercache.cache_builder import compute
from teachercache.cache_builder.teachers import resolve_teacher
from teachercache.cache_builder.teachers.registry import kind_of
from teachercache.cache_builder.teachers.teacher_recipe import TeacherRecipe
from teachercache.pipeline.codecs import Codec, Encoded, get_codec, torch_dtype
from teachercache.pipeline.records.feature_stats import FeatureMoments
from teachercache.pipeline.records.spec import TeacherSpec
from teachercache.pipeline.records.strict import Size
from teachercache.student.losses.distillation import AdjointTarget, DistillationLoss, Target
from teachercache.student.training.objectives import SakObjective

TEACHERS = ["dinov2_large", "sak_clip_large", "sam_large"]


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

    def to_host(self, tensors: dict[str, Tensor]) -> Any:
        return tensors, None


def count_build(
    fake: FakeTensorMode, spec: TeacherSpec, batch_size: int, compiles: bool = False
) -> dict[str, Work]:
    """A batch of one teacher: "forward", "encode", "statistics", and "write", the copies to the host."""
    with torch.device("meta"):
        teacher = kind_of(spec.model)(spec.model_copy(update={"pretrained": False}))
    teacher.keep_rounded()
    give_fake_weights(teacher, fake, "cuda")
    codec = _codec(spec)
    of_cache = SimpleNamespace(teachers={"teacher": spec}, covariance=False)
    cache: Any = SimpleNamespace(spec=of_cache, codec=lambda _: codec)
    with patch.object(compute, "DeviceCopies", _Copies):
        computing = compute.Computing(cache, {"teacher": teacher})

    forwards = {part: part.forward for part in teacher.repeated_parts()}

    def batch(roofline: Roofline) -> None:
        if compiles:
            teacher.compiled_for = batch_size
            for part, forward in forwards.items():
                shapes = [(name, tensor.shape) for name, tensor in part.state_dict(keep_vars=True).items()]
                part.forward = compiled(forward, roofline, str((shapes, list(part.buffers()))))
            functions = compute._encode, FeatureMoments.of
            computing.__dict__["_compiled"] = [compiled(one, roofline) for one in functions]
        views = torch.empty(batch_size, 3, *spec.render_size, dtype=torch.uint8, device="cuda")
        computed = computing._compute(["teacher"], views, roofline)["teacher"]  # type: ignore[arg-type]
        with roofline.stage("write"):
            for tensor in computed.tensors.values():
                tensor.cpu()

    stages = _second_run(fake, batch)
    computing.close()
    return stages


def _codec(spec: TeacherSpec) -> Codec:
    """Its tables are real ones: which coefficients have how many bits, they say."""
    sample = signals.correlated(2, spec.num_levels, spec.stored_grid, spec.width, 0, between_levels=0.3)
    return get_codec(spec.codec).calibrate(sample)


def count_decode(
    fake: FakeTensorMode, spec: TeacherSpec, batch_size: int, compiles: bool = False
) -> tuple[Work, int]:
    """Codes of a batch to targets on the device, as training takes them, and how many values these are."""
    codec = _codec(spec)
    layouts = codec.layout(spec.num_levels, spec.stored_grid, spec.width)

    def read(roofline: Roofline) -> None:
        arrays = {
            name: torch.empty(batch_size, *layout.shape, dtype=torch_dtype(layout.dtype))
            for name, layout in layouts.items()
        }
        with roofline.stage("decode"):
            on_device = {name: array.to("cuda") for name, array in arrays.items()}
            decode = compiled(Encoded.decode, roofline) if compiles else Encoded.decode
            decode(Encoded(codec, on_device), "cuda", codec.dtype)

    values = math.prod((batch_size, spec.num_levels, *spec.stored_grid, spec.width))
    return _second_run(fake, read)["decode"], values


def count_step(
    fake: FakeTensorMode,
    stem: str,
    specs: dict[str, TeacherSpec],
    size: Size,
    batch_size: int,
    compiles: bool = False,
) -> dict[str, Work]:
    """A step of stage 1 on targets that are there: "forward" (with the loss), "backward", "optimizer"."""
    dims = {name: spec.width for name, spec in specs.items()}
    with torch.device("meta"):
        student = build_student("sak", stem=stem, teacher_dims=dims, image_size=size)
    give_fake_weights(student, fake, "cpu")
    parameters = list(student.parameters())
    optimizer = AdamW(parameters, fused=True)

    mixed = torch.autocast("cpu", torch.bfloat16)(student.forward)
    student.forward = convert_outputs_to_fp32(mixed)  # type: ignore[method-assign]  # as accelerate does
    loss, plain = DistillationLoss(), DistillationLoss()

    def target(spec: TeacherSpec) -> Target:
        maps = torch.empty(batch_size, spec.num_levels, *spec.stored_grid, spec.width)
        if spec.grid.kind != "adjoint":
            return Target(maps)
        return AdjointTarget(maps, norms_BS=torch.empty(maps.shape[:2]), grid=spec.native_grid)

    def step(roofline: Roofline) -> None:
        targets = {name: target(spec) for name, spec in specs.items()}
        model: Any = student
        if compiles:
            model, loss.forward = trained(student, roofline), trained(plain, roofline)  # type: ignore[method-assign]
        objective = SakObjective(model, student, [lambda _: targets], loss)  # type: ignore[list-item]
        pixels = torch.empty(batch_size, 3, *size, dtype=torch.uint8)
        batch: Any = SimpleNamespace(labels={}, images=pixels)
        total, _ = objective([batch], roofline)  # type: ignore[arg-type]
        with roofline.stage("backward"):
            total.backward()
        for one in parameters if compiles else ():
            one.grad = torch.empty_like(one)
        with roofline.stage("optimizer"):
            get_total_norm([one.grad for one in parameters if one.grad is not None], foreach=True)
            optimizer.step()
            optimizer.zero_grad()

    return _second_run(fake, step, "cpu")


def build_facts(builds: list[dict[str, Work]]) -> dict[str, float]:
    """A batch of all teachers over their forward passes: copies beside the kernels, and as if they waited."""
    stages = [(stage, work) for build in builds for stage, work in build.items()]
    bare = sum(work.bound_s for stage, work in stages if stage == "forward")
    kernels, bus = sum(work.bound_s for _, work in stages), sum(work.bus_s for _, work in stages)
    return {
        "build / bare": max(kernels, bus) / bare,
        "build / bare if copies waited": (kernels + bus) / bare,
        "(encode + statistics) / forward": (kernels - bare) / bare,
    }


def measure(arguments: argparse.Namespace) -> tuple[dict[str, dict[str, Work]], dict[str, float]]:
    """Work by section and stage, and the ratios that the goals are about."""
    size, sections, facts = (arguments.size, arguments.size), dict[str, dict[str, Work]](), dict[str, float]()
    with fake_gpu(arguments.fused) as fake:
        for codec in arguments.codecs:
            specs, builds, decoded, values = {}, list[dict[str, Work]](), Work(), 0
            for preset in arguments.teachers:
                recipe = TeacherRecipe(
                    preset=preset, pretrained=False, precision="bfloat16", grid=arguments.grid, codec=codec
                )
                specs[preset] = spec = resolve_teacher(preset, recipe, size)
                of_batch = fake, spec, arguments.batch_size, arguments.compiled
                if not arguments.read:
                    builds.append(count_build(*of_batch))
                    sections[f"build {preset} {codec}"] = builds[-1]
                work, count = count_decode(*of_batch)
                sections[f"read {preset} {codec}"] = {"decode": work}
                decoded.include(work)
                values += count
            if builds:
                facts |= {f"{name}, {codec}": value for name, value in build_facts(builds).items()}
            if decoded.kernels:  # plain codes are features as they arrive
                facts[f"decode, {codec} (GB/s of float16)"] = 2e-9 * values / decoded.bound_s
            if arguments.stem == "no":
                continue
            if not facts.get("step in memory (ms)"):
                stages = count_step(
                    fake, arguments.stem, specs, size, arguments.batch_size, arguments.compiled
                )
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
    parser.add_argument("--stem", default="vit_base_patch16_384", help="of the student; no: without its step")
    parser.add_argument("--size", type=int, default=384, help="side of the views, in pixels")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--compiled", action="store_true", help="as Inductor fuses a build and decoding")
    parser.add_argument("--read", action="store_true", help="decoding without builds")
    parser.add_argument("--fused", action="store_true", help="as if SAM's attention were one kernel, too")
    arguments = parser.parse_args()
    sections, facts = measure(arguments)
    how = "compiled" if arguments.compiled else "eager"
    table = Table(title=f"Lower bounds of an H100, {how}", title_justify="left")
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
        name: {
            stage: work.record() | {"by kernel": dict(work.by_kernel), "bytes": dict(work.nbytes_by_kernel)}
            for stage, work in stages.items()
        }
        for name, stages in sections.items()
    }
    print(json.dumps({"sections": records, "facts": facts}))


if __name__ == "__main__":
    main()
