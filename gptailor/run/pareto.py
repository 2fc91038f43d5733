"""The Pareto front of accuracy and size, and the size at which results are quoted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

SMALL = 0.75
"""The size at which the best accuracy is quoted, as a fraction of the layers."""

T = TypeVar("T")


def most_small_layers(num_layers: int) -> int:
    """The most layers that a model with "at most 75 % of the layers" may have.

    It is the size of the 0.75 control arms; progress, status, demo and report all use it.
    """
    return round(SMALL * num_layers)


def pareto_front(
    items: Iterable[T], measures: Callable[[T], tuple[int, float, str]]
) -> tuple[T, ...]:
    """The items that no other beats in accuracy (higher) and parameters (lower), smallest first.

    An item is beaten by one that is at least as good in both and better in one. Of items that are
    equal in both, one stays, by name and not by age, so that a front does not depend on which of
    two workers was faster.

    Args:
        items: in any order.
        measures: returns an item's parameters, accuracy, and unique name.
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
