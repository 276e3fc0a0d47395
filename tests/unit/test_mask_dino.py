"""MaskDINO's decoder: what is matched with what, what its losses are, that it learns, and how it is
measured."""

from __future__ import annotations

import contextlib
import io
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from teachercache.pipeline.records.view_policy import ViewPolicy
from teachercache.pipeline.views import draw_view
from teachercache.student.datasets.instances import encode_mask
from teachercache.student.decoders.decoder import Widths
from teachercache.student.decoders.mask_dino import MaskDINO, Prediction
from teachercache.student.decoders.set_losses import WEIGHTS, SetLosses, Thing
from teachercache.student.measuring.decoder_scores import boxes_in_image, to_image
from teachercache.student.metrics.average_precision import average_precision
from teachercache.student.models.student import ImageRepresentation

SIZE = 64, 96
TINY: dict[str, int] = {
    "width": 32,
    "heads": 2,
    "encoder_layers": 1,
    "layers": 2,
    "queries": 12,
    "points": 256,
}


def tiny(**changes: int) -> MaskDINO:
    torch.manual_seed(0)
    return MaskDINO(Widths(4, (8, 8, 8, 8)), 3, **TINY | {"denoising": 8} | changes)


def map_of(*things: tuple[int, int, int, int, int]) -> Tensor:
    """(class, top, left, bottom, right) of each."""
    map_HW = torch.zeros(SIZE, dtype=torch.int32)
    for n, (thing, top, left, bottom, right) in enumerate(things):
        map_HW[top:bottom, left:right] = 256 * (n + 1) + thing + 1
    return map_HW


TWO = map_of((2, 8, 16, 40, 48), (0, 32, 60, 60, 90))


def features(batch: int = 2) -> ImageRepresentation:
    generator = torch.Generator().manual_seed(1)
    maps = [torch.randn(batch, 8, SIZE[0] // 16, SIZE[1] // 16, generator=generator) for _ in range(4)]
    return ImageRepresentation(torch.zeros(batch, 4), maps)


def test_the_things_of_a_map_have_their_classes_boxes_and_masks() -> None:
    things = Thing.of(TWO)
    assert things.classes.tolist() == [2, 0]
    expected = torch.tensor([[32 / 96, 24 / 64, 32 / 96, 32 / 64], [75 / 96, 46 / 64, 30 / 96, 28 / 64]])
    assert torch.allclose(things.boxes, expected)
    assert things.masks.sum((1, 2)).tolist() == [32 * 32, 28 * 30]
    assert len(Thing.of(map_of()).boxes) == 0


def exact(things: Thing, order: list[int], queries: int) -> Prediction:
    """Queries of which those in `order` predict the things, and the others nothing, in the corner."""
    logits, masks = torch.full((1, queries, 3), -20.0), torch.full((1, queries, *SIZE), -20.0)
    boxes = torch.tensor([0.05, 0.05, 0.1, 0.1]).repeat(1, queries, 1)
    for thing, query in enumerate(order):
        logits[0, query, things.classes[thing]] = 20.0
        boxes[0, query] = things.boxes[thing]
        masks[0, query] = 40 * things.masks[thing] - 20
    return Prediction(logits, boxes, masks)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4), 2)))
def test_each_thing_is_matched_with_the_query_that_predicts_it_at_no_loss(order: tuple[int, int]) -> None:
    torch.manual_seed(0)
    things, losses = Thing.of(TWO), SetLosses(3, 512)
    prediction = exact(things, list(order), 4)
    ((queries, matched),) = losses.match(prediction, [things])
    assert dict(zip(matched.tolist(), queries.tolist(), strict=True)) == dict(enumerate(order))
    found = losses([prediction], [things])
    assert all(found[name] < 0.05 for name in ("class", "box", "giou")), found
    assert found["mask"] + found["dice"] < 1.0  # points on the edges


def test_the_losses_of_a_pair_are_those_of_their_formulas() -> None:
    torch.manual_seed(0)
    things, losses = Thing.of(map_of((1, 0, 0, 32, 96))), SetLosses(3, 512)
    boxes = torch.tensor([[[0.5, 0.75, 1.0, 0.5]]])  # the other half
    found = losses([Prediction(torch.zeros(1, 1, 3), boxes, torch.zeros(1, 1, *SIZE))], [things])
    focal = 0.25 * 0.25 * np.log(2) + 2 * 0.75 * 0.25 * np.log(2)
    assert float(found["class"]) == pytest.approx(WEIGHTS["class"] * focal, rel=1e-5)
    assert float(found["box"]) == pytest.approx(WEIGHTS["box"] * 0.5, rel=1e-5)
    assert float(found["giou"]) == pytest.approx(WEIGHTS["giou"] * 1.0, abs=1e-5)
    assert float(found["mask"]) == pytest.approx(WEIGHTS["mask"] * np.log(2), rel=1e-5)


@pytest.mark.parametrize("things", [[TWO, TWO], [TWO, map_of()], [map_of(), map_of()]])
def test_every_parameter_has_a_gradient_whatever_the_images_show(things: list[Tensor]) -> None:
    """Else a process waits for a gradient that never comes."""
    decoder = tiny().train()
    torch.stack([*decoder.losses(features(), torch.stack(things)).values()]).sum().backward()
    missing = [name for name, one in decoder.named_parameters() if one.grad is None]
    assert missing == []
    assert all(torch.isfinite(one.grad).all() for one in decoder.parameters() if one.grad is not None)


def test_noisy_queries_tell_the_others_nothing() -> None:
    decoder = tiny().train()
    things = [Thing.of(TWO)] * 2
    with torch.no_grad():
        predictions, noisy = decoder._decode(features(), SIZE, things)
        alone, none = decoder._decode(features(), SIZE)
    assert none is None
    known = noisy["dn_num_split"][0]
    assert known > 0
    assert torch.allclose(predictions[-1].of(slice(known, None)).logits, alone[-1].logits, atol=1e-5)


def test_it_learns_an_image_by_heart() -> None:
    decoder, seen = tiny(), features(1)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=2e-3)
    for _ in range(120):
        optimizer.zero_grad()
        torch.stack([*decoder.losses(seen, TWO[None]).values()]).sum().backward()
        optimizer.step()
    (found,) = decoder.eval().predict(seen, SIZE)
    things = Thing.of(TWO)
    for number, thing in enumerate(things.classes.tolist()):
        best = int((found.scores * (found.classes == thing)).argmax())
        mask = (
            torch.nn.functional.interpolate(found.masks[None, best : best + 1], SIZE, mode="bilinear")[0, 0]
            > 0
        )
        there = things.masks[number] > 0
        assert (mask & there).sum() / (mask | there).sum() > 0.8


def random_detections(rng: np.random.Generator) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    images, annotations, detections = [], list[dict[str, Any]](), list[dict[str, Any]]()
    for image in range(6):
        images.append({"id": image, "height": 160, "width": 200})
        for _ in range(int(rng.integers(1, 5))):
            top, left = int(rng.integers(0, 100)), int(rng.integers(0, 100))
            height, width = (int(side) for side in rng.integers(8, 60, 2))
            thing = int(rng.integers(0, 3))
            for moved, certain in ((0, True), *((int(rng.integers(-6, 7)), False) for _ in range(2))):
                y, x = max(0, top + moved), max(0, left + moved)
                mask = np.zeros((160, 200), bool)
                mask[y : y + height, x : x + width] = True
                one = {"image_id": image, "category_id": thing, "bbox": [x, y, width, height]}
                one["segmentation"] = encode_mask(mask)
                if certain:
                    crowd = int(rng.random() < 0.1)
                    number = len(annotations) + 1
                    annotations.append({**one, "id": number, "iscrowd": crowd, "area": int(mask.sum())})
                else:
                    detections.append({**one, "score": float(rng.random())})
    categories = [{"id": number, "name": str(number)} for number in range(3)]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}, detections


@pytest.mark.parametrize("of", ["bbox", "segm"])
def test_average_precision_is_that_of_pycocotools(of: Any) -> None:
    truth, detections = random_detections(np.random.default_rng(3))
    found = average_precision(truth, detections, of)
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = truth
        reference.createIndex()
        drop = {"bbox": "segmentation", "segm": "bbox"}[of]
        given = [{key: value for key, value in one.items() if key != drop} for one in detections]
        measured = COCOeval(reference, reference.loadRes(given), of)
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    assert list(found.values()) == pytest.approx(measured.stats[:6].tolist(), abs=1e-6)
    assert 0 < found["AP"] < 1


def test_boxes_and_masks_of_a_view_are_moved_to_its_image() -> None:
    view = draw_view(ViewPolicy(policy="multitask_eval", size=SIZE), "any", 48, 32, 0)  # smaller, padded
    box = boxes_in_image(torch.tensor([[0.5, 0.5, 0.75, 0.75]]).double(), view, (32, 48))
    assert box.tolist() == [[24.0, 16.0, 24.0, 16.0]]
    mask = torch.zeros(1, *SIZE)
    mask[0, 32:48, 48:72] = 1
    moved = to_image(mask, view, (32, 48))
    assert moved[0, 16:, 24:].mean() == 1
    assert moved.sum() == 16 * 24
