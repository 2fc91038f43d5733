"""What a configuration means in its output folder: choices that a run makes when it begins."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptailor.config import Config, RepairSpace
from gptailor.run.layout import CONFIG


def as_begun(config: Config) -> Config:
    """The configuration with the choices that a run makes when it begins.

    Automatic repairs are off if the run in the output folder was begun without them. With repairs
    there is one more candidate, unless there is nothing to merge, or the space has a merge method
    that needs statistics of every candidate.

    Raises:
        UsageError: a candidate has the name of the one that would be made, or a repair has nothing
            to read.
    """
    from gptailor.evaluation.repair.settings import planned_repair

    if config.space.repair == "auto" and _begun_without(Path(config.output) / CONFIG):
        return config.without_repair()
    asked = config.space.repair
    wants_refit = not isinstance(asked, RepairSpace) or asked.refit
    if config.space.merge.calibrated:  # it would have no statistics
        wants_refit = False
    if planned_repair(config) is None or not wants_refit or len(config.models) < 2:
        return config
    return config.with_refit()


def _begun_without(path: Path) -> bool:
    """Whether a run's configuration says that nothing is repaired, as those of earlier versions."""
    from gptailor.strict_yaml import load_yaml, read_text

    if not path.is_file():
        return False
    data: Any = load_yaml(read_text(path), str(path))
    space = data.get("space") if isinstance(data, Mapping) else None
    return not (isinstance(space, Mapping) and space.get("repair", False) is not False)
