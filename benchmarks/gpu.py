"""All that is promised of a GPU, measured on one, in at most 8 minutes.

    python -m benchmarks.gpu --output gpu.jsonl
    python -m benchmarks.gpu --sections hardware codecs    some of them
    python -m benchmarks.gpu --smoke                       the same path on a CPU; its figures mean nothing

Sections run in this order, the cheap and certain first. Each has a deadline; one that fails or is late says
so and the next begins, and what would begin after `--limit` seconds is left out. Every figure is one line of
JSON, in OUTPUT too; at the end there is one table, with the goals beside what they are about: ok, short, or
not measured.

Needs torch >= 2.11, torchvision, timm, accelerate, pyarrow, scipy, scikit-image, rich and, for `tests`,
pytest; of ours only what imports without ray, webdataset and omegaconf. Random weights throughout. Caches lie
in /dev/shm where it has 8 GB left, so that no disk is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import build as build_benchmark
from benchmarks import step as step_benchmark
from benchmarks.photographs import write_photographs
from benchmarks.waits import count_waits
from teachercache.cache_builder.teachers import build_teacher, resolve_teacher
from teachercache.cache_builder.teachers.registry import teacher_gmacs
from teachercache.cache_builder.teachers.teacher_recipe import TeacherRecipe
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.codecs import get_codec, quantized
from teachercache.pipeline.loading.loader import FeatureLoader
from teachercache.pipeline.loading.sampler import ShardShuffleSampler

ROOT = Path(__file__).parents[1]
# Warnings are none of its business on a machine of others, where pytest-timeout may be missing: not strict.
PYTEST = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-W", "default", "-p", "no:cacheprovider"]
PYTEST += ["-o", "addopts=--import-mode=importlib"]
Figures = Iterator[tuple[str, float | str]]


@dataclass(frozen=True)
class Sizes:
    """What is measured. `batch_sizes` of teachers; steps: (stem, batch size)."""

    teachers: tuple[str, ...] = ("dinov2_large", "sak_clip_large", "sam_large")
    steps: tuple[tuple[str, int], ...] = (
        ("vit_base_patch16_384", 16),
        ("vit_base_patch16_384", 64),
        ("vit_large_patch16_384", 16),
    )
    view: int = 384
    batch_sizes: tuple[int, ...] = (16, 32)
    photographs: int = 48
    views: int = 2
    views_of_one: int = 8  # of the build of one teacher, so that what a build costs once is little of it
    matrix: int = 8192
    copy_nbytes: int = 1 << 30
    code_rows: int = 128
    code_shape: tuple[int, int, int, int] = (4, 24, 24, 1024)
    repeats: int = 10


SMOKE = Sizes(
    teachers=("dinov2_small",),
    steps=(("vit_tiny_patch16_224", 2),),
    view=112,
    batch_sizes=(2,),
    photographs=4,
    views=1,
    views_of_one=1,
    matrix=64,
    copy_nbytes=1 << 16,
    code_rows=2,
    code_shape=(1, 4, 4, 64),
    repeats=1,
)


@dataclass
class Run:
    device: torch.device
    sizes: Sizes
    folder: Path
    deadline: float = 0.0  # of the section, by time.perf_counter()
    figures: dict[str, float | str] = field(default_factory=dict)

    def seconds(self, work: Callable[..., object], *arguments: object) -> float:
        """Median over 3 series of the time of one call, after two that do not count."""
        for _ in range(2):
            work(*arguments)
        repeats, series = self.sizes.repeats, []
        for _ in range(3):
            self.synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                work(*arguments)
            self.synchronize()
            series.append((time.perf_counter() - start) / repeats)
        return statistics.median(series)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def images(self) -> Path:
        return write_photographs(self.folder / "images", self.sizes.photographs)


def hardware(run: Run) -> Figures:
    yield "card", torch.cuda.get_device_name() if run.device.type == "cuda" else f"cpu ({platform.machine()})"
    yield "torch", torch.__version__
    yield "cuda", torch.version.cuda or "none"
    yield "cpus", float(os.cpu_count() or 0)
    side, nbytes = run.sizes.matrix, run.sizes.copy_nbytes
    a = torch.randn(side, side, device=run.device, dtype=torch.bfloat16)
    yield "product, TFLOP/s", 2e-12 * side**3 / run.seconds(torch.matmul, a, a)
    there = torch.empty(nbytes, dtype=torch.uint8, device=run.device)
    other = torch.empty_like(there)
    yield "copy on the device, GB/s read and written", 2e-9 * nbytes / run.seconds(other.copy_, there)
    for kind in ("pageable", "pinned"):
        pinned = kind == "pinned" and run.device.type == "cuda"
        host = torch.empty(nbytes // 4, dtype=torch.uint8, pin_memory=pinned)
        part = there[: len(host)]
        yield f"{kind} to the device, GB/s", 1e-9 * len(host) / run.seconds(part.copy_, host)
        yield f"{kind} to the host, GB/s", 1e-9 * len(host) / run.seconds(host.copy_, part)


def tests(run: Run) -> Figures:
    """tests/gpu in a process of their own."""
    left = max(1.0, run.deadline - time.perf_counter())
    done = subprocess.run(PYTEST, cwd=ROOT, capture_output=True, text=True, timeout=left)
    for line in done.stdout.splitlines():
        if line.startswith(("FAILED", "ERROR")):
            test, _, why = line.partition(" - ")
            yield f"tests: {test}", why
    summary = re.findall(r"^=*\s*(\d+ (?:passed|failed|skipped|error).*?)=*$", done.stdout, re.MULTILINE)
    yield "tests", summary[-1] if summary else f"no summary: {(done.stdout + done.stderr)[-200:]}"
    failed = sum(int(count) for count in re.findall(r"(\d+) (?:failed|error)", "".join(summary[-1:])))
    yield "tests that failed", float(max(failed, done.returncode != 0))


def codecs(run: Run) -> Figures:
    """Rows that are on the device before and after: no copy to or from the host is in these figures."""
    rows = torch.randn(run.sizes.code_rows, *run.sizes.code_shape, device=run.device)
    half = rows.half()
    nbytes, other = half.nbytes, torch.empty_like(half)
    yield "copy of the float16 rows, GB/s", 1e-9 * nbytes / run.seconds(other.copy_, half)
    for name in ("int4-hadamard", "int4-rings"):
        codec = get_codec(name).calibrate(rows[:2].cpu())
        encode = torch.compile(codec.encode_unchecked, dynamic=False)  # as builds do
        encoded = encode(rows)
        yield f"encode {name}, GB/s of float16", 1e-9 * nbytes / run.seconds(encode, rows)
        if run.device.type == "cuda":
            with count_waits() as waits:
                encode(rows)
            yield f"encode {name}, waits", float(waits[0])
        there = {key: tensor.to(run.device) for key, tensor in encoded.tensors().items()}
        compiled = torch.compile(codec.decode_tensors, fullgraph=True, dynamic=False)
        for how, decode in (("", codec.decode_tensors), (" compiled", compiled)):
            seconds = run.seconds(decode, there, run.device, torch.float16)
            yield f"decode {name}{how}, GB/s of float16", 1e-9 * nbytes / seconds
        with patch.object(quantized, "has_kernel", Mock(return_value=False)):
            seconds = run.seconds(codec.decode_tensors, there, run.device, torch.float16)
        yield f"decode {name}, no kernel, GB/s of float16", 1e-9 * nbytes / seconds


def teachers(run: Run) -> Figures:
    for preset in run.sizes.teachers:
        recipe = TeacherRecipe(preset=preset, pretrained=False, precision="bfloat16")
        spec = resolve_teacher(preset, recipe, (run.sizes.view, run.sizes.view))
        teacher = build_teacher(spec, device=str(run.device))
        for batch_size in run.sizes.batch_sizes:
            yield from _forward(run, preset, teacher, batch_size, "")
        teacher.compile_blocks(run.sizes.batch_sizes[0])
        yield from _forward(run, preset, teacher, run.sizes.batch_sizes[0], " compiled")
        del teacher


def _forward(run: Run, preset: str, teacher: Any, batch_size: int, how: str) -> Figures:
    views = torch.zeros(batch_size, 3, *teacher.spec.render_size, dtype=torch.uint8, device=run.device)

    @torch.inference_mode()
    def forward() -> None:
        teacher(views)

    if run.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds, title = run.seconds(forward), f"{preset}{how}, {batch_size} views"
    yield f"{title}, ms", 1e3 * seconds
    yield f"{title}, TFLOP/s", 2e-3 * teacher_gmacs(teacher.spec) * batch_size / seconds
    if run.device.type == "cuda":
        yield f"{title}, GB at most", 1e-9 * torch.cuda.max_memory_allocated()


def builds(run: Run) -> Figures:
    """Over bare forward passes; the caches stay for the sections below."""
    several = run.sizes.teachers
    for title, models, codec, grid, views in (
        ("three adjoint, int4-hadamard", several, "int4-hadamard", "adjoint", run.sizes.views),
        ("one native, f16", several[:1], "f16", "native", run.sizes.views_of_one),
        ("three adjoint, f16", several, "f16", "adjoint", run.sizes.views),
    ):
        folder = run.folder / title.replace(",", "").replace(" ", "_")
        found = build_benchmark.measure(
            argparse.Namespace(
                models=list(models),
                size=run.sizes.view,
                images=run.images(),
                views=views,
                repeats=3 if run.device.type == "cuda" else 1,
                precision="bfloat16" if run.device.type == "cuda" else "float32",
                codec=codec,
                grid=grid,
                compile=run.device.type == "cuda",
                batch_size=run.sizes.batch_sizes[0],
                decode_threads=max(1, min(12, (os.cpu_count() or 1) - 2)),
                peak_tflops=None,
            ),
            folder,
        )
        yield f"build {title}, over bare", found["build_over_bare"]
        yield f"build {title}, views/s", found["images_per_s"]
        if "waits_a_batch" in found:
            yield f"build {title}, waits a batch", found["waits_a_batch"]


def steps(run: Run) -> Figures:
    for title in ("three adjoint, int4-hadamard", "three adjoint, f16"):
        cache = run.folder / title.replace(",", "").replace(" ", "_") / "cache"
        for stem, batch_size in run.sizes.steps if cache.exists() else ():
            # Teachers run where they are most: beside the first codec, at the smaller batch.
            online = title.endswith("int4-hadamard") and batch_size == min(
                size for _, size in run.sizes.steps
            )
            found = step_benchmark.measure(
                argparse.Namespace(
                    cache=str(cache),
                    stem=stem,
                    batch_size=batch_size,
                    steps=run.sizes.repeats,
                    repeats=3 if run.device.type == "cuda" else 1,
                    threads=max(1, min(12, (os.cpu_count() or 1) - 2)),
                    skip_online=not online,
                ),
                run.folder,
            )
            name = f"{stem}, {batch_size}, {title.split(', ')[1]}"
            for kind, seconds in found["step_s"].items():
                yield f"step {name}, {kind}, ms", 1e3 * seconds
            for kind, waits in found["waits"].items():
                yield f"step {name}, {kind}, waits", float(waits)
            yield f"step {name}, cached / in memory", found["cached_over_memory"]
            if online:
                yield f"step {name}, online / cached", found["online_over_cached"]


def loader(run: Run) -> Figures:
    """Views that the loader alone gives, their pixels decoded and rendered."""
    cache = FeatureCache.open(run.folder / "three_adjoint_int4-hadamard" / "cache")
    for threads in (4, 8, 16):
        sampler = ShardShuffleSampler(cache, batch_size_per_process=run.sizes.batch_sizes[0])
        with FeatureLoader(cache, sampler, threads=threads, pin_memory=run.device.type == "cuda") as batches:
            batch = iter(batches)
            for _ in range(4):
                next(batch)
            start, count = time.perf_counter(), 10 * run.sizes.repeats
            for _ in range(count):
                next(batch)
            seconds = time.perf_counter() - start
        yield f"loader, {threads} threads, views/s", count * run.sizes.batch_sizes[0] / seconds


SECTIONS: dict[str, tuple[Callable[[Run], Figures], float]] = {  # with their seconds at most
    "hardware": (hardware, 30),
    "tests": (tests, 120),
    "codecs": (codecs, 60),
    "teachers": (teachers, 110),
    "builds": (builds, 150),
    "steps": (steps, 120),
    "loader": (loader, 30),
}
GOALS: dict[str, tuple[str, float]] = {  # of a figure: at most (<=) or at least (>=)
    "tests that failed": ("<=", 0),
    "encode int4-hadamard, waits": ("<=", 1),
    "encode int4-rings, waits": ("<=", 1),
    "decode int4-hadamard, GB/s of float16": (">=", 1000),
    "build three adjoint, int4-hadamard, over bare": ("<=", 1.05),
    "build three adjoint, f16, over bare": ("<=", 1.05),
    "build one native, f16, over bare": ("<=", 1.15),
    "build three adjoint, int4-hadamard, waits a batch": ("<=", 1),
    "step vit_base_patch16_384, 16, int4-hadamard, cached, waits": ("<=", 0),
    "step vit_base_patch16_384, 16, int4-hadamard, cached / in memory": ("<=", 1.03),
    "step vit_base_patch16_384, 16, int4-hadamard, online / cached": (">=", 8),
    "step vit_large_patch16_384, 16, int4-hadamard, online / cached": (">=", 3.5),
}


class Late(Exception):
    """A section had no more time."""


def _late(*_: object) -> None:
    raise Late


def run_sections(run: Run, names: list[str], limit_s: float, write: Callable[[dict[str, Any]], None]) -> None:
    """Every section until its deadline; what goes wrong in one is a figure called after it."""
    end = time.perf_counter() + limit_s
    signal.signal(signal.SIGALRM, _late)
    for name in names:
        section, seconds = SECTIONS[name]
        run.deadline = min(time.perf_counter() + seconds, end)
        left = run.deadline - time.perf_counter()
        if left < 1:
            write({"section": name, "problem": "left out: no time"})
            continue
        try:
            signal.setitimer(signal.ITIMER_REAL, left)
            for title, value in section(run):
                run.figures[title] = value
                write({"section": name, "figure": title, "value": value})
        except (Late, subprocess.TimeoutExpired):
            write({"section": name, "problem": f"late: more than {left:.0f} s"})
        except Exception as error:  # the next section may well work
            write({"section": name, "problem": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"})
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            if run.device.type == "cuda":
                torch.cuda.empty_cache()


def verdict(figures: dict[str, float | str], title: str) -> str:
    if title not in GOALS:
        return ""
    relation, goal = GOALS[title]
    value = figures.get(title)
    if not isinstance(value, float | int):
        return f"not measured (goal: {relation} {goal:g})"
    good = value <= goal if relation == "<=" else value >= goal
    return f"{'ok' if good else 'short'} (goal: {relation} {goal:g})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--limit", type=float, default=480, help="seconds in all (480)")
    parser.add_argument("--output", type=Path, help="a file for the lines of JSON")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on the CPU")
    arguments = parser.parse_args()
    if not arguments.smoke and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --smoke runs the same path on the CPU")
    device = torch.device("cpu" if arguments.smoke else "cuda")
    shm = Path("/dev/shm")
    fits = os.access(shm, os.W_OK) and shutil.disk_usage(shm).free > 8e9
    with tempfile.TemporaryDirectory(dir=shm if fits else None) as folder:
        run = Run(device, SMOKE if arguments.smoke else Sizes(), Path(folder))

        def write(record: dict[str, Any]) -> None:
            line = json.dumps(record)
            print(line, flush=True)
            if arguments.output:
                with arguments.output.open("a") as file:
                    file.write(line + "\n")

        run_sections(run, arguments.sections, arguments.limit, write)
    title = "A smoke test: no figure means anything" if arguments.smoke else "Random weights"
    table = Table("", "measured", "goal", title=title, title_justify="left")
    for title in dict.fromkeys([*run.figures, *GOALS]):
        value = run.figures.get(title, "–")
        shown = f"{value:,.4g}" if isinstance(value, float) else str(value)
        table.add_row(title, shown, "" if arguments.smoke else verdict(run.figures, title))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
