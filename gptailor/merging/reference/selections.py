"""Methods that select among sources for each element: sce, ram, nearswap, arcee_fusion."""

from __future__ import annotations

from typing import Any

import numpy as np

from .averages import Array
from .formulas import computes

SCE_FLAT = 1e-6
"""Below this sum of mean squares, sce gives all sources the same weight."""

SCE_LEAST = 1e-6
"""The smallest number that sce divides by."""

NEAR = 1e-6
"""nearswap raises smaller differences to this."""

ARCEE_FLOOR = 1e-8
"""What arcee_fusion adds to each probability."""


@computes("sce")
def sce(x_SN: Array, base_N: Array, *, select_topk: float = 1.0, dtype: Any = np.float64) -> Array:
    """Select, calculate, erase: Wan et al. 2024, FuseChat, arXiv 2408.07990.

    δᵢ = xᵢ − b. Select: of the n elements where the sources differ, the int(topk · n) with the
    largest variance over the sources stay, and ties with the last of them; δ is 0 elsewhere.
    Calculate: wᵢ = mean(δᵢ²) / Σⱼ mean(δⱼ²), or 1 / S where that sum is below 1e-6.
    Erase: A = {i : sign(δᵢ) = s}, s = +1 where Σᵢ δᵢ ≥ 0 and −1 elsewhere.
    y = b + Σ_{i ∈ A} wᵢ δᵢ / max(Σ_{i ∈ A} wᵢ, 1e-6).

    Args:
        x_SN: the sources.
        base_N: b, the model that they were finetuned from.
        select_topk: 1 or more selects everything, 0 or less nothing.
        dtype: the type to compute in; the mean squares are always float64.
    """
    base = np.asarray(base_N, dtype)
    delta_SN = np.asarray(x_SN, dtype) - base
    if select_topk < 1:
        delta_SN = np.where(_most_varied(delta_SN, select_topk), delta_SN, dtype(0))
    squares = [float(np.mean(np.square(delta_N, dtype=np.float64))) for delta_N in delta_SN]
    total = sum(squares)
    shares = (
        [s / total for s in squares] if total >= SCE_FLAT else [1 / len(squares)] * len(squares)
    )
    w = np.asarray(shares, dtype)
    summed_N = np.zeros_like(base)
    for delta_N in delta_SN:
        summed_N = summed_N + delta_N
    sign_N = np.where(summed_N >= 0, dtype(1), dtype(-1))
    sum_N, divisor_N = np.zeros_like(base), np.zeros_like(base)
    for delta_N, weight in zip(delta_SN, w, strict=True):
        agrees_N = np.sign(delta_N) == sign_N
        sum_N = sum_N + np.where(agrees_N, weight * delta_N, dtype(0))
        divisor_N = divisor_N + np.where(agrees_N, weight, dtype(0))
    merged_N = sum_N / np.maximum(divisor_N, dtype(SCE_LEAST))
    y_N: Array = base + np.where(np.isnan(summed_N), summed_N, merged_N)
    return y_N


def _most_varied(delta_SN: Array, select_topk: float) -> Array:
    """Which elements `sce` selects; variances are relative to the first source, so that equal
    sources give exactly 0."""
    shifted_SN = delta_SN - delta_SN[0]
    off_SN = shifted_SN - np.mean(shifted_SN, axis=0)
    variance_N = np.mean(off_SN * off_SN, axis=0)
    k = int(np.count_nonzero(variance_N) * max(0.0, select_topk))
    if k == 0:
        return np.zeros(variance_N.shape, bool)
    mask_N: Array = variance_N >= np.sort(variance_N.ravel())[-k]
    return mask_N


@computes("ram")
def ram(x_SN: Array, base_N: Array, *, epsilon: float = 1e-5, dtype: Any = np.float64) -> Array:
    """Average the differences that are not zero: Reinforced Agent Merging, arXiv 2601.13572.

    y = b + Σ_{i ∈ A} δᵢ / |A|, A = {i : |δᵢ| > ε}, δ = x − b; y = b where A is empty.

    Args:
        x_SN: the sources.
        base_N: b, the model that they were trained from.
        epsilon: ε.
        dtype: the type to compute in.
    """
    base = np.asarray(base_N, dtype)
    sum_N, count_N = np.zeros_like(base), np.zeros_like(base)
    for x_N in np.asarray(x_SN, dtype):
        delta_N = x_N - base
        differs_N = ~(np.abs(delta_N) <= dtype(epsilon))
        sum_N = sum_N + np.where(differs_N, delta_N, dtype(0))
        count_N = count_N + np.where(differs_N, dtype(1), dtype(0))
    y_N: Array = base + sum_N / np.maximum(count_N, dtype(1))
    return y_N


@computes("nearswap")
def nearswap(x_SN: Array, base_N: Array, *, t: float, dtype: Any = np.float64) -> Array:
    """Take the source where it is near the base: alchemonaut 2024, QuartetAnemoi-70B-t0.0001.

    y = w x + (1 − w) b, w = t / max(|b − x|, 1e-6), clipped to [0, 1].

    Args:
        x_SN: exactly one source.
        base_N: b.
        t: differences up to this are taken whole.
        dtype: the type to compute in.
    """
    (x,) = np.asarray(x_SN, dtype)
    base = np.asarray(base_N, dtype)
    w_N = np.clip(dtype(t) / np.maximum(np.abs(base - x), dtype(NEAR)), dtype(0), dtype(1))
    y_N: Array = w_N * x + (dtype(1) - w_N) * base
    return y_N


def arcee_scores(x_N: Array, base_N: Array) -> Array:
    """`arcee_fusion`'s importance of each element, float32 (computed in float64, rounded once)."""
    x, base = np.asarray(x_N, np.float64), np.asarray(base_N, np.float64)
    p_N, q_N = _softmax(x) + ARCEE_FLOOR, _softmax(base) + ARCEE_FLOOR
    divergence = np.sum(p_N * np.log(p_N / q_N), axis=-1, keepdims=True)
    return np.asarray(np.abs(x - base) * divergence, np.float32)


def _softmax(x_N: Array) -> Array:
    e_N = np.exp(x_N - np.max(x_N, axis=-1, keepdims=True))
    result: Array = e_N / np.sum(e_N, axis=-1, keepdims=True)
    return result


def arcee_threshold(score_N: Array) -> np.float32:
    """Median + 1.5 (third − first quartile), float32; the q-quantile is sorted[int(q (n − 1))]."""
    ascending = np.sort(score_N.ravel())
    q1, median, q3 = (ascending[int(q * (ascending.size - 1))] for q in (0.25, 0.5, 0.75))
    return np.float32(median + np.float32(1.5) * (q3 - q1))


@computes("arcee_fusion")
def arcee_fusion(x_SN: Array, base_N: Array, *, dtype: Any = np.float64) -> Array:
    """Take over the elements that stand out: mergekit's Arcee Fusion.

    y = x where the score is at least median + 1.5 (q₃ − q₁) of the tensor's scores, b elsewhere
    (as b + (x − b)). score = |x − b| · KL(p ‖ q) of the element's row, p and q the softmax of the
    row of x and of b, each plus 1e-8. A one-dimensional tensor is one row.

    Args:
        x_SN: exactly one source.
        base_N: b.
        dtype: the type to compute in; the score's types are those of `arcee_scores`.
    """
    (x,) = np.asarray(x_SN, dtype)
    base = np.asarray(base_N, dtype)
    score_N = arcee_scores(np.atleast_1d(x), np.atleast_1d(base)).reshape(x.shape)
    important_N = ~(score_N < arcee_threshold(score_N))
    y_N: Array = base + np.where(important_N, x - base, dtype(0))
    return y_N
