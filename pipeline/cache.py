"""`FeatureCache`: a cache on disk, opened for reading. Lazy, picklable, safe to fork."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

from pipeline.codecs import ArrayLayout, Codec, Encoded, get_codec
from pipeline.errors import CacheError, IncompleteCacheError, explain
from pipeline.manifest import CommitRecord, Manifest
from pipeline.rows import RowIndex
from pipeline.sources import Source, decode_image, open_source
from pipeline.spec import IMAGES, CacheSpec
from pipeline.storage import LocalStorage, Storage
from pipeline.stores.base import FeatureStore, feature_arrays, teacher_layouts
from pipeline.stores.direct_store import DirectStore
from pipeline.stores.image_tar import image_tar_name
from pipeline.stores.zarr_store import ZarrStore
from pipeline.views import View, ViewTable


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
        self.storage = storage
        self.spec = spec
        self._images = images
        self._reading = direct, checksums
        self.manifest = Manifest(storage)
        self.index = RowIndex(spec.segments)
        self.store: FeatureStore = (
            DirectStore(storage, checksums)
            if direct and isinstance(storage, LocalStorage)
            else ZarrStore(storage)
        )

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

        Local shards are read directly; `direct=False` leaves them to zarr-python, as those of an object
        store are: the same rows, slower. Rows read directly are verified only with `checksums`.

        Raises `CacheNotFoundError` where there is none, `CacheError` where it cannot be understood.
        """
        storage = Storage.at(path)
        return cls(storage, Manifest(storage).spec(), images, direct, checksums)

    def __reduce__(self) -> tuple[object, ...]:  # another process opens its own files
        return (FeatureCache, (self.storage, self.spec, self._images, *self._reading))

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
        return {name: self._load_codec(name) for name in self.spec.teachers}

    def _load_codec(self, name: str) -> Codec:
        teacher = self.spec.teachers[name]
        codec = get_codec(teacher.codec)
        if codec.needs_tables:
            codec.load_state(self.manifest.tables(name, teacher.tables_hash))
        return codec

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

    def read(
        self,
        rows: ArrayLike,
        teachers: Sequence[str] | None = None,
        out: Mapping[str, Encoded] | None = None,
    ) -> dict[str, Encoded]:
        """Encoded features of `rows` by teacher; `.decode(device, dtype)` gives (rows, levels, H, W, C).

        `out`: buffers of `buffers()` for at least as many rows; what is returned are their first ones.
        Filling fresh memory costs several times as much.

        Raises `IndexError` for a row that is not in the cache, `IncompleteCacheError` for one whose
        shard is not committed, `CacheError` for one whose image was quarantined, `CorruptShardError` for
        damaged files, `ValueError` for buffers that do not fit.
        """
        rows = np.atleast_1d(np.asarray(rows, np.int64))
        encoded = {}
        for name in self.check_teachers(teachers):
            arrays = None if out is None else out[name].arrays
            layouts = self.feature_layouts(name)
            encoded[name] = Encoded(self.codec(name), self._read(rows, name, layouts, arrays))
        return encoded

    def read_tokens(self, rows: ArrayLike, teacher: str, name: str, out: Tensor | None = None) -> Tensor:
        """`cls` (rows, levels, C) or `global` (rows, D) of a teacher that stores it; `out` as in `read`."""
        rows = np.atleast_1d(np.asarray(rows, np.int64))
        self.check_teachers([teacher])
        if name not in self._layouts[teacher]:
            raise CacheError(
                f"Teacher {teacher} of this cache has no stored {name} feature.",
                expected="a cache built with cls_token: true (or global_feature: true) for this teacher",
                do="build the teacher again under another name with that setting",
            )
        layouts = {name: self._layouts[teacher][name]}
        return self._read(rows, teacher, layouts, None if out is None else {name: out})[name]

    def buffers(
        self, num_rows: int, teachers: Sequence[str] | None = None, *, pin_memory: bool = False
    ) -> dict[str, Encoded]:
        """Memory to read into, again and again, for `read(rows, teachers, out=buffers)`."""
        return {
            name: Encoded(
                self.codec(name),
                {
                    key: torch.empty((num_rows, *layout.shape), dtype=layout.dtype, pin_memory=pin_memory)
                    for key, layout in self.feature_layouts(name).items()
                },
            )
            for name in self.check_teachers(teachers)
        }

    def layouts(self, teacher: str) -> dict[str, ArrayLayout]:
        """Every array of a teacher: those of its encoded features, and its token features."""
        return self._layouts[teacher]

    def feature_layouts(self, teacher: str) -> dict[str, ArrayLayout]:
        return self._feature_layouts[teacher]

    @cached_property
    def _layouts(self) -> dict[str, dict[str, ArrayLayout]]:
        return {name: teacher_layouts(teacher) for name, teacher in self.spec.teachers.items()}

    @cached_property
    def _feature_layouts(self) -> dict[str, dict[str, ArrayLayout]]:
        return {
            name: {array: self._layouts[name][array] for array in feature_arrays(teacher)}
            for name, teacher in self.spec.teachers.items()
        }

    def _read(
        self,
        rows: NDArray[np.int64],
        teacher: str,
        layouts: Mapping[str, ArrayLayout],
        out: Mapping[str, Tensor] | None,
    ) -> dict[str, Tensor]:
        self._require_rows(teacher, rows)
        if out is None:
            tensors = {
                name: torch.empty((len(rows), *layout.shape), dtype=layout.dtype)
                for name, layout in layouts.items()
            }
        else:
            tensors = {name: out[name][: len(rows)] for name in layouts}
            for name, layout in layouts.items():
                _require_fit(name, tensors[name], (len(rows), *layout.shape), layout.dtype)
        self.store.read(self.spec, teacher, rows, {name: tensor.numpy() for name, tensor in tensors.items()})
        return tensors

    def _require_rows(self, teacher: str, rows: NDArray[np.int64]) -> None:
        readable = self._readable(teacher)
        if rows.size and (rows.min() < 0 or rows.max() >= readable.size or not readable[rows].all()):
            self._refuse(teacher, rows)

    def _readable(self, teacher: str) -> NDArray[np.bool_]:
        """Which places of a teacher's shards hold a row that can be read."""
        if teacher not in self._readable_rows:
            committed = np.repeat(self.committed(teacher), self.spec.rows_per_shard)
            readable = np.zeros_like(committed)
            for segment in self.spec.segments:
                rows = slice(segment.first_row, segment.first_row + segment.num_rows)
                readable[rows] = committed[rows]
            readable[self._invalid_rows(teacher)] = False
            self._readable_rows[teacher] = readable
        return self._readable_rows[teacher]

    @cached_property
    def _readable_rows(self) -> dict[str, NDArray[np.bool_]]:
        return {}

    def _refuse(self, teacher: str, rows: NDArray[np.int64]) -> NoReturn:
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


def _require_fit(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if (tuple(tensor.shape), tensor.dtype) != (shape, dtype) or not tensor.is_contiguous():
        raise ValueError(
            explain(
                f"The buffer for {name} does not fit.",
                got=f"{tensor.dtype} {tuple(tensor.shape)}",
                expected=f"{dtype} {shape}, contiguous",
                do="make the buffers with cache.buffers(), for as many rows as are read at once",
            )
        )
