"""What a training step costs with cached features, beside features in memory and teachers that run online.

    python -m benchmarks.step                    a ViT-S student at 224², three ViT-B teachers, random weights
    python -m benchmarks.step --cache PATH       the teachers and views of your own cache

Student and loss are those of `teachercache.student.training.train`. "In memory" takes the same images and
decoded targets at every step: nothing is read, decoded or rendered. The three take turns of some steps; the
first of each turn, which find batches made in another's time, do not count. Medians over steps and over
turns; on a GPU, where the host runs ahead and all is compiled as in a run, over turns. Prints a table and,
last, one line of JSON.

The goals: cached at most 1.05 of the time in memory; online over cached at least 0.9 of what their FLOPs say.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from torch.optim import AdamW
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.photographs import write_photographs
from benchmarks.waits import count_waits
from teachercache import build, build_student
from teachercache.cache_builder.build_recipe import BuildRecipe
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.codecs.kernels import compiles
from teachercache.pipeline.loading.loader import Batch, FeatureLoader
from teachercache.pipeline.loading.sampler import ShardShuffleSampler
from teachercache.student.losses.distillation import DistillationLoss, Target
from teachercache.student.timing import StageTimer
from teachercache.student.training.loop import DeviceBatches
from teachercache.student.training.objectives import SakObjective
from teachercache.student.training.targets import COMPILED, CachedTargets, OnlineTargets, TargetSource

MEMORY, CACHED, ONLINE = "in memory", "cached", "online"
PREFETCH = 1
UNCOUNTED_STEPS = PREFETCH + 2  # those whose batches were ready before the turn, and one more


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", help="default: one is built, of the teachers below")
    parser.add_argument(
        "--teachers", nargs="+", default=["dinov2_base", "openclip_base", "siglip2_base"], help="presets"
    )
    parser.add_argument("--codec", default="f16")
    parser.add_argument("--size", type=int, default=224, help="side of the views, in pixels")
    parser.add_argument("--images", type=Path, help="a folder (default: photographs of scikit-image)")
    parser.add_argument("--stem", default="vit_small_patch16_224")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="steps of a turn that count")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each")
    parser.add_argument("--threads", type=int, default=2, help="of the loader")
    parser.add_argument("--skip-online", action="store_true", help="where the teachers cannot be built")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print_results(measure(arguments, Path(folder)))


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    cache = FeatureCache.open(arguments.cache) if arguments.cache else build_cache(arguments, folder)
    with ExitStack() as stack:
        trainer = Trainer(arguments, cache, stack)
        seconds: dict[str, list[float]] = {kind: [] for kind in trainer.kinds}
        for _ in range(arguments.repeats):
            for kind, turns in seconds.items():
                turns.append(trainer.turn(kind, arguments.steps))
        waits = {kind: trainer.waits(kind) for kind in trainer.kinds if trainer.on_gpu}
        flops = {kind: trainer.flops(kind) for kind in trainer.kinds}
    results: dict[str, Any] = {
        "benchmark": "step",
        "stem": arguments.stem,
        "teachers": {name: [teacher.model, teacher.codec] for name, teacher in cache.spec.teachers.items()},
        "view_size": cache.spec.views.size,
        "batch_size": arguments.batch_size,
        "step_s": {kind: statistics.median(turns) for kind, turns in seconds.items()},
        "gflops": {kind: count / 1e9 for kind, count in flops.items()},
        "cached_over_memory": ratio(seconds, CACHED, MEMORY),
        "waits": waits,
        "device": str(trainer.accelerator.device),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
    }
    if ONLINE in seconds:
        results["online_over_cached"] = ratio(seconds, ONLINE, CACHED)
        results["of_what_flops_allow"] = results["online_over_cached"] * flops[CACHED] / flops[ONLINE]
    return results


def ratio(seconds: dict[str, list[float]], kind: str, reference: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[kind], seconds[reference], strict=True))


def build_cache(arguments: argparse.Namespace, folder: Path) -> FeatureCache:
    recipe = BuildRecipe.model_validate(
        {
            "cache": str(folder / "cache"),
            "source": str(arguments.images or write_photographs(folder / "images")),
            "views": {"num_views": 2, "size": [arguments.size] * 2},
            "teachers": {
                name: {"preset": name, "pretrained": False, "codec": arguments.codec}
                for name in arguments.teachers
            },
            "rows_per_shard": 8,
            "runner": {"batch_size": 8, "decode_threads": 1},
        }
    )
    return build(recipe, Console(quiet=True)).cache


class InMemory(TargetSource):
    """The targets of one batch, whichever batch comes."""

    def __init__(self, targets: dict[str, Target]) -> None:
        self._targets = targets

    def __call__(self, batch: Batch) -> dict[str, Target]:
        return self._targets


class Trainer:
    """One student that takes steps on batches and targets of each kind."""

    def __init__(self, arguments: argparse.Namespace, cache: FeatureCache, stack: ExitStack) -> None:
        self.on_gpu = cuda = torch.cuda.is_available()
        self.accelerator = Accelerator(cpu=not cuda, mixed_precision="bf16" if cuda else "no")
        self._timer = StageTimer(self.accelerator.device)
        student = build_student(
            "sak",
            stem=arguments.stem,
            teacher_dims={name: teacher.width for name, teacher in cache.spec.teachers.items()},
            image_size=cache.spec.views.size,
        )
        model, self._optimizer = self.accelerator.prepare(student, AdamW(student.parameters(), fused=True))
        model.train()
        compiled = compiles(self.accelerator.device)
        if compiled:
            model = torch.compile(model, **COMPILED)

        sampler = ShardShuffleSampler(cache, batch_size_per_process=arguments.batch_size)
        sources: dict[str, TargetSource] = {
            CACHED: CachedTargets(cache, cache.teachers, self.accelerator.device)
        }
        if not arguments.skip_online:
            sources[ONLINE] = OnlineTargets(cache, cache.teachers, self.accelerator.device)
        self._batches: dict[str, Iterator[Batch]] = {}
        for kind, targets in sources.items():
            loader = FeatureLoader(
                cache,
                sampler,
                targets.reads,
                extra_sizes=targets.extra_sizes,
                threads=arguments.threads,
                prefetch=PREFETCH,
                pin_memory=cuda,
            )
            self._batches[kind] = iter(stack.enter_context(loader))
            if compiled:
                targets.compile(**COMPILED)
        self._on_device = DeviceBatches(self.accelerator.device)
        batch = self._on_device(next(self._batches[CACHED]))
        self._batches[MEMORY] = repeat(batch)
        sources[MEMORY] = InMemory(sources[CACHED](batch))
        self.kinds = sorted(sources, key=[MEMORY, CACHED, ONLINE].index)
        loss = DistillationLoss()
        if compiled:
            loss.compile(**COMPILED)
        self._objectives = {
            kind: SakObjective(model, student, [targets], loss) for kind, targets in sources.items()
        }

    def turn(self, kind: str, steps: int) -> float:
        """Seconds of one of `steps` steps, after some that do not count."""
        for _ in range(UNCOUNTED_STEPS):
            self._step(kind)
        together, seconds = steps if self.on_gpu else 1, []
        for _ in range(steps // together):
            self._synchronize()
            start = time.perf_counter()
            for _ in range(together):
                self._step(kind)
            self._synchronize()
            seconds.append((time.perf_counter() - start) / together)
        return statistics.median(seconds)

    def waits(self, kind: str) -> int:
        """How often the host waits for the GPU in one step."""
        with count_waits() as waits:
            self._step(kind)
        return waits[0]

    def flops(self, kind: str) -> int:
        """Floating-point operations of one step, those of attention included."""
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            self._step(kind)
        return int(counter.get_total_flops())

    def _step(self, kind: str) -> None:
        batch = self._on_device(next(self._batches[kind]))
        loss, _ = self._objectives[kind]([batch], self._timer)
        self.accelerator.backward(loss)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def print_results(results: dict[str, Any]) -> None:
    table = Table(
        "features", "s a step", "GFLOPs", title="A training step (random weights)", title_justify="left"
    )
    for kind, step_s in results["step_s"].items():
        table.add_row(kind, f"{step_s:.3f}", f"{results['gflops'][kind]:,.0f}")
    Console().print(table)
    print(f"cached / in memory: {results['cached_over_memory']:.3f} (goal: at most 1.05)")
    if "online_over_cached" in results:
        print(
            f"online / cached: {results['online_over_cached']:.2f}, "
            f"{results['of_what_flops_allow']:.2f} of what the FLOPs allow (goal: at least 0.9)"
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
