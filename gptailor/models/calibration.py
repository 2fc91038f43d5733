"""Files with statistics of models on calibration text, which some merge methods need.

A folder holds `NAME.METHOD.safetensors` for each model. Its tensors have the same names as the
model's. For fisher, each has the shape of the model's tensor (the diagonal of the Fisher
information); for regmean, it is the Gram matrix of a linear layer's inputs, (inputs, inputs). The
metadata says which text they come from and which weights they belong to.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from gptailor.errors import ModelError, ResourceError, UsageError
from gptailor.files import left_behind, process_marker
from gptailor.models.checkpoint import DTYPE_BITS, FLOAT_DTYPES, TensorInfo, read_header
from gptailor.models.untrusted import open_regular, parse_json, read_up_to

SCHEMA = "gptailor/calibration/1"

_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class Calibration:
    """Which statistics a recipe uses.

    Attributes:
        folder: where they are.
        digests: (method, model, digest of the metadata), sorted; empty until looked up.
    """

    folder: str
    digests: tuple[tuple[str, str, str], ...] = ()

    def digest(self, method: str, model: str) -> str:
        """The digest of a model's statistics, for a recipe's hash; "" if not looked up yet."""
        return next((d for m, name, d in self.digests if (m, name) == (method, model)), "")

    def found(self, needed: Sequence[tuple[str, str]]) -> Calibration:
        """The same with the digests of these (method, model) read from the files.

        Raises:
            UsageError: statistics of a model are missing.
            ModelError: a file is corrupt.
        """
        digests = ((m, n, Statistics(self.folder, m, n).digest) for m, n in sorted(set(needed)))
        return Calibration(self.folder, tuple(digests))


class Statistics:
    """The statistics of one model for one method, as described by their header.

    Args:
        folder: of the calibration.
        method: the merge method that needs them.
        model: the model's name.

    Raises:
        UsageError: there is no such file.
        ModelError: it is corrupt, or holds something else.
    """

    def __init__(self, folder: str | Path, method: str, model: str) -> None:
        self.path = statistics_path(folder, method, model)
        if not self.path.is_file():
            raise UsageError(
                f"{folder} has no statistics of {model} for {method} ({self.path.name}): make them "
                "with `gptailor calibrate`."
            )
        self.method = method
        self.tensors = read_header(self.path)
        self.metadata = read_metadata(self.path)
        if (self.metadata.get("schema"), self.metadata.get("method")) != (SCHEMA, method):
            raise ModelError(
                f"{self.path} holds no statistics for {method}: make them with "
                "`gptailor calibrate`."
            )

    @property
    def digest(self) -> str:
        """16 hex digits of the metadata's SHA-256; equal for the same text and weights."""
        text = json.dumps(self.metadata, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def check_weights(self, digest: str, where: object) -> None:
        """Raises a `ModelError` unless they belong to the weights with this `weights_digest`."""
        if self.metadata.get("weights") != digest:
            raise ModelError(
                f"{self.path} does not belong to the weights of {where}: make it again with "
                "`gptailor calibrate`."
            )

    def find(self, info: TensorInfo, *, per_element: bool) -> TensorInfo | None:
        """The statistics of one of the model's tensors.

        Args:
            info: the tensor.
            per_element: True for a number for each element, False for a Gram matrix of inputs.

        Returns:
            None for a tensor without a Gram matrix, because it is not a linear layer's.

        Raises:
            ModelError: the shape or dtype is wrong, or per-element statistics are missing.
        """
        found = self.tensors.get(info.name)
        if found is None:
            if not per_element:
                return None
            raise ModelError(f"{self.path} lacks {info.name}: make it again.")
        shape = info.shape if per_element else (info.shape[-1:] * 2)
        is_matrix = len(info.shape) == 2 or per_element
        if found.shape != shape or not is_matrix or found.dtype not in FLOAT_DTYPES:
            raise ModelError(
                f"{self.path}: {info.name} is {found.dtype} of the shape {list(found.shape)}, but "
                f"must be floating point of the shape {list(shape)}."
            )
        return found


def statistics_path(folder: str | Path, method: str, model: str) -> Path:
    """The path of a model's statistics; a name that can't be a file name is percent-encoded."""
    return Path(folder) / f"{quote(model, safe=' ')}.{method}.safetensors"


def weights_digest(tensors: Mapping[str, TensorInfo]) -> str:
    """SHA-256 (64 hex digits) of names, dtypes, shapes, and the ends and middle of each tensor.

    Three pages of each tensor are enough to tell finetunes apart, and quick to read even for the
    largest models.

    Raises:
        ModelError: a file can't be read.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        info = tensors[name]
        digest.update(json.dumps([name, info.dtype, info.shape]).encode())
        n_bytes = min(info.n_bytes, _SAMPLE_BYTES)
        last = info.n_bytes - n_bytes
        try:
            with info.path.open("rb", buffering=0) as file:
                for offset in (0, last // 2, last):
                    digest.update(os.pread(file.fileno(), n_bytes, info.offset + offset))
        except OSError as error:
            raise ModelError(f"{info.path} can't be read: {error.strerror}.") from error
    return digest.hexdigest()


class StatisticsWriter:
    """Writes a file tensor by tensor, in any order; made by `writing`."""

    def __init__(self, fd: int, places: Mapping[str, tuple[int, int]]) -> None:
        self._fd = fd
        self._places = places

    def write(self, name: str, data: memoryview) -> None:
        """Writes the bytes of one tensor; raises OSError on a full disk."""
        offset, n_bytes = self._places[name]
        data = data.cast("B") if n_bytes else memoryview(b"")
        assert len(data) == n_bytes, name
        while data:
            written = os.pwrite(self._fd, data, offset)
            data, offset = data[written:], offset + written


@contextmanager
def writing(
    path: Path, metadata: Mapping[str, str], shapes: Mapping[str, tuple[str, Sequence[int]]]
) -> Iterator[StatisticsWriter]:
    """Writes a safetensors file; it gets its name when it is complete, and is removed on failure.

    Args:
        path: the file; one that exists is replaced.
        metadata: for its header.
        shapes: name → (dtype, shape).

    Raises:
        ResourceError: the file can't be written, for example because the disk is full.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    places, position = {}, 0
    for name, (dtype, shape) in shapes.items():
        n_bytes = DTYPE_BITS[dtype] // 8
        for size in shape:
            n_bytes *= size
        offsets = [position, position + n_bytes]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        places[name] = (position, n_bytes)
        position += n_bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    places = {name: (8 + len(text) + at, n_bytes) for name, (at, n_bytes) in places.items()}
    temporary = path.with_name(f"{process_marker(path, 'tmp')}{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in left_behind(path, "tmp"):
            stale.unlink(missing_ok=True)
        with temporary.open("wb", buffering=0) as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + position)
            yield StatisticsWriter(file.fileno(), places)
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ResourceError(f"{path} can't be written: {error.strerror or error}.") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a file whose header has been checked."""
    with open_regular(path) as file:
        raw = read_up_to(file, int.from_bytes(read_up_to(file, 8), "little"))
    metadata = parse_json(raw, path, "its header", unique=True).get("__metadata__")
    known = metadata if isinstance(metadata, dict) else {}
    return {key: value for key, value in known.items() if isinstance(value, str)}
