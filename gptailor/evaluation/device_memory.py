"""The total and free memory of a device: a GPU, or this node.

On a node, the smallest limit of this process's control groups applies, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_UNLIMITED = 1 << 60
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class DeviceMemory:
    """Memory of one device, in bytes.

    Attributes:
        free_bytes: memory that is not in use.
        total_bytes: all memory.
    """

    free_bytes: int
    total_bytes: int


def device_memory(device: torch.device) -> DeviceMemory:
    """Memory of a GPU, or of this node.

    Side effect: a process's first call for a GPU takes a few hundred MB of its memory.
    """
    if device.type != "cuda":
        return host_memory()
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return DeviceMemory(free, int(torch.cuda.get_device_properties(device).total_memory))


def host_memory() -> DeviceMemory:
    """Memory of this node, as far as this process may use it."""
    return DeviceMemory(available_bytes(), total_bytes())


def available_bytes() -> int:
    """Memory that can be allocated without swapping; clean page cache counts as available."""
    return min(_machine("MemAvailable"), _group_limit())


def total_bytes() -> int:
    """Memory that this control group's programs may use together: the machine's, or less."""
    return min(_machine("MemTotal"), _group_limit())


def _machine(what: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    return _UNLIMITED


def _group_limit() -> int:
    """The smallest limit of this process's control groups; page cache counts towards it, too."""
    limit = _UNLIMITED
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return limit
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            folder, name = _CGROUPS / path.lstrip("/"), "memory.max"
        elif "memory" in controllers.split(","):
            folder, name = _CGROUPS / "memory" / path.lstrip("/"), "memory.limit_in_bytes"
        else:
            continue
        for group in (folder, *folder.parents):
            try:
                text = (group / name).read_text().strip()
            except OSError:
                continue
            if text.isdigit():
                limit = min(limit, int(text))
    return limit
