"""How much memory a program may still use: the machine's, or less where a cgroup has a limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptailor.evaluation import device_memory


def machine() -> int:
    """MemFree, a lower bound of the available memory."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemFree:"))


def test_no_group_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory, "_OWN_CGROUPS", tmp_path / "nothing")
    assert device_memory.available_bytes() > 0.5 * machine()


@pytest.mark.parametrize(
    ("line", "limits"),
    [
        ("0::/slurm/job_7/step_0\n", {"slurm/job_7/memory.max": 7000}),
        ("0::/slurm/job_7/step_0\n", {"slurm/memory.max": 7000, "slurm/job_7/memory.max": 9000}),
        ("0::/outside/of/the/container\n", {"memory.max": 7000}),
        ("5:cpu:/x\n4:memory:/job\n0::/\n", {"memory/job/memory.limit_in_bytes": 7000}),
        ("4:cpu,memory:/job\n", {"memory/memory.limit_in_bytes": 7000}),
    ],
)
def test_the_smallest_limit_on_the_way_up_counts(
    line: str, limits: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = tmp_path / "cgroup"
    for name, limit in limits.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(f"{limit}\n")
    deepest = groups / "slurm/job_7/step_0"
    deepest.mkdir(parents=True, exist_ok=True)
    (deepest / "memory.max").write_text("max\n")
    (tmp_path / "own").write_text(line)
    monkeypatch.setattr(device_memory, "_OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(device_memory, "_CGROUPS", groups)
    assert device_memory.available_bytes() == device_memory.total_bytes() == 7000
