"""Recipes for tests: short ways to write one, and random ones of every shape."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from gptailor.merging.registry import METHODS, Value
from gptailor.recipe import DTYPES, NO_LAYER, Layer, Merge, Recipe, Take

MODELS = {"base": "org/base", "red": "org/red", "green": "org/green", "blue": "org/blue"}
TA = (("lambda", 1.0), ("normalize", 0.0))
TIES = (("density", 1.0), ("lambda", 1.0), ("normalize", 1.0))


def recipe(*layers: Layer, **changes: Any) -> Recipe:
    return replace(Recipe(MODELS, "base", layers, "base", "base"), **changes, _cache={})


def weights(**values: float) -> tuple[tuple[str, float], ...]:
    return tuple(values.items())


def merge(method: str, *models: str, modules: Any = (), **values: Any) -> Merge:
    """A merge of listed models."""
    sources = tuple((model, 1.0) for model in models)
    return Merge(method, 1, sources, tuple(values.items()), modules=modules)


def weigh(method: str, named: dict[str, float], **values: Any) -> Merge:
    """A merge of weighted models; `lam` is lambda."""
    values = {{"lam": "lambda"}.get(name, name): value for name, value in values.items()}
    return Merge(method, 1, tuple(named.items()), tuple(values.items()))


_names = st.text(min_size=1, max_size=6).filter(str.isprintable) | st.sampled_from(
    [
        "yes",
        "null",
        "1",
        "1.5",
        "0e0",
        "12E45",
        "a: b",
        "#x",
        "- a",
        "{x}",
        "é",
        " a ",
        "'",
        '"',
        "~",
        "<<",
    ]
)
_weight = st.sampled_from([0.0, 0.5, 1.0]) | st.floats(-1000, 1000)
_MODULES = ["self_attn", "mlp", "self_attn.q_proj", "mlp.up", "é: ", "1"]
_scale = st.just(1.0) | st.floats(0.1, 10)


@st.composite
def recipes(draw: st.DrawFn, names: st.SearchStrategy[str] = _names) -> Recipe:
    known = draw(st.lists(names, min_size=2, max_size=4, unique=True))
    models = {name: f"org/{i}" for i, name in enumerate(draw(st.permutations(known)))}
    one = st.sampled_from(list(models))

    def drawn_merge(src_layer: int, base: str) -> Merge:
        method = draw(st.sampled_from(list(METHODS.values())))
        known = list(models)
        if method.base != "never" and not (method.weighted and method.uses_base):
            known.remove(base)
        most = min(method.max_sources, len(known) if method.weighted else 5)
        least = method.min_sources
        if most < least:
            method, known, most, least = METHODS["karcher"], list(models), 5, 1
        some = draw(
            st.lists(st.sampled_from(known), min_size=least, max_size=most, unique=method.weighted)
        )
        if method.weighted:
            some = [m for m in models if m in some]  # the order in which a file is read
        sources = tuple((m, draw(_weight) if method.weighted else 1.0) for m in some)
        values: dict[str, Value] = {}
        for p in method.parameters:
            number = st.sampled_from([p.low, p.high, *p.search]) | st.floats(p.low, p.high)
            if p.kind == "integer":
                number = st.integers(int(p.low), int(p.high)).map(float)
            if p.is_flag:
                values[p.name] = float(draw(st.booleans()))
            elif p.per_source and draw(st.booleans()):
                values[p.name] = tuple(draw(number) for _ in some)
            else:
                values[p.name] = draw(number)
        if method.name.startswith("della"):
            values["density"] = draw(st.sampled_from([0.0, 0.4, 0.5, 1.0]))
            values["epsilon"] = draw(st.sampled_from([0.0, 0.1, 0.15]))
        if abs(sum(w for _, w in sources)) < 1e-8:
            sources = tuple((m, 1.0) for m, _ in sources)
        return Merge(method.name, src_layer, sources, tuple(values.items()))

    def drawn_entry(src_layer: int, base: str) -> Layer:
        if draw(st.booleans()):
            return Take(draw(one), src_layer)
        return drawn_merge(src_layer, base)

    def with_modules(entry: Layer, base: str) -> Layer:
        texts = draw(st.lists(st.sampled_from(_MODULES), max_size=3, unique=True))
        parts = [(text, drawn_entry(0, base)) for text in texts]
        if isinstance(entry, Merge) and draw(st.booleans()):  # as if written as an override
            values = dict(drawn_merge(0, base).parameters)
            shared = {k: v for k, v in entry.parameters if k not in values or draw(st.booleans())}
            parts.append(("norm", replace(entry, parameters=tuple(shared.items()))))
            if "t" in METHODS[entry.method].by_name:
                parts[-1] = ("norm", replace(entry, parameters=(("t", draw(st.floats(0, 1))),)))
        return replace(entry, modules=tuple(parts))

    def drawn_layer(base: str) -> Layer:
        entry = with_modules(drawn_entry(draw(st.integers(0, 40)), base), base)
        return replace(entry, scale=draw(_scale))

    def drawn_end(base: str) -> str | Layer:
        if draw(st.booleans()):
            return draw(one)
        return with_modules(drawn_merge(NO_LAYER, base), base)

    base = draw(one)
    layers = tuple(drawn_layer(base) for _ in range(draw(st.integers(1, 3))))
    dtype = draw(st.sampled_from(list(DTYPES)))
    return Recipe(models, base, layers, drawn_end(base), drawn_end(base), dtype)
