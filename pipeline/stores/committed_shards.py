"""Which shards and rows of a teacher a cache holds, and whether its files are the committed ones."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from teachercache.pipeline.errors import CacheError, CorruptShardError
from teachercache.pipeline.records.manifest import CommitRecord, Manifest
from teachercache.pipeline.records.rows import RowIndex
from teachercache.pipeline.records.spec import IMAGES
from teachercache.pipeline.stores.feature_store import FeatureStore


class CommittedShards:
    """The committed shards of one teacher, or of the copied images (teacher "images").

    Each record and the ends of each file are read once; a cache sees later commits when it is reopened.
    """

    def __init__(self, store: FeatureStore, teacher: str) -> None:
        self.store, self.teacher, self.index = store, teacher, RowIndex(store.spec.segments)
        self._storage, self._spec, self._manifest = store.storage, store.spec, Manifest(store.storage)
        self._records: dict[int, CommitRecord] = {}
        self._sound, self._sound_lock = set[int](), threading.Lock()

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        """Which shards are committed."""
        mask = np.zeros(self._spec.num_shards, bool)
        mask[[shard for shard in self._manifest.committed_shards(self.teacher) if shard < len(mask)]] = True
        return mask

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
        for shard, record in self._manifest.commits(self.teacher, unknown).items():
            if (mismatch := record.mismatch(self._spec)) is not None:
                raise CorruptShardError(
                    f"Shard {shard} of {self.teacher} does not belong to this cache.",
                    got=f"a commit record that {mismatch}",
                    expected="the record that the build wrote",
                    do=f"run: teachercache repair {self._storage.url}",
                )
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
        except CacheError:
            shards = rows // self._spec.rows_per_shard
            mask, numbers = np.zeros(rows.size, bool), np.unique(shards)
            if numbers.size > 1:
                lower = shards < numbers[numbers.size // 2]
                for half in (lower, ~lower):
                    mask[half] = self.readable_rows(rows[half])
            return mask

    def require_touched(self, shards: NDArray[np.int64]) -> None:
        """`require_ends` of those of these committed shards that have not been checked yet."""
        if not self._touched[shards].all():
            new = np.unique(shards[~self._touched[shards]])
            self.require_ends(new.tolist())
            self._touched[new] = True

    def require_ends(self, shards: Sequence[int]) -> None:
        """Compare the first and last bytes of committed shards with their records.

        Raises `CorruptShardError`.
        """
        records = self.records(shards).values()
        try:
            exchanged = self._manifest.exchanged(records)
        except FileNotFoundError as error:
            raise self._another_file(str(error), "no such file") from error
        if exchanged and (self.teacher == IMAGES or self.store.is_as_written(self.teacher)):
            raise self._another_file(exchanged[0], "a file whose first or last bytes have changed")

    def require_sound(self, shard: int) -> None:
        """Compare every byte of a committed shard with its record, once in this process.

        Raises `CorruptShardError`.
        """
        with self._sound_lock:
            if shard in self._sound:
                return
            for name, file in self.records([shard])[shard].files.items():
                actual = self._storage.checksum(name) if self._storage.exists(name) else None
                if actual != file.checksum:
                    raise self._another_file(name, "no such file" if actual is None else f"checksum {actual}")
            self._sound.add(shard)

    def _another_file(self, name: str, got: str) -> CorruptShardError:
        return CorruptShardError(
            f"{name} is not the file that was committed.",
            got=got,
            expected="the file that its commit record states",
            do=f"run: teachercache verify {self._storage.url}, then repair, which recomputes such files",
        )
