"""RegMean: the matrix whose outputs are closest to those of all sources, found by a linear solve.

It is the only method that is not elementwise, so LAPACK computes it, through torch, in float64. How
sums are split may depend on the number of threads, so results can differ in the last bits of
float64, which shows in float32 about once in a hundred million elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SINGULAR = 1e-6
"""Smaller pivots, relative to the diagonal, are rounding errors of float32 Gram matrices."""


def regmean(
    x_SOI: Sequence[torch.Tensor],
    gram_SII: Sequence[torch.Tensor],
    w_S: Sequence[float],
    reduce_non_diagonal_ratio: float = 0.9,
) -> torch.Tensor:
    """Jin et al. 2022, Dataless Knowledge Fusion by Merging Weights, arXiv 2212.09849.

    yᵀ = (Σᵢ wᵢ Gᵢ)⁻¹ Σᵢ wᵢ Gᵢ xᵢᵀ, after all off-diagonal elements of G are multiplied by the
    ratio. The columns of inputs that are always zero are averaged: any small addition to the
    diagonals of all G gives this, and no output depends on them.

    Args:
        x_SOI: the sources' matrices (outputs, inputs), of any floating-point type.
        gram_SII: the Gram matrix of each source's inputs (inputs, inputs).
        w_S: a weight for each.
        reduce_non_diagonal_ratio: 1 is the least-squares solution.

    Returns:
        (outputs, inputs), float64.

    Raises:
        ValueError: the sum of the Gram matrices is singular, or that of the weights is zero.
    """
    import torch

    total = sum(w_S)
    if total == 0.0:
        raise ValueError("the weights add up to zero")
    n_outputs, n_inputs = x_SOI[0].shape
    left_II = torch.zeros(n_inputs, n_inputs, dtype=torch.float64)
    right_IO = torch.zeros(n_inputs, n_outputs, dtype=torch.float64)
    mean_IO = torch.zeros_like(right_IO)
    for x_OI, gram_II, weight in zip(x_SOI, gram_SII, w_S, strict=True):
        g_II = gram_II.double()  # a copy, as statistics are never float64
        diagonal_I = g_II.diagonal().clone()
        g_II *= weight * reduce_non_diagonal_ratio
        g_II.diagonal().copy_(weight * diagonal_I)
        left_II += g_II
        x_IO = x_OI.T.double()
        right_IO.addmm_(g_II, x_IO)
        mean_IO.add_(x_IO, alpha=weight / total)
    is_dead_I = left_II.diagonal() == 0
    # Rows and columns are scaled to a diagonal of 1, so that pivots can be compared with SINGULAR.
    scale_I = torch.where(is_dead_I, 1.0, left_II.diagonal().abs().rsqrt())
    left_II *= scale_I[:, None] * scale_I
    left_II.diagonal()[is_dead_I] = 1.0
    right_IO *= scale_I[:, None]
    right_IO[is_dead_I] = mean_IO[is_dead_I]
    factors, pivots, info = torch.linalg.lu_factor_ex(left_II)
    if int(info) or float(factors.diagonal().abs().min()) < SINGULAR:
        raise ValueError(
            "the sum of the Gram matrices is singular; use more calibration data or a smaller "
            "reduce_non_diagonal_ratio"
        )
    y_IO: torch.Tensor = torch.linalg.lu_solve(factors, pivots, right_IO) * scale_I[:, None]
    return y_IO.T
