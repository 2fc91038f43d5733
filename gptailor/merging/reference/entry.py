"""One function for all methods, by their names in the registry; tests of fast code use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gptailor.merging.parameter import BASE_FLAG
from gptailor.merging.registry import METHODS, Method

from .averages import Array
from .formulas import FORMULAS

Value = float | Sequence[float]


def merge(
    method: str,
    sources: Sequence[Array] | Array,
    base: Array | None = None,
    *,
    weights: Sequence[float] | None = None,
    parameters: Mapping[str, Value] | None = None,
    key: int = 0,
    statistics: Sequence[Array] | Array | None = None,
    dtype: Any = np.float64,
) -> Array:
    """The result of any method; inputs and result have the same shape.

    Args:
        method: a name in the registry.
        sources: the tensors, in the recipe's order; a list, or stacked.
        base: the base, if the method uses it.
        weights: one for each source; None means 1 for each.
        parameters: by their names in the registry; flags as 0 or 1, per-source ones as a number or
            a list.
        key: the tensor's key, for random masks.
        statistics: one for each source: fisher's information, regmean's Gram matrices.
        dtype: np.float64, or np.float32 for the steps of the compiled code.

    Raises:
        ValueError: a name is unknown, an argument is missing or not accepted, or the method
            refuses its input.
    """
    if method not in METHODS:
        raise ValueError(f"there is no method {method}; there are {', '.join(METHODS)}")
    declared = METHODS[method]
    values = _values(declared, len(sources), parameters or {})
    _check(declared, len(sources), values, base=base, statistics=statistics, weights=weights)
    x_SN = np.stack([np.asarray(s) for s in sources])
    w_S = [1.0] * len(x_SN) if weights is None else list(weights)
    if len(w_S) != len(x_SN):
        raise ValueError(f"weights: {len(w_S)} values for {len(x_SN)} sources")
    result: Array = FORMULAS[method](
        x_SN,
        *([] if statistics is None else [np.stack(list(statistics))]),
        parameters={name: value for name, value in values.items() if name != BASE_FLAG},
        base_N=base,
        w_S=w_S,
        key=key,
        dtype=dtype,
    )
    return result


def _values(method: Method, n_sources: int, given: Mapping[str, Value]) -> dict[str, Any]:
    """All parameters: flags as bool, whole numbers as int, per-source ones as lists."""
    known = method.by_name
    for name in given:
        if name not in known:
            raise ValueError(f"{method.name} has no parameter {name}; it has {list(known)}")
    values: dict[str, Any] = {}
    for name, parameter in known.items():
        value: Any = given.get(name, parameter.default)
        if value is None:
            raise ValueError(f"{method.name} needs a value for {name}")
        if parameter.per_source:
            value = [value] * n_sources if np.ndim(value) == 0 else list(value)
            if len(value) != n_sources:
                raise ValueError(f"{name}: {len(value)} values for {n_sources} sources")
        values[name] = value if parameter.per_source else parameter.shown(value)
    return values


def _check(method: Method, n_sources: int, values: Mapping[str, Any], **given: Any) -> None:
    if not method.min_sources <= n_sources <= method.max_sources:
        low, high = method.min_sources, method.max_sources
        raise ValueError(f"{method.name} takes {low} to {high} sources, not {n_sources}")
    needs = {"base": method.takes_base(values), "statistics": method.is_calibrated}
    for name, needed in needs.items():
        if needed and given[name] is None:
            raise ValueError(f"{method.name} needs a {name}")
        if not needed and given[name] is not None:
            raise ValueError(f"{method.name} takes no {name}")
    if given["weights"] is not None and not method.weighted:
        raise ValueError(f"{method.name} takes no weights")
