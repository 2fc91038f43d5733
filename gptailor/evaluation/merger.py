"""Computes a recipe's merged tensors where the weights are, and keeps them for later recipes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.utils.dlpack
from torch import nn

from gptailor import _C
from gptailor.errors import ModelError, ResourceError
from gptailor.evaluation.casting import cast
from gptailor.evaluation.device_merge import can_merge, merge_on_gpu
from gptailor.evaluation.device_pool import DevicePool
from gptailor.evaluation.device_weights import Group, GroupKey, Place
from gptailor.evaluation.merge_cache import Key
from gptailor.evaluation.slots import Parameters
from gptailor.models.family import Family
from gptailor.stitching.compute import ComputedTensor, origin
from gptailor.stitching.plan import OutTensor, Source

Groups = Mapping[str, Group]
"""Candidate → its tensors of the place being merged, as they are in the file."""


class Merger:
    """Merges layers, embeddings and heads of a family.

    Args:
        family: the candidates.
        kept_types: see `Skeleton`.
    """

    def __init__(
        self, family: Family, kept_types: Callable[[torch.dtype], Collection[str]]
    ) -> None:
        self._family = family
        self._kept_types = kept_types
        self._unchecked: list[tuple[DevicePool, Key, list[OutTensor], torch.Tensor]] = []

    @contextmanager
    def checked(self) -> Iterator[None]:
        """A context for the merges of one recipe. On exit it checks the GPU's flags of all of them
        at once, as that synchronizes. Merges that are not checked are not kept.

        Raises:
            ModelError: a merged tensor holds NaN, or a number is too large for float16.
        """
        try:
            yield
            self._check_numbers()
        finally:
            for pool, key, _, _ in self._unchecked:
                pool.merged.forget(key)
            self._unchecked.clear()

    def merged(
        self,
        pool: DevicePool,
        key: Key,
        place: Place,
        plan: Callable[[], Mapping[str, OutTensor]],
        dtype: torch.dtype,
    ) -> Parameters:
        """The merged tensors of one place.

        Args:
            pool: where they are kept.
            key: everything that determines them.
            place: the part of the model.
            plan: returns the tensors by their names in the module; called if they are not kept.
            dtype: of the forward pass.

        Raises:
            ModelError: a tensor holds NaN, or a number is too large for float16.
            ResourceError: the device's memory, or the candidates' part of it, is too small.
        """
        found = pool.merged.get(key)
        if found is None:
            found = self._merge(pool, key, place, plan(), dtype)
            pool.merged.keep(key, found)
        return found

    def _merge(
        self,
        pool: DevicePool,
        key: Key,
        place: Place,
        tensors: Mapping[str, OutTensor],
        dtype: torch.dtype,
    ) -> Parameters:
        """Computes the tensors of one place.

        Embeddings and heads are larger than layers: where candidates don't all fit on the device,
        the CPU merges them from the files.
        """
        on_gpu = pool.device.type == "cuda"
        read = [t for t in tensors.values() if not on_gpu or t.is_copy or can_merge(t)]
        if pool.streams and not isinstance(place, int):
            read = []
        models = {s.model for t in read for s in (*t.sources, t.base) if s is not None}
        found = pool.weights.get([GroupKey(model, place) for model in models])
        groups = {group_key.model: group for group_key, group in found.items()}
        try:
            with pool.current():
                data = self._compute_all(pool, key, list(tensors.values()), groups)
        except torch.OutOfMemoryError as error:
            first = next(iter(tensors.values()))
            raise ResourceError(
                f"Merged layers do not fit on {pool.device}: there is no memory for {first.name}."
            ) from error
        precise = self._kept_types(dtype)
        types = [
            torch.float32 if t.sources[0].info.name in precise else dtype for t in tensors.values()
        ]
        data = cast(data, types, [origin(t) for t in tensors.values()])
        return {
            name: nn.Parameter(t, requires_grad=False)
            for name, t in zip(tensors, data, strict=True)
        }

    def _compute_all(
        self, pool: DevicePool, key: Key, tensors: Sequence[OutTensor], groups: Groups
    ) -> list[torch.Tensor]:
        """The tensors on the device, in the dtypes of the plan."""
        backend = pool.weights.backend
        loaded = groups if pool.device.type == "cpu" and not backend.is_mapped else {}
        result: dict[int, torch.Tensor] = {}
        launched = []
        for number, tensor in enumerate(tensors):
            if tensor.is_copy:
                source = tensor.sources[0]
                data = groups[source.model].tensors[source.info.name]
                # merged layers outlive the group
                result[number] = data if backend.is_mapped else data.clone()
            elif pool.device.type == "cuda" and groups and can_merge(tensor):
                launched.append(number)
            else:
                result[number] = self._compute(tensor, loaded).to(pool.device)
        if launched:
            some = [tensors[n] for n in launched]
            merged, found = merge_on_gpu(some, lambda source: _handle(source, groups), pool.device)
            self._unchecked.append((pool, key, some, found))
            result.update(zip(launched, merged, strict=True))
        return [result[number] for number in range(len(tensors))]

    def _check_numbers(self) -> None:
        if not self._unchecked:
            return
        device = self._unchecked[0][-1].device
        found = torch.cat([flags.to(device) for *_, flags in self._unchecked]).tolist()
        tensors = [tensor for _, _, some, _ in self._unchecked for tensor in some]
        for tensor, (nan, overflow) in zip(tensors, found, strict=True):
            if overflow or (nan and tensor.merge is not None):
                self._compute(tensor, {})  # raises an error with the file and the position
                raise ModelError(f"{tensor.name}: the merged tensor is not a number.")
        self._unchecked.clear()

    def _compute(self, tensor: OutTensor, loaded: Groups) -> torch.Tensor:
        """Computes a tensor in CPU memory, from loaded tensors, or from the files without any."""

        def opened(source: Source) -> _C.Tensor:
            data = loaded[source.model].tensors[source.info.name]
            return _C.Tensor.from_dlpack(first_rows(data, source.info.shape))

        job = ComputedTensor(
            tensor, self._family, torch.get_num_threads(), opened if loaded else None
        )
        buffer = _C.Buffer(max(tensor.n_bytes, 1))
        job.run(0, job.n_elements, buffer)
        return torch.utils.dlpack.from_dlpack(buffer.tensor(0, tensor.shape, tensor.dtype))


def first_rows(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A view on as many rows as the shape has; the tensor itself if these are all."""
    return tensor if tensor.shape == shape else tensor[: shape[0]]


def _handle(source: Source, groups: Groups) -> _C.DeviceTensor:
    found = groups[source.model].handle(source.info.name)
    if found.shape == source.info.shape:
        return found
    return found.tensor(0, source.info.shape, source.info.dtype)
