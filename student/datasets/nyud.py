"""NYUD-v2 for four tasks, in the folders of ASTMT, MTI-Net, ATRC and InvPT, which differ in file formats."""

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from teachercache.pipeline.records.strict import Size
from teachercache.student.datasets.labelled_dataset import LabelledDataset, read_array, unit_normals
from teachercache.student.datasets.labels import partition_boundaries


class NYUD(LabelledDataset):
    """795 images to train on and 654 to evaluate.

    semseg: 40 classes; the background of the files (0) is ignored. depth: metres. boundary: learnt as it is;
    SEISM takes it for a partition, so predictions are measured against the thinned outlines of its lines.
    """

    name = "nyud"
    tasks: ClassVar = {"semseg": 40, "depth": 1, "normals": 3, "boundary": 1}
    boundary_distance = 0.011
    FILES: ClassVar = {
        "images": ("images/{key}.png", "images/{key}.jpg"),
        "semseg": ("segmentation/{key}.png", "segmentation/{key}.mat"),
        "depth": ("depth/{key}.npy", "depth/{key}.mat"),
        "normals": ("normals/{key}.png", "normals/{key}.npy", "normals/{key}.jpg"),
        "boundary": ("edge/{key}.png", "edge/{key}.npy"),
    }
    LISTS: ClassVar = {"train": ("gt_sets/train.txt", 795), "val": ("gt_sets/val.txt", 654)}

    def _label(self, task: str, key: str, size: Size) -> NDArray:
        path = self._path(task, key)
        array = read_array(path, {"semseg": "segmentation"}.get(task, task))
        if task == "normals":
            return unit_normals(array)
        if task == "depth":
            return np.where(np.isfinite(array) & (array > 0), array, 0).astype(np.float32)
        if task == "boundary":
            return (array > (127 if array.dtype == np.uint8 and path.suffix == ".png" else 0.5)).astype(
                np.uint8
            )
        return array.astype(np.uint8) - np.uint8(1)  # 1…40 become 0…39, and 0 wraps to 255, the ignored class

    def _measured_label(self, task: str, key: str, size: Size) -> NDArray:
        label = self._label(task, key, size)
        return partition_boundaries(label) if task == "boundary" else label
