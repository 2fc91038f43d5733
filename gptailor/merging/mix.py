"""A merge as plain values: what the rules about merges that build the same are about."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gptailor.merging.parameter import Value, for_each

if TYPE_CHECKING:
    from gptailor.merging.method import Method


@dataclass(frozen=True)
class Mix:
    """A merge of some sources.

    Attributes:
        method: how it is made.
        weights: (source, weight) in their order; weight 1.0 where the method has no weights.
        parameters: (name, value) of every parameter of the method; defaults are filled in.
        base: the source that is the base.
    """

    method: Method
    weights: tuple[tuple[str, float], ...]
    parameters: tuple[tuple[str, Value], ...]
    base: str

    def __post_init__(self) -> None:
        values = self.method.completed(dict(self.parameters))
        object.__setattr__(self, "parameters", values)

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources without their weights."""
        return tuple(source for source, _ in self.weights)

    def parameter(self, name: str) -> Value:
        """The value of a parameter that the method has."""
        return dict(self.parameters)[name]

    def number(self, name: str) -> float:
        """The value of a parameter that is the same for all sources."""
        value = self.parameter(name)
        assert isinstance(value, float), name
        return value

    def for_each(self, name: str) -> tuple[float, ...]:
        """The value of a parameter for each source."""
        return for_each(self.parameter(name), len(self.weights))

    def select(self, indices: Iterable[int]) -> Mix:
        """The merge of these sources only, in this order."""
        chosen = list(indices)
        values = tuple(
            (name, tuple(value[i] for i in chosen) if isinstance(value, tuple) else value)
            for name, value in self.parameters
        )
        weights = tuple(self.weights[i] for i in chosen)
        return replace(self, weights=weights, parameters=values)

    def having(self, **values: Value) -> Mix:
        """The same with other values of some parameters."""
        return replace(self, parameters=tuple((dict(self.parameters) | values).items()))

    def weighing(self, weights: Iterable[float]) -> Mix:
        """The same with other weights, one for each source."""
        pairs = zip(self.sources, weights, strict=True)
        return replace(self, weights=tuple((source, weight) for source, weight in pairs))

    def by(self, method: Method, **values: Value) -> Mix:
        """The merge by another method: it gets what both have, `values`, and else defaults."""
        known = method.by_name
        kept = {name: value for name, value in self.parameters if name in known} | values
        return replace(self, method=method, parameters=tuple(kept.items()))


def unchanged(mix: Mix) -> Mix:
    """The rule of a method of which no simpler form is known."""
    return mix
