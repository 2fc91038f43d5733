"""What one device of a worker holds: candidates' layers, merged layers; how inputs get there.

Nearly always there is one. A model that does not fit on one GPU has several; then every source
layer has its home on one of them (`spread`), and the modules of that layer move what they are
given to it before they compute.

Never run on a GPU yet: that layers end up on their devices and that no operation meets tensors of
two devices is tested with fake tensors, the results with homes that are all on the CPU.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from gptailor.evaluation.device_weights import (
    Backend,
    DeviceWeights,
    Group,
    GroupKey,
    LoadingBackend,
    MappedBackend,
    Place,
    default_budget,
)
from gptailor.evaluation.forward_dtype import PRECISE, ROOM
from gptailor.evaluation.memory import available_bytes, total_bytes
from gptailor.evaluation.slots import Parameters
from gptailor.evaluation.spread import place_layers
from gptailor.models.family import Family

Key = tuple[Any, ...]
"""What the tensors of a layer, or those outside the layers, follow from."""


class DevicePool:
    """The candidates' weights on one device, and merged layers beside them.

    Args:
        weights: the candidates' layers there.
        cache_bytes: how much merged layers may keep.
    """

    def __init__(self, weights: DeviceWeights, cache_bytes: int) -> None:
        self.weights = weights
        self.device = weights.backend.device
        self.merged: OrderedDict[Key, Parameters] = OrderedDict()
        self.merged_bytes = 0
        self._cache_bytes = cache_bytes

    def keep(self, key: Key, parameters: Parameters) -> None:
        """Keeps a merged layer; those that were not used for longest may go."""
        self.merged[key] = parameters
        self.merged_bytes += _n_bytes(parameters.values())
        while self.merged_bytes > self._cache_bytes and len(self.merged) > 1:
            _, old = self.merged.popitem(last=False)
            self.merged_bytes -= _n_bytes(old.values())

    def forget(self, key: Key) -> None:
        """Lets go of a merged layer, if it is kept."""
        self.merged_bytes -= _n_bytes(self.merged.pop(key, {}).values())

    def current(self) -> AbstractContextManager[Any]:
        """Makes its device the current one."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()


def open_pools(
    family: Family,
    devices: Sequence[torch.device],
    *,
    dtype: str | None,
    cache_bytes: int,
    candidate_bytes: int | None,
    workers: int,
    backend: Backend | None,
    on_evict: Callable[[Group], None],
    kept: Callable[[torch.dtype], Collection[str]],
) -> tuple[list[DevicePool], Sequence[int]]:
    """One home on the first device if a model fits there, else one on each device.

    Args:
        family: the candidates.
        devices: that may be used.
        dtype: of the forward pass; None: as in the files.
        cache_bytes: what merged layers may keep on each device.
        candidate_bytes: what candidates may have on each device; None: see `ResidentModel`.
        workers: how many share the first device.
        backend: how candidates get to the first device, if it is the only one; None: what suits.
        on_evict, kept: see `DeviceWeights`.

    Returns:
        The homes, and for each source layer the index of its home. What is outside the layers is
        in the first one.

    Raises:
        ResourceError: a model does not fit on all devices together.
    """
    if devices[0].type == "cpu" and candidate_bytes is None:
        layers, outside, _, _ = _needed(family, dtype or PRECISE)
        held = sum(layers) + outside * min(2, len(family.candidates))  # see Footprint.held
        room = max(held, int(ROOM * available_bytes()) // workers)
        weights = DeviceWeights(family, MappedBackend(), room, on_evict, kept=kept)
        return [DevicePool(weights, cache_bytes)], [0] * family.num_layers

    def budget(device: torch.device) -> int:
        if candidate_bytes is not None:
            return candidate_bytes
        return default_budget(device, cache_bytes, workers)

    layers, outside, merge, total = _needed(family, dtype)
    budgets = [budget(devices[0])]  # to ask another GPU would take memory there
    fits = total <= budgets[0] or sum(layers) + outside + merge <= budgets[0]
    home_of: Sequence[int] = [0] * family.num_layers
    if len(devices) > 1 and not fits:
        budgets += map(budget, devices[1:])
        home_of = place_layers(layers, outside, [max(b - merge, 0) for b in budgets])
    # To page-lock a file pays when it is read again and again.
    streams = total > sum(budgets)
    pin_bytes = memory_bytes(torch.device("cpu")) // (4 * workers * len(budgets)) if streams else 0
    homes = []
    for number, n_bytes in enumerate(budgets):
        how = backend if len(budgets) == 1 else None
        how = how or LoadingBackend(devices[number], pin_bytes=pin_bytes)
        own: list[Place] = [src for src, home in enumerate(home_of) if home == number]
        own += ["embeddings", "head"] if number == 0 else []
        weights = DeviceWeights(family, how, n_bytes, on_evict, own, kept)
        homes.append(DevicePool(weights, cache_bytes))
    return homes, home_of


def _needed(family: Family, dtype: str | None) -> tuple[list[int], int, int, int]:
    """Bytes of each source layer of one model, of what is outside them, of what is read for one
    merge, and of all candidates."""
    weights = DeviceWeights(family, MappedBackend())  # knows sizes, loads nothing
    casts = [getattr(torch, dtype)] if dtype else []

    def needed(model: str, place: Place) -> int:
        return weights.n_bytes(
            weights.key(model, place, casts) if casts else GroupKey(model, place)
        )

    def of_all(place: Place) -> int:
        return sum(weights.n_bytes(GroupKey(model, place)) for model in family.candidates)

    ends: tuple[Place, Place] = ("embeddings", "head")
    outside = sum(max(needed(model, end) for model in family.candidates) for end in ends)
    layers = [needed(family.base_name, src) for src in range(family.num_layers)]
    merges = [of_all(src) for src in range(family.num_layers)]
    return layers, outside, max(merges), sum(merges) + sum(map(of_all, ends))


def memory_bytes(device: torch.device) -> int:
    """All the memory that a device has, as far as this process may use it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return total_bytes()


def _n_bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


class MovesInputs:
    """A forward pre-hook: whatever a module is given comes to its device first."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same arguments, tensors in tuples, lists and dictionaries moved."""
        return _moved(args, self.device), _moved(kwargs, self.device)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_moved(item, device) for item in value)
    if type(value) is list:
        return [_moved(item, device) for item in value]
    if type(value) is dict:
        return {key: _moved(item, device) for key, item in value.items()}
    return value  # caches of keys and values live where each layer's are


def spread_modules(
    model: nn.Module,
    stack: Sequence[nn.Module],
    outside: Iterable[str],
    devices: Sequence[torch.device],
) -> None:
    """Puts the layers of a skeleton on their devices, and lets inputs follow.

    Args:
        model: the skeleton, on `devices[0]`.
        stack: its layers, by source layer.
        outside: names of the parameters outside the layers.
        devices: first that of what is outside, then one for each layer.
    """
    for layer, device in zip(stack, devices[1:], strict=True):
        layer.to(device)  # what no file has
    move_inputs(model, stack, outside, devices)


def move_inputs(
    model: nn.Module,
    stack: Sequence[nn.Module],
    outside: Iterable[str],
    devices: Sequence[torch.device],
) -> None:
    """Gives modules that are on several devices the hooks that move their inputs there; arguments
    as for `spread_modules`."""
    for layer, device in zip(stack, devices[1:], strict=True):
        layer.register_forward_pre_hook(MovesInputs(device), with_kwargs=True)
    owners = {name.rpartition(".")[0] for name in outside} - {""}
    for owner in sorted(owners):
        module = model.get_submodule(owner)
        module.register_forward_pre_hook(MovesInputs(devices[0]), with_kwargs=True)
