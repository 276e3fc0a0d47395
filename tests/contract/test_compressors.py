"""Zarr stores whose rows are compressed, and codecs that are there to be compressed."""

from __future__ import annotations

import json
import uuid
import warnings
from pathlib import Path
from typing import Any, get_args

import numcodecs
import numpy as np
import pytest
import torch
import xarray
import zarr
from zarr.errors import ZarrUserWarning

from teachercache import FeatureCache
from teachercache.cache_builder.draft import draft
from teachercache.jobs.inspection.summary import summarize
from teachercache.pipeline.codecs import get_codec
from teachercache.pipeline.errors import CacheError, CodecError, MissingExtraError, RecipeError
from teachercache.pipeline.rearranging.convert import convert
from teachercache.pipeline.rearranging.merge import merge
from teachercache.pipeline.records.spec import Compressor, GridSpec
from teachercache.pipeline.stores.shard_format import index_nbytes, parse_index
from teachercache.pipeline.verify import strays, verify
from tests.make_cache import build_recipe, features, make_cache, make_images, teacher_spec

TEACHERS = {
    "bits": teacher_spec(codec="bitround-4", cls_token=True),
    "int4": teacher_spec(width=16, codec="int4-hadamard"),
    "adjoint": teacher_spec(grid=4, codec="bf16").model_copy(
        update={"grid": GridSpec(kind="adjoint", size=(2, 2))}
    ),
}
each_compressor = pytest.mark.parametrize("compressor", get_args(Compressor))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), 8)


def arrays_of(cache: FeatureCache, teacher: str, rows: list[int]) -> dict[str, np.ndarray]:
    arrays = {name: layout.empty(len(rows)) for name, layout in cache.layouts(teacher).items()}
    cache.store.read(teacher, np.array(rows), arrays)
    return arrays


@each_compressor
@pytest.mark.parametrize("place", ["disk", "memory"])
def test_every_array_comes_back_from_every_compressor(
    tmp_path: Path, images: Path, compressor: Compressor, place: str
) -> None:
    location = str(tmp_path / "cache") if place == "disk" else f"memory://{uuid.uuid4().hex}"
    cache = make_cache(location, images, teachers=TEACHERS, compressor=compressor)
    rows = [15, 0, 7, 7, 6]
    for teacher in TEACHERS:
        written = features(cache.spec, teacher)
        for name, values in arrays_of(cache, teacher, rows).items():
            np.testing.assert_array_equal(values, written[name][rows].numpy())
    unread = {"stats/int4.safetensors"}  # a made cache has no tables
    assert {problem.file for problem in verify(cache, full=True)} == unread
    assert strays(cache) == []


@each_compressor
def test_chunks_are_those_that_zarr_python_writes(
    tmp_path: Path, images: Path, compressor: Compressor
) -> None:
    teachers = {"t": teacher_spec(codec="f16")}
    cache = make_cache(tmp_path / "cache", images, teachers=teachers, compressor=compressor)
    file = tmp_path / "cache/teachers/t/codes/c/0/0/0/0/0"
    ours = _chunks(file.read_bytes(), cache.spec.rows_per_shard)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ZarrUserWarning)  # numcodecs' codecs are not in Zarr's specification
        array: Any = zarr.open_array(tmp_path / "cache/teachers/t/codes", mode="r+")
    written = features(cache.spec, "t")["codes"].numpy()
    np.testing.assert_array_equal(array[:16], written[:16])
    array[:6] = written[:6]
    assert _chunks(file.read_bytes(), cache.spec.rows_per_shard) == ours


def _chunks(shard: bytes, num_rows: int) -> list[bytes]:
    index = parse_index(shard[-index_nbytes(num_rows) :], num_rows, len(shard)).tolist()
    return [shard[start : start + nbytes] for start, nbytes in index]


def test_rows_of_zeros_are_there(tmp_path: Path, images: Path) -> None:
    cache = make_cache(tmp_path / "cache", images, compressor="zstd", skip_shards=[1])
    with cache.store.write_shard("alpha", 1) as writer:
        writer.write(range(6), {"codes": np.zeros((6, 4, 2, 2, 8), np.float32)})
        writer.publish()
    assert not arrays_of(cache, "alpha", [7])["codes"].any()


def test_a_compressor_changes_neither_identity_nor_what_old_caches_say(tmp_path: Path, images: Path) -> None:
    plain = make_cache(tmp_path / "plain", images)
    compressed = make_cache(tmp_path / "compressed", images, compressor="zstd")
    assert compressed.spec.cache_id == plain.spec.cache_id
    assert "compressor" not in plain.spec.model_dump(mode="json")
    assert FeatureCache.open(tmp_path / "compressed").spec.compressor == "zstd"


def test_caches_of_other_compressors_do_not_mix(tmp_path: Path, images: Path) -> None:
    make_cache(tmp_path / "plain", images)
    make_cache(tmp_path / "zstd", make_images(tmp_path / "others", 2, seed=1), compressor="zstd")
    with pytest.raises(CacheError, match="compressor: the first cache has None, this one 'zstd'"):
        merge([str(tmp_path / "plain"), str(tmp_path / "zstd")], str(tmp_path / "merged"))


def test_tars_of_a_compressed_cache_hold_the_rows_as_they_are(tmp_path: Path, images: Path) -> None:
    cache = make_cache(tmp_path / "cache", images, compressor="blosc")
    convert(str(tmp_path / "cache"), str(tmp_path / "tars"), "webdataset").run()
    tars = FeatureCache.open(tmp_path / "tars")
    assert tars.spec.compressor is None
    assert torch.equal(tars.read([3, 1])["alpha"].decode(), cache.read([3, 1])["alpha"].decode())
    assert verify(tars, full=True) == []


def test_a_codec_that_the_reader_lacks_says_what_to_install(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cache(tmp_path / "cache", images, compressor="pcodec")
    monkeypatch.delitem(numcodecs.registry.codec_registry, "pcodec")
    with pytest.raises(MissingExtraError, match=r"pcodec(.|\n)*pip install 'teachercache\[pcodec\]'"):
        FeatureCache.open(tmp_path / "cache").read([0])


def test_a_codec_that_nobody_knows_is_named(tmp_path: Path, images: Path) -> None:
    make_cache(tmp_path / "cache", images, compressor="zstd")
    file = tmp_path / "cache/teachers/alpha/codes/zarr.json"
    file.write_text(file.read_text().replace('"zstd"', '"zstd-of-tomorrow"'))
    with pytest.raises(MissingExtraError, match="zstd-of-tomorrow"):
        FeatureCache.open(tmp_path / "cache").read([0], ["alpha"])


def test_a_compressor_that_this_version_does_not_know_is_named(tmp_path: Path, images: Path) -> None:
    cache = make_cache(tmp_path / "cache", images, compressor="zstd")
    content = json.loads((tmp_path / "cache/cache.json").read_text()) | {"compressor": "tomorrow"}
    with pytest.raises(ValueError, match=r"compressor(.|\n)*'zstd', 'blosc', 'lz4' or 'pcodec'"):
        type(cache.spec).model_validate({name: content[name] for name in cache.spec.model_dump()})


def test_a_summary_counts_compressed_bytes(tmp_path: Path, images: Path) -> None:
    cache = make_cache(tmp_path / "cache", images, compressor="zstd")
    stated = summarize(cache.storage)["teachers"]["alpha"]["bytes_per_row"]
    assert stated == sum(record.nbytes for record in cache.commits("alpha").values()) // cache.num_rows


def test_tars_are_not_compressed() -> None:
    with pytest.raises(ValueError, match="compressor zstd needs store: zarr, got webdataset"):
        build_recipe("cache", "images", store="webdataset", compressor="zstd")


def test_a_build_does_not_round_what_nothing_shrinks(tmp_path: Path, images: Path) -> None:
    tiny = {"model": "vit_tiny_patch16_224", "pretrained": False, "codec": "bitround-6"}
    rounded = {"teachers": {"tiny": tiny}}
    with pytest.raises(RecipeError, match="bitround-6 of teacher tiny saves nothing alone"):
        draft(build_recipe(tmp_path / "cache", images, **rounded))
    spec = draft(build_recipe(tmp_path / "cache", images, compressor="blosc", **rounded)).spec
    assert (spec.compressor, spec.teachers["tiny"].codec) == ("blosc", "bitround-6")


def test_rounded_features_are_those_of_numcodecs_and_open_in_plain_xarray(
    tmp_path: Path, images: Path
) -> None:
    halves = torch.randn(16, 4, 2, 2, 8).half() * torch.logspace(-6, 4, 8).half()
    expected = numcodecs.BitRound(4).encode(halves.numpy()).view(np.float16).reshape(halves.shape)
    codec = get_codec("bitround-4")
    codes = codec.encode(halves).tensors()["codes"].numpy()
    np.testing.assert_array_equal(codes, expected)

    teachers = {"t": teacher_spec(codec="bitround-4")}
    cache = make_cache(tmp_path / "cache", images, teachers=teachers, compressor="zstd", skip_shards=[0])
    with cache.store.write_shard("t", 0) as writer:
        writer.write(range(6), {"codes": codes[:6]})
        writer.publish()
    tree = xarray.open_datatree(str(tmp_path / "cache"), engine="zarr", chunks=None)
    opened = tree["teachers/t"].to_dataset()["codes"]
    assert (opened.dtype.name, opened.dims[0]) == ("float16", "row")
    np.testing.assert_array_equal(opened[:6].values, expected[:6])


@pytest.mark.parametrize("bits", [0x7FFF, -1, 0x7C01, 0x7BFF])
def test_values_that_rounding_would_hide_or_make_are_refused(bits: int) -> None:
    values = torch.tensor(bits, dtype=torch.int16).view(torch.float16).expand(1, 1, 1, 1, 8)
    with pytest.raises(CodecError, match="bitround-5 cannot hold"):
        get_codec("bitround-5").encode(values)
