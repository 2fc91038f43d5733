"""Moves inputs to the layers of a model that is spread over several devices.

Every source layer is on one device, and its module moves its inputs there before it computes.

Not yet run on GPUs. Tests with labelled tensors check that layers end up on their devices and that
no operation mixes tensors of two devices; the results are tested with the CPU as every device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn


class MovesInputs:
    """A forward pre-hook that moves a module's inputs to its device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same arguments, with tensors moved, also those in tuples, lists and dictionaries."""
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
    return value  # a KV cache keeps each layer's keys and values on that layer's device


def spread_modules(
    model: nn.Module,
    stack: Sequence[nn.Module],
    outside: Iterable[str],
    devices: Sequence[torch.device],
) -> None:
    """Puts the layers of a skeleton on their devices, and hooks them so that inputs follow.

    Args:
        model: the skeleton, on `devices[0]`.
        stack: its layers, by source layer.
        outside: names of the parameters outside the layers.
        devices: first the device of everything outside the layers, then one for each layer.
    """
    for layer, device in zip(stack, devices[1:], strict=True):
        layer.to(device)  # buffers that are in no file
    move_inputs(model, stack, outside, devices)


def move_inputs(
    model: nn.Module,
    stack: Sequence[nn.Module],
    outside: Iterable[str],
    devices: Sequence[torch.device],
) -> None:
    """Hooks modules that are on several devices so that their inputs are moved there; the arguments
    are those of `spread_modules`."""
    for layer, device in zip(stack, devices[1:], strict=True):
        layer.register_forward_pre_hook(MovesInputs(device), with_kwargs=True)
    owners = {name.rpartition(".")[0] for name in outside} - {""}
    for owner in sorted(owners):
        module = model.get_submodule(owner)
        module.register_forward_pre_hook(MovesInputs(devices[0]), with_kwargs=True)
