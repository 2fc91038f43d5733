"""The results of a run as plain data: the points, the front, the control arms and their cost.

Everything is read from the run's evaluations; presentation is decided elsewhere. Accuracies are
fractions of 1, retention is in percent, sizes are parameter counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptailor.evaluation.outcome import SEARCH_DOCUMENTS, Evaluation
from gptailor.recipe import Recipe
from gptailor.report.hypervolume import hypervolume_history
from gptailor.report.ledger import Problem, Spent, problems, spent, total
from gptailor.report.measured import Measured, measured_of
from gptailor.report.yardstick import Yardstick, yardstick_of
from gptailor.run.archive import Archive
from gptailor.run.folder import RunData, data_of, read_run
from gptailor.run.pareto import pareto_front

DENSE = "dense"


@dataclass(frozen=True)
class Point:
    """One recipe that was evaluated on all search documents.

    Attributes:
        number: of its evaluation in the archive.
        recipe: what was evaluated.
        parameters: parameter count of the stitched model.
        arms: the control arms that led to it, for example "angular:0.75"; empty for a child of
            the search.
        search: its scores on the documents that the search saw.
        holdout: its scores on those it never saw; None if it was not scored on them.
        plain: the scores of the same layers without repair, on the holdout; None for a recipe
            without repair, or if that was not scored.
    """

    number: int
    recipe: Recipe
    parameters: int
    arms: tuple[str, ...]
    search: Measured
    holdout: Measured | None
    plain: Measured | None = None

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

    @property
    def dense_names(self) -> str:
        """The name of the candidate; several names if they are the same model."""
        pairs = [arm.partition(":") for arm in self.arms]
        return ", ".join(name for kind, _, name in pairs if kind == DENSE)


@dataclass(frozen=True)
class Report:
    """A summary of a run.

    Attributes:
        run: the run folder, as the caller named it.
        num_layers: source layers of the family.
        largest_parameters: parameter count of the largest candidate, which is 100 %.
        models: name → reference, the base included.
        base: name of the base; empty if nothing was evaluated.
        config: the resolved search configuration; empty if the run has none.
        points: every recipe that was scored on all search documents, oldest first.
        front: those of them that no other beats, smallest first.
        search, holdout: what scores are compared with: the best dense candidate on the documents
            that the search saw, and the best on those it never saw, which may be another one.
        problems: evaluations without a score, grouped by reason, the most frequent first.
        hypervolume: (number of the evaluation, hypervolume after it), as `volume` defines it.
        control_hypervolume: hypervolume of the control arms alone.
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
    search: Yardstick
    holdout: Yardstick
    problems: tuple[Problem, ...]
    hypervolume: tuple[tuple[int, float], ...]
    control_hypervolume: float
    spent: tuple[Spent, ...]
    finished_at: float | None

    @property
    def has_other_holdout_tasks(self) -> bool:
        """Whether the holdout's tasks differ from the search's."""
        searched = _tasks(p.search for p in self.points)
        return bool(self.holdout_tasks) and set(self.holdout_tasks) != set(searched)

    @property
    def holdout_tasks(self) -> tuple[str, ...]:
        """Names of the holdout's tasks that count, in order; empty if nothing was scored."""
        return tuple(_tasks(p.holdout for p in self.points if p.holdout))

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
        """The total cost of the run."""
        return total(self.spent)

    def size_percent(self, point: Point) -> float:
        """The point's parameters in percent of the largest candidate."""
        return 100.0 * point.parameters / self.largest_parameters


def load_report(run: str | Path | Archive) -> Report:
    """Reads a run.

    Args:
        run: a run folder, with or without islands, to which searches may still be writing, or an
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
    recipes = [row.recipe for row in rows]
    base = recipes[0].base if recipes else ""
    search, holdout = _yardsticks(points, rows, num_layers, base)
    points = tuple(
        replace(
            p,
            search=search.with_retention(p.search),
            holdout=p.holdout and holdout.with_retention(p.holdout),
            plain=p.plain and holdout.with_retention(p.plain),
        )
        for p in points
    )
    largest = _largest_parameters(family, rows)
    sizes = [(p.number, p.parameters, p.search.accuracy) for p in points]
    controls = [s for s, p in zip(sizes, points, strict=True) if p.arms]
    control_history = hypervolume_history(controls, largest)
    return Report(
        run=run,
        num_layers=num_layers,
        largest_parameters=largest,
        models=_models(family, recipes),
        base=base,
        config=data.config,
        points=points,
        front=pareto_front(points, lambda p: (p.parameters, p.search.accuracy, p.recipe.hash)),
        search=search,
        holdout=holdout,
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
        if row.documents == "holdout" and (measured := measured_of(row.outcome))
    }
    return tuple(
        Point(
            row.number,
            row.recipe,
            row.parameters,
            row.arms,
            measured,
            holdouts.get(row.recipe.hash),
            holdouts.get(row.recipe.with_repair(None).hash) if row.recipe.repair else None,
        )
        for row in rows
        if row.documents in SEARCH_DOCUMENTS and (measured := measured_of(row.outcome))
    )


def _yardsticks(
    points: Sequence[Point], rows: Iterable[Evaluation], num_layers: int, base: str
) -> tuple[Yardstick, Yardstick]:
    """The yardsticks of the search's documents and of the holdout's."""
    dense = [p for p in points if p.is_dense and p.layers == num_layers]
    tried = {row.recipe.hash for row in rows if row.documents == "holdout"}
    missing = [p for p in dense if p.recipe.hash not in tried]
    search = [(p.id, p.dense_names, p.search) for p in dense]
    holdout = [(p.id, p.dense_names, p.holdout) for p in dense if p.holdout]
    is_partial = bool(missing and tried)
    bases = [p.holdout for p in dense if p.holdout and f"{DENSE}:{base}" in p.arms]
    others = {(s.task, s.metric): s for measured in bases for s in measured.others}
    return (
        yardstick_of(search),
        replace(yardstick_of(holdout, is_partial=is_partial), others=others),
    )


def _tasks(parts: Iterable[Measured]) -> dict[str, None]:
    return dict.fromkeys(score.task for part in parts for score in part.scores)


def _num_layers(family: Mapping[str, Any], recipes: Iterable[Recipe]) -> int:
    """The family's depth, at least what the recipes use."""
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
