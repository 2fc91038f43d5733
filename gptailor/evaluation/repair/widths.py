"""How wide the equations of a repair are, found from a model's shapes without weights.

`find_writers` disturbs the parts of a layer, so it needs values. Here a forward pass on torch's
meta device records how each layer's output is composed: a projection writes to the residual stream
if only additions, constant factors and changes of shape come after it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gptailor.evaluation.loading import quiet
from gptailor.evaluation.repair.replay import hidden_state, split
from gptailor.evaluation.repair.writers import layout_of

_FACTORS = ("Mul", "Div")
_PASSES_ON = (
    "Add", "Sub", "Alias", "Clone", "Expand", "Permute", "ReshapeAlias", "Squeeze", "Transpose",
    "ToCopy", "Unsqueeze", "UnsafeView", "View", *_FACTORS,
)  # fmt: skip
"""Operations, as autograd names them, that pass on a change of one of their inputs."""


def find_widths(shell: nn.Module, stack: str, size: int) -> tuple[int, ...]:
    """F of each source layer: the inputs of its last projection that writes to the residual stream,
    and one for a bias; 0 where only norms can be fitted.

    Where the model can't run without values: of its widest projection onto the stream's size.

    Args:
        shell: the model on the meta device.
        stack: the path of its layers.
        size: H, of the residual stream.
    """
    for kwargs in ({"experts_implementation": "batched_mm"}, {}):  # other kinds need values
        try:
            with quiet():
                return _composed(shell, stack, kwargs)
        except Exception:
            continue
    widths = []
    for layer in shell.get_submodule(stack).children():
        widths.append(max((_width(part, size) for part in layer.modules()), default=0))
    return tuple(widths)


def _composed(shell: Any, stack: str, kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(shell.config)
    config.pad_token_id = None  # some models look for it among the tokens, which have no values
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **kwargs).eval()
    widths: list[int] = []
    layers = list(model.get_submodule(stack).children())
    hooks = [hook for layer in layers for hook in _watch(layer, widths)]
    try:
        with torch.enable_grad():
            model(input_ids=torch.zeros(1, 4, dtype=torch.long, device="meta"))
    finally:
        for hook in hooks:
            hook.remove()
    if len(widths) != len(layers):
        raise ValueError("a layer did not run once")
    return tuple(widths)


def _watch(layer: nn.Module, widths: list[int]) -> list[Any]:
    """Hooks that append the layer's width when it has run."""
    made: dict[Any, list[str]] = {}  # node → the parts whose output it is
    entered: list[Any] = []

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        entered.append(split(args, kwargs)[0].grad_fn)

    def part(path: str) -> Any:
        def end(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and output.grad_fn is not None:
                made.setdefault(output.grad_fn, []).append(path)

        return end

    def end(module: nn.Module, args: Any, output: Any) -> None:
        state = hidden_state(output)
        size = state.shape[-1]
        parts = {
            node: [path for path in paths if layout_of(layer.get_submodule(path), size)]
            for node, paths in made.items()
        }
        added = _added(state.grad_fn, entered[-1], parts)
        ran = [path for paths in parts.values() for path in paths if path in added]
        found = [_width(layer.get_submodule(path), size) for path in ran]
        widths.append(next((width for width in reversed(found) if width), 0))

    return [
        layer.register_forward_pre_hook(begin, with_kwargs=True),
        *(p.register_forward_hook(part(path)) for path, p in layer.named_modules() if path),
        layer.register_forward_hook(end),
    ]


def _added(output: Any, entered: Any, parts: Mapping[Any, list[str]]) -> list[str]:
    """The parts that an output is a sum of.

    Args:
        output: the node of a layer's output.
        entered: the node of its input.
        parts: node → the parts with a weight whose output it is.
    """
    found: list[str] = []
    waiting, seen = [output], {entered, None}
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if parts.get(node):
            found += parts[node]
            continue
        before = [other for other, _ in node.next_functions if other is not None]
        is_gate = node.name().startswith(_FACTORS) and len(before) > 1
        if node.name().startswith(_PASSES_ON) and not is_gate:
            waiting += before
    return found


def _width(part: nn.Module, size: int) -> int:
    """The inputs of a projection, and one if it has a bias; 0 for anything else."""
    layout = layout_of(part, size)
    if layout not in ("out_in", "in_out"):
        return 0
    width = part.get_parameter("weight").shape[1 if layout == "out_in" else 0]
    return int(width) + (getattr(part, "bias", None) is not None)
