"""A checkpoint: the safetensors files of one model folder, checked once at open, then read.

A file from the internet is untrusted: sizes, bounds, overlaps, holes, dtypes, duplicate keys and
the length of the header are checked before anything else is read, so later code needs no checks of
its own. Opening a checkpoint reads headers only. A file is opened for its weights when they are
first needed, and must not have changed since its header was read.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gptailor.errors import ModelError, unknown
from gptailor.models.untrusted import (
    check_no_pointer,
    is_file,
    open_regular,
    parse_json,
    read_bytes,
    read_up_to,
    shown,
)

if TYPE_CHECKING:
    from gptailor import _C

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors format itself."""

DTYPE_BITS: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip
FLOAT_DTYPES = ("BF16", "F16", "F32")
"""The types that can be merged and cast."""

IO_MODES = ("auto", "mmap", "pread", "direct")
"""How weights are read: mapped, with large reads, or around the page cache; see `_C.open_input`."""

_IO_VARIABLE = "GPTAILOR_IO"
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLES = (".bin", ".pth", ".pt", ".pkl", ".ckpt", ".bin.index.json")
_MAX_NAME = 500


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor is stored.

    Attributes:
        name: its key in the file.
        dtype: as safetensors names it, for example "BF16".
        shape: the sizes of its dimensions; empty for a scalar.
        path: the file.
        offset: of its first byte, from the start of the file.
        n_bytes: its length.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    n_bytes: int

    @property
    def n_elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


class Checkpoint:
    """All tensors of one model folder.

    Args:
        folder: a Hugging Face folder with `model.safetensors`, or shards with an index.
        io: one of `IO_MODES`; None for the value of the environment variable GPTAILOR_IO, or auto.

    Raises:
        ModelError: files are missing, truncated or corrupt; the message names file and tensor.
        UsageError: there is no such `io`.
    """

    def __init__(self, folder: str | Path, io: str | None = None) -> None:
        self.folder = Path(folder)
        self.tensors: dict[str, TensorInfo] = {}
        self._io = checked_io(io)
        self._found: dict[Path, _Identity] = {}
        self._opened: dict[Path, _C.InputFile] = {}
        index = self.folder / _INDEX
        if is_file(self.folder / _SINGLE):  # before the index, as transformers does
            self.tensors = self._header(self.folder / _SINGLE)
        elif is_file(index):
            self._open_shards(index)
        else:
            raise _no_weights(self.folder)
        self.files: tuple[Path, ...] = tuple(sorted({t.path for t in self.tensors.values()}))

    def _header(self, path: Path) -> dict[str, TensorInfo]:
        tensors, self._found[path] = _read_header(path)
        return tensors

    def _open_shards(self, index: Path) -> None:
        weight_map = _read_index(index)
        shards: dict[str, dict[str, TensorInfo]] = {}
        for name, shard in weight_map.items():
            if shard not in shards:
                path = self.folder / shard
                if not is_file(path):
                    raise ModelError(
                        f"{index} names the shard {shard} (for {name}), but {path} does not exist: "
                        "download the model again."
                    )
                shards[shard] = self._header(path)
            if name not in shards[shard]:
                raise ModelError(f"{index} puts {name} into {shard}, but that file lacks it.")
            self.tensors[name] = shards[shard][name]
        for shard, tensors in shards.items():
            for name in tensors:
                if weight_map.get(name) != shard:
                    raise ModelError(f"{self.folder / shard} holds {name}, which {index} lacks.")

    def tensor(self, name: str) -> _C.Tensor:
        """One tensor: a zero-copy view if its file is mapped; it keeps the file open.

        Raises:
            ModelError: the file can't be opened, or is no longer the one whose header was read.
        """
        return self.tensor_at(self.tensors[name])

    def tensor_at(self, info: TensorInfo) -> _C.Tensor:
        """Like `tensor`, for a tensor of any file that this checkpoint has opened or added."""
        return self.file(info.path).tensor(info.offset, info.shape, info.dtype)

    def is_equal(self, name: str, other: str) -> bool:
        """Whether two tensors have the same type, shape and bytes; raises as `tensor` does."""
        first, second = self.tensors[name], self.tensors[other]
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            return False
        try:
            with open_regular(first.path) as a, open_regular(second.path) as b:
                a.seek(first.offset)
                b.seek(second.offset)
                left = first.n_bytes
                while left > 0:
                    size = min(left, 1 << 22)
                    if read_up_to(a, size) != read_up_to(b, size):
                        return False
                    left -= size
        except OSError as error:
            raise read_error(error, first.path) from error
        return True

    def add_file(self, path: Path) -> None:
        """Adds another safetensors file, whose tensors are not the model's own."""
        self._header(path)

    def file(self, path: Path) -> _C.InputFile:
        """One of the checkpoint's files or of those added, opened once; raises as `tensor` does."""
        if path in self._opened:
            return self._opened[path]
        from gptailor import _C

        try:
            file = _C.open_input(str(path), self._io)
            found = _identity(os.fstat(file.fileno()))
        except OSError as error:
            raise ModelError(f"{path} can't be read: {error.strerror}.") from error
        if found != self._found[path]:
            raise _changed(path, shorter=found.n_bytes < self._found[path].n_bytes)
        self._opened[path] = file
        return file

    def check_intact(self) -> None:
        """Raises a `ModelError` if a file that weights were read from has changed.

        Bytes of a mapped file that was truncated read as zeros, so this must be called after
        reading through tensor views and before the result is used.
        """
        for path, file in self._opened.items():
            try:
                file.check_intact()
                if _identity(path.stat()) != self._found[path]:
                    raise _changed(path)
            except OSError as error:
                raise read_error(error, path) from error

    def fingerprint(self) -> list[list[Any]]:
        """[name, size in bytes, time of change in ns] of every file; changes if weights do."""
        stats = [(path.name, path.stat()) for path in self.files]
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def checked_io(io: str | None) -> str:
    """One of `IO_MODES`: the given one, the environment's, or auto.

    Raises:
        UsageError: there is no such mode.
    """
    place = "--io" if io is not None else _IO_VARIABLE
    mode = io if io is not None else os.environ.get(_IO_VARIABLE) or "auto"
    if mode not in IO_MODES:
        raise unknown("way to read", mode, IO_MODES, place)
    return mode


def read_error(error: OSError, path: Path | None = None) -> ModelError:
    """The `ModelError` for a failure to read weights; `path` is for errors that name no file."""
    named = path if error.filename is None else Path(os.fsdecode(error.filename))
    if error.errno in (errno.ESTALE, errno.ENOENT) and named is not None:
        return _changed(named)
    return ModelError(f"{named} can't be read: {error.strerror}.")


def _changed(path: Path, shorter: bool = False) -> ModelError:
    what = "became shorter" if shorter else "changed"
    return ModelError(
        f"{path} {what} after it was opened: start again, and leave it as it is until the end."
    )


class _Identity(NamedTuple):
    """What stays the same unless somebody writes to a file or replaces it."""

    device: int
    inode: int
    n_bytes: int
    changed_ns: int


def _identity(stat: os.stat_result) -> _Identity:
    return _Identity(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, in the order of their bytes.

    Raises:
        ModelError: the file violates the format in any way.
    """
    return _read_header(path)[0]


def _read_header(path: Path) -> tuple[dict[str, TensorInfo], _Identity]:
    try:
        with open_regular(path) as file:
            identity = _identity(os.fstat(file.fileno()))
            file_size = identity.n_bytes
            prefix = file.read(8)
            n_header = int.from_bytes(prefix, "little")
            if len(prefix) < 8:
                raise ModelError(
                    f"{path} is truncated: it has {file_size} bytes, but 8 are needed."
                )
            if n_header > MAX_HEADER_BYTES:
                check_no_pointer(prefix, path)
                raise ModelError(
                    f"{path} is not a safetensors file: it does not begin with the length of a "
                    f"header of at most {MAX_HEADER_BYTES:,} bytes."
                )
            if 8 + n_header > file_size:
                raise ModelError(
                    f"{path} is truncated: its header has {n_header} bytes, "
                    f"but the file has only {file_size}."
                )
            raw = read_up_to(file, n_header)
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror}.") from error
    header = parse_json(raw, path, "its header", unique=True)
    header.pop("__metadata__", None)
    tensors = [_tensor_info(name, entry, path, 8 + n_header) for name, entry in header.items()]
    tensors.sort(key=lambda t: (t.offset, t.offset + t.n_bytes))
    _check_layout(tensors, path, 8 + n_header, file_size)
    return {t.name: t for t in tensors}, identity


def _check_layout(tensors: Iterable[TensorInfo], path: Path, begin: int, file_size: int) -> None:
    """Tensors must lie end to end, from the header to the end of the file."""
    end = begin
    for tensor in tensors:
        if tensor.offset < end:
            raise ModelError(
                f"{path} is corrupt: the bytes of {tensor.name} overlap another tensor."
            )
        if tensor.offset > end:
            raise ModelError(
                f"{path} is corrupt: {tensor.offset - end} bytes before {tensor.name} belong to "
                "no tensor."
            )
        end = tensor.offset + tensor.n_bytes
    if end > file_size:
        raise ModelError(
            f"{path} is truncated: its tensors need {end} bytes, but it has {file_size}; "
            "download it again."
        )
    if end < file_size:
        raise ModelError(f"{path} is corrupt: {file_size - end} bytes follow its last tensor.")


def _tensor_info(name: str, entry: object, path: Path, data_begin: int) -> TensorInfo:
    def corrupt(what: str) -> ModelError:
        return ModelError(f"{path} is corrupt: {name} has {what}.")

    _check_name(name, path)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise corrupt("not exactly the keys dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise corrupt(f"the unknown dtype {shown(dtype)}")
    if not _is_sizes(shape):
        raise corrupt(f"the shape {shown(shape)}")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise corrupt(f"the data_offsets {shown(offsets)}")
    n_bytes = _product(shape) * DTYPE_BITS[dtype] // 8
    if offsets[1] - offsets[0] != n_bytes:
        raise corrupt(
            f"{offsets[1] - offsets[0]} bytes, but its shape {shown(shape)} and dtype {dtype} need "
            + (f"{n_bytes}" if n_bytes < 2**64 else "more than any file has")
        )
    return TensorInfo(name, dtype, tuple(shape), path, data_begin + offsets[0], n_bytes)


def _check_name(name: str, path: Path) -> None:
    """Refuses names that can't be shown in messages or are absurdly long."""
    if not name.isprintable() or len(name) > _MAX_NAME:
        raise ModelError(f"{path} is corrupt: {shown(name)} is not a valid tensor name.")


def _product(shape: list[int]) -> int:
    """The number of elements, capped at 2**64 so that no shape takes long."""
    if 0 in shape:
        return 0
    product = 1
    for size in shape:
        product = min(product * size, 2**64)
    return product


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**63 for n in value
    )


def _read_index(path: Path) -> Mapping[str, str]:
    data = parse_json(read_bytes(path, MAX_HEADER_BYTES), path, "it", unique=True)
    weight_map = data.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{path} has no weight_map.")
    for name, shard in weight_map.items():
        _check_name(name, path)
        beside = isinstance(shard, str) and shard.isprintable() and Path(shard).name == shard
        if not beside or shard in ("", "..") or len(shard) >= 256:
            raise ModelError(
                f"{path} names {shown(shard)} for {name}, which is not a file in the same folder."
            )
        if shard.endswith(_PICKLES):
            raise _pickle(path.parent, shard)
    return weight_map


def _no_weights(folder: Path) -> ModelError:
    if not folder.is_dir():
        return ModelError(f"The model folder {folder} does not exist.")
    pickles = sorted(path.name for path in folder.iterdir() if path.name.endswith(_PICKLES))
    if pickles:
        return _pickle(folder, pickles[0])
    return ModelError(f"{folder} holds neither {_SINGLE} nor {_INDEX}.")


def _pickle(folder: Path, name: str) -> ModelError:
    return ModelError(
        f"{folder} holds only {shown(name)[1:-1]}, a pickle that could run code and is never "
        "loaded: convert it with save_pretrained(..., safe_serialization=True)."
    )
