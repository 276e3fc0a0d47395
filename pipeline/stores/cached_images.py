"""The images behind the features: from the cache's own copies, or from the source."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import groupby

import xxhash

from teachercache.pipeline.errors import CacheMismatchError, SourceNotFoundError
from teachercache.pipeline.places.own_places import NAME_IMAGES, require_followed
from teachercache.pipeline.records.manifest import SAMPLES_NAME
from teachercache.pipeline.sources import Source, open_source
from teachercache.pipeline.sources.decode import HEAD_BYTES
from teachercache.pipeline.sources.keys import OK
from teachercache.pipeline.sources.several import own_places
from teachercache.pipeline.stores.committed_shards import CommittedShards
from teachercache.pipeline.stores.webdataset_store import image_tar_name


class CachedImages:
    """`place`: where the images are now, if not where `cache.json` says.

    With `checksums`, a tar of copies is read whole before its first image.
    """

    def __init__(self, copies: CommittedShards, place: str | None, checksums: bool) -> None:
        self._copies, self._place, self._checksums = copies, place, checksums
        self._storage, self._spec = copies.store.storage, copies.store.spec

    @cached_property
    def source(self) -> Source:
        """Raises `SourceError` for a place that only `cache.json` names and that is not followed."""
        location = self._spec.dataset.location
        if self._place is None:
            for place in own_places(location, self._spec.dataset.kind):
                require_followed(place, self._storage.url)
        with self._saying_how_to_move(f"nothing at {location}"):
            return open_source(self._place or location, self._spec.dataset.kind)

    def read(self, sample_index: int) -> bytes:
        """The encoded image. Raises as `FeatureCache.image_bytes`."""
        if self._spec.images != "copy" or self._place is not None:
            return self.read_source(sample_index)
        # a tar has the number of the shard that holds its samples' first views
        shard = int(self._copies.index.rows(sample_index, 0)) // self._spec.rows_per_shard
        first_sample = self._spec.shard_samples(shard)[0]
        offset, nbytes = self._copies.records([shard])[shard].members[sample_index - first_sample]
        if self._checksums:
            self._copies.require_sound(shard)
        data = self._storage.read_range(image_tar_name(shard), offset, nbytes)
        if data or nbytes:  # a quarantined sample has no copy
            self.require_cached(sample_index, data)
        return data

    def read_source(self, sample_index: int) -> bytes:
        """The image in the source, even where a copy exists. Raises as `read`."""
        path, offset, nbytes = self._facts(sample_index, "path", "offset", "nbytes")
        source = self.source
        with self._saying_how_to_move(f"no {path} in {self._spec.dataset.location}"):
            data = source.read(path, offset, nbytes)
        self.require_cached(sample_index, data)
        return data

    def stream_source(self, sample_indices: Sequence[int]) -> Iterator[bytes | None]:
        """The images in the source, in order, where it streams; None for those left to `read_source`."""
        for (path, status), run in groupby(sample_indices, lambda one: self._facts(one, "path", "status")):
            places = {index: self._facts(index, "offset", "nbytes") for index in run}
            found = self.source.stream(path, [*places.values()]) if status == OK else iter(())
            for index in places:
                data = next(found, b"")
                yield data if self._is_cached(index, data) else None

    def _facts(self, sample_index: int, *columns: str) -> tuple:
        samples = self._copies.store.samples
        return tuple(samples[name][sample_index].as_py() for name in columns)

    def require_cached(self, sample_index: int, data: bytes) -> None:
        """Without this check, features of one image and pixels of another would train silently."""
        if not self._is_cached(sample_index, data):
            key, nbytes = self._facts(sample_index, "key", "nbytes")
            raise CacheMismatchError(
                f"The image of sample {key} has changed since the cache was planned.",
                got=f"another image of {len(data):,} bytes",
                expected=f"the image of {nbytes:,} bytes that {SAMPLES_NAME} describes",
                do="restore the images as they were, name the place where they are (images=…), "
                "or build a new cache",
            )

    def _is_cached(self, sample_index: int, data: bytes) -> bool:
        found = len(data), xxhash.xxh3_64_intdigest(data[:HEAD_BYTES])
        return found == self._facts(sample_index, "nbytes", "head_hash")

    @contextmanager
    def _saying_how_to_move(self, got: str) -> Iterator[None]:
        """Where only `cache.json` names the images' place, an error says how to name another."""
        try:
            yield
        except SourceNotFoundError as error:
            if self._place is not None:
                raise
            raise SourceNotFoundError(
                "The images are no longer where they were when the cache was built.",
                got=got,
                expected="the images that the cache was built from",
                do=f"check the mount, or name their new place: {NAME_IMAGES}",
            ) from error
