"""A run: control arms, the search, the holdout; each evaluation in the archive before it counts.

A run that was killed is continued by running it again: scores that the archive has are not computed
a second time. From generation to generation the search is a function of the seed and of the scores;
the asynchronous one is told first what the archive holds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from gptailor.archive import Archive, Documents, Evaluation, Outcome
from gptailor.config import Config
from gptailor.errors import StoppedEarly
from gptailor.evaluation.similarity import Similarity
from gptailor.execution.executor import EvaluationJob, Finished, Job, SimilarityJob
from gptailor.execution.stop import Stop
from gptailor.models.family import Family
from gptailor.recipe import Recipe
from gptailor.search.nsga2 import AsyncNSGA2, NSGA2Search
from gptailor.search.scheduler import Scheduler
from gptailor.search.seeds import control_arms
from gptailor.search.space import SearchSpace, find_calibration

if TYPE_CHECKING:
    from gptailor.execution.executor import Executor
    from gptailor.search.progress import Progress

MIN_ROUNDS = 4
"""Where a generation gives each worker fewer evaluations than these, generations are given up."""

NEEDS_SIMILARITY = ("block_influence", "angular", "uniform")


class Run:
    """One search over one family, with its archive.

    Args:
        config: what to search.
        family: the opened candidates.
        archive: of the run folder, open for writing.
        executor: evaluates.
        progress: is told of every evaluation.
        stop: a request to stop.
        tick: called about every second.

    Attributes:
        scheduler: gives jobs to the executor's workers.
        failures: (worker, recipe's point, reason) of each evaluation that failed.
    """

    def __init__(
        self,
        config: Config,
        family: Family,
        archive: Archive,
        executor: Executor,
        progress: Progress,
        stop: Stop | None = None,
        tick: Callable[[Run], None] = lambda run: None,
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
        self.scheduler = Scheduler(executor, Stop() if stop is None else stop, lambda: tick(self))
        self._done = {(e.recipe.hash, e.documents): e for e in archive.evaluations()}
        self._counted: set[str] = set()
        self.failures: list[tuple[int, str, str]] = []

    def search(self) -> None:
        """Evaluates the control arms, then what NSGA-II asks for until the budget is used.

        Raises:
            StoppedEarly: nothing could be evaluated, a worker died, or it was asked to stop.
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
        if self.is_asynchronous:
            self._search_asynchronously(recipes)
        else:
            self._search_generations(recipes)

    @property
    def is_asynchronous(self) -> bool:
        """Whether children are made one by one: asked for, or worth it with so many workers.

        A generation ends when its slowest evaluation does; while each worker has several in a
        generation that costs little, and the search does not depend on who was quicker.
        """
        search = self.config.search
        if search.schedule == "auto":
            return self.executor.num_workers * MIN_ROUNDS > search.population
        return search.schedule == "asynchronous"

    def _search_generations(self, arms: Sequence[Recipe]) -> None:
        search = self.config.search
        self.evaluate(arms)
        nsga2 = NSGA2Search(
            self.space,
            len(self.config.objectives),
            search.population,
            search.seed,
            [recipe for recipe in arms if self._objectives(recipe) is not None],
        )
        while self._num_left > 0:
            asked = nsga2.ask()
            if not asked:
                self._note_complete()
                break
            new = [recipe for recipe in asked if recipe.hash not in self._counted]
            self.evaluate(new[: self._num_left])
            objectives = [self._objectives(recipe) for recipe in asked]
            if not nsga2.has_begun and all(values is None for values in objectives):
                raise StoppedEarly(self._why_nothing(asked))
            nsga2.tell(objectives)

    def _search_asynchronously(self, arms: Sequence[Recipe]) -> None:
        search = self.config.search
        known = [e for (_, documents), e in self._done.items() if documents == "search"]
        nsga2 = AsyncNSGA2(
            self.space,
            len(self.config.objectives),
            search.population,
            [search.seed, 3, len(known)],  # a run that goes on does not repeat its first children
            arms,
        )
        nsga2.tell([(recipe, None) for recipe in arms])  # they come first, and only once
        nsga2.tell([(e.recipe, self._objectives(e.recipe)) for e in known])
        for evaluation in known:
            self._count(evaluation, False)
        waiting = [recipe for recipe in arms if recipe.hash not in self._counted]
        under_way = 0

        def ask(n: int) -> list[Job]:
            nonlocal under_way
            left = self._num_left - under_way - len(waiting)
            is_end = left <= self.executor.num_workers  # all that is left: the longest goes first
            waiting.extend(nsga2.ask(left if is_end else min(n - len(waiting), left)))
            jobs = self._longest(waiting, "search", min(n, self._num_left - under_way))
            under_way += len(jobs)
            return jobs

        def tell(finished: Sequence[Finished]) -> None:
            nonlocal under_way
            under_way -= len(finished)
            evaluations = self._record(finished)
            for evaluation in evaluations:
                self._count(evaluation, True)
            nsga2.tell([(e.recipe, self._objectives(e.recipe)) for e in evaluations])

        if self._num_left > 0:
            self.scheduler.run(ask, tell)
            scored = [e.recipe for (_, documents), e in self._done.items() if documents == "search"]
            if all(self._objectives(recipe) is None for recipe in scored):
                raise StoppedEarly(self._why_nothing(scored))
            if self._num_left > 0:
                self._note_complete()

    def holdout(self, recipes: Sequence[Recipe]) -> None:
        """Scores recipes on the tasks that the search has not seen, if there are any."""
        if self.config.evaluation.holdout is not None and recipes:
            self.progress.note(f"Scoring {len(recipes)} recipes on the holdout tasks.")
            self._evaluate(_unique(recipes), "holdout")

    def evaluate(self, recipes: Sequence[Recipe]) -> None:
        """Makes sure that the archive holds these recipes' scores on the search documents."""
        self._evaluate(recipes, "search", self._count)

    def _evaluate(
        self,
        recipes: Sequence[Recipe],
        documents: Documents,
        count: Callable[[Evaluation, bool], None] = lambda evaluation, is_new: None,
    ) -> None:
        waiting: list[Recipe] = []
        for recipe in recipes:
            found = self._done.get((recipe.hash, documents))
            if found is None:
                waiting.append(recipe)
            else:
                count(found, False)

        def tell(finished: Sequence[Finished]) -> None:
            for evaluation in self._record(finished):
                count(evaluation, True)

        self.scheduler.run(lambda n: self._longest(waiting, documents, n), tell)

    def _longest(self, waiting: list[Recipe], documents: Documents, n: int) -> list[Job]:
        """Takes at most n recipes out of a list, those first that will take longest.

        With one worker the order makes no difference to the end, and stays as it is.
        """
        jobs: list[Job] = []
        if self.executor.num_workers > 1:
            waiting.sort(key=lambda r: -self.scheduler.expected_s(EvaluationJob(r, documents)))
        while waiting and len(jobs) < n:
            jobs.append(EvaluationJob(waiting.pop(0), documents))
        return jobs

    def _record(self, finished: Sequence[Finished]) -> list[Evaluation]:
        """Makes evaluations that ended durable, all at once."""
        rows, workers = [], []
        for f in finished:
            if isinstance(f.job, EvaluationJob) and isinstance(f.result, Outcome):
                parameters = self.family.parameters(f.job.recipe.src_layers)
                rows.append((f.job.recipe, f.job.documents, parameters, f.result))
                workers.append(f.worker)
        evaluations = self.archive.record_all(rows)
        for worker, evaluation in zip(workers, evaluations, strict=True):
            self._done[evaluation.recipe.hash, evaluation.documents] = evaluation
            if evaluation.outcome.status == "failed":
                last = evaluation.outcome.reason.strip().splitlines()[-1]
                self.failures.append((worker, evaluation.recipe.point, last))
                self.progress.note(f"The evaluation of {evaluation.recipe.point} failed: {last}")
        return evaluations

    def _count(self, evaluation: Evaluation, is_new: bool) -> None:
        if evaluation.recipe.hash not in self._counted:
            self._counted.add(evaluation.recipe.hash)
            self.progress.update(evaluation, is_new=is_new)

    @property
    def _num_left(self) -> int:
        """Evaluations that the budget still allows."""
        return self.config.search.evaluations - len(self._counted)

    def _note_complete(self) -> None:
        self.progress.note("The space holds no further recipe: the search is complete.")

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
        missing = [model for model in self.space.names if model not in kept]

        def ask(n: int) -> list[Job]:
            jobs, missing[:] = [SimilarityJob(model) for model in missing[:n]], missing[n:]
            return list(jobs)

        def tell(finished: Sequence[Finished]) -> None:
            for one in finished:
                if isinstance(one.job, SimilarityJob) and isinstance(one.result, Similarity):
                    kept[one.job.model] = asdict(one.result)
            self.archive.set_meta("similarity", json.dumps(kept))

        self.scheduler.run(ask, tell)
        found = {
            model: Similarity(
                tuple(kept[model]["block_influence"]), tuple(map(tuple, kept[model]["angular"]))
            )
            for model in self.space.names
        }
        return found


def _unique(recipes: Sequence[Recipe]) -> list[Recipe]:
    return list({recipe.hash: recipe for recipe in reversed(recipes)}.values())[::-1]
