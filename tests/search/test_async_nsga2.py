"""The asynchronous search: nothing twice, in any order of results, as good as generations."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gptailor.recipe import Recipe, Take
from gptailor.search.nsga2 import AsyncNSGA2
from gptailor.search.space import SearchSpace
from tests.search.helpers import make_space, synthetic
from tests.search.test_nsga2 import objectives
from tests.search.test_nsga2 import run as run_generations


def dense(space: SearchSpace) -> list[Recipe]:
    return [space.recipe([Take(m, i) for i in range(8)]) for m in space.names]


def run(space: SearchSpace, total: int, num_workers: int, seed: int = 0) -> list[Recipe]:
    """Results come back in random order."""
    rng = np.random.default_rng(seed)
    nsga2 = AsyncNSGA2(space, 2, 12, [seed], dense(space))
    running: list[Recipe] = []
    told: list[Recipe] = []
    while len(told) < total:
        running += nsga2.ask(num_workers - len(running))
        done = running.pop(int(rng.integers(len(running))))
        nsga2.tell([(done, objectives(done))])
        told.append(done)
    return told


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 40), st.integers(0, 1000))
def test_no_recipe_is_asked_for_twice(num_workers: int, seed: int) -> None:
    told = run(make_space(), 120, num_workers, seed)
    assert len({recipe.hash for recipe in told}) == 120


def test_one_worker_and_one_seed_give_one_search() -> None:
    first, second = run(make_space(), 60, 1), run(make_space(), 60, 1)
    assert [r.hash for r in first] == [r.hash for r in second]


def test_it_finds_what_generations_find() -> None:
    """The mean of the best scores up to each size, over a few seeds, with eight workers."""
    space = make_space()

    def found(recipes: list[Recipe]) -> float:
        best = [
            max([synthetic(r).accuracy or 0 for r in recipes if r.num_layers <= size], default=0)
            for size in range(3, 9)
        ]
        return float(np.mean(best))

    generations = [run_generations(space, 15, seed) for seed in range(3)]
    mean = np.mean([found(recipes) for recipes in generations])
    mine = np.mean([found(run(space, len(r), 8, s)) for s, r in enumerate(generations)])
    random = np.mean([found(AsyncNSGA2(space, 2, 12, [s], []).ask(180)) for s in range(3)])
    assert mine > mean - 0.04
    assert mine > random + 0.02


def test_foreign_recipes_enter_the_population() -> None:
    space = make_space()
    nsga2 = AsyncNSGA2(space, 2, 6, [0], dense(space))
    nsga2.tell([(recipe, [0.0, 1.0]) for recipe in nsga2.ask(10)])
    best = space.recipe([Take("red", i) for i in range(3)])
    nsga2.tell([(best, [-1.0, 0.1])])
    assert best.hash in {recipe.hash for recipe in nsga2.survivors}
    assert nsga2.knows(best)


def test_without_scores_it_still_has_recipes_for_everybody() -> None:
    asked = AsyncNSGA2(make_space(), 2, 12, [0], []).ask(200)
    assert len({recipe.hash for recipe in asked}) == 200


def test_an_exhausted_space_ends() -> None:
    space = make_space(num_layers=8, low=7, methods=(), models={"base": "/m/base"})
    nsga2 = AsyncNSGA2(space, 2, 8, [0])
    told: set[str] = set()
    for _ in range(50):
        asked = nsga2.ask(3)
        told |= {recipe.hash for recipe in asked}
        nsga2.tell([(recipe, objectives(recipe)) for recipe in asked])
    assert len(told) == 9
    assert nsga2.ask(3) == []
