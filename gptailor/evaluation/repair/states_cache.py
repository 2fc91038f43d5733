"""Repaired lower parts of recipes, kept because a search's recipes share them.

Two recipes with the same layers up to output layer j, and the same next source layer, have the same
repair and the same states up to there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gptailor.evaluation.repair.layer_error import LayerError
from gptailor.recipe import Recipe
from gptailor.recipe.repair import UNCUT

EVERY = 4
"""Besides layers before a gap, one in so many is kept: the others are quickly run again."""


@dataclass(frozen=True)
class Prefix:
    """The repaired lower part of a recipe.

    Attributes:
        num_layers: how many output layers it has.
        states: what leaves it, one tensor (B, T, H) for each batch.
        changed: output layer → its repaired parameters.
        errors: of these layers.
    """

    num_layers: int
    states: tuple[torch.Tensor, ...]
    changed: Mapping[int, dict[str, nn.Parameter]]
    errors: tuple[LayerError, ...]

    @property
    def n_bytes(self) -> int:
        """Memory of its states and parameters; shorter ones share some of these."""
        own = [*self.states, *(p for new in self.changed.values() for p in new.values())]
        return sum(tensor.numel() * tensor.element_size() for tensor in own)


class StatesCache:
    """Prefixes, of which those that were not used for longest are dropped.

    Args:
        budget_bytes: for all of them.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._kept: OrderedDict[Any, Prefix] = OrderedDict()
        self._n_bytes = 0

    def longest(self, recipe: Recipe, depths: Sequence[int]) -> Prefix | None:
        """The longest kept prefix of a canonical recipe.

        Args:
            recipe: the recipe.
            depths: for each output layer, the source layer that comes next.
        """
        for num_layers in range(recipe.num_layers, 0, -1):
            found = self._kept.get(_key(recipe, depths, num_layers))
            if found is not None:
                self._kept.move_to_end(_key(recipe, depths, num_layers))
                return found
        return None

    def keep(self, recipe: Recipe, depths: Sequence[int], prefix: Prefix) -> None:
        """Keeps a prefix of a canonical recipe if it is worth its memory."""
        last = prefix.num_layers - 1
        is_gap = depths[last] != recipe.src_layers[last] + 1
        if not is_gap and prefix.num_layers % EVERY:
            return
        key = _key(recipe, depths, prefix.num_layers)
        if key in self._kept or prefix.n_bytes > self._budget_bytes:
            return
        self._kept[key] = prefix
        self._n_bytes += prefix.n_bytes
        while self._n_bytes > self._budget_bytes:
            _, gone = self._kept.popitem(last=False)
            self._n_bytes -= gone.n_bytes


def _key(recipe: Recipe, depths: Sequence[int], num_layers: int) -> Any:
    # an uncut merge teaches what all layers make
    whole = recipe.layers if recipe.repair and recipe.repair.teachers == UNCUT else None
    return (
        recipe.repair,
        whole,
        recipe.base,
        recipe.embeddings,
        recipe.dtype,
        recipe.calibration,
        recipe.layers[:num_layers],
        depths[num_layers - 1],
    )
