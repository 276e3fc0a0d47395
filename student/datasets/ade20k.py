"""ADE20K's scene parsing benchmark: 150 classes, in the folders of ADEChallengeData2016.

python -m teachercache.student.datasets.ade20k PARQUET OUT     makes these of the Hub's Parquet files
"""

import argparse
import re
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow.parquet as pq
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
        columns = set(pq.read_schema(file).names)
        if split is None or not {"image", "annotation"} <= columns:
            continue
        folder = ADE20K.FOLDERS[split]
        for part, suffix in (("images", "jpg"), ("annotations", "png")):
            (root / part / folder).mkdir(parents=True, exist_ok=True)
            number = counts[split]
            for batch in pq.ParquetFile(file).iter_batches(64, columns=[part.removesuffix("s")]):
                for picture in batch.column(0).to_pylist():
                    number += 1
                    (root / part / folder / f"ADE_{split}_{number:08d}.{suffix}").write_bytes(
                        picture["bytes"]
                    )
        counts[split] = number
    if not any(counts.values()):
        raise SourceError(
            "There is no ADE20K in Parquet here.",
            got=str(parquet),
            expected="train-*.parquet and validation-*.parquet with the columns image and annotation",
            do="name the folder that holds them",
        )
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description="Unpack ADE20K from the Hub's Parquet files.")
    parser.add_argument("parquet", type=Path, help="folder with train-*.parquet and validation-*.parquet")
    parser.add_argument("root", type=Path, help="folder to write")
    given = parser.parse_args()
    print(", ".join(f"{split}: {count} images" for split, count in unpack(given.parquet, given.root).items()))


if __name__ == "__main__":
    main()
