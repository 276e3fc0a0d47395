"""Where a cache may send its reader by itself: strangers write the place of the images into `cache.json`.

fsspec opens any URL, so whoever looks at a cache would ask whatever host it names, inside a network that its
author cannot reach. What the user names is followed wherever it leads.
"""

from __future__ import annotations

import shlex

from teachercache.pipeline.errors import SourceError

_HERE = ("file", "memory")  # of this machine or this process: nobody is asked
_OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss")
NAME_IMAGES = (
    "images=PATH for `teachercache train`, --images PATH for verbs that have it, "
    "FeatureCache.open(…, images=PATH) in Python"
)


def is_followed(location: str, cache: str) -> bool:
    """Local paths are, and what lies in the bucket that the cache itself was opened from."""
    if "::" in location:  # a chain of protocols, in any of its parts
        return False
    protocol, scheme_ends, _ = location.partition("://")
    return not scheme_ends or protocol in _HERE or _bucket(location) == _bucket(cache) is not None


def require_followed(location: str, cache: str) -> None:
    """Raises `SourceError` for a place that only the user may name."""
    if not is_followed(location, cache):
        raise SourceError(
            "The images of this cache are at a place that is opened only if you name it.",
            got=f"{location}, which {cache}/cache.json states",
            expected="a local path, or the bucket of the cache: any other host was chosen by who wrote the "
            "cache, and would be asked from your machine",
            do=f"if you trust it, name that very place, {shlex.quote(location)}, or where you have the "
            f"images: {NAME_IMAGES}",
        )


def _bucket(url: str) -> tuple[str, str] | None:
    protocol, _, path = url.partition("://")
    return (protocol, path.partition("/")[0]) if protocol in _OBJECT_STORES else None
