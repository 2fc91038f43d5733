"""Opens a family for computing: reads files first, and asks transformers only where they leave
something open.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gptailor.config import Config
from gptailor.evaluation.agreement import compare_configs, note
from gptailor.evaluation.lazy_reader import LazyReader
from gptailor.evaluation.tokenizers import compare_tokenizers
from gptailor.models.calibration import Calibration
from gptailor.models.config_fields import ABSENT, differences
from gptailor.models.family import Family


def open_family(
    models: Mapping[str, str],
    base: str,
    io: str | None = None,
    *,
    folders: Mapping[str, Path] = {},
) -> Family:
    """Opens the candidates and checks that a layer of one can replace that layer of another.

    The arguments are those of `Family`; its `notes` report differences without effect.

    Raises:
        ModelError: a candidate is unusable, or does not fit the base.
        UsageError: the base is not among the models, or there is no such `io`.
    """
    family = Family(models, base, io, folders=folders, reader=LazyReader())
    for name in sorted(family.open_tokenizers):
        compare_tokenizers(family.candidates[name], family.base)
    notes = []
    for candidate in family.candidates.values():
        if candidate.name in family.open_configs:
            harmless = compare_configs(candidate, family.base)
        else:
            found = differences(candidate.config, family.base.config)
            harmless = [d for d in found if ABSENT not in (d.value, d.base_value)]
        notes.append(note(candidate, harmless))
    family.settle(filter(None, notes))
    return family


def find_calibration(config: Config, family: Family) -> Calibration | None:
    """The statistics of every model that a search needs; None if its methods need none.

    Raises:
        UsageError: a model's statistics are missing.
        ModelError: statistics are corrupt, or belong to other weights.
    """
    methods = config.space.merge.calibrated
    if config.calibration is None or not methods:
        return None
    for candidate in family.candidates.values():
        for method in methods:
            candidate.statistics(config.calibration, method)
    needed = [(method, name) for method in methods for name in config.models]
    return Calibration(config.calibration).found(needed)
