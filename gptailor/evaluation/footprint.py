"""How much memory a worker needs, computed from headers and configuration without a model.

Weights are exact. Activations and logits are estimates for one forward pass: a layer's inputs and
the inside of its widest part, and the logits with their log-softmax. How a worker uses the memory
that it has is decided in `memory_policy`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gptailor.models.architecture import text_config
from gptailor.models.candidate import Candidate
from gptailor.models.checkpoint import DTYPE_BITS, FLOAT_DTYPES, TensorInfo
from gptailor.models.family import Family
from gptailor.recipe import DTYPES

ALIGNMENT = 256
"""Alignment of tensors within a block of a device's memory, in bytes."""


def padded(n_bytes: int) -> int:
    """The bytes that a tensor of this size takes in its block."""
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Blocks:
    """Bytes that weights take on a device, each tensor padded to `ALIGNMENT`.

    Attributes:
        num_candidates: how many models the family has.
        base: the base as stored on disk.
        layers: each source layer of one model, in the dtype of the forward pass.
        outside: embeddings, final norm and head of one model, in that dtype.
        read_layers: each source layer of all candidates together, in the dtypes of the files: what
            one merge reads.
        read_outside: embeddings, final norms and heads of all candidates, in those dtypes.
        copies: all tensors of all candidates that a worker casts, or first rounds to the recipe's
            dtype, in the dtype of the forward pass. Such copies are kept; other tensors are used
            as they are in the file.
    """

    num_candidates: int
    base: int
    layers: tuple[int, ...]
    outside: int
    read_layers: tuple[int, ...]
    read_outside: int
    copies: int = 0

    @property
    def model(self) -> int:
        """One model in the dtype of the forward pass."""
        return sum(self.layers) + self.outside

    @property
    def held(self) -> int:
        """The most that copies of one recipe take: one model with `outside` twice, because the
        final norm may be another candidate's than the head, and brings that candidate's head."""
        return sum(self.layers) + self.outside * min(2, self.num_candidates)

    @property
    def largest_merge(self) -> int:
        """The most bytes that are read for one merged layer."""
        return max(self.read_layers)

    @property
    def files(self) -> int:
        """All candidates in the dtypes of their files."""
        return sum(self.read_layers) + self.read_outside


@dataclass(frozen=True)
class Footprint:
    """Bytes that a worker of a family needs.

    Attributes:
        candidates: name → weights as stored on disk; the base first.
        layers: each source layer of one candidate, in the dtype of the forward pass.
        outside: embeddings, final norm and head of one candidate, in that dtype.
        activations: inside a layer, for the largest batch.
        logits: of the largest batch.
        is_cast: a worker needs copies of candidates, because their files have a different dtype
            from the forward pass or the recipes.
        blocks: the weights as laid out on a device.
    """

    candidates: dict[str, int]
    layers: tuple[int, ...]
    outside: int
    activations: int
    logits: int
    is_cast: bool
    blocks: Blocks

    @property
    def model(self) -> int:
        """The dense model in the dtype of the forward pass."""
        return sum(self.layers) + self.outside

    @property
    def resident(self) -> int:
        """All candidates in the dtype of the forward pass."""
        return self.model * len(self.candidates)


def find_footprint(
    family: Family, dtype: str, *, recipes: str, batch_tokens: int, logits: int
) -> Footprint:
    """The footprint of a family.

    Args:
        family: the opened candidates.
        dtype: of the forward pass.
        recipes: the dtype of the recipes.
        batch_tokens: tokens of the largest batch, padding included.
        logits: the most positions whose logits one batch computes.
    """
    item = DTYPE_BITS[DTYPES[dtype]] // 8
    text = text_config(family.base.config)
    hidden, inner = widths(text)
    vocabulary = int(text.get("vocab_size") or 0)
    base_first = sorted(family.candidates, key=lambda name: name != family.base_name)
    layers, outside = _one_model(family, dtype, lambda n_bytes: n_bytes)
    blocks = find_blocks(family, dtype, recipes)
    return Footprint(
        candidates={name: _file_bytes(family.candidates[name]) for name in base_first},
        layers=layers,
        outside=outside,
        activations=batch_tokens * (6 * hidden + 3 * inner) * item,
        logits=3 * logits * vocabulary * item,
        is_cast=blocks.copies > 0,
        blocks=blocks,
    )


def find_blocks(family: Family, dtype: str | None, recipes: str | None = None) -> Blocks:
    """The bytes that a family's weights take on a device.

    Args:
        family: the opened candidates.
        dtype: of the forward pass; None: that of the files.
        recipes: the dtype of the recipes; None: that of the forward pass.
    """
    architecture = family.architecture
    layers, outside = _one_model(family, dtype, padded)

    def read(names: Iterable[str]) -> int:
        return sum(
            padded(candidate.tensors[name].n_bytes)
            for name in names
            for candidate in family.candidates.values()
            if name in candidate.tensors
        )

    return Blocks(
        num_candidates=len(family.candidates),
        base=_file_bytes(family.base),
        layers=layers,
        outside=outside,
        read_layers=tuple(read(layer.values()) for layer in architecture.layers),
        read_outside=read(architecture.embeddings) + read(architecture.head),
        copies=0
        if dtype is None
        else sum(
            padded(_size(info, DTYPES[dtype]))
            for candidate in family.candidates.values()
            for info in candidate.tensors.values()
            if _is_cast(info, candidate, recipes or dtype, dtype)
        ),
    )


def held_bytes(family: Family) -> Callable[[str], int]:
    """A function from the dtype of the forward pass to `Blocks.held`."""
    return lambda dtype: find_blocks(family, dtype).held


def _one_model(
    family: Family, dtype: str | None, taken: Callable[[int], int]
) -> tuple[tuple[int, ...], int]:
    """Bytes of each source layer of the base, and of the largest embeddings and head.

    Args:
        family: the candidates.
        dtype: see `find_blocks`.
        taken: tensor size in bytes → the bytes that it takes.
    """

    def n_bytes(names: Iterable[str], candidate: Candidate = family.base) -> int:
        infos = [candidate.tensors[name] for name in names if name in candidate.tensors]
        return sum(taken(_size(info, _type(info, candidate, dtype))) for info in infos)

    architecture = family.architecture
    layers = tuple(n_bytes(layer.values()) for layer in architecture.layers)
    outside = sum(
        max(n_bytes(end, candidate) for candidate in family.candidates.values())
        for end in (architecture.embeddings, architecture.head)
    )
    return layers, outside


def _file_bytes(candidate: Candidate) -> int:
    return sum(info.n_bytes for info in candidate.tensors.values())


def _type(info: TensorInfo, candidate: Candidate, dtype: str | None) -> str:
    """A tensor's dtype in a model of the type `dtype`, as safetensors names it."""
    if dtype is None or info.dtype not in FLOAT_DTYPES:
        return info.dtype
    return "F32" if candidate.stays_precise(info, DTYPES[dtype]) else DTYPES[dtype]


def _size(info: TensorInfo, dtype: str) -> int:
    if info.dtype == dtype or info.dtype not in FLOAT_DTYPES:
        return info.n_bytes
    return info.n_elements * DTYPE_BITS[dtype] // 8


def _is_cast(info: TensorInfo, candidate: Candidate, recipes: str, dtype: str) -> bool:
    """Whether a tensor of a taken layer needs a copy instead of being used from its file."""
    if info.dtype not in FLOAT_DTYPES:
        return False
    return not info.dtype == _type(info, candidate, recipes) == DTYPES[dtype]


def widths(text: Mapping[str, Any]) -> tuple[int, int]:
    """The hidden size, and the width of a layer's widest part."""
    hidden = next((text[k] for k in ("hidden_size", "n_embd", "d_model") if text.get(k)), 0)
    inner = next((text[k] for k in ("intermediate_size", "n_inner", "ffn_dim") if text.get(k)), 0)
    return int(hidden), int(inner or 4 * hidden)
