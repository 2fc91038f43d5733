"""The hypervolume of a run: one number for how good its front is, after each evaluation.

Accuracy a is used as it is, size s is parameters / those of the largest candidate. The reference
point is accuracy 0 at size 1, so the hypervolume is the area

    ∪ over the front of [s, 1] × [0, a]

between 0 and 1: 1 would be perfect accuracy with no parameters at all. A dense candidate of the
largest size adds nothing, and neither does a point with an accuracy of 0 or less.
"""

from __future__ import annotations

from collections.abc import Iterable


def hypervolume_history(
    points: Iterable[tuple[int, int, float]], largest_parameters: int
) -> tuple[tuple[int, float], ...]:
    """The hypervolume after each point.

    Args:
        points: (number, parameters, accuracy) in the order of evaluation.
        largest_parameters: the parameter count that is size 1.

    Returns:
        (number, hypervolume) for each point; the hypervolume never falls.
    """
    import numpy as np
    from pymoo.indicators.hv import HV

    indicator = HV(ref_point=np.array([1.0, 0.0]))
    front: list[tuple[float, float]] = []  # (size, -accuracy): pymoo minimises
    history: list[tuple[int, float]] = []
    volume = 0.0
    for number, parameters, accuracy in points:
        new = (parameters / largest_parameters, -accuracy)
        counts = new[0] < 1.0 and new[1] < 0.0
        if counts and not any(p[0] <= new[0] and p[1] <= new[1] for p in front):
            front = [p for p in front if p[0] < new[0] or p[1] < new[1]]
            front.append(new)
            volume = max(volume, float(indicator(np.array(sorted(front)))))  # rounding may dip
        history.append((number, volume))
    return tuple(history)
