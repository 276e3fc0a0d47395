"""The checksum of rows: its value, and that other threads run while it is computed."""

from __future__ import annotations

import threading
import time

import google_crc32c
import numpy as np
import pytest

from teachercache.pipeline.stores import shard_format
from teachercache.pipeline.stores.shard_format import checksum


def test_it_is_the_crc32c_of_bytes_and_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checksum(b"123456789") == 0xE3069283.to_bytes(4, "little")
    data = np.random.default_rng(0).integers(0, 256, 100_001, np.uint8)
    expected = google_crc32c.value(data).to_bytes(4, "little")
    assert checksum(data.data) == checksum(data.tobytes()) == expected
    assert checksum(b"") == bytes(4)
    monkeypatch.setattr(shard_format, "_crc32c", None)
    assert checksum(data.data) == expected


def test_another_thread_runs_while_a_row_is_hashed() -> None:
    """It would otherwise wait for the end of the whole row."""
    data = np.zeros(1 << 28, np.uint8)
    hashed = threading.Event()

    def work() -> None:
        checksum(data.data)
        hashed.set()

    thread = threading.Thread(target=work)
    thread.start()
    turns = 0
    while not hashed.is_set():
        time.sleep(0.001)
        turns += 1
    thread.join()
    assert turns > 5
