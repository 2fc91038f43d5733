"""The report for a terminal: plain ASCII, at most 100 columns, no colours."""

from __future__ import annotations

from gptailor.report.front import Measured, Point, Report
from gptailor.report.headline import headline

WIDTH = 100
_HEADER = (
    "point",
    "layers",
    "parameters",
    "size %",
    "accuracy",
    "+/-",
    "kept %",
    "holdout",
    "kept %",
)
_KIND_CHARS = 25


def front_table(report: Report) -> str:
    """The front and the control arms as a table, with the headline below it."""
    found = headline(report)
    lines: list[str] = []
    if report.points:
        rows = [("Front, smallest first", report.front), ("Control arms", report.controls)]
        widths = [8, 6, 12, 6, 8, 6, 6, 7, 6]
        lines.append(_line(_HEADER, widths, "arm"))
        for title, points in rows:
            lines += ["-- " + title + " " + "-" * (WIDTH - len(title) - 4)]
            lines += [_line(_cells(report, p), widths, _arms(p)) for p in points]
            if not points:
                lines.append("none")
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
    tail = (f"{holdout.accuracy:.3f}" if holdout else "-", _kept(holdout))
    return (*head, f"{search.accuracy:.3f}", stderr, _kept(search), *tail)


def _kept(measured: Measured | None) -> str:
    if measured is None or measured.retention is None:
        return "-"
    return f"{measured.retention:.1f}"


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

    return textwrap.wrap(text.encode("ascii", "replace").decode(), WIDTH)
