"""What the teachers see: the image beside the principal components of each teacher's levels."""

from __future__ import annotations

import json
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from pipeline.cache import FeatureCache
from pipeline.views import render_view

matplotlib.use("agg")

_CELL_INCHES = 1.5


def pca_maps(cache: FeatureCache, path: Path, num_samples: int = 3, seed: int = 0) -> None:
    """Write a PNG: one line a sample, the image and then every teacher's levels as PCA-RGB maps.

    The three components are computed over all shown samples together, so equal colours within a
    column mean equal features.
    """
    samples = cache.valid_samples()
    chosen = np.sort(np.random.default_rng(seed).permutation(samples)[:num_samples])
    rows = cache.index.rows(chosen, 0)
    columns: list[tuple[str, list[NDArray]]] = [("view", [_image(cache, row) for row in rows.tolist()])]
    for name, encoded in cache.read(rows).items():
        maps_RSHWC = encoded.decode()
        for level, block in enumerate(cache.spec.teachers[name].block_indices):
            columns.append((f"{name}\nblock {block + 1}", list(pca_rgb(maps_RSHWC[:, level]).numpy())))
    figure = Figure(
        figsize=(_CELL_INCHES * len(columns), _CELL_INCHES * len(rows) + 0.9), layout="constrained"
    )
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for column, (title, pictures) in enumerate(columns):
        axes[0, column].set_title(title, fontsize=8)
        for line, picture in enumerate(pictures):
            axes[line, column].imshow(picture, interpolation="nearest")
            axes[line, column].set_axis_off()
    figure.suptitle(_title(cache), fontsize=9)
    figure.savefig(path, dpi=110)


def loss_curve(metrics: Path, path: Path) -> list[float]:
    """Draw the loss of a run's `metrics.jsonl`, whole and by teacher, to a PNG; returns the whole loss."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    teachers = sorted({key.split("/")[1] for key in lines[0] if key.startswith("loss/")})
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = [line["step"] + 1 for line in lines]
    losses: list[float] = [line["loss"] for line in lines]
    axes.plot(steps, losses, color="black", linewidth=2, label="all teachers")
    for teacher, style in zip(teachers, cycle(("-", "--", ":", "-.")), strict=False):
        terms = [
            sum(value for key, value in line.items() if key.startswith(f"loss/{teacher}/")) for line in lines
        ]
        axes.plot(steps, terms, style, label=teacher)
    axes.set(
        xlabel="step",
        ylabel="distillation loss",
        title="Distillation loss, summed over levels",
        ylim=(0, None),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    return losses


def pca_rgb(maps_RHWC: Tensor) -> Tensor:
    """The first three principal components over all rows and tokens, as colours in [0, 1] (R, H, W, 3).

    Signs are fixed (largest loading positive) and each component is scaled between its 1st and 99th
    percentile, so single outlier tokens do not take the range.
    """
    tokens = maps_RHWC.reshape(-1, maps_RHWC.shape[-1]).double()
    centred = tokens - tokens.mean(0)
    _, _, components = torch.linalg.svd(centred, full_matrices=False)
    components = components[:3]
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    projected = centred @ (components * largest.sign()).T
    low, high = projected.quantile(0.01, 0), projected.quantile(0.99, 0)
    colours = (projected - low) / (high - low).clamp_min(1e-12)
    rgb: Tensor = colours.clamp(0, 1).reshape(*maps_RHWC.shape[:-1], 3).float()
    return rgb


def _image(cache: FeatureCache, row: int) -> NDArray:
    sample = int(cache.index.locate(row)[0])
    pixels: NDArray = render_view(cache.image(sample), cache.view(row)).permute(1, 2, 0).numpy()
    return pixels


def _title(cache: FeatureCache) -> str:
    random = all(not teacher.pretrained for teacher in cache.spec.teachers.values())
    weights = "random weights" if random else "cached features"
    return f"First three principal components of each teacher's levels ({weights})"
