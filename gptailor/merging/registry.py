"""The merge methods, each declared once: for the recipe, for the stitcher and for the search.

A method says which sources it takes, which parameters with which bounds, what it computes and who
published it. The formulas themselves stand in `csrc/formulas.h` (fast) and in `reference.py`
(slow, float64).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from gptailor.errors import UsageError, unknown


@dataclass(frozen=True)
class Parameter:
    """A number that a method takes, beside the weights of its sources.

    Attributes:
        name: the key in a recipe.
        default: used when the recipe does not name it; None when it must be given.
        low, high: inclusive bounds.
        search: the values that a search tries.
        doc: what it does, in one line.
    """

    name: str
    default: float | None
    low: float
    high: float
    search: tuple[float, ...]
    doc: str
    is_flag: bool = False

    def checked(self, value: object, where: str) -> float:
        """`value` as a float, or a `UsageError` that names the bounds."""
        if self.is_flag:
            if not isinstance(value, bool):
                raise UsageError(f"{where}: {self.name} is {value!r}, but must be true or false.")
            return float(value)
        number = checked_number(self.name, value, where)
        if not self.low <= number <= self.high:
            raise UsageError(
                f"{where}: {self.name} is {number:g}, outside its bounds "
                f"{self.low:g} to {self.high:g}."
            )
        return number


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
        uses_base: True if the recipe's base takes part in the formula.
    """

    name: str
    formula: str
    paper: str
    parameters: tuple[Parameter, ...]
    weighted: bool
    min_sources: int
    max_sources: int
    uses_base: bool

    def checked(self, values: Mapping[str, object], where: str) -> dict[str, float]:
        """All parameters of the method, defaults filled in, bounds checked.

        Raises:
            UsageError: a parameter is unknown, missing or outside its bounds.
        """
        known = {p.name: p for p in self.parameters}
        for key in values:
            if key not in known:
                raise unknown(f"parameter of {self.name}", key, known, where)
        result: dict[str, float] = {}
        for name, parameter in known.items():
            value = values.get(name, parameter.default)
            if value is None:
                raise UsageError(f"{where}: {self.name} needs a value for {name}.")
            if name not in values and parameter.is_flag:
                value = bool(value)
            result[name] = parameter.checked(value, where)
        return result


WEIGHT_BOUNDS = (-2.0, 2.0)
"""Inclusive bounds of a source's weight: beyond them no published merge is found."""

_NORMALIZE_DOC = "divide by the sum of the weights that took part"
_LAMBDA = Parameter("lambda", 1.0, -2.0, 2.0, (1.0,), "factor on the merged difference")


def _normalize(default: bool) -> Parameter:
    value = float(default)
    return Parameter("normalize", value, 0.0, 1.0, (value,), _NORMALIZE_DOC, is_flag=True)


METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        Method(
            name="linear",
            formula="Σ wᵢ xᵢ / Σ wᵢ",
            paper="Wortsman et al. 2022, Model soups, arXiv 2203.05482",
            parameters=(_normalize(True),),
            weighted=True,
            min_sources=1,
            max_sources=16,
            uses_base=False,
        ),
        Method(
            name="task_arithmetic",
            formula="b + λ Σ wᵢ (xᵢ − b)",
            paper="Ilharco et al. 2022, Editing Models with Task Arithmetic, arXiv 2212.04089",
            parameters=(_LAMBDA, _normalize(False)),
            weighted=True,
            min_sources=1,
            max_sources=16,
            uses_base=True,
        ),
        Method(
            name="slerp",
            formula="(sin((1−t)θ) x₀ + sin(tθ) x₁) / sin θ,  cos θ = x₀·x₁ / (‖x₀‖ ‖x₁‖)",
            paper="Shoemake 1985, Animating Rotation with Quaternion Curves, SIGGRAPH",
            parameters=(
                Parameter("t", None, 0.0, 1.0, (0.5,), "0 is the first model, 1 the second"),
            ),
            weighted=False,
            min_sources=2,
            max_sources=2,
            uses_base=False,
        ),
        Method(
            name="ties",
            formula="b + λ Σ_{i ∈ A} wᵢ δᵢ / Σ_{i ∈ A} wᵢ,  δᵢ = the largest part of xᵢ − b, "
            "A = the sources whose sign is that of Σ wᵢ δᵢ",
            paper="Yadav et al. 2023, TIES-Merging, arXiv 2306.01708",
            parameters=(
                Parameter("density", 1.0, 0.0, 1.0, (0.5,), "part of each difference that is kept"),
                _LAMBDA,
                _normalize(True),
            ),
            weighted=True,
            min_sources=1,
            max_sources=16,
            uses_base=True,
        ),
    )
}


def get_method(name: object, where: str = "") -> Method:
    """The method of that name.

    Raises:
        UsageError: there is none; the message has the nearest right name.
    """
    if name not in METHODS:
        raise unknown("merge method", name, METHODS, where)
    return METHODS[str(name)]


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
