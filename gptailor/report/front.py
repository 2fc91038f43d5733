"""What a run found, as plain data: the points, the front, the control arms and what they cost.

Everything is read from the evaluations of the run and nothing is decided here about how it looks.
Accuracies are parts of 1, retention is in percent, sizes are parameter counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptailor.archive import Archive, Evaluation, Outcome, Score
from gptailor.pareto import pareto_front
from gptailor.recipe import Recipe
from gptailor.report.ledger import Problem, Spent, problems, spent, total
from gptailor.report.volume import hypervolume_history
from gptailor.search.run_folder import RunData, data_of, read_run

DENSE = "dense"


@dataclass(frozen=True)
class Measured:
    """What one recipe scored on one set of documents.

    Attributes:
        accuracy: weighted mean of the scores.
        stderr: its standard error, the tasks taken as independent; None where a score has none.
        scores: one for each task.
        retention: accuracy in percent of the best dense candidate on the same documents; None
            where no dense candidate was scored on them.
    """

    accuracy: float
    stderr: float | None
    scores: tuple[Score, ...]
    retention: float | None = None


@dataclass(frozen=True)
class Point:
    """One recipe that was evaluated on all search documents.

    Attributes:
        number: of its evaluation in the archive.
        recipe: what was evaluated.
        parameters: parameter count of the stitched model.
        arms: the control arms that led to it, for example "angular:0.75"; empty for a child of
            the search.
        search: on the documents that the search saw.
        holdout: on those it never saw; None where it was not scored on them.
    """

    number: int
    recipe: Recipe
    parameters: int
    arms: tuple[str, ...]
    search: Measured
    holdout: Measured | None

    @property
    def id(self) -> str:
        """The short name that `gptailor stitch RUN --point` takes."""
        return self.recipe.point

    @property
    def layers(self) -> int:
        """How many output layers the model has."""
        return self.recipe.num_layers

    @property
    def kinds(self) -> tuple[str, ...]:
        """The control arms without their sizes, each once: ("angular", "random")."""
        return tuple(dict.fromkeys(arm.partition(":")[0] for arm in self.arms))

    @property
    def is_dense(self) -> bool:
        """Whether it is a whole candidate."""
        return DENSE in self.kinds


@dataclass(frozen=True)
class Report:
    """A run, read and summed up.

    Attributes:
        run: the run folder, as the caller named it.
        num_layers: source layers of the family.
        largest_parameters: parameter count of the largest candidate, which is 100 %.
        models: name → reference, the base included.
        base: name of the base; empty where nothing was evaluated.
        config: the resolved search configuration; empty where the run has none.
        points: every recipe that was scored on all search documents, oldest first.
        front: those of them that no other beats, smallest first.
        best_dense: the dense candidate with the highest accuracy on the search documents.
        problems: evaluations without a score, grouped by reason, the most frequent first.
        hypervolume: (number of the evaluation, hypervolume after it), as `volume` defines it.
        control_hypervolume: what the control arms alone reach.
        spent: cost by set of documents, in the order in which they were first used.
        finished_at: Unix time in seconds of the last evaluation; None in an empty run.
    """

    run: str
    num_layers: int
    largest_parameters: int
    models: Mapping[str, str]
    base: str
    config: Mapping[str, Any]
    points: tuple[Point, ...]
    front: tuple[Point, ...]
    best_dense: Point | None
    problems: tuple[Problem, ...]
    hypervolume: tuple[tuple[int, float], ...]
    control_hypervolume: float
    spent: tuple[Spent, ...]
    finished_at: float | None

    @property
    def controls(self) -> tuple[Point, ...]:
        """The points that a control arm led to, largest first."""
        arms = [p for p in self.points if p.arms]
        return tuple(sorted(arms, key=lambda p: (-p.parameters, p.arms, p.number)))

    @property
    def num_failed(self) -> int:
        """Evaluations that crashed or gave no number."""
        return sum(p.count for p in self.problems if p.status == "failed")

    @property
    def num_infeasible(self) -> int:
        """Evaluations of recipes that can't be built or don't fit."""
        return sum(p.count for p in self.problems if p.status == "infeasible")

    @property
    def cost(self) -> Spent:
        """Everything that the run spent."""
        return total(self.spent)

    def size_percent(self, point: Point) -> float:
        """The point's parameters in percent of the largest candidate."""
        return 100.0 * point.parameters / self.largest_parameters


def load_report(run: str | Path | Archive) -> Report:
    """Reads a run.

    Args:
        run: a run folder, with islands or without, read while searches may still write to it, or an
            open archive.

    Raises:
        UsageError: the folder holds no run.
    """
    if isinstance(run, Archive):
        return _report(data_of(run), str(run.folder))
    return _report(read_run(run), str(run))


def _report(data: RunData, run: str) -> Report:
    rows, family = data.evaluations, data.family
    points = _points(rows)
    num_layers = _num_layers(family, [row.recipe for row in rows])
    dense = [p for p in points if p.is_dense and p.layers == num_layers]
    best = max(dense, key=lambda p: (p.search.accuracy, -p.number), default=None)
    points = tuple(_with_retention(p, best) for p in points)
    best = next((p for p in points if best and p.number == best.number), None)
    largest = _largest_parameters(family, rows)
    sizes = [(p.number, p.parameters, p.search.accuracy) for p in points]
    controls = [s for s, p in zip(sizes, points, strict=True) if p.arms]
    control_history = hypervolume_history(controls, largest)
    recipes = [row.recipe for row in rows]
    return Report(
        run=run,
        num_layers=num_layers,
        largest_parameters=largest,
        models=_models(family, recipes),
        base=recipes[0].base if recipes else "",
        config=data.config,
        points=points,
        front=pareto_front(points, lambda p: (p.parameters, p.search.accuracy, p.recipe.hash)),
        best_dense=best,
        problems=problems(rows),
        hypervolume=hypervolume_history(sizes, largest),
        control_hypervolume=control_history[-1][1] if control_history else 0.0,
        spent=spent(data.paid),
        finished_at=max((row.finished_at for row in rows), default=None),
    )


def _points(rows: Sequence[Evaluation]) -> tuple[Point, ...]:
    holdouts = {
        row.recipe.hash: measured
        for row in rows
        if row.documents == "holdout" and (measured := _measured(row.outcome))
    }
    return tuple(
        Point(
            row.number,
            row.recipe,
            row.parameters,
            row.arms,
            measured,
            holdouts.get(row.recipe.hash),
        )
        for row in rows
        if row.documents == "search" and (measured := _measured(row.outcome))
    )


def _measured(outcome: Outcome) -> Measured | None:
    accuracy = outcome.accuracy
    if outcome.status != "ok" or accuracy is None or not math.isfinite(accuracy):
        return None
    return Measured(accuracy, _stderr(accuracy, outcome.scores), outcome.scores)


def _stderr(accuracy: float, scores: Sequence[Score]) -> float | None:
    """√(Σ wᵢ² sᵢ²) / Σ wᵢ; None where that is not the error of this accuracy."""
    weight = sum(s.weight for s in scores)
    errors = [s.weight * s.stderr for s in scores if s.stderr is not None]
    if weight <= 0.0 or len(errors) < len(scores):
        return None
    if abs(sum(s.weight * s.value for s in scores) / weight - accuracy) > 1e-6:
        return None
    error = math.hypot(*errors) / weight
    return error if math.isfinite(error) else None


def _with_retention(point: Point, best: Point | None) -> Point:
    search = _kept(point.search, best.search if best else None)
    holdout = point.holdout and _kept(point.holdout, best.holdout if best else None)
    return Point(point.number, point.recipe, point.parameters, point.arms, search, holdout)


def _kept(part: Measured, whole: Measured | None) -> Measured:
    if whole is None or whole.accuracy <= 0.0:
        return part
    retention = 100.0 * part.accuracy / whole.accuracy
    return Measured(part.accuracy, part.stderr, part.scores, retention)


def _num_layers(family: Mapping[str, Any], recipes: Iterable[Recipe]) -> int:
    """The family's depth, never less than what a recipe names."""
    seen = max((layer + 1 for recipe in recipes for layer in recipe.src_layers), default=0)
    named = family.get("num_layers")
    return max(seen, named) if isinstance(named, int) else seen


def _largest_parameters(family: Mapping[str, Any], rows: Iterable[Evaluation]) -> int:
    named = family.get("parameters")
    counts = [n for n in named.values() if isinstance(n, int)] if isinstance(named, dict) else []
    return max(counts or [row.parameters for row in rows], default=1) or 1


def _models(family: Mapping[str, Any], recipes: Iterable[Recipe]) -> dict[str, str]:
    named = family.get("models")
    models = {str(k): str(v) for k, v in named.items()} if isinstance(named, dict) else {}
    for recipe in recipes:
        for name, ref in recipe.models.items():
            models.setdefault(name, ref)
    return models
