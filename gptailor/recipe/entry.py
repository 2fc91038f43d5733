"""The entry for one output layer: a model's layer unchanged (`Take`), or a merge (`Merge`).

`layer` in a recipe is always a source layer, the 0-based index in the candidates. An entry may make
some of the layer's tensors differently (`modules`). Embeddings and head can have such entries, too,
without a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from gptailor.errors import UsageError, unknown
from gptailor.merging.parameter import Parametrised
from gptailor.merging.registry import (
    Method,
    Value,
    checked_number,
    checked_weight,
    get_method,
)

NO_LAYER = -1
"""`src_layer` of an entry for embeddings or head."""

_SCALE_BOUNDS = (0.1, 10.0)
_TINY = 1e-8


@dataclass(frozen=True)
class Take:
    """An output layer that is `model`'s layer `src_layer`.

    Attributes:
        model: the model that provides the layer.
        src_layer: the source layer.
        scale: factor on the layer's output.
        modules: (text, entry): tensors whose name within the layer contains the text are made by
            that entry instead; the first match counts. The entries have this one's source layer,
            no scale and no modules.
    """

    model: str
    src_layer: int
    scale: float = 1.0
    modules: tuple[tuple[str, Layer], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules", _as_parts(self))

    @property
    def models(self) -> tuple[str, ...]:
        """The models that the layer is made of, not counting those of its modules."""
        return (self.model,)

    @property
    def used_models(self) -> tuple[str, ...]:
        """All models that the layer is made of, without the base of merges."""
        return _used_models(self)

    def at(self, tensor_name: str) -> Layer:
        """The entry, without modules, that makes the tensor of that name within the layer."""
        return _at(self, tensor_name)

    def to_dict(self) -> dict[str, Any]:
        """The entry as it is written in `recipe.yaml`."""
        return _framed(self, {"take": self.model})


@dataclass(frozen=True)
class Merge(Parametrised):
    """An output layer that merges layer `src_layer` of several models.

    Attributes:
        method: a name in `merging.registry.METHODS`.
        src_layer: the source layer, the same in every model, the base included.
        weights: (model, weight) in the recipe's order; weight 1.0 if the method has no weights.
        parameters: (name, value) of every parameter of the method, in the registry's order;
            defaults are filled in. A value is a number (flags: 1.0 or 0.0), or a tuple with one
            for each source.
        scale: factor on the layer's output.
        modules: see `Take`.
    """

    method: str
    src_layer: int
    weights: tuple[tuple[str, float], ...]
    parameters: tuple[tuple[str, Value], ...] = ()
    scale: float = 1.0
    modules: tuple[tuple[str, Layer], ...] = ()

    def __post_init__(self) -> None:
        values = get_method(self.method).completed(dict(self.parameters))
        object.__setattr__(self, "parameters", values)
        object.__setattr__(self, "modules", _as_parts(self))

    @property
    def models(self) -> tuple[str, ...]:
        """The models that are merged, without the base, not counting those of its modules."""
        return tuple(model for model, _ in self.weights)

    @property
    def used_models(self) -> tuple[str, ...]:
        """All models that the layer is made of, without the base of merges."""
        return _used_models(self)

    @property
    def takes_base(self) -> bool:
        """True if the formula uses the recipe's base."""
        return get_method(self.method).takes_base(dict(self.parameters))

    @property
    def amounts(self) -> tuple[float, ...]:
        """The weight of each source, or the shares of two if a parameter determines them."""
        share = get_method(self.method).share
        if share is None:
            return tuple(weight for _, weight in self.weights)
        second = self.number(share.name)
        return 1.0 - second, second

    def at(self, tensor_name: str) -> Layer:
        """The entry, without modules, that makes the tensor of that name within the layer."""
        return _at(self, tensor_name)

    def to_dict(self) -> dict[str, Any]:
        """The entry as it is written in `recipe.yaml`, without defaults."""
        return _framed(self, _body(self, with_defaults=False))


Layer = Take | Merge


def _as_parts(layer: Layer) -> tuple[tuple[str, Layer], ...]:
    """A layer's modules with the layer's source layer, no scale and no modules."""
    return tuple(
        (text, replace(part, src_layer=layer.src_layer, scale=1.0, modules=()))
        for text, part in layer.modules
    )


def _at(layer: Layer, tensor_name: str) -> Layer:
    for text, part in layer.modules:
        if text in tensor_name:
            return replace(part, scale=layer.scale)
    return replace(layer, modules=()) if layer.modules else layer


def _used_models(layer: Layer) -> tuple[str, ...]:
    parts = (layer, *(part for _, part in layer.modules))
    return tuple(dict.fromkeys(model for part in parts for model in part.models))


def _framed(layer: Layer, body: dict[str, Any]) -> dict[str, Any]:
    """An entry with the keys that belong to the whole layer."""
    (kind, name), *others = body.items()
    entry: dict[str, Any] = {kind: name}
    if layer.src_layer != NO_LAYER:
        entry["layer"] = layer.src_layer
    entry |= others
    if layer.modules:
        entry["modules"] = {text: _override(part, layer) for text, part in layer.modules}
    return entry if layer.scale == 1.0 else entry | {"scale": layer.scale}


def _override(part: Layer, layer: Layer) -> dict[str, Any]:
    """The keys in which a module differs from its layer; all keys if it is of another kind."""
    if isinstance(part, Take):
        return {"take": part.model}
    if isinstance(layer, Take) or layer.method != part.method:
        return _body(part, with_defaults=False)
    inherited = _body(layer, with_defaults=True)
    mine = _body(part, with_defaults=True)
    return {key: value for key, value in mine.items() if value != inherited[key]}


def _body(layer: Merge, with_defaults: bool) -> dict[str, Any]:
    method = get_method(layer.method)
    entry: dict[str, Any] = {"merge": layer.method}
    if method.weighted:
        entry["weights"] = dict(layer.weights)
    else:
        entry["models"] = list(layer.models)
    for name, value in layer.parameters:
        parameter = method.by_name[name]
        if isinstance(value, tuple):
            entry[name] = dict(zip(layer.models, map(parameter.shown, value), strict=True))
        elif with_defaults or value != parameter.default:
            entry[name] = parameter.shown(value)
    return entry


# Reading


def read_entry(
    entry: object, models: Mapping[str, str], base: str, where: str, *, is_layer: bool = True
) -> Layer:
    """Reads an entry of a recipe.

    Args:
        entry: the parsed YAML.
        models: the recipe's models.
        base: the recipe's base.
        where: the place, for errors.
        is_layer: False for embeddings and head, which have neither layer nor scale.

    Raises:
        UsageError: an unknown or missing key, or a value outside its bounds.
    """
    entry = dict(as_mapping(entry, where))
    src_layer, scale = NO_LAYER, 1.0
    kind = _kind(entry, where)
    if is_layer:
        src_layer = entry.pop("layer", None)
        if isinstance(src_layer, bool) or not isinstance(src_layer, int) or src_layer < 0:
            raise UsageError(f"{where}: layer is {src_layer!r}, but must be 0 or a higher integer.")
        scale = checked_number("scale", entry.pop("scale", 1.0), where)
        if not _SCALE_BOUNDS[0] <= scale <= _SCALE_BOUNDS[1]:
            raise UsageError(f"{where}: scale is {scale:g}, outside its bounds 0.1 to 10.")
    overrides = as_mapping(entry.pop("modules", {}), f"{where}: modules")
    frame = ("layer", "scale", "modules") if is_layer else ("modules",)
    own = _read_body(kind, entry, models, base, where, frame)
    parts = []
    for text, override in overrides.items():
        place = f"{where}: modules: {text}"
        if not isinstance(text, str) or not text or not text.isprintable():
            raise UsageError(f"{where}: modules: {text!r} is not part of a tensor's name.")
        mine = dict(as_mapping(override, place))
        if not ("take" in mine or "merge" in mine):
            mine = _inherited(entry, mine) | mine
        parts.append((text, _read_body(_kind(mine, place), mine, models, base, place, ())))
    return replace(own, src_layer=src_layer, scale=scale, modules=tuple(parts))


def _inherited(entry: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """What a module inherits from its layer; per-source values only for sources that it has."""
    named = override.get("weights")
    if not isinstance(named, dict):
        return dict(entry)
    result = dict(entry)
    for key, value in entry.items():
        if key != "weights" and isinstance(value, dict):
            result[key] = {model: number for model, number in value.items() if model in named}
    return result


def _kind(entry: Mapping[str, Any], where: str) -> str:
    kinds = [key for key in ("take", "merge") if key in entry]
    if len(kinds) != 1:
        known = ("take", "merge", "layer", "weights", "models", "scale", "modules")
        for key in entry:
            if not kinds and key not in known:
                raise unknown("key", key, known, where)
        raise UsageError(f"{where} needs either 'take' or 'merge'.")
    return kinds[0]


def _read_body(
    kind: str,
    entry: Mapping[str, Any],
    models: Mapping[str, str],
    base: str,
    where: str,
    frame: tuple[str, ...],
) -> Layer:
    """Reads an entry without the keys of the whole layer, whose names are in `frame`."""
    if kind == "take":
        model = as_model(entry["take"], models, where)
        for key in entry:
            if key != "take":
                raise unknown("key", key, ("take", *frame), where)
        return Take(model, NO_LAYER)
    method = get_method(str(entry["merge"]), where)
    weights = _sources(entry, method, models, where)
    if not method.min_sources <= len(weights) <= method.max_sources:
        wanted = (
            f"{method.min_sources} to {method.max_sources}"
            if method.min_sources != method.max_sources
            else f"exactly {method.min_sources}"
        )
        plural = "model" if method.max_sources == 1 else "models"
        raise UsageError(f"{where}: {method.name} takes {wanted} {plural}, not {len(weights)}.")
    sources_key = "weights" if method.weighted else "models"
    values = {key: value for key, value in entry.items() if key not in ("merge", sources_key)}
    for key in values:
        if key not in method.by_name:
            known = ["merge", sources_key, *frame, *method.by_name]
            raise unknown("key", key, known, where)
    checked = method.checked(values, where, [model for model, _ in weights])
    merge = Merge(method.name, NO_LAYER, weights, tuple(checked.items()))
    _check_merge(merge, base, where)
    return merge


def _check_merge(merge: Merge, base: str, where: str) -> None:
    """Raises a `UsageError` if the values are valid separately but not together."""
    method = get_method(merge.method)
    is_mean = method.is_mean(dict(merge.parameters))
    if is_mean and abs(sum(weight for _, weight in merge.weights)) < _TINY:
        raise UsageError(
            f"{where}: the weights of {merge.method} add up to zero, so they define no mean."
        )
    has_no_effect = method.weighted and method.uses_base  # its difference from itself is zero
    if merge.takes_base and base in merge.models and not has_no_effect:
        raise UsageError(
            f"{where}: {base} is the base, which {merge.method} uses anyway: name only the other "
            "models."
        )


def _sources(
    entry: Mapping[str, Any], method: Method, models: Mapping[str, str], where: str
) -> tuple[tuple[str, float], ...]:
    """The sources of a merge; those with weights are in the order of the recipe's models."""
    key = "weights" if method.weighted else "models"
    if key not in entry:
        raise UsageError(f"{where}: the key {key!r} is missing.")
    value = entry[key]
    if not method.weighted:
        if not isinstance(value, list):
            raise UsageError(f"{where}: models must be a list of models.")
        return tuple((as_model(name, models, where), 1.0) for name in value)
    named = {
        as_model(name, models, where): checked_weight(str(name), weight, where)
        for name, weight in as_mapping(value, f"{where}: weights").items()
    }
    return tuple((name, named[name]) for name in models if name in named)


def as_mapping(value: object, where: str) -> dict[Any, Any]:
    """`value`; raises a `UsageError` if it is not a mapping."""
    if not isinstance(value, dict):
        raise UsageError(f"{where} must be a mapping of keys to values.")
    return value


def as_model(name: object, models: Mapping[str, str], where: str) -> str:
    """`name`; raises a `UsageError` if the recipe has no model of that name."""
    if isinstance(name, int) and not isinstance(name, bool):
        name = str(name)
    elif not isinstance(name, str) and isinstance(name, bool | float):
        raise UsageError(
            f"{where}: YAML reads the name of a model as {str(name).lower()}: put it in quotes."
        )
    if not isinstance(name, str) or name not in models:
        raise unknown("model", name, models, where)
    return name
