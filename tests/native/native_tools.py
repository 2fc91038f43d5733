"""Numpy arrays in and out of the extension, for the tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from gptailor import _C

TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
N_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
DTYPES = list(TORCH)

Parameters = Mapping[str, float | Sequence[float]]  # of a method, by name

# Unit roundoff: half the gap between 1 and the next number.
EPS = {"F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
# Half the smallest subnormal.
FLOOR = {"F32": 2.0**-150, "F16": 2.0**-25, "BF16": 2.0**-134}


def tensor(values: np.ndarray, dtype: str, shift: int = 0) -> _C.Tensor:
    """A copy of float32 values as a tensor of `dtype` that starts `shift` bytes off alignment."""
    t = torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(TORCH[dtype])
    raw = t.contiguous().view(torch.uint8).numpy().tobytes() if t.numel() else b""
    buffer = _C.Buffer(len(raw) + shift)
    memoryview(buffer)[shift:] = raw
    return buffer.tensor(shift, values.shape, dtype)


def values(t: _C.Tensor) -> np.ndarray:
    """A tensor's values as float32, which is exact."""
    return torch.utils.dlpack.from_dlpack(t).float().numpy().copy()


def run(
    method: str,
    sources: list[_C.Tensor],
    base: _C.Tensor | None = None,
    *,
    out_dtype: str = "F32",
    step: int | None = None,
    shift: int = 0,
    statistics: Sequence[_C.Tensor] = (),
    weights: Sequence[float] = (),
    factor: float = 1.0,
    row_length: int = 0,
    key: int = 0,
    check_nan: bool = True,
    check_overflow: bool = True,
    threads: int = 0,
    parameters: Parameters | None = None,
    **named: float | Sequence[float],
) -> np.ndarray:
    """The whole result as bytes, computed in slices of `step` elements.

    The method's parameters are given by name or in `parameters`. `linear` gives a sum, not a mean,
    unless `normalize` is given.
    """
    defaults = {"normalize": 0} if method == "linear" else {}
    merge = _C.Merge(
        method,
        sources,
        base,
        statistics=statistics,
        out_dtype=out_dtype,
        weights=weights,
        parameters={**defaults, **(parameters or {}), **named},
        factor=factor,
        row_length=row_length,
        key=key,
        check_nan=check_nan,
        check_overflow=check_overflow,
        threads=threads,
    )
    n, width = merge.n_elements, N_BYTES[out_dtype]
    out = _C.Buffer(n * width + shift)
    step = step or max(n, 1)
    for begin in range(0, n, step):
        merge.run(begin, min(step, n - begin), out, begin * width + shift)
    return np.frombuffer(memoryview(out), np.uint8)[shift:].copy()


def as_float(raw: np.ndarray, dtype: str) -> np.ndarray:
    if not raw.size:
        return np.zeros(0, np.float32)
    return torch.from_numpy(raw).view(TORCH[dtype]).float().numpy()


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values rounded once to `dtype` and back, by torch."""
    return torch.from_numpy(np.asarray(x, np.float32)).to(TORCH[dtype]).float().numpy()
