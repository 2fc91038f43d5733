"""The layout: which tensor goes into which file of the result, and at which offset.

It depends on the plan, the size limit of a shard, and whether the file system of the result can
share blocks with the sources; never on threads or on how files are read.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gptailor.errors import UsageError
from gptailor.stitching.plan import OutTensor

MAX_SHARD_SIZE = "50GB"
"""The default of transformers 5."""
BLOCK = 4096
"""A page of memory, and a block of most file systems."""

_LEAST_SHARED = 16 << 20
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Range:
    """Bytes that are copied: [offset, offset + n_bytes) of `path` to `out_offset`."""

    path: Path
    offset: int
    out_offset: int
    n_bytes: int


@dataclass(frozen=True)
class Shard:
    """One file of the result.

    Attributes:
        name: the file's name.
        tensors: in the order of their bytes.
        header: everything before them.
        offsets: where each tensor begins, and finally where the file ends.
    """

    name: str
    tensors: tuple[OutTensor, ...]
    header: bytes
    offsets: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """The length of the file."""
        return self.offsets[-1]

    @property
    def copies(self) -> list[Range]:
        """The ranges to copy; neighbours in both source and result are joined."""
        return coalesced(self.tensors, self.offsets)


def parse_size(text: str) -> int:
    """The bytes of a size as transformers and mergekit write it: 5GB, 500MB, 2GiB, 1000000.

    Raises:
        UsageError: it is not a size, or not above zero.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B|)", text.strip(), re.IGNORECASE)
    n_bytes = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if n_bytes < 1:
        raise UsageError(f"{text!r} is not a file size: write it like 5GB, 500MB or 2GiB.")
    return n_bytes


def lay_out(
    tensors: Sequence[OutTensor],
    max_bytes: int,
    can_share: Callable[[Path], bool] = lambda path: False,
) -> list[Shard]:
    """Distributes tensors over files.

    Args:
        tensors: those of a plan, in its order.
        max_bytes: of the tensors in a file; a larger tensor gets a file of its own.
        can_share: whether the result can share blocks with a source file.

    Returns:
        One `model.safetensors`, or `model-00001-of-0000N.safetensors` and so on. If blocks can be
        shared, copies with the same alignment within a block are grouped into a file, and
        everything else follows; this makes a few more files, one for each such alignment.
    """
    groups: list[_Group] = []
    rest: list[OutTensor] = []
    for run in _runs(tensors, max_bytes):
        group = _group_for(run, groups, max_bytes) if _is_shared(run, can_share) else None
        (rest if group is None else group.tensors).extend(run)
    parts = [group.tensors for group in groups] + _cut(rest, max_bytes)
    if not any(parts):
        parts = [[]]
    n = len(parts)
    names = [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    if n == 1:
        names = ["model.safetensors"]
    return [_shard(name, tuple(part)) for name, part in zip(names, parts, strict=True)]


def index_text(shards: Sequence[Shard]) -> str:
    """The text of `model.safetensors.index.json` for several shards."""
    weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    total = sum(tensor.n_bytes for shard in shards for tensor in shard.tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2, ensure_ascii=False) + "\n"


def coalesced(tensors: Iterable[OutTensor], offsets: Sequence[int]) -> list[Range]:
    """The plain copies among `tensors`; neighbours in both source and result are joined."""
    ranges: list[Range] = []
    for tensor, out_offset in zip(tensors, offsets, strict=False):
        if not tensor.is_copy or tensor.n_bytes == 0:
            continue
        info = tensor.sources[0].info
        last = ranges[-1] if ranges else None
        if (
            last is not None
            and last.path == info.path
            and last.offset + last.n_bytes == info.offset
            and last.out_offset + last.n_bytes == out_offset
        ):
            joined = last.n_bytes + info.n_bytes
            ranges[-1] = Range(last.path, last.offset, last.out_offset, joined)
        else:
            ranges.append(Range(info.path, info.offset, out_offset, info.n_bytes))
    return ranges


@dataclass
class _Group:
    """A shard whose copies all keep their alignment within a block."""

    shift: int
    tensors: list[OutTensor] = field(default_factory=list)


def _runs(tensors: Sequence[OutTensor], max_bytes: int) -> list[list[OutTensor]]:
    """Splits tensors into runs of copies that are adjacent in one source, and single others."""
    runs: list[list[OutTensor]] = []
    end: tuple[Path, int] | None = None
    n_bytes = 0
    for tensor in tensors:
        info = tensor.sources[0].info
        begin = (info.path, info.offset) if tensor.is_copy else None
        if runs and begin == end and n_bytes + tensor.n_bytes <= max_bytes:
            runs[-1].append(tensor)
        else:
            runs.append([tensor])
            n_bytes = 0
        n_bytes += tensor.n_bytes
        end = (info.path, info.offset + info.n_bytes) if tensor.is_copy else None
    return runs


def _is_shared(run: list[OutTensor], can_share: Callable[[Path], bool]) -> bool:
    info = run[0].sources[0].info
    return (
        run[0].is_copy
        and info.offset % 8 == 0
        and sum(t.n_bytes for t in run) >= BLOCK
        and can_share(info.path)
    )


def _group_for(run: list[OutTensor], groups: list[_Group], max_bytes: int) -> _Group | None:
    """The shard in which the run keeps its alignment within a block; a new one for large runs."""
    offset = run[0].sources[0].info.offset
    n_bytes = sum(t.n_bytes for t in run)
    for group in groups:
        size = sum(t.n_bytes for t in group.tensors)
        if (offset - size - group.shift) % BLOCK == 0 and size + n_bytes <= max_bytes:
            return group
    if n_bytes < _LEAST_SHARED:
        return None
    groups.append(_Group(offset % BLOCK))
    return groups[-1]


def _cut(tensors: Iterable[OutTensor], max_bytes: int) -> list[list[OutTensor]]:
    parts: list[list[OutTensor]] = []
    n_bytes = 0
    for tensor in tensors:
        if not parts or n_bytes + tensor.n_bytes > max_bytes:
            parts.append([])
            n_bytes = 0
        parts[-1].append(tensor)
        n_bytes += tensor.n_bytes
    return parts


def _shard(name: str, tensors: tuple[OutTensor, ...]) -> Shard:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position, relative = 0, []
    for tensor in tensors:
        relative.append(position)
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.n_bytes],
        }
        position += tensor.n_bytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    begin = _data_begin(tensors, relative, 8 + len(text))
    text += b" " * (begin - 8 - len(text))
    offsets = tuple(begin + offset for offset in (*relative, position))
    return Shard(name, tensors, len(text).to_bytes(8, "little") + text, offsets)


def _data_begin(tensors: Sequence[OutTensor], relative: Sequence[int], least: int) -> int:
    """Where the data begins: a multiple of 8, at least `least`.

    Copies are fastest, and can share blocks, only if source and result have the same alignment
    within a page. So the header is padded (the format allows spaces) to achieve that for as many
    copied bytes as possible.
    """
    shifts: Counter[int] = Counter()
    for tensor, offset in zip(tensors, relative, strict=True):
        if tensor.is_copy:
            shifts[(tensor.sources[0].info.offset - offset) % BLOCK] += tensor.n_bytes
    shift = max(shifts, key=lambda s: (shifts[s], -s), default=0)
    if shift % 8:
        return least + -least % 8
    return least + (shift - least) % BLOCK
