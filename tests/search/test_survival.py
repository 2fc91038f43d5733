"""Selection, compared with pymoo's, which treats one recipe at a time."""

from __future__ import annotations

import numpy as np
import pytest
from pymoo.operators.survival.rank_and_crowding.metrics import get_crowding_function
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

from gptailor.search.survival import Standing, standing


@pytest.mark.parametrize("num", [1, 2, 3, 40, 300])
@pytest.mark.parametrize("num_objectives", [1, 2, 3])
def test_the_standing_equals_pymoos(num: int, num_objectives: int) -> None:
    objectives = np.random.default_rng(num).random((num, num_objectives))
    found = standing(objectives)
    distance = get_crowding_function("cd")
    seen = np.zeros(num, dtype=bool)
    for rank, front in enumerate(NonDominatedSorting().do(objectives)):
        assert (found.rank[front] == rank).all()
        expected = distance.do(objectives[front], n_remove=0)
        np.testing.assert_allclose(found.crowding[front], expected, rtol=1e-12)
        seen[front] = True
    assert seen.all()


def test_only_one_of_equal_recipes_counts() -> None:
    objectives = np.array([[0.0, 1.0], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [1.0, 0.0], [1.0, 0.0]])
    found = standing(objectives)
    assert (found.rank == 0).all()
    assert (found.crowding[1:4] > 0).sum() == 1
    assert np.isinf(found.crowding[[0, 4]]).all()
    assert found.crowding[5] == 0
    best = found.best(3, np.random.default_rng(0))
    assert {tuple(objectives[i]) for i in best} == {(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)}


def test_better_recipes_become_parents_more_often() -> None:
    rng = np.random.default_rng(0)
    found = Standing(np.array([0, 0, 1, 2]), np.array([9.0, 1.0, 1.0, 1.0]))
    parents = found.parents(4000, rng)
    counts = np.bincount(parents, minlength=4)
    assert counts[0] > counts[1] > counts[2] > counts[3] == 0
