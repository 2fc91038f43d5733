"""The repair of a search's recipes, as its configuration asks for it."""

from __future__ import annotations

from dataclasses import replace

from gptailor.config import AUTO, Config, RepairSpace
from gptailor.errors import UsageError
from gptailor.recipe.repair import (
    BY_TASK,
    DEFAULT_DOCUMENTS,
    DEFAULT_RIDGE,
    TEXT,
    CalibrationDocuments,
    CalibrationTask,
    Repair,
    RepairedLayers,
)

FRONT_DOCUMENTS = 128
"""Of each task, for repairs of the front."""


def is_automatic(config: Config) -> bool:
    """Whether the search goes on without repairs if there is nothing for them to read."""
    return config.space.repair == "auto"


def planned_repair(config: Config) -> Repair | None:
    """The repair of all recipes of a search, before teachers are chosen; None for none.

    It reads the documents that come after those that are scored, in the same seeded order.

    Raises:
        UsageError: there is nothing to read.
    """
    asked, evaluation = config.space.repair, config.evaluation
    rung = evaluation.rungs[-1] if evaluation.rungs else None
    if asked is False or (asked == "auto" and rung is None):
        return None
    space = asked if isinstance(asked, RepairSpace) else RepairSpace()
    given = space.calibration
    specs = {spec.task: spec.num_fewshot for spec in evaluation.tasks}
    names = tuple(specs) if given.tasks is None else given.tasks
    if given.tasks is None and rung is None:  # every document is scored
        names = ()
    if not names and given.text in (AUTO, False):
        raise UsageError(
            "space.repair has nothing to read, as every document is scored: set evaluation.rungs, "
            "or name tasks or a text in space.repair.calibration."
        )
    calibration = CalibrationDocuments(
        tasks=tuple(CalibrationTask(name, specs.get(name)) for name in names),
        include_path=given.include_path or evaluation.include_path,
        documents=given.documents or (rung and -(-rung // 2)) or DEFAULT_DOCUMENTS,
        skip=rung or 0 if set(names) <= set(specs) else 0,
        seed=config.search.seed,
        apply_chat_template=evaluation.apply_chat_template,
        fewshot_as_multiturn=evaluation.fewshot_as_multiturn,
        system_instruction=evaluation.system_instruction,
        text=config.own_texts[0] if given.text == AUTO else given.text or None,
        tokens=given.tokens,
    )
    teachers = space.teachers
    is_final = given.front is False
    return Repair(
        calibration,
        _layers(space, "after" if is_final else "alternate"),
        teachers if isinstance(teachers, str) else tuple(teachers.items()),
        DEFAULT_RIDGE if space.ridge == "auto" else space.ridge,
        "" if evaluation.dtype == "auto" else evaluation.dtype,
    )


def front_repair(config: Config) -> Repair | None:
    """The repair of a search's best recipes, once it has ended, and of the refitted candidate.

    It reads what `planned_repair` reads and more, and fits more layers; None if there is none, or
    if it is the same.

    Raises:
        UsageError: as for `planned_repair`.
    """
    planned, asked = planned_repair(config), config.space.repair
    if planned is None:
        return None
    space = asked if isinstance(asked, RepairSpace) else RepairSpace()
    front, calibration = space.calibration.front, planned.calibration
    if front is False:
        return None
    documents = front.documents or FRONT_DOCUMENTS * len(calibration.tasks)
    more = replace(
        calibration,
        documents=max(documents, calibration.documents),
        tokens=max(front.tokens, calibration.tokens),
    )
    better = replace(planned, calibration=more, layers=_layers(space, "after"))
    return None if better == planned else better


def _layers(space: RepairSpace, automatic: RepairedLayers) -> RepairedLayers:
    return automatic if space.layers == AUTO else space.layers


def with_teachers(repair: Repair, best: dict[str, str], base: str) -> Repair:
    """The repair with each task's best dense candidate as its teacher, if they are known.

    Args:
        repair: of a search.
        best: task → its best dense candidate.
        base: teaches the text.
    """
    groups = repair.calibration.groups
    known = {**best, TEXT: base}
    if repair.teachers != BY_TASK or not all(group in known for group in groups):
        return repair
    return replace(repair, teachers=tuple((group, known[group]) for group in groups))
