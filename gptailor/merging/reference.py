"""The merge formulas written down once more, slowly: the oracle for `csrc/formulas.h`.

Only numpy. By default everything is computed in float64; `dtype=np.float32` computes the same steps
in the same order as the compiled code, which then agrees to the last bit for linear,
task_arithmetic and ties. Nothing is rounded to a storage type here.

Shapes: x_SN is S sources of N elements, base_N the base, w_S the weights, d_S the densities.
Not a number is not looked for: it passes through.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

TINY = 1e-8
"""Sums of weights below this do not divide; norms up to this do not normalise."""

PARALLEL = 0.9995
"""From this |cosine| on, slerp interpolates linearly."""


def _weighted_sum(x_SN: Array, w_S: Array) -> Array:
    total: Array = w_S[0] * x_SN[0]
    for x_N, w in zip(x_SN[1:], w_S[1:], strict=True):
        total = total + w * x_N
    return total


def _sum(w_S: Array) -> Any:
    total = w_S.dtype.type(0)
    for w in w_S:
        total = total + w
    return total


def linear(
    x_SN: Array, w_S: Sequence[float], *, normalize: bool = True, dtype: Any = np.float64
) -> Array:
    """Average models: Wortsman et al. 2022, Model soups, arXiv 2203.05482.

    y = Σᵢ wᵢ xᵢ, divided by Σᵢ wᵢ if `normalize`.

    Args:
        x_SN: the sources.
        w_S: one weight for each.
        normalize: divide by the sum of the weights.
        dtype: what to compute in.

    Raises:
        ValueError: the weights add up to zero and cannot be normalised.
    """
    w = np.asarray(w_S, dtype)
    y_N = _weighted_sum(np.asarray(x_SN, dtype), w)
    if not normalize:
        return y_N
    if abs(_sum(w)) < TINY:
        raise ValueError("the weights add up to zero, so they cannot be normalised")
    mean_N: Array = y_N / _sum(w)
    return mean_N


def task_arithmetic(
    x_SN: Array,
    base_N: Array,
    w_S: Sequence[float],
    *,
    lam: float = 1.0,
    normalize: bool = False,
    dtype: Any = np.float64,
) -> Array:
    """Add task vectors: Ilharco et al. 2022, Editing Models with Task Arithmetic, arXiv 2212.04089.

    y = b + λ Σᵢ wᵢ (xᵢ − b), the sum divided by Σᵢ wᵢ if `normalize` (unless that is zero).

    Args:
        x_SN: the sources.
        base_N: b, the model that they were finetuned from.
        w_S: one weight for each.
        lam: λ.
        normalize: divide by the sum of the weights.
        dtype: what to compute in.
    """
    w = np.asarray(w_S, dtype)
    base = np.asarray(base_N, dtype)
    delta_N = _weighted_sum(np.asarray(x_SN, dtype) - base, w)
    if normalize and abs(_sum(w)) >= TINY:
        delta_N = delta_N / _sum(w)
    y_N: Array = base + dtype(lam) * delta_N
    return y_N


def slerp_weights(x0_N: Array, x1_N: Array, t: float) -> tuple[float, float]:
    """Return the weights of the two tensors; always in float64."""
    x0, x1 = np.asarray(x0_N, np.float64), np.asarray(x1_N, np.float64)
    norms = [float(np.sqrt(np.sum(x * x))) for x in (x0, x1)]
    scale = np.prod([norm if norm > TINY else 1.0 for norm in norms])
    cosine = float(np.sum(x0 * x1) / scale)
    if abs(cosine) > PARALLEL:
        return 1.0 - t, t
    theta = np.arccos(cosine)
    return (
        float(np.sin((1.0 - t) * theta) / np.sin(theta)),
        float(np.sin(t * theta) / np.sin(theta)),
    )


def slerp(x_SN: Array, *, t: float, dtype: Any = np.float64) -> Array:
    """Interpolate along a great circle: Shoemake 1985, Animating Rotation with Quaternion Curves.

    y = (sin((1−t)θ) x₀ + sin(tθ) x₁) / sin θ, cos θ = x₀·x₁ / (‖x₀‖ ‖x₁‖), over whole tensors;
    y = (1−t) x₀ + t x₁ where |cos θ| > 0.9995, because sin θ is close to zero there.

    Args:
        x_SN: exactly two sources.
        t: 0 gives the first, 1 the second.
        dtype: what to compute in, once the two weights are known.
    """
    x0_N, x1_N = np.asarray(x_SN, dtype)
    w = np.asarray(slerp_weights(x0_N, x1_N, t), dtype)
    return _weighted_sum(np.stack([x0_N, x1_N]), w)


def kept(density: float, n_elements: int) -> int:
    """Return how many elements a density keeps: max(1, int(density · n))."""
    return min(n_elements, max(1, int(density * n_elements)))


def trim(delta_N: Array, density: float) -> Array:
    """Set all but the largest magnitudes to zero.

    `kept(density, N)` elements stay, and with the smallest of them all others of its magnitude.
    """
    k = kept(density, delta_N.size)
    if k >= delta_N.size:
        return delta_N
    threshold = np.sort(np.abs(delta_N).ravel())[-k]
    return np.where(np.abs(delta_N) >= threshold, delta_N, delta_N.dtype.type(0))


def ties(
    x_SN: Array,
    base_N: Array,
    w_S: Sequence[float],
    *,
    densities: Sequence[float] | None = None,
    lam: float = 1.0,
    normalize: bool = True,
    dtype: Any = np.float64,
) -> Array:
    """Trim, elect signs, merge: Yadav et al. 2023, TIES-Merging, arXiv 2306.01708.

    δᵢ = wᵢ · trim(xᵢ − b),  s = +1 where Σᵢ δᵢ ≥ 0 and −1 elsewhere,  A = {i : sign(δᵢ) = s},
    y = b + λ Σ_{i ∈ A} δᵢ, the sum divided by Σ_{i ∈ A} wᵢ if `normalize` (unless that is zero).

    Args:
        x_SN: the sources.
        base_N: b, the model that they were finetuned from.
        w_S: one weight for each.
        densities: the part of each difference that is kept, one for each source; None keeps all.
        lam: λ.
        normalize: divide by the sum of the weights that took part.
        dtype: what to compute in.
    """
    w = np.asarray(w_S, dtype)
    base = np.asarray(base_N, dtype)
    x = np.asarray(x_SN, dtype)
    delta_SN = np.stack(
        [
            w[i] * trim(x[i] - base, 1.0 if densities is None else densities[i])
            for i in range(len(w))
        ]
    )
    total = np.zeros_like(base)
    for delta_N in delta_SN:
        total = total + delta_N
    sign_N = np.where(total >= 0, dtype(1), dtype(-1))
    sum_N, divisor_N = np.zeros_like(base), np.zeros_like(base)
    for delta_N, weight in zip(delta_SN, w, strict=True):
        agrees_N = np.sign(delta_N) == sign_N
        sum_N = sum_N + np.where(agrees_N, delta_N, dtype(0))
        divisor_N = divisor_N + np.where(agrees_N, weight, dtype(0))
    if normalize:
        sum_N = sum_N / np.where(np.abs(divisor_N) < TINY, dtype(1), divisor_N)
    y_N: Array = base + dtype(lam) * np.where(np.isnan(total), total, sum_N)
    return y_N
