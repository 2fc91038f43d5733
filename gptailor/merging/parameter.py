"""A parameter of a merge method: its values, their bounds, and how they are checked.

The build reads the declarations with only Python's standard library, so nothing else is imported at
the top.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from gptailor.errors import UsageError, unknown

Kind = Literal["number", "integer", "flag"]
Value = float | tuple[float, ...]
"""A parameter's value: one for all sources, or one for each in the sources' order."""

BASE_FLAG = "task_vectors"
"""The parameter that makes a method use the base if that is optional."""


@dataclass(frozen=True)
class Parameter:
    """A number that a method takes, in addition to the weights of its sources.

    Attributes:
        name: the key in a recipe.
        default: used if the recipe does not have it; None if it must be given.
        low, high: inclusive bounds.
        search: the values that a search tries.
        doc: what it does, in one line.
        kind: "number"; "integer"; or "flag": true or false, stored as 1.0 or 0.0.
        per_source: True if each source may have its own value (`density: {a: 0.5, b: 0.7}`).
        is_late: True if recipes existed before the method had it; its default is not part of a
            recipe's hash, so that old hashes stay valid.
        field: the member of the engine's `Method` (csrc/methods.h) that gets the value.
        is_share: True if it is the share of the second of two sources; the rest is the first's.
        in_mergekit: True if mergekit has it.
        gpu_value: the only value with which the GPU computes the method; None if any will do.
    """

    name: str
    default: float | None
    low: float
    high: float
    search: tuple[float, ...]
    doc: str
    kind: Kind = "number"
    per_source: bool = False
    is_late: bool = False
    field: str = ""
    is_share: bool = False
    in_mergekit: bool = True
    gpu_value: float | None = None

    @property
    def is_flag(self) -> bool:
        """True if a recipe writes it as true or false."""
        return self.kind == "flag"

    def checked(self, value: object, where: str) -> float:
        """`value` as a float; raises a `UsageError` if it is invalid or out of bounds."""
        if self.is_flag:
            from gptailor.strict_yaml import truth  # needs PyYAML

            value = truth(value)
            if not isinstance(value, bool):
                raise UsageError(f"{where}: {self.name} is {value!r}, but must be true or false.")
            return float(value)
        number = checked_number(self.name, value, where)
        if self.kind == "integer" and not number.is_integer():
            raise UsageError(f"{where}: {self.name} is {number:g}, but must be a whole number.")
        if not self.low <= number <= self.high:
            raise UsageError(
                f"{where}: {self.name} is {number:g}, outside its bounds "
                f"{self.low:g} to {self.high:g}."
            )
        return number

    def checked_values(self, value: object, sources: Iterable[str], where: str) -> Value:
        """`value` as one float, or as one for each source if it is a mapping of sources.

        Sources that the mapping leaves out get the default.

        Raises:
            UsageError: a value is out of bounds, or a name is not that of a source.
        """
        if not isinstance(value, dict):
            return self.checked(value, where)
        names = list(sources)
        if not self.per_source:
            raise UsageError(f"{where}: {self.name} is one value, not one for each model.")
        for name in value:
            if name not in names:
                raise unknown("source", name, names, f"{where}: {self.name}")
        if self.default is None and len(value) < len(names):
            raise UsageError(f"{where}: {self.name} needs a value for each model.")
        return tuple(self.checked(value.get(name, self.default), where) for name in names)

    def shown(self, value: float) -> float | int | bool:
        """A value as it is written in a recipe."""
        if self.is_flag:
            return bool(value)
        return int(value) if self.kind == "integer" else value


class Parametrised:
    """Base class of objects with a method's parameter values, (name, value) for each."""

    parameters: tuple[tuple[str, Value], ...]

    def parameter(self, name: str) -> Value:
        """The value of a parameter that the method has."""
        return dict(self.parameters)[name]

    def number(self, name: str) -> float:
        """The value of a parameter that is the same for all sources."""
        value = self.parameter(name)
        assert isinstance(value, float), name
        return value


WEIGHT_BOUNDS = (-1000.0, 1000.0)
"""Inclusive bounds of a source's weight; wide, because methods that normalise take any scale."""


def for_each(value: Value, num_sources: int) -> tuple[float, ...]:
    """A parameter's value for each source."""
    return value if isinstance(value, tuple) else (value,) * num_sources


def simplified(value: Value) -> Value:
    """`value` as floats, and as a single one if it is the same for all sources."""
    if not isinstance(value, tuple):
        return float(value)
    values = tuple(float(v) for v in value)
    return values[0] if len(set(values)) == 1 else values


def checked_number(name: str, value: object, where: str) -> float:
    """`value` as a finite float; raises a `UsageError` for anything else, booleans included."""
    try:
        number = float(value) if type(value) in (int, float) else math.nan  # type: ignore[arg-type]
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise UsageError(f"{where}: {name} is {value!r:.40}, but must be a number.")
    return number


def checked_weight(model: str, value: object, where: str) -> float:
    """A source's weight as a float; raises a `UsageError` outside `WEIGHT_BOUNDS`."""
    weight = checked_number(f"the weight of {model}", value, where)
    low, high = WEIGHT_BOUNDS
    if not low <= weight <= high:
        raise UsageError(
            f"{where}: the weight of {model} is {weight:g}, outside its bounds {low:g} to {high:g}."
        )
    return weight
