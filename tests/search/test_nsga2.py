from __future__ import annotations

import numpy as np

from gptailor.recipe import Recipe, Take
from gptailor.search.nsga2 import NSGA2Search
from gptailor.search.space import SearchSpace
from tests.search.helpers import make_space, synthetic


def objectives(recipe: Recipe) -> list[float]:
    return [-(synthetic(recipe).accuracy or 0.0), recipe.num_layers / 8]


def run(space: SearchSpace, generations: int, seed: int = 0) -> list[Recipe]:
    start = [space.recipe([Take(m, i) for i in range(8)]) for m in space.names]
    nsga2 = NSGA2Search(space, 2, 12, seed, start)
    told: list[Recipe] = []
    for _ in range(generations):
        asked = nsga2.ask()
        nsga2.tell([objectives(recipe) for recipe in asked])
        told += asked
    return told


def test_no_recipe_is_asked_for_twice() -> None:
    told = run(make_space(), 15)
    assert len({recipe.hash for recipe in told}) == len(told) > 120


def test_the_same_seed_gives_the_same_search() -> None:
    first, second = run(make_space(), 6), run(make_space(), 6)
    assert [r.hash for r in first] == [r.hash for r in second]
    assert [r.hash for r in run(make_space(), 6, seed=1)] != [r.hash for r in first]


def test_it_finds_better_recipes_than_random_ones() -> None:
    """At the same number of evaluations, at six of eight layers."""
    space = make_space()
    rng = np.random.default_rng(0)

    def best(recipes: list[Recipe]) -> float:
        return max(synthetic(r).accuracy or 0 for r in recipes if r.num_layers <= 6)

    found = run(space, 25)
    random = []
    for _ in range(len(found)):
        layers = [
            Take(space.names[int(rng.integers(4))], int(i))
            for i in np.sort(rng.permutation(8)[: int(rng.integers(3, 9))])
        ]
        random.append(space.recipe(layers))
    assert best(found) > best(random) + 0.02


def test_a_recipe_without_scores_takes_no_part() -> None:
    space = make_space()
    nsga2 = NSGA2Search(space, 2, 8, 0)
    first = nsga2.ask()
    nsga2.tell([objectives(r) if i % 2 else None for i, r in enumerate(first)])
    failed = {recipe.hash for recipe in first[::2]}
    survivors = {nsga2._decode(x).hash for x in nsga2._algorithm.pop.get("X")}
    assert not failed & survivors
    for _ in range(5):
        asked = nsga2.ask()
        assert not failed & {recipe.hash for recipe in asked}
        nsga2.tell([None] * len(asked))
    assert {nsga2._decode(x).hash for x in nsga2._algorithm.pop.get("X")} == survivors


def test_an_exhausted_space_ends() -> None:
    space = make_space(num_layers=8, low=7, methods=(), models={"base": "/m/base"})
    nsga2 = NSGA2Search(space, 2, 8, 0)
    told: set[str] = set()
    for _ in range(10):
        asked = nsga2.ask()
        if not asked:
            break
        told |= {recipe.hash for recipe in asked}
        nsga2.tell([objectives(recipe) for recipe in asked])
    assert not asked
    assert len(told) == 9  # all eight layers, or one of eight gone


def test_a_first_generation_without_scores_is_told_apart_from_an_exhausted_space() -> None:
    nsga2 = NSGA2Search(make_space(), 2, 8, 0)
    asked = nsga2.ask()
    nsga2.tell([None] * len(asked))
    assert not nsga2.has_begun
