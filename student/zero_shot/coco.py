"""COCO's annotations of images that are not a data set's, and the average precision of boxes on them."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from teachercache.pipeline.errors import RecipeError


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

    def average_precision(self, found: dict[str, list]) -> dict[str, float]:
        """Of boxes in percent, over the images and categories of `found`, which has COCO's form."""
        from teachercache.student.metrics.average_precision import average_precision

        images, categories = ({one["id"] for one in found[key]} for key in ("images", "categories"))
        kept = [
            one
            for one in self.content["annotations"]
            if one["image_id"] in images and one["category_id"] in categories
        ]
        scores = average_precision({**found, "annotations": kept}, found["annotations"], "bbox")
        return {name: 100 * score for name, score in scores.items()}
