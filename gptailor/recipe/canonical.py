"""The canonical form of a recipe's entries; two entries that build the same layer share one.

Only canonical entries are built and hashed, so equal hashes mean equal bytes, including the order
in which sources are summed and the random numbers that each one gets. Sources are sorted by the
references that their names stand for; the rest follows from the rule that each method declares
(`merging/simplify.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from gptailor.merging.method import Mix
from gptailor.merging.registry import get_method
from gptailor.recipe.entry import Layer, Take


def canonical_layer(layer: Layer, base: str, refs: Mapping[str, str]) -> Layer:
    """The simplest entry that builds the same layer.

    Args:
        layer: an entry.
        base: the recipe's base.
        refs: the recipe's models: sources are sorted by reference, so renaming a model changes
            nothing.
    """
    own = _canonical(replace(layer, modules=()), base, refs)
    parts: list[tuple[str, Layer]] = []
    for text, part in layer.modules:
        if not any(earlier in text for earlier, _ in parts):  # else an earlier one always matches
            parts.append((text, _canonical(part, base, refs)))
    while parts and parts[-1][1] == replace(own, scale=1.0):
        parts.pop()
    return replace(own, modules=tuple(parts))


def canonical_end(end: str | Layer, base: str, refs: Mapping[str, str]) -> str | Layer:
    """The simplest description of the same embeddings or head; a model's name if that suffices."""
    if isinstance(end, str):
        return end
    built = canonical_layer(end, base, refs)
    return built.model if isinstance(built, Take) and not built.modules else built


def hashed(
    layer: Layer, refs: Mapping[str, str], digest: Callable[[str, str], str] | None = None
) -> list[Any]:
    """The contents of a hash: a canonical entry with references in place of names.

    Args:
        layer: the entry.
        refs: the recipe's models.
        digest: (method, model) → digest of the statistics; None if there are none.
    """
    entry: list[Any] = [layer.src_layer, layer.scale]
    if isinstance(layer, Take):
        entry += ["take", refs[layer.model]]
    else:
        known = get_method(layer.method).by_name
        values = [
            [name, value]
            for name, value in layer.parameters
            if not (known[name].is_late and value == known[name].default)
        ]
        sources = [[refs[model], weight] for model, weight in layer.weights]
        entry += [layer.method, sources, values]
        if get_method(layer.method).is_calibrated and digest is not None:
            entry.append([digest(layer.method, model) for model in layer.models])
    if layer.modules:
        entry.append([[text, hashed(part, refs, digest)] for text, part in layer.modules])
    return entry


def _canonical(layer: Layer, base: str, refs: Mapping[str, str]) -> Layer:
    if isinstance(layer, Take):
        return layer
    mix = Mix(get_method(layer.method), layer.weights, layer.parameters, base)
    share = mix.method.share
    if share is None:
        mix = mix.select(_order(mix, refs))
    built = mix.method.simplify(mix)
    if isinstance(built, str):
        return Take(built, layer.src_layer, layer.scale)
    order = _order(built, refs)
    if share is not None and order == [1, 0]:
        built = built.having(**{share.name: round(1.0 - built.number(share.name), 9)})
    built = built.select(order)
    return replace(
        layer, method=built.method.name, weights=built.weights, parameters=built.parameters
    )


def _order(mix: Mix, refs: Mapping[str, str]) -> list[int]:
    """The indices of the sources in their canonical order."""
    sources = [(refs.get(model, ""), (model, weight)) for model, weight in mix.weights]
    return sorted(range(len(sources)), key=sources.__getitem__)
