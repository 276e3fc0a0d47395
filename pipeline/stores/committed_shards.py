"""Which shards and rows of a teacher a cache holds, and whether its files are the committed ones."""

import threading
from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from teachercache.pipeline.errors import CacheError
from teachercache.pipeline.records.integrity import (
    Depth,
    Problem,
    file_problems,
    have_their_ends,
    record_problem,
)
from teachercache.pipeline.records.manifest import CommitRecord, Manifest
from teachercache.pipeline.records.rows import RowIndex
from teachercache.pipeline.stores.feature_store import Arrays, FeatureStore
from teachercache.pipeline.stores.webdataset_store import image_tar_name


class CommittedShards:
    """The committed shards of one teacher, or of the images (teacher "images").

    Each record and the ends of each file are read once; a cache sees later commits when it is reopened.
    """

    def __init__(self, store: FeatureStore, teacher: str) -> None:
        self.store, self.teacher, self.index = store, teacher, RowIndex(store.spec.segments)
        self._storage, self._spec, self.manifest = store.storage, store.spec, Manifest(store.storage)
        self._records: dict[int, CommitRecord] = {}
        self._sound, self._sound_lock = set[int](), threading.Lock()

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        """Which shards are committed."""
        mask = np.zeros(self._spec.num_shards, bool)
        mask[[shard for shard in self.manifest.committed_shards(self.teacher) if shard < len(mask)]] = True
        return mask

    def files(self, shard: int) -> list[str]:
        """The names of a shard's files, without its statistics, in one order for all shards."""
        copied = self.teacher not in self._spec.with_arrays
        return [image_tar_name(shard)] if copied else self.store.shard_files(self.teacher, shard)

    @cached_property
    def _readable(self) -> NDArray[np.bool_]:
        """Marks the rows that are known to hold something, so that a second question costs nothing."""
        return np.zeros(self._spec.num_shards * self._spec.rows_per_shard, bool)

    @cached_property
    def _touched(self) -> NDArray[np.bool_]:
        return np.zeros(self._spec.num_shards, bool)

    def records(self, shards: Iterable[int] | None = None) -> dict[int, CommitRecord]:
        """The commit records of these committed shards, or of all. Raises `CacheError` for damaged ones."""
        numbers = np.flatnonzero(self.mask).tolist() if shards is None else list(shards)
        unknown = [shard for shard in numbers if shard not in self._records]
        for shard, record in self.manifest.commits(self.teacher, unknown).items():
            if (problem := record_problem(record, self._spec)) is not None:
                raise problem.error(self._storage)
            self._records[shard] = record
        return {shard: self._records[shard] for shard in numbers}

    def invalid_rows(self) -> NDArray[np.int64]:
        """The empty rows of committed shards, ascending. Raises as `records`."""
        rows = [row for record in self.records().values() for row in record.invalid_rows]
        return np.array(sorted(rows), np.int64)

    def readable(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these rows are committed and have an image that could be decoded.

        Reads only the records of their shards. Raises as `records`, `IndexError` for unknown rows.
        """
        mask = self._readable
        if rows.size and (rows.min() < 0 or rows.max() >= mask.size or not mask[rows].all()):
            self.index.locate(rows)
            shards = np.unique(rows // self._spec.rows_per_shard)
            for record in self.records(shards[self.mask[shards]].tolist()).values():
                held = np.ones(record.num_rows, bool)
                held[np.array(record.invalid_rows, np.int64) - record.first_row] = False
                mask[record.first_row : record.first_row + record.num_rows] = held
        return mask[rows]

    def readable_rows(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """As `readable`, but where a record is damaged, its shard has no readable row."""
        try:
            return self.readable(rows)
        except CacheError:  # which may be that of one shard among thousands
            shards = rows // self._spec.rows_per_shard
            mask, numbers = np.zeros(rows.size, bool), np.unique(shards)
            if numbers.size > 1:
                lower = shards < numbers[numbers.size // 2]
                for half in (lower, ~lower):
                    mask[half] = self.readable_rows(rows[half])
            return mask

    def read(self, rows: NDArray[np.int64], out: Arrays) -> None:
        """Fill the arrays of `out` with `rows`, which are `readable`, once their shards' ends are checked.

        Raises `CorruptShardError`.
        """
        shards = rows // self._spec.rows_per_shard
        if not self._touched[shards].all():
            self.require_ends(np.unique(shards[~self._touched[shards]]).tolist())
        self.store.read(self.teacher, rows, out)

    def require_ends(self, shards: Sequence[int]) -> None:
        """Compare the first and last bytes of committed shards with their records.

        Raises `CorruptShardError`.
        """
        records = self.records(shards).values()
        try:
            as_committed = have_their_ends(self._storage, records)
        except FileNotFoundError:
            as_committed = False  # which one is missing, is found below
        copied = self.teacher not in self._spec.with_arrays
        if not as_committed and (copied or self.store.is_as_written(self.teacher)):
            for record in records:
                self._refuse(file_problems(self._storage, record, Depth.ENDS))
        self._touched[list(shards)] = True

    def require_sound(self, shard: int) -> None:
        """Compare every byte of a committed shard with its record, once in this process.

        Raises `CorruptShardError`.
        """
        with self._sound_lock:
            if shard not in self._sound:
                self._refuse(file_problems(self._storage, self.records([shard])[shard], Depth.BYTES))
                self._sound.add(shard)

    def _refuse(self, problems: Iterable[Problem]) -> None:
        for problem in problems:
            raise problem.error(self._storage)
