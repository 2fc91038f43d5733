"""Which recipes of other islands enter a population: those on the front of all that came so far."""

from __future__ import annotations

from collections.abc import Sequence

from gptailor.recipe import Recipe

Objectives = Sequence[float]


class Migration:
    """Looks at what other islands evaluated, as it comes in."""

    def __init__(self) -> None:
        self._front: list[tuple[float, ...]] = []

    def chosen(
        self, arrived: Sequence[tuple[Recipe, Objectives | None]]
    ) -> list[tuple[Recipe, Objectives | None]]:
        """The same recipes; objectives, to be minimised, only for those that may enter.

        The others are still worth knowing: nobody has to evaluate them again.
        """
        new = [tuple(values) for _, values in arrived if values is not None]
        both = list(dict.fromkeys([*self._front, *new]))
        self._front = [a for a in both if not any(_beats(b, a) for b in both)]
        front = set(self._front)
        return [
            (recipe, values if values is not None and tuple(values) in front else None)
            for recipe, values in arrived
        ]


def _beats(a: Objectives, b: Objectives) -> bool:
    """Whether a is at least as good in all, and better in one."""
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))
