"""Which places a cache may make its reader open: strangers write the images' place into `cache.json`.

fsspec opens any URL, so reading a cache would contact whatever host it names, even inside a network that its
author cannot reach. A place that the user names is always followed.
"""

import shlex

from teachercache.pipeline.errors import SourceError

PIPE = "pipe:"  # what follows is a command
_HERE = ("file", "memory")  # on this machine or in this process: no host is contacted
_OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss")
NAME_IMAGES = (
    "images=PATH for `teachercache train`, --images PATH for verbs that have it, "
    "FeatureCache.open(…, images=PATH) in Python"
)


def is_followed(location: str, cache: str) -> bool:
    """True for local paths, and for the bucket that the cache itself was opened from."""
    if location.startswith(PIPE) or "::" in location:  # "::": a chain of protocols, in any of its parts
        return False
    protocol, scheme_ends, _ = location.partition("://")
    return not scheme_ends or protocol in _HERE or _bucket(location) == _bucket(cache) is not None


def require_followed(location: str, cache: str) -> None:
    """Raises `SourceError` for a place that only the user may name."""
    if not is_followed(location, cache):
        raise SourceError(
            "The images of this cache are at a place that is opened only if you name it.",
            got=f"{location}, from {cache}/cache.json",
            expected="a local path, or the bucket of the cache: the cache's author chose any other host, and "
            "your machine would contact it",
            do=f"if you trust it, name that very place, {shlex.quote(location)}, or where you have the "
            f"images: {NAME_IMAGES}",
        )


def _bucket(url: str) -> tuple[str, str] | None:
    protocol, _, path = url.partition("://")
    return (protocol, path.partition("/")[0]) if protocol in _OBJECT_STORES else None
