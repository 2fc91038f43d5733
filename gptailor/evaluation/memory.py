"""How much memory a node's programs may have, and still take: of the machine, or of a group."""

from __future__ import annotations

from pathlib import Path

_UNLIMITED = 1 << 60
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


def available_bytes() -> int:
    """What can be taken without swapping; clean page cache counts as available."""
    return min(_machine("MemAvailable"), _group_limit())


def total_bytes() -> int:
    """What the programs of this control group may have together: all of the machine, or less."""
    return min(_machine("MemTotal"), _group_limit())


def _machine(what: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    return _UNLIMITED


def _group_limit() -> int:
    """The smallest limit of this process's control groups, of which page cache is a part, too."""
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
