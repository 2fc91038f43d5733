"""Every method of the engine against the reference, by name: sizes, types, rows, threads, slices.

The elementwise methods take the same steps as the float32 reference and give its bits. Those that
look at whole tensors first agree to rounding; where they choose elements, the choice may differ
where two keys are within rounding of each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from gptailor import _C
from gptailor.merging import reference
from gptailor.merging.registry import METHODS, Method
from tests.native.native_tools import DTYPES, EPS, as_float, rounded, run, tensor, values

# method, sources, base?, parameter sets
CASES: list[tuple[str, int, bool, dict[str, Any]]] = [
    ("linear", 3, False, {"normalize": 1}),
    ("linear", 2, False, {"normalize": 0}),
    ("slerp", 2, False, {"t": 0.3}),
    ("nuslerp", 2, False, {}),
    ("nuslerp", 2, True, {"task_vectors": 1}),
    ("nuslerp", 2, False, {"nuslerp_flatten": 0}),
    ("nuslerp", 2, True, {"nuslerp_flatten": 0, "task_vectors": 1}),
    ("nuslerp", 2, False, {"nuslerp_flatten": 0, "nuslerp_row_wise": 1}),
    ("multislerp", 3, False, {}),
    ("multislerp", 4, True, {"task_vectors": 1, "normalize_weights": 0}),
    ("karcher", 3, False, {}),
    ("karcher", 5, False, {"max_iter": 3, "tol": 1e-3}),
    ("model_stock", 3, True, {}),
    ("model_stock", 2, True, {"filter_wise": 1}),
    ("stock", 3, True, {}),
    ("widen", 3, True, {}),
    ("widen", 2, True, {"by_rows": 1, "above_average_value_ratio": 1.2}),
    ("task_arithmetic", 3, True, {"lambda": 0.6, "normalize": 1}),
    ("ties", 3, True, {"density": [0.3, 0.5, 1.0], "lambda": 0.9}),
    ("ties", 2, True, {"density": 0.4, "rescale": 1, "normalize": 0}),
    ("dare_linear", 3, True, {"density": 0.5, "seed": 7}),
    ("dare_linear", 2, True, {"density": [0.25, 1.0], "rescale": 0, "normalize": 1}),
    ("dare_ties", 3, True, {"density": 0.7, "seed": 123456789}),
    ("della", 3, True, {"density": 0.5, "epsilon": 0.2}),
    ("della", 2, True, {"density": [0.4, 1.0], "epsilon": [0.1, 0.5], "rescale": 0}),
    ("della_linear", 2, True, {"density": 0.6, "seed": 3}),
    ("breadcrumbs", 3, True, {"density": 0.8, "gamma": 0.1}),
    ("breadcrumbs", 1, True, {"density": 0.95, "gamma": 0.2, "rescale": 1}),
    ("breadcrumbs_ties", 3, True, {"density": [0.5, 0.7, 0.9], "gamma": 0.02}),
    ("sce", 3, True, {}),
    ("sce", 3, True, {"select_topk": 0.3}),
    ("ram", 3, True, {"epsilon": 0.05}),
    ("nearswap", 1, True, {"t": 0.08}),
    ("arcee_fusion", 1, True, {}),
]  # fmt: skip
IDS = [f"{m}-{'-'.join(f'{k}={v}' for k, v in p.items())}" for m, _, _, p in CASES]
ELEMENTWISE = {"linear", "task_arithmetic", "ram", "nearswap"}
# Their masks depend only on values or on random words, so the same elements are selected.
SAME_CHOICE = {
    "ties", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della", "della_linear",
}  # fmt: skip
SHAPES = [(1,), (7,), (1, 1), (3, 5), (64, 64), (33, 129), (5, 1030), (130, 513), (4, 3, 11)]
SHAPES += [(1, 9), (1, 4, 6)]  # one row is not a vector
THREADED = (700, 513)


def sample(
    rng: np.random.Generator, n_sources: int, shape: tuple[int, ...], types: list[str]
) -> tuple[list[_C.Tensor], _C.Tensor]:
    """Finetunes near a base, with equal elements and equal magnitudes among them."""
    base = rng.standard_normal(shape).astype(np.float32)
    kind = rng.integers(0, 8, (n_sources, *shape))
    delta = rng.standard_normal((n_sources, *shape)).astype(np.float32) * np.float32(0.1)
    delta = np.where(kind == 0, 0, delta)
    delta = np.where(kind == 1, np.float32(0.125) * np.sign(delta), delta).astype(np.float32)
    sources = [
        tensor(base + d, t, shift=i % 2) for i, (d, t) in enumerate(zip(delta, types, strict=False))
    ]
    return sources, tensor(base, types[-1])


def check(
    case: tuple[str, int, bool, dict[str, Any]], shape: tuple[int, ...], seed: int, **options: Any
) -> None:
    method, n_sources, with_base, parameters = case
    rng = np.random.default_rng(seed)
    types = [DTYPES[i] for i in rng.integers(0, 3, n_sources + 1)]
    out_dtype = DTYPES[seed % 3]
    sources, base_t = sample(rng, n_sources, shape, types)
    base_used = base_t if with_base else None
    weights = rng.uniform(0.2, 1.0, n_sources).tolist() if METHODS[method].weighted else None
    x, base = [values(s) for s in sources], values(base_t) if with_base else None
    raw = run(
        method, sources, base_used, out_dtype=out_dtype, weights=weights or (),
        parameters=parameters, key=99, **options,
    )  # fmt: skip
    got = as_float(raw, out_dtype)

    def expected(dtype: type[np.floating]) -> np.ndarray:
        with np.errstate(all="ignore"):
            return reference.merge(
                method, x, base, weights=weights, parameters=parameters, key=99, dtype=dtype
            ).ravel()

    exact, same_steps = expected(np.float64), expected(np.float32)
    if method in ELEMENTWISE or (method in SAME_CHOICE and not _rescales(method, parameters)):
        np.testing.assert_array_equal(got, rounded(same_steps, out_dtype))
        return
    size = np.abs(np.stack(x)).sum(axis=0).ravel() + (0 if base is None else np.abs(base).ravel())
    close = np.abs(got - exact) <= 2 * (np.abs(exact) * EPS[out_dtype] + size * 16 * EPS["F32"])
    if method in {"sce", "arcee_fusion"} | SAME_CHOICE:  # other sign or choice within rounding
        close |= np.abs(got - rounded(same_steps, out_dtype)) <= 2 * (
            np.abs(exact) * EPS[out_dtype] + size * 16 * EPS["F32"]
        )
        assert (~close).sum() <= max(1 if method == "arcee_fusion" else 0, got.size // 2000)
    else:
        assert close.all(), (np.abs(got - exact)[~close], exact[~close])


def _rescales(method: str, parameters: dict[str, Any]) -> bool:
    declared = METHODS[method].by_name.get("rescale")
    return declared is not None and bool(parameters.get("rescale", declared.default))


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_agrees_with_the_reference(case: tuple[str, int, bool, dict[str, Any]]) -> None:
    for seed, shape in enumerate(SHAPES):
        check(case, shape, seed)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_large_tensors_on_threads(case: tuple[str, int, bool, dict[str, Any]]) -> None:
    """Large enough that thresholds come from a sample and every thread has several tasks."""
    check(case, THREADED, 2, threads=3)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_threads_and_slices_change_no_bit(case: tuple[str, int, bool, dict[str, Any]]) -> None:
    method, n_sources, with_base, parameters = case
    types = [*("BF16", "F16", "F32", "BF16", "F32")[:n_sources], "F32"]
    sources, base_t = sample(np.random.default_rng(1), n_sources, (301, 701), types)
    base = base_t if with_base else None
    whole = run(method, sources, base, out_dtype="BF16", parameters=parameters, key=5, threads=1)
    for threads, step, shift in ((0, None, 0), (2, None, 1), (5, 50_001, 0), (3, 4096, 1)):
        again = run(
            method, sources, base, out_dtype="BF16", parameters=parameters, key=5,
            threads=threads, step=step, shift=shift,
        )  # fmt: skip
        assert np.array_equal(whole, again), (threads, step)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_nan_is_found(case: tuple[str, int, bool, dict[str, Any]]) -> None:
    method, n_sources, with_base, parameters = case
    at = 70_000
    places: list[int | str] = [0, n_sources - 1, *(["base"] if with_base else [])]
    for place in places:
        rng = np.random.default_rng(4)
        x = rng.standard_normal((n_sources, 300, 300)).astype(np.float32)
        base = rng.standard_normal((300, 300)).astype(np.float32)
        (base if place == "base" else x[int(place)]).ravel()[at] = np.nan
        sources, base_t = [tensor(row, "F32") for row in x], tensor(base, "F32")
        with pytest.raises(_C.NanError, match="NaN") as error:
            run(method, sources, base_t if with_base else None, parameters=parameters, threads=2)
        assert (error.value.source, error.value.element) == (place, at)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_file_gets_the_same_bytes(
    case: tuple[str, int, bool, dict[str, Any]], tmp_path: Any
) -> None:
    method, n_sources, with_base, parameters = case
    sources, base_t = sample(
        np.random.default_rng(8), n_sources, (40, 50), ["BF16"] * (n_sources + 1)
    )
    merge = _C.Merge(
        method, sources, base_t if with_base else None, out_dtype="BF16", parameters=parameters
    )
    out = _C.Buffer(4000)
    merge.run(0, 2000, out)
    with (tmp_path / "out").open("w+b") as file:
        merge.write(0, 2000, file.fileno(), 5)
        file.seek(5)
        assert file.read() == bytes(memoryview(out))


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        ("della", {"density": 0.1, "epsilon": 0.2}, r"density - epsilon.*source 0"),
        ("della", {"density": [0.5, 0.9], "epsilon": 0.15}, r"density \+ epsilon.*source 1"),
        ("ties", {"gamma": 0.1}, "ties has no parameter 'gamma'"),
        ("breadcrumbs", {"gamma": 2}, r"gamma\[0\] is 2"),
        ("dare_ties", {"seed": -1}, "seed is -1"),
        ("sce", {"select_topk": 1.5}, "select_topk is 1.5"),
        ("ties", {"lambda": [1, 2]}, "lambda needs one value"),
        ("ties", {"normalize": 2}, "normalize is 2"),
    ],
)
def test_wrong_parameters(method: str, parameters: dict[str, Any], message: str) -> None:
    one = tensor(np.ones((2, 2), np.float32), "F32")
    with pytest.raises(ValueError, match=message):
        run(method, [one, one], one, parameters=parameters)


def test_directions_that_cancel_have_no_mean() -> None:
    e = np.eye(3, dtype=np.float32)
    sources = [tensor(row, "F32") for row in (e[0], -e[0], 0 * e[1], 0 * e[2])]
    with pytest.raises(ValueError, match="cancel out"):
        run("multislerp", sources)


def test_random_masks_depend_on_seed_key_and_source() -> None:
    one, zero = tensor(np.ones(4096, np.float32), "F32"), tensor(np.zeros(4096, np.float32), "F32")

    def mask(seed: int, key: int, weights: Sequence[float]) -> bytes:
        o = {"density": 0.5, "rescale": 0, "seed": seed}
        return run(
            "dare_linear", [one, one], zero, weights=weights, key=key, parameters=o
        ).tobytes()

    masks = {mask(s, k, w) for s in (0, 1) for k in (0, 1, 2**64 - 1) for w in ((1, 0), (0, 1))}
    assert len(masks) == 12


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
def test_a_nan_is_found_where_nothing_is_kept(method: str) -> None:
    x, base = np.ones(100, np.float32), np.zeros(100, np.float32)
    parameters = {"density": 0.001}
    kept = run(method, [tensor(x, "F32")], tensor(base, "F32"), parameters=parameters)
    np.testing.assert_array_equal(as_float(kept, "F32"), base)
    x[70] = np.nan
    with pytest.raises(_C.NanError, match="input 0 is NaN at element 70"):
        run(method, [tensor(x, "F32")], tensor(base, "F32"), parameters=parameters)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_defaults_are_those_of_the_registry(method: Method) -> None:
    """The engine's defaults are those of recipes."""
    if method.name in ("average", "regmean"):
        return  # average is built as linear, and regmean is a linear solve outside the engine
    n = max(2, method.min_sources) if method.max_sources > 1 else 1
    sources, base_t = sample(np.random.default_rng(6), n, (40, 50), ["F32"] * (n + 1))
    base = base_t if method.uses_base else None
    needed = {p.name: 0.3 for p in method.parameters if p.default is None}
    told = {p.name: p.default for p in method.parameters if p.default is not None}
    # Densities are 1 by default, which hides the parameters that go with them.
    for density in [{}, {"density": 0.5}] if "density" in told else [{}]:
        o = {"weights": [0.3, 0.6][:n] if method.weighted else [], "threads": 1}
        if method.is_calibrated:
            o["statistics"] = [tensor(1e-5 * abs(values(s)), "F32") for s in sources]

        def built(parameters: dict[str, Any], o: dict[str, Any] = o) -> bytes:
            merge = _C.Merge(
                method.name, sources, base, out_dtype="F32", parameters=parameters, **o
            )
            out = _C.Buffer(4 * merge.n_elements)
            merge.run(0, merge.n_elements, out)
            return bytes(memoryview(out))

        assert built(needed | density) == built(needed | told | density)
    if needed:
        with pytest.raises(ValueError, match=f"{method.name} needs a value for t"):
            built({})


def test_a_nan_in_the_statistics_is_found() -> None:
    x = tensor(np.ones(100, np.float32), "F32")
    f = np.ones((2, 100), np.float32)
    f[1, 70] = np.nan
    with pytest.raises(_C.NanError, match="the statistics of input 1 are NaN at element 70"):
        run("fisher", [x, x], statistics=[tensor(row, "F32") for row in f])


@pytest.mark.parametrize("n_sources", [1, 3])
def test_fisher_weighs_each_element(n_sources: int) -> None:
    rng = np.random.default_rng(n_sources)
    sources, _ = sample(rng, n_sources, (130, 513), ["BF16", "F32", "F16", "F32"][: n_sources + 1])
    information = rng.standard_normal((n_sources, 130, 513)).astype(np.float32) ** 2
    information[:, rng.integers(0, 2, (130, 513)) == 0] = 0
    o = {"weights": rng.uniform(0.5, 1, n_sources).tolist(), "parameters": {"floor": 1e-3}}
    raw = run("fisher", sources, statistics=[tensor(f, "F32") for f in information], **o)
    x = [values(s) for s in sources]
    expected = reference.merge("fisher", x, statistics=information, dtype=np.float32, **o)
    np.testing.assert_array_equal(as_float(raw, "F32"), expected.ravel())
    with pytest.raises(ValueError, match="fisher needs the statistics"):
        run("fisher", sources)
    with pytest.raises(ValueError, match="linear takes no statistics"):
        run("linear", sources, statistics=sources)
