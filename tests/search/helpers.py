"""Spaces and synthetic scores for the tests of the search."""

from __future__ import annotations

from collections.abc import Sequence

from gptailor.config import Space
from gptailor.evaluation.outcome import Cost, Outcome, Score
from gptailor.models.ends import Ends
from gptailor.recipe import Merge, Recipe, Take
from gptailor.search.searcher import Scored, Searcher, Settings
from gptailor.search.space import SearchSpace

MODELS = {"base": "/m/base", "red": "/m/red", "green": "/m/green", "blue": "/m/blue"}
ALL = ("linear", "task_arithmetic", "slerp", "ties")


def make_space(
    num_layers: int = 8,
    low: int = 3,
    high: int | None = None,
    protect: tuple[int, ...] = (),
    methods: tuple[str, ...] = ALL,
    models: dict[str, str] | None = None,
    ends: Ends | None = None,
) -> SearchSpace:
    space = Space.model_validate(
        {
            "layers": {"min": low, "max": high, "protect": protect},
            "merge": {"methods": methods, "lambdas": (0.3, 0.5, 0.7, 1.0)},
        }
    )
    return SearchSpace(space, models or MODELS, "base", num_layers, ends=ends)


def synthetic(recipe: Recipe) -> Outcome:
    """A score with a structure that a search can find: even layers from red, odd ones merged."""
    value = 0.0
    for layer in recipe.layers:
        useful = 1.0 if layer.src_layer % 4 else 0.3
        if isinstance(layer, Merge):
            value += useful * (1.0 if layer.src_layer % 2 else 0.6)
        else:
            value += useful * (0.9 if layer.model == "red" and layer.src_layer % 2 == 0 else 0.5)
    accuracy = value / 8
    score = Score("synthetic", "acc,none", accuracy, None, 10)
    return Outcome("ok", accuracy, (score,), "", Cost())


def settings(
    population: int = 12, seed: tuple[int, ...] = (0,), start: Sequence[Recipe] = ()
) -> Settings:
    return Settings(2, population, seed, tuple(start))


def dense(space: SearchSpace) -> list[Recipe]:
    return [space.recipe([Take(m, i) for i in range(8)]) for m in space.names]


def scored(recipe: Recipe) -> Scored:
    accuracy = synthetic(recipe).accuracy or 0.0
    return Scored(recipe, (-accuracy, recipe.num_layers / 8))


def asked(searcher: Searcher, n: int | None = None) -> list[Recipe]:
    return [proposal.recipe for proposal in searcher.ask(n)]


def told(searcher: Searcher, rounds: int, n: int | None = None) -> list[Recipe]:
    """All recipes that a searcher asks for in these rounds; it is told the scores after each."""
    found: list[Recipe] = []
    for _ in range(rounds):
        new = asked(searcher, n)
        searcher.tell([scored(recipe) for recipe in new])
        found += new
    return found
