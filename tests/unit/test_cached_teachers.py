"""A cache in somebody else's loop: torch's loaders give what it holds; pixels of another crop are refused."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from teachercache import CachedTeachers, FeatureCache, ShardBatches, render_view
from teachercache.pipeline.errors import CacheMismatchError, UnknownKeyError
from tests.make_cache import make_cache, make_images, teacher_spec


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CachedTeachers:
    """7 samples × 2 views in shards of 3; sample 4 could not be decoded."""
    folder = tmp_path_factory.mktemp("cached")
    teachers = {"alpha": teacher_spec(cls_token=True), "beta": teacher_spec(width=4, grid=3, codec="bf16")}
    cache = make_cache(
        folder / "cache", make_images(folder / "images", 7), teachers=teachers, invalid_samples=[4]
    )
    return CachedTeachers(cache)


def by_row(data: CachedTeachers, batch: dict[str, Any]) -> list[int]:
    """The rows of a batch, found by its keys and views."""
    samples = [data.cache.find(key) for key in batch["key"]]
    rows: list[int] = data.cache.index.rows(samples, batch["view"].numpy()).tolist()
    return rows


def check(data: CachedTeachers, batch: dict[str, Any]) -> list[int]:
    cache, rows = data.cache, by_row(data, batch)
    for name, features in data.decode(batch).items():
        assert features.equal(cache.read(rows)[name].decode())
    assert batch["cls"]["alpha"].equal(cache.read_tokens(rows, "alpha", "cls"))
    assert set(batch["cls"]) == {"alpha"}
    for row, pixels, crop in zip(rows, batch["pixels"], batch["crop"], strict=True):
        view = cache.view(row)
        assert pixels.equal(render_view(cache.image(row // 2), view))
        assert crop.tolist() == [*view.box, view.flip]
    return rows


def test_torchs_own_loader_shuffles_it(data: CachedTeachers) -> None:
    batches = [check(data, batch) for batch in DataLoader(data, batch_size=5, shuffle=True)]
    assert [len(rows) for rows in batches] == [5, 5, 2]
    assert sorted(row for rows in batches for row in rows) == [row for row in range(14) if row not in (8, 9)]


def test_an_item_is_a_row_of_a_batch(data: CachedTeachers) -> None:
    item, batch = data[-1], data[[0, 11]]
    assert item["key"] == batch["key"][1] == data.cache.key(6)
    assert item["pixels"].equal(batch["pixels"][1])
    assert item["codes"]["beta"]["codes"].equal(batch["codes"]["beta"]["codes"][1])
    with pytest.raises(IndexError):
        data[12]


def test_workers_read_shard_by_shard(data: CachedTeachers) -> None:
    loader = DataLoader(data, sampler=ShardBatches(data, 4), batch_size=None, num_workers=2)
    rows = [check(data, batch) for batch in loader]
    assert len(loader) == len(rows) == 2
    assert {row // 2 for batch in rows for row in batch} == {0, 1, 2, 3, 5, 6}


@pytest.mark.parametrize("world_size", [1, 2])
def test_processes_divide_an_epoch_as_distributed_samplers_do(data: CachedTeachers, world_size: int) -> None:
    ranks = [ShardBatches(data, 2, rank=rank, world_size=world_size) for rank in range(world_size)]
    shown = []
    for epoch in range(2):
        for one in ranks:
            one.set_epoch(epoch)
        steps = list(zip(*ranks, strict=True))
        assert len(steps) == len(ranks[0]) == -(-6 // (2 * world_size))
        indices = np.concatenate([batch for step in steps for batch in step])
        shown.append(data.rows[indices[:6]])
        assert sorted(row // 2 for row in shown[epoch].tolist()) == [0, 1, 2, 3, 5, 6]
    assert set(shown[0].tolist()) | set(shown[1].tolist()) == set(data.rows.tolist()), "each view once"
    assert list(ranks[0]) == list(ranks[0]), "an epoch is the same when it is begun again"


def test_targets_for_another_data_set(data: CachedTeachers) -> None:
    keys, views = [data.cache.key(5), data.cache.key(0)], [1, 0]
    rows = data.cache.index.rows([5, 0], views)
    crops = torch.tensor([data.cache.view(row).crop for row in rows])
    found = data.targets(keys, views, crops)
    for name, expected in data.cache.read(rows).items():
        assert found[name].equal(expected.decode())


def test_pixels_of_another_crop_or_flip_are_refused(data: CachedTeachers) -> None:
    key = data.cache.key(2)
    own, other = (torch.tensor([data.cache.view(row).crop]) for row in (4, 5))
    mirrored = own.clone()
    mirrored[:, 4] = 1 - mirrored[:, 4]
    for crops in (mirrored, other, own + torch.tensor([1.0, 0, 0, 0, 0])):
        with pytest.raises(CacheMismatchError, match=f"pixels of {key} are not those .* in row 4"):
            data.targets([key], [0], crops)
    with pytest.raises(UnknownKeyError, match=key):
        data.targets([key[1:]], [0], own)
    with pytest.raises(IndexError):
        data.targets([key], [2], own)


def test_it_opens_a_place_and_goes_to_another_process(data: CachedTeachers) -> None:
    opened = CachedTeachers(Path(data.cache.storage.url), ["beta"])
    again = pickle.loads(pickle.dumps(opened))  # noqa: S301
    assert isinstance(again.cache, FeatureCache)
    assert again[3]["codes"].keys() == {"beta"}
    assert again[3]["codes"]["beta"]["codes"].equal(opened[3]["codes"]["beta"]["codes"])
