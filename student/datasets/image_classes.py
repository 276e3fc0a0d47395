"""Images with a class each, as any source has them: ImageNet's folders, tars with .cls, Parquet with
labels."""

import os
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from teachercache.pipeline.errors import SourceError
from teachercache.pipeline.records.strict import Size
from teachercache.pipeline.sources import open_source
from teachercache.pipeline.sources.keys import OK
from teachercache.student.datasets.labelled_dataset import LabelledDataset


class ImageClasses(LabelledDataset):
    """A source in `root`/train and one in `root`/val. The classes are the labels of `train`, in their
    order; to evaluate, none of its files is opened.

    Raises `SourceError` for images without a label, and for labels that `train` does not have.
    """

    name = "image_classes"
    FILES: ClassVar = {}  # the source knows where they are
    LISTS: ClassVar = {"train": ("train", None), "val": ("val", None)}

    def __init__(self, root: str | os.PathLike[str], split: str = "train") -> None:
        super().__init__(root, split)
        of_train = self._labels if split == "train" else open_source(self.root / "train").labels()
        classes = sorted(filter(None, of_train))
        self.decoder_tasks = {"class": len(classes)}
        self._number = {name: number for number, name in enumerate(classes)}
        if strangers := {sample["label"] for sample in self._samples} - self._number.keys():
            raise SourceError(
                f"{len(strangers)} classes of {self.list_file} do not occur among the training images.",
                got=", ".join(sorted(strangers)[:3]),
                expected=f"labels among {', '.join(classes[:3])} …",
                do="name the folder that holds both splits of one data set",
            )

    def image_bytes(self, index: int) -> bytes:
        sample = self._samples[index]
        return self._source.read(sample["path"], sample["offset"], sample["nbytes"])

    def image_size(self, index: int) -> Size:
        return self._samples[index]["height"], self._samples[index]["width"]

    def _label(self, task: str, key: str, size: Size) -> NDArray:
        return np.array(self._number[self._label_of[key]], np.int64)

    def _listed_keys(self) -> list[str]:
        self._source = open_source(self.list_file)
        scanned = self._source.scan()
        self._labels = set(scanned["label"].to_pylist())
        self._samples = [sample for sample in scanned.to_pylist() if sample["status"] == OK]
        self._label_of = {sample["key"]: sample["label"] for sample in self._samples}
        if unlabelled := [key for key, label in self._label_of.items() if label is None]:
            raise SourceError(
                "A classifier is trained on labelled images.",
                got=f"{len(unlabelled)} of {len(self._samples)} without a label in {self.list_file}, such as"
                f" {unlabelled[0]}",
                expected="a folder for each class, or another source with labels",
                do="sort the images into folders that are named as their classes",
            )
        return list(self._label_of)
