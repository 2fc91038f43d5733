"""A run: control arms, generations, the holdout; each evaluation in the archive before it counts.

A run that was killed is continued by running it again: the search is a function of the seed and of
the scores, and scores that the archive has are not computed a second time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from gptailor.archive import Archive, Evaluation, Outcome
from gptailor.config import Config
from gptailor.errors import StoppedEarly, UsageError
from gptailor.evaluation.similarity import Similarity
from gptailor.models.family import Family
from gptailor.recipe import Recipe
from gptailor.search.nsga2 import NSGA2Search
from gptailor.search.seeds import control_arms
from gptailor.search.space import SearchSpace, find_calibration

if TYPE_CHECKING:
    from gptailor.execution.local import Executor
    from gptailor.search.progress import Progress

NEEDS_SIMILARITY = ("block_influence", "angular", "uniform")


class Run:
    """One search over one family, with its archive.

    Args:
        config: what to search.
        family: the opened candidates.
        archive: of the run folder, open for writing.
        executor: evaluates.
        progress: is told of every evaluation.
    """

    def __init__(
        self,
        config: Config,
        family: Family,
        archive: Archive,
        executor: Executor,
        progress: Progress,
    ) -> None:
        self.config = config
        self.family = family
        self.archive = archive
        self.executor = executor
        self.progress = progress
        calibration = find_calibration(config, family)
        self.space = SearchSpace(
            config.space, config.models, config.base, family.num_layers, calibration
        )
        self._done = {(e.recipe.hash, e.documents): e for e in archive.evaluations()}
        self._counted: set[str] = set()

    def search(self) -> None:
        """Evaluates the control arms, then generation after generation until the budget is used.

        Raises:
            StoppedEarly: nothing could be evaluated, or a worker died.
            ResourceError: memory or disk is exhausted; what was evaluated is kept.
        """
        search = self.config.search
        arms = control_arms(
            self.space,
            search.seeds,
            search.arm_sizes,
            self._similarities(),
            search.seed,
        )
        for arm, recipe in arms:
            self.archive.add_arm(arm, recipe)
        recipes = _unique([recipe for _, recipe in arms])[: search.evaluations]
        self.evaluate(recipes)
        nsga2 = NSGA2Search(
            self.space,
            len(self.config.objectives),
            search.population,
            search.seed,
            [recipe for recipe in recipes if self._objectives(recipe) is not None],
        )
        while len(self._counted) < search.evaluations:
            asked = nsga2.ask()
            if not asked:
                self.progress.note("The space holds no further recipe: the search is complete.")
                break
            new = [recipe for recipe in asked if recipe.hash not in self._counted]
            self.evaluate(new[: search.evaluations - len(self._counted)])
            objectives = [self._objectives(recipe) for recipe in asked]
            if not nsga2.has_begun and all(values is None for values in objectives):
                raise StoppedEarly(self._why_nothing(asked))
            nsga2.tell(objectives)

    def holdout(self, recipes: Sequence[Recipe]) -> None:
        """Scores recipes on the tasks that the search has not seen, if there are any."""
        if self.config.evaluation.holdout is not None and recipes:
            self.progress.note(f"Scoring {len(recipes)} recipes on the holdout tasks.")
            for _ in self._evaluated(_unique(recipes), "holdout"):
                pass

    def evaluate(self, recipes: Sequence[Recipe]) -> None:
        """Makes sure that the archive holds these recipes' scores on the search documents."""
        for evaluation, is_new in self._evaluated(recipes, "search"):
            self._counted.add(evaluation.recipe.hash)
            self.progress.update(evaluation, is_new=is_new)

    def _evaluated(
        self, recipes: Sequence[Recipe], documents: str
    ) -> Iterator[tuple[Evaluation, bool]]:
        missing = []
        for recipe in recipes:
            found = self._done.get((recipe.hash, documents))
            if found is None:
                missing.append(recipe)
            else:
                yield found, False
        jobs = [(recipe, documents) for recipe in missing]
        for index, outcome in self.executor.evaluate(jobs):  # type: ignore[arg-type]
            yield self._record(missing[index], documents, outcome), True

    def _record(self, recipe: Recipe, documents: str, outcome: Outcome) -> Evaluation:
        parameters = self.family.parameters(recipe.src_layers)
        evaluation = self.archive.record(recipe, documents, parameters, outcome)
        self._done[recipe.hash, documents] = evaluation
        if outcome.status == "failed":
            last = outcome.reason.strip().splitlines()[-1]
            self.progress.note(f"The evaluation of {recipe.point} failed: {last}")
        return evaluation

    def _objectives(self, recipe: Recipe) -> list[float] | None:
        """What NSGA-II minimises; None for a recipe that has no scores."""
        evaluation = self._done.get((recipe.hash, "search"))
        if evaluation is None or evaluation.outcome.accuracy is None:
            return None
        accuracy = evaluation.outcome.accuracy
        largest = self.family.parameters()
        scores = {score.task: score.value for score in evaluation.outcome.scores}
        known: dict[str, Callable[[], float]] = {
            "accuracy": lambda: -accuracy,
            "parameters": lambda: evaluation.parameters / largest,
        }
        return [
            known[name]() if name in known else -scores[name] for name in self.config.objectives
        ]

    def _why_nothing(self, recipes: Sequence[Recipe]) -> str:
        reasons = [
            self._done[recipe.hash, "search"].outcome.reason.strip().splitlines()[-1]
            for recipe in recipes
            if (recipe.hash, "search") in self._done
        ]
        return f"No recipe of the first generation has a score; the first ended with: {reasons[0]}"

    def _similarities(self) -> dict[str, Similarity]:
        """Of every candidate, measured once for a run and kept in the archive."""
        if not set(NEEDS_SIMILARITY) & set(self.config.search.seeds):
            return {}
        kept = json.loads(self.archive.get_meta("similarity") or "{}")
        found: dict[str, Similarity] = {}
        for model in self.space.names:
            if model not in kept:
                kept[model] = asdict(self.executor.similarity(model))
                self.archive.set_meta("similarity", json.dumps(kept))
            data = kept[model]
            found[model] = Similarity(
                tuple(data["block_influence"]), tuple(map(tuple, data["angular"]))
            )
        return found


def _unique(recipes: Sequence[Recipe]) -> list[Recipe]:
    return list({recipe.hash: recipe for recipe in reversed(recipes)}.values())[::-1]


def check_resumable(archive: Archive, config: Config, family: Family, documents: str) -> None:
    """Writes down what a new run is made of, or compares it with what the run was made of.

    Only the number of evaluations and the batch size may change between the parts of a run; another
    batch size can change the last bits of a score.

    Raises:
        UsageError: configuration, weights or documents are others than those of the run.
    """
    fingerprint = family.fingerprint()
    calibration = find_calibration(config, family)
    if calibration is not None:
        fingerprint["calibration"] = calibration.digests
    now = {
        "config": config.model_dump_json(),
        "fingerprint": json.dumps(fingerprint),
        "documents": documents,
    }
    before = {key: archive.get_meta(key) for key in now}
    old_config = before["config"]
    if old_config is None:
        models = {name: str(c.folder) for name, c in family.candidates.items()}
        parameters = dict.fromkeys(models, family.parameters())
        description = {
            "num_layers": family.num_layers,
            "models": models,
            "parameters": parameters,
        }
        archive.set_meta("family", json.dumps(description))
        for key, value in reversed(now.items()):  # "config" comes last: it marks a run as begun
            archive.set_meta(key, value)
        return
    difference = _difference(json.loads(old_config), json.loads(now["config"]))
    if difference:
        raise UsageError(
            f"The run in {archive.folder} was started with another configuration: {difference}. "
            "Only search.evaluations, evaluation.batch_size and evaluation.candidates_gib may "
            "change; name another output for the rest."
        )
    for key, what in (("fingerprint", "the model files"), ("documents", "the tasks' documents")):
        if before[key] != now[key]:
            raise UsageError(
                f"The run in {archive.folder} can't be resumed, as {what} changed since it began: "
                "name another output."
            )
    archive.set_meta("config", now["config"])


_MAY_CHANGE = (
    "search.evaluations", "evaluation.batch_size", "evaluation.candidates_gib", "output",
)  # fmt: skip


def _difference(old: object, new: object, path: str = "") -> str:
    """The first key that differs, with both values; empty if there is none."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            found = _difference(old.get(key), new.get(key), f"{path}.{key}" if path else key)
            if found:
                return found
        return ""
    return "" if old == new or path in _MAY_CHANGE else f"{path} was {old!r}, but is {new!r}"
