"""The report for a terminal: plain ASCII, at most 100 columns, no colours."""

from __future__ import annotations

from gptailor.report.front_model import Point, Report
from gptailor.report.headline import headline
from gptailor.report.measured import Measured
from gptailor.report.yardstick import Yardstick

WIDTH = 100
_KIND_CHARS = 25


def front_table(report: Report) -> str:
    """The front and the control arms as a table, with the headline below it."""
    found = headline(report)
    lines: list[str] = []
    if report.points:
        rows = [("Front, smallest first", report.front), ("Control arms", report.controls)]
        widths = [8, 6, 12, 6, 8, 6, 6, 7, 6]
        lines.append(_line(_header(report), widths, "arm"))
        for title, points in rows:
            lines += ["-- " + title + " " + "-" * (WIDTH - len(title) - 4)]
            lines += [_line(_cells(report, p), widths, _arms(p)) for p in points]
            if not points:
                lines.append("none")
        if "points" in _header(report):
            lines.append("points: of accuracy above chance, where no percentage would say anything")
        lines.append("")
    lines += _wrapped(f"{found.text} {found.note}".strip())
    cost = report.cost
    summary = f"{cost.evaluations:,} evaluations in {cost.hours:.2f} worker hours"
    lost = [(report.num_failed, "failed"), (report.num_infeasible, "infeasible")]
    counts = ", ".join(f"{n} {what}" for n, what in lost if n)
    lines.append(summary + (f" ({counts})." if counts else "."))
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _cells(report: Report, point: Point) -> tuple[str, ...]:
    size = f"{report.size_percent(point):.1f}"
    head = (point.id, str(point.layers), f"{point.parameters:,}", size)
    search, holdout = point.search, point.holdout
    stderr = "-" if search.stderr is None else f"{search.stderr:.3f}"
    tail = (f"{holdout.accuracy:.3f}" if holdout else "-", _kept(report.holdout, holdout))
    return (*head, f"{search.accuracy:.3f}", stderr, _kept(report.search, search), *tail)


def _header(report: Report) -> tuple[str, ...]:
    kept = ["points" if y.is_near_chance else "kept %" for y in (report.search, report.holdout)]
    sizes = ("point", "layers", "parameters", "size %")
    return (*sizes, "accuracy", "+/-", kept[0], "holdout", kept[1])


def _kept(yardstick: Yardstick, measured: Measured | None) -> str:
    if measured is None:
        return "-"
    value = measured.above_chance if yardstick.is_near_chance else measured.retention
    return "-" if value is None else f"{value:.1f}"


def _arms(point: Point) -> str:
    text = " ".join(point.arms).encode("ascii", "replace").decode()
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= _KIND_CHARS else text[: _KIND_CHARS - 2] + ".."


def _line(cells: tuple[str, ...], widths: list[int], last: str) -> str:
    head, *rest = zip(cells, widths, strict=True)
    columns = [head[0].ljust(head[1]), *(cell.rjust(width) for cell, width in rest)]
    return " ".join(columns) + "  " + last


def _wrapped(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text.replace("±", "+/-").encode("ascii", "replace").decode(), WIDTH)
