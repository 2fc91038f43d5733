"""Tensors cast to the type of a forward pass: float16 must be able to hold them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gptailor.errors import ModelError


def cast(
    tensors: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype], names: Sequence[str]
) -> list[torch.Tensor]:
    """Tensors in other types, if they are of floating point; the others as they are.

    What is infinite stays so. Looks at the numbers where float16 takes the place of a wider type,
    which waits for a GPU once.

    Args:
        tensors: on one device.
        dtypes: a type for each.
        names: of the tensors, for the error.

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
