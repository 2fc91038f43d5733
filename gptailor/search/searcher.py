"""The interface of search algorithms: they are asked for recipes and told their scores.

A searcher knows the space, but no archives, workers or islands. The loops (`loops.py`) ask it and
tell it; `algorithms.py` lists the classes by the names in `search.algorithm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from gptailor.recipe import Recipe

TOP_RUNG = 0
"""The only rung so far: all documents of the search."""


@dataclass(frozen=True)
class Proposal:
    """A recipe to evaluate.

    Attributes:
        recipe: what to build.
        rung: the nested document set to evaluate it on, from 0.
    """

    recipe: Recipe
    rung: int = TOP_RUNG


@dataclass(frozen=True)
class Scored:
    """A recipe with its objectives.

    Attributes:
        recipe: what was built.
        objectives: values to be minimised, in the configuration's order; None if it has no scores:
            it failed, or it has not been evaluated yet.
        rung: the document set that they were measured on.
    """

    recipe: Recipe
    objectives: tuple[float, ...] | None
    rung: int = TOP_RUNG


@dataclass(frozen=True)
class Settings:
    """The settings of every searcher.

    Attributes:
        num_objectives: how many values each `Scored` has.
        population: number of recipes in a population or a batch.
        seed: of every random choice; a searcher uses no other source of randomness.
        start: control arms to begin from.
    """

    num_objectives: int
    population: int
    seed: tuple[int, ...]
    start: tuple[Recipe, ...] = ()


class Searcher(Protocol):
    """Chooses the recipes that are evaluated next.

    A searcher keeps nothing on disk. A resumed search makes a new one: the generational loop uses
    the same seed and replays the search, since what a searcher asks for depends on seed and scores
    alone; the asynchronous loop uses another seed and first tells it what the archive holds.
    """

    def ask(self, n: int | None = None) -> list[Proposal]:
        """Recipes to evaluate, none of which was asked for or told before.

        Args:
            n: at most this many; there are workers for them now. None: a batch of the searcher's
                own size, whose results are told as a whole before the next `ask`; recipes of
                `start` may be part of the first batch.

        Returns:
            Fewer than n recipes, or none, if the space has no new ones.
        """
        ...

    def tell(self, scored: Sequence[Scored]) -> None:
        """Takes results in any order.

        They are of recipes that were asked for, that were already in the archive, or that other
        islands evaluated. A recipe may be told without scores first and with them later; once told
        it is not asked for.
        """
        ...
