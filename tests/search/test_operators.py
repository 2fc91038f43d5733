from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptailor.search import operators
from gptailor.search.operators import MUTATIONS, cross_depth, mutate
from gptailor.search.space import KEEP, METHOD, SOURCE, Genome, SearchSpace
from tests.search.helpers import make_space

seeds = st.integers(0, 2**32 - 1)


def some_genome(space: SearchSpace, rng: np.random.Generator) -> Genome:
    genome = space.blank()
    for _ in range(10):
        genome = mutate(genome, space, rng)
    return genome


@given(seeds)
def test_crossover_swaps_whole_layers_and_loses_none(seed: int) -> None:
    space = make_space()
    rng = np.random.default_rng(seed)
    first, second = some_genome(space, rng), some_genome(space, rng)
    children = cross_depth(first, second, rng)
    for layer in range(len(first)):
        rows = {tuple(first[layer]), tuple(second[layer])}
        assert {tuple(child[layer]) for child in children} == rows


def test_crossover_has_one_and_two_points() -> None:
    space = make_space(num_layers=12)
    first, second = space.blank(), space.blank()
    second[:, SOURCE] = 1
    changes = set()
    for seed in range(100):
        child, _ = cross_depth(first, second, np.random.default_rng(seed))
        changes.add(int(np.count_nonzero(np.diff(child[:, SOURCE]))))
    assert changes == {1, 2}


@given(seeds)
def test_mutations_stay_within_the_space(seed: int) -> None:
    space = make_space(low=4, high=7, protect=(0, 7))
    rng = np.random.default_rng(seed)
    genome = space.repaired(space.blank(), rng)
    for _ in range(20):
        genome = mutate(genome, space, rng)
        kept = space.kept(genome)
        assert 4 <= len(kept) <= 7
        assert {0, 7} <= set(kept.tolist())
        assert (genome >= 0).all()
        assert (genome[:, SOURCE] < 4).all()
        assert (genome[:, METHOD] <= 4).all()
        assert (genome[:, METHOD + 1 :] <= 4).all()


@pytest.mark.parametrize(("name", "change"), [("drop", -1), ("restore", 1), ("swap", 0)])
def test_each_mutation_changes_the_size_as_its_name_says(name: str, change: int) -> None:
    space = make_space(low=2)
    rng = np.random.default_rng(1)
    genome = space.blank()
    genome[[2, 5], KEEP] = 0
    before = genome.copy()
    getattr(operators, name)(genome, space, rng)
    assert len(space.kept(genome)) - len(space.kept(before)) == change
    assert (genome != before).any()
    assert (genome[:, 1:] == before[:, 1:]).all()  # a restored layer is unchanged


def test_every_mutation_does_something_sooner_or_later() -> None:
    space = make_space(low=2)
    for mutation in MUTATIONS:
        rng = np.random.default_rng(2)
        genome = some_genome(space, rng)
        genome[3, KEEP] = 0
        before = genome.copy()
        for _ in range(20):
            mutation(genome, space, rng)
        assert (genome != before).any(), mutation.__name__


def test_a_parent_is_never_changed() -> None:
    space = make_space()
    rng = np.random.default_rng(3)
    genome = some_genome(space, rng)
    before = genome.copy()
    mutate(genome, space, rng)
    cross_depth(genome, space.blank(), rng)
    assert (genome == before).all()
