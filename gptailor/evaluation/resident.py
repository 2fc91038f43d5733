"""The resident model: all candidates opened once, a recipe assembled by pointing at layers.

The skeleton is a stock transformers model. A recipe's layers are modules of that skeleton whose
parameters point into the candidates' mapped files; dropping a layer moves no byte, and only merged
layers are computed (and kept for the next recipe that has them).
"""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.utils.dlpack
from torch import nn

from gptailor import _C
from gptailor.errors import ModelError, ResourceError, UsageError
from gptailor.models.architecture import cut_config, text_config
from gptailor.models.family import Family, has_tokenizer
from gptailor.recipe import Layer, Recipe, Take
from gptailor.stitching.compute import ComputedTensor
from gptailor.stitching.plan import OutTensor, Plan, make_plan, plan_layer, scale_factors

Parameters = dict[str, nn.Parameter]
"""Suffix ("self_attn.q_proj.weight") → parameter."""

_Key = tuple[Layer, float | str, str, str]
"""Canonical entry, factor of a layer or name of an outside tensor, base, dtype."""


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
        workers: how many of these share the device.

    Raises:
        ModelError: transformers can't load the base, or stores its layers in another way.
        UsageError: the device does not exist.
    """

    def __init__(
        self,
        family: Family,
        *,
        dtype: str = "auto",
        device: str = "auto",
        cache_bytes: int | None = None,
        workers: int = 1,
    ) -> None:
        self.family = family
        self.device = pick_device(device)
        self._dtype = None if dtype == "auto" else dtype
        if not has_tokenizer(family.base.folder):
            raise ModelError(f"The base {family.base.folder} has no tokenizer.")
        self._taken: dict[tuple[str, str, str], nn.Parameter] = {}
        self._merged: OrderedDict[_Key, Parameters] = OrderedDict()
        self._merged_bytes = 0
        if cache_bytes is None:
            base_bytes = sum(t.n_bytes for t in family.base.tensors.values())
            cache_bytes = min(8 * base_bytes, _memory_bytes(self.device) // (8 * workers))
        self._cache_bytes = cache_bytes
        self.model = self._load_skeleton()
        self._stack_name = self._module_name(family.architecture.prefix.rstrip("."))
        stack = self.model.get_submodule(self._stack_name)
        if not isinstance(stack, nn.ModuleList) or len(stack) != family.num_layers:
            raise ModelError(f"{family.base.folder}: transformers keeps its layers elsewhere.")
        self._slots = list(stack)
        self._full_config = self.model.config.to_dict()
        self._check_names()

    def assemble(self, recipe: Recipe) -> nn.Module:
        """Makes `model` the stitched model of a recipe; returns it.

        Raises:
            ModelError: a tensor that is merged holds NaN.
            UsageError: the recipe does not fit the family.
        """
        recipe = recipe.canonical()
        plan = make_plan(recipe, self.family)  # checks all before anything is changed
        layers = [
            self._layer_parameters(layer, factor, recipe)
            for layer, factor in zip(recipe.layers, scale_factors(recipe), strict=True)
        ]
        outside = self._outside_parameters(plan, recipe)
        used: set[int] = set()
        modules = []
        for out_layer, (layer, parameters) in enumerate(zip(recipe.layers, layers, strict=True)):
            slot = self._slots[layer.src_layer]
            if layer.src_layer in used:
                slot = copy.deepcopy(slot)  # the same source layer a second time
            used.add(layer.src_layer)
            for suffix, parameter in parameters.items():
                _point(slot, suffix, parameter)
            for module in slot.modules():
                if isinstance(getattr(module, "layer_idx", None), int):
                    module.layer_idx = out_layer  # type: ignore[assignment]
            modules.append(slot)
        parent, _, name = self._stack_name.rpartition(".")
        setattr(self.model.get_submodule(parent), name, nn.ModuleList(modules))
        for tensor_name, parameter in outside.items():
            _point(self.model, self._module_name(tensor_name), parameter)
        if self.family.base.is_tied:
            embeddings = self.model.get_input_embeddings().weight
            self.model.get_output_embeddings().weight = embeddings
        self._cut_config(recipe.src_layers)
        model: nn.Module = self.model
        return model

    def layers(self) -> list[nn.Module]:
        """The layers of the assembled model, bottom to top."""
        return list(self.model.get_submodule(self._stack_name))

    def check_pointers(self, recipe: Recipe) -> None:
        """Asserts that every taken layer of the assembled model is the candidate's own memory."""
        for out_layer, layer in enumerate(recipe.canonical().layers):
            if isinstance(layer, Take) and not layer.modules:
                expected = self._layer_parameters(layer, 1.0, recipe)
                module = self.model.get_submodule(f"{self._stack_name}.{out_layer}")
                for suffix, parameter in expected.items():
                    assert module.get_parameter(suffix).data_ptr() == parameter.data_ptr(), suffix

    def _load_skeleton(self) -> Any:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        folder = self.family.base.folder
        dtype = getattr(torch, self._dtype) if self._dtype else "auto"
        had_bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, trust_remote_code=False
            )
        except (ValueError, OSError, KeyError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelError(f"transformers can't load {folder}: {reason}") from error
        finally:
            if had_bars:
                logging.enable_progress_bar()
        try:
            return model.to(self.device).eval().requires_grad_(False)
        except torch.OutOfMemoryError as error:
            raise ResourceError(f"{folder} does not fit on {self.device}.") from error

    def _layer_parameters(self, layer: Layer, factor: float, recipe: Recipe) -> Parameters:
        # all that the tensors follow from: a layer's own scale is folded into those after it
        key = (replace(layer, scale=1.0), factor, recipe.base, recipe.dtype)
        if key in self._merged:
            self._merged.move_to_end(key)
            return self._merged[key]
        tensors = plan_layer(layer, 0, recipe, self.family, factor)
        cut = len(self.family.architecture.name(0, ""))
        parameters = {t.name[cut:]: self._parameter(t, recipe) for t in tensors}
        if isinstance(layer, Take) and not layer.modules and factor == 1.0:
            return parameters  # kept in `_taken`, tensor by tensor
        self._keep(key, parameters)
        return parameters

    def _outside_parameters(self, plan: Plan, recipe: Recipe) -> Parameters:
        """Embeddings and head, by full name; the merged ones are kept like merged layers."""
        prefix = self.family.architecture.prefix
        result: Parameters = {}
        for tensor in plan.tensors:
            if tensor.name.startswith(prefix):
                continue
            if tensor.merge is None:
                result[tensor.name] = self._parameter(tensor, recipe)
                continue
            key = (tensor.merge, tensor.name, recipe.base, recipe.dtype)
            if key not in self._merged:
                self._keep(key, {tensor.name: self._parameter(tensor, recipe)})
            self._merged.move_to_end(key)
            result |= self._merged[key]
        return result

    def _keep(self, key: _Key, parameters: Parameters) -> None:
        """Keeps merged parameters, and lets go of those that were not used for longest."""
        self._merged[key] = parameters
        self._merged_bytes += _n_bytes(parameters.values())
        while self._merged_bytes > self._cache_bytes and len(self._merged) > 1:
            _, old = self._merged.popitem(last=False)
            self._merged_bytes -= _n_bytes(old.values())

    def _parameter(self, tensor: OutTensor, recipe: Recipe) -> nn.Parameter:
        """The parameter of one tensor: a view on the mapping wherever the types allow it."""
        if tensor.merge is not None or tensor.factor != 1.0:
            return self._to_parameter(self._compute(tensor), tensor, recipe)
        source = tensor.sources[0]
        key = (source.model, source.info.name, tensor.dtype)
        if key not in self._taken:
            if tensor.is_copy:
                checkpoint = self.family.candidates[source.model].checkpoint
                view = torch.utils.dlpack.from_dlpack(checkpoint.tensor(source.info.name))
            else:
                view = self._compute(tensor)
            self._taken[key] = self._to_parameter(view, tensor, recipe)
        return self._taken[key]

    def _compute(self, tensor: OutTensor) -> torch.Tensor:
        job = ComputedTensor(tensor, self.family, threads=torch.get_num_threads())
        buffer = _C.Buffer(max(tensor.n_bytes, 1))
        job.run(0, job.n_elements, buffer)
        return torch.utils.dlpack.from_dlpack(buffer.tensor(0, tensor.shape, tensor.dtype))

    def _to_parameter(self, data: torch.Tensor, tensor: OutTensor, recipe: Recipe) -> nn.Parameter:
        dtype = getattr(torch, self._dtype or recipe.dtype)
        if not data.is_floating_point():
            dtype = data.dtype
        try:
            moved = data.to(device=self.device, dtype=dtype)
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"The candidates do not fit on {self.device}: {tensor.name} found no place."
            ) from error
        return nn.Parameter(moved, requires_grad=False)

    def _cut_config(self, src_layers: tuple[int, ...]) -> None:
        """Gives the model's config object the cut layer count and per-layer lists."""
        full = text_config(self._full_config)
        cut = text_config(cut_config(self._full_config, src_layers))
        config = self.model.config
        if full is not self._full_config:
            config = config.get_text_config()
        for key, value in cut.items():
            if value != full[key] or getattr(config, key, value) != value:
                object.__setattr__(config, key, value)

    def _module_name(self, tensor_name: str) -> str:
        """A checkpoint's name as the model has it: some files leave out the base model's prefix."""
        first = tensor_name.partition(".")[0]
        if hasattr(self.model, first):
            return tensor_name
        return f"{self.model.base_model_prefix}.{tensor_name}"

    def _check_names(self) -> None:
        """Every tensor of the file must be a parameter or buffer of the same shape."""
        known = self.model.state_dict()
        for name, info in self.family.base.tensors.items():
            found = known.get(self._module_name(name))
            if found is None or tuple(found.shape) != info.shape:
                raise ModelError(
                    f"{self.family.base.folder}: transformers has no parameter of the shape "
                    f"{list(info.shape)} for {name}; this architecture is not supported yet."
                )


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


def _point(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Makes the parameter (or buffer) `name` below `module` that tensor, without a copy."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._buffers:
        owner._buffers[leaf] = parameter.data
    else:
        setattr(owner, leaf, parameter)


def is_out_of_memory(error: BaseException) -> bool:
    """True for whatever torch and Python raise when memory is exhausted."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def _memory_bytes(device: torch.device) -> int:
    """All the memory that a device has."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _n_bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)
