"""One sentence that says what the search was worth, without flattery.

It compares the best stitched model with the best simple pruning at the largest size up to 75 % of
the layers that both have; models with fewer layers count at that size, too, for both.
"""

from __future__ import annotations

from dataclasses import dataclass

from gptailor.errors import plain
from gptailor.report.front_model import Point, Report
from gptailor.report.measured import Figure, Measured, figure
from gptailor.report.yardstick import Yardstick
from gptailor.run.pareto import most_small_layers

MAX_NAMES = 4
"""At most this many of the holdout's tasks are named."""

MAX_NAME_CHARS = 60


@dataclass(frozen=True)
class Headline:
    """The headline and the points that it is about.

    Attributes:
        text: one sentence, or two if something is missing.
        note: its caveats: the holdout, the noise; may be empty.
        point: the best stitched model at that size.
        control: the best simple pruning at that size.
    """

    text: str
    note: str = ""
    point: Point | None = None
    control: Point | None = None


def headline(report: Report) -> Headline:
    """The headline of a report; it says what is not known."""
    if not report.points:
        count = report.cost.evaluations
        return Headline(
            f"None of the {count} evaluations so far gave a score on all search documents."
            if count
            else "Nothing has been evaluated yet."
        )
    smaller = [p for p in report.points if p.layers < report.num_layers]
    controls = [p for p in smaller if p.arms and not p.is_dense]
    stitched = [p for p in smaller if not p.arms]
    if not stitched:
        return _without_stitched(report, controls)
    size = _nearest({p.layers for p in stitched}, {p.layers for p in controls}, report.num_layers)
    point = _best([p for p in stitched if p.layers <= size])
    assert point is not None
    has_control = any(p.layers == size for p in controls)
    control = _best([p for p in controls if p.layers <= size]) if has_control else None
    at = "At" if point.layers == size else "With at most"
    place = f"{at} {_share(size, report.num_layers)} of the layers ({size} of {report.num_layers})"
    kept = _told(report.search, point.search)
    text = f"{place} the best stitched model {kept}{_of_dense(report.search)}"
    if not control:
        text += ". No simple pruning of that size was evaluated."
    else:
        difference = report.search.difference(point.search, control.search)
        text += f"; the best simple pruning {_told(report.search, control.search)}"
        if control.search.accuracy >= point.search.accuracy:
            text += ", so the search gained nothing at that size."
        else:
            text += f"; the difference is {_points(difference)}."
    if report.search.best is None:
        text += _why_no_percentages(report.search)
    return Headline(text, _note(report, point, control), point, control)


def _without_stitched(report: Report, controls: list[Point]) -> Headline:
    """The headline if no stitched model has fewer layers yet; one may have all of them."""
    whole = _best([p for p in report.points if not p.arms])
    tail = ""
    if whole is not None:
        kept = _told(report.search, whole.search)
        tail = f"the best stitched model has all {whole.layers} layers and {kept}"
    if not controls:
        if not tail:
            return Headline(
                "Only models of full depth have been evaluated so far; nothing is smaller yet."
            )
        text = f"Nothing smaller has been evaluated yet; {tail}{_of_dense(report.search)}."
        return Headline(text + _why_no_percentages(report.search), point=whole)
    size = _nearest({p.layers for p in controls}, set(), report.num_layers)
    best = _best([p for p in controls if p.layers <= size])
    assert best is not None
    text = "No smaller stitched model" if tail else "No stitched model"
    text += f" has been evaluated yet; at {_share(size, report.num_layers)} of the layers the best"
    text += f" simple pruning {_told(report.search, best.search)}{_of_dense(report.search)}"
    text += f"; {tail}." if tail else "."
    return Headline(text + _why_no_percentages(report.search), point=whole, control=best)


def _nearest(sizes: set[int], control_sizes: set[int], num_layers: int) -> int:
    """The size to report: the largest up to 75 %, preferably one that control arms have, too."""
    limit = most_small_layers(num_layers)
    for candidates in (sizes & control_sizes, sizes):
        below = [size for size in candidates if size <= limit]
        if below:
            return max(below)
    return min(sizes & control_sizes or sizes)


def _best(points: list[Point]) -> Point | None:
    """The most accurate; of equals the smallest, then one that was scored on the holdout."""

    def order(point: Point) -> tuple[float, int, bool, int]:
        has_holdout = point.holdout is not None
        return point.search.accuracy, -point.parameters, has_holdout, -point.number

    return max(points, key=order, default=None)


def _share(size: int, num_layers: int) -> str:
    return f"{100 * size / num_layers:.0f} %"


def _note(report: Report, point: Point, control: Point | None) -> str:
    mine, theirs = point.holdout, control.holdout if control else None
    notes = []
    if report.search.is_near_chance:
        notes.append(_why_no_percentages(report.search).strip())
    if mine is None:
        if control:
            notes += _doubts(report.search.difference(point.search, control.search))
        notes.append(
            "The stitched model was chosen on these documents, which flatters it, and was not "
            "scored on a holdout."
        )
    else:
        text = f"{_on_holdout(report)} the stitched model {_told(report.holdout, mine)}"
        text += _of_dense(report.holdout, is_other=report.holdout.point != report.search.point)
        difference = None
        if theirs is not None:
            difference = report.holdout.difference(mine, theirs)
            text += f", the pruning {_told(report.holdout, theirs)}"
            text += f"; the difference is {_points(difference)}"
        notes.append(text + ".")
        notes += _doubts(difference) if difference else []
        if report.holdout.is_near_chance:
            notes.append("No dense candidate is clearly above chance there.")
        elif not report.holdout.has_percentages:
            notes.append(_why_no_percentages(report.holdout).strip())
    notes.append("± is one standard error.")
    return " ".join(notes)


def _on_holdout(report: Report) -> str:
    if not report.has_other_holdout_tasks:
        return "On the holdout documents, which had no part in the choice,"
    names = [plain(name, MAX_NAME_CHARS) for name in report.holdout_tasks]
    listed = ", ".join(names[:MAX_NAMES])
    if len(names) > MAX_NAMES:
        listed += f" and {len(names) - MAX_NAMES} more"
    return f"On the holdout, which has other tasks ({listed}) and had no part in the choice,"


def _doubts(difference: Figure) -> list[str]:
    """The caveats of a difference."""
    notes = []
    if difference.is_noise:
        notes.append("That difference is within the noise (two standard errors).")
    if difference.stderr is not None and not difference.is_paired:
        notes.append(
            "Its error treats the two models as independent, as there are no values by document."
        )
    return notes


def _told(yardstick: Yardstick, measured: Measured) -> str:
    """ "keeps 84 ± 3 %", "is 3.1 ± 2.0 points above chance" or "has an accuracy of 0.6 ± 0.02"."""
    kept = yardstick.kept(measured)
    if kept is not None:
        return f"keeps {_number(kept)} %"
    above = measured.above_chance
    if yardstick.best is not None and above is not None:
        side = "above" if above >= 0.0 else "below"
        return f"is {_points(figure(abs(above), [(100.0, measured)]))} {side} chance"
    error = figure(measured.accuracy, [(1.0, measured)]).stderr
    return f"has an accuracy of {measured.accuracy:.3f}" + (f" ± {error:.3f}" if error else "")


def _of_dense(yardstick: Yardstick, *, is_other: bool = False) -> str:
    """What a percentage refers to."""
    if not yardstick.has_percentages:
        return ""
    return " of the best dense candidate" + (
        f" there ({plain(yardstick.name, MAX_NAME_CHARS)})" if is_other else ""
    )


def _why_no_percentages(yardstick: Yardstick) -> str:
    if yardstick.is_partial:
        return " Not every dense candidate has been scored there yet, so there are no percentages."
    if yardstick.best is None:
        return " No dense candidate was evaluated to compare with."
    if not yardstick.is_near_chance:
        return ""
    best = _told(yardstick, yardstick.best)
    return f" The best dense candidate {best}, so a percentage of it would say nothing."


def _points(found: Figure) -> str:
    return f"{_number(found)} points"


def _number(found: Figure) -> str:
    """A figure with as many decimals as its error justifies, at most one."""
    if found.stderr is None:
        return f"{found.value:.0f}"
    digits = 1 if 0.05 <= found.stderr < 0.95 else 0
    return f"{found.value:.{digits}f} ± {found.stderr:.{digits}f}"
