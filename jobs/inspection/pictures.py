"""What the teachers see: the image beside the principal components of each teacher's levels."""

import json
from itertools import cycle
from pathlib import Path

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import CacheError, extra
from teachercache.pipeline.exploring.feature_pictures import Picture, picture_grid
from teachercache.pipeline.exploring.map_reader import MapReader, level_name

with extra("view"):
    import matplotlib
    from matplotlib.figure import Figure

matplotlib.use("agg")


def pca_maps(cache: FeatureCache, path: Path, num_samples: int = 3) -> None:
    """Write a PNG: one line a sample, the image and then every teacher's levels as PCA-RGB maps.

    The three components are computed over all shown samples together, so equal colours within a
    column mean equal features. Raises `CacheError` where no row can be read.
    """
    reader = MapReader(cache, num_rows=num_samples)
    if not reader.rows:
        raise CacheError(
            "There is nothing to draw yet.",
            got="no row that every teacher can give",
            do="look at `teachercache inspect`, and build further",
        )
    columns: list[tuple[str, list[Picture]]] = [("view", [reader.view(row) for row in reader.rows])]
    for name in reader.teachers:
        spec = cache.spec.teachers[name]
        for level in range(spec.num_levels):
            shown = [reader.basis(name, level).picture(reader.maps(name, row)[level]) for row in reader.rows]
            columns.append((f"{name}\n{level_name(spec, level)}", shown))
    random = ", ".join(cache.spec.random_weights)
    weights = f" (random weights: {random})" if random else ""
    title = f"First three principal components of each teacher's levels{weights}"
    picture_grid(columns, title).savefig(path)


def loss_curve(metrics: Path, path: Path) -> list[float]:
    """Draw the loss of a run's `metrics.jsonl`, whole and by teacher, to a PNG; returns the whole loss."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [line["step"] + 1 for line in lines]
    losses: list[float] = [line["loss"] for line in lines]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="black", linewidth=2, label="all teachers")
    teachers = sorted({key.split("/")[1] for key in lines[0] if key.startswith("loss/")})
    for teacher, style in zip(teachers, cycle(("-", "--", ":", "-.")), strict=False):
        start = f"loss/{teacher}/"
        terms = [sum(value for key, value in line.items() if key.startswith(start)) for line in lines]
        axes.plot(steps, terms, style, label=teacher)
    title = "Distillation loss, summed over levels"
    axes.set(xlabel="step", ylabel="distillation loss", title=title, ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    return losses
