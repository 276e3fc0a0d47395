"""`FeatureCache`: a cache on disk, opened for reading. Lazy and picklable.

A cache on a local disk may be forked. One on an object store may not: fsspec's event loop is a thread, and
a forked child has none. Start processes by "spawn" there (`multiprocessing_context="spawn"`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, SupportsIndex

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

from teachercache.pipeline.codecs import Codec, Encoded
from teachercache.pipeline.errors import ArgumentError, IncompleteCacheError
from teachercache.pipeline.places.open_storage import open_storage
from teachercache.pipeline.places.storage import Storage
from teachercache.pipeline.records.array_layout import ArrayLayout
from teachercache.pipeline.records.feature_stats import FeatureMoments
from teachercache.pipeline.records.manifest import CommitRecord, Manifest
from teachercache.pipeline.records.rows import RowIndex
from teachercache.pipeline.records.spec import IMAGES, CacheSpec
from teachercache.pipeline.records.stats_files import merged_moments
from teachercache.pipeline.records.tables import find_key
from teachercache.pipeline.sources import Source, decode_image
from teachercache.pipeline.stores.cached_images import CachedImages
from teachercache.pipeline.stores.committed_shards import CommittedShards
from teachercache.pipeline.stores.feature_store import PIXELS
from teachercache.pipeline.stores.open_store import open_store
from teachercache.pipeline.stores.teacher_features import StoredFeatures, StoredRows
from teachercache.pipeline.views import View, ViewTable, render_view

if TYPE_CHECKING:
    from xarray import DataTree

    from teachercache.pipeline.exploring.sample_view import SampleView


class FeatureCache:
    """Rows of teacher features with the views and images they were computed from.

    Only committed rows can be read; a row of a quarantined sample cannot, since it holds nothing.
    """

    def __init__(
        self,
        storage: Storage,
        spec: CacheSpec,
        images: str | None = None,
        direct: bool = True,
        checksums: bool = False,
    ) -> None:
        self.storage, self.spec = storage, spec
        self._opened = images, direct, checksums
        self.manifest = Manifest(storage)
        self.index = RowIndex(spec.segments)
        self.store = open_store(storage, spec, direct=direct, checksums=checksums)
        self.shards = {name: CommittedShards(self.store, name) for name in (*spec.teachers, IMAGES)}
        self.features = {name: StoredFeatures(self.shards[name]) for name in spec.teachers}
        self._pixels = StoredRows(self.shards[IMAGES])
        self.images = CachedImages(self.shards[IMAGES], images, checksums)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        images: str | None = None,
        *,
        direct: bool = True,
        checksums: bool = False,
    ) -> FeatureCache:
        """Open a cache at a folder or URL. `images`: where the source images are now, if they moved.

        Uncompressed shards are read directly; `direct=False` leaves them to zarr-python: the same rows,
        slower. The first read of a shard compares the ends of its file with its record, to make sure it is
        that file. Rows on a local disk are verified only with `checksums`, all others always; copied images
        only with `checksums`, wherever they are: their tar is then read whole before its first image.

        Raises `CacheNotFoundError` where there is none, `CacheError` where it cannot be understood.
        """
        storage = open_storage(path)
        return cls(storage, Manifest(storage).spec(), images, direct, checksums)

    def __reduce__(self) -> tuple[object, ...]:  # another process opens its own files
        return (FeatureCache, (self.storage, self.spec, *self._opened))

    def reopened(self) -> FeatureCache:
        """The cache as it is now: it may have grown since. Raises as `open` does."""
        return FeatureCache(self.storage, self.manifest.spec(), *self._opened)

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

    @property
    def samples(self) -> pa.Table:
        """One line per sample, `records.tables.SAMPLE_SCHEMA`."""
        return self.store.samples

    @cached_property
    def views(self) -> ViewTable:
        return ViewTable(self.manifest.views(self.spec), self.spec.views.photometric)

    @property
    def source(self) -> Source:
        """The images that the cache was built from, or where they are now.

        Raises `SourceError` for a place that only `cache.json` names and that is not followed (`own_places`).
        """
        return self.images.source

    def codec(self, teacher: str) -> Codec:
        return self.features[teacher].codec

    def check_teachers(self, teachers: Sequence[str] | None) -> list[str]:
        """`teachers`, or all of them. Raises `CacheError` for a name that this cache does not hold."""
        return self.spec.check_teachers(teachers)

    def committed(self, teacher: str) -> NDArray[np.bool_]:
        """Which shards of a teacher are committed."""
        return self.shards[teacher].mask

    def commits(self, teacher: str, shards: Iterable[int] | None = None) -> dict[int, CommitRecord]:
        """The commit records of these committed shards, or of all; each is read once."""
        return self.shards[teacher].records(shards)

    def statistics(self, teacher: str) -> FeatureMoments:
        """Mean, variance and (if the recipe asked for it) covariance of a teacher's features, by level.

        They cover all committed rows, on the teacher's own grid and before any codec, and count every token.
        """
        self.check_teachers([teacher])
        spec = self.spec.teachers[teacher]
        shards = self.commits(teacher)  # raises for a record that is not of this cache
        return merged_moments(self.manifest, teacher, shards, (spec.num_levels, spec.width))

    def require_complete(self, teachers: Sequence[str] | None = None) -> None:
        """Raises `IncompleteCacheError` unless these teachers, and rendered images, have every shard."""
        wanted = {*self.check_teachers(teachers), IMAGES}
        names = [name for name in self.spec.with_arrays if name in wanted]
        missing = {name: int((~self.committed(name)).sum()) for name in names}
        if any(missing.values()):
            of = f"of {self.spec.num_shards} shards missing"
            raise IncompleteCacheError(
                f"The cache at {self.storage.url} is not complete.",
                got=", ".join(f"{name}: {count} {of}" for name, count in missing.items()),
                expected="every shard committed",
                do="run the same build command again; it computes only what is missing",
            )

    def valid_samples(self, teachers: Sequence[str] | None = None) -> NDArray[np.int64]:
        """Ascending indices of the samples that have every view of every one of these teachers."""
        self.require_complete(teachers)
        valid = np.ones(self.num_samples, bool)
        for name in self.check_teachers(teachers):
            valid[self.index.locate(self.shards[name].invalid_rows())[0]] = False
        return np.flatnonzero(valid)

    def read(
        self,
        rows: ArrayLike,
        teachers: Sequence[str] | None = None,
        out: Mapping[str, Encoded] | None = None,
    ) -> dict[str, Encoded]:
        """Encoded features of `rows` by teacher; `.decode(device, dtype)` gives (rows, levels, H, W, C).

        `out`: buffers from `buffers()` for at least as many rows; views of their first rows are returned.
        Filling fresh memory costs several times as much.

        Raises `IndexError` for a row that is not in the cache, `IncompleteCacheError` for one whose
        shard is not committed, `CacheError` for one whose image was quarantined, `CorruptShardError` for
        damaged files, `ValueError` for buffers that do not fit and for rows that are not whole numbers.
        """
        rows = _row_numbers(rows)
        encoded = {}
        for name in self.check_teachers(teachers):
            features = self.features[name]
            buffers = None if out is None else out[name].arrays if name in out else {}
            encoded[name] = Encoded(features.codec, features.read(rows, features.feature_layouts, buffers))
        return encoded

    def feature_maps(self, teacher: str, rows: NDArray[np.int64]) -> Tensor:
        """Features (rows, levels, H, W, C) float32. Raises as `read` does."""
        return self.read(rows, [teacher])[teacher].decode()

    def read_tokens(self, rows: ArrayLike, teacher: str, name: str, out: Tensor | None = None) -> Tensor:
        """`cls` (rows, levels, C) or `global` (rows, D) of a teacher that stores it; `out` as in `read`."""
        rows = _row_numbers(rows)
        self.check_teachers([teacher])
        features = self.features[teacher]
        layouts = {name: features.token_layout(name)}
        return features.read(rows, layouts, None if out is None else {name: out})[name]

    def buffers(self, num_rows: int, teachers: Sequence[str] | None = None) -> dict[str, Encoded]:
        """Reusable memory for `read(rows, teachers, out=buffers)`."""
        return {name: self.features[name].buffers(num_rows) for name in self.check_teachers(teachers)}

    def layouts(self, teacher: str) -> dict[str, ArrayLayout]:
        """Every array of a teacher: those of its encoded features, and its token features."""
        return self.features[teacher].layouts

    def key(self, sample_index: int) -> str:
        return self.store.key(sample_index)

    def find(self, key: str, *, whole: bool = False) -> int:
        """The index of the sample with this key or, unless it must be `whole`, of the only one that ends so.

        Raises `UnknownKeyError` naming those that end so, or else the nearest.
        """
        return find_key(self.samples["key"], key, whole=whole)

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[SampleView]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, sample: str | SupportsIndex) -> SampleView:
        """A sample by its key, the end of its key or its number, which a notebook shows with its maps.

        Raises as `find`, or `IndexError`.
        """
        from teachercache.pipeline.exploring.sample_view import SampleView

        index = self.find(sample) if isinstance(sample, str) else range(self.num_samples)[sample]
        return SampleView(self, index)

    def __repr__(self) -> str:
        samples = f"{self.num_samples:,} samples × {self.num_views} views"
        return f"FeatureCache({self.storage.url!r}: {samples} of {', '.join(self.teachers) or 'no teacher'})"

    def _repr_html_(self) -> str:
        from teachercache.pipeline.exploring.sample_view import cache_table

        return cache_table(self)

    def to_xarray(self, teachers: Sequence[str] | None = None) -> DataTree:
        """The decoded features as labelled arrays that are read when they are used; see `labelled_arrays`."""
        from teachercache.pipeline.exploring.labelled_arrays import to_xarray

        return to_xarray(self, teachers)

    def view(self, row: int) -> View:
        return self.views.view(int(self.index.locate(row)[2]))

    def pixels(self, rows: ArrayLike, out: Tensor | None = None) -> Tensor:
        """The stored views of `rows`, uint8 (rows, 3, H, W) of `views.stored_size`, as a student sees them.

        As the build rendered them where `images` is "rendered", else rendered from the images. `out` and
        errors as those of `read`, or as those of `image_bytes`.
        """
        rows = _row_numbers(rows)
        if self.spec.images == "rendered":
            buffers = None if out is None else {PIXELS: out}
            return self._pixels.read(rows, self._pixels.layouts, buffers)[PIXELS]
        if out is None:
            out = torch.empty(len(rows), 3, *self.spec.views.stored_size, dtype=torch.uint8)
        for row, pixels in zip(rows.tolist(), out[: len(rows)], strict=True):
            render_view(self.image(int(self.index.locate(row)[0])), self.view(row), out=pixels)
        return out[: len(rows)]

    def image(self, sample_index: int) -> Image.Image:
        """The decoded source image. Raises `ImageDecodeError`."""
        return decode_image(self.image_bytes(sample_index))

    def image_bytes(self, sample_index: int) -> bytes:
        """The encoded image, from the cache's own copies where it has them.

        Raises `CacheMismatchError` for an image other than the one that was cached, and `CorruptShardError`,
        in a cache opened with `checksums`, for a damaged tar.
        """
        return self.images.read(sample_index)


def _row_numbers(rows: ArrayLike) -> NDArray[np.int64]:
    numbers = np.atleast_1d(np.asarray(rows))
    if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
        raise ArgumentError(
            "Rows must be a list of whole numbers.",
            got=f"{numbers.dtype} of shape {numbers.shape}",
            expected="a number or a list of numbers",
            do="turn a mask into numbers with np.flatnonzero(); find the rows of samples with "
            "cache.index.rows()",
        )
    return numbers.astype(np.int64)
