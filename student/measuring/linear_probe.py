"""How well a linear classifier predicts the classes of images from frozen features (SAK, Table 26).

The classifier is the optimum of a convex problem, multinomial logistic regression on standardised features,
so that only the strength of its L2 penalty has to be tuned: on a tenth of the training images
(docs/recipes.md). Under a launcher every process holds its share of the features.

N  images of this process     F  features     K  classes
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate.utils import reduce
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from teachercache.pipeline.errors import RecipeError
from teachercache.pipeline.terminal import in_markdown
from teachercache.student.measuring.evaluate import add_up, process_state
from teachercache.student.measuring.image_features import ImageFeatures
from teachercache.student.measuring.paper_results import PAPER, cell, markdown_table
from teachercache.student.metrics import Top1

STRENGTHS = tuple(10.0**exponent for exponent in range(0, -7, -1))
"""Strengths of the L2 penalty, from strong to weak."""

_HELD_OUT = 0.1
_CHUNK = 8192  # images whose logits are in memory at once
_IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Probe:
    """`top1` on the test images and, by strength of the penalty, `held_out` on the training images that chose
    `l2`; both in percent. `features`: the length of an image's vector. `processes` shared the work."""

    name: str
    top1: float
    l2: float
    features: int
    classes: int
    train_images: int
    test_images: int
    processes: int
    held_out: dict[float, float] = field(default_factory=dict)


def probe_table(probes: Sequence[Probe]) -> str:
    """Markdown: the probes and, for 1000 classes, the paper's probes of ImageNet-1k."""
    first = probes[0]
    data = f"{first.classes} classes, {first.train_images:,} images to train, {first.test_images:,} to test"
    rows = [[in_markdown(one.name), cell(one.top1), str(one.features), f"{one.l2:g}"] for one in probes]
    if first.classes == _IMAGENET_CLASSES:
        paper = PAPER["linear_probes"].items()
        rows += [[f"*{name} (SAK, Table 26)*", str(top1), "–", "–"] for name, top1 in paper]
    return markdown_table([data, "top-1 (% ↑)", "features", "L2"], rows)


def linear_probe(
    train: ImageFeatures,
    test: ImageFeatures,
    *,
    name: str = "features",
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
    progress: Callable[[str], object] | None = None,
) -> Probe:
    """Train a classifier on `train`, choosing among `strengths`, and measure it on `test`.

    `seed` draws the tenth that chooses. Every process gets the same result.
    Raises `RecipeError` for missing labels, for a single class, and for classes that only the test images
    have.
    """
    state, tell = process_state(), progress or (lambda _: None)
    classes = _classes(train.labels, test.labels)
    number_of: dict[str | None, int] = {label: number for number, label in enumerate(classes)}

    def load(images: ImageFeatures, what: str) -> tuple[Tensor, Tensor, NDArray[np.int64]]:
        tell(f"{name}: features of the {what} images")
        labels = images.labels
        numbers = np.array_split(np.arange(len(labels)), state.num_processes)[state.process_index]
        labels_N = torch.tensor([number_of[labels[number]] for number in numbers], dtype=torch.long)
        return images.read(numbers.tolist()).to(state.device), labels_N.to(state.device), numbers

    features_NF, classes_N, numbers = load(train, "training")
    mean_F, std_F = _mean_and_std(features_NF, len(train.labels))
    features_NF.sub_(mean_F).div_(std_F)
    chosen = np.random.default_rng(seed).permutation(len(train.labels))
    is_held_out_N = torch.from_numpy(np.isin(numbers, chosen[: max(1, int(_HELD_OUT * len(chosen)))]))
    held_out, fitted = (where.nonzero()[:, 0].to(state.device) for where in (is_held_out_N, ~is_held_out_N))

    weights, start, scores = {}, None, {}
    for l2 in strengths:
        tell(f"{name}: L2 {l2:g}")
        start = fit(features_NF, classes_N, len(classes), l2, rows=fitted, start=start)
        weights[l2] = start
        scores[l2] = top1(start, features_NF, classes_N, rows=held_out)
    best = max(strengths, key=lambda l2: scores[l2])  # the first, if equal
    tell(f"{name}: all training images")
    final = fit(features_NF, classes_N, len(classes), best, start=weights[best])
    del features_NF
    test_NF, test_N, _ = load(test, "test")
    return Probe(
        name=name,
        top1=top1(final, test_NF.sub_(mean_F).div_(std_F), test_N),
        l2=best,
        features=train.width,
        classes=len(classes),
        train_images=len(train.labels),
        test_images=len(test.labels),
        processes=state.num_processes,
        held_out=scores,
    )


def fit(
    features_NF: Tensor,
    classes_N: Tensor,
    num_classes: int,
    l2: float,
    *,
    rows: Tensor | None = None,
    start: Tensor | None = None,
    max_iterations: int = 200,
) -> Tensor:
    """(K, F + 1), the bias last: the minimum of mean cross-entropy + `l2` / 2 · ‖weights without bias‖².

    Over the images of all processes, or `rows` of each; by L-BFGS from `start` or from zero.
    """
    rows = torch.arange(len(classes_N), device=classes_N.device) if rows is None else rows
    count = int(reduce(torch.tensor(len(rows), device=features_NF.device), "sum"))
    shape = num_classes, features_NF.shape[1] + 1
    weights_KE = features_NF.new_zeros(shape) if start is None else start.clone()
    weights_KE.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights_KE], max_iter=max_iterations, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        weights_KE.grad = torch.zeros_like(weights_KE)
        own = features_NF.new_zeros(())
        for part in rows.split(_CHUNK):
            logits_BK = _logits(weights_KE, features_NF[part])
            loss = F.cross_entropy(logits_BK, classes_N[part], reduction="sum") / count
            loss.backward()
            own += loss.detach()
        sums: Tensor = reduce(torch.cat([weights_KE.grad.flatten(), own[None]]), "sum")
        held_KE = weights_KE.detach().clone()
        held_KE[:, -1] = 0
        weights_KE.grad = sums[:-1].view_as(weights_KE) + l2 * held_KE
        return sums[-1] + l2 / 2 * held_KE.square().sum()

    optimizer.step(closure)
    return weights_KE.detach()


def top1(weights_KE: Tensor, features_NF: Tensor, classes_N: Tensor, rows: Tensor | None = None) -> float:
    """Accuracy in percent, over the images of all processes or `rows` of each."""
    rows = torch.arange(len(classes_N), device=classes_N.device) if rows is None else rows
    metric = Top1()
    for part in rows.split(_CHUNK):
        metric.update(_logits(weights_KE, features_NF[part]).argmax(1), classes_N[part])
    metric.reduce(add_up)
    return 100 * metric.compute()


def _logits(weights_KE: Tensor, features_BF: Tensor) -> Tensor:
    return F.linear(features_BF, weights_KE[:, :-1], weights_KE[:, -1])


def _mean_and_std(features_NF: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(F,) each, over all processes; 1 for a feature that does not vary."""
    mean_F = reduce(features_NF.sum(0, dtype=torch.float64), "sum") / count
    squares_F = features_NF.new_zeros(features_NF.shape[1], dtype=torch.float64)
    for part_BF in features_NF.split(_CHUNK):
        squares_F += (part_BF - mean_F).square().sum(0)
    std_F = (reduce(squares_F, "sum") / count).sqrt()
    is_constant_F = std_F <= 1e-6 * mean_F.abs() + torch.finfo(features_NF.dtype).tiny
    std_F = torch.where(is_constant_F, 1, std_F)
    return mean_F.to(features_NF.dtype), std_F.to(features_NF.dtype)


def _classes(train: Sequence[str | None], test: Sequence[str | None]) -> list[str]:
    for what, labels in (("training", train), ("test", test)):
        if missing := sum(label is None for label in labels):
            raise RecipeError(
                f"Some of the {what} images have no label.",
                got=f"{missing:,} of {len(labels):,}",
                expected="a class for each: the name of its folder, `cls` in a tar, `label` in Parquet",
                do="sort the images into a folder for each class",
            )
    classes = sorted({label for label in train if label is not None})
    if len(classes) < 2:
        raise RecipeError("There are too few classes.", got=f"{len(classes)} class", expected="two or more")
    if strangers := sorted({label for label in test if label is not None} - set(classes)):
        raise RecipeError(
            "The test images have classes that no training image has.",
            got=", ".join(strangers[:3]),
            expected=f"some of the {len(classes)} classes of the training images, such as {classes[0]}",
            do="choose two parts of one data set, with the same folders for classes",
        )
    return classes
