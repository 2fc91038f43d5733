"""The cost of a run, and its evaluations without a score."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from gptailor.evaluation.outcome import Evaluation

_REASON_CHARS = 160


@dataclass(frozen=True)
class Spent:
    """The cost of several evaluations.

    Attributes:
        documents: the set of documents they were done on.
        evaluations: how many, failed ones included.
        num_documents, num_tokens: answered documents and the tokens in them.
        seconds: wall-clock time summed over evaluations; parallel workers all count.
        assemble_s: the part of it for assembling models.
        forward_s: the part of it inside the model's forward pass.
    """

    documents: str
    evaluations: int = 0
    num_documents: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    assemble_s: float = 0.0
    forward_s: float = 0.0

    @property
    def hours(self) -> float:
        """Worker hours."""
        return self.seconds / 3600.0

    @property
    def forward_share(self) -> float | None:
        """The fraction of time in the model's forward pass; None if no time was measured."""
        return self.forward_s / self.seconds if self.seconds > 0.0 else None


@dataclass(frozen=True)
class Problem:
    """Evaluations that gave no score for the same reason.

    Attributes:
        status: "failed" or "infeasible".
        reason: one line.
        count: how many there are.
        number: of the first one.
        text: the first one's full reason in the archive; for a crash, its traceback.
    """

    status: str
    reason: str
    count: int
    number: int
    text: str


def spent(rows: Iterable[Evaluation]) -> tuple[Spent, ...]:
    """The cost for each set of documents, in the order in which they were first used."""
    sums: dict[str, Spent] = {}
    for row in rows:
        cost, old = row.outcome.cost, sums.get(row.documents, Spent(row.documents))
        new = Spent(
            row.documents,
            1,
            cost.num_documents,
            cost.num_tokens,
            cost.seconds,
            cost.assemble_s,
            cost.forward_s,
        )
        sums[row.documents] = _add(old, new)
    return tuple(sums.values())


def total(parts: Iterable[Spent]) -> Spent:
    """The sum of several costs."""
    result = Spent("all")
    for part in parts:
        result = _add(result, part)
    return result


def problems(rows: Iterable[Evaluation]) -> tuple[Problem, ...]:
    """Evaluations without a score, grouped by status and the reason's most telling line."""
    found: dict[tuple[str, str], Problem] = {}
    for row in rows:
        status, text = row.outcome.status, row.outcome.reason
        if status == "ok":
            accuracy = row.outcome.accuracy
            if accuracy is not None and math.isfinite(accuracy):
                continue
            status, text = "failed", "the accuracy is not a number"
        reason = _one_line(text)
        old = found.get((status, reason), Problem(status, reason, 0, row.number, text))
        found[status, reason] = Problem(status, reason, old.count + 1, old.number, old.text)
    return tuple(sorted(found.values(), key=lambda p: (-p.count, p.number)))


def _one_line(text: str) -> str:
    """The exception of the last traceback in a text, or its last line without a traceback."""
    lines = [line for line in text.splitlines() if line.strip()] or ["no reason given"]
    starts = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent")]
    after = lines[starts[-1] + 1 :] if starts else []
    reason = next((line for line in after if not line[0].isspace()), lines[-1]).strip()
    return reason if len(reason) <= _REASON_CHARS else reason[: _REASON_CHARS - 1] + "…"


def _add(a: Spent, b: Spent) -> Spent:
    return Spent(
        a.documents,
        a.evaluations + b.evaluations,
        a.num_documents + b.num_documents,
        a.num_tokens + b.num_tokens,
        a.seconds + b.seconds,
        a.assemble_s + b.assemble_s,
        a.forward_s + b.forward_s,
    )
