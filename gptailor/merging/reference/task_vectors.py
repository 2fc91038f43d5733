"""Sums of differences from the base: task_arithmetic, ties, dare, della, breadcrumbs.

All are y = b + λ Σᵢ wᵢ sparse(xᵢ − b), the sum divided by Σᵢ wᵢ if `normalize`. They differ in what
`sparse` keeps, and in whether the sources first elect a sign for each element.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .averages import TINY, Array, sum_of, weighted_sum
from .formulas import computes
from .sparsifiers import cut_outliers, drop, drop_by_magnitude, rescaled, trim

Sparsifier = Callable[[Array, int], Array]
"""Takes a difference and its source's index."""

_SPARSE = {"lam": "lambda", "densities": "density"}


def _add(
    delta_SN: Array, base_N: Array, w_S: Array, *, lam: float, normalize: bool, dtype: Any
) -> Array:
    delta_N = weighted_sum(delta_SN, w_S)
    if normalize and abs(sum_of(w_S)) >= TINY:
        delta_N = delta_N / sum_of(w_S)
    y_N: Array = base_N + dtype(lam) * delta_N
    return y_N


def _add_elected(
    delta_SN: Array, base_N: Array, w_S: Array, *, lam: float, normalize: bool, dtype: Any
) -> Array:
    """Adds, for each element, only the wᵢ δᵢ that have the sign of their sum; 0 counts as plus."""
    weighted_SN = [w * delta_N for w, delta_N in zip(w_S, delta_SN, strict=True)]
    total = np.zeros_like(base_N)
    for delta_N in weighted_SN:
        total = total + delta_N
    sign_N = np.where(total >= 0, dtype(1), dtype(-1))
    sum_N, divisor_N = np.zeros_like(base_N), np.zeros_like(base_N)
    for delta_N, weight in zip(weighted_SN, w_S, strict=True):
        agrees_N = np.sign(delta_N) == sign_N
        sum_N = sum_N + np.where(agrees_N, delta_N, dtype(0))
        divisor_N = divisor_N + np.where(agrees_N, weight, dtype(0))
    if normalize:
        sum_N = sum_N / np.where(np.abs(divisor_N) < TINY, dtype(1), divisor_N)
    y_N: Array = base_N + dtype(lam) * np.where(np.isnan(total), total, sum_N)
    return y_N


def _merge(
    x_SN: Array,
    base_N: Array,
    w_S: Sequence[float],
    sparsify: Sparsifier,
    *,
    elect: bool,
    lam: float,
    normalize: bool,
    rescale: bool,
    dtype: Any,
) -> Array:
    w, base, x = np.asarray(w_S, dtype), np.asarray(base_N, dtype), np.asarray(x_SN, dtype)
    deltas = []
    for i, x_N in enumerate(x):
        delta_N = x_N - base
        sparse_N = sparsify(delta_N, i)
        everything = sparse_N is delta_N
        deltas.append(rescaled(sparse_N, delta_N) if rescale and not everything else sparse_N)
    add = _add_elected if elect else _add
    return add(np.stack(deltas), base, w, lam=lam, normalize=normalize, dtype=dtype)


def _each(values: Sequence[float] | None, default: float, n_sources: int) -> Sequence[float]:
    return [default] * n_sources if values is None else values


@computes("task_arithmetic", lam="lambda")
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
        dtype: the type to compute in.
    """
    w, base = np.asarray(w_S, dtype), np.asarray(base_N, dtype)
    return _add(np.asarray(x_SN, dtype) - base, base, w, lam=lam, normalize=normalize, dtype=dtype)


@computes("ties", **_SPARSE)
def ties(
    x_SN: Array,
    base_N: Array,
    w_S: Sequence[float],
    *,
    densities: Sequence[float] | None = None,
    lam: float = 1.0,
    normalize: bool = True,
    rescale: bool = False,
    dtype: Any = np.float64,
) -> Array:
    """Trim, elect signs, merge: Yadav et al. 2023, TIES-Merging, arXiv 2306.01708.

    δᵢ = wᵢ · trim(xᵢ − b),  s = +1 where Σᵢ δᵢ ≥ 0 and −1 elsewhere,  A = {i : sign(δᵢ) = s},
    y = b + λ Σ_{i ∈ A} δᵢ, the sum divided by Σ_{i ∈ A} wᵢ if `normalize` (unless that is zero).

    Args:
        x_SN: the sources.
        base_N: b, the model that they were finetuned from.
        w_S: one weight for each.
        densities: the fraction of each difference to keep, one for each source; None keeps all.
        lam: λ.
        normalize: divide by the sum of the weights used.
        rescale: restore each trimmed difference's sum of magnitudes.
        dtype: the type to compute in.
    """
    density = _each(densities, 1.0, len(x_SN))
    return _merge(
        x_SN, base_N, w_S, lambda delta_N, i: trim(delta_N, density[i]),
        elect=True, lam=lam, normalize=normalize, rescale=rescale, dtype=dtype,
    )  # fmt: skip


@computes("dare_linear", **_SPARSE, elect=False)
@computes("dare_ties", **_SPARSE, elect=True)
def dare(
    x_SN: Array,
    base_N: Array,
    w_S: Sequence[float],
    *,
    elect: bool,
    densities: Sequence[float] | None = None,
    lam: float = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    seed: int = 0,
    key: int = 0,
    dtype: Any = np.float64,
) -> Array:
    """Drop at random, rescale: Yu et al. 2023, Language Models are Super Mario, arXiv 2311.03099.

    sparse(δ) keeps each element with probability ρ. The paper divides by ρ; `rescale` multiplies by
    Σ|δ| / Σ|sparse(δ)| instead, as mergekit does.

    Args:
        x_SN: the sources.
        base_N: b, the model that they were finetuned from.
        w_S: one weight for each.
        elect: elect signs as `ties` does (dare_ties), or just add up (dare_linear).
        densities: ρ, one for each source; None keeps all.
        lam: λ.
        normalize: divide by the sum of the weights (of those used).
        rescale: restore each sparse difference's sum of magnitudes.
        seed, key: of the random mask; the key is the tensor's.
        dtype: the type to compute in.
    """
    density = _each(densities, 1.0, len(x_SN))
    return _merge(
        x_SN, base_N, w_S,
        lambda delta_N, i: drop(delta_N, density[i], seed=seed, key=key, source=i),
        elect=elect, lam=lam, normalize=normalize, rescale=rescale, dtype=dtype,
    )  # fmt: skip


@computes("della_linear", **_SPARSE, epsilons="epsilon", elect=False)
@computes("della", **_SPARSE, epsilons="epsilon", elect=True)
def della(
    x_SN: Array,
    base_N: Array,
    w_S: Sequence[float],
    *,
    elect: bool,
    normalize: bool,
    densities: Sequence[float] | None = None,
    epsilons: Sequence[float] | None = None,
    lam: float = 1.0,
    rescale: bool = True,
    seed: int = 0,
    key: int = 0,
    dtype: Any = np.float64,
) -> Array:
    """Drop at random, large ones less often: Deep et al. 2024, DELLA-Merging, arXiv 2406.11617.

    sparse(δ) keeps an element of rank r in its row of n with probability
    (ρ − ε) + 2 ε r / (n − 1); rank 0 is the smallest magnitude, equal ones count by index.

    Args:
        x_SN: the sources.
        base_N: b, the model that they were finetuned from.
        w_S: one weight for each.
        elect: elect signs as `ties` does (della), or just add up (della_linear).
        normalize: divide by the sum of the weights (of those used).
        densities: ρ, one for each source; None keeps all.
        epsilons: ε, one for each source; None is 0.15.
        lam: λ.
        rescale: restore each sparse difference's sum of magnitudes.
        seed, key: of the random mask; the key is the tensor's.
        dtype: the type to compute in.

    Raises:
        ValueError: ρ − ε or ρ + ε is outside (0, 1).
    """
    density, epsilon = _each(densities, 1.0, len(x_SN)), _each(epsilons, 0.15, len(x_SN))
    return _merge(
        x_SN, base_N, w_S,
        lambda delta_N, i: drop_by_magnitude(
            delta_N, density[i], epsilon[i], seed=seed, key=key, source=i
        ),
        elect=elect, lam=lam, normalize=normalize, rescale=rescale, dtype=dtype,
    )  # fmt: skip


@computes("breadcrumbs", **_SPARSE, gammas="gamma", elect=False)
@computes("breadcrumbs_ties", **_SPARSE, gammas="gamma", elect=True)
def breadcrumbs(
    x_SN: Array,
    base_N: Array,
    w_S: Sequence[float],
    *,
    elect: bool,
    densities: Sequence[float] | None = None,
    gammas: Sequence[float] | None = None,
    lam: float = 1.0,
    normalize: bool = False,
    rescale: bool = False,
    dtype: Any = np.float64,
) -> Array:
    """Drop large and small values: Davari & Belilovsky 2023, Breadcrumbs, arXiv 2312.06795.

    sparse(δ) drops the int(γ n) largest magnitudes and keeps the int(ρ n) largest of the rest.

    Args:
        x_SN: the sources.
        base_N: b, the model that they were finetuned from.
        w_S: one weight for each.
        elect: elect signs as `ties` does (breadcrumbs_ties), or just add up (breadcrumbs).
        densities: ρ, one for each source; None keeps all.
        gammas: γ, one for each source; None is 0.01.
        lam: λ.
        normalize: divide by the sum of the weights (of those used).
        rescale: restore each sparse difference's sum of magnitudes.
        dtype: the type to compute in.
    """
    density, gamma = _each(densities, 1.0, len(x_SN)), _each(gammas, 0.01, len(x_SN))
    return _merge(
        x_SN, base_N, w_S, lambda delta_N, i: cut_outliers(delta_N, density[i], gamma[i]),
        elect=elect, lam=lam, normalize=normalize, rescale=rescale, dtype=dtype,
    )  # fmt: skip
