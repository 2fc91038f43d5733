"""What the layers of a dense candidate do to their input: the measurements behind control arms.

Shapes: B sequences, T tokens, H hidden size, L layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptailor.recipe import Recipe, Take

if TYPE_CHECKING:
    from gptailor.evaluation.judge import ResidentLM
    from gptailor.evaluation.resident import ResidentModel
    from gptailor.evaluation.workload import Workload

NUM_SEQUENCES = 128
"""How many contexts are looked at: Block Influence is stable from a few dozen on."""


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


def measure(
    resident: ResidentModel, lm: ResidentLM, workload: Workload, model: str, dtype: str
) -> Similarity:
    """Runs contexts of the search documents through one dense candidate.

    Args:
        resident: holds the candidates; it is left assembled as that candidate.
        lm: encodes the contexts.
        workload: gives the contexts.
        model: the candidate's name.
        dtype: of the recipe.

    Returns:
        Block Influence (ShortGPT, eq. 1) and angular distances (Gromov et al., eq. 5).
    """
    import torch
    import torch.nn.functional as F

    family = resident.family
    layers = tuple(Take(model, i) for i in range(family.num_layers))
    recipe = Recipe(family.refs, family.base_name, layers, model, model, dtype)
    resident.assemble(recipe)
    states_LBTH: list[torch.Tensor] = []

    def remember(module: Any, args: Any, kwargs: Any) -> None:
        states_LBTH.append((args[0] if args else kwargs["hidden_states"]).float())

    def remember_output(module: Any, args: Any, output: Any) -> None:
        states_LBTH.append((output[0] if isinstance(output, tuple) else output).float())

    modules = resident.layers()
    hooks = [m.register_forward_pre_hook(remember, with_kwargs=True) for m in modules]
    hooks.append(modules[-1].register_forward_hook(remember_output))
    num_layers = family.num_layers
    influence = torch.zeros(num_layers, dtype=torch.float64)
    angular = torch.zeros(num_layers + 1, num_layers + 1, dtype=torch.float64)
    num_tokens = num_sequences = 0
    try:
        for tokens in workload.contexts(lm, NUM_SEQUENCES):
            states_LBTH.clear()
            with torch.inference_mode():
                lm.model(input_ids=torch.tensor([tokens], device=lm.device), use_cache=False)
            states_LTH = torch.stack(states_LBTH)[:, 0]
            cosine_LT = F.cosine_similarity(states_LTH[:-1], states_LTH[1:], dim=-1)
            influence += (1.0 - cosine_LT).sum(-1).double().cpu()
            unit_LH = F.normalize(states_LTH[:, -1].double(), dim=-1)
            angular += torch.arccos((unit_LH @ unit_LH.T).clamp(-1, 1)).cpu() / math.pi
            num_tokens += states_LTH.shape[1]
            num_sequences += 1
    finally:
        for hook in hooks:
            hook.remove()
    return Similarity(
        tuple((influence / max(num_tokens, 1)).tolist()),
        tuple(map(tuple, (angular / max(num_sequences, 1)).tolist())),
    )
