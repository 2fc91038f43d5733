"""Which recipes of other islands enter a population: those on the front of all that came so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gptailor.search.searcher import Scored

Objectives = Sequence[float]


class Migration:
    """Looks at what other islands evaluated, as it comes in."""

    def __init__(self) -> None:
        self._front: list[tuple[float, ...]] = []

    def chosen(self, arrived: Sequence[Scored]) -> list[Scored]:
        """The same recipes; objectives only for those that may enter.

        The others are still worth knowing: nobody has to evaluate them again.
        """
        new = [one.objectives for one in arrived if one.objectives is not None]
        both = list(dict.fromkeys([*self._front, *new]))
        self._front = [a for a in both if not any(_beats(b, a) for b in both)]
        front = set(self._front)
        return [
            one if one.objectives in front else replace(one, objectives=None) for one in arrived
        ]


def _beats(a: Objectives, b: Objectives) -> bool:
    """Whether a is at least as good in all, and better in one."""
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))
