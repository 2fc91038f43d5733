"""NSGA-II without generations: asks for nothing twice, and is as good as with generations."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gptailor.recipe import Recipe, Take
from gptailor.search.nsga2 import GenerationalNSGA2
from gptailor.search.searcher import Scored
from gptailor.search.space import SearchSpace
from gptailor.search.steady_state import SteadyStateNSGA2
from tests.search import helpers
from tests.search.helpers import asked, dense, make_space, scored, synthetic


def run(space: SearchSpace, total: int, num_workers: int, seed: int = 0) -> list[Recipe]:
    """A search whose results come back in random order."""
    rng = np.random.default_rng(seed)
    nsga2 = SteadyStateNSGA2(space, helpers.settings(seed=(seed,), start=dense(space)))
    running: list[Recipe] = []
    told: list[Recipe] = []
    while len(told) < total:
        running += asked(nsga2, num_workers - len(running))
        done = running.pop(int(rng.integers(len(running))))
        nsga2.tell([scored(done)])
        told.append(done)
    return told


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 40), st.integers(0, 1000))
def test_no_recipe_is_asked_for_twice(num_workers: int, seed: int) -> None:
    told = run(make_space(), 120, num_workers, seed)
    assert len({recipe.hash for recipe in told}) == 120


def test_it_is_as_good_as_generations() -> None:
    """By the mean of the best scores up to each size, over a few seeds, with eight workers."""
    space = make_space()

    def found(recipes: list[Recipe]) -> float:
        best = [
            max([synthetic(r).accuracy or 0 for r in recipes if r.num_layers <= size], default=0)
            for size in range(3, 9)
        ]
        return float(np.mean(best))

    def by_generations(seed: int) -> list[Recipe]:
        made = GenerationalNSGA2(space, helpers.settings(seed=(seed,), start=dense(space)))
        return helpers.told(made, 15)

    def by_chance(seed: int) -> list[Recipe]:
        return asked(SteadyStateNSGA2(space, helpers.settings(seed=(seed,))), 180)

    generations = [by_generations(seed) for seed in range(3)]
    mean = np.mean([found(recipes) for recipes in generations])
    mine = np.mean([found(run(space, len(r), 8, s)) for s, r in enumerate(generations)])
    random = np.mean([found(by_chance(seed)) for seed in range(3)])
    assert mine > mean - 0.04
    assert mine > random + 0.02


def test_recipes_of_others_enter_the_population() -> None:
    space = make_space()
    nsga2 = SteadyStateNSGA2(space, helpers.settings(6, start=dense(space)))
    nsga2.tell([Scored(recipe, (0.0, 1.0)) for recipe in asked(nsga2, 10)])
    best = space.recipe([Take("red", i) for i in range(3)])
    nsga2.tell([Scored(best, (-1.0, 0.1))])
    assert best.hash in {recipe.hash for recipe in nsga2.survivors}


def test_without_scores_it_still_has_recipes_for_everybody() -> None:
    found = asked(SteadyStateNSGA2(make_space(), helpers.settings()), 200)
    assert len({recipe.hash for recipe in found}) == 200
