"""moto's S3 on loopback, reached as people reach theirs: fixtures `running`, of a module, and `server`."""

from __future__ import annotations

import gc
import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import fsspec
import pytest
import s3fs
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

READ_TIMEOUT_S = 1.0
PART_BYTES = 5 << 20  # the least that S3 takes


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: str
    range: str | None


@dataclass
class Server:
    """moto's S3 behind a log, and behind faults: `fault(request)` is a status to fail with, "hang", or
    "late": what was asked for is done, and the answer comes after the client has asked again."""

    answered: list[tuple[Request, int]] = field(default_factory=list)
    fault: Callable[[Request], int | str | None] = lambda _: None

    def __post_init__(self) -> None:
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        request = Request(
            environ["REQUEST_METHOD"],
            environ["PATH_INFO"],
            environ.get("QUERY_STRING", ""),
            environ.get("HTTP_RANGE"),
        )
        with self._lock:
            fault = self.fault(request)
        if fault == "hang":
            time.sleep(READ_TIMEOUT_S + 0.5)
        elif fault not in (None, "late"):
            code = {500: "InternalError", 503: "SlowDown", 403: "AccessDenied"}[int(fault)]
            body = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
            start_response(f"{fault} {code}", [("Content-Length", str(len(body)))])
            return [body]

        def start(status: str, *rest: Any) -> Any:
            self.answered.append((request, int(status.split()[0])))
            return start_response(status, *rest)

        answer: Iterable[bytes] = self._moto(environ, start)
        if fault == "late":
            self._await_another(request)
        return answer

    def _await_another(self, request: Request) -> None:
        deadline = time.monotonic() + 60
        while [asked for asked, _ in self.answered].count(request) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)

    def requests(self, *methods: str) -> list[Request]:
        return [request for request, status in self.answered if request.method in methods and status < 300]


class OneContinue(WSGIRequestHandler):
    """werkzeug writes "100 Continue" itself, after http.server has; the second one stops aiohttp's clock."""

    def handle_expect_100(self) -> bool:
        return True


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    """The server with an empty bucket, s3://bucket, and the environment that leads to it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = Server()
    http = make_server("127.0.0.1", 0, server, threaded=True, request_handler=OneContinue)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{http.server_port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            patch.setenv(name, value)
        options = {"config_kwargs": {"read_timeout": READ_TIMEOUT_S}, "default_block_size": PART_BYTES}
        patch.setitem(fsspec.config.conf, "s3", options)
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().makedirs("bucket", exist_ok=True)
        yield server
    s3fs.S3FileSystem.clear_instance_cache()
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    running.answered.clear()
    yield running
    running.fault = lambda _: None
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):
        gc.collect()  # zarr leaves sessions of its filesystems to the collector, which aiohttp warns of
