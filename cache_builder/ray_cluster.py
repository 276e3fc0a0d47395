"""The Ray cluster that a build joins: finding it, whether its head still answers, and its actors."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import time
from typing import Any

import ray
from ray._private.utils import read_ray_address
from ray.exceptions import RayActorError, RayTaskError

from teachercache.cache_builder.runner import log
from teachercache.pipeline.errors import BuildError, BuildInterruptedError, TeacherCacheError

_HEAD_TIMEOUT_S = 30.0  # a head with a Redis behind it may come back; Ray ends the process after 60 s
_CONNECT_TIMEOUT_S = 2.0


class Head:
    """Whether the cluster's head still answers. Without it, Ray's calls hang, and then end the process."""

    def __init__(self) -> None:
        self._address: str = ray.get_runtime_context().gcs_address
        self._heard = time.monotonic()

    def answers(self) -> bool:
        """Raises `BuildInterruptedError` when it has not answered for a long time."""
        if _answers(self._address):
            self._heard = time.monotonic()
            return True
        if self.is_gone():
            raise BuildInterruptedError(
                "The head of the Ray cluster is gone; everything committed stays.",
                got=f"no answer at {self._address} for {_HEAD_TIMEOUT_S:.0f} s",
                do="start the cluster, and run the same command again; it computes only what is missing",
            )
        log.warning("the head of the Ray cluster does not answer at %s", self._address)
        return False

    def is_gone(self) -> bool:
        return time.monotonic() - self._heard > _HEAD_TIMEOUT_S


def connect() -> None:
    """Join the cluster of this job or machine, or start a private one on this machine.

    Raises `BuildError` where RAY_ADDRESS names a cluster that does not answer.
    """
    quiet: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
    address = os.environ.get("RAY_ADDRESS")
    if address and address.startswith(("http://", "https://")):
        raise BuildError(
            "RAY_ADDRESS is where `ray job submit` sends its jobs; a build cannot join the cluster there.",
            got=f"RAY_ADDRESS={address}",
            expected="host:port of the head (6379 by default), or nothing on a machine of the cluster",
            do="submit jobs/cache_teachers.py with `ray job submit`, or set RAY_ADDRESS to the head",
        )
    if address and not _answers(address):
        raise BuildError(
            "The Ray cluster does not answer.",
            got=f"RAY_ADDRESS={address}",
            expected="the address of a running head",
            do="start it with ray start --head, or unset RAY_ADDRESS to use a cluster of this machine",
        )
    noted = None if address else read_ray_address()
    if noted is None or _answers(noted):  # Ray would try a dead cluster on this machine forever
        with contextlib.suppress(ConnectionError):
            ray.init(address="auto", **quiet)
    if not ray.is_initialized():
        # Ray guards a new cluster with a token. One given here leaves no ~/.ray/auth_token behind, which
        # would turn authentication on for every later `ray start` of this user.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        ray.init(address="local", include_dashboard=False, **quiet)


def _answers(address: str) -> bool:
    """Whether something listens there; names other than host and port, such as "auto", are left to Ray."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or "//" in host:
        return True
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def answer_of(call: Any) -> Any:
    """`ray.get`, which raises our own errors as the actor (or its constructor) raised them."""
    try:
        return ray.get(call)
    except RayTaskError as error:
        if isinstance(error.cause, TeacherCacheError):
            raise error.cause from error
        raise
    except RayActorError as error:
        raise BuildError(
            "A Ray actor could not load the teachers.",
            got=str(error),
            expected="an actor that builds every teacher of the recipe",
            do="fix the cause above; `teachercache build … runner.kind=local` shows it without Ray",
        ) from error
