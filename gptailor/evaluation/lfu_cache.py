"""A least-frequently-used cache whose counts decay: which groups of bytes stay within a budget.

A search asks for nearly the same layers in every recipe. If the least recently used one had to go,
a set that is a little too large would lose every layer just before it is asked for again.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

HALF_LIFE = 32.0
"""After so many ticks a use counts half."""


class LFUCache(Generic[K]):
    """The keys that are kept, and how much each was used; it holds no values.

    Args:
        budget_bytes: that the kept keys may have together.

    Attributes:
        n_bytes: that they have.
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
        """One recipe has gone by."""
        self._now += 1

    def use(self, key: K) -> None:
        """Counts a use of a key, kept or not."""
        now, count = self._now / HALF_LIFE, self._counts.get(key, -math.inf)
        high, low = max(now, count), min(now, count)
        self._counts[key] = high + math.log2(1.0 + 2.0 ** (low - high))

    def admit(
        self, key: K, n_bytes: int, *, held: Collection[K] = (), must: bool = False
    ) -> list[K] | None:
        """Keeps a key if there is room, or if keys that are used less can make room.

        Args:
            key: not kept yet, used at least once.
            n_bytes: its size.
            held: keys that may not go.
            must: keys that are used more may go, too.

        Returns:
            The keys that had to go, the least used first; None if `key` does not get in, and then
            nothing has changed.
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
        """Lets the least used keys go until at most `n_bytes` are kept.

        Returns:
            The keys that went; None if that is impossible, and then nothing has changed.
        """
        going = self._least_used(self.n_bytes - n_bytes, held, math.inf)
        for old in going or ():
            self.remove(old)
        return going

    def remove(self, key: K) -> None:
        """Forgets that a key is kept; its uses still count."""
        self.n_bytes -= self._sizes.pop(key)

    def _least_used(self, n_bytes: int, held: Collection[K], below: float) -> list[K] | None:
        """The least used keys that have `n_bytes` together, all with a count below `below`."""
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
