"""A process stays on the cores near its GPU, and takes its share of them."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from teachercache.pipeline.places.cores import CORES_SWITCH, near_cores, share_of_cores, stay_near

GPU = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x17, pci_device_id=0)


@pytest.fixture
def devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three GPUs on two nodes, and the graphics chip of the board; 14 of 16 cores may be used."""
    for name, vendor, kind, cores in (
        ("0000:17:00.0", "0x10de", "0x030200", "0-3,8-11"),
        ("0000:65:00.0", "0x10de", "0x030200", "0-3,8-11"),
        ("0000:ca:00.0", "0x10de", "0x030200", "4-7,12-15"),
        ("0000:03:00.0", "0x1a03", "0x030000", "0-3,8-11"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        for file, text in ("vendor", vendor), ("class", kind), ("local_cpulist", cores):
            (folder / file).write_text(f"{text}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(2, 16)))
    return tmp_path


def test_the_cores_of_a_node_are_shared_by_its_gpus(devices: Path) -> None:
    assert near_cores(GPU, devices) == ({2, 3, 8, 9, 10, 11}, 2)
    assert share_of_cores(GPU, devices) == 3


@pytest.mark.parametrize(
    ("allowed", "found"),
    [
        pytest.param({0, 1, 2, 3}, ({0, 1, 2, 3}, 1), id="half a node, for one of its two GPUs"),
        pytest.param({0, *range(4, 8), *range(12, 15)}, ({0, *range(4, 8), *range(12, 15)}, 2), id="far"),
    ],
)
def test_a_job_with_a_part_of_the_cores_shares_them_with_its_part_of_the_gpus(
    devices: Path, monkeypatch: pytest.MonkeyPatch, allowed: set[int], found: tuple[set[int], int]
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed)
    assert near_cores(GPU, devices) == found


@pytest.mark.parametrize("text", ["", "16-31\n", "garbled\n"])
def test_all_cores_are_near_where_the_system_does_not_say(devices: Path, text: str) -> None:
    (devices / "0000:17:00.0" / "local_cpulist").write_text(text)
    assert near_cores(GPU, devices)[0] == set(range(2, 16))
    assert near_cores(GPU, devices / "nowhere") == (set(range(2, 16)), 1)


def test_all_threads_of_a_process_stay_near_or_none(devices: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = dict[int, set[int]]()
    monkeypatch.setattr(os, "sched_setaffinity", calls.__setitem__)
    monkeypatch.setenv(CORES_SWITCH, "0")
    stay_near(GPU, devices)
    assert not calls
    monkeypatch.delenv(CORES_SWITCH)
    with ThreadPoolExecutor(1) as pool:
        threads = {threading.get_native_id(), pool.submit(threading.get_native_id).result()}
        pool.submit(stay_near, GPU, devices).result()
    assert threads <= calls.keys()
    assert all(cores == {2, 3, 8, 9, 10, 11} for cores in calls.values())
