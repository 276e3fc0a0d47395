"""Training from tars in the order in which they hold the rows, through `webdataset`: one long read a tar,
where the random-access loader asks for each row.

`webdataset` iterates the tars and shuffles. By hand remain: opening the tars, since its `gopen` starts
`curl`, knows no `s3://` and has neither the cache's credentials nor retries; the split by process,
since its `split_by_node` asks the environment and not the run; and the rows' checksums and number, since for
`tarfile` a tar that is cut between two members has simply ended.

A stream cannot keep all that `ShardShuffleSampler` promises: its order depends on the number of processes,
an epoch need not hold every sample once, and neighbours in a tar stay near each other. What it keeps: every
process takes as many steps; a pass over the cache, as long as `num_views` epochs, shows every view of every
sample once; the order is a function of seed and step, so a run goes on exactly where it stopped.
"""

import random
import tarfile
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import lru_cache
from io import BufferedReader
from itertools import count, groupby, islice
from typing import Any

import numpy as np

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import RecipeError, extra
from teachercache.pipeline.loading.sampler import ShardShuffleSampler
from teachercache.pipeline.ordered_map import ordered_map
from teachercache.pipeline.records.rows import Ints
from teachercache.pipeline.records.spec import IMAGES
from teachercache.pipeline.stores.feature_store import unreadable
from teachercache.pipeline.stores.shard_format import checksum
from teachercache.pipeline.stores.webdataset_store import member_key, read_tar_index

_AHEAD = 4  # members of each tar that are read before they are asked for
_BLOCK = 1 << 20

StreamedRow = dict[str, bytes]  # a row's safetensors by teacher, and under IMAGES the image if it was copied


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
        if cache.spec.store != "webdataset":
            raise RecipeError(
                "A stream reads tars from front to back.",
                got=f"a cache with store: {cache.spec.store}, whose rows are read one by one",
                expected="a cache with store: webdataset",
                do="teachercache convert CACHE -o NEW --to webdataset, or leave loader.kind out",
            )
        with extra("train"):
            from webdataset.filters import shuffle
        super().__init__(cache, teachers, rank=rank, world_size=world_size, **options)
        self._rank, self._world_size = rank, world_size
        self._mixed = lambda rows, rng: shuffle(shuffle_buffer, initial=shuffle_buffer, rng=rng)(rows)
        rows = np.sort(cache.index.rows(self._samples[:, None], np.arange(cache.num_views)).ravel())
        shards, starts = np.unique(rows // cache.spec.rows_per_shard, return_index=True)
        self._rows = dict(zip(shards.tolist(), np.split(rows, starts[1:]), strict=True))
        self._next, self._plan = -1, iter(list[tuple[int, int]]())
        self._drawn = lru_cache(maxsize=4)(self._draw)

    def batch(self, step: int) -> Ints:
        return self._drawn(step)[:, 1]

    def epochs(self, step: int) -> Ints:
        """Another number for each view of a sample in each pass, by which windows and jitter are drawn."""
        passes, rows = self._drawn(step).T
        return passes * self.cache.num_views + self.cache.index.locate(rows)[1]

    def shards(self, number: int) -> dict[int, Ints]:
        """The rows of this process's shards in one pass, in order."""
        order = self._generator(number).permutation(list(self._rows))
        own = order[(self._rank - number * order.size) % self._world_size :: self._world_size]
        return {shard: self._rows[shard] for shard in own.tolist()}

    def taken(self, step: int) -> tuple[int, list[int]]:
        """The pass that the first row of a step is of, and the rows of that pass that come before it."""
        before = step * self.batch_size_per_process
        for number in count():
            num_rows = sum(rows.size for rows in self.shards(number).values())
            if before < num_rows:
                break
            before -= num_rows
        return number, list(islice(self._shuffled(number), before))

    def _shuffled(self, number: int) -> Iterator[int]:
        rows = (row for of_shard in self.shards(number).values() for row in of_shard.tolist())
        return self._mixed(rows, random.Random(int(self._generator(number, 1).integers(2**63))))

    def _draw(self, step: int) -> Ints:
        """(b, 2): pass and row."""
        if step != self._next:
            first, before = self.taken(step)
            rows = ((number, row) for number in count(first) for row in self._shuffled(number))
            self._plan = islice(rows, len(before), None)
        self._next = step + 1
        return np.array(list(islice(self._plan, self.batch_size_per_process)), np.int64)


class TarStream:
    """What tars hold of the rows that a `StreamSampler` draws, from `start_step` on; for one thread.

    Tars of which no row is left to take are skipped; a resumed run reads those of which some is.
    """

    def __init__(
        self, cache: FeatureCache, sampler: StreamSampler, teachers: Sequence[str], images: bool, step: int
    ) -> None:
        self._cache, self._teachers = cache, teachers
        self._copies = images and cache.spec.images == "copy"
        # Drawn later: as many as the sampler's buffer holds, and of a row the passes in their order.
        self._held = dict[int, deque[StreamedRow]]()
        self._rows = self._passes(sampler, step)

    def take(self, rows: Ints) -> list[StreamedRow]:
        """Raises `CorruptShardError` for a tar that ends early or holds other rows."""
        return [self._taken(row) for row in rows.tolist()]

    def close(self) -> None:
        self._rows.close()

    def _taken(self, wanted: int) -> StreamedRow:
        while wanted not in self._held:
            row, found = next(self._rows)
            self._held.setdefault(row, deque()).append(found)
        first = self._held[wanted].popleft()
        if not self._held[wanted]:
            del self._held[wanted]
        return first

    def _passes(self, sampler: StreamSampler, step: int) -> Generator[tuple[int, StreamedRow]]:
        first, taken = sampler.taken(step)
        for number in count(first):
            for shard, rows in sampler.shards(number).items():
                left = np.setdiff1d(rows, taken if number == first else [])
                if left.size:
                    yield from self._shard(shard, left)

    def _shard(self, shard: int, rows: Ints) -> Iterator[tuple[int, StreamedRow]]:
        """These rows of a shard, from the tars of all teachers and of the images side by side."""
        samples, views, _ = (part.tolist() for part in self._cache.index.locate(rows))
        keys = [member_key(self._cache.key(sample)) for sample in samples]
        stems = [f"{key}.{view}" for key, view in zip(keys, views, strict=True)]
        wanted = dict.fromkeys(self._teachers, stems)
        if self._copies and self._cache.committed(IMAGES)[shard]:
            wanted[IMAGES] = keys
        with ExitStack() as stack:
            columns = [self._column(stack, shard, *one) for one in wanted.items()]
            for row in rows.tolist():
                yield row, dict(zip(wanted, map(next, columns), strict=True))

    def _column(self, stack: ExitStack, shard: int, name: str, stems: Sequence[str]) -> Iterator[bytes]:
        """The members of a teacher's tar, by their names without suffix, from a thread that reads ahead."""
        [tar] = self._cache.shards[name].files(shard)
        distinct = [stem for stem, _ in groupby(stems)]
        members = stack.enter_context(closing(self._members(name, tar, distinct)))
        pool = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="stream"))
        found = ordered_map(pool, lambda _: next(members), distinct, _AHEAD)
        stack.callback(found.close)
        for (_, same), data in zip(groupby(stems), found, strict=True):
            yield from (data for _ in same)

    def _members(self, name: str, tar: str, stems: Sequence[str]) -> Generator[bytes]:
        from webdataset.tariterators import tar_file_expander

        storage, wanted, checksums = self._cache.storage, set(stems), set[int]()
        try:
            if name != IMAGES:
                checksums |= {*read_tar_index(storage, tar, self._cache.spec.rows_per_shard)[:, 2].tolist()}
            with storage.open_read(tar) as file:
                unbuffered: Any = file
                source = {"url": tar, "stream": BufferedReader(unbuffered, _BLOCK)}
                found = tar_file_expander([source], select_files=lambda n: n.rpartition(".")[0] in wanted)
                for stem in stems:
                    member: dict[str, Any] = next(found, {})
                    if member.get("fname", "").rpartition(".")[0] != stem:
                        raise ValueError(f"it ends early, without {stem}")
                    if checksums and int.from_bytes(checksum(member["data"]), "little") not in checksums:
                        raise ValueError(f"the checksum of {stem} is wrong")
                    yield member["data"]
        except (tarfile.TarError, ValueError, EOFError, FileNotFoundError) as error:
            raise unreadable(storage, name, ValueError(f"{tar} is not whole: {error}")) from error
