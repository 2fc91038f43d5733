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
    np.testing.assert_array_equal(  # two large ones are to go: the 4 and one of the three 3s
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
    # Two orthogonal differences have nothing in common, so the result is the base.
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


def test_ram_averages_the_sources_that_differ_from_the_base() -> None:
    base = np.zeros(4)
    x = np.array([[1.0, 1.0, 1e-5, 0.0], [0.0, 3.0, 2.0, 1e-6]])
    np.testing.assert_array_equal(merge("ram", x, base), [1.0, 2.0, 2.0, 0.0])


def test_sce_selects_by_variance_and_weights_by_square() -> None:
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
    np.testing.assert_array_equal(shares, [[0, 0.25, 0.5, 0.75]] * 2)  # ties are broken by index
    y = merge("widen", x, base)
    # Both sources have the same ranks, so softmax gives ½ each; ranks above their mean get 1.
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
        ratio = {"reduce_non_diagonal_ratio": 1}
        merge("regmean", w, statistics=np.ones((2, 4, 4)), parameters=ratio)
    with pytest.raises(ValueError, match="Gram matrices"):
        merge("regmean", w, statistics=gram[:, :3])


def test_regmean_averages_columns_of_inputs_that_are_always_zero() -> None:
    rng = np.random.default_rng(15)
    w, inputs = rng.standard_normal((2, 3, 4)), rng.standard_normal((2, 4, 50))
    inputs[:, 2] = 0
    gram = inputs @ inputs.swapaxes(1, 2) / 50
    y = merge("regmean", w, statistics=gram, weights=[3, 1])
    np.testing.assert_allclose(y[:, 2], 0.75 * w[0, :, 2] + 0.25 * w[1, :, 2])
    some = [0, 1, 3]
    rest = merge("regmean", w[:, :, some], statistics=gram[:, some][:, :, some], weights=[3, 1])
    np.testing.assert_allclose(y[:, some], rest)
    nearly = merge("regmean", w, statistics=gram + 1e-12 * np.eye(4), weights=[3, 1])
    np.testing.assert_allclose(y, nearly, rtol=1e-6)


def test_rescaling_starts_at_a_sum_of_1e_7() -> None:
    delta = np.full(10, 1e-7)
    half = np.where(np.arange(10) < 5, delta, 0)
    np.testing.assert_allclose(reference.rescaled(half, delta), 2 * half)
    np.testing.assert_array_equal(reference.rescaled(half / 20, delta), half / 20)
    np.testing.assert_array_equal(reference.rescaled(half / 200, delta / 200), half / 200)


def test_slerp_becomes_linear_for_almost_parallel_sources() -> None:
    for cosine, linear in [(0.999, False), (0.9996, True), (-0.999, False), (-0.9996, True)]:
        x = np.array([[1.0, 0.0], [cosine, np.sqrt(1 - cosine**2)]])
        y = merge("slerp", x, parameters={"t": 0.5})
        assert np.allclose(y, x.mean(axis=0), rtol=1e-12) == linear
        assert np.isclose(np.linalg.norm(y), 1.0, rtol=1e-12) == (not linear)


def test_nuslerp_of_weights_that_add_up_to_zero_is_the_middle() -> None:
    x = np.array([[1.0, 0.0], [0.0, 1.0]])
    np.testing.assert_allclose(merge("nuslerp", x, weights=[0.5, -0.5]), [np.sqrt(0.5)] * 2)
    beyond = merge("nuslerp", x, weights=[0.55, -0.5])  # t = −10: two and a half turns back
    np.testing.assert_allclose(beyond, [np.cos(-5 * np.pi), 0.0], atol=1e-9)


def test_short_sources_have_a_length_but_no_direction() -> None:
    v, _ = family(18, 2, (5,))
    with_zero = merge("karcher", np.stack([v[0], np.zeros(5), v[1]]))
    np.testing.assert_allclose(with_zero, 2 / 3 * merge("karcher", v))
    assert not merge("karcher", np.full((2, 5), 1e-7)).any()


def test_equal_and_opposite_elements_elect_the_positive_sign() -> None:
    x, base = np.array([[1.0, -2.0], [-1.0, 2.0]]), np.array([5.0, 5.0])
    np.testing.assert_array_equal(merge("ties", x + base, base), [6.0, 7.0])
    np.testing.assert_array_equal(merge("sce", x + base, base), [6.0, 7.0])


def test_ties_divides_by_small_weights() -> None:
    x, base = np.array([[1.0, 0.0], [0.0, 1.0]]), np.zeros(2)
    np.testing.assert_allclose(merge("ties", x, base, weights=[1.0, 1e-3]), [1.0, 1.0])
    np.testing.assert_allclose(merge("ties", x, base, weights=[1.0, 1e-9]), [1.0, 1e-9])


def test_sce_divides_by_small_weights() -> None:
    x = np.array([[10.0, 0.0], [0.0, 0.1]])
    np.testing.assert_allclose(merge("sce", x, np.zeros(2)), [10.0, 0.1])


def test_nearswap_of_a_tiny_t() -> None:
    x, base = np.array([[5e-4, 5e-7, 0.0]]), np.zeros(3)
    y = merge("nearswap", x, base, parameters={"t": 1e-4})
    np.testing.assert_allclose(y, [1e-4, 5e-7, 0.0])
    y = merge("nearswap", x, base, parameters={"t": 1e-7})
    np.testing.assert_allclose(y, [1e-7, 5e-8, 0.0])


def test_defaults_are_the_same_by_name_and_by_function() -> None:
    x, base = family(19, 3, (40, 50))
    w, half = [1.0] * 3, {"density": 0.5}
    for elect, method in ((True, "della"), (False, "della_linear")):
        direct = reference.della(x, base, w, elect=elect, normalize=elect, densities=[0.5] * 3)
        np.testing.assert_array_equal(merge(method, x, base, parameters=half), direct)
    for elect, method in ((True, "breadcrumbs_ties"), (False, "breadcrumbs")):
        direct = reference.breadcrumbs(x, base, w, elect=elect, densities=[0.5] * 3)
        np.testing.assert_array_equal(merge(method, x, base, parameters=half), direct)


def test_weights_that_add_up_to_zero_are_not_divided_by() -> None:
    x, base = family(22, 2)
    plain = merge("task_arithmetic", x, base, weights=[1.0, -1.0])
    np.testing.assert_allclose(plain, base + x[0] - x[1])
    same = merge("task_arithmetic", x, base, weights=[1.0, -1.0], parameters={"normalize": 1})
    np.testing.assert_array_equal(same, plain)


def test_multislerp_of_almost_opposite_directions_is_linear() -> None:
    x = np.array([[1.0, 0.0], [-1.0, 4e-8]])  # the mean direction would be 2e-8 long
    np.testing.assert_allclose(merge("multislerp", x), [0.0, 2e-8], atol=1e-15)
    x = np.array([[1.0, 0.0], [-1.0, 4e-6]])
    assert merge("multislerp", x)[1] > 0.1


def widen_by_loops(x: Any, base: Any, ratio: float, calibration: float) -> Any:
    """The formula of `widen` for matrices, one element at a time."""
    n_sources, n_rows, n_columns = x.shape
    gains = np.zeros((n_sources, n_columns))
    for aspect in ("length", "direction"):
        ranks = np.zeros((n_sources, n_columns))
        for s in range(n_sources):
            changes = []
            for c in range(n_columns):
                a, b = x[s, :, c], base[:, c]
                lengths = np.linalg.norm(a), np.linalg.norm(b)
                if aspect == "length":
                    changes.append(abs(lengths[0] - lengths[1]))
                else:
                    changes.append(0.5 * np.sum((a / lengths[0] - b / lengths[1]) ** 2))
            for rank, c in enumerate(sorted(range(n_columns), key=changes.__getitem__)):
                ranks[s, c] = rank / n_columns
        for s in range(n_sources):
            for c in range(n_columns):
                score = np.exp(ranks[s, c]) / sum(np.exp(ranks[i, c]) for i in range(n_sources))
                if ranks[s, c] > ratio * sum(ranks[s]) / n_columns:
                    score = calibration
                gains[s, c] += 0.5 * score
    y = base.copy()
    for s in range(n_sources):
        for r in range(n_rows):
            y[r] += gains[s] * (x[s, r] - base[r])
    return y


@pytest.mark.parametrize("spread", [0.3, 3.0])  # 3: columns that point the other way, too
@pytest.mark.parametrize(("ratio", "calibration"), [(1.0, 1.0), (0.7, 0.4), (1.5, 2.0)])
def test_widen_is_its_formula(spread: float, ratio: float, calibration: float) -> None:
    x, base = family(21, 3, (4, 13))
    x = base + spread / 0.3 * (x - base)
    v = {"above_average_value_ratio": ratio, "score_calibration_value": calibration}
    y = merge("widen", x, base, parameters=v)
    np.testing.assert_allclose(y, widen_by_loops(x, base, ratio, calibration), rtol=1e-9)


def test_widen_of_a_vector_scores_each_element() -> None:
    x, base = np.array([[1.0, 0.0, 0.3, 0.1], [0.25, 0.5, 0.0, 0.25]]), np.zeros(4)
    soft = np.exp(x) / np.exp(x).sum(axis=0)
    above = [[True, False, False, False], [False, True, False, False]]  # of 0.35 and 0.25
    gain = np.where(above, 1.0, soft)
    np.testing.assert_allclose(merge("widen", x, base), (gain * x).sum(axis=0))
