"""The resident model: opens all candidates once and assembles a recipe by pointing at layers.

A recipe's layers are modules of the skeleton whose parameters point into the candidates' weights:
their mapped files, or their copies on the GPU. Dropping a layer moves no bytes. Only merged layers
are computed (where the weights are), and they are kept for later recipes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from gptailor.errors import ModelError
from gptailor.evaluation.device_memory import device_memory, host_memory
from gptailor.evaluation.device_pool import DevicePool, open_pools
from gptailor.evaluation.device_weights import Backend, Group, GroupKey, Place
from gptailor.evaluation.devices import all_gpus, pick_device
from gptailor.evaluation.footprint import find_blocks
from gptailor.evaluation.forward_dtype import PRECISE
from gptailor.evaluation.memory_policy import is_mapped, may_spread, plan_memory
from gptailor.evaluation.merge_cache import Key
from gptailor.evaluation.merger import Merger, first_rows
from gptailor.evaluation.skeleton import Skeleton
from gptailor.evaluation.slots import Parameters
from gptailor.merging.engine_table import check_engine
from gptailor.models.family import Family
from gptailor.models.side_files import has_tokenizer
from gptailor.recipe import Layer, Recipe, Take
from gptailor.stitching.plan import (
    OutTensor,
    check_recipe,
    plan_end,
    plan_layer,
    scale_factors,
    vocabulary_rows,
)


class ResidentModel:
    """A transformers model that becomes the stitched model of one recipe after another.

    Args:
        family: the candidates.
        dtype: of the forward pass: a key of `DTYPES`, or "auto" for that of the recipe.
        device: "auto", "cpu", "cuda", "cuda:1".
        cache_bytes: how much memory cached merged layers may take; default: eight times the base,
            or this worker's share of an eighth of the device's memory if that is less. Children
            share most merged layers with their parents: with room for a few hundred layers, nine
            out of ten are found in the cache.
        candidate_bytes: how much memory the candidates may take on the device. On a GPU the default
            is the free memory minus headroom. On the CPU the default is to map them, which costs
            nothing except for copies in the dtype of the forward pass, which get a share of the
            free memory; with a value they are read into memory, for file systems where mapped files
            are slow. If they do not all fit, the most used layers stay.
        workers: how many resident models share the device.
        backend: loads the candidates onto the device; default: chosen for the device.
        spread_over: devices to spread the layers over if a model does not fit on the first of them;
            default: all GPUs that this process sees, if it has them to itself and `device` names
            none of them.

    Attributes:
        model: the transformers model.
        device: the device of inputs and logits.
        plan: what each device may hold.
        pools: what each device holds; the first one has everything outside the layers.

    Raises:
        GptailorError: the compiled engine was built for other merge methods.
        ModelError: transformers can't load the base, or stores its layers in another way.
        ResourceError: the device does not have enough memory.
        UsageError: the device does not exist.
    """

    def __init__(
        self,
        family: Family,
        *,
        dtype: str = "auto",
        device: str = "auto",
        cache_bytes: int | None = None,
        candidate_bytes: int | None = None,
        workers: int = 1,
        backend: Backend | None = None,
        spread_over: Sequence[torch.device] | None = None,
    ) -> None:
        check_engine()  # an engine built for other methods would make every candidate fail
        self.family = family
        self.device = pick_device(device)
        if spread_over is None:
            spread_over = all_gpus() if may_spread(device, workers) else ()
        devices = spread_over if len(spread_over) > 1 else [self.device]
        self._dtype = None if dtype == "auto" else dtype
        if not has_tokenizer(family.base.folder):
            raise ModelError(f"The base {family.base.folder} has no tokenizer.")
        self._skeleton = Skeleton(family, self._dtype)
        self._skeleton.move(self.device)
        self.model = self._skeleton.model
        self._merger = Merger(family, self._skeleton.kept_types)
        self._outside_plans: dict[Key, list[OutTensor]] = {}
        self._wrapped: dict[Group, Parameters] = {}
        mapped = is_mapped(self.device.type, candidate_bytes)
        self.plan = plan_memory(
            find_blocks(family, self._dtype or (PRECISE if mapped else None)),
            self.device.type,
            map(device_memory, devices),
            host_memory(),
            workers=workers,
            candidate_bytes=candidate_bytes,
            cache_bytes=cache_bytes,
        )
        self._pool_of = self.plan.device_of
        self.pools = open_pools(
            family,
            devices,
            self.plan,
            backend=backend,
            on_evict=self._evicted,
            kept=self._skeleton.kept_types,
        )
        if len(self.pools) > 1:
            places: list[Place] = ["embeddings", *range(family.num_layers)]
            self._skeleton.spread([self._pool(place).device for place in places])

    def assemble(self, recipe: Recipe) -> nn.Module:
        """Makes `model` the stitched model of a recipe; returns it.

        On a GPU it is ready on the current stream.

        Raises:
            ModelError: a merged tensor holds NaN, or a number is too large for float16.
            ResourceError: the device's memory, or the candidates' part of it, is too small.
            UsageError: the recipe does not fit the family.
        """
        check_recipe(recipe, self.family)  # before anything is changed
        recipe = recipe.canonical()
        cut = self._skeleton.cut(recipe.src_layers)
        factors = scale_factors(recipe)
        known = {id(kept) for pool in self.pools for kept in pool.merged.values()}
        self._skeleton.forget_all_but(known.union(map(id, self._wrapped.values())))
        with self.pools[0].current():
            ends = self._plan_ends(recipe)
            taken_layers = [
                self._taken_key(layer, factor, recipe)
                for layer, factor in zip(recipe.layers, factors, strict=True)
            ]
            taken_ends = [
                self._key(t.sources[0].model, self._end(t.name), recipe)
                if t.merge is None
                else None
                for t in ends
            ]
            taken = self._take(list(filter(None, taken_layers + taken_ends)), recipe)
            with self._merger.checked():
                layers = [
                    self._merged_layer(layer, factor, recipe) if key is None else taken[key]
                    for key, layer, factor in zip(taken_layers, recipe.layers, factors, strict=True)
                ]
                outside = {
                    t.name: self._merged_end(t, recipe)
                    if key is None
                    else _with_rows(taken[key][t.name], t.shape)
                    for key, t in zip(taken_ends, ends, strict=True)
                }
        stays = [key is not None for key in taken_layers]
        entries = list(zip(recipe.src_layers, layers, stays, strict=True))
        self._skeleton.point(entries, outside, cut, vocabulary_rows(recipe, self.family))
        model: nn.Module = self.model
        return model

    def layers(self) -> list[nn.Module]:
        """The layers of the assembled model, bottom to top."""
        return self._skeleton.layers()

    def replace(self, out_layer: int, changed: Parameters) -> nn.Module:
        """Gives a layer of the assembled model other parameters until the next `assemble`.

        Args:
            out_layer: its index in the assembled model.
            changed: parameter as its module names it → the new one.

        Returns:
            The layer's module.
        """
        return self._skeleton.replace(out_layer, changed)

    def file_name(self, src_layer: int, out_layer: int, parameter: str) -> str:
        """The name in a stitched model's files of a layer's parameter.

        Args:
            src_layer, out_layer: the layer's index in the candidates and in the stitched model.
            parameter: as its module names it.
        """
        architecture = self.family.architecture
        name = self._skeleton.layer_names[src_layer][parameter]
        return architecture.name(out_layer, name[len(architecture.name(src_layer, "")) :])

    def check_pointers(self, recipe: Recipe) -> None:
        """Asserts that every taken layer of the assembled model uses the candidate's own memory."""
        recipe = recipe.canonical()
        modules, factors = self.layers(), scale_factors(recipe)
        for module, layer, factor in zip(modules, recipe.layers, factors, strict=True):
            if (key := self._taken_key(layer, factor, recipe)) is not None:
                expected = self._pool(layer.src_layer).weights.get([key])[key].tensors
                for suffix, name in self.family.architecture.layers[layer.src_layer].items():
                    assert module.get_parameter(suffix).data_ptr() == expected[name].data_ptr()

    def _evicted(self, group: Group) -> None:
        """Drops references to a group whose memory is needed."""
        self._skeleton.forget(self._wrapped.pop(group, {}))

    def _pool(self, place: Place) -> DevicePool:
        return self.pools[self._pool_of[place] if isinstance(place, int) else 0]

    def _end(self, tensor_name: str) -> Place:
        is_first = tensor_name in self.family.architecture.embeddings
        return "embeddings" if is_first else "head"

    def _forward_dtype(self, recipe: Recipe) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self._dtype or recipe.dtype)
        return dtype

    def _key(self, model: str, place: Place, recipe: Recipe) -> GroupKey:
        """The key of a group cast to the recipe's dtype, then to that of the forward pass."""
        casts = getattr(torch, recipe.dtype), self._forward_dtype(recipe)
        return self._pool(place).weights.key(model, place, casts)

    def _taken_key(self, layer: Layer, factor: float, recipe: Recipe) -> GroupKey | None:
        """The key of the group that a layer is taken from; None if the layer is computed."""
        if not isinstance(layer, Take) or layer.modules or factor != 1.0:
            return None
        return self._key(layer.model, layer.src_layer, recipe)

    def _plan_ends(self, recipe: Recipe) -> list[OutTensor]:
        """The tensors outside the layers."""
        key = (recipe.embeddings, recipe.head, recipe.base, recipe.dtype, recipe.calibration)
        if key not in self._outside_plans:
            architecture = self.family.architecture
            self._outside_plans[key] = [
                *plan_end(recipe.embeddings, architecture.embeddings, recipe, self.family),
                *plan_end(recipe.head, architecture.head, recipe, self.family),
            ]
        return self._outside_plans[key]

    def _take(self, keys: list[GroupKey], recipe: Recipe) -> dict[GroupKey, Parameters]:
        """The candidates' own tensors, which are held until the next recipe."""
        taken = {}
        groups: dict[GroupKey, Group] = {}
        for pool in self.pools:
            own = [key for key in keys if self._pool(key.place) is pool]
            pool.weights.hold(own)
            groups |= pool.weights.get(own)
        for key, group in groups.items():
            if group not in self._wrapped:
                names = {name: name for name in group.tensors}
                if isinstance(key.place, int):
                    names = self._skeleton.layer_names[key.place]
                    plan_layer(Take(key.model, key.place), 0, recipe, self.family)  # checks
                self._wrapped[group] = {
                    suffix: nn.Parameter(group.tensors[name], requires_grad=False)
                    for suffix, name in names.items()
                }
            taken[key] = self._wrapped[group]
        return taken

    def _merged_layer(self, layer: Layer, factor: float, recipe: Recipe) -> Parameters:
        src_layer = layer.src_layer

        def plan() -> dict[str, OutTensor]:
            name = self.family.architecture.name
            begin, end = len(name(src_layer, "")), len(name(0, ""))
            suffix_of = {
                file_name[begin:]: suffix
                for suffix, file_name in self._skeleton.layer_names[src_layer].items()
            }
            tensors = plan_layer(layer, 0, recipe, self.family, factor)
            return {suffix_of[t.name[end:]]: t for t in tensors}

        # everything that determines the tensors; a layer's scale is folded into later layers
        statistics = recipe.statistics_of(layer)
        key = (replace(layer, scale=1.0), factor, recipe.base, recipe.dtype, statistics)
        dtype = self._forward_dtype(recipe)
        return self._merger.merged(self._pool(src_layer), key, src_layer, plan, dtype)

    def _merged_end(self, tensor: OutTensor, recipe: Recipe) -> nn.Parameter:
        name, place = tensor.name, self._end(tensor.name)
        key = (tensor.merge, name, tensor.shape, recipe.base, recipe.dtype, tensor.statistics)
        dtype = self._forward_dtype(recipe)
        found = self._merger.merged(self._pool(place), key, place, lambda: {name: tensor}, dtype)
        return found[name]


def _with_rows(parameter: nn.Parameter, shape: tuple[int, ...]) -> nn.Parameter:
    """A candidate's own parameter, or a view on its first rows."""
    if parameter.shape == shape:
        return parameter
    return nn.Parameter(first_rows(parameter, shape), requires_grad=False)
