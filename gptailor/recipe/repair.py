"""How a recipe's cuts are repaired: pure data. `evaluation.repair` computes what it describes.

A cut leaves later layers with inputs that they never saw. A repair replaces the projections that
write to the residual stream, in some layers, by the solution of a least-squares problem: their
outputs on calibration documents shall bring the stream to where a teacher's is at the same depth.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from gptailor.errors import UsageError, unknown
from gptailor.models.untrusted import home_expanded
from gptailor.recipe.entry import as_mapping

RepairedLayers = Literal["gaps", "alternate", "after", "all"]

BY_TASK = "task"
"""As `Repair.teachers`: for each task the dense candidate that does it best."""

UNCUT = "merge"
"""As `Repair.teachers`: the recipe's own layers, without the cuts."""

TEXT = "text"
"""The group of calibration documents that come from a text, among the tasks' names."""

VERSION = 2
"""Of what a repair computes: results of other versions have other hashes."""

DEFAULT_RIDGE = 0.3
DEFAULT_DOCUMENTS = 192
DEFAULT_TOKENS = 4096


@dataclass(frozen=True)
class CalibrationTask:
    """A task of lm-eval whose documents a repair reads.

    Attributes:
        task: lm-eval's name of a task, group or tag.
        num_fewshot: examples in the context; None for the task's own number.
    """

    task: str
    num_fewshot: int | None = None


@dataclass(frozen=True)
class CalibrationDocuments:
    """What models read while a repair is computed; no answer's correctness is used.

    Attributes:
        tasks: the tasks; empty for none.
        include_path: a folder with the user's own tasks.
        documents: how many in all, spread evenly over the tasks.
        skip: how many documents in the seeded order come before: those that a search scores.
        seed: of the order.
        apply_chat_template, fewshot_as_multiturn, system_instruction: as in lm-eval.
        text: a file whose lines are documents, or a `.jsonl` whose objects have a `text`.
        tokens: how much of the text is read, at most.
        digest: of all token sequences (16 hex digits); "" if not known yet.
    """

    tasks: tuple[CalibrationTask, ...] = ()
    include_path: str | None = None
    documents: int = DEFAULT_DOCUMENTS
    skip: int = 0
    seed: int = 0
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = False
    system_instruction: str | None = None
    text: str | None = None
    tokens: int = DEFAULT_TOKENS
    digest: str = ""

    @property
    def groups(self) -> tuple[str, ...]:
        """The names of the tasks, and `TEXT` if there is a text."""
        return (*(one.task for one in self.tasks), *([TEXT] if self.text is not None else []))

    def to_dict(self) -> dict[str, Any]:
        """As in `recipe.yaml`, without what has its default value."""
        written: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                written[field.name] = value
        if self.tasks:
            written["tasks"] = [
                one.task
                if one.num_fewshot is None
                else {"task": one.task, "num_fewshot": one.num_fewshot}
                for one in self.tasks
            ]
        return written


@dataclass(frozen=True)
class Repair:
    """How the layers of a recipe are repaired.

    Attributes:
        calibration: what is read.
        layers: "gaps": the layers that stand before a gap; "alternate": from each gap on, also
            every second layer; "after": every layer from the first gap on; "all".
        teachers: `BY_TASK`, `UNCUT`, a model's name, or (task, model) for each group of documents.
        ridge: relative to the mean of the diagonal of the normal equations.
        dtype: of the forward passes, one of `recipe.DTYPES`; "" for whatever computes it.
    """

    calibration: CalibrationDocuments
    layers: RepairedLayers = "all"
    teachers: str | tuple[tuple[str, str], ...] = BY_TASK
    ridge: float = DEFAULT_RIDGE
    dtype: str = ""

    def used_models(self, models: Collection[str]) -> tuple[str, ...]:
        """The models that teach, out of these."""
        if self.teachers == BY_TASK:
            return tuple(models)
        if isinstance(self.teachers, str):
            return () if self.teachers == UNCUT else (self.teachers,)
        return tuple(model for _, model in self.teachers)

    def relative_to(self, folder: Path) -> Repair:
        """The same with paths made absolute, from `folder`."""
        changed: dict[str, Any] = {
            key: str((folder / home_expanded(path)).resolve())
            for key in ("include_path", "text")
            if (path := getattr(self.calibration, key)) is not None
        }
        return replace(self, calibration=replace(self.calibration, **changed))

    def hashed(self, refs: Mapping[str, str]) -> list[Any]:
        """The contents of a recipe's hash: what determines the result, with references as names.

        Documents count by their tokens if these are known, else by where they come from. All models
        count where any of them may become a teacher.
        """
        teachers: Any = self.teachers
        if teachers == BY_TASK:
            teachers = [BY_TASK, sorted(refs.values())]
        elif isinstance(teachers, str):
            teachers = teachers if teachers == UNCUT else refs[teachers]
        else:
            teachers = [[group, refs[model]] for group, model in sorted(teachers)]
        documents = self.calibration.digest or json.dumps(self.calibration.to_dict())
        return [VERSION, self.layers, teachers, self.ridge, self.dtype, documents]

    def to_dict(self) -> dict[str, Any]:
        """As in `recipe.yaml`."""
        teachers = self.teachers if isinstance(self.teachers, str) else dict(self.teachers)
        written: dict[str, Any] = {"layers": self.layers, "teachers": teachers}
        written |= {"ridge": self.ridge, "calibration": self.calibration.to_dict()}
        return written | ({"dtype": self.dtype} if self.dtype else {})


def repaired_layers(
    src_layers: Sequence[int], num_layers: int, layers: RepairedLayers
) -> list[bool]:
    """For each output layer, whether a repair changes it.

    Args:
        src_layers: the source layer of each output layer.
        num_layers: source layers of the family.
        layers: which ones are repaired.
    """
    depths = [*src_layers[1:], num_layers]
    gaps = [depth != src + 1 for src, depth in zip(src_layers, depths, strict=True)]
    if layers == "gaps":
        return gaps
    if layers == "all":
        return [True] * len(gaps)
    latest_gaps = itertools.accumulate((i if gap else -1 for i, gap in enumerate(gaps)), max)
    step = 2 if layers == "alternate" else 1
    return [gap >= 0 and (i - gap) % step == 0 for i, gap in enumerate(latest_gaps)]


def read_repair(
    data: object, models: Collection[str], dtypes: Collection[str], where: str
) -> Repair:
    """Reads the `repair` of a recipe.

    Args:
        data: the parsed YAML.
        models: the recipe's models.
        dtypes: known dtypes.
        where: the place, for errors.

    Raises:
        UsageError: an unknown or missing key, or a value outside its bounds.
    """
    found = dict(as_mapping(data, where))
    _check_keys(found, ("layers", "teachers", "calibration", "ridge", "dtype"), where)
    if "calibration" not in found:
        raise UsageError(
            f"{where}: the key 'calibration' is missing: name tasks or a text whose documents the "
            "repair may read."
        )
    layers = found.get("layers", "all")
    if layers not in get_args(RepairedLayers):
        raise unknown("choice of layers", layers, get_args(RepairedLayers), where)
    calibration = read_calibration_documents(found["calibration"], f"{where}: calibration")
    dtype = found.get("dtype", "")
    if not isinstance(dtype, str) or (dtype and dtype not in dtypes):
        raise unknown("dtype", dtype, dtypes, where)
    return Repair(
        calibration,
        layers,
        _read_teachers(found.get("teachers", BY_TASK), calibration, models, f"{where}: teachers"),
        read_ridge(found.get("ridge", "auto"), where),
        dtype,
    )


def read_ridge(value: object, where: str) -> float:
    """A ridge as a number; `auto` is the default."""
    if value == "auto":
        return DEFAULT_RIDGE
    if not isinstance(value, int | float) or isinstance(value, bool) or not 1e-6 <= value <= 1e6:
        raise UsageError(f"{where}: ridge is {value!r}, but must be auto or from 1e-6 to 1e6.")
    return float(value)


def read_calibration_documents(data: object, where: str) -> CalibrationDocuments:
    """Reads the `calibration` of a repair; raises like `read_repair`."""
    found = dict(as_mapping(data, where))
    _check_keys(found, [field.name for field in fields(CalibrationDocuments)], where)
    tasks = found.pop("tasks", [])
    if not isinstance(tasks, list):
        raise UsageError(f"{where}: tasks must be a list of tasks.")
    read = tuple(_read_task(one, f"{where}: tasks") for one in tasks)
    if len({one.task for one in read}) < len(read):
        raise UsageError(f"{where}: tasks names a task twice.")
    for key, least in (("documents", 1), ("skip", 0), ("seed", 0), ("tokens", 1)):
        value = found.get(key, least)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UsageError(f"{where}: {key} is {value!r}, but must be a number from {least} on.")
    for key in ("apply_chat_template", "fewshot_as_multiturn"):
        if not isinstance(found.get(key, False), bool):
            raise UsageError(f"{where}: {key} must be true or false.")
    if found.get("fewshot_as_multiturn") and not found.get("apply_chat_template"):
        raise UsageError(f"{where}: fewshot_as_multiturn needs apply_chat_template.")
    for key in ("include_path", "system_instruction", "text", "digest"):
        value = found.get(key, "—")
        if not isinstance(value, str) or (key != "system_instruction" and not value.isprintable()):
            raise UsageError(f"{where}: {key} must be text.")
        if key in ("include_path", "text") and not value:
            raise UsageError(f"{where}: {key} is empty, but must name a place.")
    if not read and "text" not in found:
        raise UsageError(f"{where} names neither tasks nor a text.")
    return CalibrationDocuments(read, **found)


def _read_task(data: object, where: str) -> CalibrationTask:
    found = {"task": data} if isinstance(data, str) else dict(as_mapping(data, where))
    _check_keys(found, ("task", "num_fewshot"), where)
    name, shots = found.get("task"), found.get("num_fewshot")
    if not isinstance(name, str) or not name or not name.isprintable() or name == TEXT:
        raise UsageError(f"{where}: {name!r} is not the name of a task.")
    if shots is not None and (not isinstance(shots, int) or isinstance(shots, bool) or shots < 0):
        raise UsageError(f"{where}: num_fewshot is {shots!r}, but must be a number from 0 on.")
    return CalibrationTask(name, shots)


def _read_teachers(
    data: object, calibration: CalibrationDocuments, models: Collection[str], where: str
) -> str | tuple[tuple[str, str], ...]:
    words = (BY_TASK, UNCUT, *models)
    if isinstance(data, str):
        if data not in words:
            raise unknown("teacher", data, words, where)
        return data
    found = as_mapping(data, where)
    for group, model in found.items():
        if group not in calibration.groups:
            raise unknown("task", group, calibration.groups, where)
        if not isinstance(model, str) or model not in models:
            raise unknown("model", model, models, where)
    missing = [group for group in calibration.groups if group not in found]
    if missing:
        raise UsageError(f"{where}: {missing[0]} has no teacher.")
    return tuple((group, found[group]) for group in calibration.groups)


def _check_keys(found: Mapping[str, Any], known: Collection[str], where: str) -> None:
    for key in found:
        if key not in known:
            raise unknown("key", key, known, where)
