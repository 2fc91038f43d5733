"""An LRU cache of merged tensors for later recipes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from gptailor.evaluation.slots import Parameters

Key = tuple[Any, ...]
"""Everything that determines merged tensors."""


class MergeCache:
    """Merged layers, embeddings and heads on one device.

    Args:
        budget_bytes: what they may take together; the newest entry stays, however large it is.

    Attributes:
        n_bytes: what they take.
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
        """All kept parameters."""
        return iter(self._kept.values())

    def get(self, key: Key) -> Parameters | None:
        """The parameters kept under a key, which becomes the most recently used; else None."""
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key]

    def keep(self, key: Key, parameters: Parameters) -> None:
        """Keeps tensors under a new key; may evict others."""
        self._kept[key] = parameters
        self.n_bytes += _n_bytes(parameters)
        while self.n_bytes > self.budget_bytes and len(self._kept) > 1:
            _, old = self._kept.popitem(last=False)
            self.n_bytes -= _n_bytes(old)

    def forget(self, key: Key) -> None:
        """Drops a key's tensors, if they are kept."""
        self.n_bytes -= _n_bytes(self._kept.pop(key, {}))


def _n_bytes(parameters: Parameters) -> int:
    return sum(p.numel() * p.element_size() for p in parameters.values())
