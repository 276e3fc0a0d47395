"""A name either does not exist or holds all of its bytes, on disks and on object stores."""

from __future__ import annotations

import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import xxhash

from pipeline.errors import CacheError
from pipeline.storage import TEMPORARY_SUFFIX, LocalStorage, Storage


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage.at(tmp_path if request.param == "local" else f"memory://{uuid.uuid4().hex}")


def test_writes_are_read_back_with_their_size_and_checksum(storage: Storage) -> None:
    with storage.open_write("a/b.bin") as file:
        file.write(b"one ")
        file.write(memoryview(b"two"))
    assert storage.read("a/b.bin") == b"one two"
    assert storage.read_range("a/b.bin", 4, 2) == b"tw"
    assert (storage.size("a/b.bin"), file.nbytes) == (7, 7)
    assert storage.checksum("a/b.bin") == file.checksum == xxhash.xxh3_128_hexdigest(b"one two")
    assert storage.names("a") == ["b.bin"]


def test_ranges_end_where_the_file_ends(storage: Storage) -> None:
    storage.write("file", b"0123456789")
    storage.write("empty", b"")
    assert storage.read_range("file", 8, 10**15) == b"89"  # and no petabyte is asked for
    assert storage.read_range("file", 10, 1) == storage.read_range("file", 10**15, 1) == b""
    assert storage.read_range("file", 3, 0) == storage.read_range("empty", 0, 5) == b""
    for offset, nbytes in ((-1, 5), (5, -1)):
        with pytest.raises(CacheError, match="no bytes of file"):
            storage.read_range("file", offset, nbytes)
    with pytest.raises(FileNotFoundError):
        storage.read_range("nothing", 0, 5)


def test_a_folder_is_no_file(storage: Storage) -> None:
    storage.write("folder/file", b"x")
    assert storage.size("folder") is None
    assert not storage.exists("folder")


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.write("kept", b"old")

    def fail_in_the_middle() -> None:
        with storage.open_write("kept") as file:
            file.write(b"half of the new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_in_the_middle()
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert storage.read("kept") == b"old"


def test_what_is_missing_has_no_size_and_an_empty_listing(storage: Storage) -> None:
    assert storage.size("nothing") is None
    assert not storage.exists("nothing")
    assert storage.names("no/folder") == []
    storage.remove("nothing")


@pytest.mark.parametrize("name", ["../out", "/etc/passwd", "a/../../b", "", "a\\b", "a\0b"])
def test_names_cannot_leave_the_folder(storage: Storage, name: str) -> None:
    with pytest.raises(CacheError, match="leave its folder"):
        storage.read(name)


def test_sweep_removes_files_of_dead_processes_only(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    script = (
        "import os; from pipeline.storage import LocalStorage\n"
        f"with LocalStorage({str(tmp_path)!r}).open_write('shard') as file:\n"
        "    file.write(b'x'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    with storage.open_write("living") as file:
        file.write(b"y")
        assert len(list(tmp_path.glob(f"*{TEMPORARY_SUFFIX}"))) == 2
        assert len(storage.sweep()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["living"]
