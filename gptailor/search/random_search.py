"""Random search: recipes drawn from the whole space, whatever the scores are.

The baseline that any other algorithm must beat. It needs no scores, so it works for batches and for
single recipes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gptailor.search.searcher import Proposal, Scored, Settings
from gptailor.search.space import KEEP, METHOD, SOURCE, Genome, SearchSpace

MAX_DRAWS = 50
"""A small space counts as exhausted when this many draws per recipe give nothing new."""


class RandomSearch:
    """Draws recipes.

    Args:
        space: the genomes.
        settings: `start` is ignored.
    """

    def __init__(self, space: SearchSpace, settings: Settings) -> None:
        self.space = space
        self._batch = settings.population
        self._rng = np.random.default_rng(settings.seed)
        self._known: set[str] = set()

    def ask(self, n: int | None = None) -> list[Proposal]:
        """At most `n` recipes; by default as many as a population has."""
        n = self._batch if n is None else n
        asked: list[Proposal] = []
        for _ in range(MAX_DRAWS * n):
            if len(asked) >= n:
                break
            recipe = self.space.decode(self._draw())
            if recipe.hash not in self._known:
                self._known.add(recipe.hash)
                asked.append(Proposal(recipe))
        return asked

    def tell(self, scored: Sequence[Scored]) -> None:
        """Remembers the recipes, so that it does not ask for them."""
        self._known.update(one.recipe.hash for one in scored)

    def _draw(self) -> Genome:
        """Draws a genome: all numbers of layers and all sources are equally likely; half of the
        layers are merged if the space has methods."""
        space, rng = self.space, self._rng
        genome = space.blank()
        least = max(space.min_layers, len(space.protected))
        keep = int(rng.integers(least, space.max_layers + 1))
        free = np.setdiff1d(np.arange(space.num_layers), space.protected)
        gone = rng.choice(free, space.num_layers - keep, replace=False)
        genome[space.layer_rows][gone, KEEP] = 0
        genome[:, SOURCE] = rng.integers(0, len(space.names), len(genome))
        if space.methods:
            for row in genome:
                if rng.random() < 0.5:
                    row[METHOD:] = space.random_merge(rng)
        return genome
