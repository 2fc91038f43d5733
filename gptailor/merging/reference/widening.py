"""WIDEN: differences weighted by how much the length and the direction of each column changed."""

from __future__ import annotations

from typing import Any

import numpy as np

from .averages import Array
from .formulas import computes


def importance(
    significance_SC: Array, ratio: float, calibration: float, mean: float | None = None
) -> Array:
    """The scores of S sources for C columns: softmax over the sources, or the calibration value.

    A source's columns whose significance is above `ratio` times its mean get `calibration`; `mean`
    is the mean of every source if it is known exactly.
    """
    e_SC = np.exp(significance_SC - np.max(significance_SC, axis=0))
    soft_SC = e_SC / np.sum(e_SC, axis=0)
    mean_S1 = np.mean(significance_SC, axis=1, keepdims=True) if mean is None else mean
    score_SC: Array = np.where(significance_SC > ratio * mean_S1, calibration, soft_SC)
    return score_SC


def column_changes(x_RC: Array, base_RC: Array) -> tuple[Array, Array]:
    """How much the length and the direction of each column changed: |‖x‖ − ‖b‖| and 1 − cos θ.

    Equal columns give exactly 0; if one of the two is zero, 1 − cos θ is 1.
    """
    xx_C, bb_C = np.sum(x_RC * x_RC, axis=0), np.sum(base_RC * base_RC, axis=0)
    length_C = np.abs(np.sqrt(xx_C) - np.sqrt(bb_C))
    norms_C = np.sqrt(xx_C * bb_C)
    cosine_C = np.sum(x_RC * base_RC, axis=0) / np.where(norms_C > 0, norms_C, 1.0)
    direction_C = np.where((xx_C == 0) & (bb_C == 0), 0.0, 1.0 - cosine_C)
    return length_C, direction_C


def rank_shares(change_SC: Array) -> Array:
    """Each column's rank within its source, 0 for the smallest, divided by C; ties go by index."""
    order_SC = np.argsort(change_SC, axis=1, kind="stable")
    share_SC: Array = np.argsort(order_SC, axis=1, kind="stable") / change_SC.shape[1]
    return share_SC


@computes("widen")
def widen(
    x_SN: Array,
    base_N: Array,
    *,
    above_average_value_ratio: float = 1.0,
    score_calibration_value: float = 1.0,
    by_rows: bool = False,
    dtype: Any = np.float64,
) -> Array:
    """Merge by weight disentanglement: Yu et al. 2024, Extend Model Merging, arXiv 2408.03092.

    y = b + Σᵢ gᵢ (xᵢ − b). For matrices gᵢ belongs to a column and is the mean of two scores, one
    for the change of the column's length, one for that of its direction. With r the rank of the
    change among the columns of its source, divided by their number, the score is
    exp(rᵢ) / Σⱼ exp(rⱼ), or the calibration value where rᵢ > ratio · mean over the columns of rᵢ.
    For vectors there is one score for each element, with r = |x − b| itself.

    Matrices are (out, in), so a column belongs to an input. The paper's code transposes the token
    embedding first, so that each token has its scores; `by_rows` does the same. All dimensions but
    the last are flattened into one.

    Args:
        x_SN: the sources.
        base_N: b, the model that they were finetuned from.
        above_average_value_ratio: the ratio above.
        score_calibration_value: the calibration value above.
        by_rows: swap the roles of rows and columns.
        dtype: of the result; everything is computed in float64.
    """
    x, base = np.asarray(x_SN, np.float64), np.asarray(base_N, np.float64)
    ratio, calibration = above_average_value_ratio, score_calibration_value
    if base.ndim < 2:
        x_SC, base_C = x.reshape(len(x), -1), base.ravel()
        score_SC = importance(np.abs(x_SC - base_C), ratio, calibration)
        y_C = base_C + np.sum(score_SC * (x_SC - base_C), axis=0)
        return np.asarray(y_C.reshape(base.shape), dtype)
    x_SRC, base_RC = x.reshape(len(x), -1, x.shape[-1]), base.reshape(-1, base.shape[-1])
    if by_rows:
        x_SRC, base_RC = x_SRC.swapaxes(1, 2), base_RC.T
    changes = [column_changes(x_RC, base_RC) for x_RC in x_SRC]
    columns = x_SRC.shape[-1]
    mean = (columns - 1) / 2 / columns  # exact: of an odd number of columns, the middle one has it
    length_SC, direction_SC = (
        importance(rank_shares(np.stack(change)), ratio, calibration, mean)
        for change in zip(*changes, strict=True)
    )
    weight_SC = 0.5 * (length_SC + direction_SC)
    y_RC = base_RC + np.sum(weight_SC[:, None] * (x_SRC - base_RC), axis=0)
    return np.asarray((y_RC.T if by_rows else y_RC).reshape(base.shape), dtype)
