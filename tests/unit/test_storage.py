"""A name either does not exist or holds all of its bytes, on disks and on object stores."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import NoReturn

import pytest
import xxhash

from pipeline import processes
from pipeline import storage as module
from pipeline.errors import CacheError
from pipeline.processes import TEMPORARY_SUFFIX
from pipeline.storage import LocalStorage, RemoteStorage, Storage


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


def test_sweep_removes_locks_of_dead_processes_only(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    script = (
        "import os; from pipeline.storage import LocalStorage\n"
        f"with LocalStorage({str(tmp_path)!r}).exclusive('left'):\n"
        "    os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    with storage.exclusive("held"):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["held.lock", "left.lock"]
        assert storage.sweep() == ["left.lock"]
        assert [path.name for path in tmp_path.iterdir()] == ["held.lock"]


class GaveUp(Exception):
    """Of a test that has waited long enough."""


def give_up() -> NoReturn:
    raise GaveUp


def take_and_die(folder: Path) -> None:
    """Leave `x.lock` and `y….partial` of a process that is no more."""
    script = (
        "import os; from pipeline.storage import LocalStorage\n"
        f"storage = LocalStorage({str(folder)!r})\n"
        "with storage.exclusive('x'), storage.open_write('y'): os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9


def change_tags(folder: Path, since: str | None = None, **fields: str) -> None:
    """Rewrite who left the lock (and since when) and the temporary file: machine, pid, started."""

    def changed(tag: str) -> str:
        old = dict(zip(["node", "machine", "pid", "started", "unique"], tag.split("~"), strict=True))
        return "~".join((old | fields).values())

    lock, (left,) = folder / "x.lock", folder.glob(f"*{TEMPORARY_SUFFIX}")
    tag, _, began = lock.read_text().rpartition("~")
    lock.write_text(f"{changed(tag)}~{since or began}")
    tag = left.name.removeprefix("y.").removesuffix(TEMPORARY_SUFFIX)
    left.rename(folder / f"y.{changed(tag)}{TEMPORARY_SUFFIX}")


def is_taken_over(folder: Path) -> bool:
    try:
        with LocalStorage(folder).exclusive("x", give_up):
            return True
    except GaveUp:
        assert (folder / "x.lock").exists()
        return False


def test_what_dead_processes_left_is_told_from_what_may_be_alive(tmp_path: Path) -> None:
    cases: dict[str, tuple[dict[str, str], bool]] = {
        "dead": ({}, True),
        "another process has its number": ({"pid": str(os.getpid())}, True),
        "in another container of this host, perhaps alive": ({"machine": "0" * 16}, False),
        "where boots and namespaces are not known": ({"machine": ""}, False),
        "alive": ({"pid": str(os.getpid()), "started": str(processes._running_since(os.getpid()))}, False),
    }
    for label, (fields, gone) in cases.items():
        folder = tmp_path / label
        folder.mkdir()
        take_and_die(folder)
        change_tags(folder, **fields)
        assert is_taken_over(folder) == gone, label
        assert bool(LocalStorage(folder).sweep()) == gone, label


def test_what_cannot_be_told_is_judged_by_its_age(tmp_path: Path) -> None:
    take_and_die(tmp_path)
    change_tags(tmp_path, machine="0" * 16, since=f"{time.time() - 601:.0f}")
    assert is_taken_over(tmp_path)
    (left,) = tmp_path.glob(f"*{TEMPORARY_SUFFIX}")
    os.utime(left, (0, time.time() - 25 * 3600))
    assert LocalStorage(tmp_path).sweep() == [left.name]


def test_a_process_that_nobody_has_waited_for_is_dead() -> None:
    zombie = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert zombie.stdout is not None
    zombie.stdout.read()
    deadline = time.monotonic() + 10
    while processes._running_since(zombie.pid) is not None:
        assert time.monotonic() < deadline
    assert Path(f"/proc/{zombie.pid}").exists()
    zombie.wait()
    zombie.stdout.close()


def test_a_lock_whose_answer_was_lost_is_held() -> None:
    class Lossy(RemoteStorage):
        """Stores a file and loses the answer; the client asks again, and learns that the file is there."""

        def write_new(self, name: str, data: bytes) -> bool:
            super().write_new(name, data)
            return False

    storage = Lossy(f"memory://{uuid.uuid4().hex}")
    with storage.exclusive("x", give_up):
        assert storage.exists("x.lock")
    assert not storage.exists("x.lock")


def test_a_lock_whose_making_failed_late_is_not_left(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_new = type(storage).write_new

    def stored_but_failed(self: Storage, name: str, data: bytes) -> bool:
        write_new(self, name, data)
        raise TimeoutError

    monkeypatch.setattr(type(storage), "write_new", stored_but_failed)
    with pytest.raises(TimeoutError), storage.exclusive("x"):
        pass
    assert not storage.exists("x.lock")


@pytest.mark.parametrize("away", [False, True])
def test_a_lock_that_was_taken_over_is_not_broken(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, away: bool
) -> None:
    """Two saw the stale lock; the other one was faster, and may be done already."""
    monkeypatch.setattr(module, "_BREAK_WITHIN_S", 0.0)
    if not away:
        storage.write("f/x.lock", b"the other one's")
    storage._break("f/x.lock", b"stale")
    storage.write("f/y.lock", b"stale")
    storage._break("f/y.lock", b"stale")
    storage.write("f/z", b"")
    assert [name for name, _ in storage.walk("f")] == (["f/z"] if away else ["f/x.lock", "f/z"])


def test_who_waits_says_for_whom(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_SAY_SO_AFTER_S", 0.0)
    calls: list[int] = []

    def waiting() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise GaveUp

    with storage.exclusive("x"):
        with pytest.raises(GaveUp), storage.exclusive("x", waiting):
            pass
        assert storage.exists("x.lock"), "who gave up does not take it away"
    (record,) = caplog.records
    assert f"x.lock, held by process {os.getpid()} on " in record.getMessage()


def without_hard_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(Path, "hardlink_to", refuse)


def test_locks_work_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_hard_links(monkeypatch)
    storage = LocalStorage(tmp_path)
    assert storage.write_new("file", b"first")
    assert not storage.write_new("file", b"second")
    assert storage.read("file") == b"first"
    holders: list[int] = []
    most: list[int] = []

    def hold() -> None:
        for _ in range(10):
            with storage.exclusive("x"):
                holders.append(1)
                most.append(len(holders))
                holders.pop()

    threads = [threading.Thread(target=hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 40
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def deny(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", deny)
    with pytest.raises(CacheError, match=r"Permission denied(.|\n)*hard links or exclusive creation"):
        storage._create("other", b"x")


def test_a_lock_that_is_being_written_is_not_taken_over_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.lock").write_bytes(b"")
    assert not is_taken_over(tmp_path)
    monkeypatch.setattr(processes, "_LOCK_IS_WRITTEN_WITHIN_S", -1.0)
    assert is_taken_over(tmp_path)


def test_reads_that_wait_for_answers_are_made_side_by_side(tmp_path: Path) -> None:
    all_here = threading.Barrier(4)
    assert Storage.at("memory://side-by-side").each(lambda _: all_here.wait(20) >= 0, range(4)) == [True] * 4
    assert Storage.at(str(tmp_path)).each(str, range(3)) == ["0", "1", "2"]
