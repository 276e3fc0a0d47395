"""Files on an object store, which appear when their upload completes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from pathlib import PurePosixPath
from typing import IO, Any

import fsspec
from fsspec.spec import AbstractBufferedFile
from typing_extensions import Buffer

from teachercache.pipeline.errors import StorageError, extra
from teachercache.pipeline.places.files import ChecksumWriter
from teachercache.pipeline.places.retries import is_passing, retrying
from teachercache.pipeline.places.storage import Item, Result, Storage, safe_name

_REMOTE_THREADS = 16
_HTTP_S = 15.0


def client_options(url: str) -> dict[str, Any]:
    """Options for fsspec in addition to the user's of the protocol (FSSPEC_S3): those of the bucket
    (FSSPEC_BUCKETS, JSON of options by name), and when to give up on a store."""
    protocol, _, path = url.partition("://")
    stated: dict[str, Any] = dict(fsspec.config.conf.get("buckets", {}).get(path.partition("/")[0], {}))
    if protocol in ("http", "https"):
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=_HTTP_S, sock_read=_HTTP_S)
        return {"client_kwargs": {"timeout": timeout}}
    if protocol == "hf":
        return {"skip_instance_cache": True}  # it keeps the listings of all that were opened before
    if protocol not in ("s3", "s3a"):
        return stated
    with extra("s3"):
        from teachercache.pipeline.places.s3_patience import PatientSession

    config = fsspec.config.conf.get("s3", {}).get("config_kwargs", {}) | stated.get("config_kwargs", {})
    return stated | {"config_kwargs": {"http_session_cls": PatientSession, **config}}


class RemoteStorage(Storage):
    """A prefix on an object store, through fsspec. A file appears when its upload completes.

    Listings are not cached, because other machines write to the same place. The client library, s3fs for
    S3, repeats requests that fail temporarily (5xx, throttling, timeouts); reads are repeated here as well.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        options = client_options(self.url)
        self.filesystem, self._root = fsspec.core.url_to_fs(self.url, use_listings_cache=False, **options)

    def __reduce__(self) -> tuple[object, ...]:  # another process has its own threads and connections
        return type(self), (self.url,)

    def _path(self, name: str) -> str:
        return f"{self._root}/{safe_name(name)}"

    def _open(self, name: str) -> IO[bytes]:
        return self.filesystem.open(self._path(name), "rb")

    def _read(self, name: str) -> bytes:
        return self.filesystem.cat_file(self._path(name))

    def _read_range(self, name: str, offset: int, nbytes: int) -> bytes:
        if not nbytes:
            return b""
        try:
            data: bytes = self.filesystem.cat_file(self._path(name), start=offset, end=offset + nbytes)
        except OSError as error:
            if is_passing(error) or isinstance(error, StorageError):
                raise
            size = self.size(name)
            if size is not None and size <= offset:  # object stores refuse an empty range
                return b""
            raise
        return data

    def read_ranges(self, names: Sequence[str], offsets: Sequence[int], nbytes: Sequence[int]) -> list[bytes]:
        paths = [self._path(name) for name in names]
        ends = [offset + length for offset, length in zip(offsets, nbytes, strict=True)]
        return retrying(
            lambda: self.filesystem.cat_ranges(paths, list(offsets), ends, on_error="raise"),
            f"{self.url}/{names[0]}" if len(set(names)) == 1 else f"one of {len(names)} files in {self.url}",
        )

    def each(self, read: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        return list(self._threads.map(read, items))

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(_REMOTE_THREADS, thread_name_prefix="remote")

    def write(self, name: str, data: Buffer) -> None:
        self.filesystem.pipe_file(self._path(name), bytes(data))  # one PUT, where open_write makes several

    def write_new(self, name: str, data: bytes) -> bool:
        try:
            self.filesystem.pipe_file(self._path(name), data, mode="create")
        except FileExistsError:
            return False
        return True

    @contextmanager
    def open_write(self, name: str) -> Iterator[ChecksumWriter]:
        file = self.filesystem.open(self._path(name), "wb", autocommit=False)
        try:
            yield ChecksumWriter(file)
            file.close()
        except BaseException:
            file.discard()
            if isinstance(file, AbstractBufferedFile):
                file.closed = True  # or the garbage collector would flush it
            raise
        file.commit()

    def _size(self, name: str) -> int | None:
        try:
            entry = self.filesystem.info(self._path(name))
        except FileNotFoundError:
            return None
        return entry["size"] if entry["type"] == "file" else None

    def _names(self, folder: str) -> list[str]:
        try:
            entries = self.filesystem.ls(self._path(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(PurePosixPath(entry).name for entry in entries)

    def walk(self, folder: str = "") -> Iterator[tuple[str, int]]:
        pending = [self._path(folder) if folder else self._root]
        while pending:
            path = pending.pop()
            listing = retrying(partial(self.filesystem.ls, path, detail=True), path)
            listed = sorted(listing, key=lambda entry: entry["name"])
            for entry in listed:
                if entry["type"] == "file" and entry["name"] != path:
                    yield entry["name"].removeprefix(f"{self._root}/"), entry["size"]
            pending += [entry["name"] for entry in reversed(listed) if entry["type"] == "directory"]

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of every file below `folder` by name, in few requests where the store lists deep folders."""
        listing = self._retrying(lambda name: self.filesystem.find(self._path(name), detail=True), folder)
        return {path.removeprefix(f"{self._root}/"): int(entry["size"]) for path, entry in listing.items()}

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self.filesystem.rm_file(self._path(name))
