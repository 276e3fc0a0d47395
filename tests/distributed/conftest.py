"""What the tests of a cluster share."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

import pytest
import ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray cluster of this process alone, with two CPUs."""
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # or Ray leaves one in ~/.ray
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=0,
        include_dashboard=False,
        logging_level="error",
        log_to_driver=False,
    )
    yield
    ray.shutdown()
