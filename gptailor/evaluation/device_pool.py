"""The memory of one device of a worker: the candidates' weights and the merged layers.

There is nearly always one pool. A model that does not fit on one GPU has several, and each source
layer belongs to one of them (`memory_policy`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from gptailor.evaluation.device_weights import (
    Backend,
    DeviceWeights,
    Group,
    LoadingBackend,
    MappedBackend,
)
from gptailor.evaluation.memory_policy import MemoryPlan
from gptailor.evaluation.merge_cache import MergeCache
from gptailor.models.family import Family


class DevicePool:
    """The weights on one device.

    Args:
        weights: the candidates' weights.
        merged: layers, embeddings and heads that were merged on this device.
        streams: the candidates, in the dtypes of their files, do not all fit.
    """

    def __init__(self, weights: DeviceWeights, merged: MergeCache, *, streams: bool) -> None:
        self.weights = weights
        self.merged = merged
        self.streams = streams
        self.device = weights.backend.device

    def current(self) -> AbstractContextManager[Any]:
        """A context in which the pool's device is the current one."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()


def open_pools(
    family: Family,
    devices: Sequence[torch.device],
    plan: MemoryPlan,
    *,
    backend: Backend | None,
    on_evict: Callable[[Group], None],
    kept: Callable[[torch.dtype], Collection[str]],
) -> list[DevicePool]:
    """Opens a pool for each device of a plan.

    Args:
        family: the candidates.
        devices: at least as many as the plan uses.
        plan: what each device holds.
        backend: loads candidates onto the device if there is only one; None: chosen by the plan.
        on_evict, kept: see `DeviceWeights`.

    Raises:
        ResourceError: a device has no memory for the buffers of its loader.
    """
    pools = []
    for device, part in zip(devices, plan.devices, strict=False):
        how = backend if len(plan.devices) == 1 and not plan.is_mapped else None
        if how is None:
            mapped = plan.is_mapped
            how = MappedBackend() if mapped else LoadingBackend(device, pin_bytes=plan.pin_bytes)
        weights = DeviceWeights(
            family, how, part.candidate_bytes, part.merge_bytes, on_evict=on_evict, kept=kept
        )
        pools.append(DevicePool(weights, MergeCache(plan.cache_bytes), streams=part.streams))
    return pools
