"""A least-frequently-used cache with decaying counts, which decides what stays within a budget.

A search uses nearly the same layers in every recipe. If the least recently used one were evicted, a
working set slightly over the budget would lose every layer just before its next use.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

HALF_LIFE = 32.0
"""Number of ticks after which a use counts half."""


class LFUCache(Generic[K]):
    """Tracks which keys are kept and how much each was used; holds no values.

    Args:
        budget_bytes: total size that the kept keys may have.

    Attributes:
        n_bytes: total size of the kept keys.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.n_bytes = 0
        self._sizes: dict[K, int] = {}
        self._counts: dict[K, float] = {}  # log2 of the sum of 2^(time of use / half-life)
        self._now = 0

    def __contains__(self, key: K) -> bool:
        return key in self._sizes

    def __iter__(self) -> Iterator[K]:
        return iter(self._sizes)

    def tick(self) -> None:
        """Advances the clock by one recipe."""
        self._now += 1

    def use(self, key: K) -> None:
        """Counts a use of a key, kept or not."""
        now, count = self._now / HALF_LIFE, self._counts.get(key, -math.inf)
        high, low = max(now, count), min(now, count)
        self._counts[key] = high + math.log2(1.0 + 2.0 ** (low - high))

    def admit(
        self, key: K, n_bytes: int, *, held: Collection[K] = (), must: bool = False
    ) -> list[K] | None:
        """Keeps a key if there is room, or if evicting less used keys makes room.

        Args:
            key: not kept yet, used at least once.
            n_bytes: its size.
            held: keys that must not be evicted.
            must: more used keys may be evicted, too.

        Returns:
            The evicted keys, the least used first; None if `key` is not kept, and then nothing has
            changed.
        """
        assert key not in self._sizes
        count = math.inf if must else self._counts[key]
        going = self._least_used(self.n_bytes + n_bytes - self.budget_bytes, held, count)
        if going is None:
            return None
        for old in going:
            self.remove(old)
        self._sizes[key] = n_bytes
        self.n_bytes += n_bytes
        return going

    def shrink(self, n_bytes: int, held: Collection[K] = ()) -> list[K] | None:
        """Evicts the least used keys until at most `n_bytes` are kept.

        Returns:
            The evicted keys; None if that is impossible, and then nothing has changed.
        """
        going = self._least_used(self.n_bytes - n_bytes, held, math.inf)
        for old in going or ():
            self.remove(old)
        return going

    def remove(self, key: K) -> None:
        """Stops keeping a key; its use count stays."""
        self.n_bytes -= self._sizes.pop(key)

    def _least_used(self, n_bytes: int, held: Collection[K], below: float) -> list[K] | None:
        """The least used keys that free `n_bytes` together, all with counts below `below`; None if
        there are not enough."""
        going: list[K] = []
        if n_bytes <= 0:
            return going
        for key in sorted(self._sizes, key=self._counts.__getitem__):  # stable: the older one first
            if key in held:
                continue
            if self._counts[key] >= below:
                return None
            going.append(key)
            n_bytes -= self._sizes[key]
            if n_bytes <= 0:
                return going
        return None
