"""Assigns GPUs, cores and threads to the workers of a node.

Launchers bind differently: some give each rank its own GPU and cores, others give all ranks of a
node everything. What a rank has to itself stays as it is; what several ranks of a node share is
divided among its workers. Rank 0 needs no GPU and little time, so it does not count.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Device:
    """A GPU that a rank sees.

    Attributes:
        token: its entry in CUDA_VISIBLE_DEVICES.
        identity: the same in every process that sees the same GPU.
    """

    token: str
    identity: str


@dataclass(frozen=True)
class Place:
    """The node, cores and GPUs that a rank sees.

    Attributes:
        node: name of the machine.
        cores: the cores that it may run on, each as its logical CPUs.
        devices: the GPUs that it sees, in order.
    """

    node: str
    cores: tuple[tuple[int, ...], ...]
    devices: tuple[Device, ...]


@dataclass(frozen=True)
class Placement:
    """The resources that a worker should use.

    Attributes:
        cpus: logical CPUs to run on; None: unchanged.
        threads: number of threads for computing.
        visible_devices: value of CUDA_VISIBLE_DEVICES; None: unchanged.
        sharing: how many workers share its device.
        workers_here: how many workers its node has.
    """

    cpus: tuple[int, ...] | None
    threads: int
    visible_devices: str | None
    sharing: int
    workers_here: int


def place_workers(places: Sequence[Place], device: str) -> list[Placement]:
    """Divides the nodes' resources among the workers; returns placements in the workers' order.

    Args:
        places: what each worker sees.
        device: as in `search.yaml`.
    """
    nodes: dict[str, list[int]] = {}
    for worker, place in enumerate(places):
        nodes.setdefault(place.node, []).append(worker)
    placements: dict[int, Placement] = {}
    for workers in nodes.values():
        local = [places[worker] for worker in workers]
        cpus = _divided_cores([place.cores for place in local])
        devices: list[tuple[Device, ...] | None] = [None] * len(local)
        if device in ("auto", "cuda"):
            devices = _divided_devices([place.devices for place in local])
        for index, worker in enumerate(workers):
            own, cores = devices[index], cpus[index]
            masks = [place.cores for place in local]
            placements[worker] = Placement(
                cpus=None if cores is None else _flat(cores),
                threads=_num_threads(cores or local[index].cores, masks),
                visible_devices=None if not own else ",".join(d.token for d in own),
                sharing=_num_sharing(index, devices),
                workers_here=len(workers),
            )
    return [placements[worker] for worker in range(len(places))]


def find_place(env: Mapping[str, str] = os.environ) -> Place:
    """The node, cores and GPUs that this process sees."""
    node = env.get("SLURMD_NODENAME") or socket.gethostname()
    return Place(node, _cores(sorted(os.sched_getaffinity(0))), visible_devices(env, _nvml_uuids()))


def visible_devices(env: Mapping[str, str], uuids: Sequence[str] | None) -> tuple[Device, ...]:
    """The GPUs that CUDA will see.

    Args:
        env: may have CUDA_VISIBLE_DEVICES.
        uuids: of all GPUs that the process may use, in the driver's order; None if unknown.
    """
    text = env.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return tuple(Device(uuid, uuid) for uuid in uuids or ())
    devices = []
    for word in text.split(","):
        token = word.strip()
        if not re.fullmatch(r"\d+|(GPU|MIG)-.+", token):
            break  # like CUDA, which ignores everything after an invalid entry
        identity = token
        if token.isdecimal() and uuids is not None:
            if int(token) >= len(uuids):
                break
            identity = uuids[int(token)]
        elif uuids is not None:
            identity = next((uuid for uuid in uuids if uuid.startswith(token)), token)
        devices.append(Device(token, identity))
    return tuple(devices)


Cores = tuple[tuple[int, ...], ...]


def _divided_cores(masks: Sequence[Cores]) -> list[Cores | None]:
    """The cores of each worker of a node, or None if it keeps what it has."""
    result: list[Cores | None] = [None] * len(masks)
    for mask in set(masks):
        group = [i for i, other in enumerate(masks) if other == mask]
        # whole cores if there are enough: two workers on one core's threads slow each other down
        units = mask if len(mask) >= len(group) else tuple((cpu,) for cpu in _flat(mask))
        if len(group) == 1 or len(units) < len(group):
            continue
        for position, index in enumerate(group):
            result[index] = units[_share(position, len(group), len(units))]
    return result


def _divided_devices(seen: Sequence[tuple[Device, ...]]) -> list[tuple[Device, ...] | None]:
    """The GPUs of each worker of a node."""
    result: list[tuple[Device, ...] | None] = [None] * len(seen)
    for devices in set(seen):
        group = [i for i, other in enumerate(seen) if other == devices]
        for position, index in enumerate(group):
            if len(devices) >= len(group):
                result[index] = devices[_share(position, len(group), len(devices))]
            elif devices:
                result[index] = (devices[position * len(devices) // len(group)],)
    return result


def _share(position: int, parts: int, total: int) -> slice:
    return slice(position * total // parts, (position + 1) * total // parts)


def _num_sharing(index: int, devices: Sequence[tuple[Device, ...] | None]) -> int:
    own = devices[index]
    if not own:
        return len(devices)  # all workers share the node itself
    names = {device.identity for device in own}
    return sum(1 for other in devices if other and names & {d.identity for d in other})


def _num_threads(cores: Cores, masks: Sequence[Cores]) -> int:
    """The number of cores, divided by the number of workers that share them."""
    cpus = set(_flat(cores))
    sharing = sum(1 for mask in masks if cpus == set(_flat(mask)))
    return max(len(cores) // max(sharing, 1), 1)


def _flat(cores: Cores) -> tuple[int, ...]:
    return tuple(cpu for core in cores for cpu in core)


def _cores(cpus: Sequence[int]) -> Cores:
    """Logical CPUs grouped by core, cores sorted by socket, according to Linux."""
    cores: dict[tuple[int, int, int], list[int]] = {}
    for cpu in cpus:
        folder = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            socket_id = int((folder / "physical_package_id").read_text())
            key = (socket_id, int((folder / "core_id").read_text()), 0)
        except (OSError, ValueError):
            key = (0, cpu, 1)
        cores.setdefault(key, []).append(cpu)
    return tuple(tuple(cores[key]) for key in sorted(cores))


def _nvml_uuids() -> list[str] | None:
    """UUIDs of the GPUs that this process may use, from the driver's library; None without one.

    torch could tell, too, but would fix the visible devices by doing so.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no library of a driver, or no driver
        return None
    try:
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        return [pynvml.nvmlDeviceGetUUID(handle) for handle in handles]
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()
