"""The dtype of evaluations: chosen once per run, by what its machines compute fast.

A recipe has a dtype of its own, to which its weights are rounded; this is the dtype in which the
model computes with them. On a CPU without bfloat16 instructions, torch multiplies bfloat16 matrices
several times slower than float32 ones (benchmarks/README.md), and float16 is slow on every CPU. So
with `evaluation.dtype: auto` such machines compute in float32, which takes more memory and is more
exact.

Nothing here needs torch, except to find out whether there is a GPU.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from gptailor.errors import plain
from gptailor.evaluation.device_memory import available_bytes
from gptailor.evaluation.memory_policy import ROOM

PRECISE = "float32"

_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""Linux's names, on x86 (Cooper Lake, Sapphire Rapids, Zen 4) and on Arm (Neoverse V1)."""

_ISA_WITH_BFLOAT16 = ("BF16", "AMX", "FP16", "AVX10", "ALL", "DEFAULT")
"""Parts of the oneDNN ISA names that allow bfloat16 instructions."""


@dataclass(frozen=True)
class Ability:
    """What a machine offers for evaluations, as seen by one worker on it.

    Attributes:
        node: the machine's name.
        device: "cpu" or "cuda".
        slow: keys of `DTYPES` that take much longer there than float32.
        free_bytes: memory that all programs on it together can still take.
    """

    node: str
    device: str
    slow: tuple[str, ...]
    free_bytes: int


@dataclass(frozen=True)
class Choice:
    """The dtype of a run.

    Attributes:
        dtype: a key of `DTYPES`.
        sentence: tells the user which it is, and why.
        is_slow: some machine takes much longer with it than with float32.
    """

    dtype: str
    sentence: str
    is_slow: bool = False


def find_ability(device: str) -> Ability:
    """What this machine offers on a configuration's `device`; imports torch for "auto" only."""
    on_cpu = is_cpu(device)
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    return Ability(
        node, "cpu" if on_cpu else "cuda", slow_dtypes() if on_cpu else (), available_bytes()
    )


def is_cpu(device: str) -> bool:
    """Whether a configuration's `device` is the CPU on this machine."""
    if device != "auto":
        return device == "cpu"
    import torch

    return not torch.cuda.is_available()


def slow_dtypes() -> tuple[str, ...]:
    """Keys of `DTYPES` that this machine's processor computes much slower than float32."""
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL"
    allowed = any(part in isa.upper() for part in _ISA_WITH_BFLOAT16)
    if allowed and _BFLOAT16_FLAGS & cpu_flags():
        return ("float16",)
    return ("bfloat16", "float16")


@cache
def cpu_flags() -> frozenset[str]:
    """The CPU's feature flags as Linux names them; empty if they are unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    words = (line.partition(":") for line in lines)
    found = (value for key, _, value in words if key.strip() in ("flags", "Features"))
    return frozenset(next(found, "").split())


def choose(
    wanted: str,
    recipes: str,
    abilities: Sequence[Ability],
    held_bytes: Callable[[str], int],
    kept: str | None = None,
    whose: str = "the recipes'",
) -> Choice:
    """Chooses the dtype of all evaluations of a run.

    Args:
        wanted: `evaluation.dtype`: a key of `DTYPES`, or "auto".
        recipes: the recipes' own dtype.
        abilities: one for each worker.
        held_bytes: dtype → the least memory for candidates that a worker on the CPU needs.
        kept: the dtype that the run started with; None for a new run.
        whose: how the sentence names the owner of the recipes' dtype.
    """
    dtype = wanted if wanted != "auto" else kept or recipes
    slow = _names(abilities, dtype)
    if wanted != "auto":
        better = choose("auto", recipes, abilities, held_bytes).dtype if slow else wanted
        hint = ", which evaluation.dtype: auto chooses" if better == PRECISE else ""
        return _choice(dtype, "as set by evaluation.dtype", slow, hint)
    if kept is not None:
        return _choice(dtype, "as when the run started", slow)
    if not slow:
        return _choice(dtype, f"{whose} type")
    crowded = _too_small(abilities, held_bytes(PRECISE))
    if crowded is None:
        return _choice(PRECISE, f"as {_lacks(slow, dtype)}")
    needed = f"{held_bytes(PRECISE) / 1e9:.1f} GB for each worker"
    why = f"{whose} type, as {PRECISE} needs {needed}, which {crowded} does not have"
    return _choice(dtype, why, slow)


def _choice(dtype: str, why: str, slow: str = "", hint: str = "") -> Choice:
    text = f"Evaluations are computed in {dtype}, {why}"
    if slow:
        text += f"; {_lacks(slow, dtype)}, so they take several times as long as in {PRECISE}{hint}"
    return Choice(dtype, f"{text}.", bool(slow))


def _lacks(nodes: str, dtype: str) -> str:
    if dtype == "float16":
        return f"the CPU of {nodes} is slow at float16, as every CPU is"
    return f"the CPU of {nodes} has no instructions for {dtype}"


def _names(abilities: Sequence[Ability], dtype: str) -> str:
    """The machines that are slow in a dtype, for a sentence; empty if there are none."""
    names = list(dict.fromkeys(a.node for a in abilities if dtype in a.slow))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(plain(name, 60) for name in names[:3]) + more


def _too_small(abilities: Sequence[Ability], held_bytes: int) -> str | None:
    """A machine without memory for that many bytes per worker; None if all have enough."""
    for node in dict.fromkeys(a.node for a in abilities if a.device == "cpu"):
        here = [a for a in abilities if a.node == node]
        if len(here) * held_bytes > ROOM * max(a.free_bytes for a in here):
            return node
    return None
