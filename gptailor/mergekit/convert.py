"""Turns a mergekit configuration and its opened models into a recipe.

mergekit gives every tensor its own parameters: a gradient depends on the layer within a slice, a
filter on the tensor's name. A recipe has one entry per layer, with exceptions for modules. So the
values of all tensors of a layer are computed first, then combined into one entry.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gptailor.errors import UsageError
from gptailor.mergekit.config import (
    PASSTHROUGH,
    MergekitConfig,
    Slice,
    merged_models,
    mergekit_parameters,
)
from gptailor.mergekit.setting import Setting, value_of
from gptailor.merging.registry import LINEAR, METHODS
from gptailor.models.checkpoint import FLOAT_DTYPES
from gptailor.models.family import Family
from gptailor.recipe import DTYPES, SCHEMA, Recipe

MAX_LAYERS = 10_000
"""The most layers of a result; a page of slices could ask for millions."""

Values = dict[str, Any]
"""The values for one tensor: a recipe's keys `weights` and parameters."""


@dataclass(frozen=True)
class _Tensor:
    """A tensor's name in the result and in the sources, and t, its position in the slice."""

    out_name: str
    src_name: str
    t: float


def to_recipe(config: MergekitConfig, family: Family) -> Recipe:
    """The recipe that builds what mergekit would build.

    Args:
        config: the configuration.
        family: its models, opened under the config's names.

    Raises:
        UsageError: a layer is out of range, a required parameter is missing for a tensor, or a
            value is outside its bounds.
    """
    for part in config.slices:
        if part.layer_range is not None and part.layer_range[1] > family.num_layers:
            raise UsageError(
                f"{part.where}: layer_range is {list(part.layer_range)}, but the models have "
                f"{family.num_layers} layers."
            )
    sizes = [end - first for first, end in (p.layer_range or (0, 0) for p in config.slices)]
    if sum(sizes) > MAX_LAYERS:
        raise UsageError(f"{config.source}: the slices add up to more than {MAX_LAYERS:,} layers.")
    data: dict[str, Any] = {
        "schema": SCHEMA,
        "models": dict(config.models),
        "base": config.base,
        "dtype": config.dtype or _common_dtype(config, family),
        "embeddings": _end(config, config.slices[0], family.architecture.embeddings),
        "head": _end(config, config.slices[-1], family.architecture.head),
        "layers": [],
    }
    for part in config.slices:
        first, end = part.layer_range or (0, family.num_layers)
        for src_layer in range(first, end):
            t = (src_layer - first) / (end - first - 1) if end - first > 1 else 1.0
            out_layer = len(data["layers"])
            suffixes = {
                suffix: _Tensor(family.architecture.name(out_layer, suffix), name, t)
                for suffix, name in family.architecture.layers[src_layer].items()
            }
            entry = _entry(config, part, suffixes)
            if isinstance(entry, str):
                entry = {"take": entry}
            data["layers"].append(entry | {"layer": src_layer})
    return Recipe.from_dict(data, config.source)


def _end(config: MergekitConfig, part: Slice, names: tuple[str, ...]) -> str | Values:
    """Embeddings or head, merged like a layer at the beginning of gradients."""
    return _entry(config, part, {name: _Tensor(name, name, 0.0) for name in names})


def _entry(
    config: MergekitConfig, part: Slice, tensors: Mapping[str, _Tensor]
) -> str | dict[str, Any]:
    """One entry of the recipe without its `layer`; a model's name if everything comes from it."""
    models = part.models
    if config.method == PASSTHROUGH:
        values = {key: _passed_through(config, part, tensor) for key, tensor in tensors.items()}
        entry = _with_modules(*grouped(values))
        return models[0] if entry == {"take": models[0]} else entry
    method = METHODS[config.method]
    base = config.base if config.has_base else None
    merged = merged_models(method, models, base)
    fixed: dict[str, Any] = {"merge": config.method}
    if not method.weighted:
        fixed["models"] = list(merged)
    if method.base == "optional" and base is not None:
        fixed["task_vectors"] = True
    values = {key: _values(config, part, merged, tensor) for key, tensor in tensors.items()}
    return fixed | _with_modules(*grouped(values))


def _with_modules(default: Values, modules: Mapping[str, Values]) -> dict[str, Any]:
    if not modules:
        return default
    differing = {
        key: values
        if values.keys() != default.keys()
        else {name: value for name, value in values.items() if default[name] != value}
        for key, values in modules.items()
    }
    return default | {"modules": differing}


def _passed_through(config: MergekitConfig, part: Slice, tensor: _Tensor) -> Values:
    """The values for a tensor that is taken unchanged, or times its scale."""
    scale = _of_model(config, part, 0, "scale", tensor)
    if scale is None or scale == 1.0:
        return {"take": part.models[0]}
    return {"merge": LINEAR.name, "weights": {part.models[0]: scale}, "normalize": False}


def _values(
    config: MergekitConfig, part: Slice, merged: tuple[str, ...], tensor: _Tensor
) -> Values:
    """The values for one tensor, with all parameters of the method."""
    declared = METHODS[config.method].by_name
    of_all, of_each = mergekit_parameters(config.method)
    values: Values = {}
    for name in of_all:
        value = _of_all(config, part, name, tensor, declared[name].is_flag)
        if value is None:
            value = declared[name].default
        if value is None:
            raise _missing(config, name, "", tensor.out_name)
        if declared[name].is_flag and value not in (0.0, 1.0):
            raise UsageError(
                f"{config.source}: {name} is {value:g} for {tensor.out_name}, but must be true or "
                "false."
            )
        values[name] = bool(value) if declared[name].is_flag else value
    for name in of_each:
        default = None if name == "weight" else declared[name].default
        each = {}
        for model in merged:
            value = _of_model(config, part, part.models.index(model), name, tensor)
            each[model] = default if value is None else value
            if each[model] is None:
                raise _missing(config, name, model, tensor.src_name)
        if name == "weight":
            values["weights"] = each
        else:
            values[name] = each if len(set(each.values())) > 1 else each[merged[0]]
    return values


def _of_model(
    config: MergekitConfig, part: Slice, index: int, name: str, tensor: _Tensor
) -> float | None:
    """A model's parameter: its own, else the slice's, else the global one; filters see the tensor's
    name in the source."""
    levels = (part.sources[index].parameters, part.parameters, config.parameters)
    return _first(levels, name, tensor.src_name, tensor.t, is_flag=False)


def _of_all(
    config: MergekitConfig, part: Slice, name: str, tensor: _Tensor, is_flag: bool
) -> float | None:
    """A parameter of the whole merge; filters see the tensor's name in the result."""
    return _first((part.parameters, config.parameters), name, tensor.out_name, tensor.t, is_flag)


def _first(
    levels: tuple[Mapping[str, Setting], ...], name: str, tensor: str, t: float, is_flag: bool
) -> float | None:
    """The value at the first level that has one for this tensor."""
    for parameters in levels:
        if name in parameters:
            value = value_of(parameters[name], tensor, t, is_flag=is_flag)
            if value is not None:
                return value
    return None


def _missing(config: MergekitConfig, name: str, model: str, tensor: str) -> UsageError:
    of_model = f" of {model}" if model else ""
    base = ""
    if model == config.base and config.has_base:
        base = f" ({config.method} merges the base_model like any other model)"
    return UsageError(
        f"{config.source}: {config.method} needs the parameter {name}{of_model}, and no value "
        f"applies to {tensor}{base}: add one under parameters, without a filter and after those "
        "with filters."
    )


def grouped(values: Mapping[str, Values]) -> tuple[Values, dict[str, Values]]:
    """Default values for most tensors, and part of a name → values for the others.

    The first part that a tensor's name contains counts. The default is chosen so that as few parts
    as possible are needed.

    Args:
        values: tensor → its values; at least one.
    """
    groups: dict[str, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(json.dumps(value, sort_keys=True), []).append(name)
    best: tuple[Values, dict[str, Values]] | None = None
    for members in groups.values():
        modules: dict[str, Values] = {}
        for others in groups.values():
            if others is not members:
                modules |= dict.fromkeys(_parts(others, values), values[others[0]])
        if best is None or len(modules) < len(best[1]):
            best = values[members[0]], modules
    assert best is not None, "a layer without tensors"
    for name, value in values.items():
        if next((v for part, v in best[1].items() if part in name), best[0]) != value:
            # a name is part of another one: write all of them, the longest first
            return best[0], {n: values[n] for n in sorted(values, key=len, reverse=True)}
    return best


def _parts(names: list[str], all_names: Mapping[str, Values]) -> list[str]:
    """Parts of names that together match all of `names`, and if possible no other name."""
    parts: list[str] = []
    for name in names:
        if any(part in name for part in parts):
            continue
        for part in [*name.split("."), name]:
            fits = [other for other in all_names if part in other]
            if part == name or (len(part) > 1 and set(fits) <= set(names)):
                parts.append(part)
                break
    return parts


def _common_dtype(config: MergekitConfig, family: Family) -> str:
    """The dtype that all floating-point tensors have; mergekit keeps it."""
    names = {
        info.dtype
        for candidate in family.candidates.values()
        for info in candidate.tensors.values()
        if info.dtype in FLOAT_DTYPES
    }
    found = [name for name, dtype in DTYPES.items() if dtype in names]
    if len(names) != 1 or not found:
        shown = ", ".join(sorted(names))
        raise UsageError(
            f"{config.source}: the models' tensors have several dtypes ({shown}): add out_dtype."
        )
    return found[0]
