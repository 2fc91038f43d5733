"""Casts between the float types: every 16-bit pattern, and the float32 values between them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gptailor import _C
from tests.native.native_tools import TORCH, run

SIGNALLING = {"F16": 0x0200, "BF16": 0x0040}  # the quiet bit of a NaN


def holding(bits: np.ndarray, dtype: str) -> _C.Tensor:
    buffer = _C.Buffer(bits.nbytes)
    memoryview(buffer)[:] = bits.tobytes()
    return buffer.tensor(0, bits.shape, dtype)


def cast(bits: np.ndarray, dtype: str, out_dtype: str) -> np.ndarray:
    raw = run(
        "linear", [holding(bits, dtype)], out_dtype=out_dtype, check_nan=False, check_overflow=False
    )
    return raw.view(np.uint32 if out_dtype == "F32" else np.uint16)


def torch_cast(bits: np.ndarray, dtype: str, out_dtype: str) -> np.ndarray:
    t = torch.from_numpy(bits.view(np.int32 if dtype == "F32" else np.int16)).view(TORCH[dtype])
    out = t.to(TORCH[out_dtype]).view(torch.int32 if out_dtype == "F32" else torch.int16)
    return out.numpy().view(np.uint32 if out_dtype == "F32" else np.uint16)


def is_nan(bits: np.ndarray, dtype: str) -> np.ndarray:
    kind = np.int32 if dtype == "F32" else np.int16
    return torch.from_numpy(bits.view(kind)).view(TORCH[dtype]).isnan().numpy()


def assert_same(got: np.ndarray, want: np.ndarray, dtype: str) -> None:
    """Equal bit for bit, except that a NaN only has to be a NaN."""
    nan = is_nan(want, dtype)
    np.testing.assert_array_equal(is_nan(got, dtype), nan)
    np.testing.assert_array_equal(got[~nan], want[~nan])


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("out_dtype", ["F32", "F16", "BF16"])
def test_every_16_bit_pattern(dtype: str, out_dtype: str) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    got = cast(bits, dtype, out_dtype)
    if dtype == out_dtype:
        np.testing.assert_array_equal(got, bits)
        return
    assert_same(got, torch_cast(bits, dtype, out_dtype), out_dtype)
    top = 31 if out_dtype == "F32" else 15
    np.testing.assert_array_equal(got >> top, bits >> 15)


@pytest.mark.parametrize("out_dtype", ["F16", "BF16"])
def test_float32_is_rounded_to_nearest_even(out_dtype: str) -> None:
    every = np.arange(65536, dtype=np.uint16)
    exact = cast(every, out_dtype, "F32")
    halfway = np.concatenate([exact[:-1] // 2 + exact[1:] // 2 + (exact[:-1] & exact[1:] & 1)])
    bits = np.concatenate([exact, halfway, halfway - 1, halfway + 1, exact - 1, exact + 1])
    random = np.random.default_rng(0).integers(0, 2**32, 300_000, np.uint32)
    bits = np.concatenate([bits, random]).astype(np.uint32)
    assert_same(cast(bits, "F32", out_dtype), torch_cast(bits, "F32", out_dtype), out_dtype)
    if out_dtype == "F16":
        with np.errstate(all="ignore"):
            by_numpy = bits.view(np.float32).astype(np.float16).view(np.uint16)
        assert_same(cast(bits, "F32", "F16"), by_numpy, "F16")


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_arithmetic_with_weight_one_keeps_every_number(dtype: str) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    source = holding(bits, dtype)
    got = run(
        "linear", [source], out_dtype=dtype, weights=[1.0], normalize=True, check_nan=False
    ).view(np.uint16)
    assert_same(got, bits, dtype)
    np.testing.assert_array_equal(got[is_nan(bits, dtype)] & SIGNALLING[dtype], SIGNALLING[dtype])
