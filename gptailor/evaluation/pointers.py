"""Maps parameters of the model to tensors of the files, so that a resident model can point at them.

Layers are used exactly as stored in the files. Where transformers fuses or reshapes tensors on
load, where layers share weights, or where a model writes to them, a search is refused; stitching is
not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.utils.dlpack
from torch import nn

from gptailor.errors import ModelError
from gptailor.evaluation.structure import Structure
from gptailor.models.family import Family


@dataclass(frozen=True)
class Pointers:
    """Which parameters the tensors of the files become.

    Attributes:
        layers: for each source layer, parameter as its module names it → tensor of the files.
        outside: tensor of the files outside the layers → parameter.
        ties: parameters that are in no file, each with the parameter that it is tied to.
    """

    layers: tuple[dict[str, str], ...]
    outside: dict[str, str]
    ties: tuple[tuple[str, str], ...]


def find_pointers(structure: Structure, family: Family) -> Pointers:
    """Finds the pointers without reading weights.

    Raises:
        ModelError: a search can't be done with models of this kind.
    """
    base = family.base
    kind = structure.shell.config.model_type
    names = {name: _target(structure, name, base.folder) for name in base.tensors}
    for name, target in names.items():
        shape = tuple(_tensor(structure.shell, target).shape)
        if name in structure.converted or shape != base.tensors[name].shape:
            raise ModelError(
                f"{base.folder}: transformers does not keep {name} as it is in the file, but fuses "
                f"or reshapes it on load ({kind}), which a search can't do yet; stitching can."
            )
    structure.check_steady()
    layers = []
    for src_layer, tensors in enumerate(family.architecture.layers):
        begin = len(f"{structure.stack}.{src_layer}.")
        layers.append({names[name][begin:]: name for name in tensors.values()})
    inside = {name for layer in layers for name in layer.values()}
    outside = {name: target for name, target in names.items() if name not in inside}
    held = set(names.values())
    ties = []
    for tied, source in structure.shell.all_tied_weights_keys.items():
        if tied in held and source in held:
            continue  # two different tensors, see `Reading.unties`
        name, of = (tied, source) if source in held else (source, tied)
        if of in outside.values() and not name.startswith(f"{structure.stack}."):
            ties.append((name, of))
    parameters = {n for n, _ in structure.shell.named_parameters(remove_duplicate=False)}
    left = parameters - held - {name for name, _ in ties}
    if left:
        raise ModelError(
            f"{base.folder}: no file has {min(left)} as it is in the model ({kind}), which a "
            "search can't handle yet; stitching can."
        )
    return Pointers(tuple(layers), outside, tuple(ties))


def check_padding_rows(model: nn.Module, family: Family, pointers: Pointers) -> None:
    """Checks that loading has not changed the embedding of the padding token, as some models do.

    Args:
        model: the base, just loaded.
        family: the candidates, with the base.
        pointers: see `find_pointers`.

    Raises:
        ModelError: the embedding differs from the file's, so loading the stitched model would
            change it, too.
    """
    base = family.base
    files = {target: name for name, target in pointers.outside.items()}
    for path, module in model.named_modules():
        name = files.get(f"{path}.weight")
        if name is None or not isinstance(module, nn.Embedding) or module.padding_idx is None:
            continue
        row = torch.utils.dlpack.from_dlpack(base.checkpoint.tensor(name))[module.padding_idx]
        loaded = module.weight[module.padding_idx]
        if not torch.equal(row.to(loaded.dtype), loaded):
            raise ModelError(
                f"{base.folder}: transformers changes row {module.padding_idx} of {name} when it "
                f"loads the model ({family.base.config.get('model_type')}), so a search would "
                "score a different model: save it again with transformers, which writes what it "
                "uses."
            )


def _target(structure: Structure, name: str, folder: object) -> str:
    target = structure.module_names.get(name)
    if target is None:
        raise ModelError(f"{folder}: transformers does not use {name}.")
    return target


def _tensor(model: nn.Module, name: str) -> torch.Tensor:
    path, _, leaf = name.rpartition(".")
    found: torch.Tensor = getattr(model.get_submodule(path), leaf)
    return found
