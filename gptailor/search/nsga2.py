"""NSGA-II over recipes, by ask and tell: pymoo's algorithm, our genomes, no recipe twice.

`NSGA2Search` goes from generation to generation, and everything follows from the seed and the
scores that are told: any number of workers finds the same front, and a search that was killed is
continued by running it again (what the archive holds is told at once, the rest is evaluated).

`AsyncNSGA2` has no generations (steady state: Nebro and Durillo 2009, On the Effect of Applying a
Steady-State Selection Scheme in the Multi-Objective Genetic Algorithm NSGA-II): a child is made of
what is known at the moment when a worker is free for it, so none ever waits for the slowest of a
generation.
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
from gptailor.search.operators import (
    CROSSOVER_RATE,
    DepthCrossover,
    SpaceRepair,
    StackMutation,
    cross_depth,
    mutate,
)
from gptailor.search.space import METHOD, Genome, SearchSpace
from gptailor.search.survival import Standing, standing


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
        self._guests: list[tuple[Recipe, Sequence[float] | None]] = []
        rng = np.random.default_rng([seed, 0])
        first = first_population(space, population, rng, start)
        self._problem = Problem(n_var=first.shape[1], n_obj=num_objectives, vtype=int)
        self._algorithm = NSGA2(
            pop_size=population,
            sampling=first,
            crossover=DepthCrossover(space),
            mutation=StackMutation(space),
            repair=SpaceRepair(space),
            eliminate_duplicates=_NoRecipeTwice(space, self._told),
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
        recipes = [self._decode(x) for x in self._asked.get("X")]
        self._asked.set("hash", [recipe.hash for recipe in recipes])
        return recipes

    def tell(self, objectives: Sequence[Sequence[float] | None]) -> None:
        """Gives the objectives of what was asked last, in its order.

        Args:
            objectives: values to be minimised; None for a recipe that has none (it failed, or the
                budget ended before it): it takes no part in the selection.
        """
        told = [i for i, values in enumerate(objectives) if values is not None]
        self._told |= set(self._asked.get("hash"))
        if not told:
            if self._algorithm.is_initialized:
                self._algorithm.tell(infills=Population.create())
            return
        infills = self._asked[told]
        values = np.array([objectives[i] for i in told], dtype=float)
        Evaluator().eval(StaticProblem(self._problem, F=values), infills)
        self._algorithm.tell(infills=infills)

    def welcome(self, scored: Sequence[tuple[Recipe, Sequence[float] | None]]) -> None:
        """Takes recipes from elsewhere, between `tell` and `ask`, as `AsyncNSGA2.tell` does.

        Those that come before the first generation has scores enter after it.
        """
        self._guests += scored
        if not self.has_begun:
            return
        guests, self._guests = self._guests, []
        self._told |= {recipe.hash for recipe, _ in guests}
        found = [(genome_of(self.space, r), values) for r, values in guests if values is not None]
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

    @property
    def has_begun(self) -> bool:
        """True once a generation had scores; without any there is nothing to go on from."""
        return bool(self._algorithm.is_initialized)

    def knows(self, recipe: Recipe) -> bool:
        """True if the recipe was asked for in an earlier generation."""
        return recipe.hash in self._told

    def _decode(self, x: npt.NDArray[np.int64]) -> Recipe:
        return self.space.decode(x.reshape(self.space.shape))


class AsyncNSGA2:
    """Asks for as many recipes as there are free workers, and is told scores in any order.

    Args:
        space: the genomes.
        num_objectives: how many values `tell` gets for each recipe, all to be minimised.
        population: recipes that survive.
        seed: of every random choice; what is asked depends on the order of tellings, too.
        start: recipes that vary into the first population.
    """

    def __init__(
        self,
        space: SearchSpace,
        num_objectives: int,
        population: int,
        seed: Sequence[int],
        start: Sequence[Recipe] = (),
    ) -> None:
        self.space = space
        self.num_population = population
        self._rng = np.random.default_rng(seed)
        self._first = list(first_population(space, population, self._rng, start))
        self._spare = list(self._first)
        self._known: set[str] = set()
        self._genomes: dict[str, npt.NDArray[np.int64]] = {}
        self._parents: list[npt.NDArray[np.int64]] = []
        self._objectives = np.zeros((0, num_objectives))
        self._standing: Standing | None = None

    def ask(self, n: int) -> list[Recipe]:
        """At most `n` recipes, none of which was asked for or told before.

        Returns:
            Fewer when the space holds no recipe that is new.
        """
        asked: list[Recipe] = []
        while self._first and len(asked) < n:
            self._add(self._first.pop(0), asked)
        if len(self._parents) < 2:  # more workers than a first population has recipes
            for _ in range(20 * (n - len(asked))):
                if len(asked) >= n:
                    break
                parent = self._spare[int(self._rng.integers(len(self._spare)))]
                child = mutate(parent.reshape(self.space.shape), self.space, self._rng)
                self._add(child.ravel(), asked)
        else:
            for _ in range(20):
                if len(asked) >= n:
                    break
                for child in self._children(n - len(asked)):
                    self._add(child, asked)
        return asked

    def tell(self, scored: Sequence[tuple[Recipe, Sequence[float] | None]]) -> None:
        """Gives objectives, to be minimised, of recipes that were asked for or come from elsewhere.

        Recipes without objectives are only remembered, and so are recipes that no genome of this
        space stands for.
        """
        self._known.update(recipe.hash for recipe, _ in scored)
        good = []
        for recipe, objectives in self._promising(scored):
            genome = self._genomes.get(recipe.hash)
            if genome is None:
                genome = genome_of(self.space, recipe)
            if genome is not None:
                good.append((genome, objectives))
        for recipe, _ in scored:
            self._genomes.pop(recipe.hash, None)
        if not good:
            return
        self._parents += [genome for genome, _ in good]
        values = np.array([objectives for _, objectives in good], dtype=float)
        self._objectives = np.concatenate([self._objectives, values])
        found = standing(self._objectives)
        best = found.best(self.num_population, self._rng)
        self._parents = [self._parents[i] for i in best]
        self._objectives, self._standing = self._objectives[best], found.of(best)

    def _promising(
        self, scored: Sequence[tuple[Recipe, Sequence[float] | None]]
    ) -> list[tuple[Recipe, Sequence[float]]]:
        """Those with objectives; where an archive is told, those that have a chance to survive."""
        found = [(recipe, values) for recipe, values in scored if values is not None]
        most = 2 * self.num_population
        if len(found) <= most:
            return found
        values = np.array([values for _, values in found], dtype=float)
        return [found[i] for i in standing(values).best(most, self._rng)]

    def knows(self, recipe: Recipe) -> bool:
        """True if the recipe was asked for or told."""
        return recipe.hash in self._known

    @property
    def survivors(self) -> list[Recipe]:
        """The recipes that the next children are made of, best first."""
        return [self._decode(x) for x in self._parents]

    def _children(self, n: int) -> list[npt.NDArray[np.int64]]:
        """Flat genomes of n children, two and two of the same pair of parents."""
        assert self._standing is not None
        shape, rng = self.space.shape, self._rng
        pairs = self._standing.parents(n + n % 2, rng).reshape(-1, 2)
        children: list[Genome] = []
        for pair in pairs:
            first, second = (self._parents[i].reshape(shape) for i in pair)
            is_crossed = rng.random() < CROSSOVER_RATE
            children += cross_depth(first, second, rng) if is_crossed else (first, second)
        return [mutate(child, self.space, rng).ravel() for child in children[:n]]

    def _add(self, genome: npt.NDArray[np.int64], asked: list[Recipe]) -> None:
        recipe = self._decode(genome)
        if recipe.hash not in self._known:
            self._known.add(recipe.hash)
            self._genomes[recipe.hash] = genome
            asked.append(recipe)

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


def genome_of(space: SearchSpace, recipe: Recipe) -> npt.NDArray[np.int64] | None:
    """The flat genome that stands for a recipe; None if none of this space does."""
    genome = space.encode(recipe)
    return genome.ravel() if space.decode(genome).hash == recipe.hash else None


def _population_of(
    good: Sequence[tuple[npt.NDArray[np.int64], Sequence[float]]],
) -> Population:
    genomes, values = zip(*good, strict=True)
    return Population.new("X", np.array(genomes), "F", np.array(values, dtype=float))


class _NoRecipeTwice(DuplicateElimination):  # type: ignore[misc]
    """Drops children that build what was evaluated before, or what a sibling builds."""

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
        """What an individual builds; it keeps that, as each generation is held against parents."""
        if "hash" not in one.data:
            one.data["hash"] = self._space.decode(one.X.reshape(self._space.shape)).hash
        digest: str = one.data["hash"]
        return digest
