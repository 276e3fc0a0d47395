"""What a build costs beside its teachers' forward passes.

    python -m benchmarks.build [--models vit_small_patch16_224 …] [--size 224] [--images FOLDER]
    python -m benchmarks.build --models dinov2_large clip_large sam_large --size 384 \\
        --precision bfloat16 --batch-size 32 --decode-threads 12 --peak-tflops 989       on a GPU

Ours: decode, render, forward, encode, write and commit, as `teachercache build` does it. Peer and limit: the
bare forward passes over the same views, rendered beforehand and held in memory, in one worker thread as the
builder's are. On the GPU where there is one. Medians over interleaved repeats; random weights. The goals: on
a CPU, at ViT-S, all but the forward passes takes at most 15% of the wall time; on a GPU, the build takes at
most 1.05 times the bare forward passes.

TFLOP/s count the products with weights (`teachercache plan` prints them as GMACs); their share of the peak
(`--peak-tflops`, of the card at this precision) is the model-FLOP utilisation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.photographs import write_photographs
from benchmarks.waits import count_waits
from teachercache import FeatureCache, build, render_view
from teachercache.cache_builder.build_recipe import BuildRecipe
from teachercache.cache_builder.extract import ShardExtractor
from teachercache.cache_builder.progress import STAGES
from teachercache.cache_builder.teachers import Teacher, build_teacher
from teachercache.cache_builder.teachers.registry import presets, teacher_gmacs
from teachercache.pipeline.records.manifest import commit_name
from teachercache.pipeline.records.spec import Precision
from teachercache.pipeline.records.strict import Size


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", default=["vit_small_patch16_224"], help="timm models or presets of ours"
    )
    parser.add_argument("--size", type=int, default=224, help="side of the views, in pixels")
    parser.add_argument(
        "--images", type=Path, help="a folder of images (default: photographs of scikit-image)"
    )
    parser.add_argument("--views", type=int, default=4, help="views of each image")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", choices=get_args(Precision), default="float32")
    parser.add_argument("--codec", default="f16")
    parser.add_argument("--grid", default="native", help="native, adjoint or bilinear")
    parser.add_argument("--compile", action="store_true", help="the teachers' blocks, as builds on GPUs do")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--decode-threads", type=int, default=1)
    parser.add_argument("--peak-tflops", type=float, help="what the GPU can do at this precision")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print_results(measure(arguments, Path(folder)))


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    recipe = BuildRecipe.model_validate(
        {
            "cache": str(folder / "cache"),
            "source": str(arguments.images or write_photographs(folder / "images")),
            "views": {"num_views": arguments.views, "size": [arguments.size] * 2},
            "teachers": {
                f"teacher_{i}": {
                    which(model): model,
                    "pretrained": False,
                    "precision": arguments.precision,
                    "codec": arguments.codec,
                    "grid": arguments.grid,
                }
                for i, model in enumerate(arguments.models)
            },
            "rows_per_shard": 2 * arguments.batch_size,
            "runner": {
                "batch_size": arguments.batch_size,
                "decode_threads": arguments.decode_threads,
                "compile": False,  # below
            },
        }
    )
    cache = build(recipe, Console(quiet=True)).cache  # also the warm-up, of files and of the model
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teachers = {name: build_teacher(spec, device) for name, spec in cache.spec.teachers.items()}
    for teacher in teachers.values() if arguments.compile else ():
        teacher.compile_blocks(recipe.runner.batch_size)
    batches = render_all(cache, recipe.runner.batch_size)
    bare, ours, stages = [], [], Counter[str]()
    with ThreadPoolExecutor(1) as worker:  # of the teachers for the device, not of this thread
        worker.submit(bare_forward, teachers, batches).result()
        for _ in range(arguments.repeats):
            bare.append(worker.submit(bare_forward, teachers, batches).result())
            wall, seconds = extract_all(cache, teachers, recipe)
            ours.append(wall)
            stages.update(seconds)
    results: dict[str, Any] = {
        "models": ", ".join(teacher.model for teacher in cache.spec.teachers.values()),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "precision": arguments.precision,
        "image_size": arguments.size,
        "views": cache.num_rows,
        "bare_forward_s": statistics.median(bare),
        "build_s": statistics.median(ours),
        "build_over_bare": statistics.median(b / a for a, b in zip(bare, ours, strict=True)),
        "stage_s": {stage: stages[stage] / arguments.repeats for stage in STAGES},
        "images_per_s": cache.num_rows / statistics.median(ours),
    }
    if device.type == "cpu":  # a GPU works on while the stages' clocks stop
        return results | {"share_of_wall_not_forward": 1 - stages["forward"] / sum(ours)}
    with count_waits() as waits:
        extract_all(cache, teachers, recipe)
    results["waits_a_batch"] = waits[0] * arguments.batch_size / cache.num_rows / len(teachers)
    teraflop = 2e-3 * sum(map(teacher_gmacs, cache.spec.teachers.values())) * cache.num_rows
    for what, seconds_each in (("bare_forward", bare), ("build", ours)):
        speed = teraflop / statistics.median(seconds_each)
        results[f"{what}_tflop_per_s"] = speed
        if arguments.peak_tflops:
            results[f"{what}_flop_utilisation"] = speed / arguments.peak_tflops
    return results


def which(model: str) -> str:
    """Whether a recipe calls it a preset or a model."""
    return "preset" if model in presets() else "model"


def render_all(cache: FeatureCache, batch_size: int) -> dict[Size, list[torch.Tensor]]:
    """Every view at each size that a teacher takes, in batches, pinned where there is a GPU."""
    samples = cache.index.locate(range(cache.num_rows))[0].tolist()
    images = {sample: cache.image(sample) for sample in set(samples)}
    batches = {}
    for size in {teacher.render_size for teacher in cache.spec.teachers.values()}:
        views = torch.stack(
            [render_view(images[sample], cache.view(row), size) for row, sample in enumerate(samples)]
        )
        batches[size] = list((views.pin_memory() if torch.cuda.is_available() else views).split(batch_size))
    return batches


def bare_forward(teachers: Mapping[str, Teacher], batches: Mapping[Size, list[torch.Tensor]]) -> float:
    start = time.perf_counter()
    with torch.inference_mode():
        for teacher in teachers.values():
            device = next(teacher.parameters()).device
            for batch in batches[teacher.spec.render_size]:
                teacher(batch.to(device, non_blocking=True))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def extract_all(
    cache: FeatureCache, teachers: Mapping[str, Teacher], recipe: BuildRecipe
) -> tuple[float, Counter[str]]:
    """Every shard again, two at a time, as a worker does it."""
    runner = recipe.runner
    for name, shard in product(teachers, range(cache.spec.num_shards)):
        cache.storage.remove(commit_name(name, shard))  # what is committed would not be computed
    seconds = Counter[str]()
    start = time.perf_counter()
    with (
        ShardExtractor(
            cache, teachers, batch_size=runner.batch_size, decode_threads=runner.decode_threads or 4
        ) as extractor,
        ThreadPoolExecutor(runner.shards_in_flight) as pool,
    ):
        for records in pool.map(
            lambda shard: extractor.extract(shard, list(teachers)), range(cache.spec.num_shards)
        ):
            seconds.update(next(iter(records.values())).seconds)  # all teachers of a shard share them
    return time.perf_counter() - start, seconds


def print_results(results: dict[str, object]) -> None:
    table = Table(
        title="Build against bare forward passes (random weights)", title_justify="left", show_header=False
    )
    stages = results["stage_s"]
    assert isinstance(stages, dict)
    for name, value in {
        **results,
        **{f"{stage} (s, sum over threads)": value for stage, value in stages.items()},
    }.items():
        if name != "stage_s":
            table.add_row(name, f"{value:.3f}" if isinstance(value, float) else str(value))
    Console().print(table)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
