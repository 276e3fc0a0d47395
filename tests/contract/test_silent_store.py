"""An S3 endpoint that accepts connections and never answers: every verb says so, and ends."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import s3fs
from typer.testing import CliRunner

from teachercache.jobs.cli import app
from teachercache.pipeline.errors import StorageError
from teachercache.pipeline.places import s3_patience
from teachercache.pipeline.places.open_storage import open_storage
from tests.make_cache import make_cache, make_images

READ_TIMEOUT_S = 0.3
WITHIN_S = 25.0  # with imports on a busy machine; 25 attempts with botocore's pauses take 45 s
URL = "s3://bucket/cache"


@pytest.fixture(scope="module")
def silent() -> Iterator[str]:
    """An endpoint whose connections the kernel accepts, and which nobody serves."""
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0), backlog=128) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_CONFIG_FILE", "/dev/null")
        patch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": READ_TIMEOUT_S}})
        s3fs.S3FileSystem.clear_instance_cache()
        yield endpoint
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    make_cache(folder / "cache", make_images(folder / "images", 2))
    return folder / "cache"


VERBS = {
    "inspect": f"inspect {URL}",
    "verify": f"verify {URL} --full",
    "repair": f"repair {URL}",
    "report": f"report {URL} -o {{tmp}}/report.html",
    "view": f"view {URL}",
    "norms": f"norms {URL} a b -o {{tmp}}/norms.png",
    "merge": f"merge {URL} s3://bucket/other -o {{tmp}}/merged",
    "subset": f"subset {URL} -o {{tmp}}/subset --fraction 0.5",
    "convert": f"convert {URL} -o {{tmp}}/tars --to webdataset",
    "convert to there": f"convert {{cache}} -o {URL} --to webdataset",
    "images there": "inspect {cache} --pictures {tmp}/maps.png --images s3://bucket",
    "build there": f"build demo source.path={{cache}}/../images cache={URL}",
    "build from a bucket": "build demo source.path=s3://bucket cache={tmp}/new",
    "build from a pattern": "build demo source.path=s3://bucket/train-*.tar cache={tmp}/new",
    "train": f"train demo_student cache={URL} output={{tmp}}/run",
    "probe": f"probe {URL} {URL}",
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_ends_with_a_message(silent: str, cache: Path, tmp_path: Path, verb: str) -> None:
    began = time.monotonic()
    words = VERBS[verb].format(tmp=tmp_path, cache=cache).split()
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, StorageError), (result.output, result.exception)
    assert f"does not answer.\n  got:      nothing from {silent}/" in str(result.exception)
    assert "read_timeout" in str(result.exception)
    assert time.monotonic() - began < WITHIN_S


def test_who_waits_says_for_what(
    silent: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(s3_patience, "_SAY_SO_AFTER_S", 0.1)
    with caplog.at_level(logging.WARNING), pytest.raises(StorageError):
        open_storage(URL).names("commits")
    (record,) = [one for one in caplog.records if one.name == s3_patience.__name__]
    assert record.getMessage().startswith(f"waiting for {silent}/bucket")


def test_what_the_user_says_of_time_outs_counts(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 0.1}})
    with pytest.raises(StorageError, match=r"the read_timeout of 0\.1 s"):
        open_storage("s3://other/cache").read("cache.json")
