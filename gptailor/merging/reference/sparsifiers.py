"""Sparsifiers, which keep part of a difference by magnitude or at random, and the rescaling after.

All take a difference delta_N of any shape and return one of the same shape and type. A density of
1 or more keeps everything and rescales nothing.
"""

from __future__ import annotations

import numpy as np

from .averages import Array
from .philox import below, words

NOTHING = 1e-7
"""A sum of magnitudes below this is not rescaled."""


def kept(density: float, n_elements: int) -> int:
    """Return how many elements ties keeps: max(1, int(density · n))."""
    return min(n_elements, max(1, int(density * n_elements)))


def trim(delta_N: Array, density: float) -> Array:
    """Set all but the largest magnitudes to zero.

    `kept(density, N)` elements stay, and all others with the magnitude of the smallest of them.
    """
    k = kept(density, delta_N.size)
    if k >= delta_N.size:
        return delta_N
    threshold = np.sort(np.abs(delta_N).ravel())[-k]
    return np.where(np.abs(delta_N) < threshold, delta_N.dtype.type(0), delta_N)


def cut_outliers(delta_N: Array, density: float, gamma: float) -> Array:
    """Set the largest and the smallest magnitudes to zero, as breadcrumbs does.

    int(density · N) elements stay. The int(γ · N) larger ones are dropped, or as many as there are
    if fewer. Elements equal in magnitude to the smallest or the largest that stay are kept, too.
    """
    if density >= 1:
        return delta_N
    n = delta_N.size
    n_kept = int(density * n)
    if n_kept == 0:
        return np.zeros_like(delta_N)
    magnitude_N = np.abs(delta_N)
    n_small = max(0, n - n_kept - int(gamma * n))
    ascending = np.sort(magnitude_N.ravel())
    low, high = ascending[n_small], ascending[n_small + n_kept - 1]
    stays_N = (low <= magnitude_N) & (magnitude_N <= high) | np.isnan(magnitude_N)
    return np.where(stays_N, delta_N, delta_N.dtype.type(0))


def drop(delta_N: Array, density: float, *, seed: int, key: int, source: int) -> Array:
    """Keep each element with probability `density`, as dare does before rescaling."""
    if density >= 1:
        return delta_N
    u_N = words(seed, key, source, delta_N.size).reshape(delta_N.shape)
    return np.where(below(u_N, density), delta_N, delta_N.dtype.type(0))


def magnitude_ranks(delta_N: Array) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Return each element's rank in its row, 0 for the smallest magnitude; ties go by index.

    A row is the last dimension; a one-dimensional tensor is one row.
    """
    order_N = np.argsort(np.abs(delta_N), axis=-1, kind="stable")
    return np.argsort(order_N, axis=-1, kind="stable")


def keep_probabilities(delta_N: Array, density: float, epsilon: float) -> Array:
    """della's probability of each element: (ρ − ε) + 2 ε r / (n − 1), r its rank in a row of n.

    For a row of one element it is ρ. float64.

    Raises:
        ValueError: ρ − ε or ρ + ε is outside (0, 1).
    """
    if not (density - epsilon > 0 and density + epsilon < 1):
        raise ValueError(
            f"density {density:g} and epsilon {epsilon:g}: density - epsilon and density + epsilon "
            "must lie between 0 and 1; choose a smaller epsilon"
        )
    n = delta_N.shape[-1]
    rank_N = magnitude_ranks(delta_N).astype(np.float64)
    share_N = rank_N / (n - 1) if n > 1 else np.full(delta_N.shape, 0.5)
    p_N: Array = (density - epsilon) + share_N * 2 * epsilon
    return p_N


def drop_by_magnitude(
    delta_N: Array, density: float, epsilon: float, *, seed: int, key: int, source: int
) -> Array:
    """Keep each element with a probability that grows with its rank, as della does first.

    A density of 0 drops everything.

    Raises:
        ValueError: as `keep_probabilities` does.
    """
    if density >= 1:
        return delta_N
    if density <= 0:
        return np.zeros_like(delta_N)
    row_N = np.atleast_1d(delta_N)
    p_N = keep_probabilities(row_N, density, epsilon).reshape(delta_N.shape)
    u_N = words(seed, key, source, delta_N.size).reshape(delta_N.shape)
    return np.where(below(u_N, p_N), delta_N, delta_N.dtype.type(0))


def rescaled(sparse_N: Array, delta_N: Array) -> Array:
    """Return sparse_N times Σ|δ| / Σ|sparse|, which restores the sum of magnitudes.

    Unchanged if either sum is below 1e-7. The sums are float64; the factor is rounded to the type
    of the differences.
    """
    before = float(np.sum(np.abs(delta_N), dtype=np.float64))
    after = float(np.sum(np.abs(sparse_N), dtype=np.float64))
    if before < NOTHING or after < NOTHING:
        return sparse_N
    scaled_N: Array = sparse_N * delta_N.dtype.type(before / after)
    return scaled_N
