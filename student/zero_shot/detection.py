"""Zero-shot detection: a student's maps in GroundingDINO's encoder and decoder (KPU, Figure 3)."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from teachercache.pipeline.errors import RecipeError
from teachercache.pipeline.records.strict import Size
from teachercache.pipeline.sources import Source, decode_image
from teachercache.pipeline.sources.keys import OK
from teachercache.pipeline.sources.source import is_image_name
from teachercache.pipeline.views import View, render_view, source_pixels
from teachercache.student.kpu.model import KPU
from teachercache.student.measuring.evaluate import in_threads
from teachercache.student.models.student import Student
from teachercache.student.zero_shot.detector import Detector

_MOST, _DRAWN = 300, 100  # boxes of an image, as GroundingDINO's authors keep for COCO; pictures


class DetectedBox(NamedTuple):
    """The phrase's number, its score, and left, top, width and height in pixels of the image."""

    phrase: int
    score: float
    bbox: list[float]


class CocoAnnotations:
    """The numbers of a file's `images`, by name without folder and suffix, and of its `categories`.

    Raises `RecipeError` for a file that holds something else, or no image.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            self.content = json.loads(file.read_text(encoding="utf-8"))
            self.images = {PurePosixPath(one["file_name"]).stem: one["id"] for one in self.content["images"]}
            self.categories = {one["name"].lower(): one["id"] for one in self.content["categories"]}
            problem = "" if self.images and self.content["annotations"] else "no images, or nothing in them"
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            problem = f"{type(error).__name__}: {error}"
        if problem:
            raise RecipeError(
                f"{file} does not hold COCO's annotations.",
                got=problem,
                expected="JSON with images, annotations and categories, such as instances_val2017.json",
                do="pass such a file, or leave it out",
            )

    def require(self, phrases: Sequence[str], names: Sequence[str]) -> None:
        """Raises `RecipeError` for phrases that are no categories, and where no image is annotated or two of
        one name are."""
        unknown = [phrase for phrase in phrases if phrase not in self.categories]
        if unknown or not any(name in self.images for name in names):
            raise RecipeError(
                f"{self.file} annotates other {'things' if unknown else 'images'}.",
                got=", ".join(unknown or names[:3]) or "no image",
                expected=f"such as {', '.join([*(self.categories if unknown else self.images)][:5])}",
                do="leave these phrases out" if unknown else "pass the folder of the annotated images",
            )
        if doubles := [name for name, n in Counter(names).items() if n > 1 and name in self.images]:
            raise RecipeError(
                f"{self.file} knows images by their names alone.",
                got=f"several {', '.join(doubles[:3])}",
                expected="one image of each annotated name",
                do="pass the folder of the annotated images",
            )

    def average_precision(self, detected: dict[str, list]) -> dict[str, float]:
        """Of boxes in percent, over the images and categories of `detected`, which has COCO's form."""
        from teachercache.student.metrics.average_precision import average_precision

        truth = {**detected, "annotations": self.content["annotations"]}
        scores = average_precision(truth, detected["annotations"], "bbox")
        return {name: 100 * score for name, score in scores.items()}


@torch.no_grad()
def find(
    student: Student, images: Sequence[Image.Image], detector: Detector, phrases: Sequence[str]
) -> list[list[DetectedBox]]:
    """The 300 best boxes of each image, best first. An image is fitted into the size on which the student
    learnt from GroundingDINO, and padded.

    `student`, on its device, is in the place of the image side of `detector`, which moves there too. Raises
    `RecipeError` for a student without GroundingDINO's four maps.
    """
    names, device = require_maps(student, detector), student.mean.device
    assert isinstance(student, KPU)
    fitted = [_fitted(image, student.size_for(names[0])) for image in images]
    pixels_B3HW, shown_BHW = (torch.stack(parts).to(device) for parts in zip(*fitted, strict=True))
    projected = student.eval().project(student.normalize(pixels_B3HW), names)
    boxes_BQ4, scores_BQP = detector([projected[name].map for name in names], shown_BHW, phrases)
    detected = []
    for image, boxes_Q4, scores_QP in zip(images, boxes_BQ4.cpu(), scores_BQP.cpu(), strict=True):
        scores_N, places_N = scores_QP.flatten().topk(min(_MOST, scores_QP.numel()))
        centre_N2, size_N2 = boxes_Q4[places_N // len(phrases)].split(2, dim=1)
        first_N2, last_N2 = (centre_N2 - size_N2 / 2).clamp(0, 1), (centre_N2 + size_N2 / 2).clamp(0, 1)
        boxes_N4 = torch.cat([first_N2, last_N2 - first_N2], dim=1) * torch.tensor([*image.size, *image.size])
        columns = (places_N % len(phrases)).tolist(), scores_N.tolist(), boxes_N4.tolist()
        detected.append([DetectedBox(*row) for row in zip(*columns, strict=True)])
    return detected


def detect(
    student: Student,
    images: Source,
    detector: Detector,
    phrases: Sequence[str],
    output: Path,
    *,
    annotations: CocoAnnotations | None = None,
    threshold: float = 0.3,
    batch_size: int = 4,
    threads: int = 2,
) -> dict[str, Any]:
    """Write what `find` finds: `detections.json`, in COCO's form with scores, and 100 pictures at most, of
    boxes that score at least `threshold`. With `annotations`, the images are those that are annotated, and
    the file has all boxes, under the annotations' numbers.

    Returns the numbers of images and boxes and, of annotated ones, how many are not there and average
    precision in percent (-100 of sizes of which nothing is annotated). Raises
    `RecipeError` as `find` and `CocoAnnotations.require`.
    """
    samples = [one for one in images.scan().to_pylist() if one["status"] == OK]
    names = [PurePosixPath(one["key"]).name if annotations else one["key"] for one in samples]
    named = dict(zip(names, samples, strict=True))
    image_ids = {name: number for number, name in enumerate(named, 1)}
    category_ids = {phrase: number for number, phrase in enumerate(phrases, 1)}
    if annotations:
        annotations.require(phrases, names)
        image_ids, category_ids = annotations.images, annotations.categories
    chosen = [name for name in named if name in image_ids]
    categories = [{"id": category_ids[phrase], "name": phrase} for phrase in phrases]
    content: dict[str, list] = {"images": [], "annotations": [], "categories": categories}
    output.mkdir(parents=True, exist_ok=True)

    def read(number: int) -> tuple[str, Image.Image]:
        place = (named[chosen[number]][key] for key in ("path", "offset", "nbytes"))
        return chosen[number], decode_image(images.read(*place))

    for batch in in_threads(read, range(len(chosen)), batch_size, threads):
        detected = find(student, [image for _, image in batch], detector, phrases)
        for (name, image), boxes in zip(batch, detected, strict=True):
            shown = [box for box in boxes if box.score >= threshold]
            size = {"width": image.width, "height": image.height}
            file = named[name]["path"] if is_image_name(named[name]["path"]) else name
            content["images"].append({"id": image_ids[name], "file_name": file, **size})
            for phrase, score, bbox in boxes if annotations else shown:
                ids = {"id": len(content["annotations"]) + 1, "image_id": image_ids[name]}
                ids["category_id"] = category_ids[phrases[phrase]]
                area = bbox[2] * bbox[3]
                content["annotations"].append(
                    {**ids, "bbox": bbox, "area": area, "score": score, "iscrowd": 0}
                )
            if len(content["images"]) <= _DRAWN:
                _draw(image, shown, phrases).save(output / f"{name.replace('/', '_')}.png")
    (output / "detections.json").write_text(json.dumps(content) + "\n")
    counts = {"images": len(content["images"]), "boxes": len(content["annotations"])}
    if annotations is None:
        return counts
    missing = {"annotated images that are not there": len(annotations.images) - len(chosen)}
    return counts | missing | annotations.average_precision(content)


def require_maps(student: Student, detector: Detector) -> list[str]:
    """The student's teachers that are the detector's maps, from fine to coarse. Raises `RecipeError`."""
    able = [name for name, width in student.config["teacher_dims"].items() if width == detector.width]
    maps: dict[int, str] = {}
    if isinstance(student, KPU) and len({student.size_for(name) for name in able}) == 1:
        maps = {-math.prod(student.config["teacher_grids"][name]): name for name in able}
    if not len(maps) == len(able) == detector.num_maps:
        raise RecipeError(
            "The student does not have the maps that the detector takes.",
            got=f"a {student.kind}; of {detector.width} channels: {', '.join(able) or 'no teacher'}",
            expected=f"a KPU of {detector.num_maps} teachers, the block_indices of one GroundingDINO",
            do="distil such a student (docs/zero_shot.md), or pass the detector that its teachers are of",
        )
    return [maps[tokens] for tokens in sorted(maps)]


def _fitted(image: Image.Image, size: Size) -> tuple[Tensor, Tensor]:
    """The image in the upper left of the student's pixels (3, H, W), and 1 where it is (H, W)."""
    step = max(image.height / size[0], image.width / size[1])
    view = View(box=(0, 0, size[1] * step, size[0] * step), flip=False, size=size)
    rows, columns = source_pixels(view, (image.height, image.width))
    return render_view(image, view), torch.from_numpy((rows >= 0)[:, None] & (columns >= 0)).long()


def _draw(image: Image.Image, boxes: Sequence[DetectedBox], phrases: Sequence[str]) -> Image.Image:
    drawn = image.copy()
    pen = ImageDraw.Draw(drawn)
    for phrase, score, (left, top, width, height) in boxes:
        colour = f"hsl({phrase * 360 // len(phrases)}, 90%, 50%)"
        pen.rectangle((left, top, left + width, top + height), outline=colour, width=2)
        pen.text((left + 3, top + 2), f"{phrases[phrase]} {score:.2f}", fill=colour)
    return drawn
