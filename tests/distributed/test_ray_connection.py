"""Which cluster a build joins: never one that is dead, and never without a word."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest
import ray
from rich.console import Console

from teachercache.cache_builder import ray_cluster
from teachercache.cache_builder.builder import build
from teachercache.pipeline.errors import BuildError
from tests.make_cache import build_recipe, make_images

RUNNER = {"kind": "ray", "batch_size": 4, "decode_threads": 1, "gpus_per_actor": 0, "num_actors": 1}


@pytest.fixture
def dead_address() -> str:
    """Where nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def test_a_dead_cluster_of_this_machine_is_passed_over(
    tmp_path: Path, dead_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray.shutdown()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_cluster, "read_ray_address", lambda: dead_address)
    images = make_images(tmp_path / "images", 4)
    recipe = build_recipe(tmp_path / "cache", images, runner=RUNNER)
    assert build(recipe, Console(quiet=True)).views == 8
    assert not ray.is_initialized()


@pytest.fixture
def guarded_address() -> Iterator[str]:
    """A head that takes no token of ours, as Ray's does it."""

    def refuse(_: object, context: grpc.ServicerContext) -> None:
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken: it is missing or incorrect")

    server = grpc.server(futures.ThreadPoolExecutor(1))
    refusing = grpc.unary_unary_rpc_method_handler(refuse)
    service = "ray.rpc.NodeInfoGcsService"
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {"GetClusterId": refusing}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


def test_the_guarded_cluster_of_somebody_else_is_passed_over(
    guarded_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_cluster, "read_ray_address", lambda: guarded_address)
    monkeypatch.setattr(ray, "init", lambda address, **_: started.append(address))
    assert ray_cluster.connect()
    assert started == ["local"]


def test_a_guarded_cluster_that_is_asked_for_is_an_error(
    guarded_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", guarded_address)
    with pytest.raises(BuildError, match=r"wants another token(.|\n)*RAY_AUTH_TOKEN") as caught:
        ray_cluster.connect()
    assert len(str(caught.value).splitlines()) <= 6


def test_an_address_that_does_not_answer_is_an_error(
    tmp_path: Path, dead_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray.shutdown()
    monkeypatch.setenv("RAY_ADDRESS", dead_address)
    recipe = build_recipe(tmp_path / "cache", make_images(tmp_path / "images", 2), runner=RUNNER)
    with pytest.raises(BuildError, match=rf"RAY_ADDRESS={dead_address}(.|\n)*ray start --head"):
        build(recipe, Console(quiet=True))
