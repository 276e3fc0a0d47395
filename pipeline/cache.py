"""`FeatureCache`: a cache on disk, opened for reading. Lazy, picklable, safe to fork."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

from pipeline.codecs import Codec, Encoded, get_codec
from pipeline.errors import CacheError, IncompleteCacheError
from pipeline.manifest import CommitRecord, Manifest
from pipeline.rows import RowIndex
from pipeline.sources import Source, decode_image, open_source
from pipeline.spec import IMAGES, CacheSpec
from pipeline.storage import Storage
from pipeline.stores.base import FeatureStore, teacher_layouts
from pipeline.stores.image_tar import image_tar_name
from pipeline.stores.zarr_store import ZarrStore
from pipeline.views import View, ViewTable


class FeatureCache:
    """Rows of teacher features with the views and images they were computed from.

    Only committed rows can be read; a row of a quarantined sample cannot, since it holds nothing.
    """

    def __init__(self, storage: Storage, spec: CacheSpec, images: str | None = None) -> None:
        self.storage = storage
        self.spec = spec
        self._images = images
        self.manifest = Manifest(storage)
        self.index = RowIndex(spec.segments)
        self.store: FeatureStore = ZarrStore(storage)

    @classmethod
    def open(cls, path: str | os.PathLike[str], images: str | None = None) -> FeatureCache:
        """Open a cache at a folder or URL. `images`: where the source images are now, if they moved.

        Raises `CacheNotFoundError` where there is none, `CacheError` where it cannot be understood.
        """
        storage = Storage.at(path)
        return cls(storage, Manifest(storage).spec(), images)

    def __reduce__(self) -> tuple[object, ...]:  # another process opens its own files
        return (FeatureCache, (self.storage, self.spec, self._images))

    @property
    def teachers(self) -> list[str]:
        return list(self.spec.teachers)

    @property
    def num_samples(self) -> int:
        return self.spec.dataset.num_samples

    @property
    def num_views(self) -> int:
        return self.spec.views.num_views

    @property
    def num_rows(self) -> int:
        return self.spec.num_rows

    @cached_property
    def samples(self) -> pa.Table:
        """One line a sample, `pipeline.sources.SAMPLE_SCHEMA`."""
        return self.manifest.samples().combine_chunks()

    @cached_property
    def views(self) -> ViewTable:
        return ViewTable(self.manifest.views())

    @cached_property
    def source(self) -> Source:
        """The images that the cache was built from, or where they are now."""
        return open_source(self._images or self.spec.dataset.location, self.spec.dataset.kind)

    def codec(self, teacher: str) -> Codec:
        return self._codecs[teacher]

    @cached_property
    def _codecs(self) -> dict[str, Codec]:
        return {name: get_codec(teacher.codec) for name, teacher in self.spec.teachers.items()}

    def check_teachers(self, teachers: Sequence[str] | None) -> list[str]:
        """`teachers`, or all of them. Raises `CacheError` for a name that this cache does not hold."""
        names = self.teachers if teachers is None else list(teachers)
        for name in names:
            if name not in self.spec.teachers:
                near = difflib.get_close_matches(name, self.teachers, 1)
                raise CacheError(
                    "This cache holds no teacher of that name.",
                    got=name,
                    expected=f"one of {', '.join(self.teachers)}",
                    do=f"did you mean {near[0]}?" if near else "add the teacher with `teachercache build`",
                )
        return names

    def committed(self, teacher: str) -> NDArray[np.bool_]:
        """Which shards of a teacher are committed."""
        if teacher not in self._committed:
            mask = np.zeros(self.spec.num_shards, bool)
            mask[[shard for shard in self.manifest.committed(teacher) if shard < len(mask)]] = True
            self._committed[teacher] = mask
        return self._committed[teacher]

    @cached_property
    def _committed(self) -> dict[str, NDArray[np.bool_]]:
        return {}

    def commits(self, teacher: str) -> dict[int, CommitRecord]:
        if teacher not in self._commits:
            self._commits[teacher] = self.manifest.commits(
                teacher, np.flatnonzero(self.committed(teacher)).tolist()
            )
        return self._commits[teacher]

    @cached_property
    def _commits(self) -> dict[str, dict[int, CommitRecord]]:
        return {}

    def require_complete(self, teachers: Sequence[str] | None = None) -> None:
        """Raises `IncompleteCacheError` unless every shard of these teachers is committed."""
        missing = {name: int((~self.committed(name)).sum()) for name in self.check_teachers(teachers)}
        if any(missing.values()):
            raise IncompleteCacheError(
                f"The cache at {self.storage.url} is not complete.",
                got=", ".join(
                    f"{name}: {count} of {self.spec.num_shards} shards missing"
                    for name, count in missing.items()
                ),
                expected="every shard committed",
                do="run the same build command again; it computes only what is missing",
            )

    def valid_samples(self, teachers: Sequence[str] | None = None) -> NDArray[np.int64]:
        """Ascending indices of the samples that have every view of every one of these teachers."""
        self.require_complete(teachers)
        valid = np.ones(self.num_samples, bool)
        for name in self.check_teachers(teachers):
            valid[self.index.locate(self._invalid_rows(name))[0]] = False
        return np.flatnonzero(valid)

    def _invalid_rows(self, teacher: str) -> NDArray[np.int64]:
        rows = [row for record in self.commits(teacher).values() for row in record.invalid_rows]
        return np.array(sorted(rows), np.int64)

    def read(self, rows: ArrayLike, teachers: Sequence[str] | None = None) -> dict[str, Encoded]:
        """Encoded features of `rows` by teacher; `.decode(device, dtype)` gives (rows, levels, H, W, C).

        Raises `IndexError` for a row that is not in the cache, `IncompleteCacheError` for one whose
        shard is not committed, `CacheError` for one whose image was quarantined.
        """
        rows = np.atleast_1d(np.asarray(rows, np.int64))
        names = self.check_teachers(teachers)
        encoded = {}
        for name in names:
            self._require_rows(name, rows)
            codec = self.codec(name)
            teacher = self.spec.teachers[name]
            arrays = list(codec.layout(teacher.num_levels, teacher.stored_grid, teacher.width))
            values = self.store.read(self.spec, name, rows, arrays)
            encoded[name] = Encoded(codec, {key: torch.from_numpy(value) for key, value in values.items()})
        return encoded

    def read_tokens(self, rows: ArrayLike, teacher: str, name: str) -> Tensor:
        """`cls` (rows, levels, C) or `global` (rows, D) of a teacher that stores it."""
        rows = np.atleast_1d(np.asarray(rows, np.int64))
        self.check_teachers([teacher])
        self._require_rows(teacher, rows)
        if name not in teacher_layouts(self.spec.teachers[teacher]):
            raise CacheError(
                f"Teacher {teacher} of this cache has no stored {name} feature.",
                expected="a cache built with cls_token: true (or global_feature: true) for this teacher",
                do="build the teacher again under another name with that setting",
            )
        return torch.from_numpy(self.store.read(self.spec, teacher, rows, [name])[name])

    def _require_rows(self, teacher: str, rows: NDArray[np.int64]) -> None:
        self.index.locate(rows)
        committed = self.committed(teacher)[rows // self.spec.rows_per_shard]
        if not committed.all():
            shards = np.unique(rows[~committed] // self.spec.rows_per_shard)
            raise IncompleteCacheError(
                f"Rows of teacher {teacher} were asked for that are not committed.",
                got=f"shard {', '.join(map(str, shards[:10]))}",
                expected="rows of committed shards",
                do="run the same build command again; it computes only what is missing",
            )
        invalid = np.intersect1d(rows, self._invalid_rows(teacher))
        if invalid.size:
            samples, _, _ = self.index.locate(invalid)
            raise CacheError(
                f"Row {invalid[0]} holds nothing: its image could not be decoded.",
                got=f"sample {self.key(int(samples[0]))}",
                expected="rows of `valid_samples()`",
                do=f"see {self.storage.url}/quarantine for the reason",
            )

    def key(self, sample_index: int) -> str:
        key: str = self.samples["key"][sample_index].as_py()
        return key

    def find(self, key: str) -> int:
        """The index of the sample with this key. Raises `KeyError` naming the nearest keys."""
        index: int = pc.index(self.samples["key"], key).as_py()
        if index < 0:
            near = difflib.get_close_matches(key, self.samples["key"].to_pylist(), 3)
            raise KeyError(
                f"no sample {key!r} in this cache" + (f"; near: {', '.join(near)}" if near else "")
            )
        return index

    def view(self, row: int) -> View:
        return self.views.view(int(self.index.locate(row)[2]))

    def image(self, sample_index: int) -> Image.Image:
        """The decoded source image. Raises `ImageDecodeError`."""
        return decode_image(self.image_bytes(sample_index))

    def image_bytes(self, sample_index: int) -> bytes:
        """The encoded image: from the cache's own copies where it has them."""
        if self.spec.images == "copy" and self._images is None:
            return self.storage.read_range(*self._copies[sample_index])
        return self.source_bytes(sample_index)

    def source_bytes(self, sample_index: int) -> bytes:
        """The image as the source holds it, whatever was copied."""
        path, offset, nbytes = (
            self.samples[name][sample_index].as_py() for name in ("path", "offset", "nbytes")
        )
        return self.source.read(path, offset, nbytes)

    @cached_property
    def _copies(self) -> dict[int, tuple[str, int, int]]:
        """(tar, offset, nbytes) of every copied image, from the commit records of the tars."""
        copies = {}
        for shard, record in self.commits(IMAGES).items():
            samples = self.spec.shard_samples(shard)
            for sample, (offset, nbytes) in zip(samples, record.members, strict=True):
                copies[sample] = (image_tar_name(shard), offset, nbytes)
        return copies
