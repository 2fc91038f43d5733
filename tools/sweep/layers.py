"""Handles layers without gptailor: finds them, compares two of them, and cuts a model by hand."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tools.sweep.recipes import Cut

_INDEX_NAMES = (
    "layer_idx", "layer_id", "layer_number", "block_idx", "seed", "layer_dic", "layer_block_map",
    "num_fwd_mem_blocks",
)  # fmt: skip
"""Attributes that only say where a layer is."""


def find_stack(model: nn.Module) -> str:
    """The path of the language model's layers: the largest list of modules."""
    best, size = "", 0
    for path, module in model.named_modules():
        aside = any(word in path for word in ("vision", "visual", "audio", "image", "mtp"))
        if isinstance(module, nn.ModuleList) and not aside and not path.startswith(f"{best}."):
            n = sum(p.numel() for p in module.parameters())
            if n > size:
                best, size = path, n
    return best


def compare_modules(one: nn.Module, other: nn.Module, values: bool) -> Iterator[tuple[str, str]]:
    """The differences of a layer from another: (what, "kind" or "constant" or "value")."""
    mine, theirs = (dict(m.named_modules()) for m in (one, other))
    for path in [*mine, *(p for p in theirs if p not in mine)]:
        if path not in mine or path not in theirs:
            yield f"module {path} only in {'it' if path in mine else 'its source'}", "kind"
            continue
        a, b = mine[path], theirs[path]
        if type(a).__name__ != type(b).__name__:
            yield f"{path} is {type(a).__name__}, not {type(b).__name__}", "kind"
        for key in sorted(set(vars(a)) | set(vars(b))):
            if key.startswith("_") or key in ("training", *_INDEX_NAMES):
                continue
            x, y = plain(vars(a).get(key, "—")), plain(vars(b).get(key, "—"))
            if x != y:
                number = all(type(v) in (int, float, list) for v in (x, y))
                yield f"{path}.{key} {x} ← {y}", "constant" if number else "kind"
    tensors = [dict([*m.named_parameters(), *m.named_buffers()]) for m in (one, other)]
    saved = one.state_dict()
    for name in sorted(set(tensors[0]) | set(tensors[1])):
        x, y = (t.get(name) for t in tensors)
        if x is None or y is None or x.shape != y.shape:
            yield f"tensor {name}: {shape(x)} ← {shape(y)}", "kind"
        elif x.dtype != y.dtype:
            yield f"tensor {name}: {x.dtype} ← {y.dtype}", "kind"
        elif values and not torch.equal(x, y):
            yield f"tensor {name} has other values", "value" if name in saved else "constant"


def shape(tensor: torch.Tensor | None) -> object:
    """A tensor's shape for messages."""
    return None if tensor is None else list(tensor.shape)


def plain(value: object) -> object:
    """The comparable part of an attribute; a constant if there is none."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    if isinstance(value, torch.Size | tuple | list):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return str({k: plain(v) for k, v in value.items()})
    if isinstance(value, torch.dtype):
        return str(value)
    if callable(value):
        return getattr(value, "__qualname__", type(value).__name__)
    return type(value).__name__


def cut_by_hand(cut: Cut, full: Mapping[str, Any], stack_name: str) -> Any:
    """The recipe's model, made from full ones: only the list of layers is replaced."""
    with torch.random.fork_rng():
        models = {name: copy.deepcopy(model) for name, model in full.items()}
    model = models[cut.ends]
    num_layers = len(model.get_submodule(stack_name))
    layers = []
    for out_layer, (name, src_layer) in enumerate(cut.layers):
        layer = copy.deepcopy(models[name].get_submodule(stack_name)[src_layer])
        for module in layer.modules():
            for key in ("layer_idx", "layer_id"):
                if isinstance(getattr(module, key, None), int):
                    setattr(module, key, out_layer)
            if src_layer in getattr(module, "layer_dic", {}):  # zamba2's adapters
                module.layer_dic = {out_layer: module.layer_dic[src_layer]}
        if cut.scale is not None and cut.scale[0] == out_layer:
            layer.register_forward_hook(scaled(cut.scale[1]))
        layers.append(layer)
    parent, _, leaf = stack_name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.ModuleList(layers))
    keep = [src for _, src in cut.layers]
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    for config in configs.values():
        cut_lists(config, keep, num_layers)
    for module in model.modules():
        if not any(module is m for layer in layers for m in layer.modules()):
            cut_lists(module, keep, num_layers)
    return model


def cut_lists(thing: Any, keep: Sequence[int], num_layers: int) -> None:
    """Cuts every list of a config or module that has one entry per layer, and its counts."""
    for key, value in list(vars(thing).items()):
        if isinstance(value, list | tuple) and len(value) == num_layers and key != "architectures":
            with contextlib.suppress(Exception):
                vars(thing)[key] = type(value)(value[src] for src in keep)
        elif key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"):
            vars(thing)[key] = len(keep)


def scaled(factor: float) -> Any:
    """A hook that multiplies a layer's output."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        del module, args
        if isinstance(output, tuple | list):
            return type(output)([output[0] * factor, *output[1:]])
        return output * factor

    return hook
