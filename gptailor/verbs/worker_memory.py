"""A worker's memory for `gptailor plan`, computed with the same function as in a search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptailor.errors import ResourceError, sizes
from gptailor.evaluation.device_memory import DeviceMemory, device_memory, host_memory
from gptailor.evaluation.footprint import Blocks
from gptailor.evaluation.memory_policy import (
    MemoryPlan,
    check_dense,
    may_spread,
    plan_memory,
    room_beside,
)

if TYPE_CHECKING:
    from gptailor.config import EvaluationConfig
    from gptailor.evaluation.repair.footprint import RepairFootprint


@dataclass(frozen=True)
class GpuPart:
    """What one GPU of a worker holds.

    Attributes:
        gpu: its index among the worker's.
        first_layer, end_layer: half-open range of source layers.
        n_bytes: of one model, in the dtype of the forward pass.
    """

    gpu: int
    first_layer: int
    end_layer: int
    n_bytes: int


@dataclass(frozen=True)
class GpuPlan:
    """How a worker's GPUs are used.

    Attributes:
        parts: which GPU holds what; one part if the model is not spread.
        budget: what weights may take on each GPU, in bytes.
        cache: what merged layers may take on each GPU, in bytes.
        all_stay: every candidate fits; else the most used layers stay, and the others are read
            again each time.
    """

    parts: tuple[GpuPart, ...]
    budget: int
    cache: int
    all_stay: bool


@dataclass(frozen=True)
class RepairRoom:
    """How a worker's repairs fit beside everything else.

    Attributes:
        room: what candidates and merged layers leave on a device, in bytes.
        in_file: the teachers' states will not be in memory.
        why_not: a clause that says why a repair does not fit, or empty.
    """

    room: int
    in_file: bool
    why_not: str


@dataclass(frozen=True)
class WorkerMemory:
    """A worker's memory. All sizes are in bytes.

    Attributes:
        gpus: how its GPUs are used; None: it evaluates on the CPU, or can't evaluate.
        why_not: a sentence that says why it can't evaluate, or empty.
        cpu_cache: what merged layers may take on the CPU.
        cpu_copies: what copies of mapped candidates may take there.
        cpu_candidates: what candidates may take there if they are read; None if they are mapped.
        cpu_stay: all candidates, or all copies, stay there.
        repair: how repairs fit; None if nothing is repaired, or no evaluation fits.
    """

    gpus: GpuPlan | None
    why_not: str
    cpu_cache: int
    cpu_copies: int
    cpu_candidates: int | None
    cpu_stay: bool
    repair: RepairRoom | None


def find_worker_memory(
    blocks: Blocks,
    evaluation: EvaluationConfig,
    *,
    workers: int,
    gpus_per_worker: int,
    gpu_gib: float | None,
    repair: RepairFootprint | None = None,
) -> WorkerMemory:
    """Plans a worker's memory: on GPUs of its own, or on this machine's CPU.

    Args:
        blocks: the family's weights.
        evaluation: says which device, and how much of it candidates may take.
        workers: how many share the CPU.
        gpus_per_worker: how many GPUs each of them has.
        gpu_gib: memory of a GPU; None: of this machine's GPU, or the CPU if it has none.
        repair: what a repair takes; None if nothing is repaired.
    """
    gib = evaluation.candidates_gib
    candidate_bytes = None if gib is None else int(gib * 2**30)
    host = host_memory()
    cpu = plan_memory(blocks, "cpu", [host], host, workers=workers, candidate_bytes=candidate_bytes)
    gpu = _gpu_memory(evaluation.device, gpu_gib)
    gpus, why_not, found = None, "", None
    try:
        if gpu is None:
            check_dense(blocks, cpu, "cpu")
            if repair is not None:
                share = DeviceMemory(host.free_bytes // workers, host.total_bytes // workers)
                room = room_beside(blocks, cpu, [share])
                found = _repair_room(repair, room, host.free_bytes // workers, on_host=True)
        else:
            spreads = gpu_gib is not None or may_spread(evaluation.device, 1)
            memories = [gpu] * (gpus_per_worker if spreads else 1)
            plan = plan_memory(blocks, "cuda", memories, host, candidate_bytes=candidate_bytes)
            check_dense(blocks, plan, "cuda")
            gpus = _plan_gpus(plan)
            if repair is not None:
                room = room_beside(blocks, plan, memories[: len(plan.devices)])
                found = _repair_room(repair, room, host.free_bytes, on_host=False)
    except ResourceError as error:
        why_not = str(error)
    return WorkerMemory(
        gpus, why_not, cpu.cache_bytes, cpu.copy_bytes, candidate_bytes, cpu.all_stay, found
    )


def _repair_room(
    needs: RepairFootprint, room: int, host_bytes: int, *, on_host: bool
) -> RepairRoom:
    """Compares what a repair takes with what is left.

    Args:
        needs: what it takes.
        room: what is left on the device.
        host_bytes: a worker's share of the node's free memory.
        on_host: the device is the node.
    """
    in_file = needs.teachers > host_bytes // 4
    total = needs.on_device + (needs.teachers if on_host and not in_file else 0)
    why_not = ""
    if total > room:
        taken, left = sizes(total, room)
        why_not = (
            f"a repair takes {taken}, but candidates and merged layers leave {left}: lower "
            "evaluation.candidates_gib, use fewer workers per device, or read fewer documents "
            "(space.repair.calibration.documents)"
        )
    return RepairRoom(room, in_file, why_not)


def _gpu_memory(device: str, gpu_gib: float | None) -> DeviceMemory | None:
    """Memory of a worker's GPU; None if it will have none."""
    if gpu_gib is not None:
        n_bytes = int(gpu_gib * 2**30)
        return DeviceMemory(n_bytes, n_bytes)
    if device == "cpu":
        return None
    import torch

    from gptailor.evaluation.devices import pick_device

    return device_memory(pick_device(device)) if torch.cuda.is_available() else None


def _plan_gpus(found: MemoryPlan) -> GpuPlan:
    parts = tuple(
        GpuPart(gpu, device.first_layer, device.end_layer, device.model_bytes)
        for gpu, device in enumerate(found.devices)
        if device.model_bytes
    )
    return GpuPlan(parts, found.devices[0].candidate_bytes, found.cache_bytes, found.all_stay)
