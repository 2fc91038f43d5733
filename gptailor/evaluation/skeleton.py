"""The skeleton: a stock transformers model whose parameters point to memory owned by others.

It has no weights of its own, only what is in no file, such as rotary frequencies. Its layers are
modules of the base in the order given by a recipe; configs and constants follow the cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from gptailor.evaluation.input_hooks import spread_modules
from gptailor.evaluation.kept_types import KeptTypes
from gptailor.evaluation.loading import load_model
from gptailor.evaluation.pointers import check_padding_rows, find_pointers
from gptailor.evaluation.signature import Constants, carry_over
from gptailor.evaluation.slots import Parameters, Slots, let_go, point
from gptailor.evaluation.structure import Cut, Structure
from gptailor.models.architecture import cut_config, text_config
from gptailor.models.family import Family


class Skeleton:
    """The base's model without weights.

    Args:
        family: has the base, and shows whether all candidates' files can be pointed at.
        dtype: of the forward pass; None for that of the base's files.

    Attributes:
        model: the transformers model.
        stack_name: the path of its layers.
        layer_names: for each source layer, parameter as its module names it → tensor of the files.
        kept_types: dtype of the forward pass → names of tensors that stay float32 in it.

    Raises:
        ModelError: transformers can't load the base, or a search can't be done with it.
    """

    def __init__(self, family: Family, dtype: str | None) -> None:
        base = family.base
        self.model = _load(family, dtype)
        self._structure = Structure(
            base.folder, base.config, base.checkpoint.tensors, self.model.dtype
        )
        pointers = find_pointers(self._structure, family)
        self._structure.check_steady(self.model)
        check_padding_rows(self.model, family, pointers)
        self.stack_name = self._structure.stack
        self.layer_names = pointers.layers
        self._outside, self._ties = pointers.outside, pointers.ties
        self._outside_now: Parameters = {}
        self._outside_before: Constants = {}  # values that the constants of a cut replaced
        self._configs = configs_of(self.model)
        self._full_config = self.model.config.to_dict()
        self._config_keys: set[str] = set()  # keys that cuts have changed so far
        self._source_layers = self.layers()
        self._slots = Slots(self._source_layers, self.layer_names)
        for name in self._outside.values():
            let_go(self.model, name)
        self._tie()
        self.kept_types = KeptTypes(
            self._structure.shell, base.folder, base.tensors.values(), self._structure.module_names
        ).names

    def layers(self) -> list[nn.Module]:
        """The layers of the model as it is now, bottom to top."""
        return list(self.model.get_submodule(self.stack_name))

    def move(self, device: torch.device) -> None:
        """Moves what is in no file to a device."""
        self.model.to(device)

    def spread(self, devices: Sequence[torch.device]) -> None:
        """Spreads what is in no file over several devices, and makes inputs follow.

        Args:
            devices: first the device of everything outside the layers, then one per source layer.
        """
        spread_modules(self.model, self._source_layers, self._outside.values(), devices)

    def cut(self, src_layers: Sequence[int]) -> Cut | None:
        """What a cut changes; None if it changes only the number of layers.

        Raises:
            UsageError: no config describes the remaining layers.
        """
        return None if self._structure.is_uniform else self._structure.cut(src_layers)

    def point(
        self,
        entries: Sequence[tuple[int, Parameters, bool]],
        outside: Parameters,
        cut: Cut | None,
        vocabulary_rows: int | None,
    ) -> None:
        """Turns the skeleton into the model of a recipe.

        Args:
            entries: one for each output layer, see `Slots.arrange`.
            outside: tensor of the files outside the layers → parameter.
            cut: what `cut` returned for the layers.
            vocabulary_rows: rows of embeddings and head; None if all candidates have as many.
        """
        modules = self._slots.arrange(entries, None if cut is None else cut.layers)
        parent, _, name = self.stack_name.rpartition(".")
        setattr(self.model.get_submodule(parent), name, nn.ModuleList(modules))
        for tensor_name, parameter in outside.items():
            point(self.model, self._outside[tensor_name], parameter)
        self._outside_now = outside
        self._tie()
        self._set_config([src_layer for src_layer, _, _ in entries], cut, vocabulary_rows)

    def replace(self, out_layer: int, changed: Parameters) -> nn.Module:
        """Gives a layer of the model as it is now other parameters; see `Slots.replace`."""
        module = self.layers()[out_layer]
        self._slots.replace(module, changed)
        return module

    def forget(self, parameters: Parameters) -> None:
        """Drops references to parameters whose memory is needed."""
        self._slots.forget(parameters)
        gone = [
            name
            for name, parameter in self._outside_now.items()
            if name in parameters and parameters[name].data_ptr() == parameter.data_ptr()
        ]
        for name in gone:
            let_go(self.model, self._outside[name])
            del self._outside_now[name]
        if gone:
            self._tie()  # a tied head also references the embeddings

    def forget_all_but(self, known: set[int]) -> None:
        """Drops layers' parameters that are not among these, given by `id` of their dictionary."""
        self._slots.forget_all_but(known)

    def _tie(self) -> None:
        for name, source in self._ties:
            point(self.model, name, self.model.get_parameter(source))

    def _set_config(self, src_layers: list[int], cut: Cut | None, rows: int | None) -> None:
        """Sets everything outside the layers as in the cut model: layer count, per-layer lists and
        vocabulary in the configs, and constants that follow from them."""
        if cut is None:
            full: Mapping[str, Any] = text_config(self._full_config)
            text: Mapping[str, Any] = text_config(cut_config(self._full_config, src_layers))
        else:
            full = vars(self._structure.shell.config.get_text_config())
            text = vars(cut.model_config.get_text_config())
            carry_over(self.model, self._outside_before)
            self._outside_before = carry_over(self.model, cut.outside)
        if rows is not None:
            text = {**text, "vocab_size": rows}
        self._config_keys |= {
            key for key, value in text.items() if key[0] != "_" and value != full.get(key)
        }
        kind = type(self.model.config.get_text_config())
        for config in self._configs:
            if isinstance(config, kind):
                for key in self._config_keys & text.keys():
                    object.__setattr__(config, key, text[key])  # bypasses checks between keys


def configs_of(model: nn.Module) -> list[Any]:
    """The config objects that a model's modules refer to, each once."""
    found = {
        id(config): config
        for module in model.modules()
        for config in (getattr(module, "config", None),)
        if config is not None
    }
    return list(found.values())


def _load(family: Family, dtype: str | None) -> Any:
    base = family.base
    model = load_model(
        base.folder, base.checkpoint.tensors, getattr(torch, dtype) if dtype else "auto"
    )
    if base.reading.unties:  # HFLM would tie again according to the config
        for config in configs_of(model):
            if getattr(config, "tie_word_embeddings", False):
                config.tie_word_embeddings = False
    return model.eval().requires_grad_(False)
