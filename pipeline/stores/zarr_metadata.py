"""`zarr.json`, as zarr-python writes it; a test holds these bytes equal to its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic_core import from_json

from teachercache.pipeline.records.array_layout import ArrayLayout, stored_layout

_CHECKSUM = {"name": "crc32c"}
_LITTLE_ENDIAN = {"name": "bytes", "configuration": {"endian": "little"}}
_OF_A_CHUNK = ("data_type", "chunk_grid", "codecs")

Document = dict[str, Any]


def group_json(attributes: dict[str, Any]) -> bytes:
    return _json({"attributes": attributes, "zarr_format": 3, "node_type": "group"})


def consolidated_json(below: Mapping[str, bytes]) -> bytes:
    """A group that repeats these files of what lies below it, so that readers need not look for them."""
    metadata = {name.removesuffix("/zarr.json"): from_json(data) for name, data in below.items()}
    consolidated = {"kind": "inline", "must_understand": False, "metadata": metadata}
    document = {"attributes": {}, "zarr_format": 3, "consolidated_metadata": consolidated}
    return _json(document | {"node_type": "group"})


def array_json(layout: ArrayLayout, num_rows: int, rows_per_shard: int) -> bytes:
    """One chunk a row, `rows_per_shard` of them in a shard; a checksum behind every chunk and index."""
    return _json(_array(layout, num_rows, rows_per_shard))


def layout_of(text: bytes, rows_per_shard: int) -> tuple[ArrayLayout, bool]:
    """The layout of an array, and whether a chunk's bytes are those of a row in memory, as we lay them out:
    others may have compressed it since. Raises `ValueError` for anything but the metadata of an array.
    """
    try:
        found = from_json(text)
        axes = tuple(found.get("dimension_names") or ())[1:]
        layout = stored_layout(found["shape"][1:], found["data_type"], axes, found.get("attributes", {}))
        ours = _array(layout, found["shape"][0], rows_per_shard)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return layout, all(found.get(key) == ours[key] for key in _OF_A_CHUNK)


def _array(layout: ArrayLayout, num_rows: int, rows_per_shard: int) -> Document:
    values = {"name": "bytes"} if layout.dtype.itemsize == 1 else _LITTLE_ENDIAN
    sharding = {
        "chunk_shape": [1, *layout.shape],
        "codecs": [values, _CHECKSUM],
        "index_codecs": [_LITTLE_ENDIAN, _CHECKSUM],
        "index_location": "end",
    }
    grid = {"chunk_shape": [rows_per_shard, *layout.shape]}
    return {
        "shape": [num_rows, *layout.shape],
        "data_type": layout.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": grid},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": layout.dtype.type(0).item(),
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": layout.attributes,
        "dimension_names": ["row", *layout.axes],
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


def _json(document: Document) -> bytes:
    return json.dumps(document, indent=2).encode()
