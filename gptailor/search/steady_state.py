"""Steady-state NSGA-II: a child is made whenever a worker is free.

After Nebro and Durillo 2009, On the Effect of Applying a Steady-State Selection Scheme in the
Multi-Objective Genetic Algorithm NSGA-II. A child is made from what is known at that moment, so no
worker waits for the slowest of a generation. Selection is `survival.py`'s: pymoo's takes too long
to be called for each of a thousand workers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gptailor.recipe import Recipe
from gptailor.search.operators import CROSSOVER_RATE, cross_depth, mutate
from gptailor.search.population import first_population, genome_of
from gptailor.search.searcher import Proposal, Scored, Settings
from gptailor.search.space import Genome, SearchSpace
from gptailor.search.survival import Standing, standing


class SteadyStateNSGA2:
    """Asks for as many recipes as there are free workers, and is told scores in any order.

    Args:
        space: the genomes.
        settings: the first population is `start` and variations of it.

    What it asks for also depends on the order of the calls of `tell`.

    Attributes:
        num_population: recipes that survive.
    """

    def __init__(self, space: SearchSpace, settings: Settings) -> None:
        self.space = space
        self.num_population = settings.population
        self._rng = np.random.default_rng(settings.seed)
        self._first = list(first_population(space, settings.population, self._rng, settings.start))
        self._spare = list(self._first)
        self._known: set[str] = set()
        self._genomes: dict[str, npt.NDArray[np.int64]] = {}
        self._parents: list[npt.NDArray[np.int64]] = []
        self._objectives = np.zeros((0, settings.num_objectives))
        self._standing: Standing | None = None

    def ask(self, n: int | None = None) -> list[Proposal]:
        """At most `n` recipes; by default as many as the population has."""
        n = self.num_population if n is None else n
        asked: list[Recipe] = []
        while self._first and len(asked) < n:
            self._add(self._first.pop(0), asked)
        if len(self._parents) < 2:  # there are more workers than recipes in the first population
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
        return [Proposal(recipe) for recipe in asked]

    def tell(self, scored: Sequence[Scored]) -> None:
        """Takes results in any order.

        Recipes without objectives are only remembered, and so are recipes that no genome of this
        space encodes.
        """
        self._known.update(one.recipe.hash for one in scored)
        good = []
        for recipe, objectives in self._promising(scored):
            genome = self._genomes.get(recipe.hash)
            if genome is None:
                genome = genome_of(self.space, recipe)
            if genome is not None:
                good.append((genome, objectives))
        for one in scored:
            self._genomes.pop(one.recipe.hash, None)
        if not good:
            return
        self._parents += [genome for genome, _ in good]
        values = np.array([objectives for _, objectives in good], dtype=float)
        self._objectives = np.concatenate([self._objectives, values])
        found = standing(self._objectives)
        best = found.best(self.num_population, self._rng)
        self._parents = [self._parents[i] for i in best]
        self._objectives, self._standing = self._objectives[best], found.of(best)

    def _promising(self, scored: Sequence[Scored]) -> list[tuple[Recipe, tuple[float, ...]]]:
        """Those with objectives; of a whole archive, only those with a chance to survive."""
        found = [(one.recipe, one.objectives) for one in scored if one.objectives is not None]
        most = 2 * self.num_population
        if len(found) <= most:
            return found
        values = np.array([values for _, values in found], dtype=float)
        return [found[i] for i in standing(values).best(most, self._rng)]

    @property
    def survivors(self) -> list[Recipe]:
        """The recipes that the next children are made of, best first."""
        return [self._decode(x) for x in self._parents]

    def _children(self, n: int) -> list[npt.NDArray[np.int64]]:
        """Flat genomes of n children, two from each pair of parents."""
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
