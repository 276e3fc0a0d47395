"""Images as files, in folders of any depth."""

import errno
import os
import stat
from collections.abc import Iterator
from functools import partial
from itertools import islice
from posixpath import splitext

from teachercache.pipeline.places.local_storage import LocalStorage
from teachercache.pipeline.places.retries import retrying
from teachercache.pipeline.sources.source import SampleRows, Scanned, Source, file_kind, is_image_name

_FILES_PER_UNIT = 1024
_REMOTE_FILES_PER_UNIT = 16  # one request each, and the units of a source run side by side

Files = list[tuple[str, int]]


class ImageFolderSource(Source):
    """Images below a folder, by suffix in any case; hidden files and folders (.name) are left out.

    The key is the path without its suffix (with it, where two files differ in nothing else); the label is
    the name of the folder that holds the file.
    """

    kind = "image_folder"

    def units(self) -> Iterator[Files]:
        files = iter(self.place.files())
        size = _FILES_PER_UNIT if self.place.is_local else _REMOTE_FILES_PER_UNIT
        while unit := list(islice(files, size)):
            yield unit

    def scan_unit(self, unit: Files) -> Scanned:
        rows = SampleRows()
        for path, nbytes in unit:
            if not _is_sample(path):
                rows.left_out[file_kind(path)] += 1
                continue
            rows.add(splitext(path)[0], path, path, 0, nbytes, _label(path), partial(self._read_first, path))
        return rows.scanned()

    def labels(self) -> set[str | None]:
        """From names alone: no file is opened."""
        return {_label(path) for path, _ in self.place.files() if _is_sample(path)}

    def _read_first(self, path: str, nbytes: int) -> bytes:
        storage = self.place.storage
        if not isinstance(storage, LocalStorage):
            return storage.read_range(path, 0, nbytes) if nbytes else b""
        name = f"{storage.root}/{path}"
        return retrying(partial(_read_head, name, nbytes), name)


def _is_sample(path: str) -> bool:
    return "/." not in f"/{path}" and is_image_name(path)


def _label(path: str) -> str | None:
    return path.rpartition("/")[0].rpartition("/")[2] or None


def _read_head(name: str, nbytes: int) -> bytes:
    handle = os.open(name, os.O_RDONLY | os.O_NONBLOCK)  # a fifth of what a file object costs
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):  # a link to a pipe, which would wait for its writer
            raise FileNotFoundError(errno.ENOENT, "not a regular file", name)
        return os.read(handle, nbytes)
    finally:
        os.close(handle)
