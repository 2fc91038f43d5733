"""What the repairs of a search read, and how much memory one takes, found without weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from gptailor.evaluation.footprint import widths
from gptailor.evaluation.repair.reading import Reading
from gptailor.evaluation.repair.solve import EXACT_BELOW, needed_bytes
from gptailor.evaluation.repair.widths import find_widths
from gptailor.models.architecture import text_config
from gptailor.models.checkpoint import DTYPE_BITS
from gptailor.models.family import Family
from gptailor.recipe import DTYPES
from gptailor.recipe.repair import Repair


@dataclass(frozen=True)
class RepairFootprint:
    """The size of one repair; sizes are in bytes.

    Attributes:
        documents: how many documents of tasks are read.
        tokens: how many tokens count, those of a text included.
        run_tokens: how many go through a layer, padding and common beginnings included.
        width: inputs of the projection that is fitted, in the widest layer.
        system: the equations of that layer, with their factor.
        states: what enters and leaves a layer, and the projections' inputs, for all tokens; for one
            batch also as they are added to the equations.
        teachers: the states of the teachers at every depth, on the host.
    """

    documents: int
    tokens: int
    run_tokens: int
    width: int
    system: int
    states: int
    teachers: int

    @property
    def on_device(self) -> int:
        """What one repair takes where the layer is."""
        return self.system + self.states


def find_repair_footprints(
    family: Family,
    shell: nn.Module,
    stack: str,
    repairs: Sequence[tuple[Repair, Reading]],
    dtype: str,
) -> list[RepairFootprint]:
    """The footprints of a search's repairs.

    Args:
        family: the opened candidates.
        shell: their model on the meta device.
        stack: the path of its layers.
        repairs: how recipes are repaired, and what that reads.
        dtype: of the forward pass.
    """
    if not repairs:
        return []
    hidden, _ = widths(text_config(family.base.config))
    width = max(find_widths(shell, stack, hidden))
    return [_footprint(family, hidden, width, *one, dtype) for one in repairs]


def _footprint(
    family: Family, hidden: int, width: int, repair: Repair, reading: Reading, dtype: str
) -> RepairFootprint:
    item = DTYPE_BITS[DTYPES[dtype]] // 8
    exact = 8 if repair.ridge < EXACT_BELOW else 4
    batch = max(b.input_BT.numel() for b in reading.batches)
    return RepairFootprint(
        documents=reading.num_documents,
        tokens=reading.num_tokens,
        run_tokens=reading.num_run,
        width=width,
        system=needed_bytes(width, hidden, reading.num_tokens, repair.ridge),
        states=reading.num_run * (2 * hidden + width) * item + batch * width * (8 + exact),
        teachers=reading.num_tokens * hidden * (family.num_layers + 1) * item,
    )
