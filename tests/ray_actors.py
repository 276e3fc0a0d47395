"""The processes of actors, as tests kill them."""

from __future__ import annotations

import time

import psutil


def await_actor(timeout_s: float = 60) -> psutil.Process:
    """An actor of this process's own cluster, idle or not. Titles change while one looks: look again."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for child in psutil.Process().children(recursive=True):
            if _title(child).startswith("ray::RayWorker"):
                return child
        time.sleep(0.01)
    raise AssertionError(f"no actor within {timeout_s:g} s")


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return ""
