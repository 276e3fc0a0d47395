"""Locks: a name has one holder at a time among all processes and machines that see a storage."""

import logging
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from teachercache.pipeline.places.processes import Process, describe_holder, is_stale

LOCK_SUFFIX = ".lock"
_POLL_S = 0.05
_BREAK_WITHIN_S = 2.0
_SAY_SO_AFTER_S = 5.0

log = logging.getLogger(__name__)


class Lockable(ABC):
    """What locks need from a storage: to read, to write a file that does not exist yet, to remove."""

    url: str

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The whole file. Raises `FileNotFoundError`."""

    @abstractmethod
    def write_new(self, name: str, data: bytes) -> bool:
        """Write a file unless it exists, and return whether this call wrote it."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Delete a file; a missing one is not an error."""

    @contextmanager
    def exclusive(self, name: str, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Hold this name, alone among all processes and machines; the others wait.

        `<name>.lock` names the holder's process. The lock of a process that died on this machine is taken
        over at once, one from another machine after ten minutes without a change, by the clock of the process
        that waits; so hold it for less. `waiting` is called repeatedly while waiting, which it ends by
        raising. The time in the lock is for people: another machine's clock does not tell its age.
        """
        lock, own = f"{name}{LOCK_SUFFIX}", f"{Process.this().tag()}~{time.time():.0f}".encode()
        try:
            self._acquire(lock, own, waiting)
            yield
        finally:
            if self._read_if_there(lock) == own:
                self.remove(lock)

    def _acquire(self, lock: str, own: bytes, waiting: Callable[[], None]) -> None:
        """The lock is read to see who wrote it, since the answer to the write can get lost.

        Another process may also have removed it, taking it for the stale one before it.
        """
        began, has_warned = time.monotonic(), False
        seen, since = None, began
        while True:
            holder = self._read_if_there(lock)
            if holder is None:
                self.write_new(lock, own)
                holder = self._read_if_there(lock)
            if holder == own:
                return
            now = time.monotonic()
            if holder != seen:
                seen, since = holder, now
            if holder is not None and is_stale(holder, now - since):
                self._break(lock, holder)
                continue
            if not has_warned and now - began > _SAY_SO_AFTER_S:
                log.warning("waiting for %s/%s, held by %s", self.url, lock, describe_holder(holder))
                has_warned = True
            waiting()
            time.sleep(random.uniform(0.5, 1.5) * _POLL_S)

    def _break(self, lock: str, holder: bytes) -> None:
        """Remove a stale lock, unless it was taken over: two processes that look at once would both hold it.

        The random pause keeps them apart, except where both look within the time of one request.
        """
        time.sleep(random.uniform(0, _BREAK_WITHIN_S))
        if self._read_if_there(lock) == holder:
            self.remove(lock)

    def _read_if_there(self, name: str) -> bytes | None:
        with suppress(FileNotFoundError):
            return self.read(name)
        return None
