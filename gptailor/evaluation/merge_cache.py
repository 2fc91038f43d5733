"""Merged tensors that are kept for recipes to come: the least recently used ones go first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from gptailor.evaluation.slots import Parameters

Key = tuple[Any, ...]
"""What merged tensors follow from."""


class MergeCache:
    """Merged layers and ends on one device.

    Args:
        budget_bytes: what they may take together; the last one stays, however large it is.

    Attributes:
        n_bytes: that they take.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.n_bytes = 0
        self._kept: OrderedDict[Key, Parameters] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._kept)

    def values(self) -> Iterator[Parameters]:
        """All that is kept."""
        return iter(self._kept.values())

    def get(self, key: Key) -> Parameters | None:
        """What is kept of a key, which now is the one used last."""
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key]

    def keep(self, key: Key, parameters: Parameters) -> None:
        """Keeps tensors under a key that is not there yet; others may go."""
        self._kept[key] = parameters
        self.n_bytes += _n_bytes(parameters)
        while self.n_bytes > self.budget_bytes and len(self._kept) > 1:
            _, old = self._kept.popitem(last=False)
            self.n_bytes -= _n_bytes(old)

    def forget(self, key: Key) -> None:
        """Lets go of a key's tensors, if they are kept."""
        self.n_bytes -= _n_bytes(self._kept.pop(key, {}))


def _n_bytes(parameters: Parameters) -> int:
    return sum(p.numel() * p.element_size() for p in parameters.values())
