"""What an island's journal says, line by line: JSON objects with one key, the kind of the line.

- `header`: what the island searches; first of all, and again whenever its search was started again.
- `evaluation`: one that ended, whole.
- `similarity`: what the layers of one candidate do.
- `begun`: what is under way now.
- `closed`: the search ended in good order; what was under way is given back.

Whoever reads a journal reads what somebody else wrote, so every value is checked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from gptailor.errors import ModelError, UsageError
from gptailor.evaluation import document_values
from gptailor.evaluation.outcome import (
    Cost,
    Documents,
    Evaluation,
    Outcome,
    Score,
    Status,
    score_dict,
)
from gptailor.evaluation.similarity import Similarity
from gptailor.models.untrusted import check_depth, parse_json, shown
from gptailor.recipe import KnownLayers, Recipe
from gptailor.run.difference import config_difference

SCHEMA = "gptailor/journal/1"

MAX_LINE_BYTES = 1 << 23
"""A recipe of 200 layers with merges of eight models has about 10^5."""

MAX_REASON_CHARS = 20_000
"""Of a longer traceback the end is what says most."""

MAX_VALUES_CHARS = 1 << 20
"""An evaluation with more is told without the values of its documents. It is enough for six million
that are right or wrong, or 98,000 others, and what it takes in memory is bearable."""

MAX_NAME_CHARS = 1000
MAX_LAYERS = 100_000

Key = tuple[str, str]
"""Hash of the recipe and the documents; or a model's name and "similarity"."""


@dataclass(frozen=True)
class Header:
    """What an island searches.

    Attributes:
        island: its number, from 0.
        count: how many islands it was told that there are.
        config: the resolved configuration.
        fingerprint: changes when the model files do.
        documents: changes when tasks or documents do.
        family: depth, folders and parameter counts of the models, for the report.
    """

    island: int
    count: int
    config: Mapping[str, Any]
    fingerprint: str
    documents: str
    family: Mapping[str, Any]

    def check_same(self, theirs: Header, path: Path) -> None:
        """Compares what this island searches with the header in another's journal.

        Raises:
            UsageError: they search something else; it tells the difference.
        """
        different = config_difference(self.config, theirs.config)
        if different:
            raise UsageError(
                f"{path} is the journal of an island with another configuration: {different} "
                "there. Islands of one run search the same: name another output."
            )
        pairs = (
            (self.fingerprint, theirs.fingerprint, "other model files"),
            (self.documents, theirs.documents, "other documents of the tasks"),
        )
        for mine, other, what in pairs:
            if mine != other:
                raise UsageError(
                    f"{path} is the journal of an island with {what} than this one has: islands of "
                    "one run search the same, so name another output."
                )


@dataclass(frozen=True)
class Measured:
    """The similarity of the layers of one model."""

    model: str
    similarity: Similarity


@dataclass(frozen=True)
class Begun:
    """What an island has given to its workers."""

    keys: tuple[Key, ...]


@dataclass(frozen=True)
class Closed:
    """An island's search ended in good order."""


Entry = Header | Evaluation | Measured | Begun | Closed


def to_line(entry: Entry) -> bytes:
    """One line, its end included."""
    match entry:
        case Header():
            kind, value = "header", {"schema": SCHEMA, **asdict(entry)}
        case Evaluation():
            kind, value = "evaluation", _evaluation_dict(entry)
        case Measured():
            kind, value = "similarity", {"model": entry.model, **asdict(entry.similarity)}
        case Begun():
            kind, value = "begun", {"keys": entry.keys}
        case Closed():
            kind, value = "closed", {}
    return json.dumps({kind: value}, separators=(",", ":")).encode() + b"\n"


def from_line(line: bytes, path: Path, number: int, known: KnownLayers | None = None) -> Entry:
    """Reads a whole line.

    Args:
        line: without its end.
        path: the journal, for errors.
        number: of the line, for errors; the first one must be a header.
        known: layers of the lines before.

    Raises:
        UsageError: it is no line of a journal.
    """
    where = f"{path}, line {number},"
    try:
        data = parse_json(line, path, f"line {number}", unique=True)
        check_depth(data, path)
        kind = next(iter(data), None)
        if number == 1 and kind != "header":
            raise UsageError(f"{path} is no journal of an island: its first line is no header.")
        if len(data) != 1 or kind not in _READERS:
            raise UsageError(f"{where} is no line of a journal.")
        value = _object(data[kind], where)
        if kind == "evaluation":
            return _read_evaluation(value, where, known)
        return _READERS[kind](value, where)
    except ModelError as error:
        raise UsageError(str(error)) from error


def _evaluation_dict(evaluation: Evaluation) -> dict[str, Any]:
    outcome, reason = evaluation.outcome, evaluation.outcome.reason
    scores = [score_dict(score) for score in outcome.scores]
    if sum(len(score["values"]) for score in scores) > MAX_VALUES_CHARS:
        scores = [{**score, "values": "", "leaves": ()} for score in scores]
    return {
        "recipe": evaluation.recipe.to_dict(),
        "documents": evaluation.documents,
        "parameters": evaluation.parameters,
        "arms": evaluation.arms,
        "finished_at": evaluation.finished_at,
        "status": outcome.status,
        "scores": scores,
        "cost": asdict(outcome.cost),
        "accuracy": _finite_or_none(outcome.accuracy),
        "reason": reason[-MAX_REASON_CHARS:].encode(errors="replace").decode(),
    }


_EVALUATION_KEYS = {
    "recipe", "documents", "parameters", "arms", "finished_at", *(f.name for f in fields(Outcome)),
}  # fmt: skip


def _read_evaluation(
    data: dict[str, Any], where: str, known: KnownLayers | None = None
) -> Evaluation:
    _check_keys(data, _EVALUATION_KEYS, where)
    status, accuracy, documents = data["status"], data["accuracy"], data["documents"]
    if documents not in get_args(Documents):
        raise UsageError(f"{where} is about the documents {shown(documents)}, which nobody knows.")
    if status not in get_args(Status) or (accuracy is not None and status != "ok"):
        raise UsageError(f"{where} has the status {shown(status)}, or an accuracy in spite of it.")
    outcome = Outcome(
        status,
        None if accuracy is None else _number(accuracy, f"{where} accuracy"),
        _read_scores(data["scores"], f"{where} scores"),
        _text(data["reason"], f"{where} reason", MAX_REASON_CHARS, printable=False),
        _read_cost(data["cost"], f"{where} cost"),
    )
    return Evaluation(
        0,
        Recipe.from_dict(data["recipe"], f"{where} recipe", known),
        documents,
        outcome,
        _count(data["parameters"], f"{where} parameters"),
        tuple(_text(arm, f"{where} arms") for arm in _list(data["arms"], where)),
        _number(data["finished_at"], f"{where} finished_at"),
    )


_NEWER: dict[str, Any] = {"values": "", "leaves": [], "chance": None}
"""What a score lacks that was written before there was such a thing."""


def _read_scores(data: object, where: str) -> tuple[Score, ...]:
    scores = [_NEWER | _object(score, where) for score in _list(data, where)]
    values = [_text(s["values"], f"{where} values", MAX_VALUES_CHARS) for s in scores]
    if sum(map(len, values)) > MAX_VALUES_CHARS:
        raise UsageError(f"{where} have more than {MAX_VALUES_CHARS:,} characters of values.")
    return tuple(_read_score(score, where) for score in scores)


def _read_score(score: dict[str, Any], where: str) -> Score:
    _check_keys(score, {f.name for f in fields(Score)}, where)
    stderr, chance = score["stderr"], score["chance"]
    return Score(
        _text(score["task"], where),
        _text(score["metric"], where),
        _number(score["value"], where, finite=False),
        None if stderr is None else _number(stderr, where, finite=False),
        _count(score["num_documents"], where),
        _number(score["weight"], where),
        *_read_values(score["values"], score["leaves"], where),
        None if chance is None else _number(chance, where),
    )


def _read_values(
    text: str, leaves: object, where: str
) -> tuple[tuple[float, ...], tuple[tuple[int, float], ...]]:
    """What each document gave, and how many of them are which task's."""
    try:
        values = document_values.decode(text)
    except ValueError as error:
        raise UsageError(f"{where} values are {shown(text)}: {error}.") from error
    found = []
    for pair in _list(leaves, f"{where} leaves"):
        match pair:
            case [count, weight]:
                found.append((_count(count, f"{where} leaves"), _number(weight, f"{where} leaves")))
            case _:
                raise UsageError(f"{where} leaves has {shown(pair)} in the place of a pair.")
    counts, weights = [count for count, _ in found], [weight for _, weight in found]
    if found and (
        sum(counts) != len(values)
        or min(counts) == 0
        or min(weights) < 0.0
        or abs(sum(weights) - 1.0) > 1e-6
    ):
        raise UsageError(f"{where} leaves don't fit the {len(values)} values.")
    return values, tuple(found)


def _read_cost(data: object, where: str) -> Cost:
    cost = _object(data, where)
    _check_keys(cost, {f.name for f in fields(Cost)}, where)
    return Cost(
        _number(cost["seconds"], where),
        _number(cost["assemble_s"], where),
        _number(cost["forward_s"], where),
        _count(cost["num_documents"], where),
        _count(cost["num_tokens"], where),
    )


def _read_header(data: dict[str, Any], where: str) -> Header:
    if data.get("schema") != SCHEMA:
        raise UsageError(
            f"{where} has schema {shown(data.get('schema'))}, but {SCHEMA!r} is needed."
        )
    _check_keys(data, {"schema", *(f.name for f in fields(Header))}, where)
    config = _object(data["config"], f"{where} config")
    search = _object(config.get("search", {}), f"{where} search")
    _count(search.get("evaluations", 0), f"{where} evaluations")
    return Header(
        _count(data["island"], f"{where} island"),
        _count(data["count"], f"{where} count"),
        config,
        _text(data["fingerprint"], f"{where} fingerprint"),
        _text(data["documents"], f"{where} documents"),
        _read_family(_object(data["family"], f"{where} family"), where),
    )


def _read_family(data: dict[str, Any], where: str) -> dict[str, Any]:
    _check_keys(data, {"num_layers", "models", "parameters"}, where)
    if _count(data["num_layers"], f"{where} num_layers") > MAX_LAYERS:
        raise UsageError(f"{where} has {data['num_layers']} layers, which no model has.")
    for name, folder in _object(data["models"], f"{where} models").items():
        _text(name, f"{where} models")
        _text(folder, f"{where} models")
    for name, count in _object(data["parameters"], f"{where} parameters").items():
        _text(name, f"{where} parameters")
        _count(count, f"{where} parameters")
    return data


def _read_measured(data: dict[str, Any], where: str) -> Measured:
    _check_keys(data, {"model", *(f.name for f in fields(Similarity))}, where)

    def numbers(value: object) -> tuple[float, ...]:
        return tuple(_number(item, where) for item in _list(value, where))

    influence = numbers(data["block_influence"])
    angular = tuple(numbers(row) for row in _list(data["angular"], where))
    sides = {len(angular), *map(len, angular)}
    if sides != {len(influence) + 1}:
        raise UsageError(f"{where} has a similarity of {len(influence)} layers of a wrong shape.")
    return Measured(_text(data["model"], f"{where} model"), Similarity(influence, angular))


def _read_begun(data: dict[str, Any], where: str) -> Begun:
    _check_keys(data, {"keys"}, where)
    keys = []
    for pair in _list(data["keys"], where):
        match pair:
            case [name, documents]:
                keys.append((_text(name, where), _text(documents, where)))
            case _:
                raise UsageError(f"{where} names {shown(pair)}, which is no evaluation.")
    return Begun(tuple(keys))


def _read_closed(data: dict[str, Any], where: str) -> Closed:
    _check_keys(data, set(), where)
    return Closed()


_READERS: dict[str, Callable[[dict[str, Any], str], Entry]] = {
    "header": _read_header,
    "evaluation": _read_evaluation,
    "similarity": _read_measured,
    "begun": _read_begun,
    "closed": _read_closed,
}


def _check_keys(data: Mapping[str, Any], keys: set[str], where: str) -> None:
    if set(data) != keys:
        wrong = sorted(set(data) ^ keys)
        raise UsageError(f"{where} has keys too many or too few: {shown(wrong)}.")


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{where} has {shown(value)} in the place of an object.")
    return value


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise UsageError(f"{where} has {shown(value)} in the place of a list.")
    return value


def _text(value: object, where: str, limit: int = MAX_NAME_CHARS, *, printable: bool = True) -> str:
    if isinstance(value, str) and len(value) <= limit:
        if value.isprintable():
            return value
        if not printable and value.encode(errors="replace").decode() == value:
            return value
    raise UsageError(f"{where} is {shown(value)}, which is no such text.")


def _count(value: object, where: str) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise UsageError(f"{where} is {shown(value)}, which is no count.")
    return value


def _number(value: object, where: str, *, finite: bool = True) -> float:
    if type(value) is int and abs(value) < 1 << 62:
        return float(value)
    if not isinstance(value, float) or (finite and not math.isfinite(value)):
        raise UsageError(f"{where} is {shown(value)}, which is no such number.")
    return value


def _finite_or_none(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
