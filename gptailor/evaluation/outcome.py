"""How an evaluation ended: scores, cost and outcome as values, and the archive's row of them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from gptailor.errors import ModelError, TaskError
from gptailor.evaluation import document_values
from gptailor.recipe import Recipe

Status = Literal["ok", "infeasible", "failed"]
Documents = Literal["search", "holdout"]


@dataclass(frozen=True, slots=True)
class Score:
    """What one task (or group) gave for one recipe.

    Attributes:
        task: lm-eval's name.
        metric: lm-eval's key, for example "acc,none".
        value: in the metric's own unit; a part of 1 for accuracies.
        stderr: standard error of `value`; None where lm-eval has none.
        num_documents: how many documents it is the mean of.
        weight: the task's weight in the accuracy objective.
        values: of each document, always in the same order, so that two models can be compared
            document by document; empty where `value` is no mean of them.
        leaves: of a group or tag, (number of documents, weight) of each task whose values stand
            one after the other; the weights add up to 1, and `value` is the mean of the tasks'
            means with these weights. Empty for one task: `value` is the mean of `values`.
        chance: what guessing gives on these documents; None where that is not known.
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

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled with short values: workers send them, and a search keeps all that it gets."""
        return score_from_dict, (score_dict(self),)


@dataclass(frozen=True, slots=True)
class Cost:
    """What one evaluation took.

    Attributes:
        seconds: wall-clock time in all.
        assemble_s: from recipe to a model that is ready.
        forward_s: inside the model's forward pass.
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
        accuracy: weighted mean of the scores; None unless "ok".
        scores: one for each task that was asked for.
        reason: why it is infeasible, or the traceback of the crash; its last line names the error.
        cost: what it took.
    """

    status: Status
    accuracy: float | None
    scores: tuple[Score, ...]
    reason: str
    cost: Cost

    def as_error(self) -> Exception:
        """What to raise where nothing can go on without the scores that this has not."""
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
        outcome: how it ended.
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


def score_dict(score: Score) -> dict[str, Any]:
    """A score for JSON, its values as one short text."""
    data = {field.name: getattr(score, field.name) for field in fields(Score)}
    return {**data, "values": document_values.encode(score.values)}


def score_from_dict(data: dict[str, Any]) -> Score:
    """A score as it was written, maybe before it had values, leaves and chance."""
    values = document_values.decode(data.get("values") or "")
    leaves = tuple((count, weight) for count, weight in data.get("leaves", ()))
    return Score(**{**data, "values": values, "leaves": leaves})
