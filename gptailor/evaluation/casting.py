"""Tensors cast to the type of a forward pass: float16 must be able to hold them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gptailor.errors import ModelError


def cast(
    tensors: Sequence[torch.Tensor], dtype: torch.dtype, names: Sequence[str]
) -> list[torch.Tensor]:
    """The floating point tensors among some in another type; the others as they are.

    What is infinite stays so. Looks at the numbers where float16 takes the place of a wider type,
    which waits for a GPU once.

    Args:
        tensors: on one device.
        dtype: the type.
        names: of the tensors, for the error.

    Raises:
        ModelError: a finite number is too large for float16.
    """
    result = [t.to(dtype) if t.is_floating_point() else t for t in tensors]
    if dtype is torch.float16:
        wide = [n for n, t in enumerate(tensors) if t.is_floating_point() and t.dtype != dtype]
        found = [result[n].isinf().any() for n in wide]
        if found and torch.stack(found).any():
            for n in wide:
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
