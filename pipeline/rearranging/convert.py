"""Copy a cache into the other kind of store."""

from teachercache.pipeline.cache import FeatureCache
from teachercache.pipeline.errors import CacheError
from teachercache.pipeline.rearranging.new_shards import whole_shards
from teachercache.pipeline.rearranging.rearrangement import Rearrangement, lay_out
from teachercache.pipeline.records.spec import StoreKind


def convert(url: str, out: str, store: StoreKind) -> Rearrangement:
    """The same rows in the other kind of store, uncompressed, with the same ids and records.

    Raises `CacheMismatchError` where another cache is at `out`.
    """
    source = FeatureCache.open(url, checksums=True)
    if source.spec.store == store:
        raise CacheError(
            "There is nothing to convert.",
            got=f"{url}, a {store} cache",
            expected="a cache of the other kind",
            do="copy the folder if you want a copy",
        )
    spec = source.spec.changed(store=store, compressor=None)
    target = lay_out(out, spec, [source], source.samples, source.manifest.views(source.spec))
    return Rearrangement(target.storage.url, whole_shards(source, target))
