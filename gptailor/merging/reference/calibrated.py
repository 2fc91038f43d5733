"""Methods that need statistics of each model on calibration data: fisher, regmean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .averages import Array
from .formulas import computes


@computes("fisher")
def fisher(
    x_SN: Array,
    fisher_SN: Array,
    w_S: Sequence[float] | None = None,
    *,
    floor: float = 1e-6,
    dtype: Any = np.float64,
) -> Array:
    """Average by Fisher information: Matena & Raffel 2021, arXiv 2111.09832.

    y = Σᵢ wᵢ Fᵢ xᵢ / Σᵢ wᵢ Fᵢ, each Fᵢ no smaller than the floor.

    Args:
        x_SN: the sources.
        fisher_SN: F, the diagonal of each source's Fisher information: the mean of the squared
            gradients of its log-likelihood.
        w_S: one weight for each; None means 1.
        floor: the lower bound of F; where all sources are at it, they are averaged.
        dtype: the type to compute in.

    Raises:
        ValueError: F has another shape than the sources or a negative element, or the weights add
            up to zero somewhere.
    """
    x, f = np.asarray(x_SN, dtype), np.asarray(fisher_SN, dtype)
    if f.shape != x.shape:
        raise ValueError(f"the Fisher information has the shape {f.shape}, the sources {x.shape}")
    if (f < 0).any():
        raise ValueError("Fisher information is never negative, but has a negative element here")
    w = np.asarray([1.0] * len(x) if w_S is None else w_S, dtype)
    sum_N, divisor_N = np.zeros_like(x[0]), np.zeros_like(x[0])
    for x_N, f_N, weight in zip(x, np.maximum(f, dtype(floor)), w, strict=True):
        sum_N = sum_N + weight * f_N * x_N
        divisor_N = divisor_N + weight * f_N
    if (divisor_N == 0).any():
        raise ValueError("the weighted Fisher information adds up to zero somewhere")
    y_N: Array = sum_N / divisor_N
    return y_N


@computes("regmean")
def regmean(
    x_SOI: Array,
    gram_SII: Array,
    w_S: Sequence[float] | None = None,
    *,
    reduce_non_diagonal_ratio: float = 0.9,
    dtype: Any = np.float64,
) -> Array:
    """Match all models' outputs: Jin et al. 2022, Dataless Knowledge Fusion, arXiv 2212.09849.

    yᵀ = (Σᵢ wᵢ Gᵢ)⁻¹ Σᵢ wᵢ Gᵢ Wᵢᵀ, after all off-diagonal elements of G are multiplied by the
    ratio. With a ratio of 1, y minimises Σᵢ wᵢ ‖(Wᵢ − y) Xᵢ‖². Columns of inputs that are always
    zero are averaged: the limit for small additions to the diagonals.

    Args:
        x_SOI: W, the sources' matrices (outputs, inputs).
        gram_SII: G = X Xᵀ / tokens, with X the inputs of each source's layer.
        w_S: one weight for each; None means 1.
        reduce_non_diagonal_ratio: the paper's α; 0 weights each column by the inputs' mean square.
        dtype: the type to compute in.

    Raises:
        ValueError: a shape does not fit, or Σᵢ wᵢ Gᵢ is singular.
    """
    x, g = np.asarray(x_SOI, dtype), np.asarray(gram_SII, dtype)
    if x.ndim != 3 or g.shape != (len(x), x.shape[-1], x.shape[-1]):
        raise ValueError(
            f"regmean needs sources (S, O, I) and Gram matrices (S, I, I), not {x.shape}, {g.shape}"
        )
    w = np.asarray([1.0] * len(x) if w_S is None else w_S, dtype)
    diagonal = np.eye(x.shape[-1], dtype=bool)
    g = np.where(diagonal, g, dtype(reduce_non_diagonal_ratio) * g)
    left = np.zeros_like(g[0])
    right = np.zeros((x.shape[2], x.shape[1]), dtype)
    for x_OI, g_II, weight in zip(x, g, w, strict=True):
        left = left + weight * g_II
        right = right + weight * (g_II @ x_OI.T)
    dead = np.diag(left) == 0
    left[dead, dead] = 1
    right[dead] = (np.tensordot(w / w.sum(), x, 1).T)[dead]
    try:
        y_OI: Array = np.linalg.solve(left, right).T
    except np.linalg.LinAlgError:
        raise ValueError(
            "the sum of the Gram matrices is singular; use more calibration data or a smaller ratio"
        ) from None
    return y_OI
