"""Scores, cost and outcome of an evaluation as values, and a row of the archive."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from gptailor.errors import ModelError, TaskError
from gptailor.evaluation import document_values
from gptailor.recipe import Recipe

Status = Literal["ok", "infeasible", "failed"]
Documents = Literal["search", "front", "holdout"]
"""What recipes are scored on. "front": the search's documents again, after the search, with a
repair that read more."""

SEARCH_DOCUMENTS = ("search", "front")
"""Scores on these can be compared: they are the same documents."""


@dataclass(frozen=True, slots=True)
class Score:
    """The score of one recipe on one task (or group).

    Attributes:
        task: lm-eval's name.
        metric: lm-eval's key, for example "acc,none".
        value: in the metric's own unit; a fraction of 1 for accuracies. It may not be finite if
            the weight is 0.
        stderr: standard error of `value`; None where lm-eval has none.
        num_documents: the number of documents that it is the mean of.
        weight: the task's weight in the accuracy; 0 if it is only shown.
        values: one for each document, always in the same order, so two models can be compared
            document by document; empty where `value` is not their mean.
        leaves: for a group or tag, (number of documents, weight) of each task, in the order of
            `values`; the weights add up to 1, and `value` is the mean of the tasks' means with
            these weights. Empty for a single task: `value` is the mean of `values`.
        chance: what guessing gives on these documents; None if unknown.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    num_documents: int
    weight: float = 1.0
    values: tuple[float, ...] = ()
    leaves: tuple[tuple[int, float], ...] = ()
    chance: float | None = None

    @property
    def counts(self) -> bool:
        """Whether it is part of the accuracy."""
        return self.weight != 0

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles with compact values: workers send scores, and a search keeps all of them."""
        return Score.from_dict, (self.to_dict(),)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the values encoded as one short text, None for a value that is not finite."""
        data = {name: getattr(self, name) for name in _SCORE_KEYS}
        value = self.value if math.isfinite(self.value) else None
        return {**data, "value": value, "values": document_values.encode(self.values)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Score:
        """Reads what `to_dict` returned, also without values, leaves and chance (older versions).

        A value of None is read as infinity: what is not finite is mostly a perplexity.

        Raises:
            ValueError: the values can't be decoded.
            TypeError: a key is missing or unknown.
        """
        values = document_values.decode(data.get("values") or "")
        leaves = tuple((count, weight) for count, weight in data.get("leaves", ()))
        read = {**data, "values": values, "leaves": leaves}
        if data.get("value", 0.0) is None:
            read["value"] = math.inf
        return cls(**read)


_SCORE_KEYS = tuple(field.name for field in fields(Score))


@dataclass(frozen=True, slots=True)
class Cost:
    """What one evaluation took.

    Attributes:
        seconds: wall-clock time in all.
        assemble_s: time from the recipe to a model that is ready.
        forward_s: time inside the model's forward pass.
        num_documents: documents that were answered.
        num_tokens: tokens that went through the model, padding included.
    """

    seconds: float = 0.0
    assemble_s: float = 0.0
    forward_s: float = 0.0
    num_documents: int = 0
    num_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an evaluation ended: `ok` with scores, `infeasible` or `failed` with a reason.

    Attributes:
        status: "ok", "infeasible" or "failed"; a crash is "failed" and has no score.
        accuracy: weighted mean of the scores that count; None unless "ok".
        scores: one for each task that was asked for.
        reason: why it is infeasible, or the traceback of the crash, whose last line names the
            error.
        cost: time, documents and tokens.
    """

    status: Status
    accuracy: float | None
    scores: tuple[Score, ...]
    reason: str
    cost: Cost

    def to_dict(self) -> dict[str, Any]:
        """For JSON: each attribute under its name."""
        return {
            "status": self.status,
            "scores": [score.to_dict() for score in self.scores],
            "cost": asdict(self.cost),
            "accuracy": self.accuracy,
            "reason": self.reason,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Outcome:
        """Reads what `to_dict` returned; raises like `Score.from_dict`."""
        return cls(
            data["status"],
            data["accuracy"],
            tuple(map(Score.from_dict, data["scores"])),
            data["reason"],
            Cost(**data["cost"]),
        )

    def as_error(self) -> Exception:
        """The error to raise where the caller can't go on without scores."""
        if self.status == "infeasible":
            return ModelError(self.reason)
        last = (self.reason.strip().splitlines() or ["no reason given"])[-1]
        kind, _, sentence = last.partition(": ")
        is_task = kind.rpartition(".")[2] == TaskError.__name__
        return TaskError(sentence) if is_task else RuntimeError(last)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A row of the archive.

    Attributes:
        number: 1 for the first evaluation of the run, and so on.
        recipe: what was evaluated.
        documents: which documents: "search", "holdout", or a name with a digest of them.
        outcome: the result.
        parameters: parameter count of the stitched model.
        arms: the control arms that led to this recipe; empty for a child of the search.
        finished_at: Unix time in seconds.
    """

    number: int
    recipe: Recipe
    documents: str
    outcome: Outcome
    parameters: int
    arms: tuple[str, ...]
    finished_at: float
