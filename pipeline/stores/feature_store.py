"""What every feature store promises: one writer writes whole shards once; rows are read in any order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from teachercache.pipeline.errors import CorruptShardError
from teachercache.pipeline.places.files import ChecksumWriter
from teachercache.pipeline.places.storage import Storage
from teachercache.pipeline.records.array_layout import ArrayLayout
from teachercache.pipeline.records.manifest import FileRecord, Manifest
from teachercache.pipeline.records.spec import IMAGES, CacheSpec, TeacherSpec
from teachercache.pipeline.records.view_policy import ViewPolicy

Arrays = dict[str, NDArray]

CLS_TOKEN = "cls"
GLOBAL_FEATURE = "global"
NORMS = "norms"
PIXELS = "pixels"  # of rendered images


def teacher_layouts(teacher: TeacherSpec) -> dict[str, ArrayLayout]:
    """Every array of a teacher: those of its codec, ‖t‖ for the adjoint grid, token features on request."""
    from teachercache.pipeline.codecs import get_codec  # with torch, which takes longer than a look at a row

    codec = get_codec(teacher.codec)
    layouts = codec.layout(teacher.num_levels, teacher.stored_grid, teacher.width)
    if teacher.grid.kind == "adjoint":
        attributes = {"of": "native map"}
        layouts[NORMS] = ArrayLayout((teacher.num_levels,), np.dtype("float32"), ("level",), attributes)
    if teacher.cls_token:
        shape = teacher.num_levels, teacher.width
        layouts[CLS_TOKEN] = ArrayLayout(shape, codec.token_dtype, ("level", "channel"), {})
    if teacher.global_width:
        layouts[GLOBAL_FEATURE] = ArrayLayout((teacher.global_width,), codec.token_dtype, ("channel",), {})
    return layouts


def pixels_layout(views: ViewPolicy) -> ArrayLayout:
    """Of the views as a student sees them."""
    return ArrayLayout((3, *views.stored_size), np.dtype("uint8"), ("channel", "y", "x"), {})


def unreadable(storage: Storage, what: str, error: Exception) -> CorruptShardError:
    return CorruptShardError(
        f"Features of teacher {what} cannot be read.",
        got=f"{type(error).__name__}: {error}",
        expected="the bytes that the commit records state",
        do=f"run: teachercache verify {storage.url}",
    )


class NewFiles(ABC):
    """Files that get their names together. A context manager: those not published at its end are dropped."""

    def __init__(self, storage: Storage, names: Iterable[str]) -> None:
        with ExitStack() as stack:
            self._files: dict[str, ChecksumWriter] = {
                name: stack.enter_context(storage.open_write(name)) for name in names
            }
            self._unpublished = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        dropped = GeneratorExit()
        self._unpublished.__exit__(type(dropped), dropped, None)

    def publish(self) -> dict[str, FileRecord]:
        """Finish the files and make them appear under their names. Returns their records."""
        self._end()
        self._unpublished.close()
        return {name: FileRecord.of(file) for name, file in self._files.items()}

    @abstractmethod
    def _end(self) -> None:
        """Write what follows the last row."""


class ShardWriter(NewFiles):
    """Takes the rows of one shard in ascending order; rows never written are absent."""

    def __init__(self, store: FeatureStore, teacher: str, shard: int) -> None:
        super().__init__(store.storage, store.shard_files(teacher, shard))
        self._layouts = store.layouts(teacher)

    @abstractmethod
    def write(self, offsets: Sequence[int], arrays: Mapping[str, NDArray]) -> None:
        """Write rows at `offsets` within the shard; rows are the first axis of every array."""


class FeatureStore(ABC):
    """The rows of every teacher of one cache, as its spec says; reopen it after the cache has grown."""

    def __init__(self, storage: Storage, spec: CacheSpec) -> None:
        self.storage, self.spec = storage, spec

    @cached_property
    def samples(self) -> pa.Table:
        """One line per sample. Raises as `Manifest.samples`."""
        return Manifest(self.storage).samples(self.spec)

    def key(self, sample_index: int) -> str:
        return self.samples["key"][sample_index].as_py()

    def layouts(self, name: str) -> dict[str, ArrayLayout]:
        """Every array of a teacher, or of the rendered images (name "images")."""
        if name != IMAGES:
            return teacher_layouts(self.spec.teachers[name])
        return {PIXELS: pixels_layout(self.spec.views)}

    def _description(self, name: str) -> dict[str, Any]:
        """What the files beside the arrays repeat of the spec."""
        key, part = ("views", self.spec.views) if name == IMAGES else ("teacher", self.spec.teachers[name])
        return {key: part.model_dump(mode="json"), "content_id": self.spec.shard_content_id(name, 0)}

    @abstractmethod
    def layout_files(self, teacher: str | None) -> dict[str, bytes]:
        """The files, by name, that describe a teacher's arrays or (None) lead to all teachers, which older
        caches lack; the spec determines them."""

    @abstractmethod
    def shard_files(self, teacher: str, shard: int) -> list[str]:
        """The names of a shard's files, in the same order for all shards; no file depends on its name."""

    def stored_layouts(self, teacher: str) -> dict[str, ArrayLayout]:
        """Every array of a teacher as its own files describe it. Raises `CorruptShardError`."""
        try:
            return self._stored_layouts(teacher)
        except (FileNotFoundError, ValueError) as error:
            raise unreadable(self.storage, teacher, error) from error

    @abstractmethod
    def _stored_layouts(self, teacher: str) -> dict[str, ArrayLayout]: ...

    def is_as_written(self, teacher: str) -> bool:
        """Whether a teacher's arrays still have our layout: others may have recompressed them."""
        return True

    def create(self, teacher: str | None) -> None:
        """Write these `layout_files`; where they exist, update those that the cache's growth changes."""
        for name, data in self.layout_files(teacher).items():
            if not self.storage.exists(name) or self.storage.read(name) != data:
                self.storage.write(name, data)

    @abstractmethod
    def write_shard(self, teacher: str, shard: int) -> ShardWriter:
        """A writer whose files appear, whole, when it publishes them, and not at all if it fails."""

    @abstractmethod
    def read(self, teacher: str, rows: NDArray[np.int64], out: Arrays) -> None:
        """Fill the arrays of `out`, by name, with `rows` in that order, rows first.

        `out` is C-contiguous, with the shapes and dtypes of `teacher_layouts`. Raises `CorruptShardError`
        for files that are not a sound shard, and for an empty row.
        """
