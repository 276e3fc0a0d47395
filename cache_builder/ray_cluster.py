"""The Ray cluster that a build joins: finding it, whether its head still answers, and its actors."""

import contextlib
import logging
import math
import os
import secrets
import time
from dataclasses import dataclass
from typing import Any

import grpc
import ray
from ray._private.authentication import authentication_token_setup
from ray._private.grpc_utils import init_grpc_channel
from ray._private.utils import read_ray_address
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
from ray.exceptions import RayError, RayTaskError

from teachercache.cache_builder.runner import log
from teachercache.pipeline.errors import BuildError, BuildInterruptedError, TeacherCacheError

_HEAD_TIMEOUT_S = 30.0  # a head with a Redis behind it may come back; Ray ends the process after 60 s
_CONNECT_TIMEOUT_S = 5.0


class Head:
    """Whether the cluster's head still answers. Without it, Ray's calls hang, and then end the process."""

    def __init__(self) -> None:
        self._address: str = ray.get_runtime_context().gcs_address
        self._heard = time.monotonic()

    def answers(self) -> bool:
        """Raises `BuildInterruptedError` when it has not answered for a long time."""
        if _refusal(self._address) is None:
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


_GUARDED = "it wants another token"


def connect() -> bool:
    """Join the cluster of this job or machine, or start a private one here, and return whether it did that.

    Raises `BuildError` where RAY_ADDRESS names a cluster that cannot be joined.
    """
    quiet: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
    logging.getLogger("ray").setLevel(logging.ERROR)
    address = os.environ.get("RAY_ADDRESS")
    known = address or read_ray_address()  # Ray would try a dead cluster forever, and a stranger's at length
    refusal = _refusal(known) if known else None
    if refusal == _GUARDED:  # a token that is known lets us in; with one, calls to an open cluster fail
        authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        refusal = _refusal(known)
    if address and refusal:
        raise BuildError(
            "The Ray cluster cannot be joined.",
            got=f"RAY_ADDRESS={address}: {refusal}",
            expected="host:port of the head of a cluster, and RAY_AUTH_MODE and RAY_AUTH_TOKEN as there",
            do="ray start --head, or unset RAY_ADDRESS to use this machine; `teachercache submit` takes URLs",
        )
    if not refusal:
        with contextlib.suppress(ConnectionError):
            ray.init(address="auto", **quiet)
            return False
    # Ray guards a new cluster with a token. One given here leaves no ~/.ray/auth_token behind, which
    # would turn authentication on for every later `ray start` of this user.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    authentication_token_setup.AuthenticationTokenLoader.instance().reset_cache()
    ray.init(address="local", include_dashboard=False, **quiet)
    return True


def _refusal(address: str) -> str | None:
    """Why the head there cannot be joined; None also for names such as "auto", which are left to Ray."""
    if address.startswith(("http://", "https://")):
        return "that is where `ray job submit` sends jobs, which a build cannot join"
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or "//" in host:
        return None
    with init_grpc_channel(address) as channel:
        try:
            head = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
            head.GetClusterId(gcs_service_pb2.GetClusterIdRequest(), timeout=_CONNECT_TIMEOUT_S)
        except grpc.RpcError as error:
            is_guarded = error.code() == grpc.StatusCode.UNAUTHENTICATED
            return _GUARDED if is_guarded else "it does not answer"
    return None


@dataclass(frozen=True)
class Need:
    """What an actor takes, all of it on one node."""

    cpus: float
    gpus: float

    def __str__(self) -> str:
        return f"{self.cpus:g} CPUs and {self.gpus:g} GPUs"

    def room(self, nodes_may_join: bool, has_begun: bool) -> int:
        """How many actors the nodes have room for, were nothing else there.

        Raises `BuildError` for a build that has not begun if no node may join, or some have too little.
        """
        resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        nodes = [Need(node.get("CPU", 0), node.get("GPU", 0)) for node in resources]
        room = sum(int(min(n.cpus / self.cpus, n.gpus / self.gpus if self.gpus else math.inf)) for n in nodes)
        is_small = any(node.cpus and (node.gpus or not self.gpus) for node in nodes)
        if not room and not has_begun and (is_small or not nodes_may_join):
            raise BuildError(
                "No node of this Ray cluster has room for one actor.",
                got=f"nodes with {', '.join(sorted(map(str, set(nodes))))}",
                expected=f"one with {self}",
                do="start larger nodes, or lower runner.cpus_per_actor or runner.gpus_per_actor (0: on CPUs)",
            )
        return room


def as_ours(error: RayError) -> TeacherCacheError:
    """What an actor raised, as it raised it if it is ours, or how it ended; else in a few lines."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, TeacherCacheError):
        return cause
    return BuildError(
        "A Ray actor could not load the teachers or open the cache.",
        got=last_line(error),
        expected="an actor that builds every teacher of the recipe, and sees the cache and the images",
        do="fix it (runner.kind=local shows more); on small GPUs, take fewer teachers or runner.batch_size=1",
    )


def last_line(error: RayError) -> str:
    """What Ray's many lines come to: the error of the innermost call, or how a process ended."""
    return str(error).strip().splitlines()[-1].strip()
