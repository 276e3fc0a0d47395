"""COCO's things, one by one, in the folders of COCO 2017."""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from teachercache.pipeline.errors import SourceError
from teachercache.pipeline.records.strict import Size
from teachercache.student.datasets.instances import decode_mask, instance_map
from teachercache.student.datasets.labelled_dataset import LabelledDataset


class COCO(LabelledDataset):
    """118,287 images to train on and 5,000 to evaluate; 80 classes, in the order of their categories' ids.

    Crowds are not learnt. Raises `SourceError` for a file of annotations without images.
    """

    name = "coco"
    FILES: ClassVar = {"images": ("{split}/{key}.jpg", "{split}/{key}.png")}
    LISTS: ClassVar = {
        "train": ("annotations/instances_train2017.json", 118287),
        "val": ("annotations/instances_val2017.json", 5000),
    }
    FOLDERS: ClassVar = {"train": "train2017", "val": "val2017"}

    def annotations(self, numbers: Iterable[int]) -> dict[str, Any]:
        """As `coco_annotations`, but the annotations themselves: with crowds, and exact where things
        overlap."""
        images = [{**self._images[self.keys[number]], "id": number} for number in numbers]
        annotations = [
            {**one, "image_id": image["id"], "category_id": self._class[one["category_id"]]}
            for image in images
            for one in self._of_image[self._images[self.keys[image["id"]]]["id"]]
        ]
        categories = [{"id": number, "name": str(name)} for name, number in self._class.items()]
        return {"info": {}, "images": images, "annotations": annotations, "categories": categories}

    def _label(self, task: str, key: str, size: Size) -> NDArray:
        found = [one for one in self._of_image[self._images[key]["id"]] if not one.get("iscrowd")]
        masks = [decode_mask(one["segmentation"], *size) for one in found]
        classes_N = np.array([self._class[one["category_id"]] for one in found], int)
        return instance_map(np.array(masks).reshape(len(masks), *size), classes_N)

    def _listed_keys(self) -> list[str]:
        try:
            content = json.loads(self.list_file.read_bytes())
            self._class = {id_: n for n, id_ in enumerate(sorted(one["id"] for one in content["categories"]))}
            self._images = {PurePath(one["file_name"]).stem: one for one in content["images"]}
            self._of_image = defaultdict[int, list[dict[str, Any]]](list)
            for one in content["annotations"]:
                self._of_image[one["image_id"]].append(one)
        except (ValueError, LookupError, TypeError) as error:
            raise self._unusable(f"{type(error).__name__}: {error}") from error
        if not self._images:
            raise self._unusable("no image")
        self.decoder_tasks = {"instances": len(self._class)}
        return list(self._images)

    def _unusable(self, got: str) -> SourceError:
        return SourceError(
            f"{self.list_file} does not say what is in which image.",
            got=got,
            expected="COCO's instances: the lists images, annotations and categories, none of them empty",
            do="unpack annotations_trainval2017.zip again; captions and image_info are other files",
        )
