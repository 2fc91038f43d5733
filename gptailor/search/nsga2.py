"""NSGA-II over recipes, by ask and tell: pymoo's algorithm, our genomes, no recipe twice.

Everything follows from the seed and the scores that are told, so a search that was killed is
continued by running it again: what the archive holds is told at once, and the rest is evaluated.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from gptailor.search.operators import DepthCrossover, SpaceRepair, StackMutation, mutate
from gptailor.search.space import METHOD, Genome, SearchSpace


class NSGA2Search:
    """Asks for recipes, generation after generation.

    Args:
        space: the genomes.
        num_objectives: how many values `tell` gets for each recipe, all to be minimised.
        population: survivors of a generation.
        seed: of every random choice.
        start: recipes that start the first population; random ones fill it up.
    """

    def __init__(
        self,
        space: SearchSpace,
        num_objectives: int,
        population: int,
        seed: int,
        start: Sequence[Recipe] = (),
    ) -> None:
        self.space = space
        self._told: set[str] = set()
        self._asked: Any = None
        rng = np.random.default_rng([seed, 0])
        first = first_population(space, population, rng, start)
        self._problem = Problem(n_var=first.shape[1], n_obj=num_objectives, vtype=int)
        self._algorithm = NSGA2(
            pop_size=population,
            sampling=first,
            crossover=DepthCrossover(space),
            mutation=StackMutation(space),
            repair=SpaceRepair(space),
            eliminate_duplicates=_NoRecipeTwice(self),
        )
        self._algorithm.setup(self._problem, termination=NoTermination(), seed=seed, verbose=False)

    def ask(self) -> list[Recipe]:
        """The recipes of the next generation, none of which was told before.

        Returns:
            An empty list when the space holds no recipe that is new.
        """
        self._asked = self._algorithm.ask()
        if self._asked is None:
            return []
        return [self._decode(x) for x in self._asked.get("X")]

    def tell(self, objectives: Sequence[Sequence[float] | None]) -> None:
        """Gives the objectives of what was asked last, in its order.

        Args:
            objectives: values to be minimised; None for a recipe that has none (it failed, or the
                budget ended before it): it takes no part in the selection.
        """
        told = [i for i, values in enumerate(objectives) if values is not None]
        self._told |= {self._decode(x).hash for x in self._asked.get("X")}
        if not told:
            if self._algorithm.is_initialized:
                self._algorithm.tell(infills=Population.create())
            return
        infills = self._asked[told]
        values = np.array([objectives[i] for i in told], dtype=float)
        Evaluator().eval(StaticProblem(self._problem, F=values), infills)
        self._algorithm.tell(infills=infills)

    @property
    def has_begun(self) -> bool:
        """True once a generation had scores; without any there is nothing to go on from."""
        return bool(self._algorithm.is_initialized)

    def knows(self, recipe: Recipe) -> bool:
        """True if the recipe was asked for in an earlier generation."""
        return recipe.hash in self._told

    def _decode(self, x: npt.NDArray[np.int64]) -> Recipe:
        return self.space.decode(x.reshape(self.space.shape))


def first_population(
    space: SearchSpace, population: int, rng: np.random.Generator, start: Sequence[Recipe]
) -> npt.NDArray[np.int64]:
    """Flat genomes: those of `start` without repeats, and new ones that vary them.

    At least half a population is new. A new genome keeps the layers of a genome of `start`; in half
    of them one random merge is made of all these layers, so that the search begins with merges that
    no control arm has, and then it is mutated.
    """
    genomes: list[Genome] = []
    seen: set[str] = set()

    def add(genome: Genome) -> None:
        digest = space.decode(genome).hash
        if digest not in seen:
            seen.add(digest)
            genomes.append(genome)

    for recipe in start:
        add(space.repaired(space.encode(recipe), rng))
    parents = list(genomes) or [space.repaired(space.blank(), rng)]
    wanted = max(population, len(genomes) + population // 2)
    for attempt in range(50 * population):
        if len(genomes) >= wanted:
            break
        genome = parents[int(rng.integers(len(parents)))].copy()
        if space.methods and attempt % 2 == 0:
            genome[:, METHOD:] = space.random_merge(rng)
        else:
            genome = mutate(genome, space, rng)
        add(mutate(genome, space, rng) if rng.random() < 0.5 else genome)
    return np.array([genome.ravel() for genome in genomes])


class _NoRecipeTwice(DuplicateElimination):  # type: ignore[misc]
    """Drops children that build what was evaluated before, or what a sibling builds."""

    def __init__(self, search: NSGA2Search) -> None:
        super().__init__()
        self._search = search

    def _do(self, pop: Any, other: Any, is_duplicate: Any) -> Any:
        search = self._search
        seen = set() if other is None else {search._decode(x).hash for x in other.get("X")}
        for i, x in enumerate(pop.get("X")):
            recipe = search._decode(x)
            is_duplicate[i] = recipe.hash in seen or search.knows(recipe)
            if other is None:
                seen.add(recipe.hash)
        return is_duplicate
