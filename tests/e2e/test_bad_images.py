"""Images as the web has them: each gives the right rows, or a line in quarantine: key, place, reason."""

from __future__ import annotations

import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from teachercache import FeatureCache, build
from teachercache.cache_builder.builder import prepare
from teachercache.jobs.inspection.summary import summarize
from teachercache.pipeline.loading.sampler import ShardShuffleSampler
from teachercache.pipeline.sources import decode
from teachercache.pipeline.verify import verify
from tests.images import encode, exif, photo, png_chunk, tar_bytes, write_folder, write_parquet
from tests.make_cache import build_recipe

QUIET = Console(quiet=True)
JPEG = encode(photo())


def bomb() -> bytes:
    """A PNG of some hundred bytes that states 20,000 × 20,000 pixels."""
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, payload) for kind, payload in chunks)


def animation() -> bytes:
    frames = [photo(seed=seed) for seed in range(3)]
    return encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)


GOOD = {
    "animated.webp": animation(),
    "cmyk.jpg": encode(photo().convert("CMYK")),
    "gray16.png": encode(Image.fromarray((np.arange(1200, dtype=np.uint16) * 50).reshape(30, 40)), "PNG"),
    "one_pixel.png": encode(Image.new("RGB", (1, 1), "red"), "PNG"),
    "plain.jpg": JPEG,
    "png_named.jpg": encode(photo(seed=1), "PNG"),
    "rotated.jpg": encode(photo(seed=2), exif=exif(6)),
}
BAD = {
    "bomb.png": (bomb(), r"20000×20000 pixels are more than"),
    "cut.jpg": (JPEG[:-20], r"the pixels cannot be decoded"),
    "empty.jpg": (b"", r"the file has zero bytes"),
    "page.jpg": (b"<!DOCTYPE html><html>404</html>", r"not an image: it starts with b'<!DOCTYPE"),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    folder = tmp_path_factory.mktemp("bad")
    files = GOOD | {name: data for name, (data, _) in BAD.items()}
    source = write_folder(folder / "images", files)
    return build(build_recipe(folder / "cache", source, rows_per_shard=4), QUIET).cache


def test_every_bad_image_is_named_with_place_and_reason(cache: FeatureCache) -> None:
    quarantined = {entry.key: entry for entry in cache.manifest.quarantine()}
    assert quarantined.keys() == {Path(name).stem for name in BAD}
    for name, (_, reason) in BAD.items():
        entry = quarantined[Path(name).stem]
        assert entry.location == name
        assert re.search(reason, entry.reason), entry.reason


def test_every_other_image_has_the_rows_it_would_have_alone(cache: FeatureCache, tmp_path: Path) -> None:
    sound = {name: encode(cache.image(cache.find(Path(name).stem)), "PNG") for name in GOOD}
    assert photo(seed=2).size == (40, 30)
    assert cache.image(cache.find("rotated")).size == (30, 40)
    plain = {f"{Path(name).stem}.png": data for name, data in sound.items()}
    recipe = build_recipe(tmp_path / "cache", write_folder(tmp_path / "images", plain), rows_per_shard=4)
    alone = build(recipe, QUIET).cache
    for name in GOOD:
        key = Path(name).stem
        rows = [one.index.rows(one.find(key), [0, 1]) for one in (cache, alone)]
        torch.testing.assert_close(cache.read(rows[0])["tiny"].decode(), alone.read(rows[1])["tiny"].decode())


def test_the_counts_are_in_the_commits_and_in_inspect(cache: FeatureCache) -> None:
    invalid = [row for record in cache.commits("tiny").values() for row in record.invalid_rows]
    assert len(invalid) == 2 * len(BAD)
    shown = summarize(cache.storage)
    assert shown["teachers"]["tiny"]["rows_invalid"] == 2 * len(BAD)
    assert {entry["key"] for entry in shown["quarantined"]} == {Path(name).stem for name in BAD}
    assert shown["problems"] == []
    assert verify(cache, full=True) == []


def test_no_rank_gets_an_invalid_row_and_all_take_the_same_steps(cache: FeatureCache) -> None:
    ranks = [
        ShardShuffleSampler(cache, batch_size_per_process=2, rank=rank, world_size=2) for rank in range(2)
    ]
    steps = -(-len(GOOD) // 4)
    batches = [[sampler.batch(step) for step in range(7 * steps)] for sampler in ranks]
    assert {len(batch) for own in batches for batch in own} == {2}
    seen = cache.index.locate(np.concatenate([batch for own in batches for batch in own]))[0]
    assert set(seen.tolist()) == {cache.find(Path(name).stem) for name in GOOD}


def test_a_tar_with_a_key_twice_and_a_cut_in_the_middle(tmp_path: Path) -> None:
    members = [(f"{name}.jpg", encode(photo(seed=seed))) for seed, name in enumerate("aabcd")]
    whole = tar_bytes(members)
    cut = whole.index(b"d.jpg") + 512 + 20  # behind the header of the last member
    (tmp_path / "train.tar").write_bytes(whole[:cut])
    cache = build(build_recipe(tmp_path / "cache", tmp_path / "train.tar"), QUIET).cache
    reasons = {entry.key.partition("#")[0]: entry for entry in cache.manifest.quarantine()}
    assert reasons.keys() == {"train/a", "d"}
    assert reasons["train/a"].reason.startswith("duplicate key: train.tar already has a sample")
    assert reasons["d"].reason.startswith("the tar is cut")
    assert all(entry.location.startswith("train.tar at ") for entry in reasons.values())
    valid = {cache.key(sample) for sample in cache.valid_samples().tolist()}
    assert valid == {"train/a", "b", "c"}
    assert cache.image_bytes(cache.find("train/a")) == members[0][1]


def test_a_parquet_row_without_bytes(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "train.parquet", [JPEG, None, encode(photo(seed=1))])
    cache = build(build_recipe(tmp_path / "cache", file), QUIET).cache
    (entry,) = cache.manifest.quarantine()
    assert (entry.sample_index, entry.location) == (1, "train.parquet at 1")
    assert entry.reason == "the row has null bytes"
    assert cache.valid_samples().tolist() == [0, 2]


def test_what_is_left_out_is_said_before_anything_runs(tmp_path: Path) -> None:
    others = {"a.avif": b"", "[b].avif": b"", "._plain.jpg": b"", "plain.cls": b"3"}
    recipe = build_recipe(tmp_path / "cache", write_folder(tmp_path / "images", GOOD | others))
    for _ in range(2):
        printed = io.StringIO()
        prepare(recipe, Console(file=printed, width=40))
        line = "Images in the source: 7. Left out: 4 (2 × .avif, 1 × hidden, 1 × .cls).\n"
        assert line in printed.getvalue().replace("1 × .cls, 1 × hidden", "1 × hidden, 1 × .cls")


def test_a_cache_grows_though_an_image_can_be_read_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = png_chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(2_000_000)))
    png = encode(photo(seed=1), "PNG")
    images = write_folder(tmp_path / "images", {"comfy.png": png[:33] + text + png[33:], "plain.jpg": JPEG})
    recipe = build_recipe(tmp_path / "cache", images)
    with monkeypatch.context() as patched:
        patched.setattr(decode, "_WITHOUT_METADATA", {})  # as it once was
        cache = build(recipe, QUIET).cache
    assert [entry.key for entry in cache.manifest.quarantine()] == ["comfy"]
    write_folder(images, {"z.jpg": encode(photo(seed=2))})
    grown = build(recipe, QUIET).cache
    assert {grown.key(sample) for sample in grown.valid_samples().tolist()} == {"plain", "z"}
    assert verify(grown, full=True) == []
