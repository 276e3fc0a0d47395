"""A sealed file states its own checksum, and no change of it goes unseen."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from teachercache.pipeline.places.open_storage import open_storage
from teachercache.pipeline.records.manifest import Manifest, QuarantineEntry
from teachercache.pipeline.records.seal import UNSEALED, is_intact, seal
from tests.make_cache import make_cache, make_images

FILE = f'{{"name": "value", "checksum": "{UNSEALED}"}}\n'.encode()


def test_every_bit_and_every_length_counts() -> None:
    sealed = seal(FILE)
    assert is_intact(sealed)
    assert len(sealed) == len(FILE)
    for bit in range(8 * len(sealed)):
        flipped = bytearray(sealed)
        flipped[bit // 8] ^= 1 << bit % 8
        assert not is_intact(bytes(flipped)), bit
    for end in range(len(sealed)):
        assert not is_intact(sealed[:end])
    assert not is_intact(sealed + b"\n")


@pytest.mark.parametrize("data", [b"", b"no seal", FILE, b"xxh3-128:", b"xxh3-128:" + b"f" * 32])
def test_what_was_never_sealed_is_not_intact(data: bytes) -> None:
    assert not is_intact(data)


@pytest.mark.parametrize("text", [UNSEALED, seal(UNSEALED.encode()).decode(), "xxh3-128:"])
def test_people_may_use_the_words_of_a_seal(tmp_path: Path, text: str) -> None:
    """A file name is whatever people call their files."""
    assert is_intact(seal(text.encode() + FILE))
    manifest = Manifest(open_storage(tmp_path))
    entry = QuarantineEntry(sample_index=0, key=text, location=text, reason=text)
    manifest.write_quarantine(0, [entry])
    assert manifest.quarantine() == [entry]
    cache = make_cache(tmp_path / "cache", make_images(tmp_path / "images", 2))
    samples = cache.samples.set_column(1, "path", pa.array([text, text]))
    cache.manifest.write_table("samples.parquet", samples)
    assert cache.manifest.samples(cache.spec).equals(samples)
