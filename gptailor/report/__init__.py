"""The report of a run: its front, what the search was worth, and what it cost.

`write_report` is the Python twin of `gptailor report RUN [--out DIR]`.
"""

from __future__ import annotations

from pathlib import Path

from gptailor.report.front_model import Point, Report, load_report
from gptailor.report.terminal import front_table
from gptailor.run.layout import FRONT_PNG, PAGE

__all__ = ["Point", "Report", "front_table", "load_report", "write_report"]


def write_report(run: str | Path, out: str | Path | None = None) -> Path:
    """Writes front.csv, front.json, front.png, recipes/ and report/index.html.

    Args:
        run: a run folder; a search may still be writing to it.
        out: where the files go; None for the run folder itself.

    Returns:
        The path of index.html, one file that opens offline.

    Raises:
        UsageError: `run` holds no run, or `out` can't be written.
        ResourceError: the disk is full.
    """
    from gptailor.report.export import write_atomically, write_front
    from gptailor.report.figures import front_png
    from gptailor.report.page import page_html

    report = load_report(run)
    folder = Path(run if out is None else out)
    index = folder / PAGE
    write_front(report, folder)
    write_atomically(folder / FRONT_PNG, front_png(report))
    write_atomically(index, page_html(report).encode())
    return index
