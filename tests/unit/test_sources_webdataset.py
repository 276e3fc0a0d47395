import json
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import webdataset

from teachercache.pipeline.errors import MissingExtraError
from teachercache.pipeline.sources import open_source
from tests.images import encode, photo, tar_bytes, write_folder

JPEG, PNG = encode(photo(), "JPEG"), encode(photo(), "PNG")


def scan(root: Path) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in open_source(root, "webdataset").scan().to_pylist()}


def scan_tar(root: Path, *members: tuple[str, bytes]) -> dict[str, dict[str, Any]]:
    return scan(write_folder(root, {"set.tar": tar_bytes(members)}))


@pytest.mark.parametrize(
    ("fields", "label"),
    [
        ([("cls", b"17\n")], "17"),
        ([("json", json.dumps({"label": 3, "filename": "x"}).encode())], "3"),
        ([("json", b'{"label": 3}'), ("cls", b"4")], "4"),
        ([("cls", b"n01440764")], "n01440764"),
        ([("json", b'{"caption": "none"}')], None),
        ([("json", b"[1, 2]")], None),
        ([("json", b'{"label": [1, 2]}')], None),
        ([("json", b"{broken")], None),
        ([], None),
    ],
)
def test_labels(tmp_path: Path, fields: list[tuple[str, bytes]], label: str | None) -> None:
    before = [("a.jpg", JPEG), *((f"a.{name}", data) for name, data in fields)]
    behind = [*((f"b.{name}", data) for name, data in fields), ("b.JPEG", JPEG)]
    found = scan_tar(tmp_path, *before, *behind)
    assert {key: row["label"] for key, row in found.items()} == {"a": label, "b": label}


def test_a_key_ends_at_the_first_dot_of_the_name(tmp_path: Path) -> None:
    found = scan_tar(
        tmp_path,
        ("./a.jpg", JPEG),
        ("v1.0/b.png", PNG),
        ("c.jpg", JPEG),
        ("c.mask.png", PNG),
        ("._c.jpg", b"left by macOS"),
        ("d.txt", b"no image"),
    )
    assert sorted(found) == ["a", "c", "v1.0/b"]
    assert {row["status"] for row in found.values()} == {"ok"}


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves its tar open
def test_keys_and_bytes_are_those_of_webdataset(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "set.tar")) as writer:
        for i in range(5):
            writer.write({"__key__": f"part.v1/n{i}", "jpg": JPEG + bytes(i), "cls": b"7", "seg.png": PNG})
    expected = {
        s["__key__"]: s["jpg"] for s in webdataset.WebDataset(str(tmp_path / "set.tar"), shardshuffle=False)
    }
    source = open_source(tmp_path)
    rows = source.scan().to_pylist()
    assert {row["key"]: source.read(row["path"], row["offset"], row["nbytes"]) for row in rows} == expected
    assert len(expected) == 5
    assert {row["label"] for row in rows} == {"7"}


def test_names_with_dots_are_images_where_no_plain_one_is(tmp_path: Path) -> None:
    found = scan_tar(tmp_path, ("2020.01.05_a.jpg", JPEG), ("2020.01.06_b.JPG", JPEG), ("x.v2.png", PNG))
    assert sorted(found) == ["2020.01.05_a", "2020.01.06_b", "x.v2"]


def test_a_key_in_two_tars_is_qualified_by_the_tar(tmp_path: Path) -> None:
    write_folder(
        tmp_path,
        {
            "part/0.tar": tar_bytes([("x.jpg", JPEG), ("only.jpg", JPEG)]),
            "part/1.tar": tar_bytes([("x.jpg", PNG)]),
        },
    )
    found = scan(tmp_path)
    assert {key: (row["path"], row["nbytes"], row["status"]) for key, row in found.items()} == {
        "only": ("part/0.tar", len(JPEG), "ok"),
        "part/0/x": ("part/0.tar", len(JPEG), "ok"),
        "part/1/x": ("part/1.tar", len(PNG), "ok"),
    }


def test_a_key_twice_in_one_tar_is_reported_and_nothing_lost(tmp_path: Path) -> None:
    found = scan_tar(tmp_path, ("x.jpg", JPEG), ("y.jpg", JPEG), ("x.jpg", PNG), ("x.png", PNG))
    assert len(found) == 4
    first, second, third = (found[key] for key in sorted(found) if key.startswith("set/x"))
    assert (first["key"], first["nbytes"], first["status"]) == ("set/x", len(JPEG), "ok")
    for row in (second, third):
        assert row["key"] == f"set/x#{row['offset']}"
        assert row["status"] == "duplicate key: set.tar already has a sample set/x"
        assert (row["width"], row["height"]) == (0, 0)
    assert found["y"]["status"] == "ok"


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/cron.jpg",
        "/etc/passwd.jpg",
        "a/../../b.jpg",
        "a//b.jpg",
        "two\nlines.jpg",
        "a\\b.jpg",
        "\x1b[2J.jpg",
    ],
)
def test_unsafe_names_are_kept_out(tmp_path: Path, name: str) -> None:
    found = scan_tar(tmp_path, ("good.jpg", JPEG), (name, JPEG))
    (bad,) = (row for key, row in found.items() if key != "good")
    assert str(bad["status"]).startswith("unsafe name: ")
    assert str(bad["key"]).isprintable()
    assert (bad["path"], bad["nbytes"], bad["width"]) == ("set.tar", len(JPEG), 0)
    assert found["good"]["status"] == "ok"


def test_names_that_are_not_utf8_are_kept_out(tmp_path: Path) -> None:
    data = tar_bytes([("good.jpg", JPEG), ("caf_.jpg", JPEG)]).replace(b"caf_.jpg", b"caf\xe9.jpg")
    at = data.index(b"caf\xe9.jpg")
    block = data[at : at + 148] + b" " * 8 + data[at + 156 : at + 512]
    data = data[: at + 148] + b"%06o\0 " % sum(block) + data[at + 156 :]
    found = scan(write_folder(tmp_path, {"set.tar": data}))
    assert found["caf\\udce9"]["status"] == "unsafe name: it is not UTF-8"


def test_a_cut_tar_gives_what_is_before_the_cut_and_says_so(tmp_path: Path) -> None:
    members = [(f"{i}.jpg", JPEG) for i in range(4)]
    whole = tar_bytes(members)
    write_folder(
        tmp_path,
        {"cut.tar": whole[: whole.rindex(b"2.jpg") + 700], "whole.tar": tar_bytes([("w.jpg", JPEG)])},
    )
    found = scan(tmp_path)
    assert {key for key, row in found.items() if row["status"] == "ok"} == {"0", "1", "w"}
    (bad,) = (row for row in found.values() if row["status"] != "ok")
    assert (bad["key"], bad["path"]) == ("2", "cut.tar")
    assert str(bad["status"]).startswith("the tar is cut: this member ends at byte ")


def test_a_tar_without_end_and_one_that_is_none(tmp_path: Path) -> None:
    whole = tar_bytes([("0.jpg", JPEG)])
    write_folder(
        tmp_path,
        {"open.tar": whole.rstrip(b"\0") + bytes(-len(whole.rstrip(b"\0")) % 512), "page.tar": b"<html>"},
    )
    found = scan(tmp_path)
    assert found["0"]["status"] == "ok"
    reasons = {row["path"]: row["status"] for row in found.values() if row["status"] != "ok"}
    assert "the tar is cut" in str(reasons["open.tar"])
    assert "the tar is damaged at byte 0" in str(reasons["page.tar"])


def test_bad_images_in_a_tar(tmp_path: Path) -> None:
    found = scan_tar(tmp_path, ("good.jpg", JPEG), ("empty.jpg", b""), ("page.png", b"<html>"))
    assert {key: row["status"] for key, row in found.items()} == {
        "good": "ok",
        "empty": "the file has zero bytes",
        "page": "not an image: it starts with b'<html>'",
    }


def test_a_member_without_room_for_its_header_does_not_read_its_neighbour(tmp_path: Path) -> None:
    found = scan_tar(tmp_path, ("short.jpg", JPEG[:20]), ("good.jpg", JPEG))
    assert str(found["short"]["status"]).startswith("the header cannot be read")


@pytest.mark.parametrize(
    "names",
    [
        ["scan_1.0", "scan_1.5"],
        ["a.b.c", "a.b.d", "a.x"],
        ["v1.0/scan", "v1.1/scan", "v1.1/x.y"],
        ["2020.01.05_a", "IMG_1.HDR"],
    ],
    ids=lambda names: str(names[0]),
)
@pytest.mark.parametrize(
    "suffixes", [(".jpg", ".cls"), (".JPG", ".CLS"), (".jpeg", ".json"), (".png", ".Json")]
)
@pytest.mark.parametrize("order", ["beside", "label first", "apart"])
def test_an_image_and_its_label_are_joined_by_one_rule(
    tmp_path: Path, names: list[str], suffixes: tuple[str, str], order: str
) -> None:
    image, label = suffixes
    images = [(f"{name}{image}", JPEG) for name in names]
    labels = [
        (f"{name}{label}", str(i).encode() if label.lower() == ".cls" else json.dumps({"label": i}).encode())
        for i, name in enumerate(names)
    ]
    pairs = [member for pair in zip(images, labels, strict=True) for member in pair]
    members = {"beside": pairs, "label first": pairs[::-1], "apart": images + labels}[order]
    found, left_out = scan_and_count(write_folder(tmp_path, {"set.tar": tar_bytes(members)}))
    assert {key: row["label"] for key, row in found.items()} == {name: str(i) for i, name in enumerate(names)}
    assert not left_out


def scan_and_count(root: Path) -> tuple[dict[str, dict[str, Any]], Counter[str]]:
    left_out = Counter[str]()
    rows = open_source(root, "webdataset").scan(left_out=left_out).to_pylist()
    return {row["key"]: row for row in rows}, left_out


def test_the_label_of_a_sample_is_that_of_its_images_that_have_none_of_their_own(tmp_path: Path) -> None:
    found = scan_tar(
        tmp_path,
        ("a.cls", b"1"),
        ("a.left.jpg", JPEG),
        ("a.right.jpg", JPEG),
        ("a.right.json", b'{"label": 2}'),
    )
    assert {key: row["label"] for key, row in found.items()} == {"a.left": "1", "a.right": "2"}


def test_names_that_webdataset_passes_over_do_not_part_a_sample(tmp_path: Path) -> None:
    names = ["._a.jpg", "a.jpg", "._a.cls", "README", "a.cls", ".DS_Store"]
    contents = {"a.jpg": JPEG, "a.cls": b"5"}
    members = [(name, contents.get(name, b"left by macOS")) for name in names]
    found, left_out = scan_and_count(write_folder(tmp_path, {"set.tar": tar_bytes(members)}))
    assert {key: row["label"] for key, row in found.items()} == {"a": "5"}
    assert left_out == {"hidden": 3, "without suffix": 1}


def test_what_cannot_be_joined_is_counted(tmp_path: Path) -> None:
    members = [
        *[("a.jpg", JPEG), ("a.seg.png", PNG), ("a.txt", b"a caption"), ("a.0.cls", b"1")],
        *[("b.cls", b"2"), ("c.json", b'{"caption": "none"}'), ("d.npy", b"")],
        *[("e.jpg", JPEG), ("e.cls", b"\xff\xfe"), ("f.jpg", JPEG), ("f.json", b"{broken")],
        *[("g.jpg", JPEG), ("g.json", b'{"label": [1]}'), ("h.jpg", JPEG), ("h.cls", b"1" * (1 << 20))],
    ]
    found, left_out = scan_and_count(write_folder(tmp_path, {"set.tar": tar_bytes(members), "b.tgz": b""}))
    assert {key: row["label"] for key, row in found.items()} == dict.fromkeys("aefgh")
    assert left_out == {
        ".seg.png beside an image": 1,
        "label without an image": 2,
        "unreadable label": 4,
        ".json": 1,
        ".npy": 1,
        ".tgz": 1,
    }


def test_links_are_images_with_labels_of_their_own(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "root", {"c1/im0.jpg": JPEG, "c1/im0.cls": b"1", "c1/im1.jpg": PNG})
    (folder / "c2").mkdir()
    (folder / "c2/same0.jpg").hardlink_to(folder / "c1/im0.jpg")
    (folder / "c2/same0.cls").write_bytes(b"2")
    (folder / "c2/same1.jpg").symlink_to("../c1/im1.jpg")
    (folder / "c0.jpg").symlink_to("c2/same1.jpg")
    (folder / "c0.cls").symlink_to("c1/im0.cls")
    (folder / "gone.jpg").symlink_to("nowhere.jpg")
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for path in sorted(folder.rglob("*")):
            tar.add(path, path.relative_to(folder).as_posix(), recursive=False)
    found, left_out = scan_and_count(tmp_path / "set.tar")
    assert {key: (row["label"], row["nbytes"], row["status"]) for key, row in found.items()} == {
        "c0": ("1", len(PNG), "ok"),
        "c1/im0": ("1", len(JPEG), "ok"),
        "c1/im1": (None, len(PNG), "ok"),
        "c2/same0": ("2", len(JPEG), "ok"),
        "c2/same1": (None, len(PNG), "ok"),
    }
    assert left_out == {"link that leads to no file": 1}
    source = open_source(tmp_path / "set.tar")
    for row in found.values():
        expected = (folder / f"{row['key']}.jpg").read_bytes()
        assert source.read(row["path"], row["offset"], row["nbytes"]) == expected


def test_a_photograph_goes_before_other_formats(tmp_path: Path) -> None:
    tif, gif = encode(photo(seed=1), "TIFF"), encode(photo(), "GIF")
    members = [
        ("a.jpg", JPEG),
        ("a.tif", tif),
        ("a.cls", b"1"),
        ("b.tif", tif),
        ("b.cls", b"2"),
        ("c.1.gif", gif),
    ]
    found, left_out = scan_and_count(write_folder(tmp_path, {"set.tar": tar_bytes(members)}))
    assert {key: (row["nbytes"], row["label"], row["status"]) for key, row in found.items()} == {
        "a": (len(JPEG), "1", "ok"),
        "b": (len(tif), "2", "ok"),
        "c.1": (len(gif), None, "ok"),
    }
    assert left_out == {".tif beside an image": 1}


def test_a_key_that_comes_twice_keeps_its_first_label(tmp_path: Path) -> None:
    found = scan_tar(tmp_path, ("a.jpg", JPEG), ("a.cls", b"1"), ("a.jpg", JPEG), ("a.cls", b"2"))
    assert [row["label"] for row in found.values() if row["status"] == "ok"] == ["1"]


@pytest.mark.parametrize(("data", "label"), [(b"\xef\xbb\xbf3", "3"), (b"3\r\n", "3")])
def test_a_label_is_its_word(tmp_path: Path, data: bytes, label: str) -> None:
    assert scan_tar(tmp_path, ("a.jpg", JPEG), ("a.cls", data))["a"]["label"] == label


def test_true_is_no_label(tmp_path: Path) -> None:
    assert scan_tar(tmp_path, ("b.jpg", JPEG), ("b.json", b'{"label": true}'))["b"]["label"] is None


def test_a_pipe_names_the_extra_of_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "webdataset.gopen", None)
    with pytest.raises(MissingExtraError, match=r"teachercache\[build\]"):
        open_source("pipe:cat nothing.tar")
