"""The objectives of a configuration, computed from an evaluation; all are minimised."""

from __future__ import annotations

from collections.abc import Sequence

from gptailor.evaluation.outcome import Evaluation


class Objectives:
    """The objectives of a search.

    Args:
        names: "accuracy", "parameters", or a task's name, one objective each.
        full_parameters: parameters of the uncut base; sizes are fractions of it.
    """

    def __init__(self, names: Sequence[str], full_parameters: int) -> None:
        self.names = tuple(names)
        self._full_parameters = full_parameters

    def of(self, evaluation: Evaluation | None) -> tuple[float, ...] | None:
        """The values, all to be minimised; None without an evaluation or without scores."""
        if evaluation is None or evaluation.outcome.accuracy is None:
            return None
        scores = {score.task: score.value for score in evaluation.outcome.scores}
        known = {
            "accuracy": evaluation.outcome.accuracy,
            "parameters": -evaluation.parameters / self._full_parameters,
        }
        return tuple(-(known[name] if name in known else scores[name]) for name in self.names)
