"""Every dense metric against a loop over pixels, streamed in pieces, merged, and added up over processes."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from teachercache.student.metrics import RMSE, MaxF, MeanAngularError, MeanIoU, mtl_gain

SHAPE_BHW = (4, 6, 7)


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_ignored(target: Tensor, seed: int = 9) -> Tensor:
    ignored = torch.rand(SHAPE_BHW, generator=drawn(seed)) < 0.2
    return target.masked_fill(ignored if target.dim() == 3 else ignored[:, None], 255)


def segmentation() -> tuple[Tensor, Tensor]:
    labels = torch.randint(0, 4, (2, *SHAPE_BHW), generator=drawn())  # of 5 classes, the last is absent
    return labels[0], with_ignored(labels[1])


def saliency() -> tuple[Tensor, Tensor]:
    probability = torch.rand(SHAPE_BHW, generator=drawn(1))
    probability[0, 0, :3] = torch.tensor([0.0, 0.5, 1.0])  # exactly on thresholds
    target = (probability + torch.rand(SHAPE_BHW, generator=drawn(2)) > 1).long()
    target[2] = 0  # an image without a salient pixel
    return probability, with_ignored(target)


def normals() -> tuple[Tensor, Tensor]:
    vectors = torch.randn(2, SHAPE_BHW[0], 3, *SHAPE_BHW[1:], generator=drawn(3))
    target = vectors[1] / vectors[1].norm(dim=1, keepdim=True)
    target[1, :, 2, 3] = 0  # a pixel without a direction
    return 3 * vectors[0], with_ignored(target)


def depth() -> tuple[Tensor, Tensor]:
    target = 100 * torch.rand(SHAPE_BHW, generator=drawn(4))
    target[0, 0, :2] = torch.tensor([0.0, 80.0])
    return target + 5 * torch.randn(SHAPE_BHW, generator=drawn(5)) - 1, target


def looped_iou(prediction: Tensor, target: Tensor, absent: str) -> float:
    ious = []
    for c in range(5):
        pairs = [(p, t) for p, t in zip(prediction.ravel(), target.ravel(), strict=True) if t != 255]
        union = sum(bool(p == c or t == c) for p, t in pairs)
        if union or absent == "zero":
            ious.append(sum(bool(p == c and t == c) for p, t in pairs) / max(union, 1))
    return sum(ious) / len(ious)


def looped_f(probability: Tensor, target: Tensor, threshold: float) -> float:
    pairs = [(float(p), int(t)) for p, t in zip(probability.ravel(), target.ravel(), strict=True) if t != 255]
    true_positives = sum(p >= threshold and t == 1 for p, t in pairs)
    precision = true_positives / max(1, sum(p >= threshold for p, _ in pairs))
    recall = true_positives / max(1, sum(t == 1 for _, t in pairs))
    return 1.3 * precision * recall / (0.3 * precision + recall) if precision + recall else 0.0


def looped_pooled(probability: Tensor, target: Tensor) -> float:
    # SAK's thresholds
    return max(looped_f(probability, target, float(t)) for t in torch.arange(0.05, 1, 0.05))


def looped_per_image(probability: Tensor, target: Tensor) -> float:
    thresholds = [float(torch.tensor(k / 255)) for k in range(1, 256)]
    images = list(zip(probability, target, strict=True))
    return max(sum(looped_f(p, t, threshold) for p, t in images) / len(images) for threshold in thresholds)


def looped_angle(prediction: Tensor, target: Tensor) -> float:
    angles = []
    for p, t in zip(
        prediction.movedim(1, -1).reshape(-1, 3), target.movedim(1, -1).reshape(-1, 3), strict=True
    ):
        if 255 in t or not t.any():
            continue
        cosine = float(p.double() @ t.double()) / math.hypot(*p.tolist()) / math.hypot(*t.tolist())
        angles.append(math.degrees(math.acos(max(-1, min(1, cosine)))))
    return sum(angles) / len(angles)


def looped_rmse(prediction: Tensor, target: Tensor) -> float:
    squares = [
        (max(float(p), 0) - float(t)) ** 2
        for p, t in zip(prediction.ravel(), target.ravel(), strict=True)
        if 0 < t < 80
    ]
    return math.sqrt(sum(squares) / len(squares))


CASES: list[
    tuple[Callable[[], Any], Callable[[], tuple[Tensor, Tensor]], Callable[[Tensor, Tensor], float]]
] = [
    (partial(MeanIoU, 5), segmentation, partial(looped_iou, absent="zero")),
    (partial(MeanIoU, 5, absent="skip"), segmentation, partial(looped_iou, absent="skip")),
    (MaxF, saliency, looped_pooled),
    (partial(MaxF, definition="per_image"), saliency, looped_per_image),
    (MeanAngularError, normals, looped_angle),
    (RMSE, depth, looped_rmse),
]
IDS = ["iou-zero", "iou-skip", "f-pooled", "f-per-image", "angle", "rmse"]


@pytest.mark.parametrize(("make", "data", "looped"), CASES, ids=IDS)
def test_metric_equals_a_loop_over_pixels(make, data, looped) -> None:  # type: ignore[no-untyped-def]
    prediction, target = data()
    metric = make()
    metric.update(prediction, target)
    assert metric.compute() == pytest.approx(looped(prediction, target), rel=1e-6)


@pytest.mark.parametrize(("make", "data", "looped"), CASES, ids=IDS)
def test_metric_does_not_depend_on_the_split(make, data, looped) -> None:  # type: ignore[no-untyped-def]
    prediction, target = data()
    whole, first, second = make(), make(), make()
    whole.update(prediction, target)
    for image in (2, 0):
        first.update(prediction[image : image + 1], target[image : image + 1])
    second.update(prediction[[3, 1]], target[[3, 1]])
    first.merge(second)
    assert first.compute() == pytest.approx(whole.compute(), rel=1e-14)
    for name, total in whole.state().items():
        if total.dtype == torch.int64:
            assert torch.equal(first.state()[name], total), name


def half_of_two(rank: int, rendezvous: str) -> list[float]:
    """The scores that process `rank` finds, having seen every other image itself."""
    torch.distributed.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )

    def add_up(total: Tensor) -> Tensor:
        torch.distributed.all_reduce(total)
        return total

    scores = []
    for make, data, _ in CASES:
        prediction, target = data()
        metric = make()
        metric.update(prediction[rank::2], target[rank::2])
        metric.reduce(add_up)
        scores.append(metric.compute())
    torch.distributed.destroy_process_group()
    return scores


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    rendezvous = f"file://{tmp_path}/rendezvous"
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        other = executor.submit(half_of_two, 1, rendezvous)
        found = half_of_two(0, rendezvous)
        assert other.result() == found
    expected = []
    for make, data, _ in CASES:
        metric = make()
        metric.update(*data())
        expected.append(metric.compute())
    assert found == pytest.approx(expected, rel=1e-14)


def test_small_angles_keep_their_digits() -> None:
    angle = 1e-6
    metric = MeanAngularError()
    prediction = torch.tensor([math.cos(angle), math.sin(angle), 0], dtype=torch.float64).view(1, 3, 1, 1)
    metric.update(prediction, torch.tensor([1.0, 0, 0], dtype=torch.float64).view(1, 3, 1, 1))
    assert metric.compute() == pytest.approx(math.degrees(angle), rel=1e-9)


def test_prediction_without_length_is_a_right_angle_off() -> None:
    metric = MeanAngularError()
    metric.update(torch.zeros(1, 3, 1, 1), torch.tensor([0.0, 0, 1]).view(1, 3, 1, 1))
    assert metric.compute() == pytest.approx(90)


def test_nothing_seen_is_nan() -> None:
    assert math.isnan(RMSE().compute())
    assert math.isnan(MeanAngularError().compute())
    assert math.isnan(MeanIoU(3, absent="skip").compute())


def test_per_class_names_the_absent_class() -> None:
    metric = MeanIoU(3)
    metric.update(torch.tensor([[[0, 1]]]), torch.tensor([[[0, 0]]]))
    assert metric.per_class().tolist() == pytest.approx([0.5, 0, math.nan], nan_ok=True)


def test_wrong_inputs_are_named() -> None:
    with pytest.raises(ValueError, match=r"differ in shape[\s\S]*\(1, 1, 2\)[\s\S]*\(1, 2\)"):
        MeanIoU(3).update(torch.zeros(1, 1, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"class 3[\s\S]*0 to 2"):
        MeanIoU(3).update(torch.tensor([[[3]]]), torch.tensor([[[0]]]))
    with pytest.raises(ValueError, match="one kind"):
        MeanIoU(3).merge(MeanIoU(4))


def test_gain_is_equation_7() -> None:
    scores = {"semseg": 0.6, "normals": 16.0}
    single = {"semseg": 0.5, "normals": 20.0}
    assert mtl_gain(scores, single, lower_is_better={"normals"}) == pytest.approx((0.2 + 0.2) / 2)
    percent = {**scores, "semseg": 60.0}
    assert mtl_gain(percent, {**single, "semseg": 50.0}, {"normals"}) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("row", "gain_percent"),
    [
        ((79.26, 68.28, 84.16, 14.06, 71.59), -2.97),  # multi-task baseline
        ((79.03, 67.61, 84.81, 14.15, 73.00), -2.81),  # InvPT
        ((84.01, 76.99, 84.65, 13.82, 76.27), 2.30),  # SAK
    ],
)
def test_gains_of_the_paper(row: tuple[float, ...], gain_percent: float) -> None:
    """SAK, Table 5 (PASCAL-Context, ViT-L)."""
    tasks = ("semseg", "parsing", "saliency", "normals", "boundary")
    single_task = dict(zip(tasks, (81.61, 72.77, 83.80, 13.87, 75.24), strict=True))
    gain = mtl_gain(dict(zip(tasks, row, strict=True)), single_task, lower_is_better={"normals"})
    assert 100 * gain == pytest.approx(gain_percent, abs=0.006)


@pytest.mark.parametrize(
    ("scores", "single", "lower"),
    [
        ({}, {}, set()),
        ({"a": 1.0}, {"b": 1.0}, set()),
        ({"a": 1.0}, {"a": 1.0}, {"b"}),
        ({"a": 1.0}, {"a": 0.0}, set()),
    ],
)
def test_gain_without_a_meaning_is_refused(scores, single, lower) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="expected:"):
        mtl_gain(scores, single, lower)
