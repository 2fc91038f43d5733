"""The search algorithms by the names that `search.algorithm` knows.

To add one: a class with `ask` and `tell` (see `searcher.Searcher`), its name in
`config.ALGORITHMS`, and a line here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gptailor.search.nsga2 import GenerationalNSGA2
from gptailor.search.random_search import RandomSearch
from gptailor.search.searcher import Searcher, Settings
from gptailor.search.space import SearchSpace
from gptailor.search.steady_state import SteadyStateNSGA2


@dataclass(frozen=True)
class Algorithm:
    """How an algorithm searches under each schedule.

    Attributes:
        generational: asked without a number, for a batch at a time.
        asynchronous: asked for as many recipes as there are free workers.
    """

    generational: Callable[[SearchSpace, Settings], Searcher]
    asynchronous: Callable[[SearchSpace, Settings], Searcher]


ALGORITHMS = {
    "nsga2": Algorithm(GenerationalNSGA2, SteadyStateNSGA2),
    "random": Algorithm(RandomSearch, RandomSearch),
}
