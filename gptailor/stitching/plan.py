"""A plan: for each tensor of the stitched model, where its bytes come from.

A recipe speaks of layers, a plan of tensors. The writer and the resident model both follow the
same plan, so what the search scored is what the stitcher writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gptailor.errors import ModelError, UsageError
from gptailor.merging.registry import get_method
from gptailor.models.architecture import cut_config, text_config
from gptailor.models.checkpoint import FLOAT_DTYPES, TensorInfo
from gptailor.models.family import Family
from gptailor.recipe import DTYPES, Layer, Merge, Recipe


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
        sources: the tensors that it is made of, the base of a merge not among them.
        merge: how they are merged; None if the only source is taken as it is (or cast).
        base: the base's tensor, for methods whose formula has one.
        factor: the result is multiplied by it (a folded layer scale).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    merge: Merge | None = None
    base: Source | None = None
    factor: float = 1.0

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
    """What a recipe builds, tensor by tensor, in the order in which it is written.

    Attributes:
        recipe: the canonical recipe.
        config: of the result, cut to its layers.
        tensors: of the result; sources that lie side by side stay side by side.
    """

    recipe: Recipe
    config: dict[str, Any]
    tensors: tuple[OutTensor, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.n_bytes for t in self.tensors)


_SIZES = {"BF16": 2, "F16": 2, "F32": 4}


def make_plan(recipe: Recipe, family: Family) -> Plan:
    """Resolves a recipe to tensors.

    Raises:
        UsageError: a layer's index is out of range, or a scale can't be folded.
        ModelError: a tensor that is merged has a dtype that can't be.
    """
    recipe = recipe.canonical()
    _check_layers(recipe, family)
    config = cut_config(family.base.config, recipe.src_layers)
    for key in ("dtype", "torch_dtype"):
        for part in (config, text_config(config)):
            if key in part or key == "dtype":
                part[key] = recipe.dtype
    tensors = [
        *_end(recipe.embeddings, family.architecture.embeddings, recipe, family),
        *_stack(recipe, family),
        *_end(recipe.head, family.architecture.head, recipe, family),
    ]
    return Plan(recipe, config, tuple(tensors))


def plan_layer(
    layer: Layer, out_layer: int, recipe: Recipe, family: Family, factor: float = 1.0
) -> list[OutTensor]:
    """The tensors of one output layer, in the order in which they lie in the first source.

    Args:
        layer: the entry, in canonical form.
        out_layer: its index in the result.
        recipe: gives base and dtype.
        family: the candidates.
        factor: what the projections that write to the residual stream are multiplied by.
    """
    architecture = family.architecture
    scaled = architecture.residual_writers(layer.src_layer) if factor != 1.0 else ()
    needs_base = isinstance(layer, Merge) and get_method(layer.method).uses_base
    result = []
    for suffix, name in architecture.layers[layer.src_layer].items():
        sources = tuple(_source(family, model, name) for model in layer.models)
        base = _source(family, recipe.base, name) if needs_base else None
        merge = layer if isinstance(layer, Merge) else None
        if merge is not None and sources[0].info.dtype not in FLOAT_DTYPES:
            equal = Source(layer.models[0], sources[0].info)
            sources, merge, base = (equal,), None, None  # integer buffers are not merged
        tensor = OutTensor(
            name=architecture.name(out_layer, suffix),
            dtype=_dtype(sources[0].info, recipe),
            shape=sources[0].info.shape,
            sources=sources,
            merge=merge,
            base=base,
            factor=factor if suffix in scaled else 1.0,
        )
        _check_castable(tensor)
        result.append(tensor)
    result.sort(key=_position)
    return result


def scale_factors(recipe: Recipe) -> list[float]:
    """For each output layer, the factor on what it writes to the residual stream.

    A layer's output times s is the same network as one in which every later layer writes 1/s of
    what it did: the layers read through a norm that does not see a scale, and so does the final
    norm (up to its epsilon).
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


def _end(model: str, names: tuple[str, ...], recipe: Recipe, family: Family) -> Iterator[OutTensor]:
    """Embeddings or head, from one model."""
    sources = [_source(family, model, name) for name in names]
    for source in sorted(sources, key=lambda s: (str(s.info.path), s.info.offset)):
        expected = family.base.tensors[source.info.name].shape
        if source.info.shape != expected:
            raise UsageError(
                f"{source.info.name} of {model} has the shape {list(source.info.shape)}, but the "
                f"base's tokenizer needs {list(expected)}: take embeddings and head from the base."
            )
        tensor = OutTensor(
            source.info.name, _dtype(source.info, recipe), source.info.shape, (source,)
        )
        _check_castable(tensor)
        yield tensor


def _source(family: Family, model: str, name: str) -> Source:
    return Source(model, family.candidates[model].tensors[name])


def _dtype(info: TensorInfo, recipe: Recipe) -> str:
    return DTYPES[recipe.dtype] if info.dtype in FLOAT_DTYPES else info.dtype


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
        for model in (*layer.models, recipe.base, recipe.embeddings, recipe.head):
            if model not in family.candidates:
                raise UsageError(f"layers[{i}] names the model {model}, which is not opened.")


def _check_castable(tensor: OutTensor) -> None:
    for source in tensor.sources:
        if source.info.dtype == "F64" or source.info.dtype.startswith("F8_"):
            raise ModelError(
                f"{source.info.path}: {source.info.name} has dtype {source.info.dtype}, which is "
                "not supported; save the model in bfloat16, float16 or float32 first."
            )
