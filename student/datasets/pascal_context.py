"""PASCAL-Context for five tasks, in the folders of ASTMT, ATRC and InvPT."""

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.io import loadmat

from teachercache.pipeline.records.strict import Size
from teachercache.student.datasets.labelled_dataset import LabelledDataset, read_array, unit_normals
from teachercache.student.datasets.labels import ignored_without_parts, label_boundaries, partition_boundaries

_PERSON = 15  # among the classes of PASCAL-Part
_PART_NAMES = (
    (),
    ("hair", "head", "lear", "lebrow", "leye", "mouth", "nose", "rear", "rebrow", "reye"),
    ("neck", "torso"),
    ("luarm", "ruarm"),
    ("lhand", "llarm", "rhand", "rlarm"),
    ("luleg", "ruleg"),
    ("lfoot", "llleg", "rfoot", "rlleg"),
)
_PART_OF_NAME = {name: part for part, names in enumerate(_PART_NAMES) for name in names}

# Those of PASCAL-Context's 459 classes that NYUD-v2 has too, by name, and the TV monitor: the normals were
# distilled from a network trained there, and ASTMT trusts them only on these classes.
_CLASSES_WITH_NORMALS = np.array(
    [
        *(3, 4, 6, 9, 10, 11, 13, 15, 17, 18, 22, 23, 29, 30, 33, 34, 36, 37, 38, 39, 41, 43, 46, 49, 50, 51),
        *(53, 55, 56, 59, 61, 62, 65, 66, 68, 69, 72, 73, 78, 83, 84, 85, 87, 88, 95, 96, 101, 104, 105, 107),
        *(111, 113, 115, 122, 124, 135, 141, 142, 143, 146, 150, 154, 157, 158, 159, 165, 172, 174, 181, 183),
        *(184, 191, 193, 195, 197, 199, 202, 213, 215, 216, 219, 220, 223, 225, 228, 230, 232, 233, 238, 239),
        *(242, 243, 246, 250, 251, 252, 255, 260, 261, 263, 269, 272, 273, 275, 281, 283, 284, 285, 286, 287),
        *(288, 290, 291, 292, 293, 295, 304, 307, 309, 310, 314, 315, 319, 323, 329, 330, 331, 336, 342, 345),
        *(349, 350, 351, 352, 355, 357, 368, 370, 371, 374, 379, 380, 383, 384, 397, 401, 403, 405, 407, 408),
        *(411, 412, 413, 414, 417, 419, 421, 423, 427, 429, 430, 432, 440, 441, 442, 443, 444, 446, 454, 457),
    ]
)


class PascalContext(LabelledDataset):
    """4,998 images to train on and 5,105 to evaluate.

    semseg: the 21 classes of PASCAL VOC. parts: head, torso, upper and lower arms, upper and lower legs;
    ignored in images without a person whose parts are annotated. saliency and normals: distilled, by
    ASTMT's authors. boundary: where the classes of PASCAL-Context change, by a Laplacian to learn from and by
    SEISM's method to measure against; both are thinned.
    """

    name = "pascal_context"
    tasks: ClassVar = {"semseg": 21, "parts": 7, "saliency": 2, "normals": 3, "boundary": 1}
    FILES: ClassVar = {
        "images": ("JPEGImages/{key}.jpg",),
        "semseg": ("semseg/VOC12/{key}.png", "semseg/pascal-context/{key}.png"),
        "parts": ("human_parts/{key}.mat",),
        "saliency": ("sal_distill/{key}.png",),
        "normals": ("normals_distill/{key}.png",),
        "boundary": ("pascal-context/trainval/{key}.mat",),
    }
    LISTS: ClassVar = {
        "train": ("ImageSets/Context/train.txt", 4998),
        "val": ("ImageSets/Context/val.txt", 5105),
    }

    def _label(self, task: str, key: str, size: Size) -> NDArray:
        path = self._path(task, key)
        if task == "parts":
            return _parts(loadmat(path, simplify_cells=True)["anno"], size)
        array = read_array(path, "LabelMap")
        if task == "boundary":
            return label_boundaries(array)
        if task == "saliency":
            return (array > 127).astype(np.uint8)
        if task == "normals":
            classes_HW = read_array(self._path("boundary", key), "LabelMap")
            return unit_normals(array) * np.isin(classes_HW, _CLASSES_WITH_NORMALS)
        return array.astype(np.uint8)

    def _measured_label(self, task: str, key: str, size: Size) -> NDArray:
        if task == "boundary":
            return partition_boundaries(read_array(self._path(task, key), "LabelMap"))
        return self._label(task, key, size)


def _parts(annotation: dict[str, Any], size: Size) -> NDArray[np.uint8]:
    parts_HW = np.zeros(size, np.uint8)
    for thing in np.atleast_1d(annotation["objects"]):  # scipy returns a single struct bare
        if thing["class_ind"] == _PERSON:
            for part in np.atleast_1d(thing["parts"]):
                parts_HW[part["mask"].astype(bool)] = _PART_OF_NAME[part["part_name"]]
    return ignored_without_parts(parts_HW)
