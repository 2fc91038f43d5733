"""Weighted ridge regression.

Shapes: N tokens, F features, H hidden size, R rows, K columns.
"""

from __future__ import annotations

import torch

EXACT_BELOW = 0.01
"""Ridges below which systems are solved in float64: the condition number is at most about the
size of the system divided by the ridge."""

_BLOCKS = 8


class RidgeRegression:
    """Finds D (F, H) that minimises Σₜ wₜ |rₜ − xₜ D|² + λ · mean(diag Σₜ wₜ xₜᵀ xₜ) |D|².

    With more tokens than features, tokens are streamed through the normal equations
    (XᵀX + μI) D = XᵀR. With fewer, rows are kept and D = Xᵀ (XXᵀ + μI)⁻¹ R, which is the same
    matrix from a system of N instead of F equations.

    Args:
        num_features: F.
        num_outputs: H.
        num_tokens: N, how many will be added.
        device: where they are.
        ridge: λ.
    """

    def __init__(
        self,
        num_features: int,
        num_outputs: int,
        num_tokens: int,
        device: torch.device,
        ridge: float,
    ) -> None:
        self._ridge = ridge
        self._is_dual = num_tokens < num_features
        dtype = _dtype(ridge)
        rows = num_tokens if self._is_dual else num_features
        # X and R, or XᵀX and XᵀR
        self._left = torch.zeros(rows, num_features, dtype=dtype, device=device)
        self._right = torch.zeros(rows, num_outputs, dtype=dtype, device=device)
        self._num_added = 0

    def add(self, x_NF: torch.Tensor, r_NH: torch.Tensor, w_N: torch.Tensor) -> None:
        """Adds tokens; all float32."""
        dtype = self._left.dtype  # of products, too: rounded ones can't be solved exactly
        root_N1 = w_N.to(dtype).sqrt()[:, None]
        x_NF, r_NH = x_NF.to(dtype) * root_N1, r_NH.to(dtype) * root_N1
        if self._is_dual:
            rows = slice(self._num_added, self._num_added + len(x_NF))
            self._left[rows], self._right[rows] = x_NF, r_NH
        else:
            _add_gram(self._left, x_NF.T)
            self._right += x_NF.T @ r_NH
        self._num_added += len(x_NF)

    def solve(self) -> torch.Tensor:
        """D (F, H), float32; uses the system up.

        Raises:
            FloatingPointError: states were not finite, or the system can't be solved.
        """
        num_features = self._left.shape[1]
        gram = self._left
        if self._is_dual:
            num_rows = len(self._left)
            gram = torch.zeros(num_rows, num_rows, dtype=gram.dtype, device=gram.device)
            _add_gram(gram, self._left)
        diagonal = gram.diagonal()
        scale = diagonal.sum() / num_features
        if not bool(torch.isfinite(scale)) or not bool(torch.isfinite(self._right).all()):
            raise FloatingPointError("hidden states are not finite numbers")
        if scale == 0:
            shape = num_features, self._right.shape[1]
            return torch.zeros(shape, dtype=torch.float32, device=gram.device)
        diagonal += self._ridge * scale
        factor, failed = torch.linalg.cholesky_ex(gram)  # reads the lower triangle
        if int(failed):
            raise FloatingPointError(
                f"a repair's equations with {len(factor)} unknowns can't be solved: use a "
                "larger ridge"
            )
        solved: torch.Tensor = torch.cholesky_solve(self._right, factor)
        if self._is_dual:
            solved = self._left.T @ solved
        return solved.to(torch.float32)


def _add_gram(gram_RR: torch.Tensor, x_RK: torch.Tensor) -> None:
    """Adds the lower triangle of x xᵀ."""
    num_rows = len(x_RK)
    step = -(-num_rows // _BLOCKS)
    for begin in range(0, num_rows, step):
        gram_RR[begin:, begin : begin + step] += x_RK[begin:] @ x_RK[begin : begin + step].T


def _dtype(ridge: float) -> torch.dtype:
    return torch.float64 if ridge < EXACT_BELOW else torch.float32


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


def needed_bytes(num_features: int, num_outputs: int, num_tokens: int, ridge: float) -> int:
    """Memory of a `RidgeRegression`, its factor and its solution."""
    if num_tokens < num_features:
        values = num_tokens * (num_features + 2 * num_tokens + 2 * num_outputs)
        values += num_features * num_outputs
    else:
        values = 2 * num_features * (num_features + num_outputs)
    return _dtype(ridge).itemsize * values
