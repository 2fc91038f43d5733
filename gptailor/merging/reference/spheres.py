"""Methods that treat a tensor as a direction and a length: slerp, nuslerp, multislerp, karcher.

model_stock, which only measures angles, is here, too. Norms, dot products and everything derived
from them are float64 whatever `dtype` is; `dtype` is the type in which the last sum is computed
(slerp) or the type of the result (the others).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from .averages import TINY, Array, weighted_sum
from .formulas import computes

PARALLEL = 0.9995
"""From this |cosine| on, slerp interpolates linearly."""

NUSLERP_PARALLEL = 1e-6
"""Below this sine, nuslerp interpolates linearly."""

NUSLERP_SHORT = 1e-7
"""nuslerp raises smaller norms to this."""

CANCELLED = 1e-7
"""Below this length of the mean direction (or ε, if larger), multislerp has no direction."""

STOCK_SHORT = 1e-6
"""model_stock raises smaller products of norms to this."""

STOCK_SINGULAR = 1e-6
"""Below this |1 + (S − 1) cos θ|, model_stock returns the base."""


def _norm(x_N: Array) -> float:
    return float(np.sqrt(np.sum(x_N * x_N)))


def slerp_weights(x0_N: Array, x1_N: Array, t: float) -> tuple[float, float]:
    """Return the weights of the two tensors; always in float64."""
    x0, x1 = np.asarray(x0_N, np.float64), np.asarray(x1_N, np.float64)
    norms = [_norm(x) for x in (x0, x1)]
    scale = np.prod([norm if norm > TINY else 1.0 for norm in norms])
    cosine = float(np.sum(x0 * x1) / scale)
    if abs(cosine) > PARALLEL:
        return 1.0 - t, t
    theta = np.arccos(cosine)
    return (
        float(np.sin((1.0 - t) * theta) / np.sin(theta)),
        float(np.sin(t * theta) / np.sin(theta)),
    )


@computes("slerp")
def slerp(x_SN: Array, *, t: float, dtype: Any = np.float64) -> Array:
    """Interpolate along a great circle: Shoemake 1985, Animating Rotation with Quaternion Curves.

    y = (sin((1−t)θ) x₀ + sin(tθ) x₁) / sin θ, cos θ = x₀·x₁ / (‖x₀‖ ‖x₁‖), over whole tensors;
    y = (1−t) x₀ + t x₁ where |cos θ| > 0.9995, because sin θ is close to zero there.

    Args:
        x_SN: exactly two sources.
        t: 0 gives the first, 1 the second.
        dtype: the type to compute in, once the two weights are known.
    """
    x0_N, x1_N = np.asarray(x_SN, dtype)
    w = np.asarray(slerp_weights(x0_N, x1_N, t), dtype)
    return weighted_sum(np.stack([x0_N, x1_N]), w)


@computes("nuslerp", flatten="nuslerp_flatten", row_wise="nuslerp_row_wise")
def nuslerp(
    x_SN: Array,
    w_S: Sequence[float],
    *,
    base_N: Array | None = None,
    flatten: bool = True,
    row_wise: bool = False,
    dtype: Any = np.float64,
) -> Array:
    """Interpolate along great circles, one for each vector: mergekit's NuSLERP.

    y = slerp(v₀, v₁) with t = w₁ / (w₀ + w₁), or ½ where |w₀ + w₁| < 1e-6. The vectors v are
    the whole tensors if `flatten`, else along the last dimension, or the first if `row_wise`
    (mergekit's name; the vectors are columns then). Linear only where sin θ < 1e-6.
    With a base, v = x − b and the result is added to b.

    Args:
        x_SN: exactly two sources.
        w_S: their weights.
        base_N: b, or None.
        flatten, row_wise: what a vector is.
        dtype: of the result.
    """
    x0, x1 = np.asarray(x_SN, np.float64)
    base = np.zeros_like(x0) if base_N is None else np.asarray(base_N, np.float64)
    v0, v1 = x0 - base, x1 - base
    total = float(w_S[0]) + float(w_S[1])
    t = 0.5 if abs(total) < 1e-6 else float(w_S[1]) / total
    axis = None if flatten else (0 if row_wise else -1)
    norms = [np.sqrt(np.sum(v * v, axis=axis, keepdims=True)) for v in (v0, v1)]
    u0, u1 = (v / np.maximum(n, NUSLERP_SHORT) for v, n in zip((v0, v1), norms, strict=True))
    cosine = np.clip(np.sum(u0 * u1, axis=axis, keepdims=True), -1, 1)
    parallel = 1 - cosine * cosine <= NUSLERP_PARALLEL**2
    theta = np.arccos(np.where(parallel, 0.0, cosine))
    w0 = np.where(parallel, 1 - t, np.sin((1 - t) * theta) / np.sin(theta))
    w1 = np.where(parallel, t, np.sin(t * theta) / np.sin(theta))
    y_N: Array = (w0 * v0 + w1 * v1 + base).astype(dtype)
    return y_N


@computes("multislerp")
def multislerp(
    x_SN: Array,
    w_S: Sequence[float],
    *,
    base_N: Array | None = None,
    normalize_weights: bool = True,
    eps: float = 1e-8,
    dtype: Any = np.float64,
) -> Array:
    """Average on a sphere, in the tangent plane at the mean direction: Goddard 2025, Multi-SLERP.

    uᵢ = xᵢ / (‖xᵢ‖ + ε), m = Σ wᵢ uᵢ / ‖Σ wᵢ uᵢ‖, T = Σ wᵢ (uᵢ − (uᵢ·m) m), τ = ‖T‖ + ε,
    y = (Σ wᵢ ‖xᵢ‖) (m cos τ + T sin τ / τ). One source is returned as it is. Where the directions
    cancel out (‖Σ wᵢ uᵢ‖ < 1e-7, or ε if that is larger), y = Σ wᵢ xᵢ for two sources, or if all
    are zero. With a base, x − b takes the place of x, and b is added.
    https://goddard.blog/posts/multislerp-wow-what-a-cool-idea

    Args:
        x_SN: the sources.
        w_S: one weight for each.
        base_N: b, or None.
        normalize_weights: divide the weights by their sum.
        eps: ε.
        dtype: of the result.

    Raises:
        ValueError: the weights add up to zero and cannot be normalised, or three or more
            directions cancel out and are not all zero.
    """
    x = np.asarray(x_SN, np.float64)
    if len(x) == 1:
        return np.asarray(x[0], dtype)
    base = np.zeros_like(x[0]) if base_N is None else np.asarray(base_N, np.float64)
    v_SN = x - base
    w = np.asarray(w_S, np.float64)
    if normalize_weights:
        if abs(w.sum()) < TINY:
            raise ValueError("the weights add up to zero, so they cannot be normalised")
        w = w / w.sum()
    norms = [_norm(v) for v in v_SN]
    u_SN = np.stack([v / (norm + eps) for v, norm in zip(v_SN, norms, strict=True)])
    mean_N = weighted_sum(u_SN, w)
    if _norm(mean_N) < max(eps, CANCELLED):
        if len(x) > 2 and any(norms):
            raise ValueError(
                "the directions of the sources cancel out, so they have no mean; change a weight"
            )
        return np.asarray(weighted_sum(v_SN, w) + base, dtype)
    mean_N = mean_N / _norm(mean_N)
    tangent_N = weighted_sum(np.stack([u - np.sum(u * mean_N) * mean_N for u in u_SN]), w)
    tau = _norm(tangent_N) + eps
    direction_N = mean_N * np.cos(tau) + tangent_N * (np.sin(tau) / tau)
    y_N: Array = (float(np.sum(w * norms)) * direction_N + base).astype(dtype)
    return y_N


@computes("karcher")
def karcher(
    x_SN: Array, *, max_iter: int = 10, tol: float = 1e-5, dtype: Any = np.float64
) -> Array:
    """Average on a sphere: Karcher 1977, Riemannian center of mass, CPAM 30.

    uᵢ = xᵢ / ‖xᵢ‖ for the sources with ‖xᵢ‖ > tol; u starts as the direction of Σ uᵢ (u₁ if that
    is below tol) and moves, `max_iter` times or until ‖T‖ < tol, along
    T = Σ aᵢ (θᵢ / sin θᵢ) (uᵢ − u cos θᵢ), cos θᵢ = u·uᵢ, by u ← u cos‖T‖ + (T / ‖T‖) sin‖T‖.
    Sources with θᵢ < tol or θᵢ > π − tol add nothing to T: there is no unique direction to an
    antipode. y = (Σ ‖xᵢ‖ / S) u over all sources; zero if all are short. One source is returned as
    it is.

    Args:
        x_SN: the sources.
        max_iter: the maximum number of steps.
        tol: see above.
        dtype: of the result.
    """
    x = np.asarray(x_SN, np.float64)
    if len(x) == 1:
        return np.asarray(x[0], dtype)
    norms = [_norm(v) for v in x]
    units = [v / norm for v, norm in zip(x, norms, strict=True) if norm > tol]
    if not units:
        return np.zeros_like(x[0], dtype)
    a = 1.0 / len(units)
    u_N = sum((a * unit for unit in units), np.zeros_like(x[0]))
    u_N = units[0] if _norm(u_N) < tol else u_N / _norm(u_N)
    for _ in range(int(max_iter)):
        tangent_N = np.zeros_like(u_N)
        for unit in units:
            cosine = float(np.clip(np.sum(u_N * unit), -1, 1))
            theta = float(np.arccos(cosine))
            if tol <= theta <= np.pi - tol:
                tangent_N = tangent_N + a * (theta / np.sin(theta)) * (unit - cosine * u_N)
        step = _norm(tangent_N)
        if step < tol:
            break
        u_N = np.cos(step) * u_N + np.sin(step) * (tangent_N / step)
        u_N = u_N / _norm(u_N)
    y_N: Array = (float(np.mean(norms)) * u_N).astype(dtype)
    return y_N


@computes("model_stock")
@computes("stock")
def model_stock(
    x_SN: Array, base_N: Array, *, filter_wise: bool = False, dtype: Any = np.float64
) -> Array:
    """Go from the base towards the average by an angle: Jang et al. 2024, Model Stock, 2403.19522.

    c = the mean over all pairs of (δᵢ·δⱼ) / max(‖δᵢ‖ ‖δⱼ‖, 1e-6), each within [−1, 1], δ = x − b,
    t = S c / (1 + (S − 1) c), or 0 where |1 + (S − 1) c| < 1e-6;  y = t Σ xᵢ / S + (1 − t) b.
    Over whole tensors, or with one c for each row (along the last dimension) if `filter_wise`.

    The paper has one angle for all pairs and does not say how to estimate it for more than two
    sources; the mean over pairs is mergekit's choice. `stock` in the paper's code is this method
    over whole tensors.

    Args:
        x_SN: two or more sources.
        base_N: b, the model that they were finetuned from.
        filter_wise: one angle for each row.
        dtype: of the result.

    Raises:
        ValueError: there is only one source.
    """
    x, base = np.asarray(x_SN, np.float64), np.asarray(base_N, np.float64)
    n_sources = len(x)
    if n_sources < 2:
        raise ValueError(f"model_stock needs at least 2 sources, not {n_sources}")
    axis = -1 if filter_wise else None

    def along(a_N: Array, b_N: Array) -> Array:
        return np.asarray(np.sum(a_N * b_N, axis=axis, keepdims=True))

    delta_SN = x - base
    cosines = []
    for a_N, b_N in combinations(delta_SN, 2):
        norms = np.sqrt(along(a_N, a_N)) * np.sqrt(along(b_N, b_N))
        cosines.append(np.clip(along(a_N, b_N) / np.maximum(norms, STOCK_SHORT), -1, 1))
    c = np.mean(cosines, axis=0)
    divisor = 1 + (n_sources - 1) * c
    singular = np.abs(divisor) < STOCK_SINGULAR
    t = np.where(singular, 0.0, n_sources * c / np.where(singular, 1.0, divisor))
    y_N: Array = (t * np.mean(x, axis=0) + (1 - t) * base).astype(dtype)
    return y_N
