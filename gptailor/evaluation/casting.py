"""Casts tensors to the dtype of a forward pass and checks that float16 can hold them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gptailor.errors import ModelError


def cast(
    tensors: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype], names: Sequence[str]
) -> list[torch.Tensor]:
    """Casts floating point tensors; returns other tensors unchanged.

    Infinities stay infinite. Where float16 replaces a wider type, the numbers are checked, which
    synchronizes with a GPU once.

    Args:
        tensors: all on one device.
        dtypes: a dtype for each tensor.
        names: a name for each tensor, for the error.

    Raises:
        ModelError: a finite number is too large for float16.
    """
    pairs = zip(tensors, dtypes, strict=True)
    result = [t.to(dtype) if t.is_floating_point() else t for t, dtype in pairs]
    narrowed = [
        n for n, t in enumerate(result) if t.dtype is torch.float16 and tensors[n].dtype != t.dtype
    ]
    if narrowed and torch.stack([result[n].isinf().any() for n in narrowed]).any():
        for n in narrowed:
            check_range(tensors[n], result[n], names[n])
    return result


def check_range(exact: torch.Tensor, rounded: torch.Tensor, name: str) -> None:
    """Raises a `ModelError` if a finite number became infinite."""
    lost = (rounded.isinf() & exact.isfinite()).flatten()
    if lost.any():
        place = int(lost.nonzero()[0])
        value = float(exact.flatten()[place])
        raise ModelError(
            f"{name}: element {place} is {value:g}, but the largest number in float16 is 65504: "
            "use dtype bfloat16."
        )


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, row by row, as a file has them."""
    flat = tensor.contiguous().reshape(-1).cpu()
    return flat.view(torch.uint8).numpy().data
