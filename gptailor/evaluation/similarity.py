"""Measures how much a dense candidate's layers change their input, for control arms.

Shapes: B sequences, T tokens, H hidden size, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptailor.errors import ModelError
from gptailor.recipe import dense_recipe

if TYPE_CHECKING:
    import torch

    from gptailor.evaluation.lm import ResidentLM
    from gptailor.evaluation.resident import ResidentModel
    from gptailor.evaluation.workload import Workload

NUM_SEQUENCES = 128
"""How many contexts are measured: Block Influence is stable from a few dozen on."""

BATCH_SIZE = 16


def _check_states(resident: ResidentModel, lm: ResidentLM) -> None:
    """Raises a `ModelError` unless each layer gets one state per token of a sequence."""
    import torch

    from gptailor.evaluation.repair.replay import split

    shapes: list[torch.Size] = []
    hooks = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs: shapes.append(split(args, kwargs)[0].shape),
            with_kwargs=True,
        )
        for module in resident.layers()
    ]
    try:
        with torch.inference_mode():  # 1 sequence, 2 tokens: shows which dimension is first
            lm.hidden_states_only(torch.zeros(1, 2, dtype=torch.long, device=lm.device))
    finally:
        for hook in hooks:
            hook.remove()
    for shape in shapes:
        if len(shape) != 3 or shape[:2] != (1, 2):
            raise ModelError(
                f"{resident.family.base.folder}: the layers of this architecture pass on states of "
                f"shape {list(shape)} for one sequence of two tokens, so their effect can't "
                "be measured: leave block_influence, angular and uniform out of search.arms."
            )


@dataclass(frozen=True)
class Similarity:
    """How much the layers of one dense candidate change their input.

    Attributes:
        block_influence: for each layer 1 − E[cos(x, y)] of its input x and output y; shape (L,).
        angular: [i][j]: arccos(cos(x, y)) / π between the input x of layer i and that of layer j
            (j = L: the last output), at the last token; shape (L + 1, L + 1).
    """

    block_influence: tuple[float, ...]
    angular: tuple[tuple[float, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: each attribute under its name."""
        return {"block_influence": self.block_influence, "angular": self.angular}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Similarity:
        """Reads what `to_dict` returned."""
        return cls(tuple(data["block_influence"]), tuple(map(tuple, data["angular"])))

    @property
    def is_finite(self) -> bool:
        """Whether all values are finite."""
        rows = (self.block_influence, *self.angular)
        return all(math.isfinite(value) for row in rows for value in row)


def measure(
    resident: ResidentModel,
    lm: ResidentLM,
    workload: Workload,
    model: str,
    dtype: str,
    far: Callable[[int, int], None] = lambda done, of: None,
) -> Similarity:
    """Runs contexts of the search documents through one dense candidate.

    Args:
        resident: holds the candidates; stays assembled as that candidate afterwards.
        lm: encodes the contexts.
        workload: provides the contexts.
        model: the candidate's name.
        dtype: of the recipe.
        far: called with the number of contexts done and the total.

    Returns:
        Block Influence (ShortGPT, eq. 1) and angular distances (Gromov et al., eq. 5).
    """
    import torch
    import torch.nn.functional as F

    from gptailor.evaluation.repair.replay import hidden_state, split

    family = resident.family
    resident.assemble(dense_recipe(family.refs, family.base_name, model, family.num_layers, dtype))
    _check_states(resident, lm)
    num_layers = family.num_layers
    influence = torch.zeros(num_layers, dtype=torch.float64)
    angular = torch.zeros(num_layers + 1, num_layers + 1, dtype=torch.float64)
    before_BTH: torch.Tensor | None = None  # input of the layer below
    last_LBH: list[torch.Tensor] = []
    real_BT = lengths_B = torch.empty(0)

    def look(state_BTH: torch.Tensor) -> None:
        nonlocal before_BTH
        state_BTH = state_BTH.float().to(lm.device)  # layers may be on several devices
        if before_BTH is not None:
            cosine_BT = F.cosine_similarity(before_BTH, state_BTH, dim=-1)
            influence[len(last_LBH) - 1] += ((1.0 - cosine_BT) * real_BT).sum().double().cpu()
        rows = torch.arange(len(state_BTH), device=state_BTH.device)
        last_LBH.append(state_BTH[rows, lengths_B - 1].double())
        before_BTH = state_BTH

    def look_at_input(module: Any, args: Any, kwargs: Any) -> None:
        look(split(args, kwargs)[0])

    def look_at_output(module: Any, args: Any, output: Any) -> None:
        look(hidden_state(output))

    modules = resident.layers()
    hooks = [m.register_forward_pre_hook(look_at_input, with_kwargs=True) for m in modules]
    hooks.append(modules[-1].register_forward_hook(look_at_output))
    sequences = sorted(workload.contexts(lm, NUM_SEQUENCES), key=len)
    batch_size = min(BATCH_SIZE, int(lm.batch_size))
    try:
        for begin in range(0, len(sequences), batch_size):
            far(begin, len(sequences))
            batch = sequences[begin : begin + batch_size]
            length = len(batch[-1])
            lengths_B = torch.tensor([len(tokens) for tokens in batch], device=lm.device)
            real_BT = torch.arange(length, device=lm.device) < lengths_B[:, None]
            padded = [tokens + [0] * (length - len(tokens)) for tokens in batch]
            before_BTH = None
            last_LBH.clear()
            with torch.inference_mode():
                lm.hidden_states_only(torch.tensor(padded, device=lm.device))
            unit_BLH = F.normalize(torch.stack(last_LBH), dim=-1).transpose(0, 1)
            angles_BLL = torch.arccos((unit_BLH @ unit_BLH.transpose(1, 2)).clamp(-1, 1))
            angular += angles_BLL.sum(0).cpu() / math.pi
    finally:
        for hook in hooks:
            hook.remove()
    return Similarity(
        tuple((influence / sum(map(len, sequences))).tolist()),
        tuple(map(tuple, (angular / len(sequences)).tolist())),
    )
