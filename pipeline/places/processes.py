"""The processes that hold locks and write files, in a form that tells others whether they still run.

A process leaves its tag in a lock or in the name of its temporary files. The tag of a process on this machine
shows whether it still runs; for one elsewhere only time can tell.
"""

import os
import platform
import uuid
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Self

import xxhash

TEMPORARY_SUFFIX = ".partial"
_LOCK_TIMEOUT_S = 600.0  # for a holder elsewhere, from when its lock was first seen here
_LOCK_IS_WRITTEN_WITHIN_S = 10.0
_REMOTE_WRITER_TIMEOUT_S = 24 * 3600.0


@dataclass(frozen=True)
class Process:
    """A process that holds a lock or writes a file. `machine` tells apart containers of one host name."""

    node: str
    machine: str
    pid: int
    started: int

    @classmethod
    def this(cls) -> Self:
        return cls(platform.node(), _machine(), os.getpid(), _running_since(os.getpid()) or 0)

    @classmethod
    def of(cls, tag: str) -> Self:
        """Raises `ValueError` for anything but a tag."""
        node, machine, pid, started, _ = tag.rsplit("~", 4)
        return cls(node, machine, int(pid), int(started))

    @classmethod
    def of_holder(cls, holder: bytes) -> Self:
        """The process that left this in a lock. Raises `ValueError`."""
        return cls.of(holder.decode().rpartition("~")[0])

    def tag(self) -> str:
        return f"{self.node}~{self.machine}~{self.pid}~{self.started}~{uuid.uuid4().hex[:8]}"

    def is_alive(self) -> bool | None:
        """None where this process cannot tell: on another machine, or in another container."""
        if not self.machine or self.machine != _machine():
            return None
        return _running_since(self.pid) == self.started  # a later process may have its number


@cache
def _machine() -> str:
    """This boot of this machine, and the namespace of its process numbers; "" where unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return xxhash.xxh3_64_hexdigest(f"{boot}{Path('/proc/self/ns/pid').readlink()}".encode())
    except OSError:
        return ""


def _running_since(pid: int) -> int | None:
    """Clock ticks from boot to the start of a process, or None for one that has ended (`proc(5)`)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return None if state in "ZX" else int(fields[18])


def temporary_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.{Process.this().tag()}{TEMPORARY_SUFFIX}")


def is_stale(holder: bytes, unchanged_s: float) -> bool:
    """Whether the process that left this tag has died, or been silent elsewhere for too long.

    `unchanged_s`: for how long the lock has been seen like this, by the caller's clock; the time in the lock
    is by another clock. The lock may still be being written.
    """
    try:
        alive = Process.of_holder(holder).is_alive()
        return unchanged_s > _LOCK_TIMEOUT_S if alive is None else not alive
    except ValueError:
        return unchanged_s > _LOCK_IS_WRITTEN_WITHIN_S


def describe_holder(holder: bytes | None) -> str:
    try:
        process = Process.of_holder(holder or b"")
    except ValueError:
        return "an unknown process"
    return f"process {process.pid} on {process.node}"


def is_abandoned(temporary: Path, unchanged_s: float) -> bool:
    """Whether the process that wrote this file has died, or writes elsewhere and has not for a day.

    `unchanged_s`: for how long the file has been seen like this, by the caller's clock.
    """
    try:
        alive = Process.of(temporary.name.removesuffix(TEMPORARY_SUFFIX)).is_alive()
    except ValueError:
        alive = None
    return unchanged_s > _REMOTE_WRITER_TIMEOUT_S if alive is None else not alive
