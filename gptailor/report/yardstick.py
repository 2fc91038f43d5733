"""What scores are held against: on each set of documents its own best dense candidate, and chance.

Another candidate may be the best on other documents. Where the best is not clearly above chance, a
percentage of it says nothing, and points above chance take its place.
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
        point: its id; None where no dense candidate was scored, or not all of them.
        name: of the model; several where they are one.
        best: what it scored.
        is_near_chance: it is not clearly above chance, so there are no percentages.
        tasks: (task, metric) → the best dense candidate's score there, whichever it is.
        is_partial: some dense candidates were not scored on these documents yet.
    """

    point: str | None = None
    name: str = ""
    best: Measured | None = None
    is_near_chance: bool = False
    tasks: Mapping[tuple[str, str], Score] = field(default_factory=dict)
    is_partial: bool = False

    @property
    def has_percentages(self) -> bool:
        """Whether retention says something."""
        return self.best is not None and not self.is_near_chance

    def kept(self, measured: Measured) -> Figure | None:
        """Accuracy in percent of the best dense candidate's; None without percentages."""
        if self.best is None or self.is_near_chance:
            return None
        whole = self.best.accuracy
        value = 100.0 * measured.accuracy / whole
        return figure(value, [(100.0 / whole, measured), (-value / whole, self.best)])

    def with_retention(self, measured: Measured) -> Measured:
        """The same with its retention."""
        if self.best is None or self.is_near_chance:
            return measured
        return replace(measured, retention=100.0 * measured.accuracy / self.best.accuracy)

    def kept_of_task(self, score: Score) -> float | None:
        """A task's score in percent of the best dense candidate's at that task."""
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
        dense: id, name and what it scored there, of each dense candidate; of equals the first wins.
        is_partial: some are missing, so that nobody knows which is the best.
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
    """Not more than two standard errors above chance; above 0 where nobody knows chance."""
    above = measured.accuracy - (measured.chance or 0.0)
    noise = figure(above, [(1.0, measured)]).stderr or 0.0
    return above <= NOISE * noise or measured.accuracy <= 0.0
