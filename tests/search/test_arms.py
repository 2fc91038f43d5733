from __future__ import annotations

import numpy as np
import pytest

from gptailor.evaluation.similarity import Similarity
from gptailor.recipe import Merge
from gptailor.search.arms import control_arms, keep_by_angle, keep_by_influence
from tests.search.helpers import make_space

KINDS = ("dense", "block_influence", "angular", "uniform", "paper", "random")


def similarity() -> Similarity:
    influence = (0.9, 0.5, 0.2, 0.1, 0.1, 0.3, 0.4, 0.8)
    angular = np.abs(np.arange(9)[:, None] - np.arange(9)[None]) * 0.1
    angular[2, 4] = 0.01
    return Similarity(influence, tuple(map(tuple, angular.tolist())))


def test_block_influence_drops_what_changes_least() -> None:
    space = make_space()
    kept = keep_by_influence(space, np.array(similarity().block_influence), 6)
    assert kept.tolist() == [0, 1, 2, 5, 6, 7]
    protected = make_space(protect=(3,))
    kept = keep_by_influence(protected, np.array(similarity().block_influence), 6)
    assert kept.tolist() == [0, 1, 3, 5, 6, 7]


def test_angular_drops_the_nearest_contiguous_block() -> None:
    space = make_space()
    assert keep_by_angle(space, np.array(similarity().angular), 6).tolist() == [0, 1, 4, 5, 6, 7]
    protected = make_space(protect=(2,))
    kept = keep_by_angle(protected, np.array(similarity().angular), 6).tolist()
    gone = sorted(set(range(8)) - set(kept))
    assert 2 in kept
    assert gone[1] == gone[0] + 1


def test_every_arm_exists_in_every_size() -> None:
    space = make_space()
    arms = control_arms(
        space, KINDS, (0.75, 0.5, 0.1), {n: similarity() for n in space.names}, seed=0
    )
    names = [name for name, _ in arms]
    assert len(set(names)) == len(names)
    for size, keep in ((0.75, 6), (0.5, 4)):
        for kind in KINDS[1:]:
            found = [r for n, r in arms if n.startswith(f"{kind}:{size:g}")]
            assert len(found) == (4 if kind in ("block_influence", "angular") else 1)
            assert all(recipe.num_layers == keep for recipe in found)
    assert not any(":0.1" in name for name in names)  # below the space's smallest size
    assert [n for n in names if n.startswith("dense:")] == [f"dense:{m}" for m in space.names]


@pytest.mark.parametrize("kind", ["uniform", "paper"])
def test_merged_arms_are_even(kind: str) -> None:
    space = make_space()
    arms = dict(control_arms(space, (kind,), (0.75,), {"base": similarity()}, seed=0))
    recipe = arms[f"{kind}:0.75"]
    for layer in recipe.layers:
        assert isinstance(layer, Merge)
        assert len({weight for _, weight in layer.weights}) == 1


def test_the_same_seed_gives_the_same_arms() -> None:
    space = make_space()

    def hashes(seed: int) -> list[str]:
        arms = control_arms(space, ("random", "paper"), (0.75,), {}, seed)
        return [recipe.hash for _, recipe in arms]

    assert hashes(0) == hashes(0)
    assert hashes(0) != hashes(1)
