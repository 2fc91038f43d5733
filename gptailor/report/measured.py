"""The scores of one recipe on one set of documents, and their standard errors.

Models that were scored on the same documents are compared document by document: what is hard for
one is mostly hard for the other, so a difference is more certain than the two scores. If a run has
no values by document, its models are treated as independent, which overstates the noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gptailor.evaluation.outcome import Outcome, Score

NOISE = 2.0
"""Anything within this many standard errors is noise."""

Terms = Sequence[tuple[float, "Measured"]]
"""Factors and the accuracies that they multiply, all on the same documents."""


@dataclass(frozen=True)
class Figure:
    """A number that is printed, and its standard error in the same unit.

    Attributes:
        value: the number.
        stderr: None if it is not known.
        is_paired: the error was computed from differences by document.
    """

    value: float
    stderr: float | None
    is_paired: bool = False

    @property
    def is_noise(self) -> bool:
        """Whether it is indistinguishable from 0."""
        return self.stderr is not None and abs(self.value) <= NOISE * self.stderr


@dataclass(frozen=True)
class Measured:
    """The scores of one recipe on one set of documents.

    Attributes:
        accuracy: weighted mean of the scores.
        stderr: its standard error, with the tasks treated as independent; None if a score has none.
        scores: one for each task that is part of the accuracy.
        retention: accuracy in percent of the best dense candidate's on the same documents; None
            if there is none, or if that is not clearly above chance.
        others: scores that are shown but not part of the accuracy. They may be better when lower,
            and may not be finite.
    """

    accuracy: float
    stderr: float | None
    scores: tuple[Score, ...]
    retention: float | None = None
    others: tuple[Score, ...] = ()

    @property
    def shown(self) -> tuple[Score, ...]:
        """All scores, those that count first."""
        return (*self.scores, *self.others)

    @property
    def chance(self) -> float | None:
        """The accuracy of guessing; None if it is unknown for one of the tasks."""
        chances = [s.weight * s.chance for s in self.scores if s.chance is not None]
        if len(chances) < len(self.scores) or not _is_mean(self):
            return None
        return sum(chances) / sum(s.weight for s in self.scores)

    @property
    def above_chance(self) -> float | None:
        """Points of accuracy above chance (1 point is 0.01); None if chance is not known."""
        return None if self.chance is None else 100.0 * (self.accuracy - self.chance)


def measured_of(outcome: Outcome) -> Measured | None:
    """The scores of an evaluation; None if it has no accuracy."""
    accuracy = outcome.accuracy
    if outcome.status != "ok" or accuracy is None or not math.isfinite(accuracy):
        return None
    scores = tuple(score for score in outcome.scores if score.counts)
    others = tuple(score for score in outcome.scores if not score.counts)
    alone = Measured(accuracy, None, scores)
    return Measured(accuracy, _independent([(1.0, alone)]), scores, others=others)


def figure(value: float, terms: Terms) -> Figure:
    """A number with the standard error of Σ factor · accuracy over the terms."""
    merged: dict[tuple[int, float], tuple[float, Measured]] = {}
    for factor, measured in terms:  # a model compared with itself has no error
        key = id(measured.scores), measured.accuracy
        before, _ = merged.get(key, (0.0, measured))
        merged[key] = (before + factor, measured)
    found = list(merged.values())
    paired = _paired(found)
    return Figure(value, _independent(found) if paired is None else paired, paired is not None)


def _paired(terms: Terms) -> float | None:
    """The standard error by document; None unless all have values for the same documents.

    Also None if the numbers overflow: a journal is not trusted.
    """
    kinds = {
        tuple((s.task, s.metric, s.weight, len(s.values), s.leaves) for s in measured.scores)
        for _, measured in terms
    }
    if len(kinds) != 1 or not all(_is_mean(measured) for _, measured in terms):
        return None
    errors = []
    weight = sum(score.weight for score in terms[0][1].scores)
    try:
        for scores in zip(*(measured.scores for _, measured in terms), strict=True):
            if len(scores[0].values) < 2:
                return None
            factors = [factor for factor, _ in terms]
            combined = [
                sum(map(float.__mul__, factors, values))
                for values in zip(*(score.values for score in scores), strict=True)
            ]
            variance = _variance_of_mean(combined, scores[0].leaves)
            errors.append(scores[0].weight / weight * math.sqrt(variance))
    except (OverflowError, ValueError):
        return None
    error = math.hypot(*errors)
    return error if math.isfinite(error) else None


def _variance_of_mean(values: Sequence[float], leaves: Sequence[tuple[int, float]]) -> float:
    """Variance of the weighted mean of the leaves' means: Σ w² s² / n.

    If a leaf has only one document, its s² is unknown, and all leaves are treated as one.
    """
    leaves = leaves or [(len(values), 1.0)]
    if min(count for count, _ in leaves) < 2:
        shares = [weight / count for count, weight in leaves for _ in range(count)]
        values = [len(values) * w * v for w, v in zip(shares, values, strict=True)]
        leaves = [(len(values), 1.0)]
    total, begin = 0.0, 0
    for count, weight in leaves:
        part = values[begin : begin + count]
        begin += count
        mean = math.fsum(part) / count
        total += weight**2 * math.fsum((v - mean) ** 2 for v in part) / (count - 1) / count
    return total


def _independent(terms: Terms) -> float | None:
    """The standard error from the scores' own errors: √(Σ factor² Σ wᵢ² sᵢ²) / Σ wᵢ."""
    errors = []
    for factor, measured in terms:
        for score in measured.scores:
            if score.stderr is None:
                return None
            weight = score.weight / sum(s.weight for s in measured.scores)
            errors.append(factor * weight * score.stderr)
        if not _is_mean(measured):
            return None
    error = math.hypot(*errors)
    return error if math.isfinite(error) else None


def _is_mean(measured: Measured) -> bool:
    """Whether the accuracy is the weighted mean of the scores, so that errors are meaningful."""
    weight = sum(s.weight for s in measured.scores)
    if weight <= 0.0:
        return False
    mean = sum(s.weight * s.value for s in measured.scores) / weight
    return abs(mean - measured.accuracy) <= 1e-6
