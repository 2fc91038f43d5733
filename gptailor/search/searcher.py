"""A search algorithm, as the rest of a search sees it: asked for recipes, told their scores.

A searcher knows the space and nothing of archives, workers or islands. The loops (`loops.py`) ask
it and tell it; `algorithms.py` makes the one that `search.algorithm` names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from gptailor.recipe import Recipe

TOP_RUNG = 0
"""The only rung that there is today: all documents of the search."""


@dataclass(frozen=True)
class Proposal:
    """A recipe to evaluate.

    Attributes:
        recipe: what to build.
        rung: on which of the nested document sets, from 0.
    """

    recipe: Recipe
    rung: int = TOP_RUNG


@dataclass(frozen=True)
class Scored:
    """What is known of a recipe.

    Attributes:
        recipe: what was built.
        objectives: values to be minimised, in the configuration's order; None if it has no scores:
            it failed, or it is not evaluated yet.
        rung: of the document set that they were measured on.
    """

    recipe: Recipe
    objectives: tuple[float, ...] | None
    rung: int = TOP_RUNG


@dataclass(frozen=True)
class Settings:
    """What every searcher is made with.

    Attributes:
        num_objectives: how many values each `Scored` has.
        population: recipes that a population, or a batch, has.
        seed: of every random choice; a searcher uses no other source of randomness.
        start: control arms, to begin from.
    """

    num_objectives: int
    population: int
    seed: tuple[int, ...]
    start: tuple[Recipe, ...] = ()


class Searcher(Protocol):
    """Chooses the recipes that are evaluated next.

    A searcher keeps nothing on disk. A search that goes on makes it anew: the generational loop
    with the same seed, and it replays, as what it asks for follows from seed and scores alone; the
    asynchronous loop with another seed, and tells it first what the archive holds.
    """

    def ask(self, n: int | None = None) -> list[Proposal]:
        """Recipes to evaluate, none of which was asked for or told before.

        Args:
            n: at most so many; there are workers for them now. None: a batch of the searcher's own
                size, which is told as a whole before it is asked again; recipes of `start` may be
                part of the first one.

        Returns:
            Fewer than n, or none, when the space holds no recipe that is new.
        """
        ...

    def tell(self, scored: Sequence[Scored]) -> None:
        """Takes results in any order: of what was asked for, of what the archive holds already, and
        of what other islands evaluated. A recipe may be told without scores first and with them
        later; once told it is not asked for.
        """
        ...
