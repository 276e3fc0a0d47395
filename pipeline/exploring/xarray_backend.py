"""`xarray.open_datatree(cache)` and `open_dataset(cache, group=…)` know a cache by its files."""

import os
from pathlib import Path
from typing import Any

from teachercache.pipeline.errors import extra
from teachercache.pipeline.records.manifest import SPEC_NAME

with extra("view"):
    from xarray.backends.zarr import ZarrBackendEntrypoint


class CacheEntrypoint(ZarrBackendEntrypoint):
    """xarray's own for Zarr, which knows folders by the suffix `.zarr` alone."""

    description = "Open caches of teachercache"

    def guess_can_open(self, filename_or_obj: Any) -> bool:
        names = (SPEC_NAME, "zarr.json")
        is_path = isinstance(filename_or_obj, str | os.PathLike)
        return is_path and all((Path(filename_or_obj) / name).is_file() for name in names)
