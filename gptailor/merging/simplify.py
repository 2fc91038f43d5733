"""Rules that reduce a merge to a simpler one with the same result; each method declares its rule.

A rule takes a merge, whose sources are in canonical order unless a parameter is the share of the
second of two, and returns the simplest merge with the same result, or a source if the result equals
it. Weights are divided by their sum if the method does so, factors are folded into them, and
whatever has no effect is removed: values of unused parameters, and sources of weight or density 0
if nothing else depends on their presence (for `one_of_equals`, `sce`, `ram` and `widen`, whose
sources have no weights, each one counts).

A merge that will be refused when it is built, with the reason, is left unchanged.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from gptailor.merging.method import Method, Mix

_TINY = 1e-8

Rule = Callable[[Mix], Mix | str]


def _rounded(value: float) -> float:
    """`value` rounded to nine digits; values too small to matter in float32 become 0."""
    return float(f"{value:.9g}") if abs(value) > 1e-12 else 0.0


def weighted_sum(mix: Mix) -> Mix | str:
    """Σ wᵢ xᵢ, divided by Σ wᵢ if `normalize`."""
    weights = {source: w for source, w in mix.weights if w != 0.0}
    if mix.number("normalize"):
        total = math.fsum(weights.values())
        if abs(total) < _TINY:
            return mix
        weights = {source: w / total for source, w in weights.items()}
    weights = {source: _rounded(w) for source, w in weights.items() if _rounded(w)}
    if list(weights.values()) == [1.0]:
        return next(iter(weights))
    if not weights:
        return mix
    return replace(mix, weights=tuple(weights.items()), parameters=(("normalize", 0.0),))


def mean_by(method: Method) -> Rule:
    """The mean of sources that may be listed repeatedly, as a merge by `method` with weights."""

    def rule(mix: Mix) -> Mix | str:
        count = Counter(mix.sources)
        weights = tuple((source, float(number)) for source, number in count.items())
        return method.simplify(replace(mix.by(method), weights=weights))

    return rule


def same_as(method: Method) -> Rule:
    """The rule of a method that is another one with default parameters."""
    return lambda mix: method.simplify(mix.by(method))


def shared(mix: Mix) -> Mix | str:
    """Two sources with share t of the second: t = 0 is the first, t = 1 the second."""
    (first, second), t = mix.sources, round(mix.number("t"), 9)
    if first == second or t == 0.0:
        return first
    return second if t == 1.0 else mix.having(t=t)


def added_differences(mix: Mix) -> Mix | str:
    """b + λ Σ wᵢ δᵢ, the sum divided by Σ wᵢ if `normalize`."""
    mix = _folded(mix)
    mix = mix.select(i for i, (s, w) in enumerate(mix.weights) if w and s != mix.base)
    if not mix.weights:
        return mix.base
    if [w for _, w in mix.weights] == [1.0]:
        return mix.sources[0]
    return mix


def _folded(mix: Mix) -> Mix:
    """A sum of weighted differences, with λ and the sum of the weights folded into the weights."""
    factor = mix.number("lambda")
    if mix.number("normalize"):
        total = math.fsum(w for _, w in mix.weights)
        factor /= 1.0 if abs(total) < _TINY else total  # mergekit's rule for a sum of zero
    folded = mix.weighing(_rounded(w * factor) for _, w in mix.weights)
    return folded.having(**{"lambda": 1.0, "normalize": 0.0})


def elected(mix: Mix) -> Mix | str:
    """The sum of trimmed differences, of which only elements with the elected sign are added."""
    # the base's difference, and one of weight 0, never has the elected sign
    mix = mix.select(i for i, (s, w) in enumerate(mix.weights) if w and s != mix.base)
    factor = mix.number("lambda")
    if not mix.weights or factor == 0.0:
        return mix.base
    if min(mix.for_each("density")) == 1.0:
        mix = mix.having(rescale=0.0)
    if len(mix.weights) == 1 and mix.number("normalize"):
        mix = _alone(mix)
        if mix.parameter("density") == 1.0 and (factor, mix.weights[0][1]) == (1.0, 1.0):
            return mix.sources[0]
    return mix


def _alone(mix: Mix) -> Mix:
    """A single source with its weight divided by itself, unless it is too small to divide by."""
    return mix.weighing((1.0,)) if abs(mix.weights[0][1]) >= _TINY else mix


def sparse(*, whole: Method) -> Rule:
    """A sum of sparse differences; `whole` is the same method without dropping anything.

    A difference of density 0 is zero, and one of density 1 is whole.
    """

    def rule(mix: Mix) -> Mix | str:
        mix = _some(_folded(mix))
        if not mix.weights:
            return mix.base
        if min(mix.for_each("density")) == 1.0:
            return whole.simplify(mix.by(whole))
        return _without_unused(mix)

    return rule


def sparse_elected(*, whole: Method, alone: Method) -> Rule:
    """Like `sparse`, with elected signs; `alone` is the same method without them."""

    def rule(mix: Mix) -> Mix | str:
        mix = _some(mix)
        if not mix.weights or mix.number("lambda") == 0.0:
            return mix.base
        if min(mix.for_each("density")) == 1.0:
            return whole.simplify(mix.by(whole, rescale=0.0))
        if len(mix.weights) == 1:
            if mix.number("normalize"):
                mix = _alone(mix)
            return alone.simplify(mix.by(alone, normalize=0.0))
        return _without_unused(mix)

    return rule


def _some(mix: Mix) -> Mix:
    """The same merge with only the sources that contribute anything."""
    densities = mix.for_each("density")
    return mix.select(
        i for i, (s, w) in enumerate(mix.weights) if w and s != mix.base and densities[i] > 0.0
    )


def _without_unused(mix: Mix) -> Mix:
    """Resets epsilon and gamma to their defaults for sources of which nothing is dropped."""
    densities = mix.for_each("density")
    for parameter in mix.method.parameters:
        if parameter.name in ("epsilon", "gamma") and parameter.default is not None:
            values = zip(mix.for_each(parameter.name), densities, strict=True)
            kept = tuple(parameter.default if d == 1.0 else value for value, d in values)
            mix = mix.having(**{parameter.name: kept})
    return mix


def arc(mix: Mix) -> Mix | str:
    """Two weights of which only the ratio counts."""
    weights = [w for _, w in mix.weights]
    total = math.fsum(weights)
    if abs(total) < 1e-6:
        weights = [0.5, 0.5]  # mergekit's rule for weights that add up to zero
    else:
        is_one = abs(total - 1.0) <= 1e-9 * sum(map(abs, weights))  # then t stays unchanged
        t = round(weights[1] if is_one else weights[1] / total, 9)
        weights = [round(1.0 - t, 9), t]
    for source, weight in zip(mix.sources, weights, strict=True):
        if weight == 1.0:
            return source
    if mix.number("nuslerp_flatten"):
        mix = mix.having(nuslerp_row_wise=0.0)
    return mix.weighing(weights)


def mean_on_sphere(mix: Mix) -> Mix | str:
    """A weighted mean in a tangent plane."""
    if len(mix.weights) == 1:
        return mix.sources[0]  # mergekit's rule, whatever the weight
    if mix.number("normalize_weights"):
        total = math.fsum(w for _, w in mix.weights)
        if abs(total) < _TINY:
            return mix
        mix = mix.weighing(_rounded(w / total) for _, w in mix.weights)
        mix = mix.having(normalize_weights=0.0)
    kept = mix.select(i for i, (_, w) in enumerate(mix.weights) if w)
    if [w for _, w in kept.weights] == [1.0] and mix.number("eps") <= 1e-4:  # a factor cos(eps)
        return kept.sources[0]
    return kept if len(kept.weights) > 1 else mix


def one_of_equals(mix: Mix) -> Mix | str:
    """Equal sources give that source."""
    return mix.sources[0] if len(set(mix.sources)) == 1 else mix


def in_proportion(mix: Mix) -> Mix | str:
    """A mean: only the ratios of the weights count."""
    largest = max((w for _, w in mix.weights), key=abs)
    if largest == 0.0:
        return mix
    kept = {source: _rounded(w / largest) for source, w in mix.weights}
    kept = {source: w for source, w in kept.items() if w}
    if len(kept) == 1:
        return next(iter(kept))
    return replace(mix, weights=tuple(kept.items()))


def sce(mix: Mix) -> Mix | str:
    """A fraction of the elements, those that vary most; nothing varies among equal sources."""
    share = mix.number("select_topk")
    if share == 0.0:
        return mix.base
    if len(set(mix.sources)) == 1:
        return mix.sources[0] if share == 1.0 else mix.base
    return mix


def ram(mix: Mix) -> Mix | str:
    """Differences up to ε are ignored, so equal sources give that source only if ε is 0."""
    return one_of_equals(mix) if mix.number("epsilon") == 0.0 else mix


def swapped_near(mix: Mix) -> Mix | str:
    """The base if t is 0, because then no difference is small enough."""
    return mix.base if mix.number("t") == 0.0 else one_is_base(mix)


def one_is_base(mix: Mix) -> Mix | str:
    """A single source, parts of which replace the base's."""
    return mix.base if mix.sources == (mix.base,) else mix


def widen(mix: Mix) -> Mix | str:
    """With a single source all scores are 1, if the calibration value is, too."""
    one = len(mix.weights) == 1 and mix.number("score_calibration_value") == 1.0
    return mix.sources[0] if one else mix
