"""One trainer at a time in an output folder: two would overwrite each other's checkpoints and lines.

The main process holds `<output>/run.lock` while the run lasts. `Storage.exclusive` says what is in it and
when that of a dead holder is taken over: at once on its own machine, elsewhere after ten minutes of silence.
A run lasts longer, so its holder touches the lock, and who waits and sees that knows that the run lives.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from teachercache.pipeline.errors import CheckpointError
from teachercache.pipeline.places.local_storage import LocalStorage
from teachercache.pipeline.places.locks import LOCK_SUFFIX
from teachercache.pipeline.places.processes import Process, describe_holder
from teachercache.student.saving import saving

_NAME = "run"
_TOUCH_EVERY_S = 20.0
_LOOK_EVERY_S = 1.0
_ENDS_WITHIN_S = 30.0  # a run that got SIGTERM saves a checkpoint first
_WAITING = "waiting"


@contextmanager
def only_trainer(accelerator: Accelerator, output: Path) -> Iterator[Callable[[], None]]:
    """Every process of a run enters this; what it yields raises `CheckpointError` once the lock was lost.

    A holder that lives is waited for as long as a run takes to end, then `CheckpointError` says who it is; of
    one on another machine that may be dead nothing is known for ten minutes.
    """
    if not accelerator.is_main_process:
        while (news := _broadcast(None)) == _WAITING:
            pass
        if isinstance(news, Exception):
            raise news
        yield lambda: None
        return
    path = output / f"{_NAME}{LOCK_SUFFIX}"
    with ExitStack() as stack:
        try:
            with saving("The lock of this run", path):
                stack.enter_context(LocalStorage(output).exclusive(_NAME, _Wait(path)))
                own = path.read_bytes()
        except Exception as error:
            _broadcast(error)
            raise
        _broadcast(None)
        stack.enter_context(_touching(path))

        def require_held() -> None:
            with suppress(OSError):  # of the moment: the next step looks again
                if (holder := _read(path)) != own:
                    raise CheckpointError(
                        "This run no longer holds its output folder, and ends before it overwrites anything.",
                        got=f"{path} " + (f"is held by {_describe(holder)}" if holder else "was removed"),
                        expected="the lock that this run made there",
                        do="run the same command again when no other run uses it: it goes on from the newest "
                        "checkpoint",
                    )

        yield require_held


class _Wait:
    """Called by who waits for the lock, again and again; raises `CheckpointError` where its holder lives."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._holder: bytes | None = None
        self._touched = 0
        self._since = self._looked = time.monotonic()

    def __call__(self) -> None:
        """The other processes wait in a collective, which has a time-out: they hear of it each time."""
        now = time.monotonic()
        if now - self._looked < _LOOK_EVERY_S:
            return
        self._looked = now
        _broadcast(_WAITING)
        try:
            holder, touched = self._path.read_bytes(), self._path.stat().st_mtime_ns
        except FileNotFoundError:
            return
        if holder != self._holder:
            self._holder, self._touched, self._since = holder, touched, now
            print(f"{self._path} is held by {_describe(holder)}: waiting for that run to end.", flush=True)
        if now - self._since > _ENDS_WITHIN_S and (touched != self._touched or _is_alive(holder)):
            raise CheckpointError(
                "Another run that lives writes into this output folder.",
                got=f"{self._path}, held by {_describe(holder)}",
                expected="one run at a time",
                do="end it (SIGTERM makes it save a checkpoint), wait for its end, or choose another output",
            )


@contextmanager
def _touching(path: Path) -> Iterator[None]:
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(_TOUCH_EVERY_S):
            with suppress(OSError):  # of the moment; or the lock is gone, as the next step finds
                os.utime(path)

    thread = threading.Thread(target=touch, name="run lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _broadcast(news: object) -> object:
    return broadcast_object_list([news])[0]


def _read(path: Path) -> bytes | None:
    with suppress(FileNotFoundError):
        return path.read_bytes()
    return None


def _is_alive(holder: bytes) -> bool:
    try:
        return Process.of_holder(holder).is_alive() is True
    except ValueError:
        return False


def _describe(holder: bytes) -> str:
    with suppress(ValueError, OverflowError, OSError):
        since = datetime.fromtimestamp(float(holder.rpartition(b"~")[2])).astimezone()
        return f"{describe_holder(holder)} since {since:%Y-%m-%d %H:%M:%S %Z}"
    return describe_holder(holder)
