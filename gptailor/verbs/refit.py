"""The candidate that a search makes itself: the merge of all variants, refitted to the teachers."""

from __future__ import annotations

import math
from pathlib import Path

from gptailor.config import REFIT, Config
from gptailor.errors import ModelError, ResourceError, UsageError
from gptailor.evaluation.family import open_family
from gptailor.merging.registry import TASK_ARITHMETIC
from gptailor.models.untrusted import is_folder
from gptailor.patience import Say, slowly
from gptailor.recipe import Merge, Recipe
from gptailor.recipe.repair import Repair
from gptailor.verbs.checks import check_space


def with_refit_made(config: Config, io: str | None, note: Say) -> Config:
    """Makes the refitted candidate if the configuration names it and it does not exist yet.

    Args:
        config: the configuration.
        io: how weights are read.
        note: takes what the user should know.

    Returns:
        The same configuration, or one without repairs if they are automatic and not possible: no
        documents are left to read, or the architecture or the memory does not allow it.

    Raises:
        UsageError, ModelError, ResourceError: it can't be made.
    """
    place = Path(config.models.get(REFIT, config.output))
    if REFIT not in config.models or is_folder(place):
        return config
    from gptailor.evaluation.devices import give_back_memory
    from gptailor.evaluation.repair.settings import is_automatic, planned_repair
    from gptailor.verbs.models import write_stitched

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
    except (UsageError, ModelError, ResourceError) as error:
        if is_folder(place):  # another island was faster
            return config
        if not is_automatic(config):
            raise
        note(f"Nothing is repaired: {error}")
        return config.without_repair()
    finally:
        give_back_memory()  # workers come next
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
