"""The linear probe: against scipy, on features whose accuracy is known, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import logsumexp
from torch import Tensor

from teachercache.pipeline.errors import RecipeError
from teachercache.student.measuring.linear_probe import STRENGTHS, Probe, fit, linear_probe, probe_table, top1
from teachercache.student.metrics import Top1

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@dataclass
class Made:
    """Features in memory."""

    features_NF: Tensor
    labels: list[str | None]

    @property
    def width(self) -> int:
        return self.features_NF.shape[1]

    def read(self, numbers: Sequence[int]) -> Tensor:
        return self.features_NF[list(numbers)].clone()


def clusters(count: int, spread: float, seed: int, classes: int = 5, width: int = 8) -> Made:
    """Points around centres that are further apart than any two points of one class."""
    centres_KF = 10 * torch.eye(classes, width) + 3
    generator = torch.Generator().manual_seed(seed)
    classes_N = torch.randint(classes, (count,), generator=generator)
    noise_NF = spread * torch.randn(count, width, generator=generator)
    return Made(centres_KF[classes_N] + noise_NF, [f"class {number}" for number in classes_N.tolist()])


def by_scipy(features_NF: NDArray, classes_N: NDArray, num_classes: int, l2: float) -> NDArray[np.float64]:
    """The same optimum by another library: loss and gradient written out in numpy."""
    ones_NE = np.hstack([features_NF, np.ones((len(features_NF), 1))])
    onehot_NK = np.eye(num_classes)[classes_N]
    held_KE = np.ones((num_classes, ones_NE.shape[1]))
    held_KE[:, -1] = 0

    def loss_and_slope(flat: NDArray) -> tuple[float, NDArray]:
        weights_KE = flat.reshape(held_KE.shape)
        logits_NK = ones_NE @ weights_KE.T
        log_p_NK = logits_NK - logsumexp(logits_NK, axis=1, keepdims=True)
        slope_KE = (np.exp(log_p_NK) - onehot_NK).T @ ones_NE / len(ones_NE) + l2 * held_KE * weights_KE
        loss = -(onehot_NK * log_p_NK).sum() / len(ones_NE) + l2 / 2 * (held_KE * weights_KE**2).sum()
        return loss, slope_KE.ravel()

    found = minimize(
        loss_and_slope,
        np.zeros(held_KE.size),
        jac=True,
        method="BFGS",
        options={"gtol": 1e-9, "maxiter": 2000},
    )
    weights_KE: NDArray[np.float64] = found.x.reshape(held_KE.shape)
    return weights_KE


@pytest.mark.parametrize("l2", [1.0, 0.03, 1e-3])
def test_the_fit_is_the_optimum_that_scipy_finds(l2: float) -> None:
    generator = torch.Generator().manual_seed(0)
    features_NF = torch.randn(60, 4, generator=generator, dtype=torch.float64)
    classes_N = (features_NF[:, 0] + torch.randn(60, generator=generator)).gt(0).long()
    classes_N += (features_NF[:, 1] > 1).long()
    expected_KE = by_scipy(features_NF.numpy(), classes_N.numpy(), 3, l2)
    found_KE = fit(features_NF, classes_N, 3, l2, max_iterations=2000).numpy()
    found_KE, expected_KE = (w - w.mean(0) for w in (found_KE, expected_KE))  # a shift of all is no change
    assert np.allclose(found_KE, expected_KE, atol=2e-4)
    assert not np.allclose(found_KE, 0, atol=1e-2)


def test_only_the_given_rows_are_fitted() -> None:
    made = clusters(60, 1.0, seed=0, classes=2)
    classes_N = torch.tensor([int(str(label)[-1]) for label in made.labels])
    rows = torch.arange(0, 60, 2)
    found = fit(made.features_NF, classes_N, 2, 0.1, rows=rows)
    assert torch.allclose(found, fit(made.features_NF[rows], classes_N[rows], 2, 0.1), atol=1e-4)
    assert not torch.allclose(found, fit(made.features_NF, classes_N, 2, 0.1), atol=1e-3)


def test_separable_classes_are_told_apart() -> None:
    found = linear_probe(clusters(200, 0.5, seed=0), clusters(300, 0.5, seed=1))
    assert found.top1 == 100
    assert (found.classes, found.train_images, found.test_images) == (5, 200, 300)
    assert found.held_out.keys() == set(STRENGTHS)
    assert found.l2 == 1  # all strengths do equally well, and the first is the strongest


def test_random_labels_give_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    images = []
    for count in (400, 2000):
        classes_N = torch.randint(4, (count,), generator=generator)
        images.append(Made(torch.randn(count, 8, generator=generator), [str(k) for k in classes_N.tolist()]))
    assert linear_probe(*images).top1 == pytest.approx(25, abs=4)  # 4 standard errors


def test_test_images_choose_nothing() -> None:
    """Other test labels, the same strength and held-out scores."""
    train, test = clusters(100, 5.0, seed=0), clusters(100, 5.0, seed=1)
    wrong = Made(test.features_NF, [*test.labels[1:], test.labels[0]])
    one, other = linear_probe(train, test), linear_probe(train, wrong)
    assert (one.l2, one.held_out) == (other.l2, other.held_out)
    assert one.top1 > other.top1
    assert len(set(one.held_out.values())) > 1
    assert one.held_out[one.l2] == max(one.held_out.values())


def test_scale_and_constant_features_do_not_matter() -> None:
    train, test = clusters(200, 5.0, seed=0), clusters(200, 5.0, seed=1)

    def changed(made: Made) -> Made:
        scaled_NF = made.features_NF * torch.logspace(-4, 4, made.width) + 7
        return Made(torch.cat([scaled_NF, torch.full((len(scaled_NF), 1), 3.3)], 1), made.labels)

    plain = linear_probe(train, test)
    assert linear_probe(changed(train), changed(test)).top1 == pytest.approx(plain.top1, abs=1)
    assert 30 < plain.top1 < 99


def test_counts_merge_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted_B, true_B = torch.randint(3, (2, 101), generator=generator)
    whole, parts = Top1(), [Top1(), Top1()]
    whole.update(predicted_B, true_B)
    for part, where in zip(parts, (slice(0, 37), slice(37, None)), strict=True):
        part.update(predicted_B[where], true_B[where])
    parts[0].merge(parts[1])
    assert parts[0].compute() == whole.compute() == float((predicted_B == true_B).double().mean())
    assert np.isnan(Top1().compute())
    weights_KE = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert top1(weights_KE, torch.tensor([[1.0], [2.0], [-1.0], [-2.0]]), torch.tensor([0, 1, 1, 1])) == 75


def test_the_table_shows_the_paper_beside_imagenet_alone() -> None:
    found = Probe("mine", 70.0, 0.1, 768, 1000, 10_000, 5000, 1)
    assert "| *SAK, ViT-B/16 (SAK, Table 26)* | 79.1 |" in probe_table([found])
    few = Probe("mine", 70.0, 0.1, 768, 10, 10_000, 5000, 1)
    assert "| mine | 70.00 | 768 | 0.1 |" in probe_table([few])
    assert "Table 26" not in probe_table([few])


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (["a", None], ["a"], "1 of 2"),
        (["a", "b"], [None], "1 of 1"),
        (["a", "a"], ["a"], "too few classes"),
        (["a", "b"], ["c", "a"], "got: *c"),
    ],
)
def test_labels_that_cannot_work_are_refused(
    train: list[str | None], test: list[str | None], message: str
) -> None:
    images = (Made(torch.zeros(len(labels), 2), labels) for labels in (train, test))
    with pytest.raises(RecipeError, match=message):
        linear_probe(*images)
