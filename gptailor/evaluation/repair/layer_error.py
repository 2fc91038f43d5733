"""How far a layer's output is from where its teachers' states are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gptailor.evaluation.repair.targets import Lesson


@dataclass(frozen=True)
class LayerError:
    """How far a layer's output is from the teachers' states: √(Σ w |S − y|² / Σ w |S|²).

    Attributes:
        out_layer: the layer's index in the result.
        before: with the weights that the recipe gives it, on repaired layers below.
        after: with the repaired weights.
    """

    out_layer: int
    before: float
    after: float


def relative_error(outputs: Sequence[torch.Tensor], lessons: Sequence[Lesson], depth: int) -> float:
    """√(Σ w |S − y|² / Σ w |S|²) of outputs y and the teachers' states S at a depth.

    Raises:
        FloatingPointError: outputs are not finite.
    """
    wrong, whole = 0.0, 0.0
    for output, lesson in zip(outputs, lessons, strict=True):
        device = output.device
        target = lesson.target(depth, device)
        w_N1 = lesson.weights(depth, device)[:, None]
        wrong += float((w_N1 * lesson.residual(output, depth).pow(2)).sum())
        whole += float((w_N1 * target.pow(2)).sum())
    if not math.isfinite(wrong):
        raise FloatingPointError("hidden states are not finite numbers")
    return math.sqrt(wrong / whole) if whole else 0.0
