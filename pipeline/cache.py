"""`FeatureCache`: a cache on disk, opened for reading. Lazy and picklable.

A cache on a local disk may be forked. One on an object store may not: fsspec's event loop is a thread, and
a forked child has none. Start processes by "spawn" there (`multiprocessing_context="spawn"`).
"""

from __future__ import annotations

import difflib
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NoReturn, SupportsIndex

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import xxhash
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

from teachercache.pipeline.codecs import ArrayLayout, Codec, Encoded, get_codec
from teachercache.pipeline.errors import (
    CacheError,
    CacheMismatchError,
    CorruptShardError,
    IncompleteCacheError,
    SourceNotFoundError,
    explain,
)
from teachercache.pipeline.places.own_places import NAME_IMAGES, require_followed
from teachercache.pipeline.places.storage import Storage
from teachercache.pipeline.records.feature_stats import FeatureMoments
from teachercache.pipeline.records.manifest import SAMPLES_NAME, CommitRecord, Manifest, tables_name
from teachercache.pipeline.records.rows import RowIndex
from teachercache.pipeline.records.spec import IMAGES, CacheSpec, TeacherSpec
from teachercache.pipeline.sources import Source, decode_image, open_source
from teachercache.pipeline.sources.decode import HEAD_BYTES
from teachercache.pipeline.stores.base import feature_arrays, teacher_layouts
from teachercache.pipeline.stores.image_tar import image_tar_name
from teachercache.pipeline.stores.open_store import open_store
from teachercache.pipeline.views import View, ViewTable

if TYPE_CHECKING:
    from xarray import DataTree

    from teachercache.pipeline.looking.sample_view import SampleView


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
        self._sound, self._sound_lock = set[tuple[str, int]](), threading.Lock()
        self.manifest = Manifest(storage)
        self.index = RowIndex(spec.segments)
        self.store = open_store(storage, spec, self.key, direct=direct, checksums=checksums)

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
        slower. At its first touch a shard's ends are compared with its record, which tells whether it is that
        shard. Rows on a local disk are verified only with `checksums`, all others always; copied images
        only with `checksums`, wherever they are: a tar is read as a whole before its first image.

        Raises `CacheNotFoundError` where there is none, `CacheError` where it cannot be understood.
        """
        storage = Storage.at(path)
        return cls(storage, Manifest(storage).spec(), images, direct, checksums)

    def __reduce__(self) -> tuple[object, ...]:  # another process opens its own files
        return (FeatureCache, (self.storage, self.spec, self._images, *self._reading))

    def reopened(self) -> FeatureCache:
        """The cache as it is now: it may have grown since. Raises as `open` does."""
        return FeatureCache(self.storage, self.manifest.spec(), self._images, *self._reading)

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
        """One line a sample, `teachercache.pipeline.sources.SAMPLE_SCHEMA`."""
        return self.manifest.samples(self.spec)

    @cached_property
    def views(self) -> ViewTable:
        return ViewTable(self.manifest.views(self.spec), self.spec.views.photometric)

    @cached_property
    def source(self) -> Source:
        """The images that the cache was built from, or where they are now.

        Raises `SourceError` where only `cache.json` names a place that is followed by nobody (`own_places`).
        """
        if self._images is None:
            require_followed(self.spec.dataset.location, self.storage.url)
        try:
            return open_source(self._images or self.spec.dataset.location, self.spec.dataset.kind)
        except SourceNotFoundError as error:
            if self._images is not None:
                raise
            raise self._moved() from error

    def codec(self, teacher: str) -> Codec:
        return self._codecs[teacher]

    @cached_property
    def _codecs(self) -> dict[str, Codec]:
        return {name: self.load_codec(name) for name in self.spec.teachers}

    def load_codec(self, name: str) -> Codec:
        """A teacher's codec, its tables read anew. Raises `CacheError` unless they can decode."""
        teacher = self.spec.teachers[name]
        codec = get_codec(teacher.codec)
        if codec.needs_tables:
            tables = self.manifest.tables(name, teacher.tables_hash)
            try:
                codec.load_state(tables)
                Encoded(codec, _empty_row(codec, teacher)).decode()
            except (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError) as error:
                raise CacheError(
                    f"{tables_name(name)} holds no tables of codec {teacher.codec} for teacher {name}.",
                    got=f"{type(error).__name__}: {error}",
                    expected="the tables that the features were encoded with",
                    do="restore it from a copy; the codes cannot be decoded without it",
                ) from error
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

    def commits(self, teacher: str, shards: Iterable[int] | None = None) -> dict[int, CommitRecord]:
        """The commit records of these committed shards, or of all; each is read once."""
        wanted = np.flatnonzero(self.committed(teacher)).tolist() if shards is None else list(shards)
        known = self._commits.setdefault(teacher, {})
        unknown = [shard for shard in wanted if shard not in known]
        for shard, record in self.manifest.commits(teacher, unknown).items():
            if (mismatch := record.mismatch(self.spec)) is not None:
                raise CorruptShardError(
                    f"Shard {shard} of {teacher} is not of this cache.",
                    got=f"a commit record that {mismatch}",
                    expected="the record that the build wrote",
                    do=f"run: teachercache repair {self.storage.url}",
                )
            known[shard] = record
        return {shard: known[shard] for shard in wanted}

    @cached_property
    def _commits(self) -> dict[str, dict[int, CommitRecord]]:
        return {}

    def statistics(self, teacher: str) -> FeatureMoments:
        """Mean, variance and (if the recipe asked for it) covariance of a teacher's features, by level.

        Over all committed rows, on the teacher's own grid and before any codec: one count for each token.
        """
        self.check_teachers([teacher])
        spec = self.spec.teachers[teacher]
        shards = np.flatnonzero(self.committed(teacher)).tolist()
        return self.manifest.moments(teacher, shards, (spec.num_levels, spec.width))

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

    def readable(self, teacher: str, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these rows a teacher holds: committed, and of an image that could be decoded.

        Reads the records of their shards alone. Raises as `commits` does, `IndexError` for unknown rows.
        """
        self.index.locate(rows)
        places = self._readable_places(teacher)
        if not places[rows].all():
            shards = np.unique(rows // self.spec.rows_per_shard)
            committed = shards[self.committed(teacher)[shards]].tolist()
            for record in self.commits(teacher, committed).values():
                held = np.ones(record.num_rows, bool)
                held[np.array(record.invalid_rows, np.int64) - record.first_row] = False
                places[record.first_row : record.first_row + record.num_rows] = held
        return places[rows]

    def readable_rows(self, teacher: str, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """As `readable`, but a shard whose record is damaged holds no row, instead of an error."""
        try:
            return self.readable(teacher, rows)
        except CacheError:
            shards = rows // self.spec.rows_per_shard
            found, known = np.zeros(rows.size, bool), np.unique(shards)
            if known.size > 1:
                lower = shards < known[known.size // 2]
                for half in (lower, ~lower):
                    found[half] = self.readable_rows(teacher, rows[half])
            return found

    def _readable_places(self, teacher: str) -> NDArray[np.bool_]:
        """The places of a teacher's shards that are known to hold a row; a look into it costs nothing."""
        if teacher not in self._places:
            self._places[teacher] = np.zeros(self.spec.num_shards * self.spec.rows_per_shard, bool)
        return self._places[teacher]

    @cached_property
    def _places(self) -> dict[str, NDArray[np.bool_]]:
        return {}

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
        damaged files, `ValueError` for buffers that do not fit and for rows that are no numbers.
        """
        rows = _row_numbers(rows)
        encoded = {}
        for name in self.check_teachers(teachers):
            buffers = None if out is None else out[name].arrays if name in out else {}
            encoded[name] = Encoded(
                self.codec(name), self._read(rows, name, self.feature_layouts(name), buffers)
            )
        return encoded

    def feature_maps(self, teacher: str, rows: NDArray[np.int64]) -> Tensor:
        """Features (rows, levels, H, W, C) float32. Raises as `read` does."""
        return self.read(rows, [teacher])[teacher].decode()

    def read_tokens(self, rows: ArrayLike, teacher: str, name: str, out: Tensor | None = None) -> Tensor:
        """`cls` (rows, levels, C) or `global` (rows, D) of a teacher that stores it; `out` as in `read`."""
        rows = _row_numbers(rows)
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
        """The arrays of a teacher's encoded features alone."""
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
        buffers: Mapping[str, Tensor] | None,
    ) -> dict[str, Tensor]:
        self._require_rows(teacher, rows)
        tensors = {
            name: torch.empty((len(rows), *layout.shape), dtype=layout.dtype)
            if buffers is None
            else _first_rows(buffers, name, (len(rows), *layout.shape), layout.dtype)
            for name, layout in layouts.items()
        }
        self.store.read(teacher, rows, {name: tensor.numpy() for name, tensor in tensors.items()})
        return tensors

    def _require_rows(self, teacher: str, rows: NDArray[np.int64]) -> None:
        known = self._readable_places(teacher)
        if rows.size and (rows.min() < 0 or rows.max() >= known.size or not known[rows].all()):
            readable = self.readable(teacher, rows)
            if not readable.all():
                self._refuse(teacher, rows, readable)
        shards = rows // self.spec.rows_per_shard
        touched = self._touched.setdefault(teacher, np.zeros(self.spec.num_shards, bool))
        if not touched[shards].all():
            new = np.unique(shards[~touched[shards]])
            self.require_ends(teacher, new.tolist())
            touched[new] = True

    @cached_property
    def _touched(self) -> dict[str, NDArray[np.bool_]]:
        return {}

    def require_ends(self, teacher: str, shards: Sequence[int]) -> None:
        """Compare the first and last bytes of committed shards with their records: are these the files?

        Teacher "images" stands for the copied images. Raises `CorruptShardError`.
        """
        records = self.commits(teacher, shards).values()
        try:
            exchanged = self.manifest.exchanged(records)
        except FileNotFoundError as error:
            raise self._another_file(str(error), "no such file") from error
        if exchanged and (teacher == IMAGES or self.store.is_as_written(teacher)):
            raise self._another_file(exchanged[0], "other first or last bytes than were committed")

    def require_sound(self, teacher: str, shard: int) -> None:
        """Compare every byte of a committed shard with its record, once in this process.

        Teacher "images" stands for the copied images. Raises `CorruptShardError`.
        """
        with self._sound_lock:
            if (teacher, shard) in self._sound:
                return
            for name, file in self.commits(teacher, [shard])[shard].files.items():
                found = self.storage.checksum(name) if self.storage.exists(name) else None
                if found != file.checksum:
                    raise self._another_file(name, "no such file" if found is None else f"checksum {found}")
            self._sound.add((teacher, shard))

    def _another_file(self, name: str, got: str) -> CorruptShardError:
        return CorruptShardError(
            f"{name} is not the file that was committed.",
            got=got,
            expected="the file that its commit record states",
            do=f"run: teachercache verify {self.storage.url}, then repair, which computes such files again",
        )

    def _refuse(self, teacher: str, rows: NDArray[np.int64], readable: NDArray[np.bool_]) -> NoReturn:
        committed = self.committed(teacher)[rows // self.spec.rows_per_shard]
        if not committed.all():
            shards = np.unique(rows[~committed] // self.spec.rows_per_shard)
            raise IncompleteCacheError(
                f"Rows of teacher {teacher} were asked for that are not committed.",
                got=f"shard {', '.join(map(str, shards[:10]))}",
                expected="rows of committed shards",
                do="run the same build command again; it computes only what is missing",
            )
        row = int(rows[~readable].min())
        raise CacheError(
            f"Row {row} holds nothing: its image could not be decoded.",
            got=f"sample {self.key(int(self.index.locate(row)[0]))}",
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

    def __getitem__(self, sample: str | SupportsIndex) -> SampleView:
        """A sample by its key or number, which a notebook shows with its maps.

        Raises `KeyError` naming the nearest keys, or `IndexError`.
        """
        from teachercache.pipeline.looking.sample_view import SampleView

        index = self.find(sample) if isinstance(sample, str) else range(self.num_samples)[sample]
        return SampleView(self, index)

    def to_xarray(self, teachers: Sequence[str] | None = None) -> DataTree:
        """The decoded features as labelled arrays that are read when they are used; see `labelled_arrays`."""
        from teachercache.pipeline.looking.labelled_arrays import to_xarray

        return to_xarray(self, teachers)

    def view(self, row: int) -> View:
        return self.views.view(int(self.index.locate(row)[2]))

    def image(self, sample_index: int) -> Image.Image:
        """The decoded source image. Raises `ImageDecodeError`."""
        return decode_image(self.image_bytes(sample_index))

    def image_bytes(self, sample_index: int) -> bytes:
        """The encoded image: from the cache's own copies where it has them.

        Raises `CacheMismatchError` for an image that is not the one that was cached, `CorruptShardError`, in
        a cache opened with `checksums`, for a tar that was damaged.
        """
        if self.spec.images == "copy" and self._images is None:
            shard, offset, nbytes = self._copy(sample_index)
            if self._reading[1]:
                self.require_sound(IMAGES, shard)
            data = self.storage.read_range(image_tar_name(shard), offset, nbytes)
            if data or nbytes:  # a sample that was quarantined has no copy
                self._require_cached_image(sample_index, data)
            return data
        return self.source_bytes(sample_index)

    def source_bytes(self, sample_index: int) -> bytes:
        """The image as the source holds it, whatever was copied. Raises as `image_bytes`."""
        path, offset, nbytes = (
            self.samples[name][sample_index].as_py() for name in ("path", "offset", "nbytes")
        )
        source = self.source
        try:
            data = source.read(path, offset, nbytes)
        except SourceNotFoundError as error:
            if self._images is not None:
                raise
            raise self._moved(path) from error
        self._require_cached_image(sample_index, data)
        return data

    def _require_cached_image(self, sample_index: int, data: bytes) -> None:
        """Features of one image and pixels of another train without a sign."""
        nbytes, head_hash = (self.samples[name][sample_index].as_py() for name in ("nbytes", "head_hash"))
        if (len(data), xxhash.xxh3_64_intdigest(data[:HEAD_BYTES])) != (nbytes, head_hash):
            raise CacheMismatchError(
                f"The image of sample {self.key(sample_index)} has changed since the cache was planned.",
                got=f"another image of {len(data):,} bytes",
                expected=f"the image of {nbytes:,} bytes that {SAMPLES_NAME} describes",
                do="bring the images back as they were, name the place where they are (images=…), "
                "or build a new cache",
            )

    def _moved(self, path: str = "") -> SourceNotFoundError:
        """Only `cache.json` said where the images are; this says how to name another place."""
        location = self.spec.dataset.location
        return SourceNotFoundError(
            "The images are not where the cache was built from them.",
            got=f"no {path} in {location}" if path else f"nothing at {location}",
            expected="the images that the cache was built from",
            do=f"check the mount, or name their new place: {NAME_IMAGES}",
        )

    def _copy(self, sample_index: int) -> tuple[int, int, int]:
        """(shard, offset, nbytes) of a copied image: tars are by the shards of first views."""
        shard = int(self.index.rows(sample_index, 0)) // self.spec.rows_per_shard
        first_sample = self.spec.shard_samples(shard)[0]
        offset, nbytes = self.commits(IMAGES, [shard])[shard].members[sample_index - first_sample]
        return shard, offset, nbytes


def _row_numbers(rows: ArrayLike) -> NDArray[np.int64]:
    numbers = np.atleast_1d(np.asarray(rows))
    if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
        raise ValueError(
            explain(
                "Rows are whole numbers, one behind the other.",
                got=f"{numbers.dtype} of shape {numbers.shape}",
                expected="a number or a list of numbers",
                do="np.flatnonzero() turns a mask into numbers; cache.index.rows() finds those of samples",
            )
        )
    return numbers.astype(np.int64)


def _empty_row(codec: Codec, teacher: TeacherSpec) -> dict[str, Tensor]:
    """Codes of one row, all zero: sound tables decode them to something."""
    layout = codec.layout(teacher.num_levels, teacher.stored_grid, teacher.width)
    return {name: torch.zeros((1, *array.shape), dtype=array.dtype) for name, array in layout.items()}


def _first_rows(
    buffers: Mapping[str, Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """The part of a buffer that is filled. Raises `ValueError` where it does not fit."""
    buffer = buffers.get(name)
    if buffer is not None:
        buffer = buffer[: shape[0]]
        fits = (buffer.shape, buffer.dtype, buffer.device.type) == (shape, dtype, "cpu")
        if fits and buffer.is_contiguous():
            return buffer
    raise ValueError(
        explain(
            f"The buffer for {name} does not fit.",
            got="none" if buffer is None else f"{buffer.dtype} {tuple(buffer.shape)} on {buffer.device}",
            expected=f"{dtype} {shape}, contiguous, on the CPU",
            do="make the buffers with cache.buffers(), for as many rows as are read at once",
        )
    )
