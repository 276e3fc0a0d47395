"""What a build costs beside its teachers' forward passes.

    python -m benchmarks.build [--model vit_small_patch16_224] [--size 224] [--images FOLDER]

Ours: decode, render, forward, encode, write and commit, as `teachercache build` does it. Peer and limit: the
bare forward passes over the same views, rendered beforehand and held in memory. Medians over interleaved
repeats; random weights. The goal: all but the forward passes takes at most 15% of the wall time, at ViT-S on
a CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from cache_builder import build
from cache_builder.extract import ShardExtractor
from cache_builder.recipe import BuildRecipe
from cache_builder.stages import STAGES
from cache_builder.teachers import Teacher, build_teacher
from jobs.demo import collect_images
from pipeline import FeatureCache, render_view


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="vit_small_patch16_224", help="a timm model or a preset of ours")
    parser.add_argument("--size", type=int, default=224, help="side of the views, in pixels")
    parser.add_argument(
        "--images", type=Path, help="a folder of images (default: photographs of scikit-image)"
    )
    parser.add_argument("--views", type=int, default=4, help="views of each image")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print_results(measure(arguments, Path(folder)))


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    recipe = BuildRecipe.model_validate(
        {
            "cache": str(folder / "cache"),
            "source": str(collect_images(arguments.images, folder / "images")),
            "views": {"num_views": arguments.views, "size": [arguments.size] * 2},
            "teachers": {"teacher": {"model": arguments.model, "pretrained": False}},
            "rows_per_shard": 16,
            "runner": {"batch_size": 8, "decode_threads": 1},
        }
    )
    cache = build(recipe, Console(quiet=True)).cache  # also the warm-up, of files and of the model
    teacher = build_teacher(cache.spec.teachers["teacher"])
    batches = render_all(cache, recipe.runner.batch_size)
    bare, ours, stages = [], [], Counter[str]()
    for _ in range(arguments.repeats):
        bare.append(bare_forward(teacher, batches))
        wall, seconds = extract_all(cache, teacher, recipe)
        ours.append(wall)
        stages.update(seconds)
    wall = sum(ours)
    return {
        "model": cache.spec.teachers["teacher"].model,
        "image_size": arguments.size,
        "views": cache.num_rows,
        "bare_forward_s": statistics.median(bare),
        "build_s": statistics.median(ours),
        "build_over_bare": statistics.median(b / a for a, b in zip(bare, ours, strict=True)),
        "share_of_wall_not_forward": 1 - stages["forward"] / wall,
        "stage_s": {stage: stages[stage] / arguments.repeats for stage in STAGES},
        "images_per_s": cache.num_rows / statistics.median(ours),
    }


def render_all(cache: FeatureCache, batch_size: int) -> list[torch.Tensor]:
    size = cache.spec.teachers["teacher"].render_size
    samples = cache.index.locate(range(cache.num_rows))[0].tolist()
    images = {sample: cache.image(sample) for sample in set(samples)}
    views = [render_view(images[sample], cache.view(row), size) for row, sample in enumerate(samples)]
    return list(torch.stack(views).split(batch_size))


def bare_forward(teacher: Teacher, batches: list[torch.Tensor]) -> float:
    start = time.perf_counter()
    with torch.inference_mode():
        for batch in batches:
            teacher(batch)
    return time.perf_counter() - start


def extract_all(cache: FeatureCache, teacher: Teacher, recipe: BuildRecipe) -> tuple[float, Counter[str]]:
    """Every shard again, two at a time, as a worker does it."""
    runner = recipe.runner
    seconds = Counter[str]()
    start = time.perf_counter()
    with (
        ShardExtractor(
            cache, {"teacher": teacher}, batch_size=runner.batch_size, decode_threads=runner.decode_threads
        ) as extractor,
        ThreadPoolExecutor(runner.shards_in_flight) as pool,
    ):
        for records in pool.map(
            lambda shard: extractor.extract(shard, ["teacher"]), range(cache.spec.num_shards)
        ):
            seconds.update(records["teacher"].seconds)
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
