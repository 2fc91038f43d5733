"""Requirements on every search algorithm, under both schedules. A line in `ALGORITHMS` is all that
a new algorithm needs to be tested here."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from gptailor.config import SearchConfig
from gptailor.models.ends import Ends
from gptailor.recipe import Recipe
from gptailor.run.archive import Archive
from gptailor.search.algorithms import ALGORITHMS
from gptailor.search.progress import Progress
from gptailor.search.run import Run
from gptailor.search.searcher import Scored, Searcher, Settings
from gptailor.search.space import SearchSpace
from tests.search.archipelago import NUM_LAYERS, make_config
from tests.search.helpers import (
    MODELS,
    asked,
    dense,
    make_space,
    scored,
    settings,
    synthetic,
    told,
)
from tests.search.simulated import Simulated, family_of

Make = Callable[[SearchSpace, Settings], Searcher]
KINDS = [
    pytest.param(getattr(algorithm, schedule), n, id=f"{name}-{schedule}")
    for name, algorithm in ALGORITHMS.items()
    for schedule, n in (("generational", None), ("asynchronous", 7))
]
each = pytest.mark.parametrize(("make", "n"), KINDS)


def test_the_configuration_knows_all_algorithms() -> None:
    annotation = SearchConfig.model_fields["algorithm"].annotation
    assert set(get_args(annotation)) == set(ALGORITHMS)


@each
def test_no_recipe_is_asked_for_twice(make: Make, n: int | None) -> None:
    space = make_space()
    found = told(make(space, settings(start=dense(space))), 12, n)
    assert len({recipe.hash for recipe in found}) == len(found) > 80


@each
def test_recipes_keep_to_the_space(make: Make, n: int | None) -> None:
    space = make_space(low=4, high=6, protect=(0, 7), methods=("slerp", "ties"))
    for recipe in told(make(space, settings()), 10, n):
        assert 4 <= recipe.num_layers <= 6
        assert {0, 7} <= set(recipe.src_layers)
        assert space.decode(space.encode(recipe)).hash == recipe.hash


@each
def test_ends_are_searched(make: Make, n: int | None) -> None:
    apart = {name: name for name in MODELS}
    space = make_space(ends=Ends(apart, apart))
    found = told(make(space, settings(start=dense(space))), 10, n)
    assert len({str(recipe.embeddings) for recipe in found}) > 2
    assert len({str(recipe.head) for recipe in found}) > 2


@each
def test_the_same_seed_gives_the_same_search(make: Make, n: int | None) -> None:
    def run(seed: int) -> list[str]:
        space = make_space()
        searcher = make(space, settings(seed=(seed,), start=dense(space)))
        return [recipe.hash for recipe in told(searcher, 6, n)]

    assert run(0) == run(0) != run(1)


@each
def test_what_was_told_is_not_asked_for(make: Make, n: int | None) -> None:
    space = make_space()
    known = told(make(space, settings(seed=(0,))), 4, n)
    searcher = make(space, settings(seed=(5,)))
    first = asked(searcher, n)  # a batch may start before any results are told
    searcher.tell([scored(recipe) for recipe in first])
    searcher.tell([Scored(known[0], None), *map(scored, known[1:])])
    searcher.tell([scored(known[0])])
    later = {recipe.hash for recipe in told(searcher, 6, n)}
    assert not later & {recipe.hash for recipe in known}


@each
def test_it_continues_without_scores(make: Make, n: int | None) -> None:
    searcher = make(make_space(), settings())
    first = asked(searcher, n)
    searcher.tell([scored(recipe) for recipe in first])
    for _ in range(3):
        new = asked(searcher, n)
        assert new
        searcher.tell([Scored(recipe, None) for recipe in new])


@each
def test_an_exhausted_space_ends(make: Make, n: int | None) -> None:
    space = make_space(num_layers=8, low=7, methods=(), models={"base": "/m/base"})
    searcher = make(space, settings(8))
    found: set[str] = set()
    for _ in range(50):
        new = asked(searcher, n)
        if not new:
            break
        found |= {recipe.hash for recipe in new}
        searcher.tell([scored(recipe) for recipe in new])
    assert asked(searcher, n) == []
    assert len(found) == 9  # all eight layers, or one of them dropped


@pytest.mark.parametrize("schedule", ["generational", "asynchronous"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_whole_search_uses_its_budget(algorithm: str, schedule: str, tmp_path: Path) -> None:
    config = make_config(algorithm=algorithm, schedule=schedule, evaluations=70)

    def score(recipe: Recipe) -> float | None:
        return synthetic(recipe).accuracy

    def search(evaluations: int) -> list[str]:
        budget = config.search.model_copy(update={"evaluations": evaluations})
        asked = config.model_copy(update={"search": budget})
        executor = Simulated(3, NUM_LAYERS, lambda j: score(j.recipe), lambda j: 1.0)
        with Archive(tmp_path) as archive:
            progress = Progress(evaluations, NUM_LAYERS, stream=io.StringIO())
            Run(asked, family_of(NUM_LAYERS), archive, executor, progress).search()
            return [e.recipe.hash for e in archive.evaluations("search")]

    first = search(40)
    assert len(set(first)) == len(first) == 40
    whole = search(70)  # continues where it stopped
    assert whole[:40] == first
    assert len(set(whole)) == len(whole) == 70
