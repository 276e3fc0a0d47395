import os
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from teachercache.pipeline.errors import SourceNotFoundError
from teachercache.pipeline.places.open_storage import open_storage
from teachercache.pipeline.sources import decode_image, open_source
from tests.images import encode, photo, png_chunk, write_folder

JPEG, PNG, WEBP = (encode(photo(), format) for format in ("JPEG", "PNG", "WEBP"))


def scan(root: Path) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in open_source(root, "image_folder").scan().to_pylist()}


def test_any_nesting_and_any_case(tmp_path: Path) -> None:
    write_folder(
        tmp_path,
        {
            "top.jpg": JPEG,
            "a/one.JPEG": JPEG,
            "a/b/two.PnG": PNG,
            "a/b/c/d/three.webp": WEBP,
            "with space/ünï.Jpg": JPEG,
            "a/notes.txt": b"no image",
            "a/one.jpg.txt": b"no image",
            ".jpg": b"a hidden file without suffix",
        },
    )
    found = scan(tmp_path)
    assert {key: row["label"] for key, row in found.items()} == {
        "top": None,
        "a/one": "a",
        "a/b/two": "b",
        "a/b/c/d/three": "d",
        "with space/ünï": "with space",
    }
    assert {(row["status"], row["width"], row["height"]) for row in found.values()} == {("ok", 40, 30)}


def test_a_shared_key_keeps_its_suffix_in_every_file(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a.jpg": JPEG, "a.png": PNG, "b.jpg": JPEG})
    assert {key: row["path"] for key, row in scan(tmp_path).items()} == {
        "a.jpg": "a.jpg",
        "a.png": "a.png",
        "b": "b.jpg",
    }


def test_a_suffix_that_collides_again(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a.jpg": JPEG, "a.png": PNG, "a.jpg.png": PNG, "a.jpg.png.webp": WEBP})
    assert {key: row["path"] for key, row in scan(tmp_path).items()} == {
        name: name for name in ("a.jpg", "a.png", "a.jpg.png", "a.jpg.png.webp")
    }


def test_bad_files_have_a_row_with_the_reason(tmp_path: Path) -> None:
    write_folder(
        tmp_path,
        {
            "good.jpg": JPEG,
            "empty.jpg": b"",
            "page.jpg": b"<!DOCTYPE html>",
            "cut.jpg": JPEG[:100],
            "line\nbreak.jpg": JPEG,
            "back\\slash.jpg": JPEG,
        },
    )
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    found = scan(tmp_path)
    reasons = {key: row["status"] for key, row in found.items()}
    assert reasons == {
        "good": "ok",
        "empty": "the file has zero bytes",
        "page": "not an image: it starts with b'<!DOCTYPE html>'",
        "cut": reasons["cut"],
        "line\\nbreak": "unsafe name: it has a control character or a backslash",
        "back\\\\slash": "unsafe name: it has a control character or a backslash",
        "dangling": "cannot be read: No such file or directory",
    }
    assert reasons["cut"].startswith("the header cannot be read")
    assert {(row["width"], row["height"]) for key, row in found.items() if key != "good"} == {(0, 0)}


def test_names_that_are_not_utf8_are_reported(tmp_path: Path) -> None:
    write_folder(tmp_path, {"good.jpg": JPEG})
    try:
        (tmp_path / "caf\udce9.jpg").write_bytes(JPEG)
    except OSError:
        pytest.skip("this file system refuses such names")
    assert {key: row["status"] for key, row in scan(tmp_path).items()} == {
        "good": "ok",
        "caf\\udce9": "unsafe name: it is not UTF-8",
    }


def test_a_wrong_suffix_does_not_matter(tmp_path: Path) -> None:
    write_folder(
        tmp_path, {"really_png.jpg": PNG, "really_webp.png": WEBP, "really_gif.webp": encode(photo(), "GIF")}
    )
    source = open_source(tmp_path)
    for row in source.scan().to_pylist():
        assert row["status"] == "ok"
        assert decode_image(source.read(row["path"], row["offset"], row["nbytes"])).size == (40, 30)


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    write_folder(tmp_path, {"real/a.jpg": JPEG, "root/b.jpg": JPEG})
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "root" / "c.jpg").symlink_to(tmp_path / "real" / "a.jpg")
    (tmp_path / "real" / "up").symlink_to(tmp_path / "root")
    found = scan(tmp_path / "root")
    assert sorted(found) == ["b", "c", "linked/a"]
    assert found["c"]["nbytes"] == len(JPEG)


def test_walk_has_one_order_everywhere(tmp_path: Path) -> None:
    names = ["z.jpg", "b.txt", "a/2", "a/10", "a/c/1", "a.d/1", "b/1"]
    write_folder(tmp_path, dict.fromkeys(names, b"12345"))
    expected = [(n, 5) for n in ["b.txt", "z.jpg", "a/10", "a/2", "a/c/1", "a.d/1", "b/1"]]
    memory = open_storage("memory://walked/root")
    for name in names:
        memory.write(name, b"12345")
    for storage in (open_storage(tmp_path), memory):
        assert list(storage.walk()) == expected
        assert list(storage.walk("a")) == [entry for entry in expected if entry[0].startswith("a/")]
        with pytest.raises(FileNotFoundError):
            list(storage.walk("missing"))


def test_a_vanished_folder_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "source", {"a.jpg": JPEG})
    source = open_source(tmp_path / "source")
    (tmp_path / "source").rename(tmp_path / "moved")
    with pytest.raises(SourceNotFoundError, match="cannot be read"):
        source.scan()


def test_all_formats_that_are_read_are_taken_and_the_rest_is_counted(tmp_path: Path) -> None:
    image = photo()
    files = {
        **{f"{i}.{suffix}": JPEG for i, suffix in enumerate(("jpg", "JPEG", "jfif", "JPE"))},
        **{"png.png": PNG, "apng.apng": PNG, "webp.webp": WEBP, "gif.gif": encode(image, "GIF")},
        **{f"{suffix}.{suffix}": encode(image, "TIFF") for suffix in ("tif", "tiff")},
        "bmp.BMP": encode(image, "BMP"),
    }
    others = [
        *["a.avif", "b.AVIF", "c.heic", "notes.txt", "0.cls", "Makefile", "a.jpg.txt", "a.tar"],
        *["._0.jpg", ".DS_Store", ".thumbnails/x.jpg"],
    ]
    write_folder(tmp_path, files | dict.fromkeys(others, b"other"))
    source, left_out = open_source(tmp_path, "image_folder"), Counter[str]()
    samples = source.scan(left_out=left_out)
    assert samples["path"].to_pylist() == sorted(files)
    assert set(samples["status"].to_pylist()) == {"ok"}
    for row in samples.to_pylist():
        assert decode_image(source.read(row["path"], row["offset"], row["nbytes"])).size == (40, 30)
    assert left_out == {
        ".avif": 2,
        ".heic": 1,
        ".txt": 2,
        ".cls": 1,
        "without suffix": 1,
        ".tar": 1,
        "hidden": 3,
    }


def test_a_png_with_an_embedded_workflow_is_an_image(tmp_path: Path) -> None:
    text = png_chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(2_000_000)))
    write_folder(tmp_path, {"comfy.png": PNG[:33] + text + PNG[33:]})
    assert scan(tmp_path)["comfy"]["status"] == "ok"


def test_a_link_to_a_pipe_is_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    """Opening it would wait for somebody who writes."""
    os.mkfifo(tmp_path / "pipe")
    images = write_folder(tmp_path / "images", {"a.jpg": JPEG})
    (images / "b.jpg").symlink_to(tmp_path / "pipe")
    found = scan(images)
    assert (found["a"]["status"], found["b"]["status"]) == ("ok", "cannot be read: not a regular file")
