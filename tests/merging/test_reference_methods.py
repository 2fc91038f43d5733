"""Each reference method on cases small enough to work out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gptailor.merging import reference
from gptailor.merging.reference import merge, widening


def family(seed: int, n_sources: int, shape: tuple[int, ...] = (6, 9)) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(shape)
    return base + 0.3 * rng.standard_normal((n_sources, *shape)), base


@pytest.mark.parametrize(
    ("density", "gamma", "kept"),
    [
        (0.5, 0.01, [3, 4, 5]),  # int(gamma n) = 0: nothing large is dropped
        (0.5, 0.2, [2, 3, 4]),
        (0.9, 0.5, [0, 1, 2, 3, 4]),  # density wins over gamma
        (0.1, 0.2, []),
        (0.99, 0.2, [0, 1, 2, 3, 4]),
    ],
)
def test_breadcrumbs_keeps_the_middle(density: float, gamma: float, kept: list[int]) -> None:
    delta = np.array([0.1, -0.2, 0.3, -0.4, 0.5, -0.6])
    y = reference.cut_outliers(delta, density, gamma)
    expected = np.where(np.isin(np.arange(6), kept), delta, 0)
    np.testing.assert_array_equal(y, expected)
    reversed_too = reference.cut_outliers(delta[::-1], density, gamma)
    np.testing.assert_array_equal(reversed_too, expected[::-1])


def test_equal_magnitudes_at_a_threshold_are_all_kept() -> None:
    delta = np.array([1.0, -2, 2, 2, -3, 3, 3, 4])
    np.testing.assert_array_equal(
        reference.trim(delta, 0.6), np.where(np.abs(delta) >= 3, delta, 0)
    )
    np.testing.assert_array_equal(
        reference.trim(delta, 0.63), np.where(np.abs(delta) >= 2, delta, 0)
    )
    np.testing.assert_array_equal(  # 2 large ones go, which are 4 and one of the three 3s
        reference.cut_outliers(delta, 0.25, 0.25), np.where(np.abs(delta) == 3, delta, 0)
    )


def test_slerp_and_nuslerp_agree_on_a_circle() -> None:
    angles = np.array([0.3, 1.7])
    x = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    for t in (0.0, 0.25, 1.0):
        at = 0.3 + t * 1.4
        on_circle = [np.cos(at), np.sin(at)]
        np.testing.assert_allclose(merge("slerp", x, parameters={"t": t}), on_circle)
        np.testing.assert_allclose(merge("nuslerp", x, weights=[1 - t, t]), on_circle)
    middle = [np.cos(1.0), np.sin(1.0)]
    np.testing.assert_allclose(merge("multislerp", x, weights=[1, 1]), middle, rtol=1e-7)
    np.testing.assert_allclose(merge("karcher", x), middle)


def test_the_karcher_mean_is_where_the_logarithms_cancel_out() -> None:
    x, _ = family(8, 4, (30,))
    u = merge("karcher", x, parameters={"max_iter": 100, "tol": 1e-13})
    np.testing.assert_allclose(np.linalg.norm(u), np.mean(np.linalg.norm(x, axis=1)))
    u /= np.linalg.norm(u)
    units = x / np.linalg.norm(x, axis=1, keepdims=True)
    theta = np.arccos(units @ u)
    logs = (theta / np.sin(theta))[:, None] * (units - np.outer(units @ u, u))
    assert np.abs(logs.sum(axis=0)).max() < 1e-9


def test_rows_and_columns_of_nuslerp() -> None:
    x, base = family(9, 2, (4, 5))
    w = [0.3, 0.6]
    rows = merge("nuslerp", x, weights=w, parameters={"nuslerp_flatten": 0})
    for r in range(4):
        np.testing.assert_allclose(rows[r], merge("nuslerp", x[:, r], weights=w))
    both = {"nuslerp_flatten": 0, "nuslerp_row_wise": 1, "task_vectors": 1}
    columns = merge("nuslerp", x, base, weights=w, parameters=both)
    for c in range(5):
        moved = base[:, c] + merge("nuslerp", x[:, :, c] - base[:, c], weights=w)
        np.testing.assert_allclose(columns[:, c], moved)


def test_model_stock_by_filter_is_model_stock_of_each_row() -> None:
    x, base = family(10, 3, (4, 5))
    y = merge("model_stock", x, base, parameters={"filter_wise": 1})
    for r in range(4):
        np.testing.assert_allclose(y[r], merge("model_stock", x[:, r], base[r]))
    # Two orthogonal differences say nothing about each other: the base stays.
    apart = np.stack([base, base])
    apart[0, 0, 0] += 1
    apart[1, 0, 1] += 1
    np.testing.assert_allclose(merge("model_stock", apart, base), base)


def test_antiparallel_sources_give_finite_results() -> None:
    v, _ = family(11, 1)
    v, zero = v[0], np.zeros((6, 9))
    for scale in (1.0, 3.0, 1 / 3):
        x = np.stack([v, -scale * v])
        line = 0.5 * (x[0] + x[1])
        np.testing.assert_allclose(merge("slerp", x, parameters={"t": 0.5}), line, atol=1e-12)
        for flatten in (0, 1):
            y = merge("nuslerp", x, weights=[1, 1], parameters={"nuslerp_flatten": flatten})
            np.testing.assert_allclose(y, line, atol=1e-12)
        np.testing.assert_allclose(merge("multislerp", x, weights=[1, 1]), line, atol=1e-12)
        along = merge("karcher", x)
        np.testing.assert_allclose(along, (1 + scale) / 2 * v)
        np.testing.assert_array_equal(merge("model_stock", x, zero), zero)
    with pytest.raises(ValueError, match="cancel out"):
        merge("multislerp", np.stack([v, v, -2 * v]), weights=[1, 1, 2])


def test_nearswap_takes_near_elements_and_shares_far_ones() -> None:
    base = np.array([0.0, 0.0, 0.0, 0.0])
    x = np.array([[0.05, -0.1, 0.2, 1e9]])
    y = merge("nearswap", x, base, parameters={"t": 0.1})
    np.testing.assert_allclose(y, [0.05, -0.1, 0.1, 0.1])


def test_ram_averages_those_that_differ() -> None:
    base = np.zeros(4)
    x = np.array([[1.0, 1.0, 1e-5, 0.0], [0.0, 3.0, 2.0, 1e-6]])
    np.testing.assert_array_equal(merge("ram", x, base), [1.0, 2.0, 2.0, 0.0])


def test_sce_selects_what_varies_and_weights_by_square() -> None:
    base = np.zeros(4)
    x = np.array([[4.0, 1, 2, 0], [2.0, 1, -2, 0]])  # variances 1, 0, 4, 0
    np.testing.assert_array_equal(
        merge("sce", x, base, parameters={"select_topk": 0.5}), [0, 0, 2, 0]
    )
    y = merge("sce", x, base, parameters={"select_topk": 0.99})
    np.testing.assert_array_equal(y, [0, 0, 2, 0])  # int(0.99 · 2) is 1
    whole = merge("sce", x, base)
    first, second = 21 / 30, 9 / 30
    np.testing.assert_allclose(whole, [4 * first + 2 * second, 1, 2, 0])
    assert not merge("sce", x, base, parameters={"select_topk": 0}).any()


def test_equal_variances_are_all_selected() -> None:
    x = np.array([[1.0, -1, 1, 3], [-1.0, 1, -1, 0]])
    y = merge("sce", x, np.zeros(4), parameters={"select_topk": 0.5})
    assert (y != 0).tolist() == [True, True, True, True]


def test_arcee_fusion_takes_what_stands_out() -> None:
    rng = np.random.default_rng(12)
    base = rng.standard_normal((30, 20))
    x = base + 0.1 * rng.standard_normal((30, 20))
    x[4, 7] += 3.0
    y = merge("arcee_fusion", x[None], base)
    taken = y != base
    assert taken[4, 7]
    assert 0.01 < taken.mean() < 0.25
    np.testing.assert_allclose(y[taken], x[taken])
    np.testing.assert_array_equal(y[~taken], base[~taken])


def test_widen_weights_columns_by_their_change() -> None:
    base = np.ones((2, 4))
    x = np.stack([base, base])
    x[0] += np.array([[0.0, 0.1, 0.2, 0.3], [0.0, 0.0, 0.0, 0.0]])
    shares = widening.rank_shares(np.array([[0.0, 0.1, 0.2, 0.3], [0.0, 0.0, 0.0, 0.0]]))
    np.testing.assert_array_equal(shares, [[0, 0.25, 0.5, 0.75]] * 2)  # equal ones by index
    y = merge("widen", x, base)
    # Both sources have the same ranks: softmax gives ½ each, ranks above their mean get 1.
    np.testing.assert_allclose(y[0], [1.0, 1.05, 1.2, 1.3])
    np.testing.assert_array_equal(y[1], base[1])
    twice = merge("widen", x, base, parameters={"score_calibration_value": 2.0})
    np.testing.assert_allclose(twice[0], [1.0, 1.05, 1.4, 1.6])
    none = merge("widen", x, base, parameters={"above_average_value_ratio": 9.0})
    np.testing.assert_allclose(none[0], [1.0, 1.05, 1.1, 1.15])


def test_widen_by_rows_is_widen_of_the_transpose() -> None:
    x, base = family(13, 3)
    a = merge("widen", x, base, parameters={"by_rows": 1})
    b = merge("widen", x.swapaxes(1, 2), base.T).T
    np.testing.assert_allclose(a, b)
    assert np.abs(a - merge("widen", x, base)).max() > 1e-3


def test_columns_of_zeros_have_not_changed() -> None:
    base = np.array([[3.0, 0.0, 0.0], [4.0, 0.0, 0.0]])
    x = np.array([[3.0, 0.0, 1.0], [4.0, 0.0, 0.0]])
    length, direction = widening.column_changes(x, base)
    np.testing.assert_array_equal(length, [0, 0, 1])
    np.testing.assert_array_equal(direction, [0, 0, 1])


def test_fisher_weights_by_information() -> None:
    x = np.array([[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]])
    f = np.array([[3.0, 0.0, 0.0], [1.0, 0.0, 1.0]])
    y = merge("fisher", x, statistics=f)
    np.testing.assert_allclose(y, [1.5, 2.0, 3.0], rtol=1e-5)
    weighted = merge("fisher", x, statistics=f, weights=[1.0, 3.0])
    np.testing.assert_allclose(weighted[0], 2.0)
    for bad, message in [(f[:, :2], "shape"), (-f, "negative")]:
        with pytest.raises(ValueError, match=message):
            merge("fisher", x, statistics=bad)
    with pytest.raises(ValueError, match="adds up to zero"):
        merge("fisher", x, statistics=np.ones((2, 3)), weights=[1.0, -1.0])


def test_regmean_is_the_least_squares_solution() -> None:
    rng = np.random.default_rng(14)
    w, inputs = rng.standard_normal((2, 3, 4)), rng.standard_normal((2, 4, 50))
    gram = inputs @ inputs.swapaxes(1, 2) / 50
    y = merge("regmean", w, statistics=gram, parameters={"reduce_non_diagonal_ratio": 1})
    stacked = np.concatenate(list(inputs), axis=1)
    outputs = np.concatenate([w[0] @ inputs[0], w[1] @ inputs[1]], axis=1)
    exact = np.linalg.lstsq(stacked.T, outputs.T, rcond=None)[0].T
    np.testing.assert_allclose(y, exact, rtol=1e-9)
    diagonal = merge("regmean", w, statistics=gram, parameters={"reduce_non_diagonal_ratio": 0})
    squares = np.stack([np.diag(g) for g in gram])[:, None]
    np.testing.assert_allclose(diagonal, (squares * w).sum(axis=0) / squares.sum(axis=0))
    with pytest.raises(ValueError, match="singular"):
        merge("regmean", w, statistics=np.zeros((2, 4, 4)))
    with pytest.raises(ValueError, match="Gram matrices"):
        merge("regmean", w, statistics=gram[:, :3])
