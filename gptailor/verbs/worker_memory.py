"""A worker's memory for `gptailor plan`, computed with the same function as in a search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptailor.errors import ResourceError
from gptailor.evaluation.device_memory import DeviceMemory, device_memory, host_memory
from gptailor.evaluation.footprint import Blocks
from gptailor.evaluation.memory_policy import check_dense, may_spread, plan_memory

if TYPE_CHECKING:
    from gptailor.config import EvaluationConfig


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
class WorkerMemory:
    """A worker's memory. All sizes are in bytes.

    Attributes:
        gpus: how its GPUs are used; None: it evaluates on the CPU, or can't evaluate.
        why_not: a sentence that says why it can't evaluate, or empty.
        cpu_cache: what merged layers may take on the CPU.
        cpu_copies: what copies of mapped candidates may take there.
        cpu_candidates: what candidates may take there if they are read; None if they are mapped.
        cpu_stay: all candidates, or all copies, stay there.
    """

    gpus: GpuPlan | None
    why_not: str
    cpu_cache: int
    cpu_copies: int
    cpu_candidates: int | None
    cpu_stay: bool


def find_worker_memory(
    blocks: Blocks,
    evaluation: EvaluationConfig,
    *,
    workers: int,
    gpus_per_worker: int,
    gpu_gib: float | None,
) -> WorkerMemory:
    """Plans a worker's memory: on GPUs of its own, or on this machine's CPU.

    Args:
        blocks: the family's weights.
        evaluation: says which device, and how much of it candidates may take.
        workers: how many share the CPU.
        gpus_per_worker: how many GPUs each of them has.
        gpu_gib: memory of a GPU; None: of this machine's GPU, or the CPU if it has none.
    """
    gib = evaluation.candidates_gib
    candidate_bytes = None if gib is None else int(gib * 2**30)
    host = host_memory()
    cpu = plan_memory(blocks, "cpu", [host], host, workers=workers, candidate_bytes=candidate_bytes)
    gpu = _gpu_memory(evaluation.device, gpu_gib)
    gpus, why_not = None, ""
    try:
        if gpu is None:
            check_dense(blocks, cpu, "cpu")
        else:
            spreads = gpu_gib is not None or may_spread(evaluation.device, 1)
            memories = [gpu] * (gpus_per_worker if spreads else 1)
            gpus = _plan_gpus(blocks, memories, host, candidate_bytes)
    except ResourceError as error:
        why_not = str(error)
    return WorkerMemory(
        gpus, why_not, cpu.cache_bytes, cpu.copy_bytes, candidate_bytes, cpu.all_stay
    )


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


def _plan_gpus(
    blocks: Blocks,
    memories: Sequence[DeviceMemory],
    host: DeviceMemory,
    candidate_bytes: int | None,
) -> GpuPlan:
    found = plan_memory(blocks, "cuda", memories, host, candidate_bytes=candidate_bytes)
    check_dense(blocks, found, "cuda")
    parts = tuple(
        GpuPart(gpu, device.first_layer, device.end_layer, device.model_bytes)
        for gpu, device in enumerate(found.devices)
        if device.model_bytes
    )
    return GpuPlan(parts, found.devices[0].candidate_bytes, found.cache_bytes, found.all_stay)
