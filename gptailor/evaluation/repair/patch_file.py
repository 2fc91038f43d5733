"""Computes the repair of one recipe and writes its weights as a patch for the stitcher."""

from __future__ import annotations

from pathlib import Path

import torch

from gptailor.errors import ModelError, ResourceError
from gptailor.evaluation.casting import as_bytes
from gptailor.evaluation.devices import is_out_of_memory
from gptailor.evaluation.lm import ResidentLM
from gptailor.evaluation.loading import TORCH_DTYPES, load_tokenizer
from gptailor.evaluation.repair.repairs import Repaired, Repairs
from gptailor.evaluation.resident import ResidentModel
from gptailor.models.calibration import writing
from gptailor.models.family import Family
from gptailor.patience import Say
from gptailor.recipe import Recipe
from gptailor.stitching.patch import SCHEMA, Patch, read_patch
from gptailor.stitching.plan import make_plan

BATCH_SIZE = 32


def compute_patch(
    recipe: Recipe,
    family: Family,
    path: Path,
    *,
    dtype: str,
    device: str = "auto",
    says: Say = lambda text: None,
    note: Say = lambda text: None,
) -> tuple[Recipe, Patch]:
    """Computes the repair of a recipe in this process.

    Args:
        recipe: the recipe, with a repair.
        family: the candidates, with all teachers.
        path: the file to write; one that exists is replaced.
        dtype: of the forward passes, unless the repair names one.
        device: as in `search.yaml`.
        says: called with what is being done.
        note: takes what the user should know.

    Returns:
        The recipe with its repair resolved, and the patch.

    Raises:
        UsageError: the calibration documents can't be read.
        ModelError: the repair can't be computed.
        ResourceError: memory or disk is exhausted.
    """
    assert recipe.repair is not None
    try:
        says("loading the base")
        resident = ResidentModel(family, dtype=recipe.repair.dtype or dtype, device=device)
        lm = ResidentLM(resident.model, load_tokenizer(family.base.folder), BATCH_SIZE)
        repairs = Repairs(resident, lm, note=note)
        repaired = repairs.assemble(recipe, says)
    except FloatingPointError as error:
        raise ModelError(f"The repair can't be computed: {error}.") from error
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise ResourceError(
                "Out of memory while the repair was computed: read fewer calibration documents."
            ) from error
        raise
    recipe = recipe.with_repair(repaired.repair)
    weights = repairs.weights(recipe, repaired)
    return recipe, write_patch(recipe, family, path, repaired, weights)


def write_patch(
    recipe: Recipe,
    family: Family,
    path: Path,
    repaired: Repaired,
    weights: dict[str, torch.Tensor],
) -> Patch:
    """Writes repaired weights in the types of the stitched model's files.

    Args:
        recipe: the resolved recipe.
        family: the candidates.
        path: the file; one that exists is replaced.
        repaired: what the repair did.
        weights: as `Repairs.weights` returns them.

    Raises:
        ResourceError: the file can't be written.
    """
    types = {tensor.name: tensor.dtype for tensor in make_plan(recipe, family).tensors}
    metadata = {"schema": SCHEMA, "recipe": recipe.hash, "notes": notes(repaired)}
    shapes = {name: (types[name], tuple(weight.shape)) for name, weight in weights.items()}
    with writing(path, metadata, shapes) as file:
        for name, weight in weights.items():
            file.write(name, as_bytes(weight.to(TORCH_DTYPES[types[name]])))
    return read_patch(path)


def notes(repaired: Repaired) -> str:
    """What a repair did, in Markdown."""
    repair = repaired.repair
    teachers = repair.teachers if isinstance(repair.teachers, str) else dict(repair.teachers)
    if isinstance(teachers, dict):
        teachers = ", ".join(f"{model} ({group})" for group, model in teachers.items())
    lines = [
        "Repaired without training: in the layers below, projections that write to the residual "
        "stream were refitted by least squares, so that the stream follows that of the teachers at "
        f"the same depth. Teachers: {teachers}. Read: {repaired.num_tokens:,} tokens of "
        f"{', '.join(repair.calibration.groups)}. Ridge {repair.ridge:g}.",
        "| output layer | distance to the teachers before | after |\n|--:|--:|--:|\n"
        + "\n".join(
            f"| {error.out_layer} | {error.before:.3f} | {error.after:.3f} |"
            for error in repaired.errors
        ),
    ]
    return "\n\n".join(lines)
