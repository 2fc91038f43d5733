"""Embeddings and head are genes where candidates differ in them, and nothing changes elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptailor.models.ends import Ends
from gptailor.recipe import NO_LAYER, Merge, Recipe, Take
from gptailor.search.arms import control_arms
from gptailor.search.nsga2 import GenerationalNSGA2
from gptailor.search.operators import MUTATIONS, cross_depth, mutate
from gptailor.search.population import genome_of
from gptailor.search.probe import probe_recipes
from gptailor.search.searcher import Scored
from gptailor.search.space import KEEP, LEVELS, METHOD, SOURCE, SearchSpace
from gptailor.search.steady_state import SteadyStateNSGA2
from tests.search.helpers import ALL, MODELS, asked, dense, make_space, synthetic, told
from tests.search.helpers import settings as settings_of
from tests.search.test_arms import KINDS, similarity

seeds = st.integers(0, 2**32 - 1)
SAME = dict.fromkeys(MODELS, "base")
OWN = {name: name for name in MODELS}
SOME = {"base": "base", "red": "base", "green": "green", "blue": "green"}
BOTH, TOKENS, HEAD, FEW = Ends(OWN, OWN), Ends(OWN, SAME), Ends(SAME, OWN), Ends(SOME, SAME)
ends_of_all_kinds = st.sampled_from([BOTH, TOKENS, HEAD, FEW, Ends(SOME, OWN)])


def objectives(recipe: Recipe) -> list[float]:
    """Red's embeddings together with green's head are best."""
    right = (recipe.embeddings == "red") + (recipe.head == "green")
    return [-(synthetic(recipe).accuracy or 0.0) - 0.2 * right, recipe.num_layers / 8]


def arms_of(space: SearchSpace) -> dict[str, Recipe]:
    measured = {name: similarity() for name in space.names}
    return dict(control_arms(space, KINDS, (0.75, 0.5), measured, seed=0))


def digest(recipes: Sequence[Recipe]) -> str:
    return hashlib.sha256("".join(recipe.hash for recipe in recipes).encode()).hexdigest()[:16]


# Equal ends


def test_a_search_with_equal_ends_is_unchanged() -> None:
    """Results recorded before embeddings and head could be genes."""
    for space in (make_space(), make_space(ends=Ends.equal(list(MODELS), "base"))):
        assert space.shape == (8, 7)
        assert space.log10_size() == pytest.approx(23.84002697266997)
        arms = list(arms_of(space).values())
        assert digest(arms) == "2eb8f763d8e04a49"
        generations = GenerationalNSGA2(space, settings_of(start=dense(space)))
        assert digest(told(generations, 6)) == "f48abb9816b0d597"
        steady = SteadyStateNSGA2(space, settings_of(seed=(0, 3, 0), start=arms))
        assert digest(told(steady, 12, 7)) == "8a2df532f63e8a4e"


# Genomes


def test_there_is_a_row_for_each_end_that_differs() -> None:
    assert [make_space(ends=e).shape[0] for e in (BOTH, TOKENS, HEAD, FEW)] == [10, 9, 9, 9]
    space = make_space(ends=BOTH)
    recipe = space.decode(space.blank())
    assert (recipe.embeddings, recipe.head, recipe.num_layers) == ("base", "base", 8)
    genome = space.blank()
    genome[0, SOURCE], genome[-1, SOURCE], genome[1, SOURCE] = 1, 2, 3
    recipe = space.decode(genome)
    assert (recipe.embeddings, recipe.head) == ("red", "green")
    assert recipe.layers[:2] == (Take("blue", 0), Take("base", 1))
    assert recipe.hash != space.decode(space.blank()).hash


@given(seeds, ends_of_all_kinds)
def test_genome_and_recipe_round_trip(seed: int, ends: Ends) -> None:
    space = make_space(ends=ends)
    rng = np.random.default_rng(seed)
    genome = space.blank()
    for _ in range(12):
        genome = mutate(genome, space, rng)
    recipe = space.decode(genome)
    assert recipe.src_layers == tuple(space.kept(genome))
    flat = genome_of(space, recipe)
    assert flat is not None
    assert space.decode(flat.reshape(space.shape)).hash == recipe.hash
    again = Recipe.from_yaml(recipe.to_yaml())  # has no cached canonical form
    assert again == recipe
    assert again.hash == recipe.hash
    assert again.canonical() == recipe.canonical()


def test_a_recipe_names_the_first_of_equals() -> None:
    """This way nothing is evaluated twice, and equal ends are never merged."""
    space = make_space(ends=FEW)
    genome = space.blank()
    genome[0, SOURCE] = 1
    assert space.decode(genome).embeddings == "base"  # red has the same
    genome[0, SOURCE] = 3
    assert space.decode(genome).embeddings == "green"
    genome[0, METHOD:] = [1 + ALL.index("linear"), 0, 4, 2, 4]
    assert space.decode(genome).canonical().embeddings == "green"
    genome[0, METHOD:] = [1 + ALL.index("linear"), 4, 0, 2, 4]
    merged = space.decode(genome).embeddings
    assert isinstance(merged, Merge)
    assert merged.weights == (("base", 1.0), ("green", 0.5))


def test_the_size_of_the_space() -> None:
    def size(ends: Ends, methods: tuple[str, ...]) -> float:
        space = make_space(num_layers=2, low=2, methods=methods, ends=ends)
        return float(10 ** space.log10_size())

    assert size(BOTH, ()) == pytest.approx(4**2 * 4 * 4)
    assert size(FEW, ()) == pytest.approx(4**2 * 2)
    merges = 4 + sum(n * 4**k for k, n in ((1, 3), (2, 3), (3, 1)))  # three differ from the base
    assert size(HEAD, ("task_arithmetic",)) == pytest.approx(merges**3)
    assert size(FEW, ("task_arithmetic",)) == pytest.approx(merges**2 * (2 + 4))


# Operators


@given(seeds, ends_of_all_kinds)
def test_ends_are_always_kept_and_are_not_counted_as_layers(seed: int, ends: Ends) -> None:
    space = make_space(low=4, high=7, protect=(0, 7), ends=ends)
    rng = np.random.default_rng(seed)
    genome = space.blank()
    genome[:, KEEP] = rng.integers(0, 2, len(genome))
    genome = space.repaired(genome, rng)
    rows = np.setdiff1d(np.arange(len(genome)), np.arange(len(genome))[space.layer_rows])
    for _ in range(20):
        genome = mutate(genome, space, rng)
        kept = set(space.kept(genome).tolist())
        assert 4 <= len(kept) <= 7 and {0, 7} <= kept <= set(range(8))
        assert (genome[rows, KEEP] == 1).all()
        assert (genome[:, SOURCE] < 4).all()


def test_every_mutation_of_a_layer_mutates_ends_too() -> None:
    space = make_space(low=2, ends=BOTH)
    for mutation in MUTATIONS:
        changed = np.zeros(len(space.blank()), dtype=bool)
        for seed in range(300):
            genome = space.blank()
            genome[3, KEEP] = 0
            genome[:, METHOD:] = [1, 0, 2, 2, 2]
            before = genome.copy()
            mutation(genome, space, np.random.default_rng(seed))
            changed |= (genome != before).any(axis=1)
        is_of_layers = mutation.__name__ in ("drop", "restore", "swap")
        assert changed[[0, -1]].tolist() == [not is_of_layers] * 2, mutation.__name__
        assert changed[1:-1].any()


def test_crossover_moves_embeddings_with_the_bottom_and_the_head_with_the_top() -> None:
    space = make_space(ends=BOTH)
    first, second = space.blank(), space.blank()
    second[:, SOURCE] = 1
    for seed in range(100):
        for child in cross_depth(first, second, np.random.default_rng(seed)):
            sources = child[:, SOURCE]
            assert np.count_nonzero(np.diff(sources)) in (1, 2)  # contiguous runs of rows
    children = [cross_depth(first, second, np.random.default_rng(s))[0] for s in range(100)]
    recipes = [space.decode(child) for child in children]
    assert all(recipe.embeddings == "base" for recipe in recipes)
    assert {recipe.head for recipe in recipes} == {"base", "red"}


def test_a_search_finds_the_ends() -> None:
    space = make_space(ends=BOTH)
    nsga2 = GenerationalNSGA2(space, settings_of(16, start=list(arms_of(space).values())))
    found: list[Recipe] = []
    for _ in range(12):
        new = asked(nsga2)
        nsga2.tell([Scored(recipe, tuple(objectives(recipe))) for recipe in new])
        found += new
    assert len({recipe.hash for recipe in found}) == len(found)
    best = min(found, key=lambda recipe: objectives(recipe)[0])
    assert (best.embeddings, best.head) == ("red", "green")


# Arms and probes


def test_arms_are_the_models_that_they_name() -> None:
    for ends, own in ((BOTH, (True, True)), (TOKENS, (True, False)), (HEAD, (False, True))):
        for arm, recipe in arms_of(make_space(ends=ends)).items():
            kind, _, rest = arm.partition(":")
            if kind in ("uniform", "paper"):
                continue
            model = rest.rpartition("@")[2]
            assert {layer.used_models for layer in recipe.layers} == {(model,)}
            expected = [model if is_own else "base" for is_own in own]
            assert [recipe.embeddings, recipe.head] == expected, arm


def test_merged_arms_merge_ends_like_layers() -> None:
    space = make_space(ends=BOTH)
    for arm, recipe in arms_of(space).items():
        if arm.startswith(("uniform", "paper")):
            layer = recipe.layers[0]
            assert isinstance(layer, Merge)
            for end in (recipe.embeddings, recipe.head):
                assert isinstance(end, Merge)
                assert end.src_layer == NO_LAYER
                assert (end.method, end.weights, end.parameters) == (
                    layer.method, layer.weights, layer.parameters
                )  # fmt: skip
            assert Recipe.from_yaml(recipe.to_yaml()) == recipe
            flat = genome_of(space, recipe)
            assert arm.startswith("paper") or flat is not None  # 1/3 is not on the grid


def test_an_average_counts_equal_ends_as_often_as_they_occur() -> None:
    arms = arms_of(make_space(ends=FEW))
    uniform, paper = arms["uniform:0.75"], arms["paper:0.75"]
    assert isinstance(uniform.embeddings, Merge) and isinstance(paper.embeddings, Merge)
    assert uniform.embeddings.weights == (("base", 2.0), ("green", 2.0))
    ((name, weight),) = paper.embeddings.weights
    assert name == "green"
    assert weight == pytest.approx(2 / 3, abs=1e-5)
    assert uniform.head == paper.head == "base"


@pytest.mark.parametrize("ends", [None, BOTH, TOKENS, HEAD])
def test_probes(ends: Ends | None) -> None:
    space = make_space(protect=(0,), ends=ends)
    found = probe_recipes(space)
    assert [recipe.num_layers for recipe in found.values()] == [8, 8, 3]
    dense, half, smallest = found.values()
    assert all(layer == Take("base", i) for i, layer in enumerate(dense.layers))
    merged = [layer.src_layer for layer in half.layers if isinstance(layer, Merge)]
    assert merged == [1, 3, 5, 7]
    ends = ends or Ends.equal(list(MODELS), "base")
    for name in ("embeddings", "head"):
        differs = getattr(ends, name) != SAME
        assert isinstance(getattr(half, name), Merge) == differs
        assert getattr(dense, name) == getattr(smallest, name) == "base"
    assert smallest.src_layers[0] == 0
    assert LEVELS == 3
