"""The signature of a module: its classes, shapes, and the constants that it computes itself.

Two layers with equal signatures compute the same function of the same weights. A layer that moves
in the stack can change: some modules compute constants from their index or the depth, and in some
models a layer's kind follows from its index. Constants can be carried over; a changed kind can't.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Place = tuple[str, str]
"""A submodule's path within a layer, and the name of its attribute or buffer."""

Constants = dict[Place, Any]
"""Values that differ from those of the source layer."""

_OF_EVERY_MODULE = frozenset(vars(nn.Module())) | {"config", "name_or_path"}
_ORDINAL = "layer_idx"


@dataclass(frozen=True)
class Signature:
    """Everything about a module except its weights.

    Attributes:
        classes: path of each submodule → its class.
        shapes: name of each parameter and saved buffer → shape.
        constants: place → plain value, or tensor that is in no file.
    """

    classes: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    constants: Mapping[Place, Any]

    @property
    def kind(self) -> Hashable:
        """What layers of one kind share: classes, shapes, and strings and flags among constants."""
        words = [(p, v) for p, v in self.constants.items() if isinstance(v, str | bool)]
        parts = (self.classes.items(), self.shapes.items(), words)
        return tuple(tuple(sorted(part)) for part in parts)


@dataclass
class Comparison:
    """How a layer of a cut model differs from its source layer.

    Attributes:
        problems: differences that make it another layer, each a clause for a sentence.
        constants: values to set in the source layer to turn it into this layer.
    """

    problems: list[str] = field(default_factory=list)
    constants: Constants = field(default_factory=dict)


def signature(module: nn.Module, *, without: str = "") -> Signature:
    """The signature of a module.

    Args:
        module: may have parameters on the meta device; buffers need values.
        without: path of a submodule to leave out, with everything below it.
    """
    classes: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    constants: dict[Place, Any] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        if without and (path == without or path.startswith(f"{without}.")):
            continue
        classes[path] = type(part).__name__
        dot = f"{path}." if path else ""
        for name, parameter in part._parameters.items():
            if parameter is not None:
                shapes[dot + name] = tuple(parameter.shape)
        for name, buffer in part._buffers.items():
            if buffer is None:
                continue
            if name in part._non_persistent_buffers_set:
                constants[path, name] = buffer
            else:
                shapes[dot + name] = tuple(buffer.shape)
        for name, value in vars(part).items():
            if name not in _OF_EVERY_MODULE:
                kept = _kept(value)
                if kept is not _SKIPPED:
                    constants[path, name] = kept
    return Signature(classes, shapes, constants)


class _Skipped:
    pass


_SKIPPED = _Skipped()


def _kept(value: Any) -> Any:
    """An attribute's value if it can be compared: a function's name, `_SKIPPED` for objects."""
    if value is None or isinstance(value, bool | int | float | str | torch.Tensor):
        return value
    if isinstance(value, torch.dtype | torch.Size):
        return value
    if type(value) in (list, tuple, set, frozenset):
        return value if all(_kept(item) is not _SKIPPED for item in value) else _SKIPPED
    if type(value) is dict:
        return value if all(_kept(item) is not _SKIPPED for item in value.values()) else _SKIPPED
    if isinstance(value, functools.partial):
        return f"{_name(value.func)}{value.args}{value.keywords}"
    if isinstance(value, Callable):  # type: ignore[arg-type]
        return _SKIPPED if isinstance(value, nn.Module) else _name(value)
    return _SKIPPED


def _name(function: Any) -> str:
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}"


def same(first: Any, second: Any) -> bool:
    """Whether two constants are equal, tensors to the last bit."""
    if isinstance(first, torch.Tensor) or isinstance(second, torch.Tensor):
        return (
            isinstance(first, torch.Tensor)
            and isinstance(second, torch.Tensor)
            and first.dtype == second.dtype
            and first.shape == second.shape
            and bool(torch.equal(first, second))
        )
    if type(first) is not type(second):
        return False
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(v, second[k]) for k, v in first.items())
    return bool(first == second)


def is_alike(signatures: Sequence[Signature], other: Signature) -> bool:
    """Whether all these layers are like another one, apart from being numbered by index."""
    return all(
        s.classes == other.classes
        and s.shapes == other.shapes
        and s.constants.keys() == other.constants.keys()
        and all(
            value == index if place[1] == _ORDINAL else same(value, other.constants[place])
            for place, value in s.constants.items()
        )
        for index, s in enumerate(signatures)
    )


def compare_layer(
    source: Sequence[Signature],
    cut: Sequence[Signature],
    src_layers: Sequence[int],
    out_layer: int,
) -> Comparison:
    """Compares a layer of the cut model with its source layer.

    Args:
        source: the layers of the whole model.
        cut: the layers of the cut model.
        src_layers: the source layer of each layer of the cut model.
        out_layer: index of the layer in the cut model.
    """
    src_layer = src_layers[out_layer]
    was, now = source[src_layer], cut[out_layer]
    found = Comparison()
    for path in sorted(set(was.classes) | set(now.classes)):
        old, new = was.classes.get(path), now.classes.get(path)
        if old != new:
            found.problems.append(f"its {path or 'module'} is {_said(new)} instead of {_said(old)}")
    for name in sorted(set(was.shapes) | set(now.shapes)):
        old_shape, new_shape = was.shapes.get(name), now.shapes.get(name)
        if old_shape != new_shape and not found.problems:
            found.problems.append(f"its {name} has shape {new_shape} instead of {old_shape}")
    indices = (src_layer, len(source)), (out_layer, len(cut))
    for place in sorted(set(was.constants) | set(now.constants)):
        missing = object()
        old, new = was.constants.get(place, missing), now.constants.get(place, missing)
        if old is missing or new is missing:
            if not found.problems:
                found.problems.append(f"its {'.'.join(filter(None, place))} is in only one of them")
        elif same(old, new):
            continue
        elif (
            place[1] == _ORDINAL
            or _is_of_place(old, new, *indices)
            or _is_renumbered(old, new, src_layers)
            or _is_formula(old, new, [s.constants.get(place) for s in source])
        ):
            found.constants[place] = new
        else:
            name = ".".join(filter(None, place))
            found.problems.append(f"its {name} is {_said(new)} instead of {_said(old)}")
    return found


def compare_outside(was: Signature, now: Signature) -> Comparison:
    """Compares what is outside the layers; constants that follow from the layers may change."""
    found = Comparison()
    for name in sorted(set(was.shapes) | set(now.shapes)):
        old_shape, new_shape = was.shapes.get(name), now.shapes.get(name)
        if old_shape != new_shape:
            found.problems.append(f"{name} has shape {new_shape} instead of {old_shape}")
    found.problems += [
        f"{path} is {_said(new)} instead of {_said(was.classes.get(path))}"
        for path, new in sorted(now.classes.items())
        if was.classes.get(path) != new
    ]
    for place, new in now.constants.items():
        if place not in was.constants or not same(was.constants[place], new):
            found.constants[place] = new
    return found


def _is_of_place(old: Any, new: Any, was: tuple[int, int], now: tuple[int, int]) -> bool:
    """Whether integers only give the layer's position: its index or the number of layers."""
    if type(old) is not int or type(new) is not int:
        return False
    (src, depth), (out, cut_depth) = was, now
    pairs = ((src, out), (depth, cut_depth), (depth - src, cut_depth - out))
    if any(old - a == new - b and abs(old - a) <= 1 for a, b in pairs):
        return True
    double = old - 2 * src, new - 2 * out  # two of something in each layer
    return double[0] == double[1] and 0 <= double[0] <= 2


def _is_renumbered(old: Any, new: Any, src_layers: Sequence[int]) -> bool:
    """Whether a per-layer table or list says the same about cut layers as about their sources."""
    if type(old) is not type(new) or not isinstance(new, dict | list):
        return False
    if any(type(key) is not int or not 0 <= key < len(src_layers) for key in new):
        return False
    if isinstance(new, dict):
        return all(same(old.get(src_layers[key]), value) for key, value in new.items())
    return [src_layers[key] for key in new] == [key for key in old if key in src_layers]


def _is_formula(old: Any, new: Any, of_all: Sequence[Any]) -> bool:
    """Whether a number is computed from index or depth, instead of marking a kind of layer.

    Kinds are few and repeat: a value that several layers of the whole model share and others don't,
    such as a layer's own rotary base or sparsity, marks a kind.
    """
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        if old.shape != new.shape or old.dtype != new.dtype:
            return False
    elif type(old) is not float or type(new) is not float:
        return False
    counts = Counter(_comparable(value) for value in of_all if type(value) is type(old))
    is_one_of_kinds = len(counts) > 1 and max(counts.values()) > 1 and _comparable(new) in counts
    return not is_one_of_kinds


def _comparable(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.shape, value.contiguous().view(torch.uint8).numpy().tobytes()
    return value


def _said(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if value is None:
        return "none"
    text = str(value)
    return text if len(text) <= 60 else text[:59] + "…"


def carry_over(module: nn.Module, constants: Constants) -> Constants:
    """Sets constants in a module; returns the previous values, to be restored later."""
    before: Constants = {}
    for (path, name), value in constants.items():
        try:
            owner = module.get_submodule(path)
            old = owner._buffers[name] if name in owner._buffers else getattr(owner, name)
        except AttributeError:
            continue  # the model replaced its modules while it ran
        before[path, name] = old
        new = value
        if isinstance(value, torch.Tensor) and isinstance(old, torch.Tensor):
            new = value.to(old.device)
        if name in owner._buffers:
            owner._buffers[name] = new
        else:
            object.__setattr__(owner, name, new)
    return before
