"""Measure decoders: mIoU, AP of boxes and masks, top-1, each on its own data set, at the size of its images.

Under `accelerate launch` or `torchrun` every process takes its share of the images.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import RecipeError, require_known
from teachercache.pipeline.grids import upsample
from teachercache.pipeline.records.strict import Size
from teachercache.pipeline.records.view_policy import ViewPolicy
from teachercache.pipeline.stores.feature_store import CLS_TOKEN
from teachercache.pipeline.terminal import in_markdown
from teachercache.pipeline.views import View, draw_view, render_view, source_pixels
from teachercache.student.datasets import LabelledDataset
from teachercache.student.decoders.model import Decoders, Inputs, load_decoders
from teachercache.student.measuring.evaluate import add_up, in_threads, process_state
from teachercache.student.measuring.paper_results import cell, kpu_rows, markdown_table
from teachercache.student.metrics import MeanIoU, Top1


class EvaluatedPlace(NamedTuple):
    """An image: its number in the data set, the whole view of it that is seen, and its (height, width)."""

    number: int
    view: View
    size: Size


def evaluate_decoder(
    decoders: Decoders,
    name: str,
    dataset: LabelledDataset,
    cache: FeatureCache | None = None,
    max_images: int | None = None,
    batch_size: int = 4,
    threads: int = 2,
) -> dict[str, float]:
    """The scores of one decoder in percent, by name; every process gets the same.

    `cache`: of the same images in the whole views of an evaluation, for decoders without a student. Raises
    `RecipeError` where it is missing or holds others, or where the data set has other labels.
    """
    state = process_state()
    decoders = decoders.to(state.device).eval()
    task = decoders.decoders[name].task
    _require_fit(decoders, name, dataset, cache)
    numbers = range(len(dataset.keys))[:max_images]
    mine = numbers[state.process_index :: state.num_processes]
    if cache is None:
        policy = ViewPolicy(policy=_whole(task), size=decoders.image_size)
        seen = _rendered(dataset, mine, policy, batch_size, threads, state.device)
    else:
        seen = _cached(dataset, cache, decoders.made_of[name]["teachers"], mine, batch_size, state.device)
    predicted = ((places, decoders.predict(name, inputs)) for places, inputs in seen)
    return _MEASURES[task](dataset, numbers, predicted)


def evaluate_decoders(
    folder: str,
    dataset: LabelledDataset,
    table: int | None,
    cache: FeatureCache | None,
    *how: Any,
) -> tuple[dict[str, dict[str, float]], str]:
    """By name the scores of the decoders in `folder` that were trained on such a data set, and tables of them
    above KPU's rows. `how`: `max_images`, `batch_size` and `threads` of `evaluate_decoder`.

    Raises `RecipeError` where there are none, or no such table.
    """
    loaded = load_decoders(folder)
    learnt = {name: made for name, made in loaded.made_of.items() if made["dataset"] == dataset.name}
    require_known(
        "data set of these decoders", dataset.name, [one["dataset"] for one in loaded.made_of.values()]
    )
    kpu_rows(dataset.name, 0, (), table)
    scores = {name: evaluate_decoder(loaded, name, dataset, cache, *how) for name in learnt}
    tables = [
        scores_table(
            {f"{folder}, {name}": scores[name]} | kpu_rows(dataset.name, made["classes"], scores[name], table)
        )
        for name, made in learnt.items()
    ]
    return scores, "\n".join(tables)


def scores_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown, a row for each name, with the scores that the first has; negative ones are of nothing."""
    columns = list(next(iter(rows.values())))
    known = {name: {one: score for one, score in own.items() if score >= 0} for name, own in rows.items()}
    lines = ([in_markdown(name), *(cell(own.get(one)) for one in columns)] for name, own in known.items())
    return markdown_table(["", *columns], lines)


def to_image(prediction_CHW: Tensor, view: View, size: Size) -> Tensor:
    """What was predicted on a whole, upright view, on the pixels of its image (C, *size), without the
    padding."""
    shown = [(axis >= 0).nonzero()[0] for axis in source_pixels(view, size)]
    rows, columns = (slice(int(one[0]), int(one[-1]) + 1) for one in shown)
    return upsample(prediction_CHW[None, :, rows, columns], size)[0]


Predicted = Iterator[tuple[list[EvaluatedPlace], Any]]


def _mean_iou(dataset: LabelledDataset, _: range, predicted: Predicted) -> dict[str, float]:
    metric = MeanIoU(dataset.tasks["semseg"], absent="skip")
    for places, logits_BCHW in predicted:
        for (number, view, size), logits_CHW in zip(places, logits_BCHW, strict=True):
            labels_HW = torch.from_numpy(dataset.labels(number, ["semseg"], measured=True)["semseg"])
            classes_HW = to_image(logits_CHW.float(), view, size).argmax(0)
            metric.update(classes_HW[None], labels_HW[None].to(classes_HW.device))
    metric.reduce(add_up)
    return {"mIoU": 100 * metric.compute()}


def _top1(dataset: LabelledDataset, _: range, predicted: Predicted) -> dict[str, float]:
    metric = Top1()
    for places, classes_B in predicted:
        labels = [int(dataset.labels(one.number, ["class"])["class"]) for one in places]
        metric.update(classes_B.cpu(), torch.tensor(labels))
    metric.reduce(add_up)
    return {"top-1": 100 * metric.compute()}


def _average_precision(dataset: LabelledDataset, numbers: range, predicted: Predicted) -> dict[str, float]:
    from teachercache.student.datasets.coco import COCO
    from teachercache.student.datasets.instances import coco_annotations, encode_mask
    from teachercache.student.metrics.average_precision import average_precision

    results: dict[str, list[dict[str, Any]]] = {"bbox": [], "segm": []}
    for places, detections in predicted:
        for (number, view, size), one in zip(places, detections, strict=True):
            masks_KHW = to_image(upsample(one.masks[None], view.size)[0], view, size).cpu().numpy() > 0
            boxes_K4 = boxes_in_image(one.boxes.double().cpu(), view, size)
            classes, scores, mask_scores = (
                part.tolist() for part in (one.classes, one.scores, one.mask_scores)
            )
            for place, thing in enumerate(classes):
                result = {"image_id": number, "category_id": thing}
                results["bbox"].append(result | {"score": scores[place], "bbox": boxes_K4[place].tolist()})
                mask = encode_mask(masks_KHW[place])
                results["segm"].append(result | {"score": mask_scores[place], "segmentation": mask})
    annotate = dataset.annotations if isinstance(dataset, COCO) else partial(coco_annotations, dataset)
    truth = annotate(numbers)
    boxes = average_precision(truth, gather_object(results["bbox"]), "bbox")
    masks = average_precision(truth, gather_object(results["segm"]), "segm")
    return {f"{name} of boxes": 100 * value for name, value in boxes.items()} | {
        f"{name} of masks": 100 * value for name, value in masks.items()
    }


def boxes_in_image(boxes_K4: Tensor, view: View, size: Size) -> Tensor:
    """(left, top, right, bottom) in fractions of a whole, upright view → (left, top, width, height) in
    pixels of the image, within it."""
    left, top, right, bottom = view.box
    origin, extent = torch.tensor([left, top] * 2), torch.tensor([right - left, bottom - top] * 2)
    corners_K4 = (origin + boxes_K4 * extent).clamp(min=0).minimum(torch.tensor([size[1], size[0]] * 2))
    return torch.cat([corners_K4[:, :2], corners_K4[:, 2:] - corners_K4[:, :2]], 1)


_MEASURES: dict[str, Callable[..., dict[str, float]]] = {
    "semseg": _mean_iou,
    "instances": _average_precision,
    "class": _top1,
}
"""By task."""


def _whole(task: str) -> Any:
    return "imagenet_eval" if task == "class" else "multitask_eval"


def _rendered(
    dataset: LabelledDataset,
    numbers: Sequence[int],
    policy: ViewPolicy,
    batch_size: int,
    threads: int,
    device: torch.device,
) -> Iterator[tuple[list[EvaluatedPlace], Inputs]]:
    def make(number: int) -> tuple[EvaluatedPlace, Tensor]:
        image = dataset.image(number)
        view = draw_view(policy, dataset.keys[number], image.width, image.height, 0)
        return EvaluatedPlace(number, view, (image.height, image.width)), render_view(image, view)

    for items in in_threads(make, numbers, batch_size, threads):
        places, images = zip(*items, strict=True)
        yield list(places), torch.stack(images).to(device)


def _cached(
    dataset: LabelledDataset,
    cache: FeatureCache,
    teachers: Sequence[str],
    numbers: Sequence[int],
    batch_size: int,
    device: torch.device,
) -> Iterator[tuple[list[EvaluatedPlace], Inputs]]:
    specs = {name: cache.spec.teachers[name] for name in teachers}
    for start in range(0, len(numbers), batch_size):
        batch = list(numbers[start : start + batch_size])
        rows = cache.index.rows([cache.find(dataset.keys[number], whole=True) for number in batch], 0)
        maps, inputs = cache.read(rows, teachers), dict[str, tuple[Tensor, Tensor | None]]()
        for name, spec in specs.items():
            token = cache.read_tokens(rows, name, CLS_TOKEN)[:, -1].to(device) if spec.cls_token else None
            inputs[name] = maps[name].decode(device), token
        places = [
            EvaluatedPlace(number, cache.view(int(row)), dataset.image_size(number))
            for number, row in zip(batch, rows, strict=True)
        ]
        yield places, inputs


def _require_fit(decoders: Decoders, name: str, dataset: LabelledDataset, cache: FeatureCache | None) -> None:
    made = decoders.made_of[name]
    task = decoders.decoders[name].task
    learnt = made["classes"], decoders.student is None
    classes = {**dataset.tasks, **dataset.decoder_tasks}.get(task, 0)
    if learnt != (classes, cache is not None) or not dataset.keys:
        raise RecipeError(
            f"The decoder {name} cannot be measured on this data set.",
            got=f"{classes} classes of {task} in {len(dataset.keys)} images, {'a' if cache else 'no'} cache",
            expected=f"{learnt[0]} classes in some images, {'a' if learnt[1] else 'no'} cache of them",
            do="name the data set that it was trained on, and a cache where there is no student",
        )
    if cache is not None:
        cache.check_teachers(made["teachers"])
        seen = cache.spec.views.policy, tuple(cache.spec.views.size)
        if seen != (_whole(task), decoders.image_size):
            raise RecipeError(
                "The cache holds other views than a decoder is measured on.",
                got=f"{seen[0]} of {seen[1]}",
                expected=f"{_whole(task)} of {decoders.image_size}",
                do="build one of the images to evaluate on with this views.policy",
            )
