"""A name either does not exist or holds all of its bytes, on disks and on object stores."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NoReturn

import fsspec
import pytest
import xxhash

from teachercache.pipeline.errors import CacheError, StorageError
from teachercache.pipeline.places import locks, processes, retries
from teachercache.pipeline.places.durable import link
from teachercache.pipeline.places.local_storage import LocalStorage
from teachercache.pipeline.places.open_storage import open_storage
from teachercache.pipeline.places.processes import TEMPORARY_SUFFIX
from teachercache.pipeline.places.remote_storage import RemoteStorage, client_options
from teachercache.pipeline.places.storage import Storage


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return open_storage(tmp_path if request.param == "local" else f"memory://{uuid.uuid4().hex}")


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
        with pytest.raises(CacheError, match="file has no range"):
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
        "import os; from teachercache.pipeline.places.local_storage import LocalStorage\n"
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
        "import os; from teachercache.pipeline.places.local_storage import LocalStorage\n"
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
        "import os; from teachercache.pipeline.places.local_storage import LocalStorage\n"
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


FAR = "0" * 16  # another machine, or container
WRONG_CLOCKS = {"eleven minutes behind": -660.0, "a day behind": -90_000.0, "an hour ahead": 3600.0}


@pytest.mark.parametrize("off_s", WRONG_CLOCKS.values(), ids=WRONG_CLOCKS)
def test_no_clock_but_ones_own_tells_how_old_a_lock_of_another_machine_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, off_s: float
) -> None:
    """Neither the holder's, which is in the lock, nor the file system's."""
    take_and_die(tmp_path)
    change_tags(tmp_path, machine=FAR, since=f"{time.time() + off_s:.0f}")
    os.utime(tmp_path / "x.lock", (0, time.time() + off_s))
    assert not is_taken_over(tmp_path)
    assert LocalStorage(tmp_path).sweep() == []
    monkeypatch.setattr(processes, "_LOCK_TIMEOUT_S", 0.3)
    began = time.monotonic()
    with LocalStorage(tmp_path).exclusive("x"):
        assert time.monotonic() - began > 0.3
    assert not (tmp_path / "x.lock").exists()


@pytest.mark.parametrize("off_s", WRONG_CLOCKS.values(), ids=WRONG_CLOCKS)
def test_a_sweep_takes_what_other_machines_left_once_it_saw_it_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, off_s: float
) -> None:
    """By its own clock; a file that another machine still writes changes meanwhile."""
    take_and_die(tmp_path)
    change_tags(tmp_path, machine=FAR)
    (left,) = tmp_path.glob(f"*{TEMPORARY_SUFFIX}")
    for path in (left, tmp_path / "x.lock"):
        os.utime(path, (0, time.time() + off_s))
    storage, now = LocalStorage(tmp_path), time.monotonic()
    assert storage.sweep() == []
    monkeypatch.setattr(time, "monotonic", lambda: now + 25 * 3600)
    assert LocalStorage(tmp_path).sweep() == [], "another process has just come"
    with left.open("ab") as file:
        file.write(b"more")
    assert storage.sweep() == ["x.lock"]
    monkeypatch.setattr(time, "monotonic", lambda: now + 50 * 3600)
    assert storage.sweep() == [left.name]


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
    monkeypatch.setattr(locks, "_BREAK_WITHIN_S", 0.0)
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
    monkeypatch.setattr(locks, "_SAY_SO_AFTER_S", 0.0)
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
    assert (
        open_storage("memory://side-by-side").each(lambda _: all_here.wait(20) >= 0, range(4)) == [True] * 4
    )
    assert open_storage(str(tmp_path)).each(str, range(3)) == ["0", "1", "2"]


# --- reads that fail for the moment ----------------------------------------------------------------------


class Flaky(LocalStorage):
    """A mount whose next `failures` reads of each kind fail with `number`; `tried` counts all of them."""

    def __init__(self, root: Path, number: int, failures: int) -> None:
        super().__init__(root)
        self.number, self.left, self.tried = number, failures, 0

    def _may_fail(self, name: str) -> None:
        self.tried += 1
        if self.left:
            self.left -= 1
            raise OSError(self.number, os.strerror(self.number), f"{self.url}/{name}")

    def _open(self, name: str) -> IO[bytes]:
        self._may_fail(name)
        return FlakyFile(super()._open(name), lambda: self._may_fail(name))

    def _size(self, name: str) -> int | None:
        self._may_fail(name)
        return super()._size(name)

    def _names(self, folder: str) -> list[str]:
        self._may_fail(folder)
        return super()._names(folder)

    def _list(self, prefix: str) -> tuple[tuple[int, int], list[tuple[str, int]], list[str]]:
        self._may_fail(prefix)
        return super()._list(prefix)


class FlakyFile(io.BytesIO):
    def __init__(self, file: IO[bytes], may_fail: Callable[[], None]) -> None:
        with file:
            super().__init__(file.read())
        self._may_fail = may_fail

    def readinto(self, buffer: Any) -> int:
        self._may_fail()
        return super().readinto(buffer)

    def read(self, size: int | None = -1) -> bytes:
        self._may_fail()
        return super().read(size)

    def fileno(self) -> int:
        return os.open(os.devnull, os.O_RDONLY)


DATA = bytes(range(256)) * 100
READS: dict[str, tuple[Callable[[Storage], object], object]] = {
    "read": (lambda storage: storage.read("a/file"), DATA),
    "open_read": (lambda storage: open_and_read(storage), DATA[-300:] + DATA[:20_000]),
    "checksum": (lambda storage: storage.checksum("a/file"), xxhash.xxh3_128_hexdigest(DATA)),
    "size": (lambda storage: storage.size("a/file"), len(DATA)),
    "exists": (lambda storage: storage.exists("a/file"), True),
    "names": (lambda storage: storage.names("a"), ["file"]),
    "walk": (lambda storage: list(storage.walk()), [("a/file", len(DATA))]),
}
PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.ECONNRESET)


def open_and_read(storage: Storage) -> bytes:
    with storage.open_read("a/file") as file:
        assert file.seek(-300, os.SEEK_END) == len(DATA) - 300
        end = file.read()
        file.seek(0)
        return end + file.read(20_000)


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "_PAUSES_S", (0.0,) * 4)


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("number", PASSING, ids=errno.errorcode.get)
def test_reads_that_fail_for_the_moment_are_repeated(
    tmp_path: Path, no_pauses: None, name: str, number: int
) -> None:
    LocalStorage(tmp_path).write("a/file", DATA)
    read, expected = READS[name]
    storage = Flaky(tmp_path, number, failures=3)
    assert read(storage) == expected
    assert storage.left == 0


@pytest.mark.parametrize("name", READS)
def test_reads_that_go_on_failing_name_the_file(tmp_path: Path, no_pauses: None, name: str) -> None:
    LocalStorage(tmp_path).write("a/file", DATA)
    storage = Flaky(tmp_path, errno.ESTALE, failures=1000)
    with pytest.raises(
        StorageError, match=rf"{tmp_path}(/a/file|/a|/) cannot be read(.|\n)*5 times(.|\n)*mount"
    ):
        READS[name][0](storage)
    assert storage.tried == 5


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.ENOSPC], ids=errno.errorcode.get)
def test_what_will_not_change_is_not_tried_again(tmp_path: Path, number: int) -> None:
    LocalStorage(tmp_path).write("a/file", DATA)
    storage = Flaky(tmp_path, number, failures=1000)
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        storage.read("a/file")
    assert (storage.tried, isinstance(caught.value, StorageError)) == (1, False)


def test_a_client_that_was_patient_itself_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "_NO_MORE_AFTER_S", -1.0)
    tried: list[int] = []

    def read() -> NoReturn:
        tried.append(1)
        raise TimeoutError

    with pytest.raises(StorageError, match="s3://bucket/x cannot be read"):
        retries.retrying(read, "s3://bucket/x")
    assert len(tried) == 1


# --- names that survive a crash --------------------------------------------------------------------------


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What is synced, in order."""
    found: list[Path] = []
    fsync = os.fsync

    def noted(handle: int) -> None:
        found.append(Path(f"/proc/self/fd/{handle}").readlink())
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    return found


def test_every_new_folder_is_synced_in_the_one_above(tmp_path: Path, synced: list[Path]) -> None:
    storage = LocalStorage(tmp_path / "new" / "cache")
    storage.write("a/b/file", b"x")
    above = [tmp_path, tmp_path / "new", storage.root, storage.root / "a"]
    assert [path for path in synced if path.is_dir()] == [*above, storage.root / "a/b"]
    synced.clear()
    storage.write("a/b/other", b"x")
    assert [path for path in synced if path.is_dir()] == [storage.root / "a/b"]


@pytest.mark.parametrize("links", [True, False])
def test_a_new_file_is_synced_with_its_bytes(
    tmp_path: Path, synced: list[Path], monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:
        without_hard_links(monkeypatch)
    assert LocalStorage(tmp_path).write_new("a/file", b"x")
    assert synced[0] == tmp_path
    assert synced[1].name.startswith("file")
    assert synced[-1] == tmp_path / "a"


def test_a_link_is_synced_with_its_folder(tmp_path: Path, synced: list[Path]) -> None:
    (tmp_path / "file").write_bytes(b"x")
    link(tmp_path / "file", tmp_path / "a/file")
    assert synced == [tmp_path, tmp_path / "a"]


def test_every_bucket_has_options_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the environment states them, in addition to those of all."""
    stated = {
        "FSSPEC_S3": '{"anon": false, "config_kwargs": {"read_timeout": 7}}',
        "FSSPEC_BUCKETS": """{"images": {"profile": "lab"},
            "caches": {"endpoint_url": "https://s3.lab", "config_kwargs": {"retries": 2}}}""",
    }
    conf: dict[str, Any] = {}
    fsspec.config.set_conf_env(conf, stated)
    monkeypatch.setattr(fsspec.config, "conf", conf)
    images, caches, others = (
        client_options(f"s3://{name}/place") for name in ("images", "caches", "images2")
    )
    assert (images["profile"], caches["endpoint_url"]) == ("lab", "https://s3.lab")
    assert not {"profile", "endpoint_url"} & others.keys()
    assert caches["config_kwargs"].items() >= {"retries": 2, "read_timeout": 7}.items()
    assert RemoteStorage("s3://images/cache").filesystem.storage_options["profile"] == "lab"
