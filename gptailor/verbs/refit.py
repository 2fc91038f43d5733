"""The candidate that a search makes itself: the merge of all variants, refitted to the teachers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptailor.config import REFIT, Config, RepairSpace
from gptailor.errors import UsageError
from gptailor.evaluation.family import open_family
from gptailor.merging.registry import TASK_ARITHMETIC
from gptailor.models.untrusted import is_folder
from gptailor.patience import Say, slowly
from gptailor.recipe import Merge, Recipe
from gptailor.recipe.repair import Repair
from gptailor.run.layout import CONFIG
from gptailor.verbs.checks import check_space


def as_begun(config: Config) -> Config:
    """The configuration with the choices that a run makes when it begins.

    Automatic repairs are off if the run in the output folder was begun without them. With repairs
    there is one more candidate, unless there is nothing to merge.

    Raises:
        UsageError: a candidate has the name of the one that would be made, or a repair has nothing
            to read.
    """
    from gptailor.evaluation.repair.settings import planned_repair

    if config.space.repair == "auto" and _begun_without(Path(config.output) / CONFIG):
        return config.without_repair()
    asked = config.space.repair
    wants_refit = not isinstance(asked, RepairSpace) or asked.refit
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


def with_refit_made(config: Config, io: str | None, note: Say) -> Config:
    """Makes the refitted candidate if the configuration names it and it does not exist yet.

    Args:
        config: the configuration.
        io: how weights are read.
        note: takes what the user should know.

    Returns:
        The same configuration, or one without repairs if they are automatic and the tasks have no
        documents left to read.

    Raises:
        UsageError, ModelError, ResourceError: it can't be made.
    """
    from gptailor.evaluation.repair.settings import is_automatic, planned_repair
    from gptailor.verbs.models import write_stitched

    place = Path(config.models.get(REFIT, config.output))
    if REFIT not in config.models or is_folder(place):
        return config
    planned = planned_repair(config)
    assert planned is not None
    own = {name: ref for name, ref in config.models.items() if name != REFIT}
    with slowly(f"Opening {len(own)} candidates", note):
        family = open_family(own, config.base, io)
        check_space(config, family)
    recipe = refit_recipe(config, planned, family.num_layers)
    note(f"Making one more candidate, {REFIT}: the merge of all variants, refitted.")
    try:
        write_stitched(recipe, family, place, device=config.evaluation.device, note=note)
    except UsageError as error:
        if is_folder(place):  # another island was faster
            return config
        if not is_automatic(config):
            raise
        note(f"Nothing is repaired: {error}")
        return config.without_repair()
    return config


def refit_recipe(config: Config, planned: Repair, num_layers: int) -> Recipe:
    """Task arithmetic of all variants with λ = 1/√n, between their mean and their sum; every layer
    is refitted, so λ is only where the least squares begin."""
    from dataclasses import replace

    models = {name: ref for name, ref in config.models.items() if name != REFIT}
    variants = [name for name in models if name != config.base]
    weight = round(1 / math.sqrt(len(variants)), 3)
    weights = tuple((name, weight) for name in variants)
    values = (("lambda", 1.0), ("normalize", 0.0))
    layers = tuple(
        Merge(TASK_ARITHMETIC.name, src_layer, weights, values) for src_layer in range(num_layers)
    )
    repair = replace(planned, layers="all")
    base = config.base
    return Recipe(models, base, layers, base, base, config.space.dtype, repair=repair)
