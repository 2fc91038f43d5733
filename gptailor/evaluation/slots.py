"""The skeleton's layer modules; each remembers what its parameters point to.

A taken layer keeps a module of its own, so a recipe that only selects layers needs no new pointers;
a merged layer gets any free module of its source layer.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from gptailor.evaluation.signature import Constants, carry_over

Parameters = dict[str, nn.Parameter]
"""Suffix ("self_attn.q_proj.weight") → parameter."""


class Slot:
    """One module and the parameters that it has now."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.parameters: Parameters | None = None
        self.stays = False  # its parameters will be needed again
        self.last_used = 0
        self._before: Constants = {}  # values that the constants of its position replaced
        self._numbered = [
            m for m in module.modules() if isinstance(getattr(m, "layer_idx", None), int)
        ]

    def number(self, out_layer: int) -> None:
        """Tells attention modules their index in the KV cache."""
        for module in self._numbered:
            module.layer_idx = out_layer  # type: ignore[assignment]

    def place(self, constants: Constants | None, out_layer: int) -> None:
        """Sets the constants of its position in the stack; None if only its number changes."""
        if constants is None:
            self.number(out_layer)
            return
        carry_over(self.module, self._before)
        self._before = carry_over(self.module, constants)

    def point(self, parameters: Parameters) -> None:
        """Makes these its parameters."""
        for suffix, parameter in parameters.items():
            point(self.module, suffix, parameter)
        self.parameters = parameters

    def empty(self, suffixes: Mapping[str, object]) -> None:
        """Drops references to the memory of its parameters."""
        for suffix in suffixes:
            let_go(self.module, suffix)
        self.parameters = None

    def copied(self) -> Slot:
        """A copy of the module that shares its parameters and configs."""
        shared: dict[int, Any] = {id(p): p for p in self.module.parameters()}
        for module in self.module.modules():
            if (config := getattr(module, "config", None)) is not None:
                shared[id(config)] = config  # it changes with each recipe
        slot = Slot(copy.deepcopy(self.module, shared))
        slot._before = dict(self._before)
        return slot


class Slots:
    """The modules of all source layers.

    Args:
        layers: the skeleton's layers; their parameters are dropped.
        suffixes: for each layer, the names of its parameters within the layer.
    """

    def __init__(self, layers: Sequence[nn.Module], suffixes: Sequence[Mapping[str, str]]) -> None:
        self._suffixes = suffixes
        self._pools = [[Slot(module)] for module in layers]
        self._clock = 0
        for pool, names in zip(self._pools, suffixes, strict=True):
            pool[0].empty(names)

    def arrange(
        self,
        entries: Sequence[tuple[int, Parameters, bool]],
        constants: Sequence[Constants] | None = None,
    ) -> list[nn.Module]:
        """A module for each output layer that points to its parameters.

        Args:
            entries: for each output layer: its source layer, which may occur twice; its parameters;
                and whether they are a candidate's own, so that a module may be kept for them.
            constants: for each output layer, the constants that differ from its source layer's
                because of its position; None if that is only its number.
        """
        self._clock += 1
        chosen: list[Slot | None] = []
        for src_layer, parameters, _ in entries:
            found = None
            for slot in self._pools[src_layer]:
                if slot.parameters is parameters and slot.last_used < self._clock:
                    found = slot
                    slot.last_used = self._clock
                    break
            chosen.append(found)
        modules = []
        for out_layer, (src_layer, parameters, stays) in enumerate(entries):
            slot = chosen[out_layer] or self._free(src_layer, stays)
            slot.last_used, slot.stays = self._clock, stays
            if slot.parameters is not parameters:
                slot.point(parameters)
            slot.place(None if constants is None else constants[out_layer], out_layer)
            modules.append(slot.module)
        return modules

    def replace(self, module: nn.Module, changed: Parameters) -> None:
        """Points some parameters of one of the arranged modules to others, until it is arranged
        again: its other parameters stay, and the dictionary that it had is not changed."""
        slot = next(s for pool in self._pools for s in pool if s.module is module)
        slot.point({**(slot.parameters or {}), **changed})
        slot.stays = False  # it is no longer the candidate's own layer

    def forget(self, parameters: Parameters) -> None:
        """Drops references to parameters, so that their memory can be reused."""
        for src_layer, pool in enumerate(self._pools):
            for slot in pool:
                if slot.parameters is parameters:
                    slot.empty(self._suffixes[src_layer])

    def forget_all_but(self, known: set[int]) -> None:
        """Drops all parameters whose dictionary, by `id`, is not among these."""
        for src_layer, pool in enumerate(self._pools):
            for slot in pool:
                if slot.parameters is not None and id(slot.parameters) not in known:
                    slot.empty(self._suffixes[src_layer])

    def _free(self, src_layer: int, stays: bool) -> Slot:
        pool = self._pools[src_layer]
        free = [slot for slot in pool if slot.last_used < self._clock]
        vacant = [slot for slot in free if slot.parameters is None]
        reused = [slot for slot in free if not slot.stays and not stays]
        if vacant or reused:
            return (vacant or reused)[0]
        pool.append(pool[0].copied())
        return pool[-1]


def point(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Points the parameter (or buffer) `name` below `module` to a tensor, without a copy."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._buffers:
        owner._buffers[leaf] = parameter.data
    else:
        setattr(owner, leaf, parameter)


def let_go(module: nn.Module, name: str) -> None:
    """Replaces the parameter (or buffer) `name` by an empty tensor of its dtype."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    old = owner._buffers[leaf] if leaf in owner._buffers else getattr(owner, leaf)
    assert isinstance(old, torch.Tensor)
    point(module, name, nn.Parameter(old.data.new_empty(0), requires_grad=False))
