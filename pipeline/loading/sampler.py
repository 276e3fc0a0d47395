"""Which rows each process trains on, and in which order.

The samples of a run form one endless stream: the epochs' permutations, one behind the other. Global
batch g is samples [g·B, (g+1)·B) of that stream, and rank r of W takes its r-th part of B/W. So every
epoch holds every sample exactly once, batches are always full, every rank takes the same number of
steps, W processes of batch b see what one process of batch W·b sees, and the only state of the
sampler is the number of the step.

An epoch is shuffled in two levels, because shards lie on disks and in object stores: the order of
the shards, then the samples within windows of `window_shards` consecutive shards of that order.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import xxhash

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.crops import uniforms
from teachercache.pipeline.errors import CacheError
from teachercache.pipeline.records.rows import Ints


def random_samples(num_samples: int, fraction: float, seed: int = 0) -> Ints:
    """Ascending indices of a random `fraction` of the samples; a smaller one is a part of a larger one."""
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
    count = round(fraction * num_samples)
    return np.sort(generator.permutation(num_samples)[:count]).astype(np.int64)


def held_out_samples(sample_keys: Sequence[str], fraction: float, seed: int) -> Ints:
    """Ascending indices of about a `fraction` of the samples, by a number that is drawn of each key and the
    seed: as a cache grows, those that it had stay in or out."""
    named = [f"validation/{key}" for key in sample_keys]
    return np.flatnonzero(uniforms(seed, named, np.zeros(1, np.int64), draws=1) < fraction)


class ShardShuffleSampler:
    """Batches of rows, deterministic by (seed, epoch).

    Sample s in epoch e is seen through view (e + offset(s)) % num_views, with a fixed random offset,
    so a batch mixes views and num_views epochs see each of them once. An epoch holds a random `fraction` of
    the samples, the one that `teachercache subset` keeps; of these only those `among` some, where given.

    Raises `IncompleteCacheError` unless these teachers are complete, and `CacheError` when not one
    sample is valid for all of them.
    """

    def __init__(
        self,
        cache: FeatureCache,
        teachers: Sequence[str] | None = None,
        *,
        batch_size_per_process: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        window_shards: int = 16,
        fraction: float = 1.0,
        among: Ints | None = None,
    ) -> None:
        self.cache = cache
        self.batch_size_per_process = batch_size_per_process
        self.global_batch_size = batch_size_per_process * world_size
        self._first_of_rank = batch_size_per_process * rank
        self._seed = seed
        chosen = random_samples(cache.num_samples, fraction)
        chosen = chosen if among is None else np.intersect1d(chosen, among, assume_unique=True)
        self._samples = np.intersect1d(cache.valid_samples(teachers), chosen, assume_unique=True)
        if not chosen.size:
            raise CacheError(
                "This part of the cache is too small to hold a sample.",
                got=f"a fraction of {fraction:g} of {cache.num_samples} samples"
                + ("" if among is None else f", among {among.size} of them"),
                expected="at least one",
                do="choose another multitask.dataset.fraction or validation.fraction, or more images",
            )
        if not self._samples.size:
            raise CacheError(
                "This cache has no sample to train on.",
                got=f"{chosen.size} of {cache.num_samples} samples, all quarantined for these teachers",
                expected="at least one decodable image",
                do=f"see {cache.storage.url}/quarantine for the reasons",
            )
        shards = cache.index.rows(self._samples, 0) // cache.spec.rows_per_shard
        self._shard_starts = np.flatnonzero(np.diff(shards, prepend=-1))
        self._shard_stops = np.append(self._shard_starts[1:], self._samples.size)
        self._window_shards = window_shards
        self._view_offset = xxhash.xxh3_64_intdigest(b"view offset", seed)
        self._epoch_windows = lru_cache(maxsize=4)(self._draw_epoch)
        self._window = lru_cache(maxsize=4)(self._draw_window)

    @property
    def num_samples(self) -> int:
        """Samples of one epoch."""
        return int(self._samples.size)

    def batch(self, step: int) -> Ints:
        """This rank's rows of one global batch, at the cost of the windows it touches."""
        return self.rows_at(self.positions(step))

    def rows_at(self, positions: Ints) -> Ints:
        """The rows at these places of the stream, ascending."""
        epochs = positions // self.num_samples
        samples = np.concatenate(
            [
                self._epoch_slice(int(epoch), positions[epochs == epoch] % self.num_samples)
                for epoch in np.unique(epochs)
            ]
        )
        # A multiplicative hash: one offset for each sample.
        offsets = (samples * 0x9E3779B1 + self._view_offset % 2**31) >> 15
        return self.cache.index.rows(samples, (epochs + offsets) % self.cache.num_views)

    def epochs(self, step: int) -> Ints:
        """The epoch of each of these rows."""
        return self.positions(step) // self.num_samples

    def positions(self, step: int) -> Ints:
        """The places of this rank's rows in the stream of samples."""
        start = step * self.global_batch_size + self._first_of_rank
        return np.arange(start, start + self.batch_size_per_process)

    def _epoch_slice(self, epoch: int, positions: Ints) -> Ints:
        ends = self._epoch_windows(epoch)[1]
        windows = np.searchsorted(ends, positions, side="right")
        parts = []
        for window in np.unique(windows):
            begin = ends[window - 1] if window else 0
            parts.append(self._window(epoch, int(window))[positions[windows == window] - begin])
        return np.concatenate(parts)

    def _draw_epoch(self, epoch: int) -> tuple[Ints, Ints]:
        """The epoch's order of shards, and where each of its windows ends in the stream of samples."""
        order = self._generator(epoch).permutation(self._shard_starts.size)
        sizes = (self._shard_stops - self._shard_starts)[order]
        first_shards = np.arange(0, sizes.size, self._window_shards)
        return order, np.add.reduceat(sizes, first_shards).cumsum()

    def _draw_window(self, epoch: int, window: int) -> Ints:
        order = self._epoch_windows(epoch)[0]
        shards = order[window * self._window_shards : (window + 1) * self._window_shards]
        parts = [self._samples[self._shard_starts[shard] : self._shard_stops[shard]] for shard in shards]
        return self._generator(epoch, window + 1).permutation(np.concatenate(parts))

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence((self._seed, *key))))
