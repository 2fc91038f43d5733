"""The front as a picture, for papers, issues and chats.

Drawn with matplotlib's objects on an Agg canvas: no pyplot, so no global state and no display.
"""

from __future__ import annotations

import io
import statistics
from typing import Any

from gptailor.report.front_model import DENSE, Point, Report

KIND_LABELS = {
    DENSE: "dense candidate",
    "block_influence": "Block Influence",
    "angular": "angular block",
    "uniform": "uniform average",
    "paper": "paper's starting point",
    "random": "random cut",
}
_MARKERS = {
    DENSE: "D",
    "block_influence": "^",
    "angular": "s",
    "uniform": "P",
    "paper": "*",
    "random": "X",
}
_FRONT, _CONTROL, _DENSE, _FAINT = "#0b5cad", "#b4560a", "#30363d", "#b6bec8"
_INK, _MUTED, _GRID = "#1b1f24", "#5b6570", "#e6e9ed"
_LAYER_TICKS = 12


def front_png(report: Report, dpi: int = 160) -> bytes:
    """Accuracy against size as PNG: the front as a line, control arms by kind, the rest faint."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 5.0), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _style(axes)
    if not report.points:
        axes.text(0.5, 0.5, "no scores yet", transform=axes.transAxes, ha="center", color=_MUTED)
    _draw_points(axes, report)
    _layer_axis(axes, report)
    axes.set_xlabel("parameters in percent of the largest candidate", color=_INK)
    axes.set_ylabel("accuracy on the search documents", color=_INK)
    if report.points:
        handles, labels = axes.get_legend_handles_labels()
        order = sorted(range(len(labels)), key=lambda i: labels[i] != "front")
        axes.legend(
            [handles[i] for i in order],
            [labels[i] for i in order],
            loc="lower right",
            frameon=False,
            fontsize=8.5,
            labelcolor=_INK,
        )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def _draw_points(axes: Any, report: Report) -> None:
    def xy(points: list[Point]) -> tuple[list[float], list[float]]:
        return [report.size_percent(p) for p in points], [p.search.accuracy for p in points]

    front = list(report.front)
    numbers = {p.number for p in front}
    others = [p for p in report.points if not p.arms and p.number not in numbers]
    if others:
        axes.scatter(*xy(others), s=9, c=_FAINT, lw=0, zorder=2, label="other evaluations")
    if report.search.best:
        accuracy = report.search.best.accuracy
        axes.axhline(accuracy, color=_DENSE, lw=0.8, ls=(0, (4, 3)), zorder=1.5)
        axes.annotate(
            "best dense candidate",
            (0.01, accuracy),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            color=_MUTED,
            fontsize=8.5,
        )
    for kind in sorted({p.kinds[0] for p in report.controls}, key=_kind_order):
        points = [p for p in report.controls if p.kinds[0] == kind]
        colour = _DENSE if kind == DENSE else _CONTROL
        axes.scatter(
            *xy(points),
            s=42,
            marker=_MARKERS.get(kind, "v"),
            facecolors="none" if kind != "random" else colour,
            edgecolors=colour,
            linewidths=1.2,
            zorder=4,
            label=KIND_LABELS.get(kind, kind).replace("$", r"\$"),
        )
    if front:
        axes.step(
            *xy(front),
            where="post",
            color=_FRONT,
            lw=1.4,
            marker="o",
            ms=6,
            zorder=3,
            label="front",
        )
        errors = [p.search.stderr or 0.0 for p in front]
        axes.errorbar(*xy(front), yerr=errors, fmt="none", ecolor=_FRONT, elinewidth=0.7, alpha=0.5)


def _layer_axis(axes: Any, report: Report) -> None:
    """A second axis on top: how many layers a model of that size has."""
    sizes: dict[int, list[float]] = {}
    for point in report.points:
        sizes.setdefault(point.layers, []).append(report.size_percent(point))
    if not sizes:
        return
    layers = sorted(sizes)
    layers = layers[:: -(-len(layers) // _LAYER_TICKS)]
    top = axes.secondary_xaxis("top")
    top.set_xticks([statistics.median(sizes[n]) for n in layers], [str(n) for n in layers])
    top.set_xlabel("layers", color=_MUTED, fontsize=9)
    top.tick_params(colors=_MUTED, labelsize=8.5, length=3)
    top.spines["top"].set_color(_GRID)


def _style(axes: Any) -> None:
    axes.grid(color=_GRID, lw=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#aab2bb")
    axes.tick_params(colors=_MUTED, labelsize=9, length=3)
    axes.margins(x=0.04, y=0.08)


def _kind_order(kind: str) -> tuple[int, str]:
    known = list(KIND_LABELS)
    return (known.index(kind) if kind in known else len(known), kind)
