"""Weighted ridge regression against numpy's least squares in float64."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from gptailor.evaluation.repair.solve import (
    EXACT_BELOW,
    RidgeRegression,
    needed_bytes,
    solve_channels,
)

CPU = torch.device("cpu")
System = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def system(num_tokens: int, num_features: int, num_outputs: int, seed: int = 0) -> System:
    """Random features, residuals and weights; features of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    x_NF = torch.randn(num_tokens, num_features, generator=generator)
    x_NF *= torch.logspace(-1, 1, num_features)
    r_NH = torch.randn(num_tokens, num_outputs, generator=generator)
    return x_NF, r_NH, torch.rand(num_tokens, generator=generator) + 0.01


def reference(
    x_NF: torch.Tensor, r_NH: torch.Tensor, w_N: torch.Tensor, ridge: float
) -> np.ndarray:
    """The rows of the ridge stand below those of the tokens."""
    root_N1 = np.sqrt(w_N.double().numpy())[:, None]
    x, r = x_NF.double().numpy() * root_N1, r_NH.double().numpy() * root_N1
    size = x.shape[1]
    rows = np.sqrt(ridge * np.square(x).sum(0).mean()) * np.eye(size)
    above, below = np.concatenate([x, rows]), np.concatenate([r, np.zeros((size, r.shape[1]))])
    return np.asarray(np.linalg.lstsq(above, below, rcond=None)[0])


def solved(
    x_NF: torch.Tensor, r_NH: torch.Tensor, w_N: torch.Tensor, ridge: float, *cuts: int
) -> torch.Tensor:
    """The solution, with the tokens added in parts that end at `cuts`."""
    equations = RidgeRegression(x_NF.shape[1], r_NH.shape[1], len(x_NF), CPU, ridge)
    for begin, end in pairwise([0, *cuts, len(x_NF)]):
        equations.add(x_NF[begin:end], r_NH[begin:end], w_N[begin:end])
    return equations.solve()


def wrong(found: torch.Tensor, expected: np.ndarray) -> float:
    difference = found.double().numpy() - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))


@pytest.mark.parametrize("ridge", [1e-6, 1e-3, EXACT_BELOW, 0.3, 100.0])
@pytest.mark.parametrize(
    ("num_tokens", "num_features", "num_outputs"),
    [(500, 40, 16), (60, 1, 3), (60, 7, 1), (200, 8, 5), (900, 113, 32), (30, 64, 8), (1, 9, 4)],
)
def test_the_solution_is_that_of_least_squares(
    num_tokens: int, num_features: int, num_outputs: int, ridge: float
) -> None:
    """Also with fewer tokens than unknowns, and any number of features in a block."""
    given = system(num_tokens, num_features, num_outputs)
    found = solved(*given, ridge)
    assert found.dtype is torch.float32
    assert found.shape == (num_features, num_outputs)
    assert wrong(found, reference(*given, ridge)) < (1e-5 if ridge < EXACT_BELOW else 3e-4)


@pytest.mark.parametrize("ridge", [1e-4, 0.3])
def test_the_split_into_batches_only_changes_rounding(ridge: float) -> None:
    given = system(300, 50, 8)
    whole = solved(*given, ridge)
    for cuts in ((100, 200), (1, 2, 3, 299), tuple(range(10, 300, 10))):
        assert torch.allclose(solved(*given, ridge, *cuts), whole, rtol=1e-3, atol=1e-5)


def test_tokens_without_weight_do_not_count() -> None:
    x_NF, r_NH, w_N = system(200, 20, 6)
    w_N[50:] = 0.0
    few = solved(x_NF[:50], r_NH[:50], w_N[:50], 0.01)
    assert torch.allclose(solved(x_NF, r_NH, w_N, 0.01), few, rtol=1e-4, atol=1e-6)


def test_without_anything_to_learn_from_nothing_changes() -> None:
    x_NF, r_NH, w_N = system(20, 6, 3)
    assert solved(x_NF, r_NH, torch.zeros_like(w_N), 0.3).eq(0).all()
    assert solved(torch.zeros_like(x_NF), r_NH, w_N, 0.3).eq(0).all()
    assert solved(x_NF, torch.zeros_like(r_NH), w_N, 0.3).eq(0).all()


def test_a_large_ridge_changes_little() -> None:
    given = system(200, 20, 6)
    sizes = [float(solved(*given, ridge).norm()) for ridge in (0.001, 0.3, 10.0, 1e4, 1e6)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 1e-4 * sizes[0]


@pytest.mark.parametrize("ridge", [1e-3, 0.3])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_numbers_that_are_not_finite_are_refused(place: int, value: float, ridge: float) -> None:
    given = system(40, 10, 4)
    given[place][-1] = value
    with pytest.raises(FloatingPointError, match="hidden states are not finite numbers"):
        solved(*given, ridge, 20)


def test_a_singular_system_is_solved_or_refused() -> None:
    """Features that are copies of each other: only the ridge tells how to share what they do."""
    x_NF, r_NH, w_N = system(400, 30, 8)
    x_NF = torch.cat([x_NF, x_NF, 1000.0 * x_NF], 1)
    for ridge in (1e-6, 1e-3, 0.01, 0.3):
        try:
            found = solved(x_NF, r_NH, w_N, ridge)
        except FloatingPointError as error:
            assert "with 90 unknowns can't be solved: use a larger ridge" in str(error)
        else:
            assert wrong(found, reference(x_NF, r_NH, w_N, ridge)) < 1e-2


def test_a_system_that_rounding_makes_unsolvable_is_refused() -> None:
    """A ridge of 0 can't be asked for; here it stands for one that rounding swallows."""
    x_NF, r_NH, w_N = system(400, 40, 8)
    x_NF[:, 20:] = -x_NF[:, :20]
    with pytest.raises(FloatingPointError, match="can't be solved: use a larger ridge"):
        solved(x_NF, r_NH, w_N, 0.0)


def test_small_ridges_are_solved_exactly() -> None:
    """Products of float32 numbers have no more digits in a float64 sum."""
    generator = torch.Generator().manual_seed(0)
    x_NF = torch.randn(1000, 20, generator=generator) @ torch.randn(20, 60, generator=generator)
    r_NH, w_N = torch.randn(1000, 8, generator=generator), torch.ones(1000)
    just_below = EXACT_BELOW * (1 - 1e-6)
    exact = wrong(solved(x_NF, r_NH, w_N, just_below), reference(x_NF, r_NH, w_N, just_below))
    rounded = wrong(solved(x_NF, r_NH, w_N, EXACT_BELOW), reference(x_NF, r_NH, w_N, EXACT_BELOW))
    assert exact < 1e-6 < rounded
    for ridge in (1e-6, 1e-4):
        assert wrong(solved(x_NF, r_NH, w_N, ridge), reference(x_NF, r_NH, w_N, ridge)) < 1e-6


def test_small_ridges_need_twice_the_memory() -> None:
    assert needed_bytes(100, 10, 200, 0.3) == 4 * 100 * 220
    for num_tokens in (20, 200):
        assert needed_bytes(100, 10, num_tokens, 1e-3) == 2 * needed_bytes(100, 10, num_tokens, 0.3)


def test_few_tokens_make_a_small_system() -> None:
    """Hidden size 4,096 and the widths of a 7B: 4,096 tokens need a third of the memory."""
    assert needed_bytes(15104, 4096, 4096, 0.3) < needed_bytes(15104, 4096, 15104, 0.3) / 3


def test_few_and_many_tokens_give_the_same_solution() -> None:
    """Where both forms can be used: tokens without weight change nothing but their number."""
    x_NF, r_NH, w_N = system(60, 50, 8)
    w_N[40:] = 0.0
    for ridge in (1e-4, 0.3):
        many = solved(x_NF, r_NH, w_N, ridge)
        few = solved(x_NF[:40], r_NH[:40], w_N[:40], ridge)
        assert torch.allclose(many, few, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ridge", [1e-6, 0.01, 0.3])
@pytest.mark.parametrize("num_norms", [1, 2, 3])
def test_channels_are_solved_one_by_one(num_norms: int, ridge: float) -> None:
    """The ridge is relative to the mean over all norms and channels."""
    generator = torch.Generator().manual_seed(1)
    x_KNH = torch.randn(num_norms, 70, 12, generator=generator)
    r_NH, w_N = torch.randn(70, 12, generator=generator), torch.rand(70, generator=generator)
    found_KH = solve_channels(x_KNH, r_NH, w_N, ridge)
    assert found_KH.dtype is torch.float32
    mean = float((w_N[:, None].double() * x_KNH.double().pow(2)).sum(1).mean())
    for channel in range(12):
        x_NK = x_KNH[:, :, channel].T.double().numpy()
        root_N1 = np.sqrt(w_N.double().numpy())[:, None]
        above = np.concatenate([x_NK * root_N1, np.sqrt(ridge * mean) * np.eye(num_norms)])
        right = np.concatenate([r_NH[:, channel].numpy() * root_N1[:, 0], np.zeros(num_norms)])
        expected = np.linalg.lstsq(above, right, rcond=None)[0]
        assert found_KH[:, channel].numpy() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_channels_without_states_do_not_change() -> None:
    x_KNH, r_NH, w_N = torch.randn(2, 9, 5), torch.randn(9, 5), torch.ones(9)
    x_KNH[:, :, 3] = 0.0
    assert solve_channels(x_KNH, r_NH, w_N, 0.1)[:, 3].eq(0).all()
    assert solve_channels(torch.zeros(2, 9, 5), r_NH, w_N, 0.1).eq(0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_channels_that_are_not_finite_are_refused(place: int, value: float) -> None:
    given = torch.randn(2, 9, 5), torch.randn(9, 5), torch.ones(9)
    given[place][..., -1] = value
    with pytest.raises(FloatingPointError, match="hidden states are not finite numbers"):
        solve_channels(*given, 0.1)
