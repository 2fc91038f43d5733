"""Recipes: strict keys, canonical text, and one hash for all recipes that build one model.

The canonical text is compared with `tests/golden/recipe.yaml`. When it changes on purpose, look
at the difference, then write the new one with `GPTAILOR_BLESS=1 pytest tests/test_recipe.py`:
archives and published models hold this text, so that the schema's number may have to change too.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gptailor.errors import UsageError
from gptailor.merging.registry import METHODS, Value
from gptailor.recipe import (
    DTYPES,
    NO_LAYER,
    Layer,
    Merge,
    Recipe,
    Take,
    absolute_ref,
    canonical_layer,
    load_yaml,
    read_recipe,
)

GOLDEN = Path(__file__).parent / "golden" / "recipe.yaml"
MODELS = {"base": "org/base", "red": "org/red", "green": "org/green", "blue": "org/blue"}
TA = (("lambda", 1.0), ("normalize", 0.0))
TIES = (("density", 1.0), ("lambda", 1.0), ("normalize", 1.0))


def recipe(*layers: Layer, **changes: Any) -> Recipe:
    return replace(Recipe(MODELS, "base", layers, "base", "base"), **changes, _cache={})


def entry(**keys: Any) -> dict[str, Any]:
    return {"schema": "gptailor/recipe/1", "models": MODELS, "base": "base", "layers": [keys]}


def layer(**keys: Any) -> Layer:
    return Recipe.from_dict(entry(**keys)).layers[0]


def refused(data: object) -> str:
    with pytest.raises(UsageError) as caught:
        Recipe.from_dict(data, "r.yaml")
    text = str(caught.value)
    assert "r.yaml" in text
    assert "\n" not in text
    return text


def weights(**values: float) -> tuple[tuple[str, float], ...]:
    return tuple(values.items())


FULL = recipe(
    Take("red", 0),
    Take("green", 3, 0.97),
    Merge("linear", 4, weights(red=0.25, green=0.75), (("normalize", 1.0),)),
    Merge("linear", 5, weights(red=0.25), (("normalize", 0.0),)),
    Merge("task_arithmetic", 1, weights(red=0.5, green=-0.5), (("lambda", 0.7), *TA[1:])),
    Merge("slerp", 8, weights(green=1.0, red=1.0), (("t", 0.3),), 1.5),
    Merge("ties", 7, weights(red=1.0, blue=0.1), (("density", 0.5), *TIES[1:])),
    head="green",
    dtype="float16",
)


# Text


def test_golden_text() -> None:
    if os.environ.get("GPTAILOR_BLESS"):
        GOLDEN.write_text(FULL.to_yaml())
    assert FULL.to_yaml() == GOLDEN.read_text()


def test_golden_hash() -> None:
    """The archive's key; it may change only together with the schema's number."""
    assert Recipe.from_yaml(GOLDEN.read_text()).hash == FULL.hash
    assert FULL.point == FULL.hash[:8] == "d166cca7"


def test_the_example_of_the_documentation() -> None:
    text = """
schema: gptailor/recipe/1
models: {base: HuggingFaceTB/SmolLM2-135M, math: ./models/math, code: ./models/code}
base: base                  # gives config, tokenizer, and whatever no entry names
dtype: bfloat16
embeddings: base
head: base
layers:
  - {take: math, layer: 0}
  - {merge: task_arithmetic, layer: 1, weights: {math: 0.5, code: 0.5}, lambda: 1.0}
  - {take: base, layer: 3, scale: 0.97}
"""
    found = Recipe.from_yaml(text)
    assert found.layers == (
        Take("math", 0),
        Merge("task_arithmetic", 1, weights(math=0.5, code=0.5), TA),
        Take("base", 3, 0.97),
    )
    assert found.src_layers == (0, 1, 3)
    assert found.num_layers == 3


def test_defaults() -> None:
    found = Recipe.from_dict(entry(take="red", layer=2))
    assert (found.embeddings, found.head, found.dtype) == ("base", "base", "bfloat16")


_names = st.text(min_size=1, max_size=6).filter(str.isprintable) | st.sampled_from(
    ["yes", "null", "1", "1.5", "a: b", "#x", "- a", "{x}", "é", " a ", "'", '"', "~", "<<"]
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
            some = [m for m in models if m in some]  # as a file is read
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
        if isinstance(entry, Merge) and draw(st.booleans()):  # as an override writes it
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


@settings(max_examples=150, deadline=None)
@given(recipes())
def test_round_trip(made: Recipe) -> None:
    text = made.to_yaml()
    again = Recipe.from_yaml(text)
    assert again == made
    assert again.to_yaml() == text
    assert Recipe.from_dict(yaml.safe_load(text)) == made


@settings(max_examples=150, deadline=None)
@given(recipes())
def test_the_canonical_form_has_the_same_hash(made: Recipe) -> None:
    canonical = made.canonical()
    assert canonical.hash == made.hash
    assert canonical.canonical() == canonical
    assert canonical.src_layers == made.src_layers


@settings(max_examples=150, deadline=None)
@given(recipes(), st.data())
def test_names_of_models_do_not_count(made: Recipe, data: st.DataObject) -> None:
    names = list(made.models)
    fresh = data.draw(st.permutations([f"m{i}" for i in range(len(names))]))
    new = dict(zip(names, fresh, strict=True))
    order = data.draw(st.permutations(names))

    def renamed(old: Layer) -> Layer:
        parts = tuple((text, renamed(part)) for text, part in old.modules)
        if isinstance(old, Take):
            return replace(old, model=new[old.model], modules=parts)
        sources = tuple((new[m], w) for m, w in old.weights)
        return replace(old, weights=sources, modules=parts)

    def renamed_end(old: str | Layer) -> str | Layer:
        return new[old] if isinstance(old, str) else renamed(old)

    other = Recipe(
        {new[name]: made.models[name] for name in order},
        new[made.base],
        tuple(renamed(old) for old in made.layers),
        renamed_end(made.embeddings),
        renamed_end(made.head),
        made.dtype,
    )
    assert other.hash == made.hash


@settings(max_examples=150, deadline=None)
@given(recipes(), st.data())
def test_the_order_of_sources_counts_only_where_it_has_a_meaning(
    made: Recipe, data: st.DataObject
) -> None:
    def reordered(old: Layer) -> Layer:
        parts = tuple((text, reordered(part)) for text, part in old.modules)
        if isinstance(old, Take) or old.method == "slerp":
            return replace(old, modules=parts)
        order = data.draw(st.permutations(range(len(old.weights))))
        values = tuple(
            (name, tuple(value[i] for i in order) if isinstance(value, tuple) else value)
            for name, value in old.parameters
        )
        sources = tuple(old.weights[i] for i in order)
        return replace(old, weights=sources, parameters=values, modules=parts)

    other = replace(made, layers=tuple(map(reordered, made.layers)), _cache={})
    assert other.hash == made.hash


# Whatever builds the same model has the same hash, and nothing else has

EQUAL: list[tuple[Layer, Layer]] = [
    # one source of which nothing is lost
    (Merge("linear", 1, weights(red=0.3), (("normalize", 1.0),)), Take("red", 1)),
    (Merge("linear", 1, weights(red=-2.0), (("normalize", 1.0),)), Take("red", 1)),
    (Merge("linear", 1, weights(red=1.0), (("normalize", 0.0),)), Take("red", 1)),
    (Merge("linear", 1, weights(red=1.0, blue=0.0), (("normalize", 0.0),)), Take("red", 1)),
    (Merge("linear", 1, weights(red=0.7, blue=0.0), (("normalize", 1.0),)), Take("red", 1)),
    (Merge("task_arithmetic", 1, weights(red=1.0), TA), Take("red", 1)),
    (Merge("task_arithmetic", 1, weights(red=0.3), (("lambda", 1.0), ("normalize", 1.0))),
     Take("red", 1)),
    (Merge("task_arithmetic", 1, weights(red=0.5), (("lambda", 2.0), TA[1])), Take("red", 1)),
    (Merge("task_arithmetic", 1, weights(red=1.0, base=0.4), TA), Take("red", 1)),
    (Merge("ties", 1, weights(red=0.3), TIES), Take("red", 1)),
    (Merge("ties", 1, weights(red=0.3, blue=0.0, base=2.0), TIES), Take("red", 1)),
    # none
    (Merge("task_arithmetic", 1, weights(red=0.0), TA), Take("base", 1)),
    (Merge("task_arithmetic", 1, weights(base=0.7), TA), Take("base", 1)),
    (Merge("task_arithmetic", 1, weights(red=1.0, blue=1.0), (("lambda", 0.0), TA[1])),
     Take("base", 1)),
    (Merge("ties", 1, weights(red=0.0, base=1.0), TIES), Take("base", 1)),
    (Merge("ties", 1, weights(red=1.0), (TIES[0], ("lambda", 0.0), TIES[2])), Take("base", 1)),
    # λ folded into the weights
    (Merge("task_arithmetic", 1, weights(red=0.5, blue=1.0), (("lambda", 0.5), TA[1])),
     Merge("task_arithmetic", 1, weights(red=0.25, blue=0.5), TA)),
    (Merge("task_arithmetic", 1, weights(red=0.5, blue=1.5), (("lambda", 1.0), ("normalize", 1.0))),
     Merge("task_arithmetic", 1, weights(red=0.25, blue=0.75), TA)),
    (Merge("task_arithmetic", 1, weights(red=0.5, base=1.5), (("lambda", 1.0), ("normalize", 1.0))),
     Merge("task_arithmetic", 1, weights(red=0.25), TA)),
    (Merge("task_arithmetic", 1, weights(red=1.0, blue=-1.0), (TA[0], ("normalize", 1.0))),
     Merge("task_arithmetic", 1, weights(red=1.0, blue=-1.0), TA)),
    # one source makes the weight of ties meaningless
    (Merge("ties", 1, weights(red=0.3), (("density", 0.5), *TIES[1:])),
     Merge("ties", 1, weights(red=-1.7), (("density", 0.5), *TIES[1:]))),
    (Merge("ties", 1, weights(red=0.3, blue=0.0), (("density", 0.5), *TIES[1:])),
     Merge("ties", 1, weights(red=1.0), (("density", 0.5), *TIES[1:]))),
    # a mean is a mean
    (Merge("linear", 1, weights(red=1.0, blue=2.0), (("normalize", 1.0),)),
     Merge("linear", 1, weights(red=0.5, blue=1.0), (("normalize", 1.0),))),
    (Merge("linear", 1, weights(red=0.5, blue=1.5), (("normalize", 1.0),)),
     Merge("linear", 1, weights(red=0.25, blue=0.75), (("normalize", 0.0),))),
    # slerp from both ends
    (Merge("slerp", 1, weights(red=1.0, blue=1.0), (("t", 0.0),)), Take("red", 1)),
    (Merge("slerp", 1, weights(red=1.0, blue=1.0), (("t", 1.0),)), Take("blue", 1)),
    (Merge("slerp", 1, weights(red=1.0, red2=1.0)[:1] * 2, (("t", 0.4),)), Take("red", 1)),
    (Merge("slerp", 1, weights(red=1.0, blue=1.0), (("t", 0.3),)),
     Merge("slerp", 1, weights(blue=1.0, red=1.0), (("t", 0.7),))),
    # the order of the sources
    (Merge("linear", 1, weights(red=0.5, blue=1.5), (("normalize", 1.0),)),
     Merge("linear", 1, weights(blue=1.5, red=0.5), (("normalize", 1.0),))),
    (Merge("ties", 1, weights(red=0.5, blue=1.5), TIES),
     Merge("ties", 1, weights(blue=1.5, red=0.5), TIES)),
]  # fmt: skip


@pytest.mark.parametrize(("one", "two"), EQUAL)
def test_equal(one: Layer, two: Layer) -> None:
    assert recipe(one).hash == recipe(two).hash
    one, two = (replace(x, scale=0.5) for x in (one, two))
    assert recipe(one, Take("red", 2)).hash == recipe(two, Take("red", 2)).hash
    canonical = canonical_layer(one, "base", MODELS)
    assert canonical == canonical_layer(two, "base", MODELS)
    assert canonical.scale == 0.5


def test_the_last_scale_is_without_effect() -> None:
    assert (
        recipe(Take("red", 0), Take("red", 1, 0.5)).hash
        == recipe(Take("red", 0), Take("red", 1)).hash
    )


def test_unused_models_do_not_count() -> None:
    fewer = {name: MODELS[name] for name in ("base", "red")}
    assert recipe(Take("red", 1), models=fewer).hash == recipe(Take("red", 1)).hash


def test_parameters_that_count() -> None:
    merge = Merge("ties", 1, weights(red=0.5, blue=1.5), TIES)
    plain = Merge("linear", 1, weights(red=0.5, blue=1.5), (("normalize", 0.0),))
    last = Take("red", 5)
    different = [
        recipe(Take("red", 1), last),
        recipe(Take("blue", 1), last),
        recipe(Take("red", 2), last),
        recipe(Take("red", 1), last, last),
        recipe(last, Take("red", 1)),
        recipe(Take("red", 1, 0.5), last),
        recipe(Take("red", 1), last, base="red"),
        recipe(Take("red", 1), last, embeddings="red"),
        recipe(Take("red", 1), last, head="red"),
        recipe(Take("red", 1), last, dtype="float32"),
        recipe(Take("red", 1), last, models=MODELS | {"red": "org/other"}),
        recipe(merge, last),
        recipe(replace(merge, src_layer=2), last),
        recipe(replace(merge, weights=weights(red=1.5, blue=0.5)), last),
        recipe(replace(merge, weights=weights(red=0.5, green=1.5)), last),
        recipe(replace(merge, weights=weights(red=0.5, blue=1.5, green=0.1)), last),
        recipe(replace(merge, parameters=(("density", 0.5), *TIES[1:])), last),
        recipe(replace(merge, parameters=(TIES[0], ("lambda", 0.5), TIES[2])), last),
        recipe(replace(merge, parameters=(*TIES[:2], ("normalize", 0.0))), last),
        recipe(
            replace(merge, weights=weights(red=0.5), parameters=(("density", 0.5), *TIES[1:])), last
        ),
        recipe(replace(merge, method="task_arithmetic", parameters=TA), last),
        recipe(plain, last),
        recipe(replace(plain, parameters=(("normalize", 1.0),)), last),
        recipe(replace(plain, weights=weights(red=0.5)), last),
        recipe(Merge("slerp", 1, weights(red=1.0, blue=1.0), (("t", 0.3),)), last),
        recipe(Merge("slerp", 1, weights(blue=1.0, red=1.0), (("t", 0.3),)), last),
    ]
    hashes = [r.hash for r in different]
    assert len(set(hashes)) == len(hashes)


def test_with_two_sources_the_base_of_a_mean_counts() -> None:
    with_base = Merge("linear", 1, weights(red=0.5, base=0.5), (("normalize", 1.0),))
    assert recipe(with_base).hash != recipe(Take("red", 1)).hash


# What is refused


def test_keys() -> None:
    good = entry(take="red", layer=0)
    assert "unknown key 'layer' in r.yaml: did you mean 'layers'?" in refused(good | {"layer": 1})
    assert "unknown key 'heads' in r.yaml: did you mean 'head'?" in refused(good | {"heads": 1})
    for key in ("models", "base", "layers"):
        assert f"the key {key!r} is missing" in refused({k: v for k, v in good.items() if k != key})
    assert "schema is 'gptailor/recipe/2'" in refused(good | {"schema": "gptailor/recipe/2"})
    assert "schema is None" in refused({k: v for k, v in good.items() if k != "schema"})
    for nothing in (None, [], "text", 3):
        assert "must be a mapping" in refused(nothing)
    for layers in (None, [], {}, "x"):
        assert "layers must be a list with at least one entry" in refused(good | {"layers": layers})
    assert "models must map names" in refused(good | {"models": {"base": 3, "red": "x"}})
    assert "models must map names" in refused(good | {"models": {1: "x", "base": "b"}})
    assert "models must be a mapping" in refused(good | {"models": ["base"]})


@pytest.mark.parametrize("key", ["base", "embeddings", "head"])
@pytest.mark.parametrize("name", ["rad", 3, None, ["red"], {"red": 1}])
def test_models(key: str, name: object) -> None:
    text = refused(entry(take="red", layer=0) | {key: name})
    assert f"unknown model {str(name)!r} in r.yaml: {key}" in text
    if name == "rad":
        assert "did you mean 'red'?" in text


@pytest.mark.parametrize("dtype", ["bf16", "float64", None, ["float32"], 16])
def test_dtype(dtype: object) -> None:
    assert f"unknown dtype {str(dtype)!r}" in refused(entry(take="red", layer=0) | {"dtype": dtype})


LAYERS: list[tuple[dict[str, Any], str]] = [
    ({"layer": 1}, "layers[0] needs either 'take' or 'merge'"),
    ({"tkae": "red", "layer": 1}, "unknown key 'tkae' in r.yaml: layers[0]: did you mean 'take'?"),
    ({"take": "red", "merge": "linear", "layer": 1}, "needs either 'take' or 'merge'"),
    ({"take": "rde", "layer": 1}, "unknown model 'rde' in r.yaml: layers[0]: did you mean 'red'?"),
    ({"take": ["red"], "layer": 1}, "unknown model"),
    ({"take": None, "layer": 1}, "unknown model 'None'"),
    ({"take": "red"}, "layer is None, but must be 0 or a higher integer"),
    ({"take": "red", "layer": -1}, "layer is -1"),
    ({"take": "red", "layer": True}, "layer is True"),
    ({"take": "red", "layer": 1.0}, "layer is 1.0"),
    ({"take": "red", "layer": "1"}, "layer is '1'"),
    ({"take": "red", "layer": [1]}, "layer is [1]"),
    ({"take": "red", "layer": 1, "scale": 0.09}, "scale is 0.09, outside its bounds 0.1 to 10"),
    ({"take": "red", "layer": 1, "scale": 11}, "scale is 11, outside"),
    ({"take": "red", "layer": 1, "scale": "1"}, "scale is '1', but must be a number"),
    ({"take": "red", "layer": 1, "scale": True}, "scale is True, but must be a number"),
    ({"take": "red", "layer": 1, "scale": float("nan")}, "scale is nan"),
    ({"take": "red", "layer": 1, "scale": None}, "scale is None"),
    ({"take": "red", "layer": 1, "lambda": 1}, "unknown key 'lambda'"),
    ({"take": "red", "layer": 1, "scal": 1}, "unknown key 'scal' in r.yaml: layers[0]: did you "
     "mean 'scale'?"),
    ({"merge": "slrep", "layer": 1, "models": ["red", "blue"]},
     "unknown merge method 'slrep' in r.yaml: layers[0]: did you mean 'slerp'?"),
    ({"merge": ["slerp"], "layer": 1, "models": ["red", "blue"]}, "unknown merge method"),
    ({"merge": None, "layer": 1}, "unknown merge method 'None'"),
    ({"merge": "slerp", "layer": 1}, "the key 'models' is missing"),
    ({"merge": "slerp", "layer": 1, "models": ["red", "blue"]}, "slerp needs a value for t"),
    ({"merge": "slerp", "layer": 1, "models": ["red"], "t": 0.5}, "takes exactly 2 models, not 1"),
    ({"merge": "slerp", "layer": 1, "models": ["red", "green", "blue"], "t": 0.5}, "not 3"),
    ({"merge": "slerp", "layer": 1, "models": "red", "t": 0.5}, "models must be a list"),
    ({"merge": "slerp", "layer": 1, "models": [["red"], "blue"], "t": 0.5}, "unknown model"),
    ({"merge": "slerp", "layer": 1, "models": ["red", "blue"], "t": 1.01},
     "t is 1.01, outside its bounds 0 to 1"),
    ({"merge": "slerp", "layer": 1, "weights": {"red": 1, "blue": 1}, "t": 0.5}, "'models' is mis"),
    ({"merge": "ties", "layer": 1}, "the key 'weights' is missing"),
    ({"merge": "ties", "layer": 1, "weights": {}}, "ties takes 1 to 16 models, not 0"),
    ({"merge": "ties", "layer": 1, "weights": ["red"]}, "weights must be a mapping"),
    ({"merge": "ties", "layer": 1, "weights": {"redd": 1}}, "did you mean 'red'?"),
    ({"merge": "ties", "layer": 1, "weights": {"red": 1001}},
     "the weight of red is 1001, outside its bounds -1000 to 1000"),
    ({"merge": "ties", "layer": 1, "weights": {"red": "1"}}, "the weight of red is '1', but must"),
    ({"merge": "ties", "layer": 1, "weights": {"red": float("inf")}}, "the weight of red is inf"),
    ({"merge": "ties", "layer": 1, "weights": {"red": None}}, "the weight of red is None"),
    ({"merge": "ties", "layer": 1, "weights": {"red": 1}, "density": -0.1}, "density is -0.1"),
    ({"merge": "ties", "layer": 1, "weights": {"red": 1}, "density": [1]}, "density is [1]"),
    ({"merge": "ties", "layer": 1, "weights": {"red": 1}, "densty": 1}, "did you mean 'density'?"),
    ({"merge": "ties", "layer": 1, "weights": {"red": 1}, "normalize": 1},
     "normalize is 1, but must be true or false"),
    ({"merge": "task_arithmetic", "layer": 1, "weights": {"red": 1}, "lamda": 1},
     "did you mean 'lambda'?"),
    ({"merge": "task_arithmetic", "layer": 1, "weights": {"red": 1}, "lambda": 101},
     "lambda is 101, outside its bounds -100 to 100"),
    ({"merge": "linear", "layer": 1, "weights": {"red": 1, "blue": -1}},
     "the weights of linear add up to zero"),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "message"), LAYERS)
def test_layers(keys: dict[str, Any], message: str) -> None:
    text = refused(entry(**keys))
    assert message in text
    assert "layers[0]" in text


def test_a_number_of_400_digits_is_refused() -> None:
    refused(entry(take="red", layer=1, scale=10**400))


def test_an_entry_that_is_no_mapping() -> None:
    for wrong in (None, "red", 3, ["take"]):
        assert "layers[0] must be a mapping" in refused(entry() | {"layers": [wrong]})


def test_the_order_of_weights_is_that_of_the_models() -> None:
    found = layer(merge="linear", layer=1, weights={"blue": 1, "red": 2})
    assert isinstance(found, Merge)
    assert found.weights == (("red", 2.0), ("blue", 1.0))


BAD_YAML = [
    ("a: 1\nb: 2\na: 3\n", "line 1: the key 'a' is written twice"),
    ("layers:\n  - {take: red, take: blue}\n", "the key 'take' is written twice"),
    ("a: [1\n", "line 2"),
    ("? [a]\n: b\n", "unhashable"),
    ("? {a: 1}\n: b\n", "unhashable"),
    ("a: 2001-99-99\n", "month must be in 1..12"),
    ("a: " + "9" * 5000 + "\n", "limit"),
    ("a: !!python/object:os.system x\n", "could not determine a constructor"),
    ("a: \x00\n", "special characters are not allowed"),
    ("a: *nobody\n", "found undefined alias"),
    ("a: &a [*a]\nb: {<<: 3}\n", "line"),
    ("[" * 5000, "recursion"),
    ("a\n\tb: [", ""),
]


@pytest.mark.parametrize(("text", "message"), BAD_YAML)
def test_yaml(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_yaml(text, "r.yaml")
    assert message in str(caught.value)
    assert str(caught.value).startswith("r.yaml")
    assert "\n" not in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(
    st.text(alphabet=st.characters(codec="utf-8"), max_size=60) | st.text("{}[]:,-&*!?#|>'\" \na1<")
)
def test_any_text_is_a_usage_error_or_data(text: str) -> None:
    try:
        Recipe.from_yaml(text, "r.yaml")
    except UsageError as error:
        assert "\n" not in str(error)
    else:
        raise AssertionError("this can't be a recipe")


# Files


def test_models_are_seen_from_the_file(tmp_path: Path) -> None:
    for name in ("near", "sub"):
        (tmp_path / "a" / name).mkdir(parents=True)
    models = {"base": "near", "red": "./sub", "green": "../x", "blue": "org/hub@v1", "far": "/y"}
    path = tmp_path / "a" / "r.yaml"
    path.write_text(recipe(Take("red", 0), models=models).to_yaml())
    assert dict(read_recipe(path).models) == {
        "base": str(tmp_path / "a" / "near"),
        "red": str(tmp_path / "a" / "sub"),
        "green": str(tmp_path / "x"),
        "blue": "org/hub@v1",
        "far": "/y",
    }
    assert absolute_ref("~/x", tmp_path) == str(Path.home() / "x")


def test_a_recipe_that_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere.yaml"):
        with pytest.raises(UsageError, match=f"The recipe {path} can't be read"):
            read_recipe(path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not a text file"):
        read_recipe(tmp_path / "binary.yaml")


@pytest.mark.parametrize("name", ["a\x85b", "line\nbreak", "bell\x07", "\u202ertl"])
def test_names_that_cannot_be_shown_are_refused(name: str) -> None:
    data = entry() | {"models": {"base": "./b", name: "./c"}, "base": "base"}
    assert "can't be shown" in refused(data)
