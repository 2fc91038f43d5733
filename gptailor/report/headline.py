"""What the search was worth, in one sentence that is computed and never flatters.

The best stitched model is compared with the best simple pruning at the size nearest to 75 % of
the layers (or below) that both have; at a size, a model with fewer layers counts too, for both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gptailor.report.front import Measured, Point, Report

TARGET = 0.75
_ROUNDING = 0.02  # control arms round their size: 20 of 26 layers count as 75 %


@dataclass(frozen=True)
class Headline:
    """The sentence and what it speaks of.

    Attributes:
        text: one sentence, or two where something is missing.
        note: what limits it: the holdout, the noise; may be empty.
        point: the best stitched model at that size.
        control: the best simple pruning at that size.
    """

    text: str
    note: str = ""
    point: Point | None = None
    control: Point | None = None


def headline(report: Report) -> Headline:
    """The headline of a report; says honestly what is not known."""
    controls = [p for p in report.points if p.arms and not p.is_dense]
    stitched = [p for p in report.points if not p.arms and p.layers < report.num_layers]
    if not report.points:
        count = report.cost.evaluations
        return Headline(
            f"None of the {count} evaluations so far gave a score on all search documents."
            if count
            else "Nothing has been evaluated yet."
        )
    if not stitched:
        return _controls_only(report, controls)
    size = _nearest({p.layers for p in stitched}, {p.layers for p in controls}, report.num_layers)
    point = _best([p for p in stitched if p.layers <= size])
    assert point is not None
    has_control = any(p.layers == size for p in controls)
    control = _best([p for p in controls if p.layers <= size]) if has_control else None
    at = "At" if point.layers == size else "With at most"
    place = f"{at} {_share(size, report.num_layers)} of the layers ({size} of {report.num_layers})"
    kept = point.search.retention
    if kept is None:
        text = f"{place} the best stitched model has an accuracy of {point.search.accuracy:.3f}"
        tail = f"has {control.search.accuracy:.3f}" if control else ""
    else:
        text = f"{place} the best stitched model keeps {kept:.0f} % of the best dense candidate"
        tail = f"keeps {control.search.retention:.0f} %" if control else ""
    if not control:
        text += ". No simple pruning of that size was evaluated."
    elif control.search.accuracy >= point.search.accuracy:
        text += f"; the best simple pruning {tail}, so the search gained nothing at that size."
    else:
        text += f"; the best simple pruning {tail}."
    if kept is None:
        text += " No dense candidate was evaluated to compare with."
    return Headline(text, _note(point, control), point, control)


def _controls_only(report: Report, controls: list[Point]) -> Headline:
    if not controls:
        return Headline("Only whole candidates have been evaluated so far; nothing is smaller yet.")
    size = _nearest({p.layers for p in controls}, set(), report.num_layers)
    best = _best([p for p in controls if p.layers <= size])
    assert best is not None
    kept = best.search.retention
    value = (
        f"has an accuracy of {best.search.accuracy:.3f}"
        if kept is None
        else f"keeps {kept:.0f} % of the best dense candidate"
    )
    share = _share(size, report.num_layers)
    text = f"No stitched model has been evaluated yet; at {share} of the layers the best simple"
    return Headline(f"{text} pruning {value}.", control=best)


def _nearest(sizes: set[int], control_sizes: set[int], num_layers: int) -> int:
    """The size to speak of: near 75 %, from below, and one that the control arms have too."""
    limit = math.floor((TARGET + _ROUNDING) * num_layers)
    for candidates in (sizes & control_sizes, sizes):
        below = [size for size in candidates if size <= limit]
        if below:
            return max(below)
    return min(sizes & control_sizes or sizes)


def _best(points: list[Point]) -> Point | None:
    return max(points, key=lambda p: (p.search.accuracy, -p.parameters, -p.number), default=None)


def _share(size: int, num_layers: int) -> str:
    return f"{100 * size / num_layers:.0f} %"


def _note(point: Point, control: Point | None) -> str:
    notes = []
    if control and _within_noise(point.search, control.search):
        notes.append("The difference is within the noise (two standard errors).")
    mine, theirs = point.holdout, control.holdout if control else None
    if mine is None:
        notes.append("The stitched model was not scored on holdout documents.")
    elif mine.retention is None:
        notes.append(f"On the holdout documents it has {mine.accuracy:.3f}.")
    elif theirs is None or theirs.retention is None:
        notes.append(f"On the holdout documents it keeps {mine.retention:.0f} %.")
    else:
        kept = f"{mine.retention:.0f} % and {theirs.retention:.0f} %"
        noise = _within_noise(mine, theirs)
        tail = ", a difference within the noise (two standard errors)" if noise else ""
        notes.append(f"On the holdout documents they keep {kept}{tail}.")
    return " ".join(notes)


def _within_noise(a: Measured, b: Measured) -> bool:
    """The standard errors are taken as independent, which overstates the noise a little."""
    if a.stderr is None or b.stderr is None:
        return False
    return abs(a.accuracy - b.accuracy) < 2.0 * math.hypot(a.stderr, b.stderr)
