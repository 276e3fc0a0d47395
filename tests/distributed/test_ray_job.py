"""The README's `ray job submit`, against a cluster that `ray start --head` made."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from teachercache import FeatureCache
from teachercache.pipeline.verify import verify
from tests.make_cache import build_recipe, make_images

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
START_TIMEOUT_S = 120


@pytest.fixture
def environment() -> dict[str, str]:
    """Ray guards new clusters with a token; this one is known to cluster and client alone."""
    return os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


@pytest.fixture
def dashboard(environment: dict[str, str]) -> Iterator[str]:
    """Address of the job server of a new cluster, which ends with the test and touches no other one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start = (RAY, "start", "--head", "--block", "--num-cpus=2", "--num-gpus=0", "--port=0")
    cluster = subprocess.Popen(
        [*start, f"--dashboard-port={port}"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    yield f"http://127.0.0.1:{port}"
    cluster.terminate()
    cluster.wait(timeout=60)


def submit(address: str, environment: dict[str, str], *entry: str) -> str:
    """Submit, as soon as the new cluster takes jobs; returns the job's output."""
    command = [RAY, "job", "submit", "--address", address, "--working-dir", ".", "--", *entry]
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
        )
        not_ready = ("No available agent", "Failed to connect", "Connection refused", "Failed to establish")
        if done.returncode == 0 or not any(text in done.stdout + done.stderr for text in not_ready):
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            return done.stdout
        assert time.monotonic() < deadline, done.stderr[-3000:]
        time.sleep(1)


def test_a_submitted_job_builds_a_cache(tmp_path: Path, dashboard: str, environment: dict[str, str]) -> None:
    images = make_images(tmp_path / "images", 16)
    recipe = tmp_path / "recipe.yaml"
    runner = {"num_actors": 1, "gpus_per_actor": 0, "batch_size": 4}
    recipe.write_text(build_recipe(tmp_path / "cache", images, runner=runner).model_dump_json())
    output = submit(
        dashboard, environment, sys.executable, "jobs/cache_teachers.py", str(recipe), "views.num_views=1"
    )
    assert "16 views in" in output
    cache = FeatureCache.open(tmp_path / "cache")
    assert cache.valid_samples().size == 16
    assert verify(cache, full=True) == []
