"""Where images lie: a location, split into a folder and a selection of its files."""

import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import fsspec
import xxhash

from teachercache.pipeline.errors import SourceError, SourceNotFoundError, TeacherCacheError, extra
from teachercache.pipeline.places.local_storage import LocalStorage
from teachercache.pipeline.places.open_storage import open_storage
from teachercache.pipeline.places.own_places import PIPE
from teachercache.pipeline.places.remote_storage import client_options
from teachercache.pipeline.places.retries import retrying
from teachercache.pipeline.places.storage import Storage

_MAGIC = re.compile(r"[*?[]")


@dataclass(frozen=True)
class Place:
    """A folder (everything below it), one file, or the files that match a pattern such as `train-*.tar`.

    `storage` is the folder that sample paths are relative to: the folder itself, the one that holds
    the file, or the part of a location before the first component with `*`, `?` or `[`.
    `**` matches folders of any depth.
    """

    location: str
    storage: Storage
    selection: str | None = None  # a file name or a pattern, relative to `storage`

    @classmethod
    def at(cls, location: str | os.PathLike[str]) -> Self:
        """Raises `SourceNotFoundError`. A local location becomes absolute; `pipe:` commands are run."""
        if os.fspath(location).startswith(PIPE):
            return cls(os.fspath(location), _fetched(os.fspath(location)))
        text = os.fspath(location).removeprefix("file://")
        if "://" not in text:
            text = str(Path(text).expanduser().absolute())
        try:
            filesystem, path = fsspec.core.url_to_fs(text, **client_options(text))
            is_folder, is_file = retrying(partial(_is_folder_or_file, filesystem, path), text)
        except TeacherCacheError:
            raise
        except Exception as error:  # every object store has its own errors for hosts, buckets and credentials
            raise SourceError(
                "This place cannot be opened.",
                got=f"{text}: {type(error).__name__}: {error}",
                expected="a local path, or a URL that fsspec can open and you may read",
                do="install what is missing, or check the URL; for s3:// also AWS_ACCESS_KEY_ID, "
                "AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL",
            ) from error
        if is_folder:
            return cls(text, open_storage(text))
        folder, _, name = text.rpartition("/")
        if is_file:
            return cls(text, open_storage(folder or "/"), name)
        if magic := _MAGIC.search(text):
            folder, _, _ = text[: magic.start()].rpartition("/")
            place = cls(text, open_storage(folder or "/"), text[len(folder) + 1 :])
            if any(True for _ in place.files()):
                return place
        raise SourceNotFoundError(
            "There is nothing at this place.",
            got=text,
            expected="a folder of images, a tar or Parquet file, or a folder or pattern of those",
            do="check the path, and that the disk or bucket is mounted and readable here",
        )

    @staticmethod
    def root(location: str, paths: Iterable[str]) -> str:
        """The folder that samples' `paths` are relative to, from names alone: nothing need exist there."""
        folder, _, name = location.rpartition("/")
        if magic := _MAGIC.search(location):
            return location[: magic.start()].rpartition("/")[0] or "/"
        return (folder if set(paths) == {name} else location.rstrip("/")) or "/"

    @property
    def is_local(self) -> bool:
        return isinstance(self.storage, LocalStorage)

    def files(self) -> Iterator[tuple[str, int]]:
        """(path relative to `storage`, bytes) of every selected file, in the same order on every system."""
        if self.selection is None:
            yield from self.storage.walk()
        elif (nbytes := self.storage.size(self.selection)) is not None:
            yield self.selection, nbytes
        elif isinstance(self.storage, LocalStorage):
            root = self.storage.root
            for path in sorted(root.glob(self.selection)):
                if path.is_file():
                    yield path.relative_to(root).as_posix(), path.stat().st_size
        else:
            filesystem, root_path = fsspec.core.url_to_fs(
                self.storage.url, **client_options(self.storage.url)
            )
            for name, entry in sorted(filesystem.glob(f"{root_path}/{self.selection}", detail=True).items()):
                if entry["type"] == "file":
                    yield name.removeprefix(f"{root_path}/"), entry["size"]


def _is_folder_or_file(filesystem: Any, path: str) -> tuple[bool, bool]:
    """Raises where a store does not answer; `isdir` and `isfile` would return False."""
    try:
        kind = filesystem.info(path)["type"]
    except (FileNotFoundError, NotADirectoryError):
        return False, False
    if kind == "file" and "http" in filesystem.protocol:  # over HTTP every page is a file, even a listing
        return filesystem.isdir(path), True
    return kind == "directory", kind == "file"


def _fetched(location: str) -> LocalStorage:
    """The folder with the tars that commands print: `pipe:curl -s https://host/train-{000..146}.tar`.

    `webdataset` finds the braces (`expand_urls`) and runs the commands (`gopen`). A build reads images by key
    and more than once, which no pipe gives, so each tar is streamed once into a folder and then read there as
    any other; those of an earlier run are kept. Raises `SourceError` for a command that fails, and for a tar
    that ends early.
    """
    with extra("build"):
        from webdataset.gopen import gopen
        from webdataset.shardlists import expand_urls
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    storage = LocalStorage(caches / "teachercache/pipes" / xxhash.xxh3_64_hexdigest(location.encode()))
    for number, url in enumerate(expand_urls(location)):
        if storage.exists(name := f"{number:06d}.tar"):
            continue
        end = b""
        try:
            with storage.open_write(name) as file, gopen(url) as stream:
                while block := stream.read(1 << 20):
                    file.write(block)
                    end = (end + block)[-tarfile.BLOCKSIZE :]
                if end != bytes(tarfile.BLOCKSIZE):
                    raise EOFError(f"{file.nbytes:,} bytes without the zeros that end a tar")
        except (EOFError, OSError) as error:
            raise SourceError(
                f"The stream of {url} ends early, or cannot be read.",
                got=error,
                expected="a command that prints a whole tar and exits with 0",
                do="try the command in a shell, and run the same build again: whole tars are kept",
            ) from error
    return storage
