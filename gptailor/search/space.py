"""The search space: integer genomes, and the recipes that they encode.

A genome has a row for each source layer (L) and a column for each gene (G = 3 + K with K models):

    keep | source | method | level of model 0 | … | level of model K−1

If the models differ in their embeddings, a row for these comes first; if they differ in final norm
or head, one row for both comes last. So rows are in the order of depth. Otherwise recipes take the
base's. R is the number of rows.

`keep` is 0 or 1, and always 1 for embeddings and head. `source` is the model whose layer is taken
if nothing is merged. `method` 0 takes, m > 0 merges with the m-th method of the space. A level is 0
for a model that is not part of the merge, or 1 + the index of its weight; slerp's t is computed
from the two weights, and for methods without weights a level only says that the model is part of
the merge. Genes without effect (the source of a dropped layer) are kept, so that a restored layer
is what it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gptailor.config import Space
from gptailor.errors import UsageError
from gptailor.merging.registry import Method, get_method
from gptailor.models.calibration import Calibration
from gptailor.models.ends import Ends
from gptailor.recipe import NO_LAYER, End, Layer, Merge, Recipe, Repair, Take
from gptailor.recipe.canonical import canonical_end, canonical_layer
from gptailor.recipe.repair import repaired_layers

Genome = npt.NDArray[np.int64]
"""Shape (R, G)."""

KEEP, SOURCE, METHOD, LEVELS = 0, 1, 2, 3

MAX_PARTS = 50_000
"""How many decoded entries are cached with their canonical form; some 100 MB."""


class SearchSpace:
    """The recipes that a search over one family may propose.

    Args:
        space: bounds and methods, from the configuration.
        models: name → reference, in the configuration's order.
        base: the base's name.
        num_layers: source layers of the family.
        calibration: statistics for the methods that need them.
        ends: which models have the same embeddings and head; default: all have the base's.

    Attributes:
        repair: of the recipes that have a layer to repair; None for none.
        protected: source layers that are always kept, ascending.
        layer_rows: the rows of a genome that encode source layers.

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
        ends: Ends | None = None,
    ) -> None:
        self.repair: Repair | None = None
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
                f"space.layers: min {self.min_layers} must not exceed max {self.max_layers}, nor "
                f"max the models' {num_layers} layers."
            )
        if len(self.protected) > self.max_layers:
            raise UsageError("space.layers.protect names more layers than max allows.")
        can_merge = len(self.names) > 1
        self.methods: list[Method] = [get_method(m) for m in space.merge.methods if can_merge]
        self.weights = list(space.merge.lambdas)
        self.ends = ends or Ends.equal(self.names, base)
        self._itself = {name: name for name in self.names}
        first = int(is_gene(self.ends.embeddings))
        self.layer_rows = slice(first, first + num_layers)
        self._end_rows = {}
        if first:
            self._end_rows["embeddings"] = 0
        if is_gene(self.ends.head):
            self._end_rows["head"] = first + num_layers
        self._parts: dict[tuple[str | int, bytes, int], tuple[End, End]] = {}

    @property
    def shape(self) -> tuple[int, int]:
        """(R, G): rows and columns of a genome."""
        return self.num_layers + len(self._end_rows), LEVELS + len(self.names)

    def log10_size(self) -> float:
        """Logarithm of the number of recipes, at most: some merges with different weights build the
        same model."""
        free, num_protected = self.num_layers - len(self.protected), len(self.protected)
        entries = self._num_entries(len(self.names))
        smallest = max(self.min_layers, num_protected)
        stacks = sum(
            math.comb(free, kept - num_protected) * entries**kept
            for kept in range(smallest, self.max_layers + 1)
        )
        ends = [len(set(self._stand_ins(end).values())) for end in self._end_rows]
        return math.log10(stacks * math.prod(map(self._num_entries, ends)))

    def _num_entries(self, num_models: int) -> int:
        """How many different entries take or merge this many models."""
        return num_models + sum(self._num_merges(method, num_models) for method in self.methods)

    def _num_merges(self, method: Method, num_models: int) -> int:
        """How many different merges of one layer a method has."""
        sources = num_models - method.uses_base
        if method.share is not None:
            parts = {round(b / (a + b), 6) for a in self.weights for b in self.weights}
            return math.comb(sources, 2) * len(parts)
        weights = len(self.weights) if method.weighted else 1
        sizes = range(method.min_sources, min(method.max_sources, sources) + 1)
        return sum(math.comb(sources, size) * weights**size for size in sizes)

    def kept(self, genome: Genome) -> npt.NDArray[np.int64]:
        """The source layers that a genome keeps, ascending."""
        return np.flatnonzero(genome[self.layer_rows, KEEP])

    def gone(self, genome: Genome) -> npt.NDArray[np.int64]:
        """The source layers that a genome drops, ascending."""
        return np.flatnonzero(genome[self.layer_rows, KEEP] == 0)

    def decode(self, genome: Genome) -> Recipe:
        """The recipe that a genome encodes."""
        rows = genome[self.layer_rows]
        parts: list[Any] = [self._part(i, rows[i]) for i in self.kept(genome).tolist()]
        ends: Any = [
            self._part(end, genome[self._end_rows[end]])
            if end in self._end_rows
            else (self.base, self.base)
            for end in ("embeddings", "head")
        ]
        recipe = self.recipe([layer for layer, _ in parts], *(end for end, _ in ends))
        canonical = tuple(end for _, end in ends)
        recipe.remember_canonical([layer for _, layer in parts], canonical)
        return recipe

    def recipe(
        self, layers: Sequence[Layer], embeddings: End | None = None, head: End | None = None
    ) -> Recipe:
        """A recipe of this family with these layers; by default with the base's ends."""
        src_layers = [layer.src_layer for layer in layers]
        repair = self.repair
        if repair and not any(repaired_layers(src_layers, self.num_layers, repair.layers)):
            repair = None
        return Recipe(
            models=self.models,
            base=self.base,
            layers=tuple(layers),
            embeddings=self.base if embeddings is None else embeddings,
            head=self.base if head is None else head,
            dtype=self.dtype,
            calibration=self.calibration,
            repair=repair,
        )

    def encode(self, recipe: Recipe) -> Genome:
        """The nearest genome: exact for any result of `decode`; weights are rounded to the grid."""
        genome = self.blank()
        rows = genome[self.layer_rows]
        rows[:, KEEP] = 0
        for layer in recipe.layers:
            rows[layer.src_layer, KEEP] = 1
            self._encode_entry(layer, rows[layer.src_layer])
        for name, row in self._end_rows.items():
            end: End = getattr(recipe, name)
            entry = Take(end, NO_LAYER) if isinstance(end, str) else end
            self._encode_entry(entry, genome[row])
        return genome

    def blank(self) -> Genome:
        """A genome with every layer kept and taken from the base."""
        genome = np.zeros(self.shape, dtype=np.int64)
        genome[:, KEEP] = 1
        genome[:, SOURCE] = self.names.index(self.base)
        return genome

    def repaired(self, genome: Genome, rng: np.random.Generator) -> Genome:
        """The genome with protected layers kept and its size within the bounds.

        Layers are dropped or restored at random positions, so that no depth is favoured.
        """
        genome = genome.copy()
        genome[list(self._end_rows.values()), KEEP] = 1
        layers = genome[self.layer_rows]
        layers[self.protected, KEEP] = 1
        kept = self.kept(genome)
        if len(kept) > self.max_layers:
            free = np.setdiff1d(kept, self.protected)
            layers[rng.choice(free, len(kept) - self.max_layers, replace=False), KEEP] = 0
        elif len(kept) < self.min_layers:
            gone = self.gone(genome)
            layers[rng.choice(gone, self.min_layers - len(kept), replace=False), KEEP] = 1
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
        """Whether a merged layer's levels are weights, not just in or out."""
        method = self.methods[int(row[METHOD]) - 1]
        return method.has_amounts

    def _part(self, place: str | int, row: npt.NDArray[np.int64]) -> tuple[End, End]:
        """The entry of a source layer or an end, and its canonical form; cached, since a search's
        recipes share most of them."""
        genes = row[METHOD:] if row[METHOD] else row[SOURCE:METHOD]
        key = place, genes.tobytes(), int(row[SOURCE])
        found = self._parts.get(key)
        if found is None:
            if len(self._parts) >= MAX_PARTS:
                self._parts.clear()
            found = self._parts[key] = self._made(place, row)
        return found

    def _made(self, place: str | int, row: npt.NDArray[np.int64]) -> tuple[End, End]:
        if isinstance(place, int):
            layer = self._entry(place, row, self._itself)
            return layer, canonical_layer(layer, self.base, self.models)
        entry = self._entry(NO_LAYER, row, self._stand_ins(place))
        end = entry.model if isinstance(entry, Take) else entry
        return end, canonical_end(end, self.base, self.models)

    def _stand_ins(self, end: str) -> Mapping[str, str]:
        """Model → the model that represents it at an end."""
        return self.ends.embeddings if end == "embeddings" else self.ends.head

    def _entry(
        self, src_layer: int, row: npt.NDArray[np.int64], stand_ins: Mapping[str, str]
    ) -> Layer:
        """The entry that a row encodes; merges leave out models that another one represents."""
        take = Take(stand_ins[self.names[row[SOURCE]]], src_layer)
        if row[METHOD] == 0:
            return take
        method = self.methods[row[METHOD] - 1]
        levels = [
            (name, int(level))
            for name, level in zip(self.names, row[LEVELS:], strict=True)
            if level > 0
            and stand_ins[name] == name
            and not (method.uses_base and name == self.base)
        ]
        values = {p.name: p.search[0] for p in method.parameters}
        if len(levels) > method.max_sources:
            levels = sorted(levels, key=lambda item: -item[1])[: method.max_sources]
            levels.sort(key=lambda item: self.names.index(item[0]))
        if len(levels) < method.min_sources:
            return take
        weights = tuple((name, self.weights[level - 1]) for name, level in levels)
        if method.share is not None:
            (_, first), (_, second) = weights
            values[method.share.name] = round(second / (first + second), 6)
        if not method.weighted:
            weights = tuple((name, 1.0) for name, _ in weights)
        return Merge(method.name, src_layer, weights, tuple(values.items()))

    def _encode_entry(self, layer: Layer, row: npt.NDArray[np.int64]) -> None:
        if isinstance(layer, Take):
            row[SOURCE] = self.names.index(layer.model)
            return
        methods = [method.name for method in self.methods]
        strongest = max(layer.weights, key=lambda item: item[1])[0]
        row[SOURCE] = self.names.index(strongest)
        if layer.method not in methods:
            return
        row[METHOD] = 1 + methods.index(layer.method)
        if self.methods[row[METHOD] - 1].share is None:
            for model, weight in layer.weights:
                row[LEVELS + self.names.index(model)] = 1 + self._nearest(weight)
            return
        pairs = [(a, b) for a in range(len(self.weights)) for b in range(len(self.weights))]
        share = layer.amounts[1]
        first, second = min(
            pairs, key=lambda p: abs(self.weights[p[1]] / sum(self.weights[i] for i in p) - share)
        )
        for model, level in zip(layer.models, (first, second), strict=True):
            row[LEVELS + self.names.index(model)] = 1 + level

    def _nearest(self, weight: float) -> int:
        return int(np.argmin([abs(w - weight) for w in self.weights]))


def is_gene(stand_ins: Mapping[str, str]) -> bool:
    """Whether models differ at an end."""
    return len(set(stand_ins.values())) > 1
