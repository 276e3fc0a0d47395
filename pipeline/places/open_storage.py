"""The storage at a path or URL."""

import os

from teachercache.pipeline.places.hub_storage import PROTOCOL, HubStorage
from teachercache.pipeline.places.local_storage import LocalStorage
from teachercache.pipeline.places.remote_storage import RemoteStorage
from teachercache.pipeline.places.storage import Storage


def open_storage(url: str | os.PathLike[str]) -> Storage:
    """The storage at a local path or an fsspec URL."""
    text = os.fspath(url)
    if "://" in text and not text.startswith("file://"):
        return HubStorage(text) if text.startswith(PROTOCOL) else RemoteStorage(text)
    return LocalStorage(text.removeprefix("file://"))
