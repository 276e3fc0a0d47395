"""Seals: a metadata file states the checksum of its own bytes, so that its reader notices any damage.

Commit records seal shards. A file that has no record (`cache.json`, the tables, the records themselves,
quarantine lists) is written with `UNSEALED` near its end; `seal` replaces the last `UNSEALED` by the xxh3-128
of the file with that blank in it. This works for any format that can hold a string.
"""

import xxhash

_MARK, _DIGITS = b"xxh3-128:", 32
_BLANK = b"0" * _DIGITS
UNSEALED = (_MARK + _BLANK).decode()


def seal(data: bytes) -> bytes:
    """`data`, with its checksum in place of the last `UNSEALED`."""
    start = data.rindex(_MARK + _BLANK) + len(_MARK)
    return data[:start] + _checksum(data, start) + data[start + _DIGITS :]


def is_intact(data: bytes) -> bool:
    """Whether these are the bytes that `seal` returned."""
    start = data.rfind(_MARK) + len(_MARK)
    return data[start : start + _DIGITS] == _checksum(data, start)


def _checksum(data: bytes, start: int) -> bytes:
    """The checksum of `data` with a blank at `start`, in hex."""
    view = memoryview(data)
    digest = xxhash.xxh3_128(view[:start])
    digest.update(_BLANK)
    digest.update(view[start + _DIGITS :])
    return digest.hexdigest().encode()
