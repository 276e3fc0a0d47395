"""Sample keys: which names can be keys, and what happens when two samples share one.

Names inside tars are data from strangers. A name that could leave a folder, break a line or not be
written at all never becomes a path or a usable key: its `status` excludes the sample.
"""

import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

OK = "ok"
_LONGEST_NAME = 4096
_SHOWN_CHARACTERS = 200
_UNSAFE = {
    "it is not a plain relative path": re.compile(r"(?:^|/)\.{0,2}(?:/|$)"),
    "it has a control character or a backslash": re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\\]"),
    "it is not UTF-8": re.compile(r"[\ud800-\udfff]"),
}


def name_problem(name: str) -> str | None:
    """Why `name` can be neither a key nor a path, or None when it can."""
    if len(name) > _LONGEST_NAME:
        return f"unsafe name: it has {len(name):,} characters"
    return next((f"unsafe name: {why}" for why, unsafe in _UNSAFE.items() if unsafe.search(name)), None)


def printable(name: str) -> str:
    """`name` in printable ASCII, shortened: for the rows of excluded samples."""
    return name[:_SHOWN_CHARACTERS].encode("unicode_escape").decode("ascii")


def with_unique_keys(table: pa.Table) -> pa.Table:
    """`table` with unique keys, and without its column `qualified_key`.

    All samples that share a key take their qualified one (with suffix or container), so that the
    listing order does not decide which keeps the short name. Where they share even that (one name
    twice in one tar), the first in the tar has it; a `status` excludes the later ones, whose key gets
    their offset. `table` must come in the order (path, offset).
    """
    table = table.combine_chunks()
    keys, status = table["key"], table["status"]
    qualified = table["qualified_key"]
    while (shorten := _shared(keys) & pc.not_equal(keys, qualified).to_numpy()).any():
        keys = pc.if_else(pa.array(shorten), qualified, keys)
    while (later := _later(keys)).any():
        mask = pa.array(later)
        reason = pc.binary_join_element_wise(table["path"], " already has a sample ", keys, "")
        reason = pc.binary_join_element_wise("duplicate key: ", reason, "")
        status = pc.if_else(pc.and_(mask, pc.equal(status, OK)), reason, status)
        offsets = table["offset"].cast(pa.string())
        keys = pc.if_else(mask, pc.binary_join_element_wise(keys, offsets, "#"), keys)
    table = table.drop_columns("qualified_key")
    columns = {name: table[name] for name in table.column_names} | {"key": keys, "status": status}
    for side in ("width", "height"):
        columns[side] = pc.if_else(pc.equal(status, OK), table[side], pa.scalar(0, pa.int32()))
    return pa.table(columns)


def _codes(keys: pa.ChunkedArray) -> NDArray[np.int32]:
    """A number for each key, the same for equal keys."""
    return keys.combine_chunks().dictionary_encode().indices.to_numpy()


def _shared(keys: pa.ChunkedArray) -> NDArray[np.bool_]:
    codes = _codes(keys)
    return np.bincount(codes)[codes] > 1


def _later(keys: pa.ChunkedArray) -> NDArray[np.bool_]:
    codes = _codes(keys)
    later = np.ones(len(codes), bool)
    later[np.unique(codes, return_index=True)[1]] = False
    return later
