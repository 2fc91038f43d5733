"""The canonical form of a recipe's entries: two that build the same have the same.

Only canonical entries are built and hashed, so that equal hashes are equal bytes, the order in
which sources are summed and the random numbers that each one gets included. Sources are sorted by
what their names stand for. Weights are divided by their sum where a method does that, factors are
folded into them, and whatever has no effect is gone: values of parameters that play no part, and
sources of weight or density 0 where nothing else depends on their being there (for `karcher`,
`model_stock`, `sce`, `ram` and `widen`, whose sources have no weights, each one counts).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from gptailor.merging.registry import Value, get_method
from gptailor.recipe.entry import Layer, Merge, Take

_TINY = 1e-8


def canonical_layer(layer: Layer, base: str, refs: Mapping[str, str]) -> Layer:
    """The simplest entry that builds the same layer.

    Args:
        layer: an entry.
        base: the recipe's base.
        refs: the recipe's models: sources are sorted by what their names stand for, so that
            another name changes nothing.
    """
    own = _canonical(replace(layer, modules=()), base, refs)
    parts: list[tuple[str, Layer]] = []
    for text, part in layer.modules:
        if not any(earlier in text for earlier, _ in parts):  # else an earlier one always fits
            parts.append((text, _canonical(part, base, refs)))
    while parts and parts[-1][1] == replace(own, scale=1.0):
        parts.pop()
    return replace(own, modules=tuple(parts))


def canonical_end(end: str | Layer, base: str, refs: Mapping[str, str]) -> str | Layer:
    """The simplest description of the same embeddings or head: a model's name if that is all."""
    if isinstance(end, str):
        return end
    built = canonical_layer(end, base, refs)
    return built.model if isinstance(built, Take) and not built.modules else built


def hashed(
    layer: Layer, refs: Mapping[str, str], digest: Callable[[str, str], str] | None = None
) -> list[Any]:
    """What a hash is made of: a canonical entry with references in the place of names.

    Args:
        layer: the entry.
        refs: the recipe's models.
        digest: (method, model) → which statistics a method that needs them has; None without.
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
    if layer.method == "slerp":  # the one whose sources are not alike
        built = _slerp(layer, base)
        if isinstance(built, Merge) and _order(built, refs) == [1, 0]:
            built = _with(built, t=round(1.0 - built.number("t"), 9))
    else:
        built = _SIMPLIFY[layer.method](_select(layer, _order(layer, refs)), base)
    return _select(built, _order(built, refs)) if isinstance(built, Merge) else built


def _order(layer: Merge, refs: Mapping[str, str]) -> list[int]:
    """The indices of the sources in their canonical order."""
    sources = [(refs.get(model, ""), (model, weight)) for model, weight in layer.weights]
    return sorted(range(len(sources)), key=sources.__getitem__)


def _rounded(value: float) -> float:
    """Nine digits; what no float32 could tell from nothing is nothing."""
    return float(f"{value:.9g}") if abs(value) > 1e-12 else 0.0


def _take(layer: Merge, model: str) -> Take:
    return Take(model, layer.src_layer, layer.scale)


def _select(layer: Merge, sources: Iterable[int]) -> Merge:
    """The merge of these sources only, in this order."""
    chosen = list(sources)
    values = tuple(
        (name, tuple(value[i] for i in chosen) if isinstance(value, tuple) else value)
        for name, value in layer.parameters
    )
    return replace(layer, weights=tuple(layer.weights[i] for i in chosen), parameters=values)


def _with(layer: Merge, **values: Value) -> Merge:
    return replace(layer, parameters=tuple((dict(layer.parameters) | values).items()))


def _reweighted(layer: Merge, weights: Iterable[float]) -> Merge:
    pairs = zip(layer.models, weights, strict=True)
    return replace(layer, weights=tuple((model, weight) for model, weight in pairs))


def _as(layer: Merge, method: str) -> Merge:
    """The merge by another method; it gets what both have, and defaults for what only it has."""
    known = get_method(method).by_name
    values = tuple((name, value) for name, value in layer.parameters if name in known)
    return replace(layer, method=method, parameters=values)


def _linear(layer: Merge, base: str) -> Layer:
    del base
    weights = {model: w for model, w in layer.weights if w != 0.0}
    if layer.number("normalize"):
        total = math.fsum(weights.values())
        if abs(total) < _TINY:
            return layer  # refused when it is built, with the reason
        weights = {model: w / total for model, w in weights.items()}
    weights = {model: _rounded(w) for model, w in weights.items() if _rounded(w)}
    if list(weights.values()) == [1.0]:
        return _take(layer, next(iter(weights)))
    if not weights:
        return layer
    return replace(layer, weights=tuple(weights.items()), parameters=(("normalize", 0.0),))


def _average(layer: Merge, base: str) -> Layer:
    count = Counter(layer.models)
    weights = tuple((model, float(number)) for model, number in count.items())
    return _linear(replace(_as(layer, "linear"), weights=weights), base)


def _task_arithmetic(layer: Merge, base: str) -> Layer:
    layer = _folded(layer)
    layer = _select(layer, (i for i, (m, w) in enumerate(layer.weights) if w and m != base))
    if not layer.weights:
        return _take(layer, base)
    if [w for _, w in layer.weights] == [1.0]:
        return _take(layer, layer.models[0])
    return layer


def _folded(layer: Merge) -> Merge:
    """A sum of weighted differences with λ and the sum of the weights folded into the weights."""
    factor = layer.number("lambda")
    if layer.number("normalize"):
        total = math.fsum(w for _, w in layer.weights)
        factor /= 1.0 if abs(total) < _TINY else total  # mergekit's rule for a sum of zero
    folded = _reweighted(layer, (_rounded(w * factor) for _, w in layer.weights))
    return _with(folded, **{"lambda": 1.0, "normalize": 0.0})


def _slerp(layer: Merge, base: str) -> Layer:
    del base
    (first, second), t = layer.models, round(layer.number("t"), 9)
    if first == second or t == 0.0:
        return _take(layer, first)
    if t == 1.0:
        return _take(layer, second)
    return replace(layer, parameters=(("t", t),))


def _ties(layer: Merge, base: str) -> Layer:
    # the base's difference, and one of weight 0, never have the elected sign
    layer = _select(layer, (i for i, (m, w) in enumerate(layer.weights) if w and m != base))
    factor = layer.number("lambda")
    if not layer.weights or factor == 0.0:
        return _take(layer, base)
    if min(layer.for_each("density")) == 1.0:
        layer = _with(layer, rescale=0.0)
    if len(layer.weights) == 1 and layer.number("normalize"):
        if abs(layer.weights[0][1]) >= _TINY:  # below, the formula does not divide
            layer = _reweighted(layer, (1.0,))
        if layer.parameter("density") == 1.0 and (factor, layer.weights[0][1]) == (1.0, 1.0):
            return _take(layer, layer.models[0])
    return layer


_WITHOUT_ELECTION = {
    "dare_ties": "dare_linear",
    "della": "della_linear",
    "breadcrumbs_ties": "breadcrumbs",
}


def _sparsified(layer: Merge, base: str) -> Layer:
    """dare, della and breadcrumbs: differences of which a part is dropped, then as without that.

    A difference of density 0 is zero, and one of density 1 is whole.
    """
    elects = layer.method in _WITHOUT_ELECTION
    if not elects:
        layer = _folded(layer)
    densities = layer.for_each("density")
    layer = _select(
        layer,
        (i for i, (m, w) in enumerate(layer.weights) if w and m != base and densities[i] > 0.0),
    )
    if not layer.weights or layer.number("lambda") == 0.0:
        return _take(layer, base)
    densities = layer.for_each("density")
    if min(densities) == 1.0:
        if elects:
            return _ties(_with(_as(layer, "ties"), rescale=0.0), base)
        return _task_arithmetic(_as(layer, "task_arithmetic"), base)
    if elects and len(layer.weights) == 1:
        if layer.number("normalize") and abs(layer.weights[0][1]) >= _TINY:
            layer = _reweighted(layer, (1.0,))
        return _sparsified(_with(_as(layer, _WITHOUT_ELECTION[layer.method]), normalize=0.0), base)
    for name in ("epsilon", "gamma"):  # without effect where nothing is dropped
        parameter = get_method(layer.method).by_name.get(name)
        if parameter is not None and parameter.default is not None:
            values = zip(layer.for_each(name), densities, strict=True)
            kept = tuple(parameter.default if d == 1.0 else value for value, d in values)
            layer = _with(layer, **{name: kept})
    return layer


def _nuslerp(layer: Merge, base: str) -> Layer:
    del base
    weights = [w for _, w in layer.weights]
    total = math.fsum(weights)
    if abs(total) < 1e-6:
        weights = [0.5, 0.5]  # mergekit's rule for weights that add up to nothing
    else:
        is_one = abs(total - 1.0) <= 1e-9 * sum(map(abs, weights))  # so that it stays as it is
        t = round(weights[1] if is_one else weights[1] / total, 9)
        weights = [round(1.0 - t, 9), t]
    for (model, _), weight in zip(layer.weights, weights, strict=True):
        if weight == 1.0:
            return _take(layer, model)
    if layer.number("nuslerp_flatten"):
        layer = _with(layer, nuslerp_row_wise=0.0)
    return _reweighted(layer, weights)


def _multislerp(layer: Merge, base: str) -> Layer:
    del base
    if len(layer.weights) == 1:
        return _take(layer, layer.models[0])  # mergekit's rule, whatever the weight
    if layer.number("normalize_weights"):
        total = math.fsum(w for _, w in layer.weights)
        if abs(total) < _TINY:
            return layer  # refused when it is built, with the reason
        layer = _reweighted(layer, (_rounded(w / total) for _, w in layer.weights))
        layer = _with(layer, normalize_weights=0.0)
    kept = _select(layer, (i for i, (_, w) in enumerate(layer.weights) if w))
    if [w for _, w in kept.weights] == [1.0] and layer.number("eps") <= 1e-4:  # a factor cos(eps)
        return _take(layer, kept.models[0])
    return kept if len(kept.weights) > 1 else layer


def _karcher(layer: Merge, base: str) -> Layer:
    del base
    return _take(layer, layer.models[0]) if len(set(layer.models)) == 1 else layer


def _calibrated(layer: Merge, base: str) -> Layer:
    """fisher and regmean: means, so that weights count in proportion only."""
    del base
    largest = max((w for _, w in layer.weights), key=abs)
    if largest == 0.0:
        return layer  # refused when it is read
    kept = {model: _rounded(w / largest) for model, w in layer.weights}
    kept = {model: w for model, w in kept.items() if w}
    if len(kept) == 1:
        return _take(layer, next(iter(kept)))
    return replace(layer, weights=tuple(kept.items()))


def _sce(layer: Merge, base: str) -> Layer:
    share = layer.number("select_topk")
    if share == 0.0:
        return _take(layer, base)
    if len(set(layer.models)) == 1:  # nothing varies among equal sources
        return _take(layer, layer.models[0] if share == 1.0 else base)
    return layer


def _ram(layer: Merge, base: str) -> Layer:
    del base
    one = len(set(layer.models)) == 1 and layer.number("epsilon") == 0.0
    return _take(layer, layer.models[0]) if one else layer


def _stock(layer: Merge, base: str) -> Layer:
    return _model_stock(_as(layer, "model_stock"), base)


def _model_stock(layer: Merge, base: str) -> Layer:
    del base
    return _take(layer, layer.models[0]) if len(set(layer.models)) == 1 else layer


def _nearswap(layer: Merge, base: str) -> Layer:
    if layer.number("t") == 0.0 or layer.models == (base,):
        return _take(layer, base)
    return layer


def _arcee_fusion(layer: Merge, base: str) -> Layer:
    return _take(layer, base) if layer.models == (base,) else layer


def _widen(layer: Merge, base: str) -> Layer:
    del base
    one = len(layer.models) == 1 and layer.number("score_calibration_value") == 1.0
    return _take(layer, layer.models[0]) if one else layer


_SIMPLIFY: dict[str, Callable[[Merge, str], Layer]] = {
    "linear": _linear,
    "average": _average,
    "task_arithmetic": _task_arithmetic,
    "nuslerp": _nuslerp,
    "multislerp": _multislerp,
    "karcher": _karcher,
    "ties": _ties,
    "dare_linear": _sparsified,
    "dare_ties": _sparsified,
    "della": _sparsified,
    "della_linear": _sparsified,
    "breadcrumbs": _sparsified,
    "breadcrumbs_ties": _sparsified,
    "sce": _sce,
    "ram": _ram,
    "model_stock": _model_stock,
    "stock": _stock,
    "nearswap": _nearswap,
    "arcee_fusion": _arcee_fusion,
    "widen": _widen,
    "fisher": _calibrated,
    "regmean": _calibrated,
}
