"""The engine on the cases for which mergekit's results are stored, and on very large tensors.

Those results are in tests/golden/mergekit_methods.npz. tests/merging/test_reference_mergekit.py
tests that the references agree with them and gives the reason for every difference; this file tests
that the engine agrees with the references: to the last bit, or to float32's rounding for methods on
a sphere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptailor import _C
from gptailor.merging import reference
from tests.native.native_tools import as_float, run, tensor

GOLDEN = Path(__file__).parents[1] / "golden" / "mergekit_methods.npz"
with np.load(GOLDEN) as _file:
    _VALUES: np.ndarray = _file["values"]
    INDEX: dict[str, Any] = json.loads(_file["index"].tobytes())
METHODS = sorted({case["method"] for case in INDEX["cases"]})
SPHERES = {"slerp", "nuslerp", "multislerp", "karcher", "model_stock"}


def stored(place: tuple[int, list[int]]) -> np.ndarray:
    offset, shape = place
    return _VALUES[offset : offset + int(np.prod(shape))].reshape(shape)


@pytest.mark.parametrize("method", METHODS)
def test_the_engine_computes_what_the_references_do(method: str) -> None:
    n = 0
    for case in INDEX["cases"]:
        if case["method"] != method:
            continue
        tensors = stored(INDEX["tensors"][case["tensors"]])
        x, base = tensors[1 : 1 + case["n_sources"]], tensors[0] if case["base"] else None
        told = {"weights": case["weights"], "parameters": case["parameters"], "key": INDEX["key"]}
        sources = [tensor(row, "F32") for row in x]
        base_t = None if base is None else tensor(base, "F32")
        asked = {**told, "weights": case["weights"] or ()}
        if method == "linear":
            asked["parameters"] = {"normalize": 1, **case["parameters"]}
        try:
            dtype = np.float64 if method in SPHERES else np.float32
            expected = reference.merge(method, x, base, **told, dtype=dtype)
        except ValueError:
            with pytest.raises(ValueError, match=r"zero|cancel|between 0 and 1"):
                run(method, sources, base_t, **asked)
            continue
        got = as_float(run(method, sources, base_t, **asked), "F32").reshape(expected.shape)
        if method in SPHERES:
            np.testing.assert_allclose(got, expected, rtol=0, atol=6e-7 * np.abs(tensors).max())
        else:
            np.testing.assert_array_equal(got, expected, err_msg=str(case["parameters"]))
        n += 1
    assert n > 0


# method, sources, base?, parameters, those that select the same elements from the last row alone
LARGE: list[tuple[str, int, bool, dict[str, Any], dict[str, Any] | None]] = [
    ("linear", 2, False, {}, None),
    ("slerp", 2, False, {"t": 0.5}, None),
    ("nuslerp", 2, False, {"nuslerp_flatten": 0}, None),
    ("multislerp", 2, False, {}, None),
    ("karcher", 2, False, {}, None),
    ("model_stock", 2, True, {"filter_wise": 1}, None),
    ("task_arithmetic", 2, True, {}, None),
    ("ties", 2, True, {"density": 1e-9}, {"density": 0.25}),  # two elements
    ("dare_ties", 2, True, {"density": 0.5, "rescale": 0}, None),
    ("della", 2, True, {"density": 0.5, "rescale": 0}, None),
    ("breadcrumbs", 2, True, {"density": 0.9999999, "gamma": 0}, {"density": 1}),
    ("sce", 2, True, {"select_topk": 0.5}, None),
    ("ram", 2, True, {}, None),
    ("nearswap", 1, True, {"t": 0.5}, None),
    ("arcee_fusion", 1, True, {}, None),
    ("widen", 2, True, {}, None),
]


@pytest.mark.slow(reason="sparse files of 4.3 GB through every method, about five minutes")
@pytest.mark.parametrize("case", LARGE, ids=[case[0] for case in LARGE])
def test_more_elements_than_31_bits_count(
    case: tuple[str, int, bool, dict[str, Any], dict[str, Any] | None], tmp_path: Path
) -> None:
    """2^31 + 8 elements in rows of 8, all zero except in the last row."""
    method, n_sources, with_base, parameters, alone = case
    n, tail = 2**31 + 8, 8
    scale = 1000 if method == "sce" else 1  # its mean squares are spread over all the zeros
    values = np.random.default_rng(0).standard_normal((4, tail)).astype(np.float32) * scale
    rows = []
    for i in range(4):
        bits = (values[i].view(np.uint32) >> 16).astype(np.uint16)
        values[i] = (bits.astype(np.uint32) << 16).view(np.float32)
        with (tmp_path / str(i)).open("wb") as file:
            file.truncate(2 * (n - tail))
            file.seek(0, 2)
            file.write(bits.tobytes())
        rows.append(_C.MappedFile(tmp_path / str(i)).tensor(0, (n // tail, tail), "BF16"))
    base_t = rows[3] if with_base else None
    merge = _C.Merge(
        method, rows[:n_sources], base_t, out_dtype="F32", parameters=parameters, key=1
    )
    out = _C.Buffer(4 * tail)
    merge.run(n - tail, tail, out)
    x, base = values[:n_sources, None], values[3, None] if with_base else None
    if method == "arcee_fusion":  # most scores are 0, and so is the threshold
        expected = x[0]
    elif method in ("dare_ties", "della"):
        assert base is not None
        masks = [_mask(method, x[s], base, n, s) for s in range(n_sources)]
        kept = base + (x - base) * np.stack(masks)
        expected = reference.ties(kept, base, [1.0] * n_sources, normalize=method == "della")
    else:
        expected = reference.merge(method, x, base, parameters=alone or parameters)
    got = np.frombuffer(memoryview(out), np.float32)
    np.testing.assert_allclose(got, expected.ravel(), rtol=1e-5, atol=1e-6 * scale)


def _mask(method: str, x: np.ndarray, base: np.ndarray, n: int, source: int) -> np.ndarray:
    """Which of the last 8 of n elements are kept; density 0.5, epsilon 0.15, seed 0, key 1."""
    counters = np.array([[n // 4 - 2, 0, source, 0], [n // 4 - 1, 0, source, 0]], np.uint32)
    words = reference.philox.philox4x32(counters.T, reference.philox.key_words(0, 1)).T.ravel()
    ranks = np.argsort(np.argsort(np.abs(x - base).ravel(), kind="stable"), kind="stable")
    chance = 0.5 if method == "dare_ties" else 0.35 + ranks / 7 * 0.3
    return np.asarray(words < np.ceil(chance * 2.0**32))[None]
