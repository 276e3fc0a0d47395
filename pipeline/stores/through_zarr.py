"""Rows as zarr-python encodes and reads them: compressed ones, and all on request."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import numcodecs.errors
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype
from zarr.errors import UnknownCodecError, ZarrUserWarning
from zarr.storage import FsspecStore, LocalStore, MemoryStore

from teachercache.pipeline.errors import MissingExtraError, StorageError
from teachercache.pipeline.places.local_storage import LocalStorage
from teachercache.pipeline.places.remote_storage import client_options
from teachercache.pipeline.places.retries import retrying
from teachercache.pipeline.places.storage import Storage


def encoded_rows(array_json: bytes, rows: NDArray) -> Iterator[bytes]:
    """Each row as a chunk of the array that `array_json` describes, which has one chunk a row.

    Raises `MissingExtraError` for a codec that is not installed.
    """
    chunks = {"zarr.json": default_buffer_prototype().buffer.from_bytes(array_json)}
    with _installed_codecs("rows"):
        array = open_quietly(MemoryStore(chunks), mode="r+")
        array.with_config({"write_empty_chunks": True})[:] = rows
    suffix = "/0" * (rows.ndim - 1)
    return (chunks[f"c/{number}{suffix}"].to_bytes() for number in range(len(rows)))


def open_quietly(store: Store, **options: Any) -> zarr.Array:
    with warnings.catch_warnings():  # that few readers know numcodecs' codecs, docs/codecs.md says
        warnings.simplefilter("ignore", ZarrUserWarning)
        return zarr.open_array(store, **options)


@contextmanager
def _installed_codecs(what: str) -> Iterator[None]:
    """Raises `MissingExtraError` where zarr does not know a codec."""
    try:
        yield
    except (UnknownCodecError, numcodecs.errors.UnknownCodecError) as error:
        raise MissingExtraError(
            f"The {what} are compressed by a codec that is not installed.",
            got=error,
            expected="the codecs that zarr.json names, known to zarr",
            do="pip install 'teachercache[pcodec]' for pcodec, or the package of that codec",
        ) from error


class ThroughZarr:
    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._array: Callable[[str], zarr.Array] = cache(self._open)

    def read(self, folder: str, rows: NDArray[np.int64], values: NDArray, rows_per_shard: int) -> None:
        """Fill `values` with rows of the array in `folder`.

        Raises `FileNotFoundError`, or `ValueError` for an array of other rows, a wrong checksum included.
        """
        array, as_buffer = self._array(folder), default_buffer_prototype().nd_buffer.from_numpy_array
        whole = array.chunks if array.shards is None else array.shards  # what zarr takes memory for
        shape = values.shape[1:]
        if array.shape[1:] != shape or math.prod(whole) > rows_per_shard * math.prod(shape):
            raise ValueError(f"{folder} is an array of {array.shape} in pieces of {whole}")

        def read(number: int) -> None:  # one row after another: zarr gathers a list of rows by value
            row, into = int(rows[number]), as_buffer(values[number : number + 1])
            self._ask(partial(array.get_basic_selection, slice(row, row + 1), out=into), folder)

        self._storage.each(read, range(len(rows)))

    def _open(self, folder: str) -> zarr.Array:
        name = f"{folder}/zarr.json"
        if not self._storage.exists(name):  # zarr would read a device for ever
            raise FileNotFoundError(name)
        return self._ask(lambda: open_quietly(self._store(), path=folder, mode="r"), name)

    def _ask(self, zarr_for: Callable[[], Any], what: str) -> Any:
        """Of what zarr meets in damaged or hostile files, every kind of error comes out."""
        try:
            with _installed_codecs(what):
                return retrying(zarr_for, f"{self._storage.url}/{what}")
        except (MissingExtraError, StorageError):
            raise
        except Exception as error:
            raise ValueError(f"{what}: {type(error).__name__}: {error}") from error

    def _store(self) -> Store:
        if isinstance(self._storage, LocalStorage):
            return LocalStore(self._storage.root, read_only=True)
        url = self._storage.url
        return FsspecStore.from_url(url, storage_options=client_options(url), read_only=True)
