"""A plan: for each tensor of the stitched model, where its bytes come from.

A recipe describes layers, a plan describes tensors. The writer and the resident model follow the
same plan, so the stitcher writes exactly what the search scored.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gptailor.errors import ModelError, UsageError, unknown
from gptailor.merging.registry import LINEAR, get_method
from gptailor.models.architecture import text_config
from gptailor.models.checkpoint import FLOAT_DTYPES, TensorInfo
from gptailor.models.family import Family
from gptailor.models.scales import check_scales
from gptailor.recipe import DTYPES, NO_LAYER, End, Layer, Merge, Recipe, Take
from gptailor.stitching.patch import Patch


@dataclass(frozen=True)
class Source:
    """One candidate's tensor."""

    model: str
    info: TensorInfo


@dataclass(frozen=True)
class OutTensor:
    """One tensor of the result.

    Attributes:
        name: its key in the result.
        dtype: as safetensors names it.
        shape: as in the sources.
        sources: the tensors that it is made of, without the base of a merge.
        merge: how they are merged, canonical and without modules; None if the only source is
            copied (or cast).
        base: the base's tensor, for methods whose formula uses it.
        factor: the result is multiplied by it (a folded layer scale).
        key: identifies the source tensor for random masks, see `tensor_key`.
        statistics: those of each source, for calibrated methods.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    merge: Merge | None = None
    base: Source | None = None
    factor: float = 1.0
    key: int = 0
    statistics: tuple[TensorInfo, ...] = ()

    @property
    def is_copy(self) -> bool:
        """True if the bytes of the source are the bytes of the result."""
        return (
            self.merge is None and self.factor == 1.0 and self.sources[0].info.dtype == self.dtype
        )

    @property
    def n_bytes(self) -> int:
        """Length in the result."""
        info = self.sources[0].info
        return info.n_bytes if self.dtype == info.dtype else info.n_elements * _SIZES[self.dtype]


@dataclass(frozen=True)
class Plan:
    """What a recipe builds, tensor by tensor, in the order of writing.

    Attributes:
        recipe: the canonical recipe.
        config: the result's config, cut to its layers.
        tensors: the result's tensors; adjacent sources stay adjacent.
        notes: what the user should know about the cut, a sentence each.
    """

    recipe: Recipe
    config: dict[str, Any]
    tensors: tuple[OutTensor, ...]
    notes: tuple[str, ...] = ()

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.n_bytes for t in self.tensors)


_SIZES = {"BF16": 2, "F16": 2, "F32": 4}


REPAIR = "repair"
"""As `Source.model`: the tensor comes from a patch."""


def make_plan(recipe: Recipe, family: Family, patch: Patch | None = None) -> Plan:
    """Resolves a recipe to tensors.

    Args:
        recipe: what to build.
        family: the candidates.
        patch: the weights of the recipe's repair; None for the model without it.

    Raises:
        UsageError: a layer's index is out of range, a scale can't be folded, or a module matches no
            tensor.
        ModelError: a tensor has a dtype that can't be merged or cast.
    """
    check_recipe(recipe, family)
    recipe = recipe.canonical()
    config, notes = family.base.cut_config(recipe.src_layers)
    for key in ("dtype", "torch_dtype"):
        for part in (config, text_config(config)):
            if key in part or key == "dtype":
                part[key] = recipe.dtype
    set_vocabulary(config, vocabulary_rows(recipe, family))
    tensors = [
        *plan_end(recipe.embeddings, family.architecture.embeddings, recipe, family),
        *_stack(recipe, family),
        *plan_end(recipe.head, family.architecture.head, recipe, family),
    ]
    if patch is not None:
        tensors = _patched(tensors, patch)
    return Plan(recipe, config, tuple(tensors), notes)


def _patched(tensors: Sequence[OutTensor], patch: Patch) -> list[OutTensor]:
    """The same tensors, with those of the patch in their places.

    Raises:
        ModelError: the patch belongs to another model.
    """
    left = dict(patch.tensors)
    result = []
    for tensor in tensors:
        info = left.pop(tensor.name, None)
        if info is None:
            result.append(tensor)
            continue
        if (info.dtype, info.shape) != (tensor.dtype, tensor.shape):
            raise ModelError(
                f"{patch.path}: {info.name} is {info.dtype} of the shape {list(info.shape)}, but "
                f"the recipe needs {tensor.dtype} of the shape {list(tensor.shape)}: remove the "
                "file, and it is computed again."
            )
        source = Source(REPAIR, info)
        result.append(OutTensor(tensor.name, tensor.dtype, tensor.shape, (source,)))
    if left:
        raise ModelError(f"{patch.path} holds {next(iter(left))}, which the recipe does not build.")
    return result


def check_recipe(recipe: Recipe, family: Family) -> None:
    """Checks that all layers, models and modules named in a recipe exist.

    Raises:
        UsageError: one does not, a scale can't be folded, or a merge lacks statistics.
        ModelError: statistics are corrupt, or belong to other weights; or it is not settled whether
            the models fit together.
    """
    family.check_settled()
    if any(layer.scale != 1.0 for layer in recipe.layers):  # the canonical form drops the last one
        check_scales(family.base.config, family.base.folder)
        if recipe.repair is not None:
            raise UsageError("A recipe with scales can't be repaired: leave out scale or repair.")
    recipe = recipe.canonical()
    _check_layers(recipe, family)
    _check_shared(recipe, family)
    _check_modules(recipe, family)
    _check_statistics(recipe, family)


def plan_layer(
    layer: Layer, out_layer: int, recipe: Recipe, family: Family, factor: float = 1.0
) -> list[OutTensor]:
    """The tensors of one output layer, in the order of the first source's file.

    Args:
        layer: the entry, in canonical form.
        out_layer: its index in the result.
        recipe: provides base and dtype.
        family: the candidates.
        factor: on the projections that write to the residual stream.
    """
    architecture = family.architecture
    scaled = architecture.residual_writers(layer.src_layer) if factor != 1.0 else ()
    result = []
    for suffix, name in architecture.layers[layer.src_layer].items():
        result.append(
            _made(
                layer.at(suffix),
                architecture.name(out_layer, suffix),
                name,
                recipe,
                family,
                factor if suffix in scaled else 1.0,
            )
        )
    result.sort(key=_position)
    return result


def scale_factors(recipe: Recipe) -> list[float]:
    """For each output layer, the factor on what it writes to the residual stream.

    Scaling a layer's output by s is equivalent to scaling what every later layer writes by 1/s:
    layers and the final norm read the stream through a norm, which cancels a scale (up to its
    epsilon).
    """
    factors, scale = [], 1.0
    for layer in recipe.layers:
        factors.append(1.0 / scale)
        scale *= layer.scale
    return factors


def _stack(recipe: Recipe, family: Family) -> Iterator[OutTensor]:
    factors = scale_factors(recipe)
    for out_layer, (layer, factor) in enumerate(zip(recipe.layers, factors, strict=True)):
        yield from plan_layer(layer, out_layer, recipe, family, factor)


def plan_end(end: End, names: tuple[str, ...], recipe: Recipe, family: Family) -> list[OutTensor]:
    """The tensors of embeddings or head, in the order of the first source's file.

    Args:
        end: a model's name or an entry, in canonical form.
        names: the tensors' names.
        recipe: provides base, dtype, and the other end, because both have equal rows.
        family: the candidates.
    """
    entry = _entry(end)
    rows = vocabulary_rows(recipe, family)
    tensors = [
        _made(
            entry.at(name), name, name, recipe, family, rows=rows if name in family.uneven else None
        )
        for name in names
    ]
    return sorted(tensors, key=_position)


def vocabulary_rows(recipe: Recipe, family: Family) -> int | None:
    """Rows of embeddings and output head; None if all candidates have the same number.

    It is the fewest of all tensors involved; the rows left out are padding that no token uses. So
    embeddings and head that come from one model keep that model's rows, and its scores.
    """
    if not family.uneven:
        return None
    architecture = family.architecture
    found = []
    for end, names in (
        (recipe.embeddings, architecture.embeddings),
        (recipe.head, architecture.head),
    ):
        for name in family.uneven.intersection(names):
            entry = _entry(end).at(name)
            takes_base = isinstance(entry, Merge) and entry.takes_base
            for model in (*entry.models, *([recipe.base] if takes_base else [])):
                found.append(family.candidates[model].tensors[name].shape[0])
    return min(found)


def set_vocabulary(config: dict[str, Any], rows: int | None) -> None:
    """Writes the result of `vocabulary_rows` into a config."""
    if rows is not None:
        text_config(config)["vocab_size"] = rows
        if "vocab_size" in config:
            config["vocab_size"] = rows


def count_parameters(recipe: Recipe, family: Family) -> int:
    """The parameter count of the model that a recipe builds."""
    rows = vocabulary_rows(recipe.canonical(), family) if family.uneven else None
    return family.parameters(recipe.src_layers, rows)


def _entry(end: End) -> Layer:
    return Take(end, NO_LAYER) if isinstance(end, str) else end


def tensor_key(name: str) -> int:
    """64 bits of the SHA-256 of a source tensor's name, the key for its random masks.

    It is the source's name, so that a layer gets the same mask wherever it is in the result.
    """
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def _made(
    entry: Layer,
    out_name: str,
    name: str,
    recipe: Recipe,
    family: Family,
    factor: float = 1.0,
    rows: int | None = None,
) -> OutTensor:
    """One tensor of the result, made from the tensor `name` of the entry's models."""
    sources = tuple(_source(family, model, name, rows) for model in entry.models)
    merge = entry if isinstance(entry, Merge) else None
    if merge is not None and sources[0].info.dtype not in FLOAT_DTYPES:
        sources, merge = sources[:1], None  # integer buffers are not merged
    statistics: tuple[TensorInfo, ...] = ()
    if merge is not None and get_method(merge.method).is_calibrated:
        statistics = _statistics(merge, sources, recipe, family)
        if not statistics:  # not a linear layer: regmean averages it
            total = math.fsum(weight for _, weight in merge.weights)
            shares = tuple((model, weight / total) for model, weight in merge.weights)
            merge = Merge(LINEAR.name, merge.src_layer, shares, (("normalize", 0.0),))
    tensor = OutTensor(
        name=out_name,
        dtype=_dtype(sources, recipe, family),
        shape=sources[0].info.shape,
        sources=sources,
        merge=merge,
        base=(
            _source(family, recipe.base, name, rows)
            if merge is not None and merge.takes_base
            else None
        ),
        factor=factor,
        key=tensor_key(name) if merge is not None else 0,
        statistics=statistics,
    )
    _check_castable(tensor)
    return tensor


def _statistics(
    merge: Merge, sources: tuple[Source, ...], recipe: Recipe, family: Family
) -> tuple[TensorInfo, ...]:
    """The statistics of each source; empty if the method has none for this tensor.

    Raises:
        ModelError: one source has statistics and another does not.
    """
    assert recipe.calibration is not None  # ensured by check_recipe
    folder = recipe.calibration.folder
    opened = [family.candidates[s.model].statistics(folder, merge.method) for s in sources]
    per_element = get_method(merge.method).statistics == "elements"
    found = []
    for one, source in zip(opened, sources, strict=True):
        whole = family.candidates[source.model].tensors[source.info.name]
        info = one.find(whole, per_element=per_element)
        if info is not None and per_element and whole.shape != source.info.shape:
            info = _cut(info, source.info.shape[0])
        found.append(info)
    if None not in found:
        return tuple(filter(None, found))
    if any(found):
        lacks = opened[found.index(None)]
        raise ModelError(f"{lacks.path} lacks {sources[0].info.name}: make it again.")
    return ()


def _source(family: Family, model: str, name: str, rows: int | None = None) -> Source:
    info = family.candidates[model].tensors[name]
    return Source(model, info if rows is None else _cut(info, rows))


def _cut(info: TensorInfo, rows: int) -> TensorInfo:
    """The first rows of a tensor."""
    n_bytes = info.n_bytes // info.shape[0] * rows
    return replace(info, shape=(rows, *info.shape[1:]), n_bytes=n_bytes)


def _dtype(sources: Sequence[Source], recipe: Recipe, family: Family) -> str:
    """The recipe's type, except for integers and for tensors that all models keep in float32."""
    dtype = DTYPES[recipe.dtype]
    if sources[0].info.dtype not in FLOAT_DTYPES:
        return sources[0].info.dtype
    if all(family.candidates[s.model].stays_precise(s.info, dtype) for s in sources):
        return "F32"
    return dtype


def _position(tensor: OutTensor) -> tuple[str, int]:
    info = tensor.sources[0].info
    return str(info.path), info.offset


def _check_layers(recipe: Recipe, family: Family) -> None:
    for i, layer in enumerate(recipe.layers):
        if layer.src_layer >= family.num_layers:
            raise UsageError(
                f"layers[{i}] names layer {layer.src_layer}, but the models have layers 0 to "
                f"{family.num_layers - 1}."
            )
        _check_opened(layer.used_models, f"layers[{i}]", family)
    _check_opened([recipe.base], "base", family)
    for key, end in (("embeddings", recipe.embeddings), ("head", recipe.head)):
        _check_opened([end] if isinstance(end, str) else end.used_models, key, family)


def _check_shared(recipe: Recipe, family: Family) -> None:
    """Raises a `UsageError` if layers that share weights would be made differently."""
    shared = family.base.reading.shared
    models = {layer.model if isinstance(layer, Take) else None for layer in recipe.layers}
    parts = any(layer.modules or layer.scale != 1.0 for layer in recipe.layers)
    if shared and (len(models) > 1 or None in models or parts):
        raise UsageError(
            f"Layers of {family.base.folder} share weights ({shared}), so they can't be merged or "
            "come from several models: take all layers from one model."
        )


def _check_opened(models: Iterable[str], where: str, family: Family) -> None:
    for model in models:
        if model not in family.candidates:
            raise UsageError(f"{where} names the model {model}, which is not open.")


def _check_modules(recipe: Recipe, family: Family) -> None:
    """Raises a `UsageError` for a module whose text is in no tensor's name: it has no effect."""
    entries = (*recipe.layers, recipe.embeddings, recipe.head)
    if not any(entry.modules for entry in entries if not isinstance(entry, str)):
        return  # saves time: the resident model calls this before each evaluation
    architecture = family.architecture
    in_layers = dict.fromkeys(suffix for layer in architecture.layers for suffix in layer)
    places = [(f"layers[{i}]", layer, tuple(in_layers)) for i, layer in enumerate(recipe.layers)]
    ends = (("embeddings", recipe.embeddings), ("head", recipe.head))
    outside = architecture.embeddings + architecture.head
    places += [(key, end, outside) for key, end in ends if not isinstance(end, str)]
    for where, entry, names in places:
        for text, _ in entry.modules:
            if not any(text in name for name in names):
                raise unknown("module", text, names, where)


def _check_statistics(recipe: Recipe, family: Family) -> None:
    """Raises unless all calibrated merges have their statistics, with the recipe's digests."""
    calibration = recipe.calibration
    for method, model in recipe.used_statistics:
        if calibration is None:
            raise UsageError(
                f"The recipe merges {model} by {method}, which needs calibration data: create it "
                "with `gptailor calibrate`, and name its folder as calibration."
            )
        statistics = family.candidates[model].statistics(calibration.folder, method)
        if calibration.digests and calibration.digest(method, model) != statistics.digest:
            raise UsageError(
                f"{statistics.path} is not the file that the recipe was made with: calibrate with "
                "the same text, or remove the digests from the recipe."
            )


def _check_castable(tensor: OutTensor) -> None:
    for source in (*tensor.sources, *([tensor.base] if tensor.base else [])):
        if source.info.dtype == "F64" or source.info.dtype.startswith("F8_"):
            raise ModelError(
                f"{source.info.path}: {source.info.name} has dtype {source.info.dtype}, which is "
                "not supported; save the model in bfloat16, float16 or float32 first."
            )
