"""What scores are compared with: the best dense candidate on each set of documents, and chance.

The best candidate may differ between sets of documents. If it is not clearly above chance, a
percentage of it means nothing, and points above chance replace it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from gptailor.evaluation.outcome import Score
from gptailor.report.measured import NOISE, Figure, Measured, figure


@dataclass(frozen=True)
class Yardstick:
    """The best dense candidate on one set of documents.

    Attributes:
        point: its id; None if no dense candidate was scored, or if `is_partial`.
        name: of the model; several if they are the same model.
        best: its scores.
        is_near_chance: it is not clearly above chance, so there are no percentages.
        tasks: (task, metric) → the best score of any dense candidate.
        is_partial: some dense candidates have not been scored on these documents yet.
        others: (task, metric) → the base's score of a task that is no part of the accuracy.
    """

    point: str | None = None
    name: str = ""
    best: Measured | None = None
    is_near_chance: bool = False
    tasks: Mapping[tuple[str, str], Score] = field(default_factory=dict)
    is_partial: bool = False
    others: Mapping[tuple[str, str], Score] = field(default_factory=dict)

    @property
    def has_percentages(self) -> bool:
        """Whether retention is meaningful."""
        return self.best is not None and not self.is_near_chance

    def kept(self, measured: Measured) -> Figure | None:
        """Accuracy in percent of the best dense candidate's; None without percentages."""
        if self.best is None or self.is_near_chance:
            return None
        whole = self.best.accuracy
        value = 100.0 * measured.accuracy / whole
        return figure(value, [(100.0 / whole, measured), (-value / whole, self.best)])

    def with_retention(self, measured: Measured) -> Measured:
        """Returns a copy with its retention."""
        if self.best is None or self.is_near_chance:
            return measured
        return replace(measured, retention=100.0 * measured.accuracy / self.best.accuracy)

    def dense_score(self, score: Score) -> Score | None:
        """What a task's score is held against: the best dense candidate's on that task.

        The base's if the task is no part of the accuracy.
        """
        found = self.tasks if score.counts else self.others
        return found.get((score.task, score.metric))

    def kept_of_task(self, score: Score) -> float | None:
        """A task's score in percent of the best dense candidate's on that task.

        None without percentages, or if the task is no part of the accuracy.
        """
        if not score.counts:
            return None
        best = self.tasks.get((score.task, score.metric))
        if best is None or _is_near_chance(Measured(best.value, best.stderr, (best,))):
            return None
        return 100.0 * score.value / best.value

    def difference(self, one: Measured, other: Measured) -> Figure:
        """One minus the other: points of retention with percentages, else points of accuracy."""
        points = 100.0 * (one.accuracy - other.accuracy)
        if self.best is None or self.is_near_chance:
            return figure(points, [(100.0, one), (-100.0, other)])
        whole = self.best.accuracy
        terms = [
            (100.0 / whole, one),
            (-100.0 / whole, other),
            (-points / whole / whole, self.best),
        ]
        return figure(points / whole, terms)


def yardstick_of(
    dense: Sequence[tuple[str, str, Measured]], *, is_partial: bool = False
) -> Yardstick:
    """The yardstick of a set of documents.

    Args:
        dense: id, name and scores of each dense candidate; of equals the first wins.
        is_partial: whether some are missing, so that the best one is unknown.
    """
    if is_partial or not dense:
        return Yardstick(is_partial=is_partial)
    point, name, best = max(dense, key=lambda found: found[2].accuracy)
    scores = (score for _, _, measured in dense for score in measured.scores)
    return Yardstick(point, name, best, _is_near_chance(best), _best_by_task(scores))


def _best_by_task(scores: Iterable[Score]) -> dict[tuple[str, str], Score]:
    best: dict[tuple[str, str], Score] = {}
    for score in scores:
        key = (score.task, score.metric)
        if key not in best or score.value > best[key].value:
            best[key] = score
    return best


def _is_near_chance(measured: Measured) -> bool:
    """Whether it is at most two standard errors above chance, or above 0 if chance is unknown."""
    above = measured.accuracy - (measured.chance or 0.0)
    noise = figure(above, [(1.0, measured)]).stderr or 0.0
    return above <= NOISE * noise or measured.accuracy <= 0.0
