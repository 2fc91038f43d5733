"""The front: what no other beats in both accuracy and size; and the size that is spoken of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

SMALL = 0.75
"""The size for which the best accuracy is told, as part of the layers."""

T = TypeVar("T")


def most_small_layers(num_layers: int) -> int:
    """The most layers that a model may have to count as one of 75 % of the family's layers.

    It is the size of the control arms of 0.75: progress, status, demo and report mean the same.
    """
    return round(SMALL * num_layers)


def pareto_front(
    items: Iterable[T], measures: Callable[[T], tuple[int, float, str]]
) -> tuple[T, ...]:
    """The items that no other beats in accuracy (higher) and parameters (lower), smallest first.

    An item is beaten by one that is at least as good in both and better in one. Of items that are
    equal in both one stays, by name and not by age, so that a front does not depend on which of two
    workers was quicker.

    Args:
        items: in any order.
        measures: of an item, its parameters, its accuracy, and a name that no other item has.
    """
    front: list[T] = []
    best = float("-inf")

    def order(item: T) -> tuple[int, float, str]:
        parameters, accuracy, name = measures(item)
        return parameters, -accuracy, name

    for item in sorted(items, key=order):
        accuracy = measures(item)[1]
        if accuracy > best:
            front.append(item)
            best = accuracy
    return tuple(front)
