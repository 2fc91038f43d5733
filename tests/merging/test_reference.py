"""Properties of the reference methods for any numbers: identities, symmetries, errors."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptailor.merging import reference
from gptailor.merging.reference import merge, selections
from gptailor.merging.registry import METHODS

REQUIRED: dict[str, dict[str, Any]] = {"slerp": {"t": 0.3}, "nearswap": {"t": 0.05}}
N_SOURCES = {
    name: (2 if method.max_sources == 2 else min(3, method.max_sources))
    for name, method in METHODS.items()
}
SPARSE = {
    "ties": {"density": 0.6},
    "dare_linear": {"density": 0.6},
    "dare_ties": {"density": 0.6},
    "della": {"density": 0.6, "epsilon": 0.2},
    "della_linear": {"density": 0.6, "epsilon": 0.2},
    "breadcrumbs": {"density": 0.6, "gamma": 0.1},
    "breadcrumbs_ties": {"density": 0.6, "gamma": 0.1},
    "sce": {"select_topk": 0.6},
}
CALIBRATED = ("fisher", "regmean")


def family(seed: int, n_sources: int, shape: tuple[int, ...] = (6, 9)) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(shape)
    return base + 0.3 * rng.standard_normal((n_sources, *shape)), base


def statistics(method: str, n_sources: int, shape: tuple[int, ...]) -> Any:
    rng = np.random.default_rng(11)
    if method == "fisher":
        return [rng.uniform(0, 2, shape) for _ in range(n_sources)]
    if method == "regmean":
        inputs = rng.standard_normal((n_sources, shape[-1], 40))
        return [x @ x.T / 40 for x in inputs]
    return None


def call(method: str, x: Any, base: Any, *, weights: Any = None, **parameters: Any) -> Any:
    declared = METHODS[method]
    return merge(
        method, x, base if declared.takes_base(parameters) else None,
        weights=weights if declared.weighted else None,
        parameters={**REQUIRED.get(method, {}), **parameters},
        statistics=statistics(method, len(x), x[0].shape), key=77,
    )  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_shape_and_type_are_kept_and_inputs_unchanged(method: str) -> None:
    for shape in [(6, 9), (7,), (1,), (5, 1), (1, 5), (2, 3, 4)]:
        if method == "regmean" and len(shape) != 2:
            continue
        x, base = family(1, N_SOURCES[method], shape)
        before = x.copy(), base.copy()
        with np.errstate(all="raise"):
            y = call(method, x, base, **SPARSE.get(method, {}))
        assert y.shape == shape
        assert y.dtype == np.float64
        assert np.isfinite(y).all()
        np.testing.assert_array_equal(x, before[0])
        np.testing.assert_array_equal(base, before[1])
        again = call(method, x, base, **SPARSE.get(method, {}))
        np.testing.assert_array_equal(y, again)


@pytest.mark.parametrize("method", METHODS)
def test_float32_is_close_to_float64(method: str) -> None:
    x, base = family(2, N_SOURCES[method])
    x, base = x.astype(np.float32), base.astype(np.float32)
    v = {**REQUIRED.get(method, {}), **SPARSE.get(method, {})}
    stats = statistics(method, len(x), x[0].shape)
    used = base if METHODS[method].uses_base else None
    single, double = (
        merge(method, x, used, parameters=v, key=1, statistics=stats, dtype=dtype)
        for dtype in (np.float32, np.float64)
    )
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, double, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in CALIBRATED])
def test_sources_that_are_the_base_give_the_base(method: str) -> None:
    _, base = family(3, 1)
    y = call(method, np.stack([base] * N_SOURCES[method]), base, **SPARSE.get(method, {}))
    np.testing.assert_allclose(y, base, rtol=1e-7)  # multislerp adds its eps to each norm
    if METHODS[method].uses_base:
        np.testing.assert_array_equal(y, base)
    elif METHODS[method].base == "optional":
        sources = np.stack([base] * N_SOURCES[method])
        np.testing.assert_array_equal(call(method, sources, base, task_vectors=1), base)


# Methods that return the source when all sources are equal: electing signs and selecting elements
# changes nothing then.
AGREE = [
    "linear", "average", "slerp", "nuslerp", "multislerp", "karcher", "ties", "della", "sce", "ram",
    "model_stock", "stock", "fisher", "regmean", "arcee_fusion",
]  # fmt: skip


@pytest.mark.parametrize("method", AGREE)
def test_equal_sources_give_that_source(method: str) -> None:
    x, base = family(4, 1)
    if method == "arcee_fusion":
        x = base[None] + 0.25  # a shift: all scores are equal, so all elements are taken
    y = call(method, np.repeat(x, N_SOURCES[method], axis=0), base)
    np.testing.assert_allclose(y, x[0], rtol=1e-7)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(list(METHODS)), st.integers(0, 2**32 - 1))
def test_the_order_of_the_sources_does_not_matter(method: str, seed: int) -> None:
    if METHODS[method].max_sources < 16 or method in CALIBRATED:
        return
    # random masks depend on a source's position
    parameters = {} if METHODS[method].is_random else SPARSE.get(method, {})
    rng = np.random.default_rng(seed)
    x, base = family(seed, 4)
    w = rng.uniform(0.2, 1.0, 4)
    p = rng.permutation(4)
    a = call(method, x, base, weights=w.tolist(), **parameters)
    b = call(method, x[p], base, weights=w[p].tolist(), **parameters)
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


# Doubling everything doubles the result, except for softmax (arcee_fusion, and widen for vectors)
# and for methods with an absolute threshold that matters (nearswap, ram).
SCALING = [m for m in METHODS if m not in ("arcee_fusion", "nearswap", "ram")]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SCALING), st.integers(0, 2**32 - 1), st.sampled_from([0.5, 2.0, -4.0]))
def test_scaling_all_tensors_scales_the_result(method: str, seed: int, c: float) -> None:
    x, base = family(seed, N_SOURCES[method])
    a = call(method, x, base, **SPARSE.get(method, {}))
    b = call(method, c * x, c * base, **SPARSE.get(method, {}))
    np.testing.assert_allclose(b, c * a, rtol=1e-7, atol=1e-7)


# Sums of differences shift with the base; the other methods use the tensors themselves.
MOVING = [
    "linear", "average", "task_arithmetic", "ties", "dare_linear", "dare_ties", "della",
    "della_linear", "breadcrumbs", "breadcrumbs_ties", "sce", "ram", "model_stock", "stock",
    "nearswap",
]  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(MOVING), st.integers(0, 2**32 - 1))
def test_moving_all_tensors_moves_the_result(method: str, seed: int) -> None:
    x, base = family(seed, N_SOURCES[method])
    shift = np.random.default_rng(seed + 1).standard_normal(base.shape)
    a = call(method, x, base, **SPARSE.get(method, {}))
    b = call(method, x + shift, base + shift, **SPARSE.get(method, {}))
    np.testing.assert_allclose(b, a + shift, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", SPARSE)
def test_a_density_of_one_does_not_sparsify(method: str) -> None:
    x, base = family(5, 3)
    w = [0.5, 0.3, 0.4]
    whole = call(method, x, base, weights=w, **{k: 1 for k in SPARSE[method] if k != "epsilon"})
    if method == "sce":
        expected = selections.sce(x, base, select_topk=2.0)
    elif method in ("ties", "dare_ties", "della", "breadcrumbs_ties"):
        normalize = bool(METHODS[method].by_name["normalize"].default)
        expected = reference.ties(x, base, w, normalize=normalize)
    else:
        expected = reference.task_arithmetic(x, base, w)
    np.testing.assert_array_equal(whole, expected)


@pytest.mark.parametrize("method", [m for m in SPARSE if m != "sce"])
def test_rescaling_restores_the_sum_of_magnitudes(method: str) -> None:
    x, base = family(6, 1)
    y = call(method, x, base, weights=[1.0], rescale=1, normalize=0, **SPARSE[method])
    np.testing.assert_allclose(np.abs(y - base).sum(), np.abs(x[0] - base).sum(), rtol=1e-12)
    plain = call(method, x, base, weights=[1.0], rescale=0, normalize=0, **SPARSE[method])
    kept = np.isclose(plain, x[0], rtol=1e-12)
    assert (kept | (plain == base)).all()
    assert 0.3 < kept.mean() < 0.9


def test_rescaling_leaves_tiny_tensors_alone() -> None:
    delta = np.full(10, 1e-9)
    sparse = np.where(np.arange(10) < 5, delta, 0)
    np.testing.assert_array_equal(reference.rescaled(sparse, delta), sparse)
    np.testing.assert_array_equal(reference.rescaled(0 * delta, 1e9 * delta), 0 * delta)


def test_lambda_and_weights_are_linear_where_nothing_is_normalised() -> None:
    x, base = family(7, 3)
    w = np.array([0.2, 0.7, 0.4])
    for method in ("task_arithmetic", "dare_linear", "della_linear", "breadcrumbs"):
        sparse = SPARSE.get(method, {})
        a = call(method, x, base, weights=w, **{"lambda": 1.5}, **sparse)
        b = call(method, x, base, weights=1.5 * w, **sparse)
        np.testing.assert_allclose(a, b)
        np.testing.assert_array_equal(
            call(method, x, base, weights=w, **{"lambda": 0}, **sparse), base
        )


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].uses_base])
def test_nan_is_propagated(method: str) -> None:
    x, base = family(15, N_SOURCES[method])
    spoilt, spoilt_base = x.copy(), base.copy()
    spoilt[0, 2, 3] = spoilt_base[2, 3] = np.nan
    with np.errstate(invalid="ignore"):
        assert np.isnan(call(method, x, spoilt_base)[2, 3])
        assert np.isnan(call(method, spoilt, base)[2, 3])


@pytest.mark.parametrize(
    ("method", "n_sources", "options", "message"),
    [
        ("tise", 1, {}, "no method tise"),
        ("ties", 1, {"parameters": {"dencity": 1}}, "no parameter dencity"),
        ("slerp", 2, {}, "value for t"),
        ("slerp", 3, {"parameters": {"t": 0.5}}, "2 to 2 sources, not 3"),
        ("linear", 0, {}, "1 to 16 sources, not 0"),
        ("model_stock", 1, {"base": True}, "2 to 16 sources"),
        ("ties", 1, {}, "needs a base"),
        ("linear", 1, {"base": True}, "takes no base"),
        ("nuslerp", 2, {"base": True}, "takes no base"),
        ("multislerp", 2, {"parameters": {"task_vectors": 1}}, "needs a base"),
        ("ram", 2, {"base": True, "weights": [1, 1]}, "takes no weights"),
        ("linear", 2, {"weights": [1.0]}, "weights: 1 values for 2"),
        ("ties", 2, {"base": True, "parameters": {"density": [0.5]}}, "density: 1 values for 2"),
        ("fisher", 2, {}, "needs a statistics"),
        ("linear", 2, {"statistics": [1, 1]}, "takes no statistics"),
        ("linear", 2, {"weights": [1.0, -1.0]}, "add up to zero"),
        ("multislerp", 2, {"weights": [1.0, -1.0]}, "add up to zero"),
    ],
)
def test_wrong_arguments(
    method: str, n_sources: int, options: dict[str, Any], message: str
) -> None:
    x, base = family(16, n_sources)
    if options.get("base"):
        options = {**options, "base": base}
    with pytest.raises(ValueError, match=message):
        merge(method, x, **options)


def test_model_stock_needs_two_sources_when_called_directly() -> None:
    x, base = family(17, 1)
    with pytest.raises(ValueError, match="at least 2"):
        reference.model_stock(x, base)


def test_every_formula_names_its_source() -> None:
    functions = [getattr(reference, name) for name in reference.__all__]
    for function in functions:
        if inspect.isfunction(function) and "x_SN" in inspect.signature(function).parameters:
            assert "y = " in (function.__doc__ or "") or "sparse(" in (function.__doc__ or "")
