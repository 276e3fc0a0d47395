"""How much teachers count, against the formulas by hand, and through training."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from teachercache import build
from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.crops import uniforms
from teachercache.pipeline.errors import RecipeError
from teachercache.pipeline.records.spec import GridSpec
from teachercache.student.losses.weighting import Famo, TeacherDrop, Weighting
from teachercache.student.training.preflight import preflight
from teachercache.student.training.targets import balanced, normalisations
from teachercache.student.training.train import train
from tests.make_cache import build_recipe, make_images, teacher_spec
from tests.train_recipes import logged, train_recipe

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
BATCH: Any = SimpleNamespace(step=3, sample_keys=["p", "q", "r"])
LOSSES = {"a": [0.5, 1.5, 4.0], "b": [1.0, 2.0, 3.0], "c": [0.25, 0.5, 0.75]}


def losses_of(values: dict[str, list[float]]) -> dict[str, Tensor]:
    return {
        name: torch.tensor(of_samples, dtype=torch.float64, requires_grad=True)
        for name, of_samples in values.items()
    }


def softmax(xi: list[float]) -> list[float]:
    powers = [math.exp(value) for value in xi]
    return [power / sum(powers) for power in powers]


def test_famo_weighs_by_its_formula_and_learns_by_it() -> None:
    """z / ℓ, scaled to add up to 1; then ξ ← ξ - β (Jᵀ δ + γ ξ), for two steps."""
    famo, xi = Famo(list("abc"), lr=0.5, decay=0.1), [0.0, 0.0, 0.0]
    for fall in (0.9, 0.7):
        losses = losses_of(LOSSES)
        before = [sum(one) / 3 for one in LOSSES.values()]
        total = famo([losses], [BATCH])
        total.backward()
        z = softmax(xi)
        factors = [share / loss for share, loss in zip(z, before, strict=True)]
        factors = [factor / sum(factors) for factor in factors]
        assert total.item() == pytest.approx(sum(f * b for f, b in zip(factors, before, strict=True)))
        for factor, loss in zip(factors, losses.values(), strict=True):
            assert loss.grad is not None
            assert loss.grad.tolist() == pytest.approx([factor / 3] * 3)
        falls = [fall, 1.0, 0.95]
        after = {
            name: [f * value for value in one] for f, (name, one) in zip(falls, LOSSES.items(), strict=True)
        }
        famo.update([losses_of(after)])
        delta = [-math.log(f) for f in falls]
        mean = sum(share * d for share, d in zip(z, delta, strict=True))
        xi = [x - 0.5 * (share * (d - mean) + 0.1 * x) for x, share, d in zip(xi, z, delta, strict=True)]
        assert list(famo.state().values()) == pytest.approx(xi)
    weights = {name: weight.item() for name, weight in famo.weights().items()}
    assert min(weights, key=lambda name: weights[name]) == "a", "whose loss falls most"


def test_the_losses_of_all_inputs_are_weighed_together() -> None:
    losses = losses_of(LOSSES)
    one, two = Famo(list("abc"), 0.1, 0.0), Famo(list("abc"), 0.1, 0.0)
    together = one([losses], [BATCH])
    apart = two([{"b": losses["b"]}, {"a": losses["a"], "c": losses["c"]}], [BATCH, BATCH])
    torch.testing.assert_close(apart, together)
    torch.testing.assert_close(
        Weighting()([{"b": losses["b"]}, {"a": losses["a"][:2]}], []), torch.tensor(1.5).double()
    )


def test_what_is_dropped_is_drawn_by_sample_and_step_and_never_the_largest_loss() -> None:
    losses = losses_of(LOSSES)
    total = TeacherDrop(0.5, seed=7)([losses], [BATCH])
    total.backward()
    kept = {}
    for i, key in enumerate(BATCH.sample_keys):
        drawn = uniforms(7, [f"drop/{key}"], torch.tensor([3]).numpy(), draws=3)[0, 0]
        largest = max(LOSSES, key=lambda name: LOSSES[name][i])
        for name, uniform in zip(LOSSES, drawn, strict=True):
            kept[name, i] = float(name == largest or uniform >= 0.5)
    count = sum(kept.values())
    assert 3 < count < 9, "some are dropped, and some of the others are not"
    assert total.item() == pytest.approx(sum(kept[name, i] * LOSSES[name][i] for name, i in kept) / count)
    for name, loss in losses.items():
        assert loss.grad is not None
        assert loss.grad.tolist() == pytest.approx([kept[name, i] / count for i in range(3)])


@pytest.mark.parametrize(("probability", "kept"), [(0.0, 9), (1.0, 3)])
def test_with_certainty_all_are_dropped_but_the_largest_or_none(probability: float, kept: int) -> None:
    losses = losses_of(LOSSES)
    TeacherDrop(probability, seed=0)([losses], [BATCH]).backward()
    assert sum(int((loss.grad > 0).sum()) for loss in losses.values() if loss.grad is not None) == kept


@pytest.mark.parametrize("weighting", [Famo(list("abc"), 0.1, 0.1), TeacherDrop(0.0, 0)])
def test_teachers_whose_losses_are_equal_count_as_in_the_mean(weighting: Weighting) -> None:
    losses = losses_of({name: [1.0, 2.0, 3.0] for name in "abc"})
    torch.testing.assert_close(weighting([losses], [BATCH]), Weighting()([losses], [BATCH]))


@pytest.mark.parametrize("kind", ["famo", "teacher_drop"])
def test_two_processes_weigh_as_one_does(kind: str) -> None:
    """The mean of what each has of its half of the samples, when both know the means of both."""
    losses = {name: [*one, one[0] + 0.1] for name, one in LOSSES.items()}
    keys = ["p", "q", "r", "s"]
    halves = [{name: one[part] for name, one in losses.items()} for part in (slice(2), slice(2, 4))]
    batches: Any = [SimpleNamespace(step=3, sample_keys=some) for some in (keys[:2], keys[2:])]
    whole: Any = SimpleNamespace(step=3, sample_keys=keys)

    def made(mean: Any) -> Weighting:
        return Famo(list("abc"), 0.1, 0.1, mean) if kind == "famo" else TeacherDrop(0.5, 7, mean)

    seen: list[Tensor] = []
    for half, batch in zip(halves, batches, strict=True):
        made(lambda local: seen.append(local) or local)([losses_of(half)], [batch])  # type: ignore[func-returns-value]
    of_both = [
        made(lambda _: torch.stack(seen).mean(0))([losses_of(half)], [batch])
        for half, batch in zip(halves, batches, strict=True)
    ]
    alone = made(lambda local: local)([losses_of(losses)], [whole])
    torch.testing.assert_close(torch.stack(of_both).mean(), alone)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small ViTs, with the statistics of their features."""
    root = tmp_path_factory.mktemp("cache")
    tiny = {"model": "test_vit", "pretrained": False, "image_size": 64, "codec": "f32"}
    teachers = {"clip": tiny | {"cls_token": True}, "sam": tiny | {"random_seed": 1}}
    images = make_images(root / "images", 10)
    views = {"num_views": 1, "size": [64, 64]}
    build(build_recipe(root / "cache", images, teachers=teachers, views=views), Console(quiet=True))
    return root / "cache"


def recipe(cache: Path, output: Path, kind: str = "kpu", **distillation: Any) -> Any:
    student = {"kind": kind, "stem": "test_vit", "pretrained": False}
    schedule = {"max_steps": 5}
    return train_recipe(cache, output, student=student, schedule=schedule, distillation=distillation)


@pytest.mark.parametrize("kind", ["sak", "kpu"])
@pytest.mark.parametrize("weighting", ["famo", "teacher_drop"])
def test_a_resumed_run_is_the_same_run_whatever_weighs_its_teachers(
    cache: Path, tmp_path: Path, kind: str, weighting: str
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(recipe(cache, whole, kind, weighting=weighting))
    name = "checkpoints/step_00000003"
    shutil.copytree(whole / name, resumed / name)
    shutil.copy(whole / "metrics.jsonl", resumed)
    train(recipe(cache, resumed, kind, weighting=weighting))
    assert logged(resumed) == logged(whole)
    weights, expected = (load_file(run / "student/model.safetensors") for run in (resumed, whole))
    assert all(weights[name].equal(tensor) for name, tensor in expected.items())
    if weighting == "famo":
        last = [
            json.loads((run / "checkpoints/step_00000005/state.json").read_text()) for run in (resumed, whole)
        ]
        assert last[0]["famo"] == last[1]["famo"]
        assert last[0]["famo"]["clip"] != 0
        both = zip(logged(whole, "weight/clip"), logged(whole, "weight/sam"), strict=True)
        assert [sum(pair) for pair in both] == pytest.approx([1.0] * 5)


def test_weighting_changes_what_is_learnt(cache: Path, tmp_path: Path) -> None:
    for weighting in ("equal", "famo", "teacher_drop"):
        train(recipe(cache, tmp_path / weighting, weighting=weighting))
    equal, famo, drop = (logged(tmp_path / name) for name in ("equal", "famo", "teacher_drop"))
    assert len({tuple(equal), tuple(famo), tuple(drop)}) == 3


def test_standardised_maps_have_mean_0_and_variance_1_and_phi_s_ones_no_correlation_of_variances(
    cache: Path,
) -> None:
    opened = FeatureCache.open(cache)
    maps_RSHWC = opened.feature_maps("clip", torch.arange(opened.num_rows).numpy())
    for kind in ("standardised", "phi_s"):
        found = normalisations(kind, opened, ["clip"], 1, torch.device("cpu"))["clip"]
        assert found.levels == 1
        (map_RCHW,) = balanced(found, [maps_RSHWC[:, -1].permute(0, 3, 1, 2)])
        tokens_NC = map_RCHW.permute(0, 2, 3, 1).flatten(0, 2)
        torch.testing.assert_close(tokens_NC.mean(0), torch.zeros(tokens_NC.shape[1]), atol=1e-3, rtol=0)
        torch.testing.assert_close(tokens_NC.var(0), torch.ones(tokens_NC.shape[1]), atol=1e-2, rtol=0)
    assert normalisations("raw", opened, ["clip"], 1, torch.device("cpu")) == {}


@pytest.mark.parametrize("kind", ["sak", "kpu"])
@pytest.mark.parametrize("targets", ["standardised", "phi_s"])
def test_a_run_on_balanced_targets_learns_them(cache: Path, tmp_path: Path, kind: str, targets: str) -> None:
    train(recipe(cache, tmp_path / targets, kind, targets=targets))
    train(recipe(cache, tmp_path / "raw", kind))
    assert logged(tmp_path / targets) != logged(tmp_path / "raw")
    assert logged(tmp_path / targets)[-1] < logged(tmp_path / targets)[0]


def test_what_cannot_be_weighed_or_balanced_is_refused(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weighs the teachers itself"):
        recipe(cache, tmp_path, weighting="famo", teacher_weights={"sam": 2.0})
    labels_alone = {"dataset": {"kind": "scenes", "root": "scenes"}}
    with pytest.raises(ValueError, match="none is distilled"):
        train_recipe(cache, tmp_path, teachers=[], distillation={"weighting": "famo"}, multitask=labels_alone)
    opened = FeatureCache.open(cache)
    divided = recipe(cache, tmp_path, weighting="teacher_drop").model_copy(
        update={"gradient_accumulation_steps": 2}
    )
    with pytest.raises(RecipeError, match=r"whole step at once(.|\n)*weighting=equal"):
        preflight(divided, opened.spec, opened).require(print)
    adjoint = teacher_spec(grid=5).model_copy(update={"grid": GridSpec(kind="adjoint", size=(4, 4))})
    spec = opened.spec.model_copy(update={"teachers": {"clip": adjoint}})
    found = preflight(recipe(cache, tmp_path, "sak", targets="phi_s"), spec)
    assert "cannot be phi_s" in str(found.problems)
