"""`cache.json`: what is identity, what is not, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import CacheError
from teachercache.pipeline.records.seal import UNSEALED, seal
from teachercache.pipeline.records.spec import SCHEMA_VERSION, CacheSpec, DatasetSpec, Segment
from teachercache.pipeline.records.view_policy import ViewPolicy
from tests.make_cache import make_cache, make_images, teacher_spec


def spec(**changes: object) -> CacheSpec:
    content: dict[str, object] = {
        "dataset": DatasetSpec(kind="image_folder", location="/a", num_samples=10, fingerprint="f"),
        "views": ViewPolicy(num_views=2),
        "rows_per_shard": 8,
        "segments": (Segment(first_row=0, samples=(0, 10), views=(0, 2)),),
        "teachers": {"alpha": teacher_spec(), "beta": teacher_spec(width=4)},
        "created": "now",
        "versions": {},
    }
    return CacheSpec.model_validate(content | changes)


def test_a_spec_survives_its_json() -> None:
    assert CacheSpec.model_validate_json(spec().model_dump_json()) == spec()


def test_place_and_time_are_not_identity() -> None:
    moved = DatasetSpec(kind="image_folder", location="/elsewhere", num_samples=10, fingerprint="f")
    assert spec(dataset=moved, created="later").cache_id == spec().cache_id


@pytest.mark.parametrize(
    "change",
    [
        {"views": ViewPolicy(num_views=2, seed=1)},
        {"rows_per_shard": 10},
        {"dataset": DatasetSpec(kind="image_folder", location="/a", num_samples=10, fingerprint="g")},
        {"teachers": {"alpha": teacher_spec(codec="f16"), "beta": teacher_spec(width=4)}},
    ],
)
def test_what_decides_the_rows_is_identity(change: dict[str, object]) -> None:
    assert spec(**change).cache_id != spec().cache_id
    assert spec(**change).content_id("alpha") != spec().content_id("alpha")


def test_a_further_teacher_leaves_the_others_what_they_were() -> None:
    grown = spec(
        teachers={"alpha": teacher_spec(), "beta": teacher_spec(width=4), "gamma": teacher_spec(width=6)}
    )
    assert grown.content_id("alpha") == spec().content_id("alpha")
    assert grown.cache_id != spec().cache_id


def test_an_edited_cache_json_is_refused() -> None:
    text = spec().model_dump_json().replace('"fingerprint":"f"', '"fingerprint":"h"')
    with pytest.raises(ValidationError, match=r"cache\.json was edited"):
        CacheSpec.model_validate_json(text)


def test_shards_hold_whole_samples() -> None:
    with pytest.raises(ValidationError, match="multiple of num_views"):
        spec(rows_per_shard=7)
    assert [list(spec().shard_rows(shard))[-1] for shard in range(3)] == [7, 15, 19]
    assert [spec().shard_samples(shard) for shard in range(3)] == [range(4), range(4, 8), range(8, 10)]
    with pytest.raises(IndexError):
        spec().shard_rows(3)


@pytest.mark.parametrize("version", [SCHEMA_VERSION - 1, SCHEMA_VERSION + 1])
def test_a_cache_of_another_schema_is_refused(tmp_path: Path, version: int) -> None:
    make_cache(tmp_path / "cache", make_images(tmp_path / "images", 3))
    path = tmp_path / "cache" / "cache.json"
    content = json.loads(path.read_text()) | {"schema_version": version, "checksum": UNSEALED}
    path.write_bytes(seal(json.dumps(content).encode()))
    with pytest.raises(
        CacheError, match=rf"schema_version(.|\n)*schema {SCHEMA_VERSION}(.|\n)*build it again"
    ):
        FeatureCache.open(tmp_path / "cache")
