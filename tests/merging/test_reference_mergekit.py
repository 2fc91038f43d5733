"""The references compared with mergekit's results in tests/golden/mergekit_methods.npz.

`tools/mergekit_golden.py` wrote the file and describes its contents; run it again for another
version of mergekit. Where we differ on purpose, `difference` says why, and a test shows what is
right.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptailor.merging import reference
from gptailor.merging.reference import merge, selections
from gptailor.merging.registry import METHODS

GOLDEN = Path(__file__).parents[1] / "golden" / "mergekit_methods.npz"
with np.load(GOLDEN) as _file:
    _VALUES: np.ndarray = _file["values"]
    INDEX: dict[str, Any] = json.loads(_file["index"].tobytes())
CASES: list[dict[str, Any]] = INDEX["cases"]
OURS_ONLY = {name for name, method in METHODS.items() if not method.in_mergekit}


def stored(place: tuple[int, list[int]]) -> np.ndarray:
    offset, shape = place
    return _VALUES[offset : offset + int(np.prod(shape))].reshape(shape)


def inputs(case: dict[str, Any]) -> tuple[np.ndarray, np.ndarray | None]:
    tensors = stored(INDEX["tensors"][case["tensors"]])
    return tensors[1 : 1 + case["n_sources"]], tensors[0] if case["base"] else None


def inputs_and_base(case: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    x, base = inputs(case)
    assert base is not None
    return x, base


def ours(case: dict[str, Any], dtype: Any = np.float64) -> np.ndarray:
    x, base = inputs(case)
    return merge(
        case["method"], x, base, weights=case["weights"], parameters=case["parameters"],
        key=INDEX["key"], dtype=dtype,
    )  # fmt: skip


def named(case: dict[str, Any]) -> str:
    return f"{case['method']} of {case['tensors']}, {case['weights']}, {case['parameters']}"


def size(case: dict[str, Any]) -> float:
    return float(np.abs(stored(INDEX["tensors"][case["tensors"]])).max())


def error_of(case: dict[str, Any], dtype: Any = np.float64) -> float:
    """The largest difference from mergekit, relative to the largest input."""
    difference_N = np.abs(ours(case, dtype) - stored(case["result"]))
    return float(difference_N.max()) / size(case)


def difference(case: dict[str, Any]) -> str | None:
    """Why we differ from mergekit in this case, or None."""
    method, tensors, values = case["method"], case["tensors"], case["parameters"]
    w = case["weights"]
    if method in ("linear", "multislerp") and sum(w) == 0:
        return "weights that add up to zero"
    if method == "multislerp" and tensors == "zero" and values.get("task_vectors"):
        return "multislerp of differences that are all zero"
    if method.startswith("della") and tensors in ("one", "column"):
        return "a row of one element"
    if method.startswith("della") and tensors == "cube":
        return "rows of a tensor of three dimensions"
    if method == "nuslerp" and tensors in ("antiparallel", "uneven"):
        return "opposite directions"
    if method == "karcher" and tensors in ("antiparallel", "uneven"):
        return "opposite directions"
    if method == "ties" and values.get("density") == 0:
        return "a density of zero"
    if method in ("ties", "breadcrumbs", "breadcrumbs_ties", "sce") and tensors == "grid":
        return "equal magnitudes at the threshold"
    if method == "arcee_fusion" and tensors == "small":
        return "a divergence below float32's rounding"
    return None


def those(reason: str) -> list[dict[str, Any]]:
    found = [case for case in CASES if difference(case) == reason]
    assert found, reason
    return found


def test_the_golden_file_is_complete() -> None:
    assert INDEX["mergekit"] == "0.1.5"
    assert {case["method"] for case in CASES} == set(METHODS) - OURS_ONLY
    assert len(CASES) > 400
    assert GOLDEN.stat().st_size < 200_000
    for case in CASES:
        if "result" in case:
            assert stored(case["result"]).shape == inputs(case)[0].shape[1:], named(case)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("method", sorted(set(METHODS) - OURS_ONLY))
def test_methods_equal_mergekit(method: str, dtype: Any) -> None:
    cases = [c for c in CASES if c["method"] == method and difference(c) is None]
    assert len(cases) >= 8
    for case in cases:
        if "error" in case:
            with pytest.raises(ValueError, match=r"epsilon|cancel"):
                ours(case, dtype)
        else:
            assert error_of(case, dtype) < 6e-7, named(case)


def test_every_listed_difference_exists() -> None:
    for case in CASES:
        if difference(case) is None or "error" in case:
            continue
        try:
            found = error_of(case)
        except ValueError:
            continue
        exact = case["tensors"] in ("antiparallel", "uneven")  # mergekit may round either way
        assert exact or not found < 1e-4, named(case)


def test_mergekit_divides_by_weights_that_add_up_to_zero() -> None:
    for case in those("weights that add up to zero"):
        result = stored(case["result"])
        zero = case["tensors"] == "zero"
        assert zero or not np.isfinite(result).all() or np.abs(result).max() > 1e3, named(case)
        with pytest.raises(ValueError, match="add up to zero"):
            ours(case)


def test_mergekit_refuses_multislerp_where_no_source_changed() -> None:
    for case in those("multislerp of differences that are all zero"):
        assert case["error"] == "ValueError"
        np.testing.assert_array_equal(ours(case), inputs(case)[1])


def test_mergekit_divides_zero_by_zero_in_rows_of_one_element() -> None:
    for case in those("a row of one element"):
        assert case["error"] == "ValueError"
        x, base = inputs(case)
        assert base is not None
        y = ours(case)
        assert np.isfinite(y).all()
        p = reference.keep_probabilities(x[0] - base, 0.5, 0.15)
        np.testing.assert_array_equal(p, 0.5)


def test_mergekit_ranks_della_along_the_second_dimension() -> None:
    """Both agree for two dimensions; with three, a row here is the last dimension."""
    for case in those("rows of a tensor of three dimensions"):
        (x, base), y = inputs_and_base(case), ours(case)
        flat = merge(
            case["method"], x.reshape(3, 6, 4), base.reshape(6, 4), weights=case["weights"],
            parameters=case["parameters"], key=INDEX["key"],
        )  # fmt: skip
        np.testing.assert_array_equal(y.reshape(6, 4), flat)


def test_mergekit_amplifies_rounding_where_directions_are_opposite() -> None:
    worst = 0.0
    for case in those("opposite directions"):
        x, base = inputs(case)
        y = ours(case)
        origin = 0 if base is None else base
        inside = np.abs(x - origin).max(axis=0) + np.abs(origin)
        assert (np.abs(y) <= inside * (1 + 1e-12)).all(), named(case)
        if case["method"] == "nuslerp":
            w = np.array(case["weights"]) / sum(case["weights"])
            np.testing.assert_allclose(y, w[0] * x[0] + w[1] * x[1], atol=1e-6)
        worst = max(worst, float(np.abs(stored(case["result"])).max()) / size(case))
    assert worst > 100


def test_mergekit_drops_everything_at_a_density_of_zero() -> None:
    for case in those("a density of zero"):
        x, base = inputs_and_base(case)
        np.testing.assert_allclose(stored(case["result"]), base, rtol=1e-6)
        assert 1 <= (ours(case) != base).sum() <= len(x)


def test_mergekit_picks_among_equal_magnitudes() -> None:
    """It keeps exactly as many as asked for, in the order of its sort; we keep all equal ones."""
    for case in those("equal magnitudes at the threshold"):
        theirs, y = stored(case["result"]), ours(case)
        x, base = inputs_and_base(case)
        mirrored = merge(
            case["method"], x[:, ::-1, ::-1], base[::-1, ::-1], weights=case["weights"],
            parameters=case["parameters"],
        )  # fmt: skip
        np.testing.assert_allclose(mirrored[::-1, ::-1], y, atol=1e-12)
        if case["method"] != "sce":
            assert (y != base).sum() >= (theirs != base).sum()


def test_mergekit_loses_the_divergence_of_close_models() -> None:
    """For a finetune, Σ p log(p / q) is smaller than its rounding error in float32."""
    (case,) = those("a divergence below float32's rounding")
    (x, base), y = inputs_and_base(case), ours(case)
    wide = base.astype(np.longdouble), x[0].astype(np.longdouble)
    q, p = (np.exp(v) / np.exp(v).sum(axis=-1, keepdims=True) + 1e-8 for v in wide)
    divergence = (p * np.log(p / q)).sum(axis=-1, keepdims=True)
    assert 0 < divergence.max() < np.finfo(np.float32).eps
    score = (np.abs(wide[1] - wide[0]) * divergence).astype(np.float32)
    np.testing.assert_allclose(selections.arcee_scores(x[0], base), score, rtol=1e-5)
    stands_out = score >= selections.arcee_threshold(score)
    np.testing.assert_array_equal(y != base, stands_out & (x[0] != base))
    assert ((stored(case["result"]) != base) != stands_out).sum() > 10


@pytest.mark.parametrize("kept", INDEX["keep_counts"], ids=str)
def test_random_masks_have_mergekits_probabilities(kept: dict[str, Any]) -> None:
    counts, n = np.array(kept["counts"]), kept["rounds"]
    row = np.arange(1.0, len(counts) + 1)
    p = np.full(len(row), kept["density"])
    rows = np.tile(row, (n, 1))
    if kept["epsilon"] is None:
        sparse = reference.drop(rows, kept["density"], seed=1, key=2, source=3)
    else:
        p = reference.keep_probabilities(row, kept["density"], kept["epsilon"])
        sparse = reference.drop_by_magnitude(
            rows, kept["density"], kept["epsilon"], seed=1, key=2, source=3
        )
    sigma = np.sqrt(n * p * (1 - p))
    assert (np.abs(counts - n * p) < 5 * sigma).all()
    assert (np.abs((sparse != 0).sum(axis=0) - n * p) < 5 * sigma).all()
