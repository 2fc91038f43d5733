"""The resident model: all candidates opened once, a recipe assembled by pointing at layers.

The skeleton is a stock transformers model. A recipe's layers are modules of that skeleton whose
parameters point into the candidates' weights: their mapped files, or their copy on the GPU.
Dropping a layer moves no byte, and only merged layers are computed (where the weights are), and
kept for the next recipe that has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.utils.dlpack
from torch import nn

from gptailor import _C
from gptailor.errors import ModelError, ResourceError, UsageError
from gptailor.evaluation.casting import cast
from gptailor.evaluation.device_merge import can_merge, merge_on_gpu
from gptailor.evaluation.device_pool import (
    DevicePool,
    Key,
    memory_bytes,
    open_pools,
    spread_modules,
)
from gptailor.evaluation.device_weights import Backend, Group, GroupKey, Place
from gptailor.evaluation.footprint import CACHED_MODELS
from gptailor.evaluation.kept_types import KeptTypes
from gptailor.evaluation.loading import load_model
from gptailor.evaluation.pointers import check_padding_rows, find_pointers
from gptailor.evaluation.signature import Constants, carry_over
from gptailor.evaluation.slots import Parameters, Slots, let_go, point
from gptailor.evaluation.structure import Cut, Structure
from gptailor.merging.engine_table import check_engine
from gptailor.models.architecture import cut_config, text_config
from gptailor.models.family import Family
from gptailor.models.side_files import has_tokenizer
from gptailor.recipe import Layer, Recipe, Take
from gptailor.stitching.compute import ComputedTensor, origin
from gptailor.stitching.plan import (
    OutTensor,
    Source,
    check_recipe,
    make_plan,
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
        cache_bytes: how much memory merged layers may keep; default: eight times the base, or this
            worker's part of an eighth of the device's memory if that is less. Children share most
            merged layers with their parents: with room for a few hundred layers nine of ten are
            found again.
        candidate_bytes: how much memory the candidates may have on the device. On a GPU the default
            is what is free there, less headroom. On the CPU they are mapped and cost none, but for
            copies in the type of the forward pass, which have a share of what is free; unless this
            is given: then they are read into memory, which is for file systems where mapped files
            are slow. If not all of them fit, the layers that are used most stay.
        workers: how many of these share the device.
        backend: how the candidates get to the device; default: what suits the device.
        spread_over: devices to spread the layers over if a model does not fit on the first of them;
            default: all GPUs that this process sees, if it has them to itself and `device` names
            none of them.

    Attributes:
        model: the skeleton.
        device: where inputs go to and logits come from.
        homes: what each device holds; the first one has what is outside the layers.

    Raises:
        GptailorError: the compiled engine was built for other merge methods.
        ModelError: transformers can't load the base, or stores its layers in another way.
        ResourceError: the device has no memory for it.
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
        check_engine()  # one that was built for other methods would make every candidate fail
        self.family = family
        self.device = pick_device(device)
        if spread_over is None:
            spread_over = _all_gpus() if device in ("auto", "cuda") and workers == 1 else ()
        self._dtype = None if dtype == "auto" else dtype
        if not has_tokenizer(family.base.folder):
            raise ModelError(f"The base {family.base.folder} has no tokenizer.")
        if cache_bytes is None:
            base_bytes = sum(t.n_bytes for t in family.base.tensors.values())
            part = memory_bytes(self.device) // (8 * workers)
            cache_bytes = min(CACHED_MODELS * base_bytes, part)
        self._cache_bytes = cache_bytes
        self.model = self._load_skeleton()
        base = family.base
        self.structure = Structure(
            base.folder, base.config, base.checkpoint.tensors, self.model.dtype
        )
        self._stack_name = self.structure.stack
        pointers = find_pointers(self.structure, family)
        self.structure.check_steady(self.model)
        check_padding_rows(self.model, family, pointers)
        self._layer_names, self._outside, self._ties = (
            pointers.layers,
            pointers.outside,
            pointers.ties,
        )
        self._configs = configs_of(self.model)
        self._full_config = self.model.config.to_dict()
        self._config_keys: set[str] = set()  # those that a cut has changed so far
        stack = self.model.get_submodule(self._stack_name)
        self._slots = Slots(list(stack), self._layer_names)
        self._outside_before: Constants = {}
        for name in self._outside.values():
            let_go(self.model, name)
        self._tie()
        self.model.to(self.device)  # what no file has: rotary frequencies and the like
        self._outside_now: Parameters = {}
        self._kept_types = KeptTypes(
            self.structure.shell, base.folder, base.tensors.values(), self.structure.module_names
        )
        self._outside_plans: dict[Key, list[OutTensor]] = {}
        self._wrapped: dict[Group, Parameters] = {}
        self.homes, self._home_of = open_pools(
            family,
            spread_over if len(spread_over) > 1 else [self.device],
            dtype=self._dtype,
            cache_bytes=self._cache_bytes,
            candidate_bytes=candidate_bytes,
            workers=workers,
            backend=backend,
            on_evict=self._evicted,
            kept=self._kept_types.names,
        )
        if len(self.homes) > 1:
            devices = [self._home(src).device for src in ("embeddings", *range(family.num_layers))]
            spread_modules(self.model, list(stack), self._outside.values(), devices)
        self._borrowed: dict[str, Group] = {}
        self._unchecked: list[tuple[DevicePool, Key, list[OutTensor], torch.Tensor]] = []

    def assemble(self, recipe: Recipe) -> nn.Module:
        """Makes `model` the stitched model of a recipe; returns it.

        On a GPU it is ready in the order of the current stream.

        Raises:
            ModelError: a tensor that is merged holds NaN, or a number is too large for float16.
            ResourceError: the device's memory, or the candidates' part of it, is too small.
            UsageError: the recipe does not fit the family.
        """
        check_recipe(recipe, self.family)  # before anything is changed
        recipe = recipe.canonical()
        src_layers = recipe.src_layers
        cut = None if self.structure.is_uniform else self.structure.cut(src_layers)
        factors = scale_factors(recipe)
        known = {id(kept) for home in self.homes for kept in home.merged.values()}
        self._slots.forget_all_but(known.union(map(id, self._wrapped.values())))
        with self.homes[0].current():
            outside_plan = self._plan_outside(recipe)
            taken_keys = [
                self._key(layer.model, layer.src_layer, recipe)
                if isinstance(layer, Take) and not layer.modules and factor == 1.0
                else None
                for layer, factor in zip(recipe.layers, factors, strict=True)
            ]
            outside_keys = [
                self._key(t.sources[0].model, self._end(t.name), recipe)
                if t.merge is None
                else None
                for t in outside_plan
            ]
            taken = self._take(list(filter(None, taken_keys + outside_keys)), recipe)
            try:
                layers = [
                    self._merged_layer(layer, factor, recipe) if key is None else taken[key]
                    for key, layer, factor in zip(taken_keys, recipe.layers, factors, strict=True)
                ]
                outside = {
                    t.name: self._merged_outside(t, recipe)
                    if key is None
                    else _taken(taken[key][t.name], t.shape)
                    for key, t in zip(outside_keys, outside_plan, strict=True)
                }
                self._check_nan()
            finally:
                self._forget_unchecked()
        stay = [key is not None for key in taken_keys]
        entries = list(zip(src_layers, layers, stay, strict=True))
        modules = self._slots.arrange(entries, None if cut is None else cut.layers)
        parent, _, name = self._stack_name.rpartition(".")
        setattr(self.model.get_submodule(parent), name, nn.ModuleList(modules))
        for tensor_name, parameter in outside.items():
            point(self.model, self._outside[tensor_name], parameter)
        self._outside_now = outside
        self._tie()
        self._cut_config(recipe, cut)
        model: nn.Module = self.model
        return model

    def layers(self) -> list[nn.Module]:
        """The layers of the assembled model, bottom to top."""
        return list(self.model.get_submodule(self._stack_name))

    def check_pointers(self, recipe: Recipe) -> None:
        """Asserts that every taken layer of the assembled model is the candidate's own memory."""
        recipe = recipe.canonical()
        layers = zip(recipe.layers, scale_factors(recipe), strict=True)
        for out_layer, (layer, factor) in enumerate(layers):
            if isinstance(layer, Take) and not layer.modules and factor == 1.0:
                key = self._key(layer.model, layer.src_layer, recipe)
                expected = self._home(layer.src_layer).weights.get([key])[key].tensors
                module = self.model.get_submodule(f"{self._stack_name}.{out_layer}")
                for suffix, name in self.family.architecture.layers[layer.src_layer].items():
                    assert module.get_parameter(suffix).data_ptr() == expected[name].data_ptr()

    def _load_skeleton(self) -> Any:
        base = self.family.base
        dtype = getattr(torch, self._dtype) if self._dtype else "auto"
        model = load_model(base.folder, base.checkpoint.tensors, dtype)
        if base.reading.unties:  # HFLM ties by the config once more
            for config in configs_of(model):
                if getattr(config, "tie_word_embeddings", False):
                    config.tie_word_embeddings = False
        return model.eval().requires_grad_(False)

    def _evicted(self, group: Group) -> None:
        """Lets go of a group whose memory is needed."""
        parameters = self._wrapped.pop(group, {})
        self._slots.forget(parameters)
        for name, parameter in self._outside_now.items():
            if name in parameters and parameters[name].data_ptr() == parameter.data_ptr():
                let_go(self.model, self._outside[name])

    def _tie(self) -> None:
        for name, source in self._ties:
            point(self.model, name, self.model.get_parameter(source))

    def _home(self, place: Place) -> DevicePool:
        return self.homes[self._home_of[place] if isinstance(place, int) else 0]

    def _end(self, tensor_name: str) -> Place:
        is_first = tensor_name in self.family.architecture.embeddings
        return "embeddings" if is_first else "head"

    def _key(self, model: str, place: Place, recipe: Recipe) -> GroupKey:
        """A group as a recipe takes it: in the recipe's type, then that of the forward pass."""
        casts = getattr(torch, recipe.dtype), getattr(torch, self._dtype or recipe.dtype)
        return self._home(place).weights.key(model, place, casts)

    def _plan_outside(self, recipe: Recipe) -> list[OutTensor]:
        """The tensors outside the layers."""
        key = (recipe.embeddings, recipe.head, recipe.base, recipe.dtype, recipe.calibration)
        if key not in self._outside_plans:
            prefix = self.family.architecture.prefix
            tensors = make_plan(recipe, self.family).tensors
            self._outside_plans[key] = [t for t in tensors if not t.name.startswith(prefix)]
        return self._outside_plans[key]

    def _take(self, keys: list[GroupKey], recipe: Recipe) -> dict[GroupKey, Parameters]:
        """The candidates' own tensors, which stay where they are until the next recipe."""
        taken = {}
        groups: dict[GroupKey, Group] = {}
        for home in self.homes:
            own = [key for key in keys if self._home(key.place) is home]
            home.weights.hold(own)
            groups |= home.weights.get(own)
        for key, group in groups.items():
            if group not in self._wrapped:
                names = {name: name for name in group.tensors}
                if isinstance(key.place, int):
                    names = self._layer_names[key.place]
                    plan_layer(Take(key.model, key.place), 0, recipe, self.family)  # checks
                self._wrapped[group] = {
                    suffix: nn.Parameter(group.tensors[name], requires_grad=False)
                    for suffix, name in names.items()
                }
            taken[key] = self._wrapped[group]
        return taken

    def _merged_layer(self, layer: Layer, factor: float, recipe: Recipe) -> Parameters:
        # all that the tensors follow from: a layer's own scale is folded into those after it
        statistics = recipe.statistics_of(layer)
        key = (replace(layer, scale=1.0), factor, recipe.base, recipe.dtype, statistics)
        home = self._home(layer.src_layer)
        if key not in home.merged:
            plan = plan_layer(layer, 0, recipe, self.family, factor)
            begin = len(self.family.architecture.name(0, ""))
            suffix_of = {
                name[len(self.family.architecture.name(layer.src_layer, "")) :]: suffix
                for suffix, name in self._layer_names[layer.src_layer].items()
            }
            tensors = {suffix_of[t.name[begin:]]: t for t in plan}
            self._merge(key, layer.src_layer, tensors, recipe)
        home.merged.move_to_end(key)
        return home.merged[key]

    def _merged_outside(self, tensor: OutTensor, recipe: Recipe) -> nn.Parameter:
        key = (
            tensor.merge,
            tensor.name,
            tensor.shape,
            recipe.base,
            recipe.dtype,
            tensor.statistics,
        )
        place = self._end(tensor.name)
        home = self._home(place)
        if key not in home.merged:
            self._merge(key, place, {tensor.name: tensor}, recipe)
        home.merged.move_to_end(key)
        return home.merged[key][tensor.name]

    def _merge(self, key: Key, place: Place, tensors: dict[str, OutTensor], recipe: Recipe) -> None:
        """Computes tensors that have one place, and keeps them for recipes to come.

        Embeddings and heads are larger than layers: where candidates don't all fit on the device,
        they are merged from the files by the CPU.
        """
        home = self._home(place)
        on_gpu = home.device.type == "cuda"
        read = [t for t in tensors.values() if not on_gpu or t.is_copy or can_merge(t)]
        if home.weights.streams and not isinstance(place, int):
            read = []
        models = {s.model for t in read for s in (*t.sources, t.base) if s is not None}
        groups = home.weights.get([GroupKey(model, place) for model in models])
        self._borrowed = {group_key.model: group for group_key, group in groups.items()}
        try:
            with home.current():
                data = self._compute_all(home, key, list(tensors.values()))
        except torch.OutOfMemoryError as error:
            first = next(iter(tensors.values()))
            raise ResourceError(
                f"Merged layers do not fit on {home.device}: {first.name} found no place."
            ) from error
        finally:
            self._borrowed = {}
        dtype = getattr(torch, self._dtype or recipe.dtype)
        kept = self._kept_types.names(dtype)
        types = [
            torch.float32 if t.sources[0].info.name in kept else dtype for t in tensors.values()
        ]
        data = cast(data, types, [origin(t) for t in tensors.values()])
        parameters = {
            name: nn.Parameter(t, requires_grad=False)
            for name, t in zip(tensors, data, strict=True)
        }
        home.keep(key, parameters)

    def _compute_all(
        self, home: DevicePool, key: Key, tensors: Sequence[OutTensor]
    ) -> list[torch.Tensor]:
        """On the device, in the types of the plan."""
        result: dict[int, torch.Tensor] = {}
        launched = []
        for number, tensor in enumerate(tensors):
            if tensor.is_copy:
                source = tensor.sources[0]
                data = self._borrowed[source.model].tensors[source.info.name]
                # merged layers outlive the group
                result[number] = data if home.weights.backend.is_mapped else data.clone()
            elif home.device.type == "cuda" and self._borrowed and can_merge(tensor):
                launched.append(number)
            else:
                result[number] = self._compute(tensor).to(home.device)
        if launched:
            some = [tensors[n] for n in launched]
            merged, found = merge_on_gpu(some, self._handle, home.device)
            self._unchecked.append((home, key, some, found))
            result.update(zip(launched, merged, strict=True))
        return [result[number] for number in range(len(tensors))]

    def _check_nan(self) -> None:
        """Looks at what the GPU has found, once for a recipe: it waits for the merges.

        Raises:
            ModelError: a merged tensor holds NaN, or a number is too large for float16.
        """
        if not self._unchecked:
            return
        found = torch.cat([flags.to(self.device) for *_, flags in self._unchecked]).tolist()
        tensors = [tensor for _, _, some, _ in self._unchecked for tensor in some]
        for tensor, (nan, overflow) in zip(tensors, found, strict=True):
            if overflow or (nan and tensor.merge is not None):
                self._compute(tensor)  # says in which file, and where
                raise ModelError(f"{tensor.name}: the merged tensor is not a number.")
        self._unchecked.clear()

    def _forget_unchecked(self) -> None:
        for home, key, _, _ in self._unchecked:
            home.forget(key)
        self._unchecked.clear()

    def _compute(self, tensor: OutTensor) -> torch.Tensor:
        """In CPU memory."""
        is_loaded = self.device.type == "cpu" and not self.homes[0].weights.backend.is_mapped
        opened = self._loaded if is_loaded and self._borrowed else None
        job = ComputedTensor(tensor, self.family, torch.get_num_threads(), opened)
        buffer = _C.Buffer(max(tensor.n_bytes, 1))
        job.run(0, job.n_elements, buffer)
        return torch.utils.dlpack.from_dlpack(buffer.tensor(0, tensor.shape, tensor.dtype))

    def _loaded(self, source: Source) -> _C.Tensor:
        tensor = self._borrowed[source.model].tensors[source.info.name]
        return _C.Tensor.from_dlpack(_first_rows(tensor, source.info.shape))

    def _handle(self, source: Source) -> _C.DeviceTensor:
        found = self._borrowed[source.model].handle(source.info.name)
        if found.shape == source.info.shape:
            return found
        return found.tensor(0, source.info.shape, source.info.dtype)

    def _cut_config(self, recipe: Recipe, cut: Cut | None) -> None:
        """Makes everything outside the layers what it is in the cut model: configs with layer
        count, per-layer lists and vocabulary, and constants that follow from them."""
        if cut is None:
            full: Mapping[str, Any] = text_config(self._full_config)
            text: Mapping[str, Any] = text_config(cut_config(self._full_config, recipe.src_layers))
        else:
            full = vars(self.structure.shell.config.get_text_config())
            text = vars(cut.model_config.get_text_config())
            carry_over(self.model, self._outside_before)
            self._outside_before = carry_over(self.model, cut.outside)
        rows = vocabulary_rows(recipe, self.family)
        if rows is not None:
            text = {**text, "vocab_size": rows}
        self._config_keys |= {
            key for key, value in text.items() if key[0] != "_" and value != full.get(key)
        }
        kind = type(self.model.config.get_text_config())
        for config in self._configs:
            if isinstance(config, kind):
                for key in self._config_keys & text.keys():
                    object.__setattr__(config, key, text[key])  # past checks of one by another


def configs_of(model: nn.Module) -> list[Any]:
    """The config objects that a model's modules look at, each once."""
    found = {
        id(config): config
        for module in model.modules()
        for config in (getattr(module, "config", None),)
        if config is not None
    }
    return list(found.values())


def _taken(parameter: nn.Parameter, shape: tuple[int, ...]) -> nn.Parameter:
    """A candidate's own parameter, or one with its first rows."""
    if parameter.shape == shape:
        return parameter
    return nn.Parameter(_first_rows(parameter, shape), requires_grad=False)


def _first_rows(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A view on as many rows as the shape has; the tensor itself where that is all of them."""
    return tensor if tensor.shape == shape else tensor[: shape[0]]


def pick_device(device: str) -> torch.device:
    """The torch device of a configuration's `device`.

    Raises:
        UsageError: it is no device, or not one of this machine.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
        torch.empty(1, device=picked)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"evaluation.device: {device!r} can't be used: {reason}") from error
    return picked


def is_out_of_memory(error: BaseException) -> bool:
    """True for whatever torch and Python raise when memory is exhausted."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def _all_gpus() -> list[torch.device]:
    return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
