"""One holder of a name at a time, over all processes and machines that see one storage."""

from __future__ import annotations

import logging
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from teachercache.pipeline.places.processes import Process, describe_holder, is_stale

LOCK_SUFFIX = ".lock"
_POLL_S = 0.05
_BREAK_WITHIN_S = 2.0
_SAY_SO_AFTER_S = 5.0

log = logging.getLogger(__name__)


class Lockable(ABC):
    """What locks ask of a storage: to read, to write what is not there yet, to remove."""

    url: str

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The whole file. Raises `FileNotFoundError`."""

    @abstractmethod
    def write_new(self, name: str, data: bytes) -> bool:
        """Write a file that is not there yet, and say whether it was this call that did."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Delete a file; a missing one is not an error."""

    @contextmanager
    def exclusive(self, name: str, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """One holder of this name at a time, over all processes and machines; the others wait.

        The holder's process is noted in `<name>.lock`. Of one that died here the lock is taken over at once,
        of one on another machine once it has been seen unchanged for ten minutes, by the clock of who waits;
        so what is held for has to be shorter. `waiting` is called again and again by those who wait, and ends
        it by raising. The time in the lock is for people: no clock but one's own tells how old it is.
        """
        lock, own = f"{name}{LOCK_SUFFIX}", f"{Process.this().tag()}~{time.time():.0f}".encode()
        try:
            self._acquire(lock, own, waiting)
            yield
        finally:
            if self._read_if_there(lock) == own:
                self.remove(lock)

    def _acquire(self, lock: str, own: bytes, waiting: Callable[[], None]) -> None:
        """Who wrote the lock is read, not taken from the answer to the write, which can be lost on its way.

        Somebody who took a new lock for the stale one before it may also have removed it.
        """
        began, told = time.monotonic(), False
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
            if not told and now - began > _SAY_SO_AFTER_S:
                log.warning("waiting for %s/%s, held by %s", self.url, lock, describe_holder(holder))
                told = True
            waiting()
            time.sleep(random.uniform(0.5, 1.5) * _POLL_S)

    def _break(self, lock: str, holder: bytes) -> None:
        """Remove a stale lock, unless somebody has taken it over: two who look at once would both hold it.

        Here they look at different times; a lock of the dead and both within a request is what remains.
        """
        time.sleep(random.uniform(0, _BREAK_WITHIN_S))
        if self._read_if_there(lock) == holder:
            self.remove(lock)

    def _read_if_there(self, name: str) -> bytes | None:
        try:
            return self.read(name)
        except FileNotFoundError:
            return None
