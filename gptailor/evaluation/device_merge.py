"""Merging on a GPU: tensors of one layer that are merged the same way share one kernel launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from gptailor import _C
from gptailor.evaluation.device_weights import TORCH_DTYPES
from gptailor.evaluation.footprint import padded
from gptailor.merging.engine_table import check_engine
from gptailor.merging.registry import get_method
from gptailor.models.checkpoint import FLOAT_DTYPES
from gptailor.stitching.compute import merge_arguments
from gptailor.stitching.plan import OutTensor, Source


def can_merge(tensor: OutTensor) -> bool:
    """Whether a tensor of a plan is computed on the GPU."""
    method, arguments = merge_arguments(tensor)
    floats = all(s.info.dtype in FLOAT_DTYPES for s in tensor.sources)
    return get_method(method).runs_on_gpu(arguments["parameters"]) and floats


def merge_on_gpu(
    tensors: Sequence[OutTensor],
    handle: Callable[[Source], _C.DeviceTensor],
    device: torch.device,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Computes tensors of a plan on the current stream.

    Args:
        tensors: `can_merge` is true for each.
        handle: returns the GPU tensor of a source.
        device: the GPU; it is the current device.

    Returns:
        The results, in one block of memory; and flags, [tensor, 2] int32: the first is 1 if the
        result holds a NaN, the second if it holds a finite number too large for float16.
    """
    offsets, size = [], 0
    for tensor in tensors:
        offsets.append(size)
        size += padded(tensor.n_bytes)
    block = torch.empty(size, dtype=torch.uint8, device=device)
    flags = torch.zeros((len(tensors), 2), dtype=torch.int32, device=device)
    check_engine()
    whole = _C.DeviceTensor.from_dlpack(block)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    launches: dict[tuple[Any, ...], list[int]] = {}
    for number, tensor in enumerate(tensors):
        alike = (tensor.merge, tensor.factor, tensor.base is None)
        launches.setdefault(alike, []).append(number)
    order, launched = [n for numbers in launches.values() for n in numbers], 0
    for numbers in launches.values():
        some = [tensors[number] for number in numbers]
        method, arguments = merge_arguments(some[0])
        _C.merge_cuda(
            method,
            [whole.tensor(offsets[n], tensors[n].shape, tensors[n].dtype) for n in numbers],
            [[handle(source) for source in tensor.sources] for tensor in some],
            None if some[0].base is None else [handle(t.base) for t in some if t.base is not None],
            keys=[tensor.key for tensor in some],
            found=flags[launched : launched + len(numbers)],
            stream=stream,
            **arguments,
        )
        launched += len(numbers)
    results = [
        block[at : at + tensor.n_bytes].view(TORCH_DTYPES[tensor.dtype]).view(tensor.shape)
        for at, tensor in zip(offsets, tensors, strict=True)
    ]
    if order != sorted(order):
        flags = flags[torch.tensor(order, device=device).argsort()]
    return results, flags
