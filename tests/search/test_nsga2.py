"""NSGA-II by generations: what a generation is made of, and which recipes enter it."""

from __future__ import annotations

import numpy as np

from gptailor.recipe import Recipe, Take
from gptailor.search.nsga2 import GenerationalNSGA2
from gptailor.search.searcher import Scored
from tests.search.helpers import asked, dense, make_space, scored, settings, synthetic, told


def test_it_finds_better_recipes_than_random_search() -> None:
    """With as many evaluations, and at most six of eight layers."""
    space = make_space()
    rng = np.random.default_rng(0)

    def best(recipes: list[Recipe]) -> float:
        return max(synthetic(r).accuracy or 0 for r in recipes if r.num_layers <= 6)

    found = told(GenerationalNSGA2(space, settings(start=dense(space))), 25)
    random = []
    for _ in range(len(found)):
        layers = [
            Take(space.names[int(rng.integers(4))], int(i))
            for i in np.sort(rng.permutation(8)[: int(rng.integers(3, 9))])
        ]
        random.append(space.recipe(layers))
    assert best(found) > best(random) + 0.02


def survivors(nsga2: GenerationalNSGA2) -> set[str]:
    return {nsga2._decode(x).hash for x in nsga2._algorithm.pop.get("X")}


def test_a_recipe_without_scores_takes_no_part() -> None:
    space = make_space()
    nsga2 = GenerationalNSGA2(space, settings(8))
    first = asked(nsga2)
    nsga2.tell([scored(r) if i % 2 else Scored(r, None) for i, r in enumerate(first)])
    failed = {recipe.hash for recipe in first[::2]}
    before = survivors(nsga2)
    assert not failed & before
    for _ in range(5):
        new = asked(nsga2)
        assert not failed & {recipe.hash for recipe in new}
        nsga2.tell([Scored(recipe, None) for recipe in new])
    assert survivors(nsga2) == before


def test_guests_enter_the_population() -> None:
    space = make_space()
    nsga2 = GenerationalNSGA2(space, settings(seed=(3,)))
    guest, other = (space.recipe([Take("red", i) for i in layers]) for layers in ((0, 1, 2), (0,)))
    nsga2.tell([Scored(guest, (-9.0, -9.0))])  # before there is a population

    def tell() -> None:
        new = asked(nsga2)
        assert guest.hash not in {recipe.hash for recipe in new[1:]}
        nsga2.tell([Scored(r, (float(i), float(i))) for i, r in enumerate(new)])

    tell()
    nsga2.tell([Scored(other, None)])
    for _ in range(5):
        tell()
        best = nsga2._algorithm.pop.get("F").min(axis=0)
        assert np.array_equal(best, [-9.0, -9.0])
        assert len(nsga2._algorithm.pop) == 12
