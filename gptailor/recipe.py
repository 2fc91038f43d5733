"""A recipe: the description of one stitched model, pure data, no weights.

It reads and writes `recipe.yaml` (schema `gptailor/recipe/1`), checks every key and bound, and
brings itself into the canonical form that is built and hashed: two recipes that build the same
model have the same hash.

A layer's entry takes one model's layer as it is (`Take`) or merges the same layer of several
models (`Merge`). `layer` is always a source layer, the 0-based index in the candidates.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from gptailor.errors import UsageError, unknown
from gptailor.merging.registry import checked_number, checked_weight, get_method
from gptailor.strict_yaml import load_yaml

SCHEMA = "gptailor/recipe/1"
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""Names of recipes and of transformers → names of safetensors."""

_KEYS = ("schema", "models", "base", "dtype", "embeddings", "head", "layers")
_SCALE_BOUNDS = (0.1, 10.0)


@dataclass(frozen=True)
class Take:
    """An output layer that is `model`'s layer `src_layer`, its output multiplied by `scale`."""

    model: str
    src_layer: int
    scale: float = 1.0

    @property
    def models(self) -> tuple[str, ...]:
        """The models that the layer is made of, in the recipe's order."""
        return (self.model,)

    def to_dict(self) -> dict[str, Any]:
        """The entry as `recipe.yaml` has it."""
        entry: dict[str, Any] = {"take": self.model, "layer": self.src_layer}
        return entry if self.scale == 1.0 else entry | {"scale": self.scale}


@dataclass(frozen=True)
class Merge:
    """An output layer that merges layer `src_layer` of several models.

    Attributes:
        method: a name in `merging.registry.METHODS`.
        src_layer: the source layer, the same in every model, the base included.
        weights: (model, weight) in the recipe's order; weight 1.0 where the method has no weights.
        parameters: (name, value) of every parameter of the method, in the registry's order.
        scale: factor on the layer's output.
    """

    method: str
    src_layer: int
    weights: tuple[tuple[str, float], ...]
    parameters: tuple[tuple[str, float], ...] = ()
    scale: float = 1.0

    @property
    def models(self) -> tuple[str, ...]:
        """The models that are merged, without the base."""
        return tuple(model for model, _ in self.weights)

    def parameter(self, name: str) -> float:
        """The value of a parameter that the method has."""
        return dict(self.parameters)[name]

    def to_dict(self) -> dict[str, Any]:
        """The entry as `recipe.yaml` has it, defaults left out."""
        method = get_method(self.method)
        entry: dict[str, Any] = {"merge": self.method, "layer": self.src_layer}
        if method.weighted:
            entry["weights"] = dict(self.weights)
        else:
            entry["models"] = list(self.models)
        values = dict(self.parameters)
        for parameter in method.parameters:
            value = values[parameter.name]
            if value != parameter.default:
                entry[parameter.name] = bool(value) if parameter.is_flag else value
        return entry if self.scale == 1.0 else entry | {"scale": self.scale}


Layer = Take | Merge


@dataclass(frozen=True)
class Recipe:
    """One stitched model.

    Attributes:
        models: name → reference (a folder, or a hub id), in the file's order.
        base: the model that gives config, tokenizer and whatever no entry names.
        layers: one entry for each output layer, bottom to top.
        embeddings: the model that gives the token embeddings.
        head: the model that gives final norm and output head.
        dtype: of every floating-point tensor in the result: a key of `DTYPES`.
    """

    models: Mapping[str, str]
    base: str
    layers: tuple[Layer, ...]
    embeddings: str
    head: str
    dtype: str = "bfloat16"
    _cache: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_layers(self) -> int:
        """How many output layers there are."""
        return len(self.layers)

    @property
    def src_layers(self) -> tuple[int, ...]:
        """The source layer of each output layer."""
        return tuple(layer.src_layer for layer in self.layers)

    def canonical(self) -> Recipe:
        """The same model in the form that is built: whatever has no effect is gone."""
        if "canonical" not in self._cache:
            layers = [canonical_layer(layer, self.base, self.models) for layer in self.layers]
            layers[-1] = replace(layers[-1], scale=1.0)  # the final norm does not see it
            self._cache["canonical"] = replace(self, layers=tuple(layers), _cache={})
        canonical: Recipe = self._cache["canonical"]
        return canonical

    @property
    def hash(self) -> str:
        """SHA-256 (64 hex digits) of what the recipe builds, whatever its models are called."""
        if "hash" not in self._cache:
            built = self.canonical()
            refs = built.models
            layers: list[Any] = []
            for layer in built.layers:
                entry: list[Any] = [layer.src_layer, layer.scale]
                if isinstance(layer, Take):
                    entry += ["take", refs[layer.model]]
                else:
                    sources = [[refs[model], weight] for model, weight in layer.weights]
                    entry += [layer.method, sources, [list(p) for p in layer.parameters]]
                layers.append(entry)
            ends = [refs[built.base], refs[built.embeddings], refs[built.head], built.dtype]
            text = json.dumps([SCHEMA, ends, layers], separators=(",", ":"))
            self._cache["hash"] = hashlib.sha256(text.encode()).hexdigest()
        digest: str = self._cache["hash"]
        return digest

    @property
    def point(self) -> str:
        """The short name of the recipe in a run: the first 8 digits of its hash."""
        return self.hash[:8]

    def to_dict(self) -> dict[str, Any]:
        """The recipe as `recipe.yaml` has it."""
        return {
            "schema": SCHEMA,
            "models": dict(self.models),
            "base": self.base,
            "dtype": self.dtype,
            "embeddings": self.embeddings,
            "head": self.head,
            "layers": [layer.to_dict() for layer in self.layers],
        }

    def to_yaml(self) -> str:
        """Canonical text: keys in a fixed order, one line for each layer."""
        data = self.to_dict()
        layers = data.pop("layers")
        lines = [
            yaml.safe_dump(
                layer, default_flow_style=True, sort_keys=False, width=10_000, allow_unicode=True
            ).strip()
            for layer in layers
        ]
        head = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=10_000)
        return head + "layers:\n" + "".join(f"  - {line}\n" for line in lines)

    @classmethod
    def from_yaml(cls, text: str, source: str = "recipe") -> Recipe:
        """Reads a recipe; `source` is the name used in errors.

        Raises:
            UsageError: not YAML, an unknown or missing key, a value outside its bounds.
        """
        return cls.from_dict(load_yaml(text, source), source)

    @classmethod
    def from_dict(cls, data: object, source: str = "recipe") -> Recipe:
        """Reads a recipe from what `to_dict` gives; raises like `from_yaml`."""
        data = _mapping(data, source)
        for key in data:
            if key not in _KEYS:
                raise unknown("key", key, _KEYS, source)
        if data.get("schema") != SCHEMA:
            raise UsageError(f"{source}: schema is {data.get('schema')!r}, but must be {SCHEMA!r}.")
        for key in ("models", "base", "layers"):
            if key not in data:
                raise UsageError(f"{source}: the key {key!r} is missing.")
        models = _mapping(data["models"], f"{source}: models")
        for name, ref in models.items():
            if not isinstance(name, str) or not isinstance(ref, str):
                raise UsageError(f"{source}: models must map names to folders or hub ids.")
            if not (name.isprintable() and ref.isprintable()):
                raise UsageError(f"{source}: models: {name!r} has characters that can't be shown.")
        base = _model(data["base"], models, f"{source}: base")
        dtype = data.get("dtype", "bfloat16")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise unknown("dtype", dtype, DTYPES, source)
        if not isinstance(data["layers"], list) or not data["layers"]:
            raise UsageError(f"{source}: layers must be a list with at least one entry.")
        layers = tuple(
            _layer(entry, models, f"{source}: layers[{i}]")
            for i, entry in enumerate(data["layers"])
        )
        return cls(
            models=dict(models),
            base=base,
            layers=layers,
            embeddings=_model(data.get("embeddings", base), models, f"{source}: embeddings"),
            head=_model(data.get("head", base), models, f"{source}: head"),
            dtype=dtype,
        )

    def with_models_relative_to(self, folder: Path) -> Recipe:
        """The recipe with local model folders made absolute, seen from `folder`."""
        models = {name: absolute_ref(ref, folder) for name, ref in self.models.items()}
        return replace(self, models=models, _cache={})


def absolute_ref(ref: str, folder: Path) -> str:
    """`ref` as an absolute path if it names a folder below or beside `folder`, else unchanged."""
    if ref.startswith(("./", "../", "/", "~")) or (folder / ref).is_dir():
        return str((folder / Path(ref).expanduser()).resolve())
    return ref


def canonical_layer(layer: Layer, base: str, refs: Mapping[str, str]) -> Layer:
    """The simplest entry that builds the same layer.

    Sources without effect are left out: those of weight 0, and the base where the formula has it
    anyway. A merge of which only one source counts is that source. Weights are normalised, λ is
    folded into them (not in `ties`, where one source makes the weight meaningless instead), and
    sources are sorted.

    Args:
        layer: an entry.
        base: the recipe's base.
        refs: the recipe's models: sources are sorted by what their names stand for, so that
            another name changes nothing.
    """
    if isinstance(layer, Take):
        return layer
    built = _SIMPLIFY[layer.method](layer, base)
    if isinstance(built, Take):
        return built
    weights = tuple(sorted(built.weights, key=lambda item: (refs.get(item[0], ""), item)))
    if built.method == "slerp" and weights[0][0] != built.models[0]:
        t = round(1.0 - built.parameter("t"), 9)
        return replace(built, weights=weights, parameters=(("t", t),))
    return replace(built, weights=weights)


def _rounded(value: float) -> float:
    """Nine digits; what no float32 could tell from nothing is nothing."""
    return float(f"{value:.9g}") if abs(value) > 1e-12 else 0.0


def _with(layer: Merge, weights: dict[str, float], **values: float) -> Merge:
    return replace(layer, weights=tuple(weights.items()), parameters=tuple(values.items()))


def _take(layer: Merge, model: str) -> Take:
    return Take(model, layer.src_layer, layer.scale)


def _canonical_linear(layer: Merge, base: str) -> Layer:
    del base
    weights = {model: w for model, w in layer.weights if w != 0.0}
    if layer.parameter("normalize"):
        total = math.fsum(weights.values())
        if abs(total) < 1e-8:
            return layer  # refused when it is built, with the reason
        weights = {model: w / total for model, w in weights.items()}
    weights = {model: _rounded(w) for model, w in weights.items() if _rounded(w)}
    if list(weights.values()) == [1.0]:
        return _take(layer, next(iter(weights)))
    return _with(layer, weights, normalize=0.0) if weights else layer


def _canonical_task_arithmetic(layer: Merge, base: str) -> Layer:
    factor = layer.parameter("lambda")
    weights = dict(layer.weights)
    if layer.parameter("normalize"):
        total = math.fsum(weights.values())
        factor /= 1.0 if abs(total) < 1e-8 else total  # mergekit's rule for a sum of zero
    weights = {m: _rounded(w * factor) for m, w in weights.items() if m != base}
    weights = {m: w for m, w in weights.items() if w}
    if not weights:
        return _take(layer, base)
    if list(weights.values()) == [1.0]:
        return _take(layer, next(iter(weights)))
    return _with(layer, weights, **{"lambda": 1.0, "normalize": 0.0})


def _canonical_slerp(layer: Merge, base: str) -> Layer:
    del base
    (first, second), t = layer.models, round(layer.parameter("t"), 9)
    if first == second or t == 0.0:
        return _take(layer, first)
    if t == 1.0:
        return _take(layer, second)
    return replace(layer, parameters=(("t", t),))


def _canonical_ties(layer: Merge, base: str) -> Layer:
    # the base's difference, and one of weight 0, never have the elected sign
    weights = {model: w for model, w in layer.weights if w != 0.0 and model != base}
    factor = layer.parameter("lambda")
    if not weights or factor == 0.0:
        return _take(layer, base)
    if len(weights) == 1 and layer.parameter("normalize"):
        if abs(next(iter(weights.values()))) >= 1e-8:  # below, the formula does not divide
            weights = dict.fromkeys(weights, 1.0)
        if layer.parameter("density") == 1.0 and (factor, *weights.values()) == (1.0, 1.0):
            return _take(layer, next(iter(weights)))
    return replace(layer, weights=tuple(weights.items()))


_SIMPLIFY: dict[str, Callable[[Merge, str], Layer]] = {
    "linear": _canonical_linear,
    "task_arithmetic": _canonical_task_arithmetic,
    "slerp": _canonical_slerp,
    "ties": _canonical_ties,
}


def _mapping(value: object, where: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{where} must be a mapping of keys to values.")
    return value


def _model(name: object, models: Mapping[str, str], where: str) -> str:
    if not isinstance(name, str) or name not in models:
        raise unknown("model", name, models, where)
    return name


def _layer(entry: object, models: Mapping[str, str], where: str) -> Layer:
    entry = dict(_mapping(entry, where))
    kinds = [key for key in ("take", "merge") if key in entry]
    if len(kinds) != 1:
        known = ("take", "merge", "layer", "weights", "models", "scale")
        for key in entry:
            if not kinds and key not in known:
                raise unknown("key", key, known, where)
        raise UsageError(f"{where} needs either 'take' or 'merge'.")
    src_layer = entry.pop("layer", None)
    if isinstance(src_layer, bool) or not isinstance(src_layer, int) or src_layer < 0:
        raise UsageError(f"{where}: layer is {src_layer!r}, but must be 0 or a higher integer.")
    scale = checked_number("scale", entry.pop("scale", 1.0), where)
    if not _SCALE_BOUNDS[0] <= scale <= _SCALE_BOUNDS[1]:
        raise UsageError(f"{where}: scale is {scale:g}, outside its bounds 0.1 to 10.")
    if kinds == ["take"]:
        model = _model(entry.pop("take"), models, where)
        for key in entry:
            raise unknown("key", key, ("take", "layer", "scale"), where)
        return Take(model, src_layer, scale)
    method = get_method(str(entry.pop("merge")), where)
    weights = _sources(entry, method.weighted, models, where)
    if not method.min_sources <= len(weights) <= method.max_sources:
        wanted = (
            f"{method.min_sources} to {method.max_sources}"
            if method.min_sources != method.max_sources
            else f"exactly {method.min_sources}"
        )
        raise UsageError(f"{where}: {method.name} takes {wanted} models, not {len(weights)}.")
    for key in entry:
        names = [p.name for p in method.parameters]
        if key not in names:
            raise unknown("key", key, ["merge", "layer", "weights", "scale", *names], where)
    values = method.checked(entry, where)
    if method.name == "linear" and values["normalize"] and abs(sum(w for _, w in weights)) < 1e-8:
        raise UsageError(f"{where}: the weights of linear add up to zero, so they can't be a mean.")
    return Merge(method.name, src_layer, weights, tuple(values.items()), scale)


def _sources(
    entry: dict[str, Any], weighted: bool, models: Mapping[str, str], where: str
) -> tuple[tuple[str, float], ...]:
    """Takes the sources out of a merge's entry, in the order of the recipe's models."""
    key = "weights" if weighted else "models"
    if key not in entry:
        raise UsageError(f"{where}: the key {key!r} is missing.")
    value = entry.pop(key)
    if not weighted:
        if not isinstance(value, list):
            raise UsageError(f"{where}: models must be a list of two models.")
        return tuple((_model(name, models, where), 1.0) for name in value)
    named = {
        _model(name, models, where): checked_weight(str(name), weight, where)
        for name, weight in _mapping(value, f"{where}: weights").items()
    }
    return tuple((name, named[name]) for name in models if name in named)


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in a file, its local models seen from the file's folder.

    Raises:
        UsageError: the file is missing or is no recipe.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UsageError(f"The recipe {path} can't be read: {reason}.") from error
    return Recipe.from_yaml(text, str(path)).with_models_relative_to(path.parent)
