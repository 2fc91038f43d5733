"""The reader that asks transformers which tensors it ignores or ties, and how to cut a model."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gptailor.errors import ModelError
from gptailor.evaluation.loading import UnknownModel, check_loaded, load_shell, rehearse, some
from gptailor.evaluation.structure import Structure
from gptailor.models.architecture import cut_config, layer_count, stacks_of, text_config
from gptailor.models.checkpoint import Checkpoint
from gptailor.models.reading import Reading, named_reading, tied_reading


class TransformersReader:
    """A `models.reading.Reader` that builds each folder's structure once."""

    def __init__(self) -> None:
        self._structures: dict[tuple[Path, torch.dtype | None], Structure] = {}

    def structure(
        self, checkpoint: Checkpoint, config: Mapping[str, Any], dtype: torch.dtype | None = None
    ) -> Structure:
        """The modules of a folder; raises as `Structure` does."""
        key = checkpoint.folder, dtype
        if key not in self._structures:
            self._structures[key] = Structure(checkpoint.folder, config, checkpoint.tensors, dtype)
        return self._structures[key]

    def read(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> Reading:
        """What transformers makes of a folder.

        Raises:
            ModelError: transformers can't load the folder, would initialize missing tensors at
                random, or doesn't keep the layers in one stack.
        """
        folder = checkpoint.folder
        try:
            structure = self.structure(checkpoint, config)
        except UnknownModel as error:
            stacks = stacks_of(checkpoint.tensors, layer_count(text_config(dict(config))) or 0)
            if len(stacks) > 1:
                raise ModelError(
                    f"{error} It can't be told which of {' and '.join(stacks)} are its layers."
                ) from error
            note = f"{error} So its layers were found by name, and nothing can be compared."
            return replace(named_reading(checkpoint), notes=(note,))
        reading = Reading(prefix=structure.prefix)
        ignored = {name for name, target in structure.module_names.items() if target is None}
        _check_depth(structure, ignored)
        if ignored:
            note = (
                f"{folder}: transformers does not use {some(sorted(ignored))}, so "
                f"{'they are' if len(ignored) > 1 else 'it is'} left out."
            )
            reading = Reading(frozenset(ignored), prefix=structure.prefix, notes=(note,))
        reading = replace(reading, shared=_shared(structure))
        reading = _tied(structure, checkpoint, reading)
        kept = [t for t in checkpoint.tensors.values() if t.name not in reading.ignored]
        found = rehearse(structure.shell, folder, [(t.name, t.dtype, t.shape) for t in kept])
        check_loaded(found, folder, strict=False)
        return reading

    def cut_config(
        self, checkpoint: Checkpoint, config: Mapping[str, Any], src_layers: Sequence[int]
    ) -> tuple[dict[str, Any], tuple[str, ...]]:
        """A config.json for these layers, and notes; raises as `Structure.cut` does."""
        try:
            self.structure(checkpoint, config)
        except UnknownModel:
            return cut_config(config, src_layers), ()
        cut = self.structure(checkpoint, config).cut(src_layers)
        if not cut.moved:
            return cut.config, ()
        names = some(sorted(cut.moved))
        note = (
            f"{checkpoint.folder}: this architecture computes {names} of a layer from its index or "
            "the number of layers, so kept layers have different values than in their source."
        )
        return cut.config, (note,)

    def check_result(
        self, config: Mapping[str, Any], tensors: Iterable[tuple[str, str, tuple[int, ...]]]
    ) -> None:
        """Checks a result against the model of its config.

        Raises:
            ModelError: a tensor would be initialized at random or left out, or has another shape.
        """
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            (folder / "config.json").write_text(json.dumps(config))
            try:
                found = rehearse(load_shell(folder, None), folder, tensors)
            except ModelError as error:
                if isinstance(error, UnknownModel):
                    return
                text = str(error).replace(str(folder), "the result")
                raise ModelError(f"Nothing was written: {text}") from error
        check_loaded(found, "Nothing was written: the result", strict=True)


def _check_depth(structure: Structure, ignored: set[str]) -> None:
    """Checks that layers beyond the stack are of another kind, such as multi-token prediction.

    Raises:
        ModelError: they are ordinary layers that config.json doesn't count.
    """
    numbered = re.compile(rf"{re.escape(structure.prefix)}([0-9]+)\.(.*)")
    inside: dict[int, set[str]] = {}
    for name in structure.module_names:
        if place := numbered.fullmatch(name):
            inside.setdefault(int(place[1]), set()).add(place[2])
    kinds = [inside[i] for i in inside if i < structure.num_layers]
    behind = {i: names for i, names in inside.items() if i >= structure.num_layers}
    if any(names in kinds for names in behind.values()):
        raise ModelError(
            f"{structure.folder}: config.json says {structure.num_layers} layers, but the weights "
            f"have {max(inside) + 1}."
        )


def _tied(structure: Structure, checkpoint: Checkpoint, reading: Reading) -> Reading:
    """Adds whether the output head is tied to the embeddings, see `tied_reading`."""
    shell = structure.shell
    head, embeddings = (
        _weight_name(shell, module)
        for module in (shell.get_output_embeddings(), shell.get_input_embeddings())
    )
    if head is None or embeddings is None:
        return reading
    files = {target: name for name, target in structure.module_names.items() if target}
    pairs = shell.all_tied_weights_keys.items()
    ties = (head, embeddings) in pairs or (embeddings, head) in pairs
    return tied_reading(
        checkpoint, ties, files.get(head, head), files.get(embeddings, embeddings), reading
    )


def _shared(structure: Structure) -> str:
    """A parameter that two layers share; empty if there is none."""
    inside = re.compile(rf"{re.escape(structure.stack)}\.([0-9]+)\.")
    for name, other in structure.shell.all_tied_weights_keys.items():
        places = inside.match(name), inside.match(other)
        if places[0] and places[1] and places[0][1] != places[1][1]:
            return str(name)
    return ""


def _weight_name(shell: Any, module: Any) -> str | None:
    """The name of a module's weight in the whole model."""
    if getattr(module, "weight", None) is None:
        return None
    path = next((path for path, m in shell.named_modules() if m is module), None)
    return None if path is None else f"{path}.weight"
