"""Weighted ridge regression with the tokens streamed through its normal equations.

Shapes: N tokens, F features, H hidden size.
"""

from __future__ import annotations

import torch

EXACT_BELOW = 0.01
"""Ridges below which systems are solved in float64: the condition number is at most about the
number of features divided by the ridge."""

_BLOCKS = 8


class NormalEquations:
    """Σₜ wₜ xₜ xₜᵀ and Σₜ wₜ xₜ rₜᵀ of features x and residuals r.

    Args:
        num_features: F.
        num_outputs: H.
        device: where they are.
        ridge: λ, relative to the mean of the diagonal.
    """

    def __init__(
        self, num_features: int, num_outputs: int, device: torch.device, ridge: float
    ) -> None:
        self._ridge = ridge
        dtype = torch.float64 if ridge < EXACT_BELOW else torch.float32
        self._gram_FF = torch.zeros(num_features, num_features, dtype=dtype, device=device)
        self._right_FH = torch.zeros(num_features, num_outputs, dtype=dtype, device=device)

    def add(self, x_NF: torch.Tensor, r_NH: torch.Tensor, w_N: torch.Tensor) -> None:
        """Adds tokens; all float32."""
        dtype = self._gram_FF.dtype  # of products, too: rounded ones can't be solved exactly
        root_N1 = w_N.to(dtype).sqrt()[:, None]
        x_NF, r_NH = x_NF.to(dtype) * root_N1, r_NH.to(dtype) * root_N1
        num_features = x_NF.shape[1]
        step = -(-num_features // _BLOCKS)
        for begin in range(0, num_features, step):  # the lower triangle is enough
            block_NS = x_NF[:, begin : begin + step]
            self._gram_FF[begin:, begin : begin + step] += x_NF[:, begin:].T @ block_NS
        self._right_FH += x_NF.T @ r_NH

    def solve(self) -> torch.Tensor:
        """D (F, H), float32, that minimises Σₜ wₜ |rₜ − xₜ D|² + λ · mean(diag G) |D|².

        Raises:
            FloatingPointError: states were not finite, or the system can't be solved.
        """
        diagonal_F = self._gram_FF.diagonal()
        scale = diagonal_F.mean()
        if not bool(torch.isfinite(scale)) or not bool(torch.isfinite(self._right_FH).all()):
            raise FloatingPointError("hidden states are not finite numbers")
        if scale == 0:
            return torch.zeros_like(self._right_FH, dtype=torch.float32)
        diagonal_F += self._ridge * scale
        factor_FF, failed = torch.linalg.cholesky_ex(self._gram_FF)  # reads the lower triangle
        if int(failed):
            raise FloatingPointError(
                f"a repair's equations with {len(factor_FF)} unknowns can't be solved: use a "
                "larger ridge"
            )
        solved_FH: torch.Tensor = torch.cholesky_solve(self._right_FH, factor_FF)
        return solved_FH.to(torch.float32)


def solve_channels(
    x_KNH: torch.Tensor, r_NH: torch.Tensor, w_N: torch.Tensor, ridge: float
) -> torch.Tensor:
    """Factors (K, H), each channel for itself: minimises Σₜ wₜ |rₜ − Σₖ xₖₜ dₖ|² + ridge · … |d|².

    Raises:
        FloatingPointError: states are not finite.
    """
    x_KNH, r_NH = x_KNH.double(), r_NH.double()
    weighted_KNH = x_KNH * w_N.double()[:, None]
    gram_HKK = torch.einsum("inh,jnh->hij", weighted_KNH, x_KNH)
    right_HK1 = torch.einsum("inh,nh->hi", weighted_KNH, r_NH)[..., None]
    diagonal_HK = gram_HKK.diagonal(dim1=1, dim2=2)
    scale = diagonal_HK.mean()
    if not bool(torch.isfinite(scale)) or not bool(torch.isfinite(right_HK1).all()):
        raise FloatingPointError("hidden states are not finite numbers")
    if scale == 0:
        return torch.zeros(x_KNH.shape[0], x_KNH.shape[2], device=x_KNH.device)
    diagonal_HK += ridge * scale
    solved_KH: torch.Tensor = torch.linalg.solve(gram_HKK, right_HK1)[..., 0].T
    return solved_KH.float().contiguous()


def needed_bytes(num_features: int, num_outputs: int, ridge: float) -> int:
    """Memory of a system and its factor."""
    width = 8 if ridge < EXACT_BELOW else 4
    return width * num_features * (2 * num_features + 2 * num_outputs)
