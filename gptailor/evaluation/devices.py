"""The devices of this machine, as torch sees them."""

from __future__ import annotations

import gc

import torch

from gptailor.errors import UsageError


def pick_device(device: str) -> torch.device:
    """The torch device for a configuration's `device`.

    Raises:
        UsageError: it is not a device, or this machine doesn't have it.
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
    """Whether an error is one that torch or Python raises when memory is exhausted."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def give_back_memory() -> None:
    """Frees what models that are no longer used have left behind in this process, so that other
    processes can use it: models have reference cycles, and torch keeps freed memory of a GPU."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing if this process has not used a GPU
