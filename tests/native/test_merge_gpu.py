"""The GPU against the CPU, method by method: the same bits, except for methods that need sines.

Also run with the kernels on the CPU, by test_emulated_cuda.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gptailor import _C
from tests.native.native_tools import TORCH, as_float, run

EMULATED = _C.build_info()["cuda_version"] == "emulated"
DEVICE = "cpu" if EMULATED else "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_C.cuda_device_count() == 0, reason="no CUDA device"),
]

# One list of tensors: empty, smaller than a vector, with a tail, several tiles, several reduction
# blocks, more than a sample.
SIZES = [0, 1, 7, 8, 1023, 8192, 8193, 30_001] + ([] if EMULATED else [70_001, 1_000_003])
# method, sources, base?, parameters
CASES: list[tuple[str, int, bool, dict[str, Any]]] = [
    ("linear", 1, False, {"normalize": 0}),
    ("linear", 3, False, {"normalize": 1}),
    ("linear", 16, False, {"normalize": 0}),
    ("slerp", 2, False, {"t": 0.3}),
    ("nuslerp", 2, False, {}),
    ("nuslerp", 2, True, {"task_vectors": 1}),
    ("multislerp", 3, False, {}),
    ("multislerp", 6, True, {"task_vectors": 1, "normalize_weights": 0}),
    ("karcher", 4, False, {}),
    ("model_stock", 3, True, {}),
    ("stock", 2, True, {}),
    ("task_arithmetic", 3, True, {"lambda": 0.6, "normalize": 1}),
    ("task_arithmetic", 1, True, {}),
    ("ties", 3, True, {"density": [0.3, 0.5, 1.0], "lambda": 0.9}),
    ("ties", 2, True, {"density": 0.4, "rescale": 1, "normalize": 0}),
    ("ties", 2, True, {}),
    ("ties", 16, True, {"density": 0.01}),
    ("dare_linear", 3, True, {"density": 0.5, "seed": 7}),
    ("dare_linear", 2, True, {"density": [0.25, 1.0], "rescale": 0, "normalize": 1}),
    ("dare_linear", 2, True, {"density": [0.0, 0.3]}),
    ("dare_ties", 3, True, {"density": 0.7, "seed": 123456789}),
    ("breadcrumbs", 3, True, {"density": 0.8, "gamma": 0.1}),
    ("breadcrumbs", 1, True, {"density": 0.95, "gamma": 0.2, "rescale": 1}),
    ("breadcrumbs", 2, True, {"density": [0.0, 1.0], "gamma": 0.0}),
    ("breadcrumbs_ties", 3, True, {"density": [0.5, 0.7, 0.9], "gamma": 0.02}),
    ("ram", 3, True, {"epsilon": 0.05}),
    ("nearswap", 1, True, {"t": 0.08}),
]  # fmt: skip
SPHERES = {"slerp", "nuslerp", "multislerp", "karcher", "model_stock", "stock"}
ON_THE_CPU: list[tuple[str, int, bool, dict[str, Any]]] = [
    ("nuslerp", 2, False, {"nuslerp_flatten": 0}),
    ("model_stock", 2, True, {"filter_wise": 1}),
    ("della", 2, True, {"density": 0.5}),
    ("sce", 2, True, {}),
    ("arcee_fusion", 1, True, {}),
    ("widen", 2, True, {}),
]


def inputs(n_sources: int, shift: int) -> tuple[list[list[torch.Tensor]], list[torch.Tensor]]:
    """Tensors of all types on the GPU, `shift` elements off their alignment."""
    g = torch.Generator().manual_seed(n_sources)
    kinds = list(TORCH.values())

    def one(n: int, kind: torch.dtype, like: torch.Tensor | None = None) -> torch.Tensor:
        t = torch.randn(n, generator=g)
        if like is not None:
            t = like.cpu().float() + 0.1 * t * (torch.rand(n, generator=g) > 0.1)
        padded = torch.zeros(n + shift, dtype=kind, device=DEVICE)
        padded[shift:] = t.to(kind)
        return padded[shift:]

    bases = [one(n, kinds[i % 3]) for i, n in enumerate(SIZES)]
    sources = [
        [one(n, kinds[(i + s) % 3], bases[i]) for s in range(n_sources)]
        for i, n in enumerate(SIZES)
    ]
    return sources, bases


def stream() -> int:
    return 0 if EMULATED else torch.cuda.current_stream().cuda_stream


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}")
def test_a_list_of_tensors(case: tuple[str, int, bool, dict[str, Any]], shift: int) -> None:
    method, n_sources, with_base, parameters = case
    sources, bases = inputs(n_sources, shift)
    weights = [1.0] if n_sources == 1 else np.linspace(0.2, 0.9, n_sources).tolist()
    out_dtype = list(TORCH)[(len(method) + shift) % 3]
    keys = [99 + i for i in range(len(SIZES))]
    outs = [
        torch.full((n + 1,), 7, dtype=TORCH[out_dtype], device=DEVICE)[shift : n + shift]
        for n in SIZES
    ]
    found = torch.zeros((len(SIZES), 2), dtype=torch.int32, device=DEVICE)
    factor = 1.25 if shift else 1.0
    _C.merge_cuda(
        method,
        outs,
        sources,
        bases if with_base else None,
        keys=keys,
        found=found,
        stream=stream(),
        weights=weights,
        parameters=parameters,
        factor=factor,
    )
    assert not found.any()
    for i, out in enumerate(outs):
        if method == "multislerp" and SIZES[i] == 1:
            continue  # directions in one dimension may cancel
        raw = run(
            method,
            [_C.Tensor.from_dlpack(t.cpu()) for t in sources[i]],
            _C.Tensor.from_dlpack(bases[i].cpu()) if with_base else None,
            out_dtype=out_dtype,
            key=keys[i],
            weights=weights,
            parameters=parameters,
            factor=factor,
        )
        got, want = out.cpu().float().numpy(), as_float(raw, out_dtype)
        if method in SPHERES and not EMULATED:
            np.testing.assert_allclose(got, want, rtol=2**-7, atol=1e-6)
        else:
            np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32), str(SIZES[i]))


@pytest.mark.parametrize("values", ["equal", "two", "narrow", "aliased"])
@pytest.mark.parametrize("density", [0.001, 0.3, 0.5, 0.9999])
def test_thresholds_are_exact_whatever_the_sample(values: str, density: float) -> None:
    """Where the sample misleads, or many elements are equal."""
    n = 40_000 if EMULATED else 3_000_000
    g = torch.Generator().manual_seed(1)
    x = torch.rand(n, generator=g) + 1
    if values == "equal":
        x[:] = 0.25
    if values == "two":
        x = (x > 1.5).float()
    if values == "narrow":  # adjacent float32 numbers
        x = (x.view(torch.int32) & 1023 | 0x3F800000).view(torch.float32)
    if values == "aliased":  # large where the sample has few runs
        x = torch.arange(n, dtype=torch.float32) ** 2
        x[n // 2 :] = 0
    base = torch.zeros(n)
    out = torch.empty(n, device=DEVICE)
    told: dict[str, float] = {"density": density}
    _C.merge_cuda(
        "ties",
        [out],
        [[x.to(DEVICE)]],
        [base.to(DEVICE)],
        stream=stream(),
        weights=[1.0],
        parameters=told,
    )
    pair = _C.Tensor.from_dlpack(x), _C.Tensor.from_dlpack(base)
    want = run("ties", [pair[0]], pair[1], weights=[1.0], parameters=told)
    np.testing.assert_array_equal(out.cpu().numpy(), as_float(want, "F32"))


def test_nan_is_flagged() -> None:
    tensors = [torch.ones(n, device=DEVICE) for n in (5, 0, 20_000, 9)]
    bases = [torch.zeros_like(t) for t in tensors]
    tensors[2][19_999] = float("nan")
    tensors[3][0] = float("inf")
    bases[3][0] = float("inf")
    for method, parameters in [
        ("task_arithmetic", {}),
        ("ties", {"density": 0.5}),
        ("dare_ties", {"density": 0.5}),
        ("breadcrumbs", {"density": 0.9}),
        ("ram", {}),
        ("model_stock", {}),
    ]:
        n_sources = 2 if method == "model_stock" else 1
        found = torch.zeros((4, 2), dtype=torch.int32, device=DEVICE)
        outs = [torch.empty_like(t) for t in tensors]
        sources = [[t] * n_sources for t in tensors]
        _C.merge_cuda(
            method, outs, sources, bases, parameters=parameters, found=found, stream=stream()
        )
        assert found.tolist() == [[0, 0], [0, 0], [1, 0], [1, 0]], method
    with pytest.raises(ValueError, match="two I32 for each"):
        _C.merge_cuda("ram", [outs[0]], [[tensors[0]]], [bases[0]], found=found)


def test_numbers_too_large_for_float16_are_flagged() -> None:
    """For the same numbers as on the CPU, in merges and casts, at each position in a tile."""
    kinds = ["F16", "F16", "BF16", "F32", "F16", "F16"]
    values = [65519.0, -65520.0, 70000.0, 70000.0, float("inf"), 99840.0]
    places = [3, 19_999, 5, 6, 7, 0]
    for method, n_sources, with_base in (("linear", 1, False), ("task_arithmetic", 1, True)):
        sources = [torch.ones(20_000, device=DEVICE) for _ in kinds]
        for tensor, value, place in zip(sources, values, places, strict=True):
            tensor[place] = value
        outs = [torch.empty(20_000, dtype=TORCH[kind], device=DEVICE) for kind in kinds]
        bases = [torch.zeros(20_000, device=DEVICE) for _ in kinds] if with_base else None
        found = torch.zeros((len(kinds), 2), dtype=torch.int32, device=DEVICE)
        _C.merge_cuda(
            method,
            outs,
            [[t] * n_sources for t in sources],
            bases,
            parameters={"normalize": 0},
            found=found,
            stream=stream(),
        )
        assert found.tolist() == [[0, 0], [0, 1], [0, 0], [0, 0], [0, 0], [0, 1]], method


@pytest.mark.parametrize("case", ON_THE_CPU, ids=lambda c: c[0])
def test_methods_without_a_gpu_path(case: tuple[str, int, bool, dict[str, Any]]) -> None:
    method, n_sources, with_base, parameters = case
    a = torch.zeros(8, device=DEVICE)
    with pytest.raises(ValueError, match=rf"{method}.* has no GPU path"):
        _C.merge_cuda(
            method, [a], [[a] * n_sources], [a] if with_base else None, parameters=parameters
        )


def test_wrong_tensors() -> None:
    a = torch.zeros(4, device=DEVICE)
    if not EMULATED:
        with pytest.raises(ValueError, match=r"sources\[0\]\[0\] is not on a CUDA device"):
            _C.merge_cuda("linear", [a], [[a.cpu()]])
    with pytest.raises(ValueError, match="has 3 elements"):
        _C.merge_cuda("linear", [a], [[a[:3]]])
    with pytest.raises(ValueError, match="one entry for each tensor"):
        _C.merge_cuda("linear", [a, a], [[a]])
    with pytest.raises(ValueError, match="one entry for each tensor"):
        _C.merge_cuda("linear", [a], [[a]], keys=[1, 2])
    with pytest.raises(ValueError, match="needs a base"):
        _C.merge_cuda("ties", [a], [[a]])
    with pytest.raises(BufferError, match="contiguous"):
        _C.merge_cuda(
            "linear",
            [torch.zeros(4, 4, device=DEVICE).t()],
            [[torch.zeros(4, 4, device=DEVICE)]],
        )
