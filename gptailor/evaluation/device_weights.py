"""The candidates' tensors on a device: mapped, or loaded and kept within a budget.

The unit is a group: the tensors of one source layer of one candidate, its embeddings, or its head.
When the candidates do not all fit, the most used groups stay (`lfu_cache`), and the others are read
again each time they are needed. Groups of mapped files take no memory; their copies in another
dtype do, and are cast again when they do not all fit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.utils.dlpack

from gptailor import _C
from gptailor.errors import ModelError, ResourceError
from gptailor.evaluation.casting import cast
from gptailor.evaluation.footprint import padded
from gptailor.evaluation.lfu_cache import LFUCache
from gptailor.evaluation.memory_policy import too_small
from gptailor.models.architecture import Role
from gptailor.models.checkpoint import FLOAT_DTYPES, TensorInfo, read_error
from gptailor.models.family import Family

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16,
    "U16": torch.uint16, "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64,
    "U64": torch.uint64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip

DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

Place = int | Role
"""A source layer, or a part outside the layers: "embeddings" or "head"."""


class GroupKey(NamedTuple):
    """Identifies one group.

    Attributes:
        model: the candidate.
        place: the part of the model.
        casts: dtypes to which its floating point tensors are cast, one after the other; empty: as
            in the file.
    """

    model: str
    place: Place
    casts: tuple[torch.dtype, ...] = ()


class Group:
    """The tensors of a group, by name; a group that is loaded again is a new object."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self._handles: dict[str, _C.DeviceTensor] = {}

    def handle(self, name: str) -> _C.DeviceTensor:
        """A tensor's handle for `_C.merge_cuda`, made once."""
        if name not in self._handles:
            self._handles[name] = _C.DeviceTensor.from_dlpack(self.tensors[name])
        return self._handles[name]


class Backend(Protocol):
    """Loads tensors from files onto a device."""

    device: torch.device
    is_mapped: bool
    """Tensors are views on mapped files and cost no memory."""

    def load(self, family: Family, model: str, infos: Sequence[TensorInfo]) -> list[torch.Tensor]:
        """The tensors, in the order of `infos`.

        Raises:
            ModelError: a file can't be read.
        """


class MappedBackend:
    """Maps files into CPU memory; the page cache is the only cache."""

    is_mapped = True

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def load(self, family: Family, model: str, infos: Sequence[TensorInfo]) -> list[torch.Tensor]:
        """Views on the mapped files."""
        checkpoint = family.candidates[model].checkpoint
        return [torch.utils.dlpack.from_dlpack(checkpoint.tensor(info.name)) for info in infos]


class LoadingBackend:
    """Reads into one block of memory with `_C.DeviceLoader`: on a GPU, or on the CPU where mapped
    files are slow.

    Args:
        device: a CUDA device or the CPU.
        options: passed to the loader.

    Raises:
        ResourceError: there is no memory for the loader's buffers.
    """

    is_mapped = False

    def __init__(self, device: torch.device, **options: Any) -> None:
        self.device = device
        index = None
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
        try:
            self.loader = _C.DeviceLoader(index, **options)
        except (RuntimeError, MemoryError) as error:
            raise ResourceError(f"The weights can't be loaded to {device}: {error}.") from error

    def load(self, family: Family, model: str, infos: Sequence[TensorInfo]) -> list[torch.Tensor]:
        """Copies in one block, whole tensors side by side as in the file; on a GPU they are ready
        on the current stream."""
        offsets, size = [], 0
        for info in infos:
            offsets.append(size)
            size += padded(info.n_bytes)
        block = torch.empty(size, dtype=torch.uint8, device=self.device)
        parts = [block[at : at + info.n_bytes] for at, info in zip(offsets, infos, strict=True)]
        stream = 0
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device).cuda_stream
        requests = [(str(i.path), i.offset, part) for i, part in zip(infos, parts, strict=True)]
        checkpoint = family.candidates[model].checkpoint
        try:
            for path in {info.path for info in infos}:
                checkpoint.file(path)  # checks that it is still the file whose header was read
            self.loader.load(requests, stream=stream)
        except OSError as error:
            raise read_error(error) from error
        except ValueError as error:
            raise ModelError(f"{infos[0].path} can't be read: {error}.") from error
        checkpoint.check_intact()
        return [
            part.view(TORCH_DTYPES[info.dtype]).view(info.shape)
            for part, info in zip(parts, infos, strict=True)
        ]


class DeviceWeights:
    """Groups of a family's tensors on one device.

    Args:
        family: the candidates.
        backend: loads their tensors.
        budget_bytes: what all groups on the device may take together, including those that are only
            read for a merge, excluding views on mapped files; None: no limit.
        merge_bytes: part of the budget that is reserved for groups that are only read for a merge.
        on_evict: called with each group that is evicted, before its memory is reused; it must drop
            all references to the group's tensors.
        kept: dtype of the forward pass → names of tensors that stay float32 in it.
    """

    def __init__(
        self,
        family: Family,
        backend: Backend,
        budget_bytes: int | None = None,
        merge_bytes: int = 0,
        on_evict: Callable[[Group], None] = lambda group: None,
        kept: Callable[[torch.dtype], Collection[str]] = lambda dtype: (),
    ) -> None:
        self.family = family
        self.backend = backend
        self._on_evict = on_evict
        self._kept = kept
        self._groups: dict[GroupKey, Group] = {}
        architecture = family.architecture
        self._names: dict[Place, list[str]] = {
            src: list(suffixes.values()) for src, suffixes in enumerate(architecture.layers)
        }
        self._names["embeddings"] = list(architecture.embeddings)
        self._names["head"] = list(architecture.head)
        self._held: frozenset[GroupKey] = frozenset()
        self.budget_bytes = 1 << 62 if budget_bytes is None else budget_bytes
        self.cache: LFUCache[GroupKey] = LFUCache(self.budget_bytes - merge_bytes)
        self._keys: dict[tuple[str, Place, tuple[torch.dtype, ...]], GroupKey] = {}

    def _cost(self, key: GroupKey) -> int:
        """The bytes of the budget that a group takes; a view on a mapped file takes none."""
        if not self.backend.is_mapped:
            return self.n_bytes(key)
        copies = [info for info in self._infos(key) if not self._is_view(key, info)]
        return sum(self._size(key, info) for info in copies)

    def n_bytes(self, key: GroupKey) -> int:
        """The size of a group's tensors."""
        return sum(self._size(key, info) for info in self._infos(key))

    def _size(self, key: GroupKey, info: TensorInfo) -> int:
        types = self._types(key, info)
        return padded(info.n_elements * types[-1].itemsize if types else info.n_bytes)

    def _types(self, key: GroupKey, info: TensorInfo) -> list[torch.dtype]:
        """The dtypes to which a tensor is cast in turn, one for each of the group's casts."""
        if info.dtype not in FLOAT_DTYPES:
            return [TORCH_DTYPES[info.dtype]] * len(key.casts)
        types = list(key.casts)
        if types and self.family.candidates[key.model].stays_precise(info, DTYPE_NAMES[types[0]]):
            types[0] = torch.float32
        if types and info.name in self._kept(key.casts[-1]):
            types[-1] = torch.float32
        return types

    def _is_view(self, key: GroupKey, info: TensorInfo) -> bool:
        return all(dtype == TORCH_DTYPES[info.dtype] for dtype in self._types(key, info))

    def key(self, model: str, place: Place, casts: Sequence[torch.dtype]) -> GroupKey:
        """The key of a group whose tensors are cast; `casts` is empty if no tensor changes."""
        wanted = (model, place, tuple(casts))
        if wanted not in self._keys:
            key = GroupKey(model, place, tuple(casts))
            is_raw = all(self._is_view(key, info) for info in self._infos(key))
            self._keys[wanted] = key._replace(casts=()) if is_raw else key
        return self._keys[wanted]

    def hold(self, keys: Iterable[GroupKey]) -> None:
        """Starts the next recipe: these groups stay until the recipe after it."""
        self._held = frozenset(keys)
        self.cache.tick()

    def get(self, keys: Collection[GroupKey]) -> dict[GroupKey, Group]:
        """Groups on the device; those neither held nor cached are freed when the caller drops them.

        Raises:
            ModelError: a file can't be read.
            ResourceError: the budget or the device's memory is too small.
        """
        for key in keys:
            self.cache.use(key)
        missing = [key for key in dict.fromkeys(keys) if key not in self._groups]
        protected = self._held.union(keys)
        passing = 0
        kept: list[GroupKey] = []
        for key in missing:
            size, must = self._cost(key), key in self._held
            if size == 0:
                continue
            gone = self.cache.admit(key, size, held=protected, must=must)
            if gone is None and must:
                raise too_small(self.budget_bytes, self.backend.device)
            if gone is None:
                passing += size
            else:
                kept.append(key)
                self._evict(gone)
        if self.cache.n_bytes + passing > self.budget_bytes:
            gone = self.cache.shrink(self.budget_bytes - passing, protected)
            if gone is None:
                for key in kept:
                    self.cache.remove(key)
                raise too_small(self.budget_bytes, self.backend.device)
            self._evict(gone)
        found = {key: self._groups[key] for key in keys if key in self._groups}
        for number, key in enumerate(missing):
            try:
                found[key] = self._load(key)
            except BaseException:
                for never in set(missing[number:]) & set(kept):
                    self.cache.remove(never)
                raise
            if key in self.cache or self._cost(key) == 0:
                self._groups[key] = found[key]
        return found

    def __contains__(self, key: GroupKey) -> bool:
        return key in self._groups

    def _load(self, key: GroupKey) -> Group:
        raw = key._replace(casts=())
        infos = self._infos(key)
        try:
            if key.casts and raw in self._groups:
                tensors = [self._groups[raw].tensors[info.name] for info in infos]
            else:
                tensors = self.backend.load(self.family, key.model, infos)
            names = [f"{info.path}: {info.name}" for info in infos] if key.casts else []
            types = [self._types(key, info) for info in infos]
            for step in range(len(key.casts)):
                tensors = cast(tensors, [some[step] for some in types], names)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise ResourceError(
                f"There is no memory for layers of {key.model} on {self.backend.device}: use fewer "
                "workers per device."
            ) from error
        return Group({info.name: t for info, t in zip(infos, tensors, strict=True)})

    def _infos(self, key: GroupKey) -> list[TensorInfo]:
        tensors = self.family.candidates[key.model].tensors
        return [tensors[name] for name in self._names[key.place] if name in tensors]

    def _evict(self, keys: Iterable[GroupKey]) -> None:
        for key in keys:
            self._on_evict(self._groups.pop(key))
