"""NSGA-II's selection of survivors and parents, fast enough for one recipe at a time.

After Deb et al. 2002, A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II. A search on a
thousand workers selects a dozen times a second among as many recipes, so nothing here loops over
recipes. N is the number of recipes, M that of objectives, all to be minimised.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting


@dataclass(frozen=True)
class Standing:
    """How recipes rank against each other.

    Attributes:
        rank: (N,) 0 for the front, 1 for the front of the others, and so on.
        crowding: (N,) distance to the neighbours on the same front; infinite at the ends, 0 for all
            but one of those with equal objectives.
    """

    rank: npt.NDArray[np.int64]
    crowding: npt.NDArray[np.float64]

    def best(self, count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """The indices of the best, best first; ties are broken at random."""
        chance = rng.random(len(self.rank))
        return np.lexsort((chance, -self.crowding, self.rank))[:count]

    def of(self, chosen: npt.NDArray[np.int64]) -> Standing:
        """The standing of a subset of the recipes, as it was among all."""
        return Standing(self.rank[chosen], self.crowding[chosen])

    def parents(self, count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """Indices of winners of binary tournaments, which all recipes enter equally often."""
        num = len(self.rank)
        rounds = [rng.permutation(num) for _ in range(-(-2 * count // num))]
        first, second = np.concatenate(rounds)[: 2 * count].reshape(count, 2).T
        is_worse = self.rank[second] > self.rank[first]
        is_equal = self.rank[second] == self.rank[first]
        is_worse |= is_equal & (self.crowding[second] < self.crowding[first])
        is_equal &= self.crowding[second] == self.crowding[first]
        is_worse |= is_equal & (rng.random(count) < 0.5)
        return np.where(is_worse, first, second)


def standing(objectives: npt.NDArray[np.float64]) -> Standing:
    """Ranks and crowding distances of recipes with these objectives, (N, M)."""
    num, num_objectives = objectives.shape
    _, rank = NonDominatedSorting().do(objectives, return_rank=True)
    crowding = np.zeros(num)
    for column in objectives.T:
        order = np.lexsort((column, rank))
        value, front = column[order], rank[order]
        is_first = np.append(True, front[1:] != front[:-1])
        is_last = np.append(is_first[1:], True)
        numbers = np.cumsum(is_first) - 1
        span = value[is_last] - value[is_first]
        gap = np.full(num, np.inf)
        inner = np.flatnonzero(~(is_first | is_last))
        gap[inner] = value[inner + 1] - value[inner - 1]
        span = span[numbers]
        gap[inner] = np.divide(
            gap[inner], span[inner], out=np.zeros(len(inner)), where=span[inner] > 0
        )
        crowding[order] += gap / num_objectives
    order = np.lexsort((*objectives.T, rank))
    is_twin = (np.diff(objectives[order], axis=0) == 0).all(axis=1)  # equals have one rank
    crowding[order[1:][is_twin]] = 0.0
    return Standing(rank, crowding)
