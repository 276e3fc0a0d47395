"""`zarr.json`, as zarr-python writes it; a test holds these bytes equal to its own."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic_core import from_json

from teachercache.pipeline.records.array_layout import ArrayLayout, stored_layout
from teachercache.pipeline.records.spec import CacheSpec, Compressor

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


def array_json(layout: ArrayLayout, spec: CacheSpec) -> bytes:
    """One chunk a row, `rows_per_shard` of them in a shard; a checksum behind every chunk and index."""
    num_rows = spec.num_shards * spec.rows_per_shard
    return _json(_array(layout, num_rows, spec.rows_per_shard, spec.compressor))


def chunks_json(layout: ArrayLayout, num_rows: int, compressor: Compressor) -> bytes:
    """An array without shards, whose chunks are those inside the shards of `array_json`."""
    grid = {"name": "regular", "configuration": {"chunk_shape": [1, *layout.shape]}}
    codecs = _codecs_of_a_row(layout.dtype, compressor)
    return _json(_array(layout, num_rows, 1, compressor) | {"chunk_grid": grid, "codecs": codecs})


def layout_of(file: str, text: bytes, spec: CacheSpec) -> tuple[ArrayLayout, bool]:
    """The layout of an array, and whether its chunks are as we write them: others may have compressed it
    otherwise since. Raises `ValueError`, which names `file`, for anything but the metadata of an array.
    """
    try:
        found = from_json(text)
        axes = tuple(found.get("dimension_names") or ())[1:]
        layout = stored_layout(found["shape"][1:], found["data_type"], axes, found.get("attributes", {}))
        ours = _array(layout, found["shape"][0], spec.rows_per_shard, spec.compressor)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: {type(error).__name__}: {error}") from error
    return layout, all(found.get(key) == ours[key] for key in _OF_A_CHUNK)


def _codecs_of_a_row(dtype: np.dtype, compressor: Compressor | None) -> list[Document]:
    values = {"name": "bytes"} if dtype.itemsize == 1 else _LITTLE_ENDIAN
    match compressor:
        case None:
            encoding = [values]
        case "zstd":
            encoding = [values, {"name": "zstd", "configuration": {"level": 3, "checksum": False}}]
        case "blosc":
            encoding = [values, _blosc(dtype, "zstd", "shuffle")]
        case "lz4":
            encoding = [values, _blosc(dtype, "lz4", "bitshuffle")]
        case "pcodec" if dtype.itemsize == 1:  # it refuses bytes, and packed codes do not shrink
            encoding = [values]
        case "pcodec":  # takes numbers, and so the place of "bytes"
            encoding = [{"name": "numcodecs.pcodec", "configuration": {"level": 8, "mode_spec": "auto"}}]
    return [*encoding, _CHECKSUM]


def _blosc(dtype: np.dtype, compressor: str, shuffle: str) -> Document:
    settings = {"typesize": dtype.itemsize, "cname": compressor, "clevel": 5, "shuffle": shuffle}
    return {"name": "blosc", "configuration": settings | {"blocksize": 0}}


def _array(
    layout: ArrayLayout, num_rows: int, rows_per_shard: int, compressor: Compressor | None
) -> Document:
    sharding = {
        "chunk_shape": [1, *layout.shape],
        "codecs": _codecs_of_a_row(layout.dtype, compressor),
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
