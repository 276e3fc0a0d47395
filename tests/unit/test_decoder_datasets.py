"""ADE20K, COCO and classified images, in small folders laid out as the published ones."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faster_coco_eval import mask as run_lengths
from numpy.typing import NDArray
from PIL import Image

from teachercache.pipeline.errors import SourceError, SourceNotFoundError
from teachercache.pipeline.sources import open_source
from teachercache.student.datasets import check_folder, dataset_class, open_dataset
from teachercache.student.datasets.ade20k import unpack
from teachercache.student.datasets.coco import COCO
from teachercache.student.datasets.instances import coco_annotations, things
from teachercache.student.datasets.scenes import write_scenes
from teachercache.student.datasets.synthetic.scene_renderer import CLASSES, THINGS

SIZE = (20, 30)  # height, width
RNG = np.random.default_rng(0)


def picture(suffix: str, array: NDArray | None = None) -> bytes:
    file = io.BytesIO()
    pixels = RNG.integers(0, 256, (*SIZE, 3), np.uint8) if array is None else array
    Image.fromarray(pixels).save(file, {"jpg": "JPEG", "png": "PNG"}[suffix])
    return file.getvalue()


def written(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


CLASSES_HW = np.arange(SIZE[0] * SIZE[1], dtype=np.uint8).reshape(SIZE) % 151


def test_ade20k_of_the_hub_s_parquet_is_that_of_its_folders(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("validation", 2)):
        rows = [
            {"image": {"bytes": picture("jpg")}, "annotation": {"bytes": picture("png", CLASSES_HW)}}
            for _ in range(count)
        ]
        (tmp_path / "hub/data").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"hub/data/{split}-00000-of-00001.parquet")
    assert unpack(tmp_path / "hub", tmp_path / "ade") == {"train": 3, "val": 2}
    dataset = open_dataset("ade20k", tmp_path / "ade", "val")
    assert (len(dataset.keys), dataset.image(0).size) == (2, (30, 20))
    assert open_source(tmp_path / "ade/images/validation").scan()["key"].to_pylist() == dataset.keys
    labels = dataset.labels(1)["semseg"]
    assert (labels[CLASSES_HW == 0] == 255).all()
    assert (labels[CLASSES_HW > 0] == CLASSES_HW[CLASSES_HW > 0] - 1).all()
    found = {
        finding.split: finding.found for finding in check_folder(dataset_class("ade20k"), tmp_path / "ade")
    }
    assert found == {"train": 3, "val": 2}
    with pytest.raises(SourceError, match="no ADE20K in Parquet"):
        unpack(tmp_path / "ade", tmp_path / "other")


def test_classes_are_those_of_the_images_to_train_on(tmp_path: Path) -> None:
    for name in ("train/n02/a", "train/n01/b", "val/n02/c"):
        written(tmp_path / f"{name}.jpg", picture("jpg"))
    dataset = open_dataset("image_classes", tmp_path, "val")
    assert dataset.decoder_tasks == {"class": 2}
    findings = check_folder(dataset_class("image_classes"), tmp_path)
    assert [(one.split, one.found, one.expected) for one in findings] == [("train", 2, 2), ("val", 1, 1)]
    assert open_source(tmp_path / "val").scan()["key"].to_pylist() == dataset.keys
    assert dataset.labels(0, ["class"])["class"] == 1
    assert dataset.image(0).size == (30, 20)
    (tmp_path / "train/n01/b.jpg").write_bytes(b"no image")
    assert open_dataset("image_classes", tmp_path, "val").decoder_tasks == {"class": 2}, "by name, unread"
    assert open_dataset("image_classes", tmp_path, "train").decoder_tasks == {"class": 2}
    written(tmp_path / "val/n03/d.jpg", picture("jpg"))
    with pytest.raises(SourceError, match="n03"):
        open_dataset("image_classes", tmp_path, "val")
    written(tmp_path / "train/e.jpg", picture("jpg"))
    with pytest.raises(SourceError, match="such as e"):
        open_dataset("image_classes", tmp_path, "train")


BOX, INNER = np.s_[4:16, 5:25], np.s_[6:10, 8:12]


def coco(root: Path, **changes: Any) -> Path:
    """Of one image: a large thing as a polygon, a small one on it as run lengths, a crowd."""
    inner = np.zeros(SIZE, np.uint8, order="F")
    inner[INNER] = 1
    encoded = run_lengths.encode(inner)
    counts = encoded["counts"]
    annotations = [
        {"id": 7, "category_id": 90, "segmentation": [[5, 4, 25, 4, 25, 16, 5, 16]], "bbox": [5, 4, 20, 12]},
        {
            "id": 8,
            "category_id": 1,
            "segmentation": {
                "size": list(SIZE),
                "counts": counts if isinstance(counts, str) else counts.decode(),
            },
            "bbox": [8, 6, 4, 4],
        },
        {
            "id": 9,
            "category_id": 1,
            "segmentation": {"size": list(SIZE), "counts": [0, 600]},
            "bbox": [0, 0, 30, 20],
        },
    ]
    content = {
        "images": [{"id": 42, "file_name": "000000000042.jpg", "height": 20, "width": 30}],
        "annotations": [
            {**one, "image_id": 42, "area": 1, "iscrowd": int(one["id"] == 9)} for one in annotations
        ],
        "categories": [{"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}],
    }
    written(root / "train2017/000000000042.jpg", picture("jpg"))
    written(root / "annotations/instances_train2017.json", json.dumps(content | changes).encode())
    return root


def test_of_coco_s_things_the_smaller_one_is_in_front_and_crowds_are_left_out(tmp_path: Path) -> None:
    dataset = open_dataset("coco", coco(tmp_path))
    assert dataset.decoder_tasks == {"instances": 2}
    map_HW = dataset.labels(0, ["instances"])["instances"]
    found = dict(things(map_HW))
    expected = np.zeros(SIZE, bool)
    expected[INNER] = True
    assert (found[0] == expected).all()
    whole = np.zeros(SIZE, bool)
    whole[BOX] = True
    assert (found[1] == whole & ~expected).all()
    assert isinstance(dataset, COCO)
    measured = dataset.annotations([0])
    assert [(one["image_id"], one["category_id"]) for one in measured["annotations"]] == [
        (0, 1),
        (0, 0),
        (0, 0),
    ]


def test_coco_s_bad_files_are_named(tmp_path: Path) -> None:
    broken: list[dict[str, Any]] = [{"images": []}, {"images": [{"id": 42}]}, {"annotations": None}]
    for changes in broken:
        with pytest.raises(SourceError, match="does not say what is in which image"):
            open_dataset("coco", coco(tmp_path, **changes))
    for mask in ({"size": [10, 10], "counts": [0, 100]}, {"size": list(SIZE), "counts": None}):
        wrong = {"id": 1, "image_id": 42, "category_id": 1, "segmentation": mask, "iscrowd": 0}
        with pytest.raises(SourceError, match="each the size of its image"):
            open_dataset("coco", coco(tmp_path, annotations=[wrong])).labels(0, ["instances"])
    dataset = open_dataset("coco", coco(tmp_path))
    (tmp_path / "train2017/000000000042.jpg").unlink()
    with pytest.raises(SourceNotFoundError, match="no images for 000000000042"):
        dataset.labels(0, ["instances"])


def test_a_scene_s_things_are_those_that_its_pixels_show(tmp_path: Path) -> None:
    write_scenes(tmp_path, train=4, val=0, size=(48, 64))
    dataset, seen = open_dataset("scenes", tmp_path), set[str]()
    for number in range(4):
        labels = dataset.labels(number, ["instances", "semseg", "class"])
        things_HW = labels["semseg"] >= CLASSES.index(THINGS[0])
        assert ((labels["instances"] > 0) == things_HW).all()
        areas = np.zeros(len(THINGS))
        for thing, mask_HW in things(labels["instances"]):
            assert {CLASSES[one] for one in labels["semseg"][mask_HW]} == {THINGS[thing]}
            areas[thing] += mask_HW.sum()
            seen.add(THINGS[thing])
        assert labels["class"] == (areas.argmax() if areas.any() else len(THINGS))
    assert len(seen) > 1
    annotations = coco_annotations(dataset, range(4))["annotations"]
    for one in annotations:
        mask_HW = run_lengths.decode(one["segmentation"])
        assert one["area"] == mask_HW.sum()
        assert one["bbox"] == run_lengths.toBbox(one["segmentation"]).tolist()
