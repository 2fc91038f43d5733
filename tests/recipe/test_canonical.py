"""Recipes that build the same model have the same hash; all others have different ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptailor.recipe import NO_LAYER, Layer, Merge, Recipe, Take
from gptailor.recipe.canonical import canonical_layer
from tests.recipe.recipes import MODELS, TA, TIES, merge, recipe, recipes, weigh, weights


@settings(max_examples=150, deadline=None)
@given(recipes())
def test_the_canonical_form_has_the_same_hash(made: Recipe) -> None:
    canonical = made.canonical()
    assert canonical.hash == made.hash
    assert canonical.canonical() == canonical
    assert canonical.src_layers == made.src_layers


@settings(max_examples=150, deadline=None)
@given(recipes(), st.data())
def test_names_of_models_do_not_matter(made: Recipe, data: st.DataObject) -> None:
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
def test_the_order_of_sources_matters_only_where_it_has_a_meaning(
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


# Recipes that build the same model have the same hash, and no others

EQUAL: list[tuple[Layer, Layer]] = [
    # one source, all of which is kept
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
    # no source
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
    # weights of a mean in the same proportion
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


HALVES = {"red": 0.5, "blue": 0.5}
EQUAL += [
    (merge("average", "red", "blue"), weigh("linear", HALVES)),
    (merge("average", "blue", "red", "blue"), weigh("linear", {"red": 1.0, "blue": 2.0})),
    (merge("average", "red"), Take("red", 1)),
    (merge("stock", "red", "blue"), merge("model_stock", "blue", "red")),
    (merge("model_stock", "red", "red"), Take("red", 1)),
    # nuslerp: the ratio of the weights counts, from both ends
    (weigh("nuslerp", {"red": 1.0, "blue": 3.0}), weigh("nuslerp", {"blue": 0.75, "red": 0.25})),
    (weigh("nuslerp", {"red": 1.0, "blue": -1.0}), weigh("nuslerp", {"red": 5.0, "blue": 5.0})),
    (weigh("nuslerp", {"red": 0.3, "blue": 0.0}), Take("red", 1)),
    (weigh("nuslerp", HALVES, nuslerp_row_wise=1.0), weigh("nuslerp", HALVES)),
    (weigh("multislerp", {"red": 1.0, "blue": 3.0}),
     weigh("multislerp", {"blue": 0.75, "red": 0.25}, normalize_weights=0.0)),
    (weigh("multislerp", {"red": 1.0, "green": 0.0, "blue": 3.0}),
     weigh("multislerp", {"red": 0.25, "blue": 0.75})),
    (weigh("multislerp", {"red": 0.3}, normalize_weights=0.0), Take("red", 1)),
    (weigh("multislerp", {"red": 0.3, "blue": 0.0}), Take("red", 1)),
    (merge("karcher", "red"), Take("red", 1)),
    (merge("karcher", "red", "red"), Take("red", 1)),
    (merge("karcher", "red", "blue"), merge("karcher", "blue", "red")),
    # with nothing dropped, dare, della and breadcrumbs equal the methods that they build on
    (weigh("dare_linear", HALVES, seed=7.0), weigh("task_arithmetic", HALVES)),
    (weigh("dare_linear", {"red": 1.0}), Take("red", 1)),
    (weigh("dare_ties", HALVES, lam=0.5), weigh("ties", HALVES, lam=0.5, normalize=0.0)),
    (weigh("della", HALVES, epsilon=0.3), weigh("ties", HALVES)),
    (weigh("della_linear", HALVES, density=(1.0, 1.0)), weigh("task_arithmetic", HALVES)),
    (weigh("breadcrumbs", HALVES, gamma=0.5, rescale=1.0), weigh("task_arithmetic", HALVES)),
    (weigh("breadcrumbs_ties", HALVES), weigh("ties", HALVES, normalize=0.0)),
    (weigh("ties", HALVES, rescale=1.0), weigh("ties", HALVES)),
    # λ and the sum of the weights folded into the weights
    (weigh("dare_linear", HALVES, density=0.5, lam=2.0),
     weigh("dare_linear", {"red": 1.0, "blue": 1.0}, density=0.5)),
    (weigh("della_linear", {"red": 1.0, "blue": 3.0}, density=0.5, normalize=1.0),
     weigh("della_linear", {"red": 0.25, "blue": 0.75}, density=0.5)),
    # sources whose difference is zero or of which nothing is kept
    (weigh("dare_ties", HALVES | {"base": 1.0, "green": 0.0}, density=0.5),
     weigh("dare_ties", HALVES, density=0.5)),
    (weigh("dare_ties", HALVES | {"green": 1.0}, density=(0.5, 0.5, 0.0)),
     weigh("dare_ties", HALVES, density=0.5)),
    (weigh("breadcrumbs", {"red": 1.0, "blue": 1.0}, density=(1.0, 0.0)), Take("red", 1)),
    (weigh("della", HALVES, density=0.0), Take("base", 1)),
    (weigh("dare_ties", HALVES, density=0.5, lam=0.0), Take("base", 1)),
    # one source elects itself
    (weigh("dare_ties", {"red": 0.3}, density=0.5),
     weigh("dare_linear", {"red": 0.3}, density=0.5)),
    (weigh("della", {"red": 0.3}, density=0.5), weigh("della_linear", {"red": 1.0}, density=0.5)),
    (weigh("breadcrumbs_ties", {"red": 0.3}, density=0.5, lam=2.0),
     weigh("breadcrumbs", {"red": 0.6}, density=0.5)),
    # values without effect
    (weigh("della", HALVES, density=(0.5, 1.0), epsilon=(0.1, 0.3)),
     weigh("della", HALVES, density=(0.5, 1.0), epsilon=(0.1, 0.7))),
    (weigh("breadcrumbs", HALVES, density=(0.5, 1.0), gamma=(0.1, 0.3)),
     weigh("breadcrumbs", HALVES, density=(0.5, 1.0), gamma=(0.1, 0.01))),
    # each source keeps its value when sources are sorted
    (weigh("ties", {"red": 0.5, "blue": 0.6}, density=(0.3, 0.7)),
     weigh("ties", {"blue": 0.6, "red": 0.5}, density=(0.7, 0.3))),
    (merge("sce", "red", "blue", select_topk=0.0), Take("base", 1)),
    (merge("sce", "red"), Take("red", 1)),
    (merge("sce", "red", select_topk=0.5), Take("base", 1)),
    (merge("sce", "red", "blue"), merge("sce", "blue", "red")),
    (merge("ram", "red", epsilon=0.0), Take("red", 1)),
    (merge("widen", "red"), Take("red", 1)),
    (merge("nearswap", "red", t=0.0), Take("base", 1)),
    (merge("nearswap", "base", t=0.1), Take("base", 1)),
    (merge("arcee_fusion", "base"), Take("base", 1)),
    # modules
    (merge("karcher", "red", "blue", modules=(("mlp", merge("karcher", "red", "blue")),)),
     merge("karcher", "red", "blue")),
    (merge("slerp", "red", "blue", t=0.5, modules=(("mlp", merge("slerp", "red", "blue", t=1.0)),)),
     merge("slerp", "red", "blue", t=0.5, modules=(("mlp", Take("blue", 0)),))),
    (Take("red", 1, modules=(("mlp", Take("blue", 1)), ("mlp.up", Take("green", 1)))),
     Take("red", 1, modules=(("mlp", Take("blue", 1)),))),
    (Take("red", 1, modules=(("mlp", weigh("linear", {"red": 0.3})), ("q", Take("red", 1)))),
     Take("red", 1)),
    (weigh("linear", {"red": 2.0}), Take("red", 1, modules=(("mlp", Take("red", 1)),))),
]  # fmt: skip


@pytest.mark.parametrize(("one", "two"), EQUAL)
def test_equal(one: Layer, two: Layer) -> None:
    assert recipe(one).hash == recipe(two).hash
    one, two = (replace(x, scale=0.5) for x in (one, two))
    assert recipe(one, Take("red", 2)).hash == recipe(two, Take("red", 2)).hash
    canonical = canonical_layer(one, "base", MODELS)
    assert canonical == canonical_layer(two, "base", MODELS)
    assert canonical.scale == 0.5


def test_the_last_scale_has_no_effect() -> None:
    assert (
        recipe(Take("red", 0), Take("red", 1, 0.5)).hash
        == recipe(Take("red", 0), Take("red", 1)).hash
    )


def test_unused_models_do_not_matter() -> None:
    fewer = {name: MODELS[name] for name in ("base", "red")}
    assert recipe(Take("red", 1), models=fewer).hash == recipe(Take("red", 1)).hash


def test_parameters_that_matter() -> None:
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


def test_differences_that_matter() -> None:
    sparse = weigh("dare_linear", HALVES, density=0.5)
    other = (("mlp", Take("blue", 1)),)
    different: list[Layer] = [
        Take("red", 1),
        Take("blue", 1),
        Take("red", 1, modules=other),
        Take("red", 1, modules=(("self_attn", Take("blue", 1)),)),
        Take("red", 1, modules=(("mlp.up", Take("red", 1)), *other)),  # a part that stays red
        Take("red", 1, modules=(*other, ("norm", Take("blue", 1)))),
        weigh("linear", HALVES),
        replace(weigh("linear", HALVES), modules=other),
        sparse,
        replace(sparse, method="dare_ties"),
        weigh("dare_linear", HALVES, density=0.5, seed=1.0),
        weigh("dare_linear", HALVES, density=0.5, rescale=0.0),
        weigh("dare_linear", HALVES, density=(0.5, 0.4)),
        weigh("dare_linear", HALVES, density=(0.4, 0.5)),
        weigh("dare_linear", {"red": 0.5, "blue": 0.4}, density=0.5),
        weigh("della_linear", HALVES, density=0.5),
        weigh("della_linear", HALVES, density=0.5, epsilon=0.1),
        weigh("breadcrumbs", HALVES, density=0.5),
        weigh("breadcrumbs", HALVES, density=0.5, gamma=0.1),
        weigh("breadcrumbs", HALVES, density=0.5, rescale=1.0),
        weigh("ties", HALVES, density=0.5),
        weigh("ties", HALVES, density=0.5, rescale=1.0),
        weigh("nuslerp", HALVES),
        weigh("nuslerp", HALVES, nuslerp_flatten=0.0),
        weigh("nuslerp", HALVES, nuslerp_flatten=0.0, nuslerp_row_wise=1.0),
        weigh("nuslerp", HALVES, task_vectors=1.0),
        weigh("multislerp", HALVES),
        weigh("multislerp", HALVES, eps=1e-6),
        weigh("multislerp", {"red": 0.5, "blue": 0.0}, normalize_weights=0.0),
        merge("karcher", "red", "blue"),
        merge("karcher", "red", "blue", "blue"),
        merge("karcher", "red", "blue", max_iter=3.0),
        merge("sce", "red", "blue"),
        merge("sce", "red", "blue", "blue"),
        merge("sce", "red", "blue", select_topk=0.5),
        merge("ram", "red", "blue"),
        merge("ram", "red"),
        merge("model_stock", "red", "blue"),
        merge("model_stock", "red", "blue", filter_wise=1.0),
        merge("nearswap", "red", t=0.1),
        merge("arcee_fusion", "red"),
        merge("widen", "red", "blue"),
        merge("widen", "red", "blue", by_rows=1.0),
    ]
    last = Take("red", 5)
    hashes = [recipe(layer, last).hash for layer in different]
    assert len(set(hashes)) == len(hashes)
    ends: list[str | Layer] = [
        "base",
        "red",
        replace(weigh("linear", HALVES), src_layer=NO_LAYER),
        replace(weigh("linear", HALVES), src_layer=NO_LAYER, modules=other),
    ]
    hashes = [recipe(last, embeddings=a, head=b).hash for a in ends for b in ends]
    assert len(set(hashes)) == len(hashes)


def test_merged_ends_that_amount_to_one_model() -> None:
    plain = recipe(Take("red", 0), embeddings="red", head="base")
    merged = recipe(
        Take("red", 0),
        embeddings=replace(weigh("linear", {"red": 3.0}), src_layer=NO_LAYER),
        head=replace(weigh("task_arithmetic", {"red": 0.0}), src_layer=NO_LAYER),
    )
    assert merged.hash == plain.hash
    assert merged.canonical().embeddings == "red"
    assert Recipe.from_yaml(merged.to_yaml()) == merged
    assert merged.used_models == {"base": "org/base", "red": "org/red"}


def test_hashes_of_recipes_from_before_all_methods() -> None:
    """Since then ties got a parameter and layers got modules; older archives must still match."""
    entries = [
        {"merge": "ties", "layer": 3, "weights": {"red": 0.7, "blue": 0.3}, "density": 0.5},
        {"merge": "linear", "layer": 4, "weights": {"red": 1.0, "blue": 2.0}},
        {"merge": "task_arithmetic", "layer": 5, "weights": {"red": 0.5}, "lambda": 0.5},
        {"merge": "slerp", "layer": 6, "models": ["red", "blue"], "t": 0.3, "scale": 0.9},
    ]
    found = Recipe.from_dict(
        {"schema": "gptailor/recipe/1", "models": MODELS, "base": "base", "layers": entries}
    )
    assert found.hash == "ec612aac1aff83c8875dd24b92dff9f744781342e734a1409fb52f8075250fc2"


def test_the_base_counts_as_a_source_of_a_mean() -> None:
    with_base = Merge("linear", 1, weights(red=0.5, base=0.5), (("normalize", 1.0),))
    assert recipe(with_base).hash != recipe(Take("red", 1)).hash
