"""A checkpoint: the safetensors files of one model folder, checked once at open, then mapped.

A file from the internet is untrusted: sizes, bounds, overlaps, holes, dtypes, duplicate keys and
the length of the header are checked before anything else is read, so that whatever comes after
needs no checks of its own. Opening reads headers only; weights are mapped when first asked for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptailor.errors import ModelError

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
"""What can be merged and cast."""

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        name: its key in the file.
        dtype: as safetensors names it, for example "BF16".
        shape: sizes of its dimensions; empty for a scalar.
        path: the file.
        offset: of the first byte, from the start of the file.
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

    Raises:
        ModelError: files are missing, truncated or corrupt; the message names file and tensor.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.tensors: dict[str, TensorInfo] = {}
        self._mapped: dict[Path, _C.MappedFile] = {}
        index = self.folder / _INDEX
        if (self.folder / _SINGLE).is_file():  # before the index, as transformers does
            self.tensors = read_header(self.folder / _SINGLE)
        elif index.is_file():
            self._open_shards(index)
        else:
            raise _no_weights(self.folder)
        self.files: tuple[Path, ...] = tuple(sorted({t.path for t in self.tensors.values()}))

    def _open_shards(self, index: Path) -> None:
        weight_map = _read_index(index)
        shards: dict[str, dict[str, TensorInfo]] = {}
        for name, shard in weight_map.items():
            if shard not in shards:
                path = self.folder / shard
                if not path.is_file():
                    raise ModelError(
                        f"{index} names the shard {shard} (for {name}), but {path} does not exist: "
                        "download the model again."
                    )
                shards[shard] = read_header(path)
            if name not in shards[shard]:
                raise ModelError(f"{index} puts {name} into {shard}, but that file lacks it.")
            self.tensors[name] = shards[shard][name]
        for shard, tensors in shards.items():
            for name in tensors:
                if weight_map.get(name) != shard:
                    raise ModelError(f"{self.folder / shard} holds {name}, which {index} lacks.")

    def tensor(self, name: str) -> _C.Tensor:
        """A zero-copy view of a tensor on its mapped file; it keeps the mapping alive."""
        from gptailor import _C

        info = self.tensors[name]
        if info.path not in self._mapped:
            try:
                mapped = _C.MappedFile(str(info.path))
            except OSError as error:
                raise ModelError(f"{info.path} can't be mapped: {error.strerror}.") from error
            self._mapped[info.path] = mapped
        mapped = self._mapped[info.path]
        if info.offset + info.n_bytes > mapped.size:
            raise ModelError(f"{info.path} became shorter after it was opened: start again.")
        return mapped.tensor(info.offset, info.shape, info.dtype)

    def fingerprint(self) -> list[list[Any]]:
        """[name, size in bytes, time of change in ns] of every file: changes when weights do."""
        stats = [(path.name, path.stat()) for path in self.files]
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, in the order of their bytes.

    Raises:
        ModelError: the file breaks the format in any way.
    """
    try:
        file_size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            n_header = int.from_bytes(prefix, "little")
            if len(prefix) < 8:
                raise ModelError(
                    f"{path} is truncated: it has {file_size} bytes, but 8 are needed."
                )
            if n_header > MAX_HEADER_BYTES:
                raise ModelError(
                    f"{path} is no safetensors file: its header would have {n_header} bytes, "
                    f"more than the format's limit of {MAX_HEADER_BYTES}."
                )
            if 8 + n_header > file_size:
                raise ModelError(
                    f"{path} is truncated: its header has {n_header} bytes, "
                    f"but the file only {file_size}."
                )
            raw = file.read(n_header)
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror}.") from error
    header = _parse_json(raw, path)
    header.pop("__metadata__", None)
    tensors = [_tensor_info(name, entry, path, 8 + n_header) for name, entry in header.items()]
    tensors.sort(key=lambda t: (t.offset, t.offset + t.n_bytes))
    _check_layout(tensors, path, 8 + n_header, file_size)
    return {t.name: t for t in tensors}


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

    if not name.isprintable():
        raise ModelError(f"{path} is corrupt: {name!r} is no name of a tensor.")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise corrupt("not exactly the keys dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise corrupt(f"the unknown dtype {dtype!r}")
    if not _is_sizes(shape):
        raise corrupt(f"the shape {shape!r}")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise corrupt(f"the data_offsets {offsets!r}")
    n_bytes = _product(shape) * DTYPE_BITS[dtype] // 8
    if offsets[1] - offsets[0] != n_bytes:
        raise corrupt(
            f"{offsets[1] - offsets[0]} bytes, but its shape {shape} and dtype {dtype} need "
            + (f"{n_bytes}" if n_bytes < 2**64 else "more than any file has")
        )
    return TensorInfo(name, dtype, tuple(shape), path, data_begin + offsets[0], n_bytes)


def _product(shape: list[int]) -> int:
    """The number of elements; 2**64 for all that is more, so that no shape takes long."""
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
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror}.") from error
    weight_map = _parse_json(raw, path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{path} has no weight_map.")
    for name, shard in weight_map.items():
        beside = isinstance(shard, str) and Path(shard).name == shard and len(shard) < 256
        if not beside or shard in ("", ".."):
            raise ModelError(f"{path} names {shard!r} for {name}, which is no file beside it.")
    return weight_map


def _parse_json(raw: bytes, path: Path) -> dict[str, Any]:
    what = "it" if path.name == _INDEX else "its header"

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ModelError(f"{path} is corrupt: the key {twice!r} appears twice.")
        return result

    try:
        data = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is corrupt: {what} is not valid JSON.") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path} is corrupt: {what} is not a JSON object.")
    return data


def _no_weights(folder: Path) -> ModelError:
    if not folder.is_dir():
        return ModelError(f"The model folder {folder} does not exist.")
    pickles = [name for name in _PICKLES if (folder / name).exists()]
    if pickles:
        return ModelError(
            f"{folder} holds only {pickles[0]}, a pickle that could run code and is never loaded: "
            "convert it with save_pretrained(..., safe_serialization=True)."
        )
    return ModelError(f"{folder} holds neither {_SINGLE} nor {_INDEX}.")
