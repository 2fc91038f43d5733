"""The number of evaluations left; each recipe counts once, no matter who evaluated it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptailor.evaluation.outcome import Evaluation
from gptailor.recipe import Recipe

if TYPE_CHECKING:
    from gptailor.search.progress import Progress


class Budget:
    """Counts evaluations on the search's documents.

    Args:
        total: how many recipes may be evaluated, control arms included.
        progress: is told of each one.
    """

    def __init__(self, total: int, progress: Progress) -> None:
        self.total = total
        self._progress = progress
        self._counted: set[str] = set()

    def __contains__(self, recipe: Recipe) -> bool:
        """Whether the recipe has been counted."""
        return recipe.hash in self._counted

    def count(
        self, evaluation: Evaluation, *, is_new: bool = False, is_elsewhere: bool = False
    ) -> None:
        """Counts an evaluation unless its recipe was already counted; see `Progress.update`."""
        if evaluation.recipe.hash not in self._counted:
            self._counted.add(evaluation.recipe.hash)
            self._progress.update(evaluation, is_new=is_new, is_elsewhere=is_elsewhere)

    @property
    def left(self) -> int:
        """Evaluations left; below 0 if several islands evaluated the last ones at once."""
        return self.total - len(self._counted)
