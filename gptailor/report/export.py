"""The report as files for other programs: front.csv, front.json and a recipe for each point.

Every file is written under a temporary name and renamed, so a reader never sees half of one, and a
report can be rewritten while somebody looks at the old one.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gptailor.errors import ResourceError, UsageError, is_disk_full
from gptailor.evaluation.outcome import Score
from gptailor.files import write_whole
from gptailor.merging.registry import get_method
from gptailor.recipe import NO_LAYER, Layer, Recipe, Take
from gptailor.recipe.canonical import canonical_layer
from gptailor.recipe.repair import repaired_layers
from gptailor.report.front_model import Point, Report
from gptailor.report.headline import headline
from gptailor.report.ledger import Spent
from gptailor.report.measured import Measured
from gptailor.report.yardstick import Yardstick
from gptailor.run.layout import FRONT_CSV, FRONT_JSON, RECIPES

SCHEMA = "gptailor/front/1"
_RECIPE_FILE = re.compile(r"[0-9a-f]{8}\.yaml")


def write_front(report: Report, out: Path) -> None:
    """Writes `front.csv`, `front.json` and `recipes/POINT.yaml` under `out`.

    Side effect: removes recipes that an earlier report wrote there and that are no longer on the
    front; files that were changed by hand are left alone.

    Raises:
        ResourceError: the disk is full.
        UsageError: `out` can't be written.
    """
    write_atomically(out / FRONT_CSV, front_csv(report).encode())
    write_atomically(out / FRONT_JSON, to_json(front_dict(report), indent=1).encode() + b"\n")
    recipes = out / RECIPES
    for point in report.front:
        write_atomically(recipes / f"{point.id}.yaml", point.recipe.to_yaml().encode())
    _remove_stale(recipes, {point.id for point in report.front})


def front_csv(report: Report) -> str:
    """The front as CSV, one row per point, smallest first; one column per task's score."""
    rows = [_csv_row(report, point) for point in report.front]
    columns = dict.fromkeys(_CSV_COLUMNS)
    for prefix in ("search", "holdout"):
        columns |= dict.fromkeys(c for row in rows for c in row if c.startswith(f"{prefix}:"))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


_CSV_COLUMNS = (
    "point",
    "parameters",
    "parameters_percent",
    "layers",
    "accuracy",
    "accuracy_stderr",
    "retention_percent",
    "retention_percent_stderr",
    "above_chance_points",
    "holdout_accuracy",
    "holdout_accuracy_stderr",
    "holdout_retention_percent",
    "holdout_retention_percent_stderr",
    "holdout_above_chance_points",
    "arms",
    "evaluation",
)


def _csv_row(report: Report, point: Point) -> dict[str, object]:
    sizes = (point.id, point.parameters, report.size_percent(point), point.layers)
    values = [
        *sizes,
        *_csv_measured(report.search, point.search),
        *_csv_measured(report.holdout, point.holdout),
    ]
    row: dict[str, object] = dict(
        zip(_CSV_COLUMNS, [*values, " ".join(point.arms), point.number], strict=True)
    )
    for prefix, measured in (("search", point.search), ("holdout", point.holdout)):
        for score in measured.shown if measured else ():
            row[f"{prefix}:{score.task}:{score.metric}"] = score.value
            row[f"{prefix}:{score.task}:{score.metric}:stderr"] = score.stderr
    return row


def _csv_measured(yardstick: Yardstick, measured: Measured | None) -> list[float | None]:
    if measured is None:
        return [None] * 5
    kept = yardstick.kept(measured)
    error = kept.stderr if kept else None
    values = [measured.accuracy, measured.stderr, measured.retention, error, measured.above_chance]
    return values


def front_dict(report: Report) -> dict[str, Any]:
    """The contents of `front.json`: all numbers of the report, in full precision."""
    first = headline(report)
    return {
        "schema": SCHEMA,
        "headline": {
            "text": first.text,
            "note": first.note,
            "point": first.point.id if first.point else None,
            "control": first.control.id if first.control else None,
        },
        "num_layers": report.num_layers,
        "largest_parameters": report.largest_parameters,
        "models": dict(report.models),
        "base": report.base,
        "best_dense": report.search.point,
        "yardsticks": {
            "search": _yardstick_dict(report.search),
            "holdout": _yardstick_dict(report.holdout),
        },
        "hypervolume": report.hypervolume[-1][1] if report.hypervolume else 0.0,
        "control_hypervolume": report.control_hypervolume,
        "cost": _spent_dict(report.cost),
        "cost_by_documents": [_spent_dict(part) for part in report.spent],
        "num_failed": report.num_failed,
        "num_infeasible": report.num_infeasible,
        "front": [point_dict(report, point) for point in report.front],
        "control_arms": [point_dict(report, point) for point in report.controls],
    }


def point_dict(report: Report, point: Point) -> dict[str, Any]:
    """Everything known about a point."""
    return {
        "point": point.id,
        "evaluation": point.number,
        "arms": list(point.arms),
        "kinds": list(point.kinds),
        "parameters": point.parameters,
        "parameters_percent": report.size_percent(point),
        "layers": point.layers,
        "search": _measured_dict(report.search, point.search),
        "holdout": _measured_dict(report.holdout, point.holdout) if point.holdout else None,
        "holdout_without_repair": (
            _measured_dict(report.holdout, point.plain) if point.plain else None
        ),
        "repair": _repair_dict(report, point.recipe),
        "layer_map": layer_map(point.recipe),
        "ends": ends(point.recipe),
        "recipe": point.recipe.to_dict(),
    }


def layer_map(recipe: Recipe) -> list[dict[str, Any]]:
    """The sources of each output layer, bottom to top.

    A merge in which only one source has an effect is shown as that source, because that is what
    is built; any other merge is shown as in the recipe. Each `part` is a source's share of the
    weights, by magnitude; they add up to 1.
    """
    result = []
    for out_layer, layer in enumerate(recipe.layers):
        entry = {"out_layer": out_layer, "src_layer": layer.src_layer}
        result.append(entry | _shown(layer, recipe) | {"scale": layer.scale})
    return result


def ends(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The sources of embeddings and head, as in `layer_map`."""
    pairs = (("embeddings", recipe.embeddings), ("head", recipe.head))
    entries = {key: Take(end, NO_LAYER) if isinstance(end, str) else end for key, end in pairs}
    return {key: _shown(entry, recipe) | {"scale": 1.0} for key, entry in entries.items()}


def _shown(written: Layer, recipe: Recipe) -> dict[str, Any]:
    """Sources, parameters and modules of an entry."""
    built = canonical_layer(written, recipe.base, recipe.models)
    layer = built if isinstance(built, Take) else written
    modules = [
        {"module": text, **_shown(part, recipe), "scale": 1.0} for text, part in layer.modules
    ]
    if isinstance(layer, Take):
        sources = [{"model": layer.model, "part": 1.0}]
        return {"method": None, "sources": sources, "modules": modules}
    weights = layer.amounts
    whole = sum(abs(weight) for weight in weights) or 1.0
    is_weighted = get_method(layer.method).has_amounts
    return {
        "method": layer.method,
        "sources": [
            {"model": model, "weight": weight if is_weighted else None, "part": abs(weight) / whole}
            for model, weight in zip(layer.models, weights, strict=True)
        ],
        "parameters": {
            name: dict(zip(layer.models, value, strict=True)) if isinstance(value, tuple) else value
            for name, value in layer.parameters
        },
        "modules": modules,
    }


def to_json(value: object, indent: int | None = None) -> str:
    """JSON that every reader accepts: numbers that are not finite become null."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file atomically, and makes its folder if it is missing.

    Raises:
        ResourceError: the disk is full.
        UsageError: the path can't be written.
    """
    try:
        write_whole(path, data)
    except OSError as error:
        reason = error.strerror or str(error)
        if is_disk_full(error):
            raise ResourceError(f"The report can't write {path}: {reason}. Free space.") from error
        raise UsageError(
            f"The report can't write {path}: {reason}. Name another folder with --out."
        ) from error


def _remove_stale(folder: Path, keep: Iterable[str]) -> None:
    for path in sorted(folder.glob("*.yaml")) if folder.is_dir() else ():
        if not _RECIPE_FILE.fullmatch(path.name) or path.stem in keep:
            continue
        with contextlib.suppress(OSError, UsageError, UnicodeDecodeError):
            if Recipe.from_yaml(path.read_text(encoding="utf-8")).point == path.stem:
                path.unlink()


def _yardstick_dict(yardstick: Yardstick) -> dict[str, Any]:
    best = yardstick.best
    return {
        "point": yardstick.point,
        "model": yardstick.name or None,
        "accuracy": best.accuracy if best else None,
        "is_near_chance": yardstick.is_near_chance,
    }


def _measured_dict(yardstick: Yardstick, measured: Measured) -> dict[str, Any]:
    kept = yardstick.kept(measured)
    return {
        "accuracy": measured.accuracy,
        "stderr": measured.stderr,
        "retention_percent": measured.retention,
        "retention_percent_stderr": kept.stderr if kept else None,
        "above_chance_points": measured.above_chance,
        "scores": [_score_dict(yardstick, score) for score in measured.shown],
    }


def _score_dict(yardstick: Yardstick, score: Score) -> dict[str, Any]:
    best = yardstick.dense_score(score)
    return {
        "task": score.task,
        "metric": score.metric,
        "value": score.value,
        "stderr": score.stderr,
        "num_documents": score.num_documents,
        "weight": score.weight,
        "chance": score.chance,
        "best_dense": best.value if best else None,
        "retention_percent": yardstick.kept_of_task(score),
    }


def _repair_dict(report: Report, recipe: Recipe) -> dict[str, Any] | None:
    repair = recipe.repair
    if repair is None:
        return None
    chosen = repaired_layers(recipe.src_layers, report.num_layers, repair.layers)
    return {
        "out_layers": [out_layer for out_layer, is_chosen in enumerate(chosen) if is_chosen],
        "teachers": repair.teachers if isinstance(repair.teachers, str) else dict(repair.teachers),
        "documents": repair.calibration.documents if repair.calibration.tasks else 0,
        "tokens_of_text": repair.calibration.tokens if repair.calibration.text else 0,
    }


def _spent_dict(part: Spent) -> dict[str, Any]:
    return {
        "documents": part.documents,
        "evaluations": part.evaluations,
        "num_documents": part.num_documents,
        "num_tokens": part.num_tokens,
        "hours": part.hours,
        "assemble_hours": part.assemble_s / 3600.0,
        "forward_share": part.forward_share,
    }


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
