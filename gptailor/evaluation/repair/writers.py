"""Finds the parts of a layer that write to the residual stream, by what the layer computes.

A part writes to the stream if a change of its output changes the layer's output by the same amount
(or a constant times it), while all later writers are held still. No names are needed: it is found
by disturbing each part's output. So parallel and sequential blocks, every layout of a weight, and
residual multipliers are found alike. A projection that a norm or a router stands behind is no
writer, but that norm is one. Parts whose weights can't be fitted, such as experts, are also held
still.

Shapes: B sequences, T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
Changes = dict[str, Callable[[torch.Tensor], torch.Tensor]]
"""Part of a layer → what is done to its output."""


@dataclass(frozen=True)
class Writer:
    """A part of a layer whose output is added to the residual stream.

    Attributes:
        path: of the module within the layer.
        layout: of its weight: (outputs, inputs) as in torch's Linear, (inputs, outputs) as in
            GPT-2, or "channel": a norm's weight, a factor for each channel.
        gain: what its output is multiplied by before it is added.
        is_last: nothing else in the layer depends on its output.
    """

    path: str
    layout: Layout
    gain: float
    is_last: bool

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
    before, outputs = _outputs(layer, hidden_BTH, given)
    scale_BT1 = before.float().pow(2).mean(-1, keepdim=True).sqrt()
    found: list[Writer] = []
    still: Changes = {}
    generator = torch.Generator().manual_seed(0)

    def passed_on(path: str, noise: torch.Tensor, held: Changes) -> float:
        """What a disturbance of a part is multiplied by in the output; 0 if it is not constant."""
        disturbed: Changes = {path: lambda output: output + noise.view(output.shape)}
        with _changed(layer, {**held, **disturbed}):
            change = (run_layer(layer, hidden_BTH, given) - before).float()
        gain = float((change * noise.float()).sum() / noise.float().pow(2).sum())
        rest = (change - gain * noise.float()).norm()
        is_constant = abs(gain) > 1e-3 and rest <= TOLERANCE.get(before.dtype, 0.05) * change.norm()
        if is_constant and abs(gain - 1.0) < 0.01:
            return 1.0
        return gain if is_constant else 0.0

    for path in reversed(outputs):
        if any(writer.path.startswith(f"{path}.") for writer in found):
            continue
        noise = torch.randn(hidden_BTH.shape, generator=generator).to(before.device)
        noise = (noise * scale_BT1).to(before.dtype)
        gain = passed_on(path, noise, still)
        if not gain:
            continue
        layout = layout_of(layer.get_submodule(path), size)
        if layout is not None:
            is_last = not still or bool(passed_on(path, noise, {}))
            found.append(Writer(path, layout, gain, is_last))
        # a copy, as layers may add to it in place
        still[path] = lambda output, kept=outputs[path]: kept.clone()  # type: ignore[misc]
    return tuple(reversed(found))


def _outputs(
    layer: nn.Module, hidden_BTH: torch.Tensor, given: Arguments
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The layer's output, and those of its parts with parameters that could be a residual stream.

    They are in the order in which the parts began, so a part comes before the parts in it.
    """
    began: list[str] = []
    outputs: dict[str, torch.Tensor] = {}

    def begin(path: str) -> Any:
        return lambda module, args: began.append(path)

    def end(path: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if (
                isinstance(output, torch.Tensor)
                and output.numel() == hidden_BTH.numel()
                and output.shape[-1] == hidden_BTH.shape[-1]
            ):
                outputs[path] = output.clone()  # layers may add to it in place

        return keep

    hooks = []
    for path, part in layer.named_modules():
        if path and next(part.parameters(), None) is not None:
            hooks += [
                part.register_forward_pre_hook(begin(path)),
                part.register_forward_hook(end(path)),
            ]
    try:
        result = run_layer(layer, hidden_BTH, given)
    finally:
        for hook in hooks:
            hook.remove()
    return result, {
        path: outputs[path] for path in began if path in outputs and began.count(path) == 1
    }


def layout_of(part: nn.Module, size: int) -> Layout | None:
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
def _changed(layer: nn.Module, changes: Changes) -> Iterator[None]:
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
