"""How much memory a worker needs: what is known from headers and configuration, without a model.

Weights are exact. Activations and logits are estimates for one forward pass: a layer's inputs and
the inside of its widest part, and the logits with their log-softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gptailor.errors import ResourceError
from gptailor.evaluation.forward_dtype import ROOM
from gptailor.evaluation.spread import gib, layer_ranges, place_layers
from gptailor.models.architecture import text_config
from gptailor.models.candidate import Candidate
from gptailor.models.checkpoint import DTYPE_BITS, FLOAT_DTYPES
from gptailor.models.family import Family
from gptailor.recipe import DTYPES

CACHED_MODELS = 8
"""Merged layers are kept up to this many times the base, where there is memory for it."""


@dataclass(frozen=True)
class Footprint:
    """Bytes that a worker of a family needs.

    Attributes:
        candidates: name → weights as they lie on disk.
        layers: each source layer of one candidate, in the type of the forward pass.
        outside: embeddings, final norm and head of one candidate, in that type.
        activations: inside a layer, for the largest batch.
        logits: of the largest batch.
        is_cast: files have another type than the forward pass. Then a worker's start needs memory
            for the dense model; else it maps the file, which needs none.
    """

    candidates: dict[str, int]
    layers: tuple[int, ...]
    outside: int
    activations: int
    logits: int
    is_cast: bool

    @property
    def model(self) -> int:
        """The dense model in the type of the forward pass."""
        return sum(self.layers) + self.outside

    @property
    def held(self) -> int:
        """The most that one recipe holds: a model, whose final norm may be another candidate's than
        its head, and comes with that one's head."""
        return sum(self.layers) + self.outside * min(2, len(self.candidates))

    @property
    def resident(self) -> int:
        """All candidates in the type of the forward pass."""
        return self.model * len(self.candidates)

    @property
    def largest_merge(self) -> int:
        """What is read for one merged layer."""
        return max(self.layers) * len(self.candidates)

    def needed_at_once(self) -> int:
        """The least that weights need on a GPU: a model, and what is read for one merge."""
        return self.model + self.largest_merge

    def cast_room(self, free_bytes: int, workers: int) -> int:
        """What a worker on the CPU keeps of the candidates in the type of the forward pass, where
        that is not the files': at least what a recipe needs, the rest is cast again when needed.

        Args:
            free_bytes: memory that the machine's programs can still take.
            workers: that share the machine.
        """
        if not self.is_cast:
            return 0
        return min(self.resident, max(self.held, int(ROOM * free_bytes) // workers))

    def merged_cache(self, memory_bytes: int, workers: int) -> int:
        """What merged layers may keep of a device's memory that `workers` share."""
        base = next(iter(self.candidates.values()))
        return min(CACHED_MODELS * base, memory_bytes // (8 * workers))


def find_footprint(family: Family, dtype: str, *, batch_tokens: int, logits: int) -> Footprint:
    """The footprint of a family.

    Args:
        family: the opened candidates.
        dtype: of the forward pass.
        batch_tokens: of the largest batch, padding included.
        logits: rows of the vocabulary's width that a batch gives at most.
    """
    item = DTYPE_BITS[DTYPES[dtype]] // 8

    def n_bytes(names: Any, candidate: Candidate = family.base) -> int:
        infos = [candidate.tensors[name] for name in names]
        return sum(i.n_elements * item if i.dtype in FLOAT_DTYPES else i.n_bytes for i in infos)

    architecture = family.architecture
    text = text_config(family.base.config)
    hidden, inner = _widths(text)
    vocabulary = int(text.get("vocab_size") or 0)
    base_first = sorted(family.candidates, key=lambda name: name != family.base_name)
    return Footprint(
        candidates={
            name: sum(t.n_bytes for t in family.candidates[name].tensors.values())
            for name in base_first
        },
        layers=tuple(n_bytes(layer.values()) for layer in architecture.layers),
        outside=sum(
            max(n_bytes(end, candidate) for candidate in family.candidates.values())
            for end in (architecture.embeddings, architecture.head)
        ),
        activations=batch_tokens * (6 * hidden + 3 * inner) * item,
        logits=3 * logits * vocabulary * item,
        is_cast=any(
            info.dtype in FLOAT_DTYPES and DTYPES[dtype] != info.dtype
            for candidate in family.candidates.values()
            for info in candidate.tensors.values()
        ),
    )


def held_bytes(family: Family) -> Callable[[str], int]:
    """Type of the forward pass → `Footprint.held`, without activations and logits."""
    return lambda dtype: find_footprint(family, dtype, batch_tokens=0, logits=0).held


def _widths(text: Mapping[str, Any]) -> tuple[int, int]:
    """Hidden size, and that of the widest part of a layer."""
    hidden = next((text[k] for k in ("hidden_size", "n_embd", "d_model") if text.get(k)), 0)
    inner = next((text[k] for k in ("intermediate_size", "n_inner", "ffn_dim") if text.get(k)), 0)
    return int(hidden), int(inner or 4 * hidden)


def weights_budget(free: int, total: int, kept_bytes: int, workers: int) -> int:
    """What candidates may have on a GPU: a worker's share of what is free, less headroom.

    Args:
        free: bytes that nobody has.
        total: bytes of the GPU.
        kept_bytes: what merged layers may take beside them.
        workers: how many share the GPU.
    """
    share = min(free, total // workers)
    headroom = max(share // 8, min(2 << 30, share // 4))  # activations, logits, the allocator
    return max(0, share - headroom - kept_bytes)


@dataclass(frozen=True)
class GpuPart:
    """What one GPU of a worker holds.

    Attributes:
        gpu: its index among the worker's.
        first_layer, end_layer: half-open range of source layers.
        n_bytes: of one model, in the type of the forward pass.
    """

    gpu: int
    first_layer: int
    end_layer: int
    n_bytes: int


@dataclass(frozen=True)
class GpuPlan:
    """How a worker's GPUs are used.

    Attributes:
        parts: which GPU holds what; one part: the model is not spread.
        budget: what weights may have on each GPU, in bytes.
        cache: what merged layers may have on each GPU, in bytes.
        all_stay: every candidate fits; else the layers that are used most stay, and the others are
            read again each time.
    """

    parts: tuple[GpuPart, ...]
    budget: int
    cache: int
    all_stay: bool


def plan_gpus(footprint: Footprint, gpu_bytes: int, num_gpus: int) -> GpuPlan:
    """Uses one GPU as long as a model fits there, else all of them.

    Args:
        footprint: of the family.
        gpu_bytes: memory of each of the worker's GPUs.
        num_gpus: that the worker has.

    Raises:
        ResourceError: the model does not fit on all of them together.
    """
    cache = footprint.merged_cache(gpu_bytes, 1)
    budget = weights_budget(gpu_bytes, gpu_bytes, cache, 1)
    if footprint.needed_at_once() <= budget or footprint.resident <= budget:
        whole = GpuPart(0, 0, len(footprint.layers), footprint.model)
        return GpuPlan((whole,), budget, cache, footprint.resident <= budget)
    free = [budget - footprint.largest_merge] * num_gpus
    if min(free) <= 0:
        raise ResourceError(
            f"One merge reads {gib(footprint.largest_merge)} GiB, but weights may have "
            f"{gib(budget)} GiB on a GPU: use larger GPUs."
        )
    placement = place_layers(footprint.layers, footprint.outside, free)
    parts = []
    for gpu, layers in layer_ranges(placement).items():
        n_bytes = sum(footprint.layers[layer] for layer in layers)
        n_bytes += footprint.outside if gpu == 0 else 0
        parts.append(GpuPart(gpu, layers.start, layers.stop, n_bytes))
    fullest = max(part.n_bytes for part in parts)
    all_stay = fullest * len(footprint.candidates) <= budget
    return GpuPlan(tuple(parts), budget, cache, all_stay)
