"""ADE20K's scene parsing benchmark: 150 classes, in the folders of ADEChallengeData2016.

python -m teachercache.student.datasets.ade20k PARQUET OUT     makes these of the Hub's Parquet files
"""

import re
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow.parquet as pq
import typer
from numpy.typing import NDArray

from teachercache.pipeline.errors import SourceError
from teachercache.pipeline.records.strict import Size
from teachercache.student.datasets.labelled_dataset import LabelledDataset, read_array


class ADE20K(LabelledDataset):
    """20,210 images to train on and 2,000 to evaluate; "other objects" (0 in the files) are ignored."""

    name = "ade20k"
    tasks: ClassVar = {"semseg": 150}
    FILES: ClassVar = {"images": ("images/{split}/{key}.jpg",), "semseg": ("annotations/{split}/{key}.png",)}
    LISTS: ClassVar = {"train": ("images/training", 20210), "val": ("images/validation", 2000)}
    FOLDERS: ClassVar = {"train": "training", "val": "validation"}

    def _label(self, task: str, key: str, size: Size) -> NDArray:
        return read_array(self._path(task, key), task).astype(np.uint8) - np.uint8(1)  # 0 wraps to 255


def unpack(parquet: Path, root: Path) -> dict[str, int]:
    """Write the columns `image` and `annotation` of the Hub's `<split>-*.parquet`
    (`zhoubolei/scene_parse_150`) as ADEChallengeData2016 to `root`: how many images of each split.

    Raises `SourceError` where `parquet` holds no such files.
    """
    counts = dict.fromkeys(ADE20K.FOLDERS, 0)
    for file in sorted(parquet.rglob("*.parquet")):
        split = {"train": "train", "validation": "val"}.get(re.split(r"[-.]", file.name)[0])
        if split is None or not {"image", "annotation"} <= set(pq.read_schema(file).names):
            continue
        images, annotations = (root / part / ADE20K.FOLDERS[split] for part in ("images", "annotations"))
        for folder in (images, annotations):
            folder.mkdir(parents=True, exist_ok=True)
        for batch in pq.ParquetFile(file).iter_batches(64, columns=["image", "annotation"]):
            for row in batch.to_pylist():
                counts[split] += 1
                name = f"ADE_{split}_{counts[split]:08d}"
                (images / f"{name}.jpg").write_bytes(row["image"]["bytes"])
                (annotations / f"{name}.png").write_bytes(row["annotation"]["bytes"])
    if not any(counts.values()):
        raise SourceError(
            "There is no ADE20K in Parquet here.",
            got=str(parquet),
            expected="train-*.parquet and validation-*.parquet with the columns image and annotation",
            do="name the folder that holds them",
        )
    return counts


def main(parquet: Path, root: Path) -> None:
    """Write ADE20K to the folder ROOT, of the Hub's train-*.parquet and validation-*.parquet in PARQUET."""
    print(", ".join(f"{split}: {count} images" for split, count in unpack(parquet, root).items()))


if __name__ == "__main__":
    typer.run(main)
