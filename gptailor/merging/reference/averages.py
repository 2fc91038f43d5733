"""Weighted sums of the sources themselves: linear, average."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .formulas import computes

Array = npt.NDArray[Any]

TINY = 1e-8
"""Sums of weights below this and norms up to this are not divided by."""


def weighted_sum(x_SN: Array, w_S: Array) -> Array:
    """Σᵢ wᵢ xᵢ, added up in the order of the sources."""
    total: Array = w_S[0] * x_SN[0]
    for x_N, w in zip(x_SN[1:], w_S[1:], strict=True):
        total = total + w * x_N
    return total


def sum_of(w_S: Array) -> Any:
    """Σᵢ wᵢ, added up in the order of the sources."""
    total = w_S.dtype.type(0)
    for w in w_S:
        total = total + w
    return total


@computes("linear")
def linear(
    x_SN: Array, w_S: Sequence[float], *, normalize: bool = True, dtype: Any = np.float64
) -> Array:
    """Average models: Wortsman et al. 2022, Model soups, arXiv 2203.05482.

    y = Σᵢ wᵢ xᵢ, divided by Σᵢ wᵢ if `normalize`.

    Args:
        x_SN: the sources.
        w_S: one weight for each.
        normalize: divide by the sum of the weights.
        dtype: the type to compute in.

    Raises:
        ValueError: the weights add up to zero and cannot be normalised.
    """
    w = np.asarray(w_S, dtype)
    y_N = weighted_sum(np.asarray(x_SN, dtype), w)
    if not normalize:
        return y_N
    if abs(sum_of(w)) < TINY:
        raise ValueError("the weights add up to zero, so they cannot be normalised")
    mean_N: Array = y_N / sum_of(w)
    return mean_N


@computes("average")
def average(x_SN: Array, *, dtype: Any = np.float64) -> Array:
    """Average models with equal weights: y = Σᵢ xᵢ / S.

    Args:
        x_SN: the sources.
        dtype: the type to compute in.
    """
    return linear(x_SN, [1.0] * len(x_SN), dtype=dtype)
