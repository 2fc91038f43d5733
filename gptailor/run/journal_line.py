"""A line of a journal: a JSON object with one key, the kind of the entry, and its value.

A journal's reader did not write it, so `journal_schema` checks every value of a line before an
entry is made from it.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gptailor.errors import ModelError, UsageError, plain
from gptailor.evaluation.outcome import Evaluation, Outcome
from gptailor.evaluation.similarity import Similarity
from gptailor.models.untrusted import check_depth, parse_json, shown
from gptailor.recipe import KnownLayers, Recipe
from gptailor.run.journal_entry import Begun, Closed, Entry, Header, Measured
from gptailor.run.journal_schema import (
    LINES,
    MAX_REASON_CHARS,
    MAX_VALUES_CHARS,
    BegunLine,
    EvaluationLine,
    HeaderLine,
    SimilarityLine,
)

SCHEMA = "gptailor/journal/1"


def to_line(entry: Entry) -> bytes:
    """Encodes an entry as one line, with its line end."""
    match entry:
        case Header():
            kind, value = "header", {"schema": SCHEMA, **asdict(entry)}
        case Evaluation():
            kind, value = "evaluation", _evaluation_dict(entry)
        case Measured():
            kind, value = "similarity", {"model": entry.model, **entry.similarity.to_dict()}
        case Begun():
            kind, value = "begun", {"keys": entry.keys}
        case Closed():
            kind, value = "closed", {}
    return json.dumps({kind: value}, separators=(",", ":")).encode() + b"\n"


def _evaluation_dict(evaluation: Evaluation) -> dict[str, Any]:
    outcome = evaluation.outcome.to_dict()
    scores, accuracy = outcome["scores"], outcome["accuracy"]
    if sum(len(score["values"]) for score in scores) > MAX_VALUES_CHARS:
        scores = [{**score, "values": "", "leaves": ()} for score in scores]
    return {
        "recipe": evaluation.recipe.to_dict(),
        "documents": evaluation.documents,
        "parameters": evaluation.parameters,
        "arms": evaluation.arms,
        "finished_at": evaluation.finished_at,
        **outcome,
        "scores": scores,
        "accuracy": None if accuracy is None or not math.isfinite(accuracy) else accuracy,
        "reason": outcome["reason"][-MAX_REASON_CHARS:].encode(errors="replace").decode(),
    }


def from_line(line: bytes, path: Path, number: int, known: KnownLayers | None = None) -> Entry:
    """Reads a whole line.

    Args:
        line: without its end.
        path: the journal, for errors.
        number: of the line, for errors; the first one must be a header.
        known: layers of earlier lines.

    Raises:
        UsageError: it is not a line of a journal.
    """
    where = f"{path}, line {number},"
    try:
        data = parse_json(line, path, f"line {number}", unique=True)
        check_depth(data, path)
    except ModelError as error:
        raise UsageError(str(error)) from error
    kind = next(iter(data), "")
    if number == 1 and kind != "header":
        raise UsageError(f"{path} is not an island's journal: its first line is not a header.")
    if len(data) != 1 or kind not in LINES:
        raise UsageError(f"{where} is not a line of a journal.")
    value = data[kind]
    if kind == "header" and isinstance(value, dict):
        schema = value.pop("schema", None)
        if schema != SCHEMA:
            raise UsageError(f"{where} has schema {shown(schema)}, but {SCHEMA!r} is needed.")
    try:
        checked = LINES[kind].model_validate(value)
    except ValidationError as error:
        raise _explained(error, where, kind) from error
    match checked:
        case HeaderLine():
            return Header(**value)
        case EvaluationLine():
            return _to_evaluation(checked, where, known)
        case SimilarityLine():
            return Measured(checked.model, Similarity.from_dict(checked.model_dump()))
        case BegunLine():
            return Begun(checked.keys)
        case _:
            return Closed()


def _to_evaluation(checked: EvaluationLine, where: str, known: KnownLayers | None) -> Evaluation:
    try:
        outcome = Outcome.from_dict(checked.model_dump(exclude={"recipe"}))
    except ValueError as error:  # values of documents that can't be decoded
        raise UsageError(f"{where} evaluation.scores has wrong values: {error}.") from error
    for i, score in enumerate(outcome.scores):
        counts, weights = [n for n, _ in score.leaves], [w for _, w in score.leaves]
        if score.leaves and (
            sum(counts) != len(score.values)
            or min(counts) == 0
            or min(weights) < 0.0
            or abs(sum(weights) - 1.0) > 1e-6
        ):
            raise UsageError(
                f"{where} evaluation.scores.{i}.leaves don't fit the {len(score.values)} values."
            )
    return Evaluation(
        number=0,
        recipe=Recipe.from_dict(checked.recipe, f"{where} recipe", known),
        documents=checked.documents,
        outcome=outcome,
        parameters=checked.parameters,
        arms=checked.arms,
        finished_at=checked.finished_at,
    )


def _explained(error: ValidationError, where: str, kind: str) -> UsageError:
    """One sentence for pydantic's first complaint."""
    first = error.errors(include_url=False)[0]
    key = plain(".".join(map(str, (kind, *first["loc"]))), 200)
    match first["type"]:
        case "missing":
            return UsageError(f"{where} the key {key} is missing.")
        case "extra_forbidden":
            return UsageError(f"{where} the key {key} is unknown.")
        case "model_type" | "dict_type":
            wrong = "must be an object"
        case "tuple_type":
            wrong = "must be a list"
        case _:
            wrong = str(first.get("ctx", {}).get("error") or first["msg"])
            wrong = wrong[:1].lower() + wrong[1:]
    return UsageError(f"{where} {key} is {shown(first['input'])}: {wrong}.")
