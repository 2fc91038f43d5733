"""The compiled merges against the reference: to the last bit in float32, closely in float64."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptailor import _C
from gptailor.merging import reference
from tests.native.native_tools import (
    DTYPES,
    EPS,
    FLOOR,
    N_BYTES,
    as_float,
    rounded,
    run,
    tensor,
    values,
)

METHODS = ["linear", "task_arithmetic", "slerp", "ties"]
# Around the lengths at which the code path changes: a vector, a block, a reduction block.
SIZES = [0, 1, 2, 3, 7, 63, 64, 65, 511, 512, 513, 1023, 1025, 4095, 4097, 8200]
THREADED = 5 * 65536 + 77  # more than one task for each thread


def oracle(
    method: str, x: np.ndarray, base: np.ndarray, dtype: Any = np.float64, **o: Any
) -> np.ndarray:
    with np.errstate(all="ignore"):
        if method == "slerp":
            return reference.slerp(x, t=o["t"], dtype=dtype)
        if method == "linear":
            return reference.linear(x, o["weights"], normalize=o["normalize"], dtype=dtype)
        shared = {"lam": o["lam"], "normalize": o["normalize"], "dtype": dtype}
        if method == "task_arithmetic":
            return reference.task_arithmetic(x, base, o["weights"], **shared)
        return reference.ties(x, base, o["weights"], densities=o["densities"], **shared)


def options_for(method: str, **o: Any) -> dict[str, Any]:
    names = {
        "linear": ("weights", "normalize"),
        "task_arithmetic": ("weights", "normalize", "lam"),
        "slerp": ("t",),
        "ties": ("weights", "normalize", "lam", "densities"),
    }
    native = {"lam": "lambda", "densities": "density"}
    return {native.get(key, key): o[key] for key in names[method]}


def sample(rng: np.random.Generator, n_sources: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Finetunes near a base, with zeros, equal magnitudes and subnormals among them."""
    base = rng.standard_normal(n).astype(np.float32)
    delta = rng.standard_normal((n_sources, n)).astype(np.float32) * np.float32(0.1)
    kind = rng.integers(0, 8, (n_sources, n))
    delta = np.where(kind == 0, 0, delta)
    delta = np.where(kind == 1, np.float32(0.125) * np.sign(delta), delta)
    x = base + delta
    tiny = rng.integers(0, 16, n) == 0
    base = np.where(tiny, base * np.float32(2.0**-130), base)
    x = np.where(tiny, x * np.float32(2.0**-130), x)
    base = np.where(rng.integers(0, 16, n) == 0, np.float32(-0.0), base)
    return x.astype(np.float32), base.astype(np.float32)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", SIZES)
def test_every_size_and_type_agrees_with_the_reference(method: str, n: int) -> None:
    rng = np.random.default_rng(n)
    for n_sources in (2,) if method == "slerp" else (1, 2, 3, 4, 16):
        types = [DTYPES[i] for i in rng.integers(0, 3, n_sources + 2)]
        x, base = sample(rng, n_sources, n)
        sources = [tensor(x[i], types[i], shift=i % 2) for i in range(n_sources)]
        base_t = tensor(base, types[-1])
        x = np.stack([values(s) for s in sources])
        base = values(base_t)
        o = {
            "weights": rng.uniform(0.1, 1.0, n_sources).tolist(),
            "normalize": bool(rng.integers(0, 2)),
            "lam": 0.7,
            "densities": rng.uniform(0.2, 1.0, n_sources).tolist(),
            "t": 0.3,
        }
        used = None if method in ("linear", "slerp") else base_t
        raw = run(method, sources, used, out_dtype=types[-2], **options_for(method, **o))
        got = as_float(raw, types[-2])
        if n == 0:
            assert got.size == 0
            continue
        same_steps = rounded(oracle(method, x, base, np.float32, **o), types[-2])
        if method == "slerp":  # its two weights come from sums taken in another order
            size = np.abs(x.astype(np.float64)).sum(axis=0)
            slack = size * (EPS[types[-2]] + 4 * EPS["F32"]) + FLOOR[types[-2]] + FLOOR["F32"]
            assert (np.abs(got - oracle(method, x, base, **o)) <= 2 * slack).all()
        else:
            np.testing.assert_array_equal(got, same_steps)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["linear", "task_arithmetic", "ties"]),
    st.integers(1, 4),
    st.integers(1, 700),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.floats(-2, 2, width=32),
    st.data(),
)
def test_close_to_float64(
    method: str,
    n_sources: int,
    n: int,
    out_dtype: str,
    normalize: bool,
    lam: float,
    data: st.DataObject,
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    x, base = sample(rng, n_sources, n)
    w = data.draw(st.lists(st.floats(0.0625, 2, width=32), min_size=n_sources, max_size=n_sources))
    o = {"weights": w, "normalize": normalize, "lam": lam, "densities": [1.0] * n_sources}
    used = None if method == "linear" else tensor(base, "F32")
    raw = run(
        method,
        [tensor(row, "F32") for row in x],
        used,
        out_dtype=out_dtype,
        **options_for(method, **o),
    )
    exact = oracle(method, x, base, **o)
    # Each of at most 2 S + 4 operations loses half a unit of the largest number involved.
    x, base = x.astype(np.float64), base.astype(np.float64)
    size = np.abs(base) + np.sum(np.abs(np.array(w)[:, None] * x), axis=0) + np.abs(base) * sum(w)
    scale = size * max(1.0, abs(lam)) / min(1.0, *w)
    steps = 2 * n_sources + 4
    slack = scale * steps * EPS["F32"] + np.abs(exact) * EPS[out_dtype]
    slack += steps * FLOOR["F32"] * max(1.0, abs(lam)) / min(1.0, *w)  # among subnormals
    off = np.abs(as_float(raw, out_dtype) - exact) > 2 * (slack + FLOOR[out_dtype])
    if method == "ties":  # where the sum almost vanishes, float32 may elect the other sign
        total = np.sum(np.array(w)[:, None] * (x - base), axis=0)
        off &= np.abs(total) > scale * steps * EPS["F32"]
    assert not off.any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_threads_and_slices_change_no_bit(method: str, out_dtype: str) -> None:
    rng = np.random.default_rng(5)
    x, base = sample(rng, 2, THREADED)
    sources = [tensor(x[0], "BF16"), tensor(x[1], "F16", shift=3)]
    used = None if method in ("linear", "slerp") else tensor(base, "F32", shift=1)
    o = options_for(
        method, weights=[0.3, 0.8], normalize=True, lam=0.5, densities=[0.3, 0.6], t=0.25
    )
    whole = run(method, sources, used, out_dtype=out_dtype, threads=1, **o)
    for threads, step, shift in ((0, None, 0), (2, None, 1), (5, 100_001, 0), (3, 4096, 1)):
        again = run(
            method, sources, used, out_dtype=out_dtype, threads=threads, step=step, shift=shift, **o
        )
        assert np.array_equal(whole, again), (threads, step)


def test_python_threads_may_share_a_merge() -> None:
    rng = np.random.default_rng(6)
    x, base = sample(rng, 3, THREADED)
    sources, base_t = [tensor(row, "BF16") for row in x], tensor(base, "BF16")
    merge = _C.Merge("ties", sources, base_t, out_dtype="BF16", parameters={"density": 0.5})
    out = _C.Buffer(THREADED * 2)
    cuts = np.linspace(0, THREADED, 5).astype(int)
    workers = [
        threading.Thread(target=merge.run, args=(int(a), int(b - a), out, int(a) * 2))
        for a, b in pairwise(cuts)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    whole = run("ties", sources, base_t, out_dtype="BF16", density=0.5)
    assert np.array_equal(np.frombuffer(memoryview(out), np.uint8), whole)


# Numpy only: torch would take seconds to import.
DIGEST = """
import hashlib
import numpy as np
from gptailor import _C
n, rng, h = 70000, np.random.default_rng(1), hashlib.sha256()
out = _C.Buffer(n * 4)
for d in ("F32", "F16", "BF16"):
    inputs = []
    for _ in range(3):
        bits = rng.standard_normal(n).astype(np.float16 if d == "F16" else np.float32)
        if d == "BF16":
            bits = (bits.view(np.uint32) >> 16).astype(np.uint16)
        buffer = _C.Buffer(bits.nbytes)
        memoryview(buffer)[:] = bits.tobytes()
        inputs.append(buffer.tensor(0, (n,), d))
    for method, with_base, parameters in (
        ("linear", False, {}), ("task_arithmetic", True, {"lambda": .7}),
        ("slerp", False, {"t": .6}),
        ("ties", True, {"density": [.4, .5]}), ("dare_ties", True, {"density": .4}),
        ("della", True, {"density": .5}), ("sce", True, {"select_topk": .4}),
        ("karcher", False, {}), ("arcee_fusion", True, {}),
    ):
        sources = inputs[:1] if method == "arcee_fusion" else inputs[:2]
        _C.Merge(method, sources, inputs[2] if with_base else None, out_dtype=d, row_length=7,
                 weights=[.3, .9][:len(sources)], parameters=parameters).run(0, n, out)
        h.update(memoryview(out))
print(_C.build_info()["simd"], h.hexdigest())
"""


def test_instruction_sets_give_the_same_bits() -> None:
    digests = {}
    for simd in ("portable", "avx2", ""):
        line = subprocess.run(
            [sys.executable, "-c", DIGEST],
            env={**os.environ, "GPTAILOR_SIMD": simd},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        digests[line[0]] = line[1]
    assert "portable" in digests
    assert len(set(digests.values())) == 1, digests


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_source_is_a_copy_of_its_bytes(dtype: str) -> None:
    raw = np.random.default_rng(3).integers(0, 256, 70_001 * N_BYTES[dtype], np.uint8)
    buffer = _C.Buffer(raw.size + 1)
    memoryview(buffer)[1:] = raw.tobytes()
    source = buffer.tensor(1, (70_001,), dtype)
    assert np.array_equal(run("linear", [source], out_dtype=dtype, check_nan=False), raw)
    finite = tensor(np.array([1, -0.0, 0, -2.5, np.inf, 2.0**-140], np.float32), dtype)
    expected = np.frombuffer(np.from_dlpack(_as_bytes(finite)), np.uint8)
    assert np.array_equal(run("linear", [finite], out_dtype=dtype, weights=[1.0]), expected)


def _as_bytes(t: _C.Tensor) -> Any:
    import torch

    return torch.utils.dlpack.from_dlpack(t).view(torch.uint8)


def test_a_negative_zero_keeps_its_sign() -> None:
    zero = tensor(np.array([-0.0], np.float32), "F32")
    raw = run("linear", [zero, zero], weights=[0.5, 0.5])
    assert np.signbit(as_float(raw, "F32")).all()


def test_merging_a_model_with_itself_changes_nothing() -> None:
    x, base = sample(np.random.default_rng(9), 1, 5000)
    source, base_t = tensor(x[0], "BF16"), tensor(base, "BF16")
    same = run("linear", [source], out_dtype="BF16")
    assert np.array_equal(run("slerp", [source, source], out_dtype="BF16", t=0.5), same)
    halves = run("linear", [source, source], out_dtype="BF16", weights=[0.5, 0.5])
    assert np.array_equal(halves, same)
    untouched = run("task_arithmetic", [source], base_t, out_dtype="BF16", parameters={"lambda": 0})
    assert np.array_equal(as_float(untouched, "BF16"), values(base_t))


def test_slerp_of_parallel_zero_and_orthogonal_tensors() -> None:
    x = np.array([3, 4, 0, 0], np.float32)
    y = np.array([0, 0, 3, 4], np.float32)
    raw = run("slerp", [tensor(x, "F32"), tensor(y, "F32")], t=0.5)
    np.testing.assert_allclose(as_float(raw, "F32"), (x + y) * np.sqrt(0.5), rtol=1e-6)
    raw = run("slerp", [tensor(x, "F32"), tensor(-x, "F32")], t=0.25)
    np.testing.assert_allclose(as_float(raw, "F32"), 0.5 * x, rtol=1e-6)
    raw = run("slerp", [tensor(x, "F32"), tensor(0 * x, "F32")], t=0.25)
    expected = reference.slerp(np.stack([x, 0 * x]), t=0.25)
    np.testing.assert_allclose(as_float(raw, "F32"), expected, rtol=1e-6)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 3000), st.floats(0, 1), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_ties_keeps_exactly_the_largest(n: int, density: float, kind: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    kinds: dict[int, Callable[[], np.ndarray]] = {
        0: lambda: rng.standard_normal(n),
        1: lambda: rng.integers(-3, 4, n).astype(float),  # many equal magnitudes
        2: lambda: rng.standard_normal(n) * 2.0 ** rng.integers(-148, 120, n).astype(float),
        3: lambda: np.full(n, -1.5),
    }
    delta = kinds[kind]().astype(np.float32)
    zero = tensor(np.zeros(n, np.float32), "F32")
    got = as_float(run("ties", [tensor(delta, "F32")], zero, density=density), "F32")
    np.testing.assert_array_equal(got, reference.trim(delta, density))


@pytest.mark.parametrize(
    ("method", "bad"),
    [(m, bad) for m in METHODS for bad in (0, 1, "base") if bad != "base" or m[0] == "t"],
)
@pytest.mark.parametrize("at", [0, 700, 65_536, THREADED - 1])
def test_a_nan_is_found_where_it_is(method: str, bad: int | str, at: int) -> None:
    x = np.ones((2, THREADED), np.float32)
    base = np.zeros(THREADED, np.float32)
    victim = base if bad == "base" else x[int(bad)]
    victim[at] = np.nan
    victim[-1] = np.nan
    used = None if method in ("linear", "slerp") else tensor(base, "F16")
    options: dict[str, Any] = {"ties": {"density": [0.5, 1.0]}, "slerp": {"t": 0.5}}
    o = options.get(method, {})
    sources = [tensor(row, "BF16") for row in x]
    with pytest.raises(_C.NanError, match=r"NaN.*element") as error:
        run(method, sources, used, out_dtype="BF16", threads=3, **o)
    assert (error.value.source, error.value.element) == (bad, at)
    assert str(bad) in str(error.value)
    assert isinstance(error.value, ValueError)
    passed = run(method, sources, used, out_dtype="BF16", check_nan=False, **o)
    assert np.isnan(as_float(passed, "BF16")[at])


def test_infinities() -> None:
    x = tensor(np.array([1, np.inf, 2], np.float32), "F32")
    y = tensor(np.array([1, -np.inf, 2], np.float32), "F32")
    zero = tensor(np.zeros(3, np.float32), "F32")
    assert as_float(run("linear", [x, x]), "F32")[1] == np.inf
    with pytest.raises(_C.NanError, match="not a number") as error:
        run("linear", [x, y])
    assert (error.value.source, error.value.element) == ("result", 1)
    for density, source in ((1.0, "result"), (0.5, 0)):
        with pytest.raises(_C.NanError) as error:
            run("ties", [x], x, density=density)
        assert (error.value.source, error.value.element) == (source, 1)
    with pytest.raises(_C.NanError, match="infinite") as error:
        run("slerp", [zero, y], t=0.5)
    assert (error.value.source, error.value.element) == (1, 1)
    assert np.isnan(as_float(run("linear", [x, y], check_nan=False), "F32")[1])


def test_the_largest_numbers_of_float16() -> None:
    """65520 is halfway between 65504 and the next number, 65536; anything below is rounded down."""
    below = np.nextafter(np.float32(65520), np.float32(0))
    fits = np.array([65504.0, -65504.0, below, np.inf], np.float32)
    got = as_float(run("linear", [tensor(fits, "F32")], out_dtype="F16"), "F16")
    assert got.tolist() == [65504.0, -65504.0, 65504.0, np.inf]
    for value in (65520.0, -65520.0, 1e30, float(np.finfo(np.float32).max)):
        source = tensor(np.array([1, value, 70000.0], np.float32), "F32")
        with pytest.raises(_C.RangeError, match=r"element 1 is .*, but the largest number in"):
            run("linear", [source], out_dtype="F16")
        got = as_float(run("linear", [source], out_dtype="F16", check_overflow=False), "F16")
        assert got[1] == np.copysign(np.inf, value)
        assert np.isfinite(as_float(run("linear", [source], out_dtype="F32"), "F32")).all()


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "cast", "slerp"])
@pytest.mark.parametrize("at", [0, 700, 65_536, THREADED - 1])
def test_a_number_too_large_is_found_where_it_is(method: str, at: int) -> None:
    x = np.ones((2, THREADED), np.float32)
    x[:, at], x[:, -1] = -70144.0, 99840.0  # exact in bfloat16
    options: dict[str, Any] = {"ties": {"density": 0.5}, "slerp": {"t": 0.5}}
    base = None if method in ("linear", "slerp", "cast") else tensor(x[0] * 0, "F16")
    factor = 1.0 if method in ("cast", "slerp", "ties") else 0.5
    sources = [tensor(row, "BF16") for row in x[: 1 if method == "cast" else 2]]
    o = options.get(method, {}) | {"factor": factor}
    name = "linear" if method == "cast" else method
    with pytest.raises(_C.RangeError) as error:
        run(name, sources, base, out_dtype="F16", threads=3, **o)
    assert (error.value.element, error.value.is_input) == (at, method == "cast")
    assert isinstance(error.value, ValueError)
    value = 99840 if at == THREADED - 1 else -70144
    text = f"element {at} is {value}, but the largest number in float16 is 65504"
    assert text in str(error.value)
    passed = run(name, sources, base, out_dtype="F16", check_overflow=False, **o)
    assert np.isinf(as_float(passed, "F16")[at])
    for wide in ("BF16", "F32"):
        assert np.isfinite(as_float(run(name, sources, base, out_dtype=wide, **o), wide)).all()


def test_a_nan_is_reported_before_a_number_too_large() -> None:
    x = tensor(np.array([70000.0, np.nan], np.float32), "F32")
    y = tensor(np.ones(2, np.float32), "F32")
    with pytest.raises(_C.NanError):
        run("linear", [x, y], out_dtype="F16")
    with pytest.raises(_C.RangeError, match="element 0 is 70001"):
        run("linear", [x, y], out_dtype="F16", check_nan=False)
    got = as_float(run("linear", [y], out_dtype="F16"), "F16")
    assert got.tolist() == [1.0, 1.0]


ONE = np.ones(4, np.float32)


@pytest.mark.parametrize(
    ("method", "n_sources", "with_base", "options", "message"),
    [
        ("lineer", 1, False, {}, "lineer.*linear, task_arithmetic"),
        ("linear", 0, False, {}, "1 to 16 sources"),
        ("linear", 17, False, {}, "1 to 16 sources"),
        ("linear", 1, False, {"density": 0.5}, "linear has no parameter 'density'"),
        ("linear", 1, True, {}, "no base"),
        ("slerp", 2, True, {}, "no base"),
        ("slerp", 3, False, {}, "exactly 2"),
        ("slerp", 2, False, {}, "slerp needs a value for t"),
        ("nearswap", 1, True, {}, "nearswap needs a value for t"),
        ("ties", 1, False, {}, "needs a base"),
        ("task_arithmetic", 1, False, {}, "needs a base"),
        ("linear", 2, False, {"weights": [1.0]}, "weights: 1 values for 2"),
        ("linear", 2, False, {"weights": [1.0, float("nan")]}, r"weights\[1\]"),
        ("linear", 2, False, {"weights": [1.0, 1e300]}, r"weights\[1\]"),
        ("linear", 2, False, {"weights": [1.0, -1.0], "normalize": True}, "add up to zero"),
        ("ties", 1, True, {"density": [1.5]}, r"density\[0\]"),
        ("ties", 1, True, {"density": [0.5, 0.5]}, "density: 2 values for 1"),
        ("ties", 1, True, {"parameters": {"lambda": float("inf")}}, "lambda is inf"),
        ("slerp", 2, False, {"t": float("nan")}, "t is"),
        ("linear", 1, False, {"threads": -1}, "threads"),
        ("linear", 1, False, {"out_dtype": "I32"}, "out_dtype is I32"),
        ("linear", 1, False, {"out_dtype": "f32"}, "unknown dtype 'f32'"),
    ],
)
def test_wrong_arguments(
    method: str, n_sources: int, with_base: bool, options: dict[str, Any], message: str
) -> None:
    base = tensor(ONE, "F32") if with_base else None
    with pytest.raises(ValueError, match=message):
        run(method, [tensor(ONE, "F32")] * n_sources, base, **options)


def test_wrong_tensors_and_ranges() -> None:
    a, b = tensor(ONE, "F32"), tensor(np.ones(5, np.float32), "F32")
    with pytest.raises(ValueError, match=r"sources\[1\] has 5 elements"):
        run("linear", [a, b])
    with pytest.raises(ValueError, match="base has 5"):
        run("ties", [a], b)
    with pytest.raises(ValueError, match=r"sources\[0\] is I64"):
        run("linear", [_C.Buffer(32).tensor(0, (4,), "I64")])
    merge = _C.Merge("linear", [a, a], out_dtype="BF16")
    out = _C.Buffer(9)
    for begin, count, offset in [(-1, 1, 0), (0, -1, 0), (0, 5, 0), (3, 2, 0), (5, 0, 0)]:
        with pytest.raises(ValueError, match="do not lie within 4"):
            merge.run(begin, count, out, offset)
    for count, offset in [(4, 2), (1, -1), (1, 8), (0, 10)]:
        with pytest.raises(ValueError, match="do not lie within 9 bytes"):
            merge.run(0, count, out, offset)
    merge.run(4, 0, out, 9)
    merge.run(0, 4, out, 1)
    written = np.frombuffer(memoryview(out), np.uint8)[1:].copy()
    assert as_float(written, "BF16").tolist() == [1.0] * 4


def test_the_output_may_not_be_an_input() -> None:
    buffer = _C.Buffer(64)
    merge = _C.Merge("linear", [buffer.tensor(0, (8,), "F32")], out_dtype="F32")
    merge.run(0, 8, buffer, 32)
    with pytest.raises(ValueError, match="overlaps"):
        merge.run(0, 8, buffer, 31)


def test_flush_to_zero_in_the_caller_does_not_matter() -> None:
    import torch

    x, _ = sample(np.random.default_rng(0), 2, 2000)
    sources = [tensor(row, "F32") for row in x]
    want = run("linear", sources, weights=[0.5, 0.25])
    try:
        torch.set_flush_denormal(True)
        got = run("linear", sources, weights=[0.5, 0.25])
    finally:
        torch.set_flush_denormal(False)
    assert np.array_equal(got, want)


@pytest.mark.parametrize("method", METHODS)
def test_a_factor_multiplies_the_result_before_it_is_rounded(method: str) -> None:
    rng = np.random.default_rng(5)
    x, base = sample(rng, 2, 1025)
    used = None if method in ("linear", "slerp") else tensor(base, "F32")
    sources = [tensor(row, "F32") for row in x]
    o = {"t": 0.4} if method == "slerp" else {}
    plain = as_float(run(method, sources, used, out_dtype="F32", parameters=o), "F32")
    raw = run(method, sources, used, out_dtype="BF16", parameters=o, factor=0.3)
    scaled = as_float(raw, "BF16")
    np.testing.assert_array_equal(scaled, rounded(np.float32(0.3) * plain, "BF16"))
