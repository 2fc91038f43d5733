"""Generational NSGA-II over recipes: pymoo's algorithm with our genomes.

Deb et al. 2002, A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II. Everything depends
only on the seed and the scores that it is told: any number of workers finds the same front, and a
killed search continues when it is run again (scores in the archive are told at once, the rest is
evaluated).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.duplicate import DuplicateElimination
from pymoo.core.evaluator import Evaluator
from pymoo.core.population import Population
from pymoo.core.problem import Problem
from pymoo.core.termination import NoTermination
from pymoo.problems.static import StaticProblem

from gptailor.recipe import Recipe
from gptailor.search.operators import DepthCrossover, SpaceRepair, StackMutation
from gptailor.search.population import first_population, genome_of
from gptailor.search.searcher import Proposal, Scored, Settings
from gptailor.search.space import SearchSpace


class GenerationalNSGA2:
    """Asks for a generation at a time.

    Args:
        space: the genomes.
        settings: `start` seeds the first population; random recipes fill it up.
    """

    def __init__(self, space: SearchSpace, settings: Settings) -> None:
        self.space = space
        self._told: set[str] = set()
        self._asked: Any = None
        self._guests: list[Scored] = []
        (seed,) = settings.seed
        rng = np.random.default_rng([seed, 0])
        first = first_population(space, settings.population, rng, settings.start)
        self._problem = Problem(n_var=first.shape[1], n_obj=settings.num_objectives, vtype=int)
        self._algorithm = NSGA2(
            pop_size=settings.population,
            sampling=first,
            crossover=DepthCrossover(space),
            mutation=StackMutation(space),
            repair=SpaceRepair(space),
            eliminate_duplicates=_NoRecipeTwice(space, self._told),
        )
        self._algorithm.setup(self._problem, termination=NoTermination(), seed=seed, verbose=False)

    def ask(self, n: int | None = None) -> list[Proposal]:
        """The next generation; it has the population's size, whatever `n` is."""
        del n
        self._admit_guests()
        self._asked = self._algorithm.ask()
        if self._asked is None:
            return []
        recipes = [self._decode(x) for x in self._asked.get("X")]
        self._asked.set("hash", [recipe.hash for recipe in recipes])
        return [Proposal(recipe) for recipe in recipes]

    def tell(self, scored: Sequence[Scored]) -> None:
        """Takes the results of the last generation, all at once, or recipes from elsewhere.

        A recipe without objectives (it failed, or the budget ran out) is left out of the selection.
        Recipes from elsewhere enter the population before the next generation is made, but not
        before the first generation has scores.
        """
        asked = [] if self._asked is None else list(self._asked.get("hash"))
        values = {one.recipe.hash: one.objectives for one in scored}
        self._guests += [one for one in scored if one.recipe.hash not in asked]
        if not any(digest in values for digest in asked):
            return
        self._told |= set(asked)
        told = [i for i, digest in enumerate(asked) if values.get(digest) is not None]
        infills, self._asked = self._asked[told], None
        if told:
            found = np.array([values[asked[i]] for i in told], dtype=float)
            Evaluator().eval(StaticProblem(self._problem, F=found), infills)
            self._algorithm.tell(infills=infills)
        elif self._algorithm.is_initialized:
            self._algorithm.tell(infills=Population.create())

    def _admit_guests(self) -> None:
        """Lets recipes from elsewhere compete with the population."""
        if not self._algorithm.is_initialized:
            return
        guests, self._guests = self._guests, []
        self._told |= {guest.recipe.hash for guest in guests}
        found = [
            (genome_of(self.space, g.recipe), g.objectives)
            for g in guests
            if g.objectives is not None
        ]
        good = [(genome, values) for genome, values in found if genome is not None]
        if good:
            algorithm = self._algorithm
            algorithm.pop = algorithm.survival.do(
                self._problem,
                Population.merge(algorithm.pop, _population_of(good)),
                n_survive=algorithm.pop_size,
                algorithm=algorithm,
                random_state=algorithm.random_state,
            )

    def _decode(self, x: npt.NDArray[np.int64]) -> Recipe:
        return self.space.decode(x.reshape(self.space.shape))


def _population_of(
    good: Sequence[tuple[npt.NDArray[np.int64], Sequence[float]]],
) -> Population:
    genomes, values = zip(*good, strict=True)
    return Population.new("X", np.array(genomes), "F", np.array(values, dtype=float))


class _NoRecipeTwice(DuplicateElimination):  # type: ignore[misc]
    """Drops children that build the same model as an evaluated recipe or a sibling."""

    def __init__(self, space: SearchSpace, told: Collection[str]) -> None:
        super().__init__()
        self._space = space
        self._told = told

    def _do(self, pop: Any, other: Any, is_duplicate: Any) -> Any:
        seen = set() if other is None else {self._hash(one) for one in other}
        for i, one in enumerate(pop):
            digest = self._hash(one)
            is_duplicate[i] = digest in seen or digest in self._told
            if other is None:
                seen.add(digest)
        return is_duplicate

    def _hash(self, one: Any) -> str:
        """The hash of an individual's recipe; cached, as parents are compared repeatedly."""
        if "hash" not in one.data:
            one.data["hash"] = self._space.decode(one.X.reshape(self._space.shape)).hash
        digest: str = one.data["hash"]
        return digest
