"""Variation operators for layer stacks: crossover in depth, and mutations.

Each operator is a function of genome and generator; the pymoo classes at the end only apply them.
Genomes have the shape (R, G), see `space`; pymoo passes them flat. Rows of embeddings and head are
varied like those of layers, and are always kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from pymoo.core.crossover import Crossover
from pymoo.core.mutation import Mutation
from pymoo.core.repair import Repair

from gptailor.search.space import KEEP, LEVELS, METHOD, SOURCE, Genome, SearchSpace

MEAN_EXTRA_MUTATIONS = 1.0
"""A child gets one mutation, and on average this many more (geometric)."""

CROSSOVER_RATE = 0.7
"""The fraction of pairs that are crossed; other children are mutated copies."""


def cross_depth(first: Genome, second: Genome, rng: np.random.Generator) -> tuple[Genome, Genome]:
    """One- or two-point crossover in depth: the children swap a contiguous run of rows."""
    num_rows = len(first)
    num_points = min(int(rng.integers(1, 3)), max(num_rows - 1, 0))
    points = np.sort(rng.choice(np.arange(1, num_rows), num_points, replace=False))
    begin = int(points[0]) if num_points else num_rows
    end = int(points[1]) if num_points == 2 else num_rows
    children = first.copy(), second.copy()
    children[0][begin:end], children[1][begin:end] = second[begin:end], first[begin:end]
    return children


def drop(genome: Genome, space: SearchSpace, rng: np.random.Generator) -> None:
    """Drops one kept layer."""
    free = np.setdiff1d(space.kept(genome), space.protected)
    if len(free) and len(space.kept(genome)) > space.min_layers:
        genome[space.layer_rows][rng.choice(free), KEEP] = 0


def restore(genome: Genome, space: SearchSpace, rng: np.random.Generator) -> None:
    """Restores one dropped layer, with the source or merge that it had."""
    gone = space.gone(genome)
    if len(gone) and len(space.kept(genome)) < space.max_layers:
        genome[space.layer_rows][rng.choice(gone), KEEP] = 1


def swap(genome: Genome, space: SearchSpace, rng: np.random.Generator) -> None:
    """Drops one layer and restores another; the size stays the same."""
    free = np.setdiff1d(space.kept(genome), space.protected)
    gone = space.gone(genome)
    layers = genome[space.layer_rows]
    if len(free) and len(gone):
        layers[rng.choice(free), KEEP] = 0
        layers[rng.choice(gone), KEEP] = 1


def change_source(genome: Genome, space: SearchSpace, rng: np.random.Generator) -> None:
    """Takes one layer, or a short run of layers, from another model."""
    rows = _run_of_kept(genome, rng)
    genome[rows, SOURCE] = int(rng.integers(len(space.names)))
    genome[rows, METHOD] = 0


def toggle_merge(genome: Genome, space: SearchSpace, rng: np.random.Generator) -> None:
    """Merges layers that were taken, or takes layers that were merged."""
    if not space.methods:
        return
    rows = _run_of_kept(genome, rng)
    if not len(rows):
        return
    if genome[rows[0], METHOD] > 0 and rng.random() < 0.5:
        genome[rows, METHOD] = 0
    else:
        genome[rows, METHOD:] = space.random_merge(rng)


def reweight(genome: Genome, space: SearchSpace, rng: np.random.Generator) -> None:
    """Moves the weight of one model up or down, in one merged layer or in all of them.

    For methods without weights the model is added or removed.
    """
    merged = np.flatnonzero((genome[:, KEEP] == 1) & (genome[:, METHOD] > 0))
    if not len(merged):
        toggle_merge(genome, space, rng)
        return
    rows = merged if rng.random() < 0.3 else rng.choice(merged, 1)
    column = LEVELS + int(rng.integers(len(space.names)))
    step = int(rng.choice([-1, 1]))
    highest = len(space.weights)
    for row in rows:
        level = genome[row, column]
        in_or_out = 0 if level else highest
        moved = level + step if space.has_weights(genome[row]) else in_or_out
        genome[row, column] = np.clip(moved, 0, highest)


MUTATIONS: tuple[Callable[[Genome, SearchSpace, np.random.Generator], None], ...] = (
    drop,
    restore,
    swap,
    change_source,
    toggle_merge,
    reweight,
)


def mutate(genome: Genome, space: SearchSpace, rng: np.random.Generator) -> Genome:
    """A copy of the genome with one or more random mutations, within the space."""
    genome = genome.copy()
    num_mutations = int(rng.geometric(1.0 / (1.0 + MEAN_EXTRA_MUTATIONS)))
    for _ in range(num_mutations):
        MUTATIONS[int(rng.integers(len(MUTATIONS)))](genome, space, rng)
    return space.repaired(genome, rng)


def _run_of_kept(genome: Genome, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """One kept row (half the time), a run of up to half of the kept rows, or all of them."""
    kept = np.flatnonzero(genome[:, KEEP])
    kind = rng.random()
    if not len(kept) or kind > 0.85:
        return kept
    if kind < 0.5:
        return rng.choice(kept, 1)
    length = int(rng.integers(2, max(len(kept) // 2, 2) + 1))
    begin = int(rng.integers(0, max(len(kept) - length, 0) + 1))
    return kept[begin : begin + length]


class DepthCrossover(Crossover):  # type: ignore[misc]
    """pymoo's view of `cross_depth`."""

    def __init__(self, space: SearchSpace) -> None:
        super().__init__(n_parents=2, n_offsprings=2, prob=1.0)
        self.space = space

    def _do(self, problem: Any, X: Any, *_: Any, random_state: Any = None, **__: Any) -> Any:
        shape = self.space.shape
        children = X.copy()
        for k in range(X.shape[1]):
            if random_state.random() < CROSSOVER_RATE:
                first, second = (X[i, k].reshape(shape) for i in range(2))
                pair = cross_depth(first, second, random_state)
                children[0, k], children[1, k] = (child.ravel() for child in pair)
        return children


class StackMutation(Mutation):  # type: ignore[misc]
    """pymoo's view of `mutate`."""

    def __init__(self, space: SearchSpace) -> None:
        super().__init__(prob=1.0)
        self.space = space

    def _do(self, problem: Any, X: Any, *_: Any, random_state: Any = None, **__: Any) -> Any:
        shape = self.space.shape
        return np.array([mutate(x.reshape(shape), self.space, random_state).ravel() for x in X])


class SpaceRepair(Repair):  # type: ignore[misc]
    """pymoo's view of `SearchSpace.repaired`."""

    def __init__(self, space: SearchSpace) -> None:
        super().__init__()
        self.space = space

    def _do(self, problem: Any, X: Any, *_: Any, random_state: Any = None, **__: Any) -> Any:
        shape = self.space.shape
        return np.array([self.space.repaired(x.reshape(shape), random_state).ravel() for x in X])
