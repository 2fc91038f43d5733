"""Runs layers one at a time, with the arguments that the model itself would give them.

Everything a layer gets besides the hidden state (positions, masks) depends on the tokens and on the
kind of the layer, not on weights. So it is recorded once for each source layer, from a dense model,
and given to that source layer in any cut. A check compares a replayed model with its own forward
pass, so that an architecture of which this is not true is refused, not repaired wrongly.

Shapes: B sequences, T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gptailor.errors import ModelError
from gptailor.evaluation.lm import ResidentLM

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}
"""Relative differences between two ways to compute the same states that count as rounding."""


class _Entered(Exception):
    """Ends a forward pass at the first layer."""


@dataclass(frozen=True)
class Arguments:
    """What a layer gets besides the hidden state.

    Attributes:
        args: positional arguments after it.
        kwargs: keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def hidden_state(value: Any) -> torch.Tensor:
    """A layer's input or output tensor: the value itself, or the first item of a tuple or list."""
    while isinstance(value, tuple | list):
        value = value[0]
    assert isinstance(value, torch.Tensor)
    return value


def split(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[torch.Tensor, Arguments]:
    """The hidden state among a layer's arguments, and the others."""
    if args:
        return hidden_state(args[0]), Arguments(tuple(args[1:]), dict(kwargs))
    others = dict(kwargs)
    key = "hidden_states" if "hidden_states" in others else next(iter(others))
    return hidden_state(others.pop(key)), Arguments((), others)


def run_layer(layer: nn.Module, hidden_BTH: torch.Tensor, given: Arguments) -> torch.Tensor:
    """The output state of one layer."""
    return hidden_state(layer(hidden_BTH, *given.args, **given.kwargs))


def entering(lm: ResidentLM, layer: nn.Module, input_BT: torch.Tensor) -> torch.Tensor:
    """The state that enters the first layer of the assembled model; nothing after it is run."""
    found: list[torch.Tensor] = []

    def stop(module: nn.Module, args: Any, kwargs: Any) -> None:
        found.append(split(args, kwargs)[0])
        raise _Entered

    hook = layer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        lm.hidden_states_only(input_BT)
    except _Entered:
        pass
    finally:
        hook.remove()
    return found[0]


@dataclass
class Trace:
    """One forward pass of a whole model.

    Attributes:
        states: what enters each layer, and what leaves the last one; (B, T, H) each.
        arguments: what each layer got besides.
    """

    states: list[torch.Tensor]
    arguments: list[Arguments]


def trace(lm: ResidentLM, layers: Sequence[nn.Module], input_BT: torch.Tensor) -> Trace:
    """Runs the assembled model and records states and arguments of its layers.

    Raises:
        ModelError: its layers pass on something else than one state per token.
    """
    found = Trace([], [])
    with _recording(layers, found):
        lm.hidden_states_only(input_BT)
    shapes = {tuple(state.shape[:2]) for state in found.states}
    if len(found.states) != len(layers) + 1 or shapes != {tuple(input_BT.shape)}:
        raise ModelError(
            "The layers of this architecture don't pass on one state for each token, so a cut of "
            "it can't be repaired: leave repair out."
        )
    return found


@contextmanager
def _recording(layers: Sequence[nn.Module], found: Trace) -> Iterator[None]:
    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        state, given = split(args, kwargs)
        found.states.append(state)
        found.arguments.append(given)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        found.states.append(hidden_state(output))

    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(after))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_replay(
    lm: ResidentLM,
    layers: Sequence[nn.Module],
    given: Sequence[Arguments],
    input_BT: torch.Tensor,
) -> None:
    """Raises a `ModelError` unless layers that are run one at a time give what the model gives.

    Args:
        lm: has the assembled model.
        layers: its layers.
        given: recorded arguments for each of them.
        input_BT: token ids.
    """
    expected = trace(lm, layers, input_BT).states[-1].float()
    state = entering(lm, layers[0], input_BT)
    for layer, arguments in zip(layers, given, strict=True):
        state = run_layer(layer, state, arguments)
    wrong = (state.float() - expected).norm() / expected.norm()
    if not wrong <= TOLERANCE.get(state.dtype, 0.05):  # also when it is NaN
        raise ModelError(
            "The layers of this architecture depend on more than their input and the tokens' "
            "positions, so a cut of it can't be repaired: leave repair out."
        )
