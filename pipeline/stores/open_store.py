"""Open the store that reads and writes a cache's shards."""

from teachercache.pipeline.places.local_storage import LocalStorage
from teachercache.pipeline.places.storage import Storage
from teachercache.pipeline.records.spec import CacheSpec
from teachercache.pipeline.stores.feature_store import FeatureStore
from teachercache.pipeline.stores.webdataset_store import WebDatasetStore
from teachercache.pipeline.stores.zarr_store import DirectStore, RangeStore, ZarrStore


def open_store(
    storage: Storage, spec: CacheSpec, *, direct: bool = True, checksums: bool = False
) -> FeatureStore:
    """The store of the cache `spec`; see `FeatureCache.open`."""
    if spec.store == "webdataset":
        return WebDatasetStore(storage, spec)
    if not direct:
        return ZarrStore(storage, spec)
    if isinstance(storage, LocalStorage):
        return DirectStore(storage, spec, checksums)
    return RangeStore(storage, spec)
