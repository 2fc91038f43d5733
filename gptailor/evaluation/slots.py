"""The skeleton's layer modules: each one remembers what its parameters point to.

A taken layer keeps a module of its own, so that a recipe that only selects layers points at
nothing anew; a merged layer gets whichever module of its source layer is free.
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
        self.stays = False  # its parameters will be asked for again
        self.last_used = 0
        self._before: Constants = {}  # what constants of a place in the stack have replaced
        self._numbered = [
            m for m in module.modules() if isinstance(getattr(m, "layer_idx", None), int)
        ]

    def number(self, out_layer: int) -> None:
        """Tells attention modules their place in the cache of keys and values."""
        for module in self._numbered:
            module.layer_idx = out_layer  # type: ignore[assignment]

    def place(self, constants: Constants | None, out_layer: int) -> None:
        """Gives it the constants of its place in the stack; None where that is only its number."""
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
        """Lets go of the memory of its parameters."""
        for suffix in suffixes:
            let_go(self.module, suffix)
        self.parameters = None

    def copied(self) -> Slot:
        """Another module of the same kind, without parameters or configs of its own."""
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
        layers: the skeleton's; their parameters are let go.
        suffixes: of each layer's tensors in the files.
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
            entries: of each output layer: its source layer, which may come twice; its parameters;
                and whether they are a candidate's own, so that a module may be kept for them.
            constants: of each output layer, what its place in the stack makes of its source
                layer's constants; None where that is only its number.
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

    def forget(self, parameters: Parameters) -> None:
        """Lets go of parameters, so that their memory can be used again."""
        for src_layer, pool in enumerate(self._pools):
            for slot in pool:
                if slot.parameters is parameters:
                    slot.empty(self._suffixes[src_layer])

    def forget_all_but(self, known: set[int]) -> None:
        """Lets go of all parameters whose dictionary is not among these, by `id`."""
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
    """Makes the parameter (or buffer) `name` below `module` that tensor, without a copy."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._buffers:
        owner._buffers[leaf] = parameter.data
    else:
        setattr(owner, leaf, parameter)


def let_go(module: nn.Module, name: str) -> None:
    """Puts an empty tensor of its type where the parameter (or buffer) `name` is."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    old = owner._buffers[leaf] if leaf in owner._buffers else getattr(owner, leaf)
    assert isinstance(old, torch.Tensor)
    point(module, name, nn.Parameter(old.data.new_empty(0), requires_grad=False))
