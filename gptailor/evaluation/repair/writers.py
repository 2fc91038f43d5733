"""Finds the parts of a layer that write to the residual stream, by what the layer computes.

A part writes to the stream if a change of its output changes the layer's output by the same amount
(or a constant times it), while all later writers are held still. No names are needed: it is found
by disturbing each part's output. So parallel and sequential blocks, every layout of a weight, and
residual multipliers are found alike. A projection that a norm or a router stands behind is no
writer, but that norm is one.

Shapes: B sequences, T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from gptailor.evaluation.repair.replay import (
    TOLERANCE,
    Arguments,
    hidden_state,
    run_layer,
)

Layout = Literal["out_in", "in_out", "channel"]


@dataclass(frozen=True)
class Writer:
    """A part of a layer whose output is added to the residual stream.

    Attributes:
        path: of the module within the layer.
        layout: of its weight: (outputs, inputs) as in torch's Linear, (inputs, outputs) as in
            GPT-2, or "channel": a norm's weight, a factor for each channel.
        gain: what its output is multiplied by before it is added.
    """

    path: str
    layout: Layout
    gain: float

    @property
    def weight(self) -> str:
        """The name of its weight within the layer."""
        return f"{self.path}.weight"


def find_writers(
    layer: nn.Module, hidden_BTH: torch.Tensor, given: Arguments
) -> tuple[Writer, ...]:
    """The writers of a layer, in the order in which they run.

    Args:
        layer: the layer, with weights.
        hidden_BTH: a state that enters it.
        given: its other arguments.
    """
    size = hidden_BTH.shape[-1]
    kinds = {
        path: layout for path, part in layer.named_modules() if (layout := _layout(part, size))
    }
    outputs: dict[str, torch.Tensor] = {}
    times: dict[str, int] = dict.fromkeys(kinds, 0)

    def keep(path: str) -> Callable[[torch.Tensor], torch.Tensor]:
        def look(output: torch.Tensor) -> torch.Tensor:
            outputs.pop(path, None)
            outputs[path] = output  # in the order in which they ran
            times[path] += 1
            return output

        return look

    with _changed(layer, {path: keep(path) for path in kinds}):
        before = run_layer(layer, hidden_BTH, given)
    scale_BT1 = before.float().pow(2).mean(-1, keepdim=True).sqrt()
    found: list[Writer] = []
    still: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
    generator = torch.Generator().manual_seed(0)
    for path in reversed(outputs):
        if times[path] != 1 or outputs[path].shape != hidden_BTH.shape:
            continue
        noise = torch.randn(hidden_BTH.shape, generator=generator).to(before.device)
        noise = (noise * scale_BT1).to(before.dtype)
        with _changed(layer, {**still, path: lambda output, noise=noise: output + noise}):  # type: ignore[misc]
            change = (run_layer(layer, hidden_BTH, given) - before).float()
        gain = float((change * noise.float()).sum() / noise.float().pow(2).sum())
        rest = (change - gain * noise.float()).norm()
        if abs(gain) > 1e-3 and rest <= TOLERANCE.get(before.dtype, 0.05) * change.norm():
            gain = 1.0 if abs(gain - 1.0) < 0.01 else gain
            found.append(Writer(path, kinds[path], gain))
            still[path] = lambda output, kept=outputs[path]: kept  # type: ignore[misc]
    return tuple(reversed(found))


def _layout(part: nn.Module, size: int) -> Layout | None:
    """The layout of a module's weight if its outputs could be a residual stream of this size."""
    weight = getattr(part, "weight", None)
    if not isinstance(weight, torch.Tensor) or next(part.children(), None) is not None:
        return None
    if isinstance(part, nn.Linear):
        return "out_in" if weight.shape[0] == size else None
    if type(part).__name__ == "Conv1D" and weight.dim() == 2:
        return "in_out" if weight.shape[1] == size else None
    return "channel" if tuple(weight.shape) == (size,) else None


@contextmanager
def _changed(
    layer: nn.Module, changes: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]
) -> Iterator[None]:
    """Changes the outputs of some parts of a layer while the context lasts."""

    def hooked(change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        return lambda module, args, output: (
            change(output) if isinstance(output, torch.Tensor) else None
        )

    hooks = [
        layer.get_submodule(path).register_forward_hook(hooked(change))
        for path, change in changes.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def inputs_of(layer: nn.Module, paths: list[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Keeps the inputs of some parts of a layer while it runs: path → the last input."""
    kept: dict[str, torch.Tensor] = {}

    def look(path: str) -> Any:
        def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
            kept[path] = hidden_state(args[0] if args else next(iter(kwargs.values())))

        return keep

    hooks = [
        layer.get_submodule(path).register_forward_pre_hook(look(path), with_kwargs=True)
        for path in paths
    ]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()
