"""The bytes of a shard file, as Zarr's sharding codec lays them out.

Each row's chunk, followed by its crc32c; then the index, a little-endian (offset, nbytes) pair of
uint64 for each row, 2⁶⁴-1 twice for an absent chunk; then the index's own crc32c.

Between chunks and index we write 16 bytes that no index names and no reader sees: the xxh3-128 of all chunks.
So shards that differ anywhere also differ near their end (`Storage.ends`).
"""

import ctypes
from collections.abc import Iterable

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from teachercache.pipeline.places.storage import Storage
from teachercache.pipeline.records.array_layout import ArrayLayout

ABSENT = 2**64 - 1
CHECKSUM_NBYTES = 4

Index = NDArray[np.uint64]  # (rows, 2): offset, and nbytes with the checksum


try:  # the library's own: other threads run meanwhile, while the package's (and numcodecs') holds the GIL
    _crc32c = ctypes.CDLL(google_crc32c._crc32c.__file__).crc32c_value
    _crc32c.restype, _crc32c.argtypes = ctypes.c_uint32, (ctypes.c_void_p, ctypes.c_size_t)
except (AttributeError, OSError):  # a package without the library
    _crc32c = None  # type: ignore[assignment]


def checksum(data: bytes | memoryview) -> bytes:
    """The crc32c."""
    values = np.frombuffer(data, np.uint8)
    value: int = _crc32c(values.ctypes.data, values.size) if _crc32c else google_crc32c.value(values)
    return value.to_bytes(CHECKSUM_NBYTES, "little")


def empty_index(num_rows: int) -> Index:
    return np.full((num_rows, 2), ABSENT, "<u8")


def index_nbytes(num_rows: int, columns: int = 2) -> int:
    return 8 * columns * num_rows + CHECKSUM_NBYTES


def disk_nbytes(layouts: Iterable[ArrayLayout]) -> int:
    """Bytes that one row takes in these arrays, its checksums and its places in the indexes included."""
    return sum(layout.row_nbytes + CHECKSUM_NBYTES + empty_index(1).nbytes for layout in layouts)


def read_index(storage: Storage, name: str, num_rows: int, columns: int = 2, behind: int = 0) -> Index:
    """The index of a file in which so many bytes are `behind` it. Raises as `parse_index`, or
    `FileNotFoundError`."""
    file_nbytes = storage.size(name)
    if file_nbytes is None:
        raise FileNotFoundError(name)
    start = max(0, file_nbytes - behind - index_nbytes(num_rows, columns))
    end = storage.read_range(name, start, max(0, file_nbytes - behind - start))
    return parse_index(end, num_rows, start + len(end), columns, name)


def parse_index(end: bytes, num_rows: int, file_nbytes: int, columns: int = 2, name: str = "shard") -> Index:
    """The index in the last bytes of the file `name`, `index_nbytes` of them.

    Raises `ValueError` unless its checksum is right and every chunk lies inside the file.
    """
    if len(end) != index_nbytes(num_rows, columns):
        raise ValueError(f"{name}: {file_nbytes} bytes are too few for an index of {num_rows} rows")
    table, stored = end[:-CHECKSUM_NBYTES], end[-CHECKSUM_NBYTES:]
    if checksum(table) != stored:
        raise ValueError(f"{name}: the checksum of its index is wrong")
    index = np.frombuffer(table, "<u8").reshape(num_rows, columns)
    offset, nbytes = index[(index != ABSENT).any(1)].T[:2]
    limit = np.uint64(file_nbytes - len(end))
    if ((offset > limit) | (nbytes > limit - np.minimum(offset, limit))).any():
        raise ValueError(f"{name}: its index names bytes beyond {limit}, where the chunks end")
    return index
