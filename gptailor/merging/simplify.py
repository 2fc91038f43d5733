"""The rules by which a merge is the same as a simpler one; each method declares its own.

A rule takes a merge, whose sources are in their canonical order unless one parameter says how much
of each of two there is, and returns the simplest one that builds the same, or the source that this
is. Weights are divided by their sum where a method does that, factors are folded into them, and
whatever has no effect is gone: values of parameters that play no part, and sources of weight or
density 0 where nothing else depends on their being there (for `one_of_equals`, `sce`, `ram` and
`widen`, whose sources have no weights, each one counts).

A merge that is refused when it is built, with the reason, stays as it is.
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
    """Nine digits; what no float32 could tell from nothing is nothing."""
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
    """The mean of sources that may be listed more than once, which `method` makes of weights."""

    def rule(mix: Mix) -> Mix | str:
        count = Counter(mix.sources)
        weights = tuple((source, float(number)) for source, number in count.items())
        return method.simplify(replace(mix.by(method), weights=weights))

    return rule


def same_as(method: Method) -> Rule:
    """A method that is another one with its defaults."""
    return lambda mix: method.simplify(mix.by(method))


def shared(mix: Mix) -> Mix | str:
    """Two sources, t of the second: at its ends, t is one of them."""
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
    """A sum of weighted differences with λ and the sum of the weights folded into the weights."""
    factor = mix.number("lambda")
    if mix.number("normalize"):
        total = math.fsum(w for _, w in mix.weights)
        factor /= 1.0 if abs(total) < _TINY else total  # mergekit's rule for a sum of zero
    folded = mix.weighing(_rounded(w * factor) for _, w in mix.weights)
    return folded.having(**{"lambda": 1.0, "normalize": 0.0})


def elected(mix: Mix) -> Mix | str:
    """Differences of which only those with the elected sign are added, the largest part of each."""
    # the base's difference, and one of weight 0, never have the elected sign
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
    """One source, whose weight is divided by itself; the formula does not divide by less."""
    return mix.weighing((1.0,)) if abs(mix.weights[0][1]) >= _TINY else mix


def sparse(*, whole: Method) -> Rule:
    """A sum of differences of which a part is dropped; `whole` is the same without that.

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
    """As `sparse`, with elected signs; `alone` does the same without them."""

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
    """The sources of which anything is left."""
    densities = mix.for_each("density")
    return mix.select(
        i for i, (s, w) in enumerate(mix.weights) if w and s != mix.base and densities[i] > 0.0
    )


def _without_unused(mix: Mix) -> Mix:
    """Defaults for what has no effect where nothing is dropped."""
    densities = mix.for_each("density")
    for parameter in mix.method.parameters:
        if parameter.name in ("epsilon", "gamma") and parameter.default is not None:
            values = zip(mix.for_each(parameter.name), densities, strict=True)
            kept = tuple(parameter.default if d == 1.0 else value for value, d in values)
            mix = mix.having(**{parameter.name: kept})
    return mix


def arc(mix: Mix) -> Mix | str:
    """Two weights that only count in proportion."""
    weights = [w for _, w in mix.weights]
    total = math.fsum(weights)
    if abs(total) < 1e-6:
        weights = [0.5, 0.5]  # mergekit's rule for weights that add up to nothing
    else:
        is_one = abs(total - 1.0) <= 1e-9 * sum(map(abs, weights))  # so that it stays as it is
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
    """A mean: weights count in proportion only."""
    largest = max((w for _, w in mix.weights), key=abs)
    if largest == 0.0:
        return mix
    kept = {source: _rounded(w / largest) for source, w in mix.weights}
    kept = {source: w for source, w in kept.items() if w}
    if len(kept) == 1:
        return next(iter(kept))
    return replace(mix, weights=tuple(kept.items()))


def sce(mix: Mix) -> Mix | str:
    """A part of the elements, those that vary most: nothing varies among equal sources."""
    share = mix.number("select_topk")
    if share == 0.0:
        return mix.base
    if len(set(mix.sources)) == 1:
        return mix.sources[0] if share == 1.0 else mix.base
    return mix


def ram(mix: Mix) -> Mix | str:
    """Differences up to ε are none, so that equal sources are taken whole only without one."""
    return one_of_equals(mix) if mix.number("epsilon") == 0.0 else mix


def swapped_near(mix: Mix) -> Mix | str:
    """The base, where no difference is small enough."""
    return mix.base if mix.number("t") == 0.0 else one_is_base(mix)


def one_is_base(mix: Mix) -> Mix | str:
    """One source, of which parts take the place of the base's."""
    return mix.base if mix.sources == (mix.base,) else mix


def widen(mix: Mix) -> Mix | str:
    """Scores that are shares of one source are 1."""
    one = len(mix.weights) == 1 and mix.number("score_calibration_value") == 1.0
    return mix.sources[0] if one else mix
