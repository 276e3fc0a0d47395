"""Images and containers that tests write: small, made with Pillow, the same in every run."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def photo(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    """A smooth RGB picture without symmetry, so that no flip or turn of it goes unnoticed."""
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 256, (2, 3, 3), np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR)


def encode(image: Image.Image, format: str = "JPEG", **options: object) -> bytes:
    """`image` as the bytes of a file; `options` as for `Image.save`."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def exif(orientation: int, order: str = "<", kind: str = "H") -> bytes:
    """An EXIF block with the orientation alone, as a SHORT ("H") or LONG ("I") of either byte order."""
    value = struct.pack(order + kind, orientation).ljust(4, b"\0")
    entry = struct.pack(order + "HHI", 0x0112, 3 if kind == "H" else 4, 1) + value
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    return b"Exif\0\0" + header + struct.pack(order + "H", 1) + entry + bytes(4)


def jpeg_segment(marker: int, payload: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload


def insert_segment(jpeg: bytes, segment: bytes) -> bytes:
    """`jpeg` with a segment right behind its start marker."""
    return jpeg[:2] + segment + jpeg[2:]


def png_chunk(kind: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))


def write_folder(root: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def tar_bytes(members: Iterable[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def write_parquet(
    path: Path,
    images: Sequence[bytes | None],
    labels: Sequence[int] | None = None,
    rows_per_group: int = 2,
) -> Path:
    """A file in the Hub's layout: image struct{bytes, path}, and label when there are any."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": data, "path": "same.jpg"} for data in images]
    columns = {"image": pa.array(rows, kind)} | ({} if labels is None else {"label": pa.array(labels)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=rows_per_group)
    return path
