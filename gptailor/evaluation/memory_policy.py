"""What a worker holds on each of its devices: candidates, copies of them, merged layers.

Pure functions from sizes to a plan. `gptailor plan` prints the plan; `ResidentModel` and
`DevicePool` follow it. On the CPU, candidates are views on mapped files, which cost nothing; only
their copies in another dtype have a budget. On a GPU, or where `evaluation.candidates_gib` limits
their memory, candidates are read into memory. Where they do not all fit, the most used layers stay,
and the others are read again when they are needed. Where one model does not fit, its layers are
spread over all GPUs of the worker.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gptailor.errors import ResourceError
from gptailor.evaluation.device_memory import DeviceMemory
from gptailor.evaluation.footprint import Blocks
from gptailor.evaluation.spread import gib, layer_ranges, place_layers

CACHED_MODELS = 8
"""Merged layers are kept up to this many times the size of the base, if there is memory."""

ROOM = 0.6
"""Fraction of a machine's free memory that copies of candidates in another dtype may take; the rest
is for merged layers, activations, and the candidates' files in the page cache."""


@dataclass(frozen=True)
class DevicePlan:
    """What one device of a worker holds. All sizes are in bytes.

    Attributes:
        first_layer, end_layer: half-open range of source layers; the first device also has
            embeddings, final norm and head.
        model_bytes: one model's part, in the dtype of the forward pass.
        candidate_bytes: what candidates may take, or their copies where files are mapped.
        merge_bytes: part of `candidate_bytes` that is reserved for what is read for one merge and
            then freed.
        streams: the candidates' parts, in the dtypes of their files, do not all fit.
    """

    first_layer: int
    end_layer: int
    model_bytes: int
    candidate_bytes: int
    merge_bytes: int = 0
    streams: bool = False


@dataclass(frozen=True)
class MemoryPlan:
    """How a worker uses the memory of its devices. All sizes are in bytes.

    Attributes:
        devices: the devices that are used; if more than one, the model is spread over them.
        is_mapped: candidates are views on mapped files.
        cache_bytes: what merged layers may take on each device.
        copy_bytes: the most that copies of mapped candidates take.
        pin_bytes: how much of the files may be page-locked for each device.
        fits: one dense model fits together with what one merge reads.
        all_stay: once loaded, all candidates and their copies stay on their devices.
    """

    devices: tuple[DevicePlan, ...]
    is_mapped: bool
    cache_bytes: int
    copy_bytes: int
    pin_bytes: int
    fits: bool
    all_stay: bool

    @property
    def device_of(self) -> tuple[int, ...]:
        """For each source layer, the index of its device."""
        return tuple(
            number
            for number, device in enumerate(self.devices)
            for _ in range(device.first_layer, device.end_layer)
        )


def is_mapped(device_type: str, candidate_bytes: int | None) -> bool:
    """Whether candidates are views on mapped files.

    Args:
        device_type: "cpu" or "cuda".
        candidate_bytes: what they may take if the user sets a limit; None otherwise.
    """
    return device_type == "cpu" and candidate_bytes is None


def may_spread(device: str, workers: int) -> bool:
    """Whether a worker uses further GPUs when a model does not fit on one.

    Args:
        device: the value of `evaluation.device`.
        workers: how many share the device.
    """
    return device in ("auto", "cuda") and workers == 1


def plan_memory(
    blocks: Blocks,
    device_type: str,
    memories: Iterable[DeviceMemory],
    host: DeviceMemory,
    *,
    workers: int = 1,
    candidate_bytes: int | None = None,
    cache_bytes: int | None = None,
) -> MemoryPlan:
    """Plans one device if a model fits there, else all devices that may be used.

    Args:
        blocks: the family's weights.
        device_type: "cpu" or "cuda".
        memories: memory of the devices that may be used, at least one. Those after the first are
            only queried if the model has to be spread.
        host: memory of the node.
        workers: how many share the first device.
        candidate_bytes: what candidates may take on each device; None: see `is_mapped`; on a GPU
            what is free there, less headroom.
        cache_bytes: what merged layers may take on each device; None: see `CACHED_MODELS`.

    Raises:
        ResourceError: a model does not fit on several devices together. A single device is planned
            even so, as cut models may fit there: see `check_dense`.
    """
    rest = iter(memories)
    first = next(rest)
    if cache_bytes is None:  # at most this worker's share of an eighth
        cache_bytes = min(CACHED_MODELS * blocks.base, first.total_bytes // (8 * workers))
    if is_mapped(device_type, candidate_bytes):
        return _plan_mapped(blocks, host, workers, cache_bytes)

    def budget(memory: DeviceMemory) -> int:
        if candidate_bytes is not None:
            return candidate_bytes
        return _weights_budget(memory, cache_bytes, workers)

    num_layers = len(blocks.layers)
    budgets = [budget(first)]
    placement: Sequence[int] = [0] * num_layers
    fits = _dense_bytes(blocks, budgets[0]) <= budgets[0]
    if not fits and (more := [budget(memory) for memory in rest]):
        budgets += more
        placement = _place(blocks, budgets)
        fits = True
    ranges = layer_ranges(placement)
    devices = [
        _device_plan(blocks, ranges.get(number, range(0)), number == 0, n_bytes)
        for number, n_bytes in enumerate(budgets)
    ]
    # Page-locking a file pays off only if it is read again and again.
    streams = blocks.files > sum(budgets)
    return MemoryPlan(
        devices=tuple(devices),
        is_mapped=False,
        cache_bytes=cache_bytes,
        copy_bytes=0,
        pin_bytes=host.total_bytes // (4 * workers * len(budgets)) if streams else 0,
        fits=fits,
        all_stay=all(_all_stay(blocks, device, n == 0) for n, device in enumerate(devices)),
    )


def _plan_mapped(blocks: Blocks, host: DeviceMemory, workers: int, cache_bytes: int) -> MemoryPlan:
    room = max(blocks.held, int(ROOM * host.free_bytes) // workers)
    return MemoryPlan(
        devices=(DevicePlan(0, len(blocks.layers), blocks.model, room),),
        is_mapped=True,
        cache_bytes=cache_bytes,
        copy_bytes=min(blocks.copies, room),
        pin_bytes=0,
        fits=True,
        all_stay=blocks.copies <= room,
    )


def room_beside(blocks: Blocks, plan: MemoryPlan, memories: Sequence[DeviceMemory]) -> int:
    """What is left for anything else beside candidates, their copies and merged layers, on the
    device with the least room, in bytes.

    Args:
        blocks: the family's weights.
        plan: how devices are used.
        memories: a worker's share of each of them, in the same order.
    """
    room = []
    for number, (device, memory) in enumerate(zip(plan.devices, memories, strict=True)):
        wanted = _wanted_bytes(blocks, device, number == 0)
        taken = plan.copy_bytes if plan.is_mapped else min(wanted, device.candidate_bytes)
        if device.model_bytes:
            room.append(memory.free_bytes - taken - plan.cache_bytes)
    return max(0, min(room))


def check_dense(blocks: Blocks, plan: MemoryPlan, device_type: str) -> None:
    """Checks that a dense model fits, as a search evaluates dense models first.

    Raises:
        ResourceError: it does not fit.
    """
    if plan.fits:
        return
    budget = plan.devices[0].candidate_bytes
    if device_type == "cuda":
        _place(blocks, [budget])  # raises an error that says what is missing
    raise too_small(budget, device_type)


def too_small(candidate_bytes: int, device: object) -> ResourceError:
    """The error for a recipe that needs more than candidates may take on a device."""
    return ResourceError(
        f"One recipe's layers need more than the {gib(candidate_bytes)} GiB that "
        f"candidates may take on {device}: raise evaluation.candidates_gib or "
        "use fewer workers per device."
    )


def _weights_budget(memory: DeviceMemory, cache_bytes: int, workers: int) -> int:
    """What candidates may take on a GPU: a worker's share of the free memory, minus headroom and
    what merged layers may take."""
    share = min(memory.free_bytes, memory.total_bytes // workers)
    headroom = max(share // 8, min(2 << 30, share // 4))  # activations, logits, the allocator
    return max(0, share - headroom - cache_bytes)


def _dense_bytes(blocks: Blocks, budget: int) -> int:
    """The bytes that a dense model needs of a device's budget, including what is read for one merge
    where not all candidates fit."""
    return blocks.model + (blocks.largest_merge if blocks.files > budget else 0)


def _place(blocks: Blocks, budgets: Sequence[int]) -> tuple[int, ...]:
    """Each source layer's device, chosen so each device has room for what one merge reads.

    Raises:
        ResourceError: the model does not fit.
    """
    free = [max(budget - blocks.largest_merge, 0) for budget in budgets]
    if max(free) == 0:
        raise ResourceError(
            f"One merge reads {gib(blocks.largest_merge)} GiB, but weights may take only "
            f"{gib(max(budgets))} GiB on a GPU: use larger GPUs."
        )
    return place_layers(blocks.layers, blocks.outside, free)


def _device_plan(blocks: Blocks, layers: range, has_ends: bool, candidate_bytes: int) -> DevicePlan:
    outside, read_outside = (blocks.outside, blocks.read_outside) if has_ends else (0, 0)
    read = blocks.read_layers[layers.start : layers.stop]
    streams = sum(read) + read_outside > candidate_bytes
    return DevicePlan(
        first_layer=layers.start,
        end_layer=layers.stop,
        model_bytes=sum(blocks.layers[layers.start : layers.stop]) + outside,
        candidate_bytes=candidate_bytes,
        merge_bytes=max(read, default=0) if streams else 0,
        streams=streams,
    )


def _all_stay(blocks: Blocks, device: DevicePlan, has_ends: bool) -> bool:
    return _wanted_bytes(blocks, device, has_ends) <= device.candidate_bytes


def _wanted_bytes(blocks: Blocks, device: DevicePlan, has_ends: bool) -> int:
    """A device's part of all candidates in the dtypes of their files, which merges read, together
    with their copies."""
    layers = slice(device.first_layer, device.end_layer)
    wanted = sum(blocks.read_layers[layers]) + (blocks.read_outside if has_ends else 0)
    if blocks.copies:
        wanted += device.model_bytes * blocks.num_candidates
    return wanted
