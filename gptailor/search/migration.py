"""Migration between islands: recipes on the front of all arrivals enter the population."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gptailor.search.searcher import Scored

Objectives = Sequence[float]


class Migration:
    """Keeps the front of what other islands evaluated."""

    def __init__(self) -> None:
        self._front: list[tuple[float, ...]] = []

    def chosen(self, arrived: Sequence[Scored]) -> list[Scored]:
        """Returns the same recipes, with objectives only for those that may enter.

        The others are still useful to know: they need not be evaluated again.
        """
        new = [one.objectives for one in arrived if one.objectives is not None]
        both = list(dict.fromkeys([*self._front, *new]))
        self._front = [a for a in both if not any(_beats(b, a) for b in both)]
        front = set(self._front)
        return [
            one if one.objectives in front else replace(one, objectives=None) for one in arrived
        ]


def _beats(a: Objectives, b: Objectives) -> bool:
    """Whether a dominates b: at least as good in all objectives, better in one."""
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))
