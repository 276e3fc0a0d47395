"""Training from tars in the order in which they hold the rows, through `webdataset`: one long read a tar,
where the random-access loader asks for each row.

`webdataset` iterates the tars and shuffles. By hand remain: opening the tars, since its `gopen` starts
`curl`, knows no `s3://` and has neither the cache's credentials nor retries; the split by process,
since its `split_by_node` asks the environment and not the run; and comparing a tar with its record, since for
`tarfile` one that is cut between two members has simply ended.

A stream cannot keep all that `ShardShuffleSampler` promises: its order depends on the number of processes,
an epoch need not hold every sample once, and neighbours in a tar stay near each other. What it keeps: every
process takes as many steps; a pass over the cache, as long as `num_views` epochs, shows every view of every
sample once; the order is a function of seed and step, so a run goes on exactly where it stopped.
"""

from __future__ import annotations

import io
import random
import tarfile
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, groupby, islice, repeat
from typing import IO, Any

import numpy as np
import xxhash

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import CorruptShardError, RecipeError, extra
from teachercache.pipeline.loading.sampler import Ints, ShardShuffleSampler
from teachercache.pipeline.ordered_map import ordered_map
from teachercache.pipeline.records.spec import IMAGES, CacheSpec
from teachercache.pipeline.stores.tar_index import member_key
from teachercache.pipeline.stores.webdataset_store import row_member

_AHEAD = 4  # members of each tar that are read before they are asked for
_BLOCK = 1 << 20


def require_tars(spec: CacheSpec) -> None:
    """Raises `RecipeError` for a cache whose features are in no tars."""
    if spec.store != "webdataset":
        raise RecipeError(
            "A stream reads tars from front to back.",
            got=f"a cache with store: {spec.store}, whose rows are read one by one",
            expected="a cache with store: webdataset",
            do="teachercache convert CACHE -o NEW --to webdataset, or leave loader.kind out",
        )


class StreamSampler(ShardShuffleSampler):
    """This process's rows: the shards of all passes over the cache form one endless list, of which it takes
    every `world_size`-th; their rows go through a buffer of `shuffle_buffer`, which ends empty in every pass.

    Raises as `ShardShuffleSampler`, and `RecipeError` for a cache without tars.
    """

    def __init__(
        self,
        cache: FeatureCache,
        teachers: Sequence[str] | None = None,
        *,
        shuffle_buffer: int = 256,
        rank: int = 0,
        world_size: int = 1,
        **options: Any,
    ) -> None:
        require_tars(cache.spec)
        with extra("train"):
            import webdataset  # noqa: F401 (imported below when the stream is under way)
        super().__init__(cache, teachers, rank=rank, world_size=world_size, **options)
        self._rank, self._world_size, self._buffer = rank, world_size, shuffle_buffer
        rows = np.sort(cache.index.rows(self._samples[:, None], np.arange(cache.num_views)).ravel())
        shards, starts = np.unique(rows // cache.spec.rows_per_shard, return_index=True)
        self._rows = dict(zip(shards.tolist(), np.split(rows, starts[1:]), strict=True))
        self._next, self._plan = -1, iter(list[tuple[int, int]]())
        self._drawn = lru_cache(maxsize=4)(self._draw)

    def batch(self, step: int) -> Ints:
        return self._drawn(step)[0]

    def epochs(self, step: int) -> Ints:
        """Another number for each view of a sample in each pass, by which windows and jitter are drawn."""
        rows, passes = self._drawn(step)
        return passes * self.cache.num_views + self.cache.index.locate(rows)[1]

    def shards(self, number: int) -> dict[int, Ints]:
        """The rows of this process's shards in one pass, in order."""
        order = self._generator(number).permutation(list(self._rows))
        return {
            shard: self._rows[shard]
            for shard in order[
                (self._rank - number * order.size) % self._world_size :: self._world_size
            ].tolist()
        }

    def taken(self, step: int) -> tuple[int, Ints]:
        """The pass that the first row of a step is of, and the rows of that pass that come before it."""
        before = step * self.batch_size_per_process
        for number in count():
            num_rows = sum(rows.size for rows in self.shards(number).values())
            if before < num_rows:
                return number, np.fromiter(islice(self._shuffled(number), before), np.int64, before)
            before -= num_rows
        raise AssertionError("passes have no end")

    def _shuffled(self, number: int) -> Iterator[int]:
        from webdataset.filters import shuffle

        rows = (row for of_shard in self.shards(number).values() for row in of_shard.tolist())
        drawn = random.Random(int(self._generator(number, 1).integers(2**63)))
        yield from shuffle(self._buffer, initial=self._buffer, rng=drawn)(rows)

    def _draw(self, step: int) -> tuple[Ints, Ints]:
        if step != self._next:
            first, before = self.taken(step)
            rows = ((number, row) for number in count(first) for row in self._shuffled(number))
            self._plan = islice(rows, before.size, None)
        self._next = step + 1
        drawn = np.array(list(islice(self._plan, self.batch_size_per_process)), np.int64)
        return drawn[:, 1], drawn[:, 0]


@dataclass(frozen=True)
class StreamedRow:
    """The safetensors of each teacher, and the encoded image; None where the cache has no copy of it."""

    features: Mapping[str, bytes]
    image: bytes | None


class TarStream:
    """What tars hold of the rows that a `StreamSampler` draws, from `start_step` on; for one thread.

    Tars of which no row is left to take are skipped; a resumed run reads those of which some is.
    """

    def __init__(
        self,
        cache: FeatureCache,
        sampler: StreamSampler,
        teachers: Sequence[str],
        images: bool,
        start_step: int,
    ) -> None:
        self._cache, self._teachers = cache, teachers
        self._copies = images and cache.spec.images == "copy"
        self._held = dict[int, StreamedRow]()  # drawn later: as many as the sampler's buffer holds
        self._rows = self._passes(sampler, start_step)

    def take(self, rows: Ints) -> list[StreamedRow]:
        """Raises `CorruptShardError` for a tar that ends early or is not the one that was committed."""
        return [self._taken(row) for row in rows.tolist()]

    def close(self) -> None:
        self._rows.close()

    def _taken(self, wanted: int) -> StreamedRow:
        while wanted not in self._held:
            row, found = next(self._rows)
            self._held[row] = found
        return self._held.pop(wanted)

    def _passes(self, sampler: StreamSampler, start_step: int) -> Generator[tuple[int, StreamedRow]]:
        first, taken = sampler.taken(start_step)
        for number in count(first):
            for shard, rows in sampler.shards(number).items():
                left = np.setdiff1d(rows, taken, assume_unique=True)
                if left.size:
                    yield from self._shard(shard, left)
            taken = taken[:0]

    def _shard(self, shard: int, rows: Ints) -> Iterator[tuple[int, StreamedRow]]:
        """These rows of a shard, from the tars of all teachers and of the images side by side."""
        from webdataset.tariterators import base_plus_ext

        samples, views, _ = (part.tolist() for part in self._cache.index.locate(rows))
        keys = [member_key(self._cache.key(sample)) for sample in samples]
        members = [row_member(*one) for one in zip(keys, views, strict=True)]
        with ExitStack() as stack:
            features = [self._column(stack, name, shard, members, str) for name in self._teachers]
            images: Iterator[bytes | None] = repeat(None)
            if self._copies and self._cache.committed(IMAGES)[shard]:
                images = self._column(stack, IMAGES, shard, keys, lambda name: base_plus_ext(name)[0])
            for row in rows.tolist():
                of_teachers = dict(zip(self._teachers, map(next, features), strict=True))
                yield row, StreamedRow(of_teachers, next(images))
            for column in (*features, images) if self._copies else features:
                next(column, None)  # to the end of the tar, where it is compared with its record

    def _column(
        self, stack: ExitStack, teacher: str, shard: int, wanted: Sequence[str], name_of: Callable[[str], str]
    ) -> Generator[bytes]:
        """What the tar of a teacher holds under each of the `wanted` names, from a thread reading ahead."""
        names = [name for name, _ in groupby(wanted)]
        members = stack.enter_context(closing(self._members(teacher, shard, names, name_of)))
        pool = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="stream"))
        found = ordered_map(pool, lambda _: next(members, b""), [*names, ""], _AHEAD)
        stack.callback(found.close)
        for _, same in groupby(wanted):
            data = next(found)
            yield from (data for _ in same)
        next(found)

    def _members(
        self, teacher: str, shard: int, names: Sequence[str], name_of: Callable[[str], str]
    ) -> Generator[bytes]:
        """Members of a tar by their names, which are in order; at its end it is compared with its record."""
        from webdataset.tariterators import tar_file_expander

        storage, left, selected = self._cache.storage, deque(names), set(names)
        [(tar, record)] = (
            file
            for file in self._cache.commits(teacher, [shard])[shard].files.items()
            if file[0].endswith(".tar")
        )
        with storage.open_read(tar) as file:
            hashed = _Hashed(file)
            stream = io.BufferedReader(hashed, _BLOCK)
            try:
                for member in tar_file_expander(
                    [{"url": tar, "stream": stream}],
                    select_files=lambda name: name_of(name) in selected,
                    eof_value=None,
                ):
                    if name_of(member["fname"]) != left.popleft():
                        raise tarfile.ReadError("its members are not those of the shard, in order")
                    yield member["data"]
                while stream.read(_BLOCK):
                    pass
            except (tarfile.TarError, ValueError, IndexError, EOFError, zlib.error) as error:
                raise self._damaged(tar, str(error).partition(" @ ")[0]) from error
        if (hashed.nbytes, hashed.checksum) != (record.nbytes, record.checksum):
            raise self._damaged(tar, f"{hashed.nbytes:,} bytes with checksum {hashed.checksum}")
        if left:
            raise self._damaged(tar, f"no {left[0]}")

    def _damaged(self, tar: str, got: str) -> CorruptShardError:
        url = self._cache.storage.url
        return CorruptShardError(
            f"The stream of {tar} is not that of the shard: it ends early, or is damaged.",
            got=got,
            expected="the bytes that its commit record states",
            do=f"run: teachercache verify {url} --full, and repair it or copy it again",
        )


class _Hashed(io.RawIOBase):
    """A file that is hashed as it is read from front to back."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file: Any = file
        self._hash, self.nbytes = xxhash.xxh3_128(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        nbytes: int = self._file.readinto(buffer)
        self._hash.update(memoryview(buffer)[:nbytes])
        self.nbytes += nbytes
        return nbytes

    @property
    def checksum(self) -> str:
        return self._hash.hexdigest()
