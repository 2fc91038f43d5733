"""First populations, and genomes for recipes from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gptailor.recipe import Recipe
from gptailor.search.operators import mutate
from gptailor.search.space import METHOD, Genome, SearchSpace


def first_population(
    space: SearchSpace, population: int, rng: np.random.Generator, start: Sequence[Recipe]
) -> npt.NDArray[np.int64]:
    """Flat genomes: those of `start` without duplicates, and new ones that vary them.

    At least half a population is new. A new genome starts as a copy of one from `start`; half of
    the attempts give all its layers the same random merge, so that the search begins with merges
    that no control arm has, the others mutate it. Half of all are then mutated (once more).
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
    """The flat genome of a recipe; None if this space has none for it."""
    genome = space.encode(recipe)
    return genome.ravel() if space.decode(genome).hash == recipe.hash else None
