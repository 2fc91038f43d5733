"""The schema of journal lines: pydantic models of each kind, with bounds on everything.

Others can write to the file system with the journals, so a line may be eight megabytes of anything.
Pydantic collects all errors, each larger than the wrong value itself, so the models also bound
their number.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from gptailor.evaluation.outcome import Documents, Status

MAX_REASON_CHARS = 20_000
"""Only the end of a longer traceback is kept: it says the most."""

MAX_VALUES_CHARS = 1 << 20
"""An evaluation with more is written without its documents' values. This is enough for six million
binary values or 98,000 others, and takes an acceptable amount of memory."""

MAX_NAME_CHARS = 1000
MAX_LAYERS = 100_000
MAX_MODELS = 10_000
_MAX_INT = (1 << 62) - 1


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("it has characters that can't be shown")
    return text


def _no_huge_int(value: object) -> object:
    if type(value) is int and abs(value) > _MAX_INT:
        raise ValueError("an integer may have at most 62 bits")
    return value


def _few(models: object) -> object:
    if isinstance(models, dict) and len(models) > MAX_MODELS:
        raise ValueError(f"it has more than {MAX_MODELS:,} models")
    return models


# Only scalars are strict: a strict tuple would refuse JSON's lists. Of JSON's types only a list
# becomes a tuple.
T = TypeVar("T")
_List = Annotated[tuple[T, ...], FailFast()]
_Text = Annotated[str, Field(strict=True, max_length=MAX_NAME_CHARS), AfterValidator(_printable)]
_Count = Annotated[int, Field(strict=True, ge=0, le=_MAX_INT)]
_Real = Annotated[float, Field(strict=True), BeforeValidator(_no_huge_int)]
_Finite = Annotated[float, Field(strict=True, allow_inf_nan=False), BeforeValidator(_no_huge_int)]
_OfModels = Annotated[dict[_Text, T], BeforeValidator(_few)]


class Line(BaseModel):
    """A JSON object with exactly these keys."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _has_one_unknown_key(cls, data: object) -> object:
        """Passes on only one of the unknown keys, for pydantic to refuse."""
        fields = cls.model_fields
        if not isinstance(data, dict) or len(data) <= len(fields):
            return data
        unknown = next(key for key in data if key not in fields)
        return {unknown: None, **{key: data[key] for key in fields if key in data}}


class _Search(BaseModel):
    evaluations: _Count = 0


class _Config(BaseModel):
    """The part of another island's configuration that is read; it may have more keys."""

    search: _Search = _Search()


class _Family(Line):
    num_layers: Annotated[_Count, Field(le=MAX_LAYERS)]
    models: _OfModels[_Text]
    parameters: _OfModels[_Count]


class HeaderLine(Line):
    """A `Header`, without `schema`."""

    island: _Count
    count: _Count
    config: _Config
    fingerprint: _Text
    documents: _Text
    family: _Family


class _Score(Line):
    task: _Text
    metric: _Text
    value: _Real | None  # None: not finite
    stderr: _Real | None
    num_documents: _Count
    weight: _Finite
    # keys that earlier versions did not write have defaults
    values: Annotated[
        str, Field(strict=True, max_length=MAX_VALUES_CHARS), AfterValidator(_printable)
    ] = ""
    leaves: _List[tuple[_Count, _Finite]] = ()
    chance: _Finite | None = None


class _Cost(Line):
    seconds: _Finite
    assemble_s: _Finite
    forward_s: _Finite
    num_documents: _Count
    num_tokens: _Count


class EvaluationLine(Line):
    """An `Evaluation`; `Recipe.from_dict` checks `recipe`."""

    recipe: Any
    documents: Documents
    parameters: _Count
    arms: _List[_Text]
    finished_at: _Finite
    status: Status
    scores: _List[_Score]
    cost: _Cost
    accuracy: _Finite | None
    reason: Annotated[str, Field(strict=True, max_length=MAX_REASON_CHARS)]

    @field_validator("scores")
    @classmethod
    def _fit_into_memory(cls, scores: tuple[_Score, ...]) -> tuple[_Score, ...]:
        if sum(len(score.values) for score in scores) > MAX_VALUES_CHARS:
            raise ValueError(f"they have more than {MAX_VALUES_CHARS:,} characters of values")
        return scores

    @field_validator("accuracy")
    @classmethod
    def _only_if_ok(cls, accuracy: float | None, info: ValidationInfo) -> float | None:
        if accuracy is not None and info.data.get("status") != "ok":
            raise ValueError("only the status 'ok' has an accuracy")
        return accuracy


class SimilarityLine(Line):
    """A `Measured`."""

    model: _Text
    block_influence: _List[_Finite]
    angular: _List[_List[_Finite]]

    @field_validator("angular")
    @classmethod
    def _fits(
        cls, angular: tuple[tuple[float, ...], ...], info: ValidationInfo
    ) -> tuple[tuple[float, ...], ...]:
        num_layers = len(info.data.get("block_influence", ()))
        if {len(angular), *map(len, angular)} != {num_layers + 1}:
            raise ValueError(f"it has the wrong shape for {num_layers} layers")
        return angular


class BegunLine(Line):
    """A `Begun`."""

    keys: _List[tuple[_Text, _Text]]


class ClosedLine(Line):
    """A `Closed`."""


LINES: dict[str, type[Line]] = {
    "header": HeaderLine,
    "evaluation": EvaluationLine,
    "similarity": SimilarityLine,
    "begun": BegunLine,
    "closed": ClosedLine,
}
