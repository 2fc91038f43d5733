"""What a merge method is: the sources and parameters that it takes, and how they are checked.

The methods themselves stand in `registry.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from gptailor.errors import UsageError, unknown
from gptailor.strict_yaml import truth

Kind = Literal["number", "integer", "flag"]
Value = float | tuple[float, ...]
"""A parameter's value: one for all sources, or one for each in the sources' order."""


@dataclass(frozen=True)
class Parameter:
    """A number that a method takes, beside the weights of its sources.

    Attributes:
        name: the key in a recipe.
        default: used when the recipe does not name it; None when it must be given.
        low, high: inclusive bounds.
        search: the values that a search tries.
        doc: what it does, in one line.
        kind: "number"; "integer"; or "flag": true or false, kept as 1.0 or 0.0.
        per_source: True if each source may have its own value (`density: {a: 0.5, b: 0.7}`).
        is_late: True if there were recipes before the method had it: it is no part of a recipe's
            hash while it has its default, so that their hashes stay.
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

    @property
    def is_flag(self) -> bool:
        """True if a recipe writes it as true or false."""
        return self.kind == "flag"

    def checked(self, value: object, where: str) -> float:
        """`value` as a float, or a `UsageError` that names the bounds."""
        if self.is_flag:
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
        """`value` as one float, or as one for each source where it is a mapping of sources.

        Sources that the mapping leaves out get the default.

        Raises:
            UsageError: a value is outside the bounds, or a name is that of no source.
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
        """A value as a recipe has it."""
        if self.is_flag:
            return bool(value)
        return int(value) if self.kind == "integer" else value


@dataclass(frozen=True)
class Method:
    """A way to make one tensor out of several.

    Attributes:
        name: the key in recipes and configurations; mergekit's name where mergekit has it.
        formula: what is computed, element by element, in float32.
        paper: where it comes from.
        parameters: beside the weights.
        weighted: True if each source has a weight (`weights: {a: 0.5}`), False if sources are
            only listed (`models: [a, b]`).
        min_sources, max_sources: how many sources it takes; the base is not counted among them.
        base: whether the recipe's base takes part in the formula beside the sources; "optional":
            iff the parameter `task_vectors` is set.
        is_calibrated: True if each source comes with statistics of its own, which
            `gptailor calibrate` makes from a text.
    """

    name: str
    formula: str
    paper: str
    parameters: tuple[Parameter, ...]
    weighted: bool
    min_sources: int
    max_sources: int
    base: Literal["never", "always", "optional"]
    is_calibrated: bool = False

    @property
    def uses_base(self) -> bool:
        """True if the recipe's base always takes part in the formula."""
        return self.base == "always"

    @property
    def is_random(self) -> bool:
        """True if it draws random numbers; they follow from its parameter `seed`."""
        return "seed" in self.by_name

    @property
    def by_name(self) -> dict[str, Parameter]:
        """The parameters by their names."""
        return {p.name: p for p in self.parameters}

    def takes_base(self, values: Mapping[str, Value]) -> bool:
        """True if the base takes part in the formula with these parameters."""
        return self.uses_base or (self.base == "optional" and values.get("task_vectors") == 1.0)

    def completed(self, values: Mapping[str, Value]) -> tuple[tuple[str, Value], ...]:
        """Values of all parameters in the registry's order, defaults filled in, nothing checked.

        A parameter without a default that is not named stays out.

        Raises:
            UsageError: a parameter is unknown.
        """
        known = self.by_name
        for key in values:
            if key not in known:
                raise unknown(f"parameter of {self.name}", key, known)
        found = {name: values.get(name, p.default) for name, p in known.items()}
        return tuple((name, _simple(value)) for name, value in found.items() if value is not None)

    def checked(
        self, values: Mapping[str, object], where: str, sources: Iterable[str] = ()
    ) -> dict[str, Value]:
        """All parameters of the method, defaults filled in, bounds checked.

        Args:
            values: as a recipe has them.
            where: the place, for errors.
            sources: the models that are merged, for parameters with a value for each.

        Raises:
            UsageError: a parameter is unknown, missing or outside its bounds.
        """
        known, names = self.by_name, list(sources)
        for key in values:
            if key not in known:
                raise unknown(f"parameter of {self.name}", key, known, where)
        result: dict[str, Value] = {}
        for name, parameter in known.items():
            if name in values:
                result[name] = parameter.checked_values(values[name], names, where)
            elif parameter.default is None:
                raise UsageError(f"{where}: {self.name} needs a value for {name}.")
            else:
                result[name] = parameter.default
        self._check_together(result, len(names) or 1, where)
        return result

    def _check_together(self, values: Mapping[str, Value], num_sources: int, where: str) -> None:
        """della's probabilities lie around the density, and must be probabilities."""
        if not ("density" in values and "epsilon" in values):
            return
        densities, epsilons = (for_each(values[k], num_sources) for k in ("density", "epsilon"))
        for density, epsilon in zip(densities, epsilons, strict=True):
            if 0.0 < density < 1.0 and not 0.0 < density - epsilon <= density + epsilon < 1.0:
                raise UsageError(
                    f"{where}: density {density:g} and epsilon {epsilon:g} do not go together: "
                    "density - epsilon must be above 0 and density + epsilon below 1."
                )


WEIGHT_BOUNDS = (-1000.0, 1000.0)
"""Inclusive bounds of a source's weight: wide, because methods that normalise take any scale."""


def for_each(value: Value, num_sources: int) -> tuple[float, ...]:
    """A parameter's value for each source."""
    return value if isinstance(value, tuple) else (value,) * num_sources


def _simple(value: Value) -> Value:
    """One number where all sources have the same."""
    if not isinstance(value, tuple):
        return float(value)
    values = tuple(float(v) for v in value)
    return values[0] if len(set(values)) == 1 else values


def checked_number(name: str, value: object, where: str) -> float:
    """`value` as a finite float, or a `UsageError`; booleans are no numbers here."""
    try:
        number = float(value) if type(value) in (int, float) else math.nan  # type: ignore[arg-type]
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise UsageError(f"{where}: {name} is {value!r:.40}, but must be a number.")
    return number


def checked_weight(model: str, value: object, where: str) -> float:
    """A source's weight as a float within `WEIGHT_BOUNDS`, or a `UsageError`."""
    weight = checked_number(f"the weight of {model}", value, where)
    low, high = WEIGHT_BOUNDS
    if not low <= weight <= high:
        raise UsageError(
            f"{where}: the weight of {model} is {weight:g}, outside its bounds {low:g} to {high:g}."
        )
    return weight
