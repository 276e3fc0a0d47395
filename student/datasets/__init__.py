"""Data sets with labels for dense tasks (docs/datasets.md).

dataset = open_dataset("nyud", "/data/NYUDv2", "val")
dataset.tasks                      {"semseg": 40, "depth": 1, …}: channels of a prediction
dataset.keys[0], dataset.image(0)  the sample's key in a cache, its image
dataset.labels(0)                  arrays by task; `labels.render_labels` moves them to a view
"""

import os
from pkgutil import resolve_name
from typing import Literal

from teachercache.pipeline.errors import require_known
from teachercache.student.datasets.labelled_dataset import Finding, LabelledDataset, check_folder

DatasetKind = Literal["pascal_context", "nyud", "ade20k", "coco", "image_classes", "scenes"]
_CLASSES = {
    "pascal_context": "teachercache.student.datasets.pascal_context:PascalContext",
    "nyud": "teachercache.student.datasets.nyud:NYUD",
    "ade20k": "teachercache.student.datasets.ade20k:ADE20K",
    "coco": "teachercache.student.datasets.coco:COCO",
    "image_classes": "teachercache.student.datasets.image_classes:ImageClasses",
    "scenes": "teachercache.student.datasets.scenes:Scenes",
}
DATASETS = tuple(_CLASSES)


def dataset_class(kind: str) -> type[LabelledDataset]:
    """Raises `RecipeError` for a kind that is not in `DATASETS`."""
    require_known("data set", kind, DATASETS)
    return resolve_name(_CLASSES[kind])


def open_dataset(kind: str, root: str | os.PathLike[str], split: str = "train") -> LabelledDataset:
    """A split of the data set in the folder `root`. Raises `RecipeError`, `SourceNotFoundError`."""
    return dataset_class(kind)(root, split)


__all__ = ["DATASETS", "Finding", "LabelledDataset", "check_folder", "dataset_class", "open_dataset"]
