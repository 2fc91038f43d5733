"""The ends of a family: which candidates have the same embeddings, and which the same head.

Finetuning with adapters leaves both unchanged; full finetuning changes them. Names and shapes don't
tell, so the tensors themselves are compared, piece by piece and up to the first difference.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptailor.models.candidate import Candidate
from gptailor.models.checkpoint import (
    DTYPE_BITS,
    FLOAT_DTYPES,
    Checkpoint,
    TensorInfo,
    read_error,
)

_PIECE = 4 << 20
"""How many elements are compared at once: 16 MiB of float32."""

_QUICK_BYTES = 2_000_000_000


@dataclass(frozen=True)
class Ends:
    """For each candidate, the first one that has the same end; the base comes first.

    Attributes:
        embeddings: candidate → the one that represents it.
        head: the same for final norm and output head.
    """

    embeddings: Mapping[str, str]
    head: Mapping[str, str]

    @classmethod
    def equal(cls, models: Sequence[str], base: str) -> Ends:
        """The ends of candidates that all have the base's embeddings and head."""
        return cls(dict.fromkeys(models, base), dict.fromkeys(models, base))

    @property
    def are_equal(self) -> bool:
        """True if all candidates have the same embeddings and the same head."""
        return all(len(set(end.values())) == 1 for end in (self.embeddings, self.head))


def announcements(candidates: Collection[Candidate]) -> list[str]:
    """What to tell the user before a long `find_ends`; nothing if it will be quick."""
    n_bytes = sum(
        c.tensors[name].n_bytes
        for c in candidates
        for name in (*c.architecture.embeddings, *c.architecture.head)
    )
    if n_bytes < _QUICK_BYTES or len(candidates) == 1:
        return []
    return [f"Comparing the models' embeddings and heads, at most {n_bytes / 1e9:.0f} GB."]


def find_ends(candidates: Mapping[str, Candidate], base: Candidate) -> Ends:
    """Compares the candidates' tensors outside the layers, in constant memory.

    Types may differ as long as the values are the same.

    Args:
        candidates: name → candidate, of one family.
        base: one of them.

    Raises:
        ModelError: a file can't be read, or has changed.
    """
    ends = base.architecture.embeddings, base.architecture.head
    return Ends(*(_stand_ins(candidates, base, names) for names in ends))


def _stand_ins(
    candidates: Mapping[str, Candidate], base: Candidate, names: Sequence[str]
) -> dict[str, str]:
    small_first = sorted(names, key=lambda name: base.tensors[name].n_bytes)
    base_first = sorted(candidates, key=lambda model: candidates[model] is not base)
    found: dict[str, str] = {}
    for model in base_first:
        for other in dict.fromkeys(found.values()):
            pair = candidates[model].checkpoint, candidates[other].checkpoint
            if all(_are_equal(*pair, name) for name in small_first):
                found[model] = other
                break
        else:
            found[model] = model
    return {model: found[model] for model in candidates}


def _are_equal(first: Checkpoint, second: Checkpoint, name: str) -> bool:
    """Whether a tensor has the same shape and values in both checkpoints."""
    infos = first.tensors[name], second.tensors[name]
    if infos[0].shape != infos[1].shape:
        return False
    same_type = infos[0].dtype == infos[1].dtype
    if not same_type and not {info.dtype for info in infos} <= set(FLOAT_DTYPES):
        return False
    total = infos[0].n_elements
    for begin in range(0, total, _PIECE):
        count = min(_PIECE, total - begin)
        mine, theirs = (
            _read(checkpoint, info, begin, count)
            for checkpoint, info in zip((first, second), infos, strict=True)
        )
        if same_type:
            equal = mine == theirs
        else:
            equal = bool((_values(mine, infos[0]) == _values(theirs, infos[1])).all())
        if not equal:
            return False
    return True


def _read(checkpoint: Checkpoint, info: TensorInfo, begin: int, count: int) -> bytes:
    """The bytes of elements [begin, begin + count)."""
    item = DTYPE_BITS[info.dtype] // 8
    try:
        return checkpoint.file(info.path).read(info.offset + begin * item, count * item)
    except OSError as error:
        raise read_error(error, info.path) from error


def _values(data: bytes, info: TensorInfo) -> Any:
    """The elements as float32, which represents all mergeable types exactly."""
    import numpy as np

    if info.dtype == "BF16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, {"F16": np.float16, "F32": np.float32}[info.dtype]).astype("f4")
