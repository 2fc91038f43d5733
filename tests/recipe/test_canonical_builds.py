"""The engine builds the same tensors from an entry and from its canonical form."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from gptailor import _C
from gptailor.merging.registry import METHODS, Value
from gptailor.merging.regmean import regmean
from gptailor.recipe import Layer, Merge, Take
from gptailor.recipe.canonical import canonical_layer
from tests.native.native_tools import run, tensor
from tests.recipe.recipes import MODELS

SHAPE = (5, 8)
RATIO = "reduce_non_diagonal_ratio"


def tensors(seed: int) -> dict[str, np.ndarray]:
    """A base and finetunes of it, with differences of a typical size."""
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(SHAPE)
    drawn = {name: base + 0.3 * rng.standard_normal(SHAPE) for name in MODELS}
    return {name: x.astype(np.float32) for name, x in (drawn | {"base": base}).items()}


def built(entry: Layer, models: dict[str, np.ndarray]) -> np.ndarray:
    """The engine's result for an entry, computed in float32."""
    if isinstance(entry, Take):
        return models[entry.model].ravel()
    method = METHODS[entry.method]
    weights = [weight for _, weight in entry.weights]
    if method.is_linear_solve:
        grams = [gram(models[name]) for name in entry.models]
        sources = [torch.tensor(models[name]) for name in entry.models]
        return regmean(sources, grams, weights, entry.number(RATIO)).flatten().numpy()
    if method.engine is None:  # only its canonical form is ever built
        return built(canonical_layer(entry, "base", MODELS), models)
    out = run(
        method.name,
        [tensor(models[name], "F32") for name in entry.models],
        tensor(models["base"], "F32") if entry.takes_base else None,
        statistics=[tensor(models[name] ** 2, "F32") for name in entry.models]
        if method.is_calibrated
        else (),
        weights=weights,
        parameters=dict(entry.parameters),
        key=7,
        threads=1,
    )
    return out.view(np.float32).astype(np.float64)


def gram(x: np.ndarray) -> torch.Tensor:
    """A Gram matrix of full rank, of inputs that depend on the model."""
    rng = np.random.default_rng(int(abs(x).sum() * 1e4))
    inputs = rng.standard_normal((4 * SHAPE[1], SHAPE[1])).astype(np.float32)
    return torch.tensor(inputs.T @ inputs)


_weight = st.sampled_from([0.0, 0.5, 1.0, -0.25, 2.0]) | st.floats(-2, 2).map(lambda w: round(w, 3))


@st.composite
def merges(draw: st.DrawFn) -> Merge:
    method = METHODS[draw(st.sampled_from(sorted(METHODS)))]
    names = ["red", "green", "blue"]
    if method.base == "never" or (method.weighted and method.uses_base):
        names.append("base")
    most = min(method.max_sources, len(names))
    some = draw(
        st.lists(
            st.sampled_from(names),
            min_size=method.min_sources, max_size=most, unique=method.weighted,
        )
    )  # fmt: skip
    values: dict[str, Value] = {}
    for p in method.parameters:
        high = 1e-4 if p.name == "tol" else min(p.high, 3.0)  # above, source order matters
        number = st.sampled_from([p.low, high, *p.search]) | st.floats(p.low, high)
        if p.is_flag or p.kind == "integer":
            values[p.name] = float(draw(st.integers(0, 1)))
        elif p.per_source and draw(st.booleans()):
            values[p.name] = tuple(draw(number) for _ in some)
        else:
            values[p.name] = draw(number)
    if method.name.startswith("della"):
        values["density"] = tuple(draw(st.sampled_from([0.0, 0.4, 0.5, 1.0])) for _ in some)
        values["epsilon"] = draw(st.sampled_from([0.0, 0.1, 0.15]))
    sources = tuple((name, draw(_weight) if method.weighted else 1.0) for name in some)
    if method.is_calibrated:  # sums near zero would amplify rounding errors
        sources = tuple((name, abs(weight)) for name, weight in sources)
    return Merge(method.name, 1, sources, tuple(values.items()))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(merges(), st.integers(0, 3))
def test_the_canonical_form_builds_the_same(entry: Merge, seed: int) -> None:
    models = tensors(seed)
    canonical = canonical_layer(entry, "base", MODELS)
    if METHODS[entry.method].is_random:
        # A source's mask depends on its position, which only the canonical form fixes.
        in_order = replace(entry, weights=tuple(sorted(entry.weights, key=lambda s: MODELS[s[0]])))
        assume(in_order == entry)
        assume(isinstance(canonical, Take) or canonical.models == entry.models
               or not METHODS[canonical.method].is_random)  # fmt: skip
    try:
        expected = built(entry, models)
    except (ValueError, _C.NanError):  # weights that add up to zero, or a quotient 0 / 0
        assume(False)
    got = built(canonical, models)
    size = max(1.0, float(np.abs(expected).max()))
    size *= 1 + sum(abs(w) for _, w in entry.weights)
    assert np.abs(got - expected).max() <= 1e-5 * size, canonical
