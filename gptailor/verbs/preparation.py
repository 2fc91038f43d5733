"""What a search with repairs makes before it begins: texts that the base writes, and one more
candidate, the merge of all variants, refitted to the teachers."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from gptailor.config import REFIT, Config
from gptailor.errors import GptailorError, ModelError, ResourceError, UsageError, is_disk_full
from gptailor.evaluation.family import open_family
from gptailor.files import write_new
from gptailor.merging.registry import TASK_ARITHMETIC
from gptailor.models.untrusted import is_folder
from gptailor.patience import Say, slowly
from gptailor.recipe import Merge, Recipe, dense_recipe, read_recipe
from gptailor.recipe.repair import BY_TASK, Repair
from gptailor.run.layout import ARCHIVE, ISLANDS
from gptailor.verbs.checks import check_space

if TYPE_CHECKING:
    from gptailor.models.family import Family

HOLDOUT_PIECES = 32
"""How much the base writes for the holdout: pieces of `own_text.LENGTH` tokens."""


def prepared(config: Config, io: str | None, note: Say) -> Config:
    """Makes what the search needs and does not exist yet.

    Args:
        config: as the run was begun (`as_begun`).
        io: how weights are read.
        note: takes what the user should know.

    Returns:
        The configuration; with repairs, the perplexity of a text is one more task of a holdout that
        has no text. Without repairs if they are automatic and not possible: no documents are left
        to read, or the architecture or the memory does not allow it.

    Raises:
        UsageError, ModelError, ResourceError: what it needs can't be made.
    """
    from gptailor.evaluation.repair.settings import front_repair, is_automatic, planned_repair

    planned = front_repair(config) or planned_repair(config)
    if planned is None:
        return config
    try:
        _write_texts(config, planned, io, note)
        _make_refit(config, planned, io, note)
    except (UsageError, ModelError, ResourceError) as error:
        if not is_automatic(config):
            raise
        note(f"Nothing is repaired: {error}")
        return config.without_repair()
    return config.with_language()


def refit_recipe(config: Config, planned: Repair, num_layers: int) -> Recipe:
    """Task arithmetic of all variants with λ = 1/√n, between their mean and their sum; every layer
    is refitted, so λ is only where the least squares begin."""
    models = config.own_models
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


def _opened(config: Config, io: str | None, note: Say) -> Family:
    models = config.own_models
    with slowly(f"Opening {len(models)} candidates", note):
        family = open_family(models, config.base, io)
        check_space(config, family)
    return family


def _write_texts(config: Config, planned: Repair, io: str | None, note: Say) -> None:
    """Has the base write the texts that the search needs, unless it has written them before."""
    from gptailor.evaluation.own_text import LENGTH, write_own_text

    calibration, holdout = config.own_texts
    wanted = {}
    if planned.calibration.text == calibration:
        wanted[Path(calibration)] = -(-planned.calibration.tokens // LENGTH)
    measured = config.with_language().evaluation.holdout
    if measured is not None and holdout in [spec.text for spec in measured.tasks]:
        wanted[Path(holdout)] = HOLDOUT_PIECES
    ref = config.models[config.base]
    is_begun = _is_begun(config)
    missing = {
        path: count
        for path, count in wanted.items()
        if not (path.exists() if is_begun else _has_text(path, ref, count))
    }
    if not missing:
        return
    from gptailor.evaluation.devices import give_back_memory

    family = _opened(config, io, note)
    base = config.base
    writer = dense_recipe({base: ref}, base, base, family.num_layers, config.space.dtype)
    try:
        with slowly("Writing a text with the base, for repairs to keep its language", note):
            pieces = write_own_text(
                writer,
                family,
                sum(missing.values()),
                dtype=_dtype(config, family),
                device=config.evaluation.device,
            )
    finally:
        give_back_memory()
    for path, count in missing.items():
        rows = [json.dumps({"text": piece, "by": ref}) for piece in pieces[:count]]
        pieces = pieces[count:]
        try:
            path.unlink(missing_ok=True)
            write_new(path, "".join(f"{row}\n" for row in rows).encode())
        except OSError as error:
            kind = ResourceError if is_disk_full(error) else UsageError
            raise kind(f"{path} can't be written: {error.strerror}.") from error


def _has_text(path: Path, ref: str, num_pieces: int) -> bool:
    """Whether a file holds what a model wrote, about as much as asked for."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return num_pieces // 2 < len(rows) <= num_pieces and all(row["by"] == ref for row in rows)
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _dtype(config: Config, family: Family) -> str:
    """The dtype in which this process computes."""
    from gptailor.evaluation.footprint import held_bytes
    from gptailor.evaluation.forward_dtype import choose, find_ability

    ability = find_ability(config.evaluation.device)
    return choose(config.evaluation.dtype, config.space.dtype, [ability], held_bytes(family)).dtype


def _is_begun(config: Config) -> bool:
    """Whether a search has recorded anything in the output folder."""
    output = Path(config.output)
    return (output / ARCHIVE).exists() or any(output.glob(f"{ISLANDS}/*/{ARCHIVE}"))


def _make_refit(config: Config, planned: Repair, io: str | None, note: Say) -> None:
    """Makes the refitted candidate, unless it is there."""
    if not config.has_refit:
        return
    place = Path(config.models[REFIT])
    from gptailor.evaluation.devices import give_back_memory
    from gptailor.verbs.models import write_stitched

    if is_folder(place) and _is_begun(config):
        return  # its results are recorded
    family = _opened(config, io, note)
    recipe = refit_recipe(config, planned, family.num_layers)
    if is_folder(place):
        if _was_made_from(place, recipe):
            return
        note(f"{REFIT} was made with another configuration: making it again.")
        shutil.rmtree(place)
    note(f"Making one more candidate, {REFIT}: the merge of all variants, refitted.")
    try:
        write_stitched(recipe, family, place, device=config.evaluation.device, note=note)
    except (UsageError, ModelError, ResourceError):
        if not is_folder(place):  # else another island was faster
            raise
    finally:
        give_back_memory()  # workers come next


def _was_made_from(place: Path, recipe: Recipe) -> bool:
    """Whether a stitched folder was made from a recipe, whose repair names no documents yet."""
    from gptailor.stitching.write import RECIPE_FILE

    try:
        found = read_recipe(place / RECIPE_FILE)
    except (GptailorError, OSError):
        return False
    repair, asked = found.repair, recipe.repair
    if repair is None or asked is None:
        return False
    calibration = replace(repair.calibration, digest=asked.calibration.digest)
    teachers = repair.teachers if asked.teachers != BY_TASK else BY_TASK
    open_again = found.with_repair(replace(repair, calibration=calibration, teachers=teachers))
    return open_again.hash == recipe.hash and open_again.models == recipe.models
