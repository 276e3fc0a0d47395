from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from teachercache.pipeline.errors import SourceError
from teachercache.pipeline.sources import open_source
from tests.images import encode, photo, tar_bytes, write_folder

JPEG = encode(photo())
CLASSES = [
    (f"{wnid}.tar", tar_bytes([(f"{wnid}_{i}.JPEG", JPEG) for i in range(3)]))
    for wnid in ("n01440764", "n01443537", "n01484850")
]


def scan(location: Path) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in open_source(location, "ilsvrc").scan().to_pylist()}


def test_a_folder_that_holds_the_tar_will_do(tmp_path: Path) -> None:
    write_folder(tmp_path, {"ILSVRC2012_img_train.tar": tar_bytes(CLASSES)})
    source = open_source(tmp_path)
    assert source.kind == "ilsvrc"
    assert source.scan()["key"].to_pylist() == sorted(
        f"{name[:-4]}_{i}" for name, _ in CLASSES for i in range(3)
    )


def test_the_flat_tar_of_validation_images_is_a_webdataset(tmp_path: Path) -> None:
    write_folder(tmp_path, {"ILSVRC2012_img_val.tar": tar_bytes([("ILSVRC2012_val_00000001.JPEG", JPEG)])})
    source = open_source(tmp_path / "ILSVRC2012_img_val.tar")
    assert source.kind == "webdataset"
    assert source.scan()["key"].to_pylist() == ["ILSVRC2012_val_00000001"]


def test_train_and_validation_tar_side_by_side_are_not_mixed(tmp_path: Path) -> None:
    flat = tar_bytes([("ILSVRC2012_val_00000001.JPEG", JPEG)])
    write_folder(tmp_path, {"img_train.tar": tar_bytes(CLASSES), "img_val.tar": flat})
    with pytest.raises(SourceError, match="ilsvrc and webdataset"):
        open_source(tmp_path)
    with pytest.raises(SourceError, match=r"img_val\.tar is not a tar of class tars"):
        open_source(tmp_path, "ilsvrc").scan()
    assert open_source(tmp_path / "img_train.tar").scan().num_rows == 9


def test_a_cut_download_gives_what_is_before_the_cut_and_says_so(tmp_path: Path) -> None:
    whole = tar_bytes(CLASSES)
    for cut in range(whole.index(b"n01443537.tar") + 1200, len(whole.rstrip(b"\0")), 211):
        location = write_folder(tmp_path, {"train.tar": whole[:cut]}) / "train.tar"
        found = scan(location)
        good = {key for key, row in found.items() if row["status"] == "ok"}
        complete = {key for key, row in scan_whole(tmp_path, whole).items() if ends(row) <= cut}
        assert good == complete
        bad = [row["status"] for row in found.values() if row["status"] != "ok"]
        assert len(bad) >= 1
        assert all("the tar is " in str(status) for status in bad)


def scan_whole(tmp_path: Path, whole: bytes) -> dict[str, dict[str, Any]]:
    location = tmp_path / "whole" / "train.tar"
    if not location.exists():
        write_folder(location.parent, {"train.tar": whole})
    return scan(location)


def ends(row: dict[str, Any]) -> int:
    return int(row["offset"] + row["nbytes"])


def test_an_inner_tar_never_reads_beyond_its_end(tmp_path: Path) -> None:
    open_ended = CLASSES[0][1].rstrip(b"\0")
    open_ended += bytes(-len(open_ended) % 512)
    found = scan(write_folder(tmp_path, {"t.tar": tar_bytes([("n0.tar", open_ended), CLASSES[1]])}))
    assert {row["label"] for row in found.values() if row["status"] == "ok"} == {"n0", "n01443537"}
    (bad,) = (row for row in found.values() if row["status"] != "ok")
    assert str(bad["status"]).startswith("the tar is cut at byte ")


def test_a_key_in_two_classes_is_qualified_by_the_class(tmp_path: Path) -> None:
    classes = [(f"n{i}.tar", tar_bytes([("same.JPEG", JPEG)])) for i in range(2)]
    found = scan(write_folder(tmp_path, {"t.tar": tar_bytes(classes)}))
    assert {key: row["status"] for key, row in found.items()} == {"n0/same": "ok", "n1/same": "ok"}


def test_what_is_no_image_of_a_class_is_counted(tmp_path: Path) -> None:
    members = [("._n1_0.JPEG", b"left by macOS"), ("n1.0.JPEG", JPEG), ("n1.0.xml", b""), ("x.tar", b"")]
    outer = [
        ("._n1.tar", b"x"),
        ("n1.tar", tar_bytes(members)),
        ("README", b""),
        ("n2.TAR", tar_bytes([("n2_0.jpe", JPEG)])),
    ]
    write_folder(tmp_path, {"t.tar": tar_bytes(outer), "meta.mat": b"", "._t.tar": b"x"})
    source, left_out = open_source(tmp_path), Counter[str]()
    assert source.kind == "ilsvrc"
    rows = source.scan(left_out=left_out).to_pylist()
    assert [(row["key"], row["label"], row["status"]) for row in rows] == [
        ("n1.0", "n1", "ok"),
        ("n2_0", "n2", "ok"),
    ]
    assert left_out == {"hidden": 3, ".xml": 1, ".tar": 1, "without suffix": 1, ".mat": 1}
