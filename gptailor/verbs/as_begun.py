"""What a configuration means in its output folder: choices that a run makes when it begins."""

from __future__ import annotations

from pathlib import Path

from gptailor.config import Config, RepairSpace
from gptailor.run.layout import CONFIG
from gptailor.run.resume import began_without_repair


def as_begun(config: Config) -> Config:
    """The configuration with the choices that a run makes when it begins.

    Automatic repairs are off if the run in the output folder was begun without them. With repairs
    a holdout has one more task, once its text exists, and there is one more candidate, unless there
    is nothing to merge, or the space has a merge method that needs statistics of every candidate.

    Raises:
        UsageError: a candidate has the name of the one that would be made, or a repair has nothing
            to read.
    """
    from gptailor.evaluation.repair.settings import planned_repair

    if config.space.repair == "auto" and began_without_repair(Path(config.output) / CONFIG):
        return config.without_repair()
    asked = config.space.repair
    wants_refit = not isinstance(asked, RepairSpace) or asked.refit
    if config.space.merge.calibrated:  # it would have no statistics
        wants_refit = False
    if planned_repair(config) is None:
        return config
    if Path(config.own_texts[1]).exists():
        config = config.with_language()
    return config.with_refit() if wants_refit and len(config.models) > 1 else config
