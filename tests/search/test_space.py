from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptailor.config import Space
from gptailor.errors import UsageError
from gptailor.merging.registry import METHODS
from gptailor.recipe import Merge, Recipe, Take
from gptailor.search.operators import mutate, reweight
from gptailor.search.space import KEEP, LEVELS, METHOD, SearchSpace
from tests.search.helpers import ALL, MODELS, make_space

seeds = st.integers(0, 2**32 - 1)


@given(seeds, st.sampled_from([ALL, ("task_arithmetic",), ("slerp",), (), tuple(METHODS)]))
def test_genome_and_recipe_round_trip(seed: int, methods: tuple[str, ...]) -> None:
    space = make_space(methods=methods)
    rng = np.random.default_rng(seed)
    genome = space.blank()
    for _ in range(12):
        genome = mutate(genome, space, rng)
    recipe = space.decode(genome)
    again = space.decode(space.encode(recipe))
    assert again.hash == recipe.hash
    assert again.src_layers == recipe.src_layers == tuple(space.kept(genome))


@given(seeds, st.integers(1, 8), st.integers(0, 7), st.sets(st.integers(0, 7), max_size=3))
def test_repair_keeps_bounds_and_protected_layers(
    seed: int, low: int, more: int, protect: set[int]
) -> None:
    high = max(min(low + more, 8), len(protect))
    space = make_space(low=low, high=max(high, low), protect=tuple(protect))
    rng = np.random.default_rng(seed)
    genome = space.blank()
    genome[:, KEEP] = rng.integers(0, 2, 8)
    repaired = space.repaired(genome, rng)
    kept = set(space.kept(repaired).tolist())
    assert protect <= kept
    assert low <= len(kept) <= space.max_layers
    if low <= genome[:, KEEP].sum() <= space.max_layers and protect <= set(space.kept(genome)):
        assert (repaired == genome).all()


def test_a_merge_with_too_few_sources_becomes_a_take() -> None:
    space = make_space()
    genome = space.blank()
    genome[0, METHOD] = 1 + ALL.index("slerp")
    genome[0, LEVELS + 1] = 2
    assert space.decode(genome).layers[0] == Take("base", 0)


def test_slerp_takes_the_two_strongest() -> None:
    space = make_space()
    genome = space.blank()
    genome[0, METHOD] = 1 + ALL.index("slerp")
    genome[0, LEVELS:] = [1, 4, 0, 3]  # weights 0.3, 1.0, none, 0.7
    layer = space.decode(genome).layers[0]
    assert isinstance(layer, Merge)
    assert layer.models == ("red", "blue")
    assert layer.parameter("t") == pytest.approx(0.7 / 1.7, abs=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_searched(name: str) -> None:
    """Every genome decodes to a recipe that can be written and read back unchanged."""
    space, method = make_space(methods=(name,)), METHODS[name]
    rng = np.random.default_rng(0)
    merged = 0
    for _ in range(40):
        genome = space.blank()
        for row in genome:
            row[METHOD:] = space.random_merge(rng)
        recipe = space.decode(genome)
        assert Recipe.from_yaml(recipe.to_yaml()) == recipe
        assert space.decode(space.encode(recipe)).hash == recipe.hash
        for layer in recipe.layers:
            if isinstance(layer, Merge):
                merged += 1
                assert method.min_sources <= len(layer.models) <= method.max_sources
                assert not (method.uses_base and "base" in layer.models)
    assert merged > 100


@pytest.mark.parametrize("name", METHODS)
def test_reweighting_changes_what_is_merged(name: str) -> None:
    space = make_space(num_layers=1, low=1, methods=(name,))
    rng = np.random.default_rng(0)
    genome = space.blank()
    genome[0, METHOD:] = [1, 2, 2, 2, 2]
    hashes = set()
    for _ in range(60):
        reweight(genome, space, rng)
        assert 0 <= genome[0, LEVELS:].min() <= genome[0, LEVELS:].max() <= len(space.weights)
        hashes.add(space.decode(genome).hash)
    assert len(hashes) > 3


def test_the_base_is_not_a_source_of_task_arithmetic() -> None:
    space = make_space()
    genome = space.blank()
    genome[0, METHOD] = 1 + ALL.index("task_arithmetic")
    genome[0, LEVELS:] = [4, 2, 0, 0]
    layer = space.decode(genome).layers[0]
    assert isinstance(layer, Merge)
    assert layer.weights == (("red", 0.5),)


def test_one_model_is_pure_pruning() -> None:
    space = make_space(models={"base": "/m/base"})
    assert not space.methods
    rng = np.random.default_rng(0)
    genome = space.blank()
    for _ in range(50):
        genome = mutate(genome, space, rng)
        assert all(layer == Take("base", layer.src_layer) for layer in space.decode(genome).layers)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ({"min": 9}, "min 9"),
        ({"min": 5, "max": 4}, "min 5 must not exceed max 4"),
        ({"max": 9}, "max 9"),
        ({"protect": [8]}, "layer 8"),
        ({"min": 1, "max": 1, "protect": [0, 1]}, "protect"),
    ],
)
def test_bounds_that_do_not_fit_are_refused(layers: dict[str, object], words: str) -> None:
    space = Space.model_validate({"layers": layers})
    with pytest.raises(UsageError, match=words):
        SearchSpace(space, MODELS, "base", 8)
