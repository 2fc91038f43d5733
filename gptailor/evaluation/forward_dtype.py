"""The type in which evaluations are computed: chosen once for a run, by what its machines do well.

Recipes have a type of their own, to which their weights are rounded; this is the type in which the
model computes with them. Where a processor has no instructions for bfloat16, torch multiplies its
matrices several times slower than those of float32 (benchmarks/README.md), and float16 is slow on
every processor. So without the user's word (`evaluation.dtype: auto`) such machines compute in
float32, which takes more memory and is the more exact.

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
from gptailor.evaluation.memory import available_bytes
from gptailor.evaluation.memory_policy import ROOM

PRECISE = "float32"

_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""As Linux calls them: of x86 (Cooper Lake, Sapphire Rapids, Zen 4), and of Arm (Neoverse V1)."""

_ISA_WITH_BFLOAT16 = ("BF16", "AMX", "FP16", "AVX10", "ALL", "DEFAULT")
"""Parts of the names by which oneDNN may be told to use bfloat16's instructions."""


@dataclass(frozen=True)
class Ability:
    """What a machine is for evaluations, as one worker on it finds.

    Attributes:
        node: its name.
        device: "cpu" or "cuda".
        slow: keys of `DTYPES` that take much longer there than float32.
        free_bytes: memory that its programs can still take, all of them together.
    """

    node: str
    device: str
    slow: tuple[str, ...]
    free_bytes: int


@dataclass(frozen=True)
class Choice:
    """The type of a run.

    Attributes:
        dtype: a key of `DTYPES`.
        sentence: which it is, and why.
        is_slow: a machine takes much longer with it than with float32.
    """

    dtype: str
    sentence: str
    is_slow: bool = False


def find_ability(device: str) -> Ability:
    """What this machine is for a configuration's `device`; imports torch for "auto" only."""
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
    """What the processor can do, in Linux's words; empty if that is not told."""
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
    """The type of all evaluations of a run.

    Args:
        wanted: `evaluation.dtype`: a key of `DTYPES`, or "auto".
        recipes: the recipes' own type.
        abilities: of each worker.
        held_bytes: of a type: what a worker on the CPU must hold of the candidates at least.
        kept: the type in which the run was begun; None for a new one.
        whose: the recipes, in words.
    """
    dtype = wanted if wanted != "auto" else kept or recipes
    slow = _names(abilities, dtype)
    if wanted != "auto":
        better = choose("auto", recipes, abilities, held_bytes).dtype if slow else wanted
        hint = ", which evaluation.dtype: auto chooses" if better == PRECISE else ""
        return _choice(dtype, "as evaluation.dtype says", slow, hint)
    if kept is not None:
        return _choice(dtype, "as the run began", slow)
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
    """The machines that are slow at a type; empty if none is."""
    names = list(dict.fromkeys(a.node for a in abilities if dtype in a.slow))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(plain(name, 60) for name in names[:3]) + more


def _too_small(abilities: Sequence[Ability], held_bytes: int) -> str | None:
    """A machine whose memory does not hold so much for each of its workers; None if all do."""
    for node in dict.fromkeys(a.node for a in abilities if a.device == "cpu"):
        here = [a for a in abilities if a.node == node]
        if len(here) * held_bytes > ROOM * max(a.free_bytes for a in here):
            return node
    return None
