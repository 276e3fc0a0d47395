"""The cores of a machine that are near a GPU, and the share of them that a process on it takes."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

CORES_SWITCH = "TEACHERCACHE_NEAR_CORES"  # 0: processes stay wherever they are put
_DEVICES = Path("/sys/bus/pci/devices")


def near_cores(gpu: Any, devices: Path = _DEVICES) -> tuple[set[int], int]:
    """Those of the NUMA node of `gpu` (torch's properties of a device) that this process may use, and how
    many GPUs share them; all that it may use, where the system does not say, or few of them are near."""
    allowed = os.sched_getaffinity(0)
    own = devices / f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
    try:
        node, kind = _cores(own), _kind(own)
        nodes = [_cores(one) for one in devices.iterdir() if _kind(one) == kind]
    except (OSError, ValueError):
        return allowed, 1
    near, machine = allowed & node, set[int]().union(*nodes)
    # A job that has a part of the cores has such a part of the GPUs.
    sharing = max(1, round(nodes.count(node) * len(near) / len(node)))
    of_all = max(1, round(len(nodes) * len(allowed & machine) / len(machine)))
    few = 2 * len(near) / sharing < len(allowed) / of_all  # its cores are elsewhere
    return (allowed, of_all) if few else (near, sharing)


def share_of_cores(gpu: Any, devices: Path = _DEVICES) -> int:
    """How many cores each process has, if there is one for each GPU."""
    cores, sharing = near_cores(gpu, devices)
    return max(1, len(cores) // sharing)


def stay_near(gpu: Any, devices: Path = _DEVICES) -> None:
    """Keep this process, whichever thread asks, on the cores near `gpu`, unless `CORES_SWITCH` is 0."""
    if os.environ.get(CORES_SWITCH) != "0":
        cores, _ = near_cores(gpu, devices)
        for thread in Path("/proc/self/task").iterdir():
            with suppress(ProcessLookupError):  # it has ended
                os.sched_setaffinity(int(thread.name), cores)


def _kind(device: Path) -> tuple[str, str]:
    return (device / "vendor").read_text(), (device / "class").read_text()[:4]


def _cores(device: Path) -> set[int]:
    """Those of its node: of "0-3,8"."""
    text = (device / "local_cpulist").read_text()
    ends = [[int(end) for end in part.split("-")] for part in text.split(",")]
    return {core for first, *last in ends for core in range(first, (last or [first])[0] + 1)}
