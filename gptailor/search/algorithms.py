"""The search algorithms, by their names in `search.algorithm`.

To add one: write a class with `ask` and `tell` (see `searcher.Searcher`), add its name to
`config.SearchConfig.algorithm`, and add a line here.
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
    """The searcher classes of an algorithm, one per schedule.

    Attributes:
        generational: is asked for a batch at a time, without a number.
        asynchronous: is asked for as many recipes as there are free workers.
    """

    generational: Callable[[SearchSpace, Settings], Searcher]
    asynchronous: Callable[[SearchSpace, Settings], Searcher]


ALGORITHMS = {
    "nsga2": Algorithm(GenerationalNSGA2, SteadyStateNSGA2),
    "random": Algorithm(RandomSearch, RandomSearch),
}
