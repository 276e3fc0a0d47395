"""The README's `teachercache submit` and `ray job submit`, against a cluster that `ray start --head` made."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from teachercache import FeatureCache
from teachercache.jobs.cli.building import _PASSED
from teachercache.pipeline.verify import verify
from tests.make_cache import build_recipe, make_images
from tests.wheel import Wheel

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
START_TIMEOUT_S = 240


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Ray guards new clusters with a token; this one is known to cluster and client alone."""
    here = Path(sys.executable).parent
    return os.environ | {
        "PATH": f"{here}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "COLUMNS": "200",
    }


@pytest.fixture(scope="module")
def dashboard(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the job server of a new cluster, which ends with the module and touches no other one.

    It knows nothing of the checkout: jobs bring their code.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start = (RAY, "start", "--head", "--block", "--num-cpus=2", "--num-gpus=0", "--port=0")
    cluster = subprocess.Popen(
        [*start, f"--dashboard-port={port}"],
        cwd=tmp_path_factory.mktemp("elsewhere"),
        env={name: value for name, value in environment.items() if name != "PYTHONPATH"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    yield f"http://127.0.0.1:{port}"
    cluster.terminate()
    cluster.wait(timeout=60)


def submit(address: str, environment: dict[str, str], *arguments: str) -> tuple[subprocess.Popen[str], str]:
    """`teachercache submit`, as soon as the new cluster takes jobs, and the line that names the job."""
    command = [sys.executable, "-m", "teachercache.jobs.cli", "submit", *arguments, "--address", address]
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # background jobs ignore it
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("raysubmit_"):
                return process, line
        _, errors = process.communicate()
        assert len(errors.splitlines()) <= 6
        assert "does not take the job" in errors
        assert time.monotonic() < deadline, errors
        time.sleep(1)


def recipe(folder: Path, **options: object) -> str:
    file = folder / "recipe.yaml"
    runner = {"num_actors": 1, "gpus_per_actor": 0, "batch_size": 4}
    built = build_recipe(folder / "cache", make_images(folder / "images", 16), runner=runner, **options)
    file.write_text(built.model_dump_json())
    return str(file)


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        ("AWS_SECRET_ACCESS_KEY", True),
        ("AWS_ENDPOINT_URL", True),
        ("AWS_CA_BUNDLE", False),
        ("AWS_DATA_PATH", False),
        ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", False),
    ],
)
def test_a_job_gets_no_variable_that_means_something_here_alone(name: str, passes: bool) -> None:
    assert bool(_PASSED.match(name)) is passes


def test_a_submitted_job_builds_a_cache_with_the_keys_of_where_it_was_typed(
    tmp_path: Path, dashboard: str, environment: dict[str, str]
) -> None:
    place = str(tmp_path / "cache")
    given = {"FSSPEC_PLACE_OF": place, "AWS_SECRET_ACCESS_KEY": "hidden", "AWS_PROFILE": "mine"}
    given["RAY_ADDRESS"] = "127.0.0.1:1"  # what is typed counts
    file = Path(recipe(tmp_path))
    file.write_text(file.read_text().replace(f'"{place}"', '"${oc.env:FSSPEC_PLACE_OF}"'))
    process, first = submit(
        dashboard.removeprefix("http://"), environment | given, str(file), "views.num_views=1"
    )
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, output + errors
    assert re.match(r"raysubmit_\w+ gets the variables AWS_", first)
    assert "AWS_SECRET_ACCESS_KEY=…" in first
    assert "AWS_PROFILE" not in first
    assert "hidden" not in first + output + errors
    assert "16 views in" in output
    assert output.rstrip().endswith("SUCCEEDED")
    cache = FeatureCache.open(tmp_path / "cache")
    assert cache.valid_samples().size == 16
    assert verify(cache, full=True) == []


def test_an_installed_wheel_builds_a_cache_by_rays_own_command(
    tmp_path: Path, dashboard: str, environment: dict[str, str], wheel: Wheel
) -> None:
    """The README's, where the package is installed on every node: here, in a folder on their path."""
    package = wheel.environment["PYTHONPATH"]
    variables = json.dumps({"env_vars": {"PYTHONPATH": package}})
    command = [RAY, "job", "submit", "--address", dashboard, "--runtime-env-json", variables, "--"]
    where = "python -c 'import teachercache; print(teachercache.__file__)'"
    build = f"python -m teachercache.jobs.cache_teachers {recipe(tmp_path)} views.num_views=1"
    command += ["sh", "-c", f"{where} && {build}"]
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
        )
        if "Failed to connect" not in done.stderr or time.monotonic() > deadline:
            break
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{package}/teachercache/__init__.py\n" in done.stdout
    assert "16 views in" in done.stdout
    assert verify(FeatureCache.open(tmp_path / "cache"), full=True) == []


def test_ctrl_c_says_how_to_stop_the_job_which_then_ends_cleanly(
    tmp_path: Path, dashboard: str, environment: dict[str, str]
) -> None:
    long = recipe(tmp_path, rows_per_shard=4)
    process, _ = submit(dashboard, environment, long, "views.num_views=1000")
    commits, deadline = tmp_path / "cache" / "commits" / "tiny", time.monotonic() + START_TIMEOUT_S
    while len(list(commits.glob("*.json"))) < 2:
        assert time.monotonic() < deadline, "no two shards"
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, output + errors
    follow, stop = re.search(r"It goes on: ray (.+)\nIt stops by: ray (.+)\n", output).groups()  # type: ignore[union-attr]
    for command in (stop, follow):
        done = subprocess.run(
            [RAY, *command.split()], env=environment, capture_output=True, text=True, timeout=120, check=False
        )
    assert "SIGTERM ended the build; everything committed stays" in done.stdout
    assert list((tmp_path / "cache").rglob("*.partial")) == []


def test_a_cluster_that_is_not_there_is_one_message(tmp_path: Path, environment: dict[str, str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "teachercache.jobs.cli", "submit", "demo", "--address", address]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"nothing that answers at http://{address}" in done.stderr
    assert len(done.stderr.splitlines()) <= 6
