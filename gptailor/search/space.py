"""The search space: genomes of integers, and the recipes that they stand for.

A genome has a row for each source layer (L) and a column for each gene (G = 3 + K with K models):

    keep | source | method | level of model 0 | … | level of model K−1

`keep` is 0 or 1. `source` is the model whose layer is taken when nothing is merged. `method` 0
takes, m > 0 merges with the m-th method of the space. A level is 0 for a model that is not part of
the merge, or 1 + the index of its weight; slerp makes its t of the two weights, and to a method
that has no weights a level only says that the model is part of it. Genes that have no effect (the
source of a dropped layer) are kept, so that a layer comes back as it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from gptailor.canonical import canonical_layer
from gptailor.config import Config, Space
from gptailor.errors import UsageError
from gptailor.merging.registry import Method, get_method
from gptailor.models.calibration import Calibration
from gptailor.models.family import Family
from gptailor.recipe import Layer, Merge, Recipe, Take

Genome = npt.NDArray[np.int64]
"""Shape (L, G)."""

KEEP, SOURCE, METHOD, LEVELS = 0, 1, 2, 3

MAX_PARTS = 50_000
"""Of so many layers that genomes stood for the canonical form is kept; some 100 MB."""


def find_calibration(config: Config, family: Family) -> Calibration | None:
    """The statistics that a search needs, of every model; None if its methods need none.

    Raises:
        UsageError: a model's statistics are missing.
        ModelError: they are corrupt, or belong to other weights.
    """
    methods = config.space.merge.calibrated
    if config.calibration is None or not methods:
        return None
    for candidate in family.candidates.values():
        for method in methods:
            candidate.statistics(config.calibration, method)
    needed = [(method, name) for method in methods for name in config.models]
    return Calibration(config.calibration).found(needed)


class SearchSpace:
    """What recipes of one family may look like.

    Args:
        space: bounds and methods, from the configuration.
        models: name → reference, in the configuration's order.
        base: the base's name.
        num_layers: source layers of the family.
        calibration: what recipes with methods that need statistics are made with.

    Raises:
        UsageError: the bounds do not fit the number of layers.
    """

    def __init__(
        self,
        space: Space,
        models: Mapping[str, str],
        base: str,
        num_layers: int,
        calibration: Calibration | None = None,
    ) -> None:
        self.models = dict(models)
        self.calibration = calibration
        self.names = list(models)
        self.base = base
        self.num_layers = num_layers
        self.dtype = space.dtype
        self.min_layers = space.layers.min
        self.max_layers = space.layers.max or num_layers
        self.protected = sorted(set(space.layers.protect))
        if any(layer >= num_layers for layer in self.protected):
            raise UsageError(
                f"space.layers.protect names layer {self.protected[-1]}, but the models have "
                f"layers 0 to {num_layers - 1}."
            )
        if not self.min_layers <= self.max_layers <= num_layers:
            raise UsageError(
                f"space.layers: min {self.min_layers} and max {self.max_layers} must lie in this "
                f"order within the models' {num_layers} layers."
            )
        if len(self.protected) > self.max_layers:
            raise UsageError("space.layers.protect names more layers than max allows.")
        can_merge = len(self.names) > 1
        self.methods: list[Method] = [get_method(m) for m in space.merge.methods if can_merge]
        self.weights = list(space.merge.lambdas)
        self._parts: dict[tuple[int, bytes, int], tuple[Layer, Layer]] = {}

    @property
    def shape(self) -> tuple[int, int]:
        """(L, G): rows and columns of a genome."""
        return self.num_layers, LEVELS + len(self.names)

    def log10_size(self) -> float:
        """Logarithm of how many recipes there are, at most: some merges with other weights build
        the same."""
        free, num_protected = self.num_layers - len(self.protected), len(self.protected)
        entries = len(self.names) + sum(map(self._num_merges, self.methods))
        smallest = max(self.min_layers, num_protected)
        return math.log10(
            sum(
                math.comb(free, kept - num_protected) * entries**kept
                for kept in range(smallest, self.max_layers + 1)
            )
        )

    def _num_merges(self, method: Method) -> int:
        """How many merges of one layer a method makes."""
        sources = len(self.names) - method.uses_base
        if method.name == "slerp":
            parts = {round(b / (a + b), 6) for a in self.weights for b in self.weights}
            return math.comb(sources, 2) * len(parts)
        weights = len(self.weights) if method.weighted else 1
        sizes = range(method.min_sources, min(method.max_sources, sources) + 1)
        return sum(math.comb(sources, size) * weights**size for size in sizes)

    def kept(self, genome: Genome) -> npt.NDArray[np.int64]:
        """The source layers that a genome keeps, ascending."""
        return np.flatnonzero(genome[:, KEEP])

    def decode(self, genome: Genome) -> Recipe:
        """The recipe that a genome stands for."""
        parts = [self._part(i, genome[i]) for i in self.kept(genome).tolist()]
        recipe = self.recipe([layer for layer, _ in parts])
        recipe.remember_canonical([canonical for _, canonical in parts])
        return recipe

    def recipe(self, layers: Sequence[Layer]) -> Recipe:
        """A recipe of this family with these layers; embeddings and head are the base's."""
        return Recipe(
            models=self.models,
            base=self.base,
            layers=tuple(layers),
            embeddings=self.base,
            head=self.base,
            dtype=self.dtype,
            calibration=self.calibration,
        )

    def encode(self, recipe: Recipe) -> Genome:
        """The nearest genome: exact for whatever `decode` can give, weights go to the grid."""
        genome = self.blank()
        genome[:, KEEP] = 0
        for layer in recipe.layers:
            row = genome[layer.src_layer]
            row[KEEP] = 1
            if isinstance(layer, Take):
                row[SOURCE] = self.names.index(layer.model)
            else:
                self._encode_merge(layer, row)
        return genome

    def blank(self) -> Genome:
        """Every layer kept and taken from the base; merges would be even."""
        genome = np.zeros(self.shape, dtype=np.int64)
        genome[:, KEEP] = 1
        genome[:, SOURCE] = self.names.index(self.base)
        return genome

    def repaired(self, genome: Genome, rng: np.random.Generator) -> Genome:
        """The genome with protected layers kept and its size within the bounds.

        Layers are dropped or restored at random positions, so that no depth is favoured.
        """
        genome = genome.copy()
        genome[self.protected, KEEP] = 1
        kept = self.kept(genome)
        if len(kept) > self.max_layers:
            free = np.setdiff1d(kept, self.protected)
            genome[rng.choice(free, len(kept) - self.max_layers, replace=False), KEEP] = 0
        elif len(kept) < self.min_layers:
            gone = np.flatnonzero(genome[:, KEEP] == 0)
            genome[rng.choice(gone, self.min_layers - len(kept), replace=False), KEEP] = 1
        return genome

    def random_merge(self, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """Genes from METHOD on: a random method with at least two sources at random weights."""
        num_models = len(self.names)
        levels = rng.integers(1, len(self.weights) + 1, num_models)
        num_out = int(rng.integers(0, max(num_models - 1, 1)))
        levels[rng.permutation(num_models)[:num_out]] = 0
        method = rng.integers(1, len(self.methods) + 1)
        return np.concatenate([[method], levels])

    def has_weights(self, row: npt.NDArray[np.int64]) -> bool:
        """True if the levels of a merged layer are more than in or out."""
        method = self.methods[int(row[METHOD]) - 1]
        return method.weighted or method.name == "slerp"

    def _part(self, src_layer: int, row: npt.NDArray[np.int64]) -> tuple[Layer, Layer]:
        """A layer, and its canonical form; recipes of a search have most of them in common."""
        genes = row[METHOD:] if row[METHOD] else row[SOURCE:METHOD]
        key = src_layer, genes.tobytes(), int(row[SOURCE])
        found = self._parts.get(key)
        if found is None:
            layer = self._layer(src_layer, row)
            if len(self._parts) >= MAX_PARTS:
                self._parts.clear()
            found = self._parts[key] = layer, canonical_layer(layer, self.base, self.models)
        return found

    def _layer(self, src_layer: int, row: npt.NDArray[np.int64]) -> Layer:
        take = Take(self.names[row[SOURCE]], src_layer)
        if row[METHOD] == 0:
            return take
        method = self.methods[row[METHOD] - 1]
        levels = [
            (name, int(level))
            for name, level in zip(self.names, row[LEVELS:], strict=True)
            if level > 0 and not (method.uses_base and name == self.base)
        ]
        values = {p.name: p.search[0] for p in method.parameters}
        if len(levels) > method.max_sources:
            levels = sorted(levels, key=lambda item: -item[1])[: method.max_sources]
            levels.sort(key=lambda item: self.names.index(item[0]))
        if len(levels) < method.min_sources:
            return take
        weights = tuple((name, self.weights[level - 1]) for name, level in levels)
        if method.name == "slerp":
            (_, first), (_, second) = weights
            values["t"] = round(second / (first + second), 6)
        if not method.weighted:
            weights = tuple((name, 1.0) for name, _ in weights)
        return Merge(method.name, src_layer, weights, tuple(values.items()))

    def _encode_merge(self, layer: Merge, row: npt.NDArray[np.int64]) -> None:
        methods = [method.name for method in self.methods]
        strongest = max(layer.weights, key=lambda item: item[1])[0]
        row[SOURCE] = self.names.index(strongest)
        if layer.method not in methods:
            return
        row[METHOD] = 1 + methods.index(layer.method)
        if layer.method != "slerp":
            for model, weight in layer.weights:
                row[LEVELS + self.names.index(model)] = 1 + self._nearest(weight)
            return
        pairs = [(a, b) for a in range(len(self.weights)) for b in range(len(self.weights))]
        t = layer.number("t")
        first, second = min(
            pairs, key=lambda p: abs(self.weights[p[1]] / sum(self.weights[i] for i in p) - t)
        )
        for model, level in zip(layer.models, (first, second), strict=True):
            row[LEVELS + self.names.index(model)] = 1 + level

    def _nearest(self, weight: float) -> int:
        return int(np.argmin([abs(w - weight) for w in self.weights]))
