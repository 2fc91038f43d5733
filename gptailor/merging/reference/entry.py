"""One call for every method, with the names of the registry: what the tests of fast code loop over.

Defaults and what a method takes are written down here once more, so that the registry is tested
against this and not against itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import averages, calibrated, selections, spheres, task_vectors, widening
from .averages import Array

Value = float | Sequence[float]


@dataclass(frozen=True)
class Takes:
    """What a method takes: bounds of its sources, weights, a base, statistics, parameters.

    `base` is True, False, or the name of the flag that asks for it; `parameters` maps names to
    defaults, None where one must be given.
    """

    parameters: Mapping[str, float | None]
    weighted: bool = False
    base: bool | str = False
    min_sources: int = 1
    max_sources: int = 16
    statistics: bool = False


PER_SOURCE = {"density", "gamma", "epsilon"}
"""Parameters that may be a list with one number for each source (ram's epsilon is one number)."""

_DARE = Takes(
    {"density": 1, "lambda": 1, "normalize": 0, "rescale": 1, "seed": 0}, weighted=True, base=True
)
_BREADCRUMBS = Takes(
    {"density": 1, "gamma": 0.01, "lambda": 1, "normalize": 0, "rescale": 0},
    weighted=True,
    base=True,
)


def _della(normalize: int) -> Takes:
    values = {"density": 1, "epsilon": 0.15, "lambda": 1, "normalize": normalize, "rescale": 1}
    return Takes({**values, "seed": 0}, weighted=True, base=True)


METHODS: dict[str, Takes] = {
    "linear": Takes({"normalize": 1}, weighted=True),
    "average": Takes({}),
    "slerp": Takes({"t": None}, min_sources=2, max_sources=2),
    "nuslerp": Takes(
        {"nuslerp_flatten": 1, "nuslerp_row_wise": 0, "task_vectors": 0},
        weighted=True, base="task_vectors", min_sources=2, max_sources=2,
    ),
    "multislerp": Takes(
        {"normalize_weights": 1, "eps": 1e-8, "task_vectors": 0}, weighted=True, base="task_vectors"
    ),
    "karcher": Takes({"max_iter": 10, "tol": 1e-5}),
    "task_arithmetic": Takes({"lambda": 1, "normalize": 0}, weighted=True, base=True),
    "ties": Takes(
        {"density": 1, "lambda": 1, "normalize": 1, "rescale": 0}, weighted=True, base=True
    ),
    "dare_linear": _DARE,
    "dare_ties": _DARE,
    "della": _della(normalize=1),
    "della_linear": _della(normalize=0),
    "breadcrumbs": _BREADCRUMBS,
    "breadcrumbs_ties": _BREADCRUMBS,
    "sce": Takes({"select_topk": 1}, base=True),
    "ram": Takes({"epsilon": 1e-5}, base=True),
    "model_stock": Takes({"filter_wise": 0}, base=True, min_sources=2),
    "stock": Takes({}, base=True, min_sources=2),
    "nearswap": Takes({"t": None}, base=True, max_sources=1),
    "arcee_fusion": Takes({}, base=True, max_sources=1),
    "widen": Takes(
        {"above_average_value_ratio": 1, "score_calibration_value": 1, "by_rows": 0},
        base=True, max_sources=15,
    ),
    "fisher": Takes({"floor": 1e-6}, weighted=True, statistics=True),
    "regmean": Takes({"reduce_non_diagonal_ratio": 0.9}, weighted=True, statistics=True),
}  # fmt: skip


def _checked(
    method: str, n_sources: int, parameters: Mapping[str, Value], **given: Any
) -> dict[str, Any]:
    takes = METHODS[method]
    for name in parameters:
        if name not in takes.parameters:
            raise ValueError(f"{method} has no parameter {name}; it has {list(takes.parameters)}")
    values: dict[str, Any] = {**takes.parameters, **parameters}
    for name, value in values.items():
        if value is None:
            raise ValueError(f"{method} needs a value for {name}")
        if name in PER_SOURCE and method != "ram":
            values[name] = [value] * n_sources if np.ndim(value) == 0 else list(value)
            if len(values[name]) != n_sources:
                raise ValueError(f"{name}: {len(values[name])} values for {n_sources} sources")
    if not takes.min_sources <= n_sources <= takes.max_sources:
        raise ValueError(
            f"{method} takes {takes.min_sources} to {takes.max_sources} sources, not {n_sources}"
        )
    needs = {
        "base": bool(values[takes.base]) if isinstance(takes.base, str) else takes.base,
        "statistics": takes.statistics,
    }
    for name, needed in needs.items():
        if needed and given[name] is None:
            raise ValueError(f"{method} needs a {name}")
        if not needed and given[name] is not None:
            raise ValueError(f"{method} takes no {name}")
    if given["weights"] is not None and not takes.weighted:
        raise ValueError(f"{method} takes no weights")
    return values


def merge(
    method: str,
    sources: Sequence[Array],
    base: Array | None = None,
    *,
    weights: Sequence[float] | None = None,
    parameters: Mapping[str, Value] | None = None,
    key: int = 0,
    statistics: Sequence[Array] | None = None,
    dtype: Any = np.float64,
) -> Array:
    """The result of any method; arrays of one shape in, one of that shape out.

    Args:
        method: a name of the registry.
        sources: the tensors, in the recipe's order.
        base: where the method uses it.
        weights: one for each source; None is 1 for each.
        parameters: by the registry's names; flags as 0 or 1, per-source ones as a number or a list.
        key: of the tensor, for random masks.
        statistics: one for each source: fisher's information, regmean's Gram matrices.
        dtype: np.float64, or np.float32 for the steps of the compiled code.

    Raises:
        ValueError: a name is unknown, something is missing or not taken, or the method refuses.
    """
    if method not in METHODS:
        raise ValueError(f"there is no method {method}; there are {', '.join(METHODS)}")
    v = _checked(
        method, len(sources), parameters or {}, base=base, statistics=statistics, weights=weights
    )
    x = np.stack([np.asarray(s) for s in sources])
    w = [1.0] * len(x) if weights is None else list(weights)
    if len(w) != len(x):
        raise ValueError(f"weights: {len(w)} values for {len(x)} sources")
    return _call(method, x, base, w, v, key, statistics, dtype)


def _call(
    method: str,
    x: Array,
    base: Any,
    w: list[float],
    v: dict[str, Any],
    key: int,
    stats: Any,
    dtype: Any,
) -> Array:
    sums = {"lam": v.get("lambda"), "normalize": bool(v.get("normalize")), "dtype": dtype}
    sparse = {**sums, "densities": v.get("density"), "rescale": bool(v.get("rescale"))}
    random = {**sparse, "seed": int(v.get("seed", 0)), "key": key}
    match method:
        case "linear":
            return averages.linear(x, w, normalize=bool(v["normalize"]), dtype=dtype)
        case "average":
            return averages.average(x, dtype=dtype)
        case "slerp":
            return spheres.slerp(x, t=v["t"], dtype=dtype)
        case "nuslerp":
            flatten, row_wise = bool(v["nuslerp_flatten"]), bool(v["nuslerp_row_wise"])
            return spheres.nuslerp(
                x, w, base_N=base, flatten=flatten, row_wise=row_wise, dtype=dtype
            )
        case "multislerp":
            normalize = bool(v["normalize_weights"])
            return spheres.multislerp(
                x, w, base_N=base, normalize_weights=normalize, eps=v["eps"], dtype=dtype
            )
        case "karcher":
            return spheres.karcher(x, max_iter=int(v["max_iter"]), tol=v["tol"], dtype=dtype)
        case "task_arithmetic":
            return task_vectors.task_arithmetic(x, base, w, **sums)
        case "ties":
            return task_vectors.ties(x, base, w, **sparse)
        case "dare_linear" | "dare_ties":
            return task_vectors.dare(x, base, w, elect=method == "dare_ties", **random)
        case "della" | "della_linear":
            return task_vectors.della(
                x, base, w, elect=method == "della", epsilons=v["epsilon"], **random
            )
        case "breadcrumbs" | "breadcrumbs_ties":
            return task_vectors.breadcrumbs(
                x, base, w, elect=method == "breadcrumbs_ties", gammas=v["gamma"], **sparse
            )
        case "sce":
            return selections.sce(x, base, select_topk=v["select_topk"], dtype=dtype)
        case "ram":
            return selections.ram(x, base, epsilon=v["epsilon"], dtype=dtype)
        case "model_stock" | "stock":
            filter_wise = bool(v.get("filter_wise", 0))
            return spheres.model_stock(x, base, filter_wise=filter_wise, dtype=dtype)
        case "nearswap":
            return selections.nearswap(x, base, t=v["t"], dtype=dtype)
        case "arcee_fusion":
            return selections.arcee_fusion(x, base, dtype=dtype)
        case "widen":
            return widening.widen(x, base, **{**v, "by_rows": bool(v["by_rows"])}, dtype=dtype)
        case "fisher":
            return calibrated.fisher(x, np.stack(stats), w, floor=v["floor"], dtype=dtype)
        case "regmean":
            return calibrated.regmean(x, np.stack(stats), w, dtype=dtype, **v)
    raise AssertionError(method)
