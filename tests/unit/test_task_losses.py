"""The losses of B.5, each against a loop over pixels in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from teachercache.pipeline.errors import RecipeError
from teachercache.student.losses.tasks import TASK_LOSSES, MultiTaskLoss

B, H, W = 2, 5, 6
CHANNELS = {"semseg": 4, "parts": 3, "saliency": 2, "normals": 3, "boundary": 1, "depth": 1}
Pixels = list[tuple[list[float], list[float]]]


def example(task: str) -> tuple[Tensor, Tensor]:
    """A float64 prediction and a target of `task`, a third of which is not annotated."""
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    prediction = randn(B, CHANNELS[task], H, W) * 2
    missing_BHW = torch.rand(B, H, W, generator=generator) < 1 / 3
    if task == "normals":
        target = torch.nn.functional.normalize(randn(B, 3, H, W), dim=1)
        target.masked_fill_(missing_BHW[:, None], 255.0)
        target[0, :, 0, 0] = 0  # no direction either
    elif task == "depth":
        target = randn(B, H, W).abs().masked_fill(missing_BHW, 0)
        target[0, 0, 0] = -1
    else:
        classes = max(2, CHANNELS[task])
        target = torch.randint(0, classes, (B, H, W), generator=generator, dtype=torch.uint8)
        target.masked_fill_(missing_BHW, 255)
    return prediction, target


def pixels(prediction: Tensor, target: Tensor) -> Pixels:
    """(channels of the prediction, channels of the target) of each pixel."""
    target = target if target.ndim == 4 else target[:, None]
    rows = (tensor.movedim(1, -1).flatten(0, 2).tolist() for tensor in (prediction, target))
    return list(zip(*rows, strict=True))


def negative_log_softmax(logits: list[float], label: int) -> float:
    return math.log(sum(math.exp(value - logits[label]) for value in logits))


def cross_entropy_by_hand(all_pixels: Pixels) -> float:
    terms = [negative_log_softmax(p, int(t)) for p, (t,) in all_pixels if t != 255]
    return sum(terms) / len(terms)


def balanced_by_hand(all_pixels: Pixels) -> float:
    valid = [(p, int(t)) for p, (t,) in all_pixels if t != 255]
    share = sum(t for _, t in valid) / len(valid)
    return sum((1 - share if t else share) * negative_log_softmax(p, t) for p, t in valid) / len(valid)


def normals_by_hand(all_pixels: Pixels) -> float:
    valid = [(p, t) for p, t in all_pixels if 255 not in t and any(t)]
    length = [math.hypot(*p) for p, _ in valid]
    return sum(
        abs(a / n - b) for (p, t), n in zip(valid, length, strict=True) for a, b in zip(p, t, strict=True)
    ) / len(valid)


def depth_by_hand(all_pixels: Pixels) -> float:
    terms = [abs(p - t) for (p,), (t,) in all_pixels if t > 0]
    return sum(terms) / len(terms)


def boundary_by_hand(all_pixels: Pixels) -> float:
    terms = []
    for (logit,), (label,) in all_pixels:
        if label != 255:
            probability = 1 / (1 + math.exp(-logit))
            terms.append(-0.95 * math.log(probability) if label else -0.05 * math.log(1 - probability))
    return sum(terms) / len(terms)


BY_HAND: dict[str, Callable[[Pixels], float]] = {
    "semseg": cross_entropy_by_hand,
    "parts": cross_entropy_by_hand,
    "saliency": balanced_by_hand,
    "normals": normals_by_hand,
    "boundary": boundary_by_hand,
    "depth": depth_by_hand,
}


@pytest.mark.parametrize("task", BY_HAND)
def test_each_loss_is_its_definition(task: str) -> None:
    prediction, target = example(task)
    output = MultiTaskLoss([task])({task: prediction}, {task: target})
    assert output.tasks[task].item() == pytest.approx(BY_HAND[task](pixels(prediction, target)), rel=1e-12)


@pytest.mark.parametrize("task", BY_HAND)
def test_pixels_without_annotation_have_no_gradient_and_no_loss(task: str) -> None:
    prediction, target = example(task)
    prediction.requires_grad_()
    MultiTaskLoss([task])({task: prediction}, {task: target}).total.backward()
    assert prediction.grad is not None
    channels = target if target.ndim == 4 else target[:, None]
    nothing = 0 if task in ("normals", "depth") else 255
    missing_BHW = (channels == 255).any(1) | (channels == nothing).all(1)
    assert not prediction.grad.movedim(1, -1)[missing_BHW].any()
    assert prediction.grad.movedim(1, -1)[~missing_BHW].any()

    prediction.grad = None
    empty = torch.full_like(target, nothing)
    total = MultiTaskLoss([task])({task: prediction}, {task: empty}).total
    total.backward()
    assert total.item() == 0
    assert not prediction.grad.any()  # type: ignore[attr-defined]


def test_the_sum_has_the_weights_of_the_paper() -> None:
    examples = {task: example(task) for task in BY_HAND}
    predictions, targets = ({task: pair[i] for task, pair in examples.items()} for i in (0, 1))
    output = MultiTaskLoss(BY_HAND)(predictions, targets)
    weights = {"semseg": 1, "parts": 2, "saliency": 5, "normals": 10, "boundary": 50, "depth": 1}
    expected = sum(weights[task] * value.item() for task, value in output.tasks.items())
    assert output.total.item() == pytest.approx(expected, rel=1e-12)
    other = MultiTaskLoss(["semseg", "depth"], {"depth": 3.0})(predictions, targets)
    expected = (output.tasks["semseg"] + 3 * output.tasks["depth"]).item()
    assert other.total.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("task", BY_HAND)
def test_losses_are_in_float32_under_autocast(task: str) -> None:
    prediction, target = example(task)
    if target.is_floating_point():
        target = target.float()
    rounded = prediction.bfloat16()
    expected = MultiTaskLoss([task])({task: rounded.float()}, {task: target}).total
    with torch.autocast("cpu", torch.bfloat16):
        got = MultiTaskLoss([task])({task: rounded}, {task: target}).total
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)


def test_a_task_that_has_no_loss_is_an_error() -> None:
    with pytest.raises(RecipeError, match="did you mean boundary"):
        MultiTaskLoss(["boundry"])
    with pytest.raises(RecipeError, match="depth"):
        MultiTaskLoss(["semseg"], {"depth": 1.0})


@pytest.mark.parametrize("task", TASK_LOSSES)
def test_shapes_that_do_not_fit_are_an_error(task: str) -> None:
    prediction, target = example(task)
    loss = MultiTaskLoss([task])
    with pytest.raises(ValueError, match=f"{task} do not fit"):
        loss({task: prediction}, {task: target[..., :-1]})
    if TASK_LOSSES[task].channels:
        with pytest.raises(ValueError, match=f"{task} do not fit"):
            loss({task: prediction.repeat(1, 2, 1, 1)}, {task: target})
