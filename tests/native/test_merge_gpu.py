"""The GPU against the CPU: the same bits, but for slerp, whose angle each computes itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from native_tools import TORCH, as_float, run

from gptailor import _C

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_C.cuda_device_count() == 0, reason="no CUDA device"),
]

# One list: empty, smaller than a vector, with a tail, several tiles, several reduction blocks.
SIZES = [0, 1, 7, 8, 1023, 8192, 8193, 70_001, 1_000_003]
OPTIONS = {
    "linear": {"normalize": True},
    "task_arithmetic": {"lambda": 0.7},
    "ties": {"lambda": 0.7, "normalize": True},
    "slerp": {"t": 0.3},
}


def inputs(n_sources: int, shift: int) -> tuple[list[list[torch.Tensor]], list[torch.Tensor]]:
    """Tensors of all types on the GPU, `shift` elements off their alignment."""
    g = torch.Generator().manual_seed(n_sources)
    kinds = list(TORCH.values())

    def one(n: int, kind: torch.dtype, like: torch.Tensor | None = None) -> torch.Tensor:
        t = torch.randn(n, generator=g)
        if like is not None:
            t = like.cpu().float() + 0.1 * t * (torch.rand(n, generator=g) > 0.1)
        return torch.cat([torch.zeros(shift), t]).to(kind).cuda()[shift:]

    bases = [one(n, kinds[i % 3]) for i, n in enumerate(SIZES)]
    sources = [
        [one(n, kinds[(i + s) % 3], bases[i]) for s in range(n_sources)]
        for i, n in enumerate(SIZES)
    ]
    return sources, bases


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "slerp", "copy"])
@pytest.mark.parametrize("out_dtype", list(TORCH))
@pytest.mark.parametrize("shift", [0, 1])
def test_a_list_of_tensors(method: str, out_dtype: str, shift: int) -> None:
    for n_sources in {"slerp": (2,), "copy": (1,)}.get(method, (1, 3, 16)):
        sources, bases = inputs(n_sources, shift)
        name = "linear" if method == "copy" else method
        o = dict(OPTIONS.get(method, {}))
        weights = [1.0] * n_sources
        if method == "copy":
            o["normalize"] = False
        elif method != "slerp":
            weights = np.linspace(0.2, 0.9, n_sources).tolist()
        if method == "ties":
            o["density"] = np.linspace(0.3, 1.0, n_sources).tolist()
        needs_base = method in ("task_arithmetic", "ties")
        outs = [torch.empty(n + 1, dtype=TORCH[out_dtype]).cuda()[shift : n + shift] for n in SIZES]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        _C.merge_cuda(
            name,
            outs,
            sources,
            bases if needs_base else None,
            weights=weights,
            parameters=o,
            stream=stream.cuda_stream,
        )
        stream.synchronize()
        for i, out in enumerate(outs):
            raw = run(
                name,
                [_C.Tensor.from_dlpack(t.cpu()) for t in sources[i]],
                _C.Tensor.from_dlpack(bases[i].cpu()) if needs_base else None,
                out_dtype=out_dtype,
                weights=weights,
                parameters=o,
            )
            got, want = out.cpu().float().numpy(), as_float(raw, out_dtype)
            if method == "slerp":
                np.testing.assert_allclose(got, want, rtol=2**-7, atol=1e-6)
            else:
                np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


def test_wrong_tensors() -> None:
    a = torch.zeros(4).cuda()
    with pytest.raises(ValueError, match=r"sources\[0\]\[0\] is not on a CUDA device"):
        _C.merge_cuda("linear", [a], [[a.cpu()]])
    with pytest.raises(ValueError, match="has 3 elements"):
        _C.merge_cuda("linear", [a], [[a[:3]]])
    with pytest.raises(ValueError, match="one entry for each tensor"):
        _C.merge_cuda("linear", [a, a], [[a]])
    with pytest.raises(ValueError, match="needs a base"):
        _C.merge_cuda("ties", [a], [[a]])
    with pytest.raises(BufferError, match="contiguous"):
        _C.merge_cuda("linear", [torch.zeros(4, 4).cuda().t()], [[torch.zeros(4, 4).cuda()]])
