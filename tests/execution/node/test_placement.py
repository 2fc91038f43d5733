"""Which GPUs and cores each worker gets, for every way in which launchers bind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gptailor.execution.node.placement import (
    Device,
    Place,
    find_place,
    place_workers,
    visible_devices,
)

UUIDS = ["GPU-aa", "GPU-bb", "GPU-cc", "GPU-dd"]


def place(node: str, cores: int | list[list[int]] = 8, gpus: list[str] | None = None) -> Place:
    named = [[i] for i in range(cores)] if isinstance(cores, int) else cores
    devices = tuple(Device(str(i), f"{node}/{name}") for i, name in enumerate(gpus or []))
    return Place(node, tuple(tuple(core) for core in named), devices)


def test_workers_of_a_node_divide_its_gpus_and_cores() -> None:
    places = [place("n1", 8, UUIDS)] * 3 + [place("n2", 8, UUIDS)] * 4
    found = place_workers(places, "auto")
    # the first node has one worker less, because of rank 0, so one worker sees two GPUs
    assert [p.visible_devices for p in found] == ["0", "1", "2,3", "0", "1", "2", "3"]
    assert [p.sharing for p in found] == [1] * 7
    assert [p.threads for p in found] == [2, 3, 3, 2, 2, 2, 2]
    assert found[0].cpus == (0, 1)
    cpus = [cpu for p in found[3:] for cpu in p.cpus or ()]
    assert cpus == list(range(8))
    assert [p.workers_here for p in found] == [3, 3, 3, 4, 4, 4, 4]


def test_more_workers_than_gpus_share_them() -> None:
    found = place_workers([place("n1", 8, UUIDS[:2])] * 5, "cuda")
    assert [p.visible_devices for p in found] == ["0", "0", "0", "1", "1"]
    assert [p.sharing for p in found] == [3, 3, 3, 2, 2]


def test_the_launchers_binding_is_kept() -> None:
    places = [place("n1", [[i]], [UUIDS[i]]) for i in range(3)]
    found = place_workers(places, "auto")
    assert [p.visible_devices for p in found] == ["0", "0", "0"]  # each sees only its own
    assert [p.sharing for p in found] == [1, 1, 1]
    assert [p.cpus for p in found] == [None] * 3
    assert [p.threads for p in found] == [1, 1, 1]


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_a_named_device_is_shared(device: str) -> None:
    found = place_workers([place("n1", 8, UUIDS)] * 2, device)
    assert [p.visible_devices for p in found] == [None, None]
    assert [p.sharing for p in found] == [2, 2]


def test_hardware_threads_of_a_core_stay_together() -> None:
    cores = [[0, 4], [1, 5], [2, 6], [3, 7]]
    found = place_workers([place("n1", cores)] * 2, "cpu")
    assert [p.cpus for p in found] == [(0, 4, 1, 5), (2, 6, 3, 7)]
    assert [p.threads for p in found] == [2, 2]
    found = place_workers([place("n1", cores)] * 6, "cpu")  # one hardware thread each, two for some
    assert sorted(cpu for p in found for cpu in p.cpus or ()) == list(range(8))
    found = place_workers([place("n1", [[0], [1]])] * 3, "cpu")  # too few, so no worker is bound
    assert [p.cpus for p in found] == [None] * 3
    assert [p.threads for p in found] == [1] * 3


def test_one_worker_has_everything() -> None:
    (found,) = place_workers([place("n1", 8, UUIDS)], "auto")
    assert (found.cpus, found.threads, found.visible_devices) == (None, 8, "0,1,2,3")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, [("GPU-aa", "GPU-aa"), ("GPU-bb", "GPU-bb")]),
        ("1", [("1", "GPU-bb")]),
        ("1,0", [("1", "GPU-bb"), ("0", "GPU-aa")]),
        ("GPU-b", [("GPU-b", "GPU-bb")]),
        ("MIG-1234", [("MIG-1234", "MIG-1234")]),
        ("0,-1,1", [("0", "GPU-aa")]),
        ("7", []),
        ("", []),
        ("NoDevFiles", []),
    ],
)
def test_visible_devices(value: str | None, expected: list[tuple[str, str]]) -> None:
    env = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    found = visible_devices(env, UUIDS[:2])
    assert [(device.token, device.identity) for device in found] == expected


def test_without_a_driver_the_variable_is_trusted() -> None:
    found = visible_devices({"CUDA_VISIBLE_DEVICES": "0,3"}, None)
    assert [device.token for device in found] == ["0", "3"]
    assert visible_devices({}, None) == ()


def test_this_machine() -> None:
    found = find_place({"SLURMD_NODENAME": "n7"})
    assert found.node == "n7"
    assert {cpu for core in found.cores for cpu in core} == os.sched_getaffinity(0)


NVML = """
#include <string.h>
int nvmlInitWithFlags(unsigned flags) { return INIT; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned* count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void** handle) {
  *handle = (void*)(i + 1L);
  return 0;
}
int nvmlDeviceGetUUID(void* handle, char* text, unsigned size) {
  strcpy(text, handle == (void*)1L ? "GPU-aa" : "GPU-bb");
  return UUID;
}
const char* nvmlErrorString(int code) { return "of this test"; }
"""


@pytest.mark.parametrize(
    ("init", "uuid", "expected"),
    [(0, 0, ["GPU-aa", "GPU-bb"]), (9, 0, []), (0, 15, [])],  # 9: no driver; 15: a GPU is lost
)
def test_the_driver_is_asked(init: int, uuid: int, expected: list[str], tmp_path: Path) -> None:
    """Through the maintained bindings, with a stand-in for the driver's library."""
    source, library = tmp_path / "nvml.c", tmp_path / "libnvidia-ml.so.1"
    source.write_text(NVML)
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    subprocess.run(
        [compiler, "-shared", "-fPIC", f"-DINIT={init}", f"-DUUID={uuid}", source, "-o", library],
        check=True,
    )
    assert devices_seen(LD_LIBRARY_PATH=str(tmp_path)) == expected


def test_a_machine_without_a_driver_has_no_gpus(tmp_path: Path) -> None:
    library = tmp_path / "libnvidia-ml.so.1"
    library.write_text("no library")
    assert devices_seen(LD_LIBRARY_PATH=str(tmp_path)) == []


def devices_seen(**environ: str) -> list[str]:
    """Identities of the GPUs that another process finds."""
    code = (
        "from gptailor.execution.node.placement import find_place\n"
        "print(*(device.identity for device in find_place().devices))"
    )
    inherited = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, **environ}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.split()
