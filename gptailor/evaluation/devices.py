"""The devices of this machine as torch knows them."""

from __future__ import annotations

import torch

from gptailor.errors import UsageError


def pick_device(device: str) -> torch.device:
    """The torch device of a configuration's `device`.

    Raises:
        UsageError: it is no device, or not one of this machine.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
        torch.empty(1, device=picked)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"evaluation.device: {device!r} can't be used: {reason}") from error
    return picked


def all_gpus() -> list[torch.device]:
    """The GPUs that this process sees."""
    return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]


def is_out_of_memory(error: BaseException) -> bool:
    """True for whatever torch and Python raise when memory is exhausted."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)
