"""A run: control arms, the search, the holdout; each evaluation in the archive before it counts.

A run that was killed is continued by running it again: scores that the archive has are not computed
a second time. From generation to generation the search is a function of the seed and of the scores;
the asynchronous one is told first what the archive holds, and so is one of several islands.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from gptailor.config import Config
from gptailor.evaluation.family import find_calibration
from gptailor.evaluation.outcome import Documents, Evaluation, Outcome
from gptailor.evaluation.similarity import Similarity
from gptailor.execution.executor import EvaluationJob, Finished, Job, SimilarityJob, job_name
from gptailor.execution.slurm.exit_code_file import note_gain
from gptailor.execution.stop import Stop
from gptailor.models.family import Family
from gptailor.recipe import Recipe
from gptailor.run.archive import Archive
from gptailor.run.journal_entry import Measured
from gptailor.search.arms import control_arms
from gptailor.search.migration import Migration
from gptailor.search.nsga2 import AsyncNSGA2, NSGA2Search
from gptailor.search.peers import NoPeers
from gptailor.search.scheduler import Ask, Scheduler, Tell
from gptailor.search.space import SearchSpace
from gptailor.stitching.plan import count_parameters

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
        others: the other islands, if there are any.

    Attributes:
        scheduler: gives jobs to the executor's workers.
        failures: (worker, recipe's point, reason) of each evaluation that failed.
        num_gained: what this program put into the archive: evaluations, on any documents, and
            measured candidates.
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
        others: NoPeers | None = None,
    ) -> None:
        self.config = config
        self.family = family
        self.archive = archive
        self.executor = executor
        self.progress = progress
        calibration = find_calibration(config, family)
        self.space = SearchSpace(
            config.space, config.models, config.base, family.num_layers, calibration, family.ends
        )
        self.scheduler = Scheduler(executor, stop or Stop(), lambda: tick(self))
        self._done = {(e.recipe.hash, e.documents): e for e in archive.evaluations()}
        self._counted: set[str] = set()
        self.failures: list[tuple[int, str, str]] = []
        self.num_gained = 0
        self.others = others or NoPeers()
        self._arrived: list[Evaluation] = []
        self._migration = Migration()
        self._num_elsewhere = 0
        self._has_begun = False

    def search(self) -> None:
        """Evaluates the control arms, then what NSGA-II asks for until the budget is used.

        Raises:
            TaskError, ModelError, RuntimeError: every evaluation ended like the first one.
            StoppedEarly: a worker died, or it was asked to stop.
            ResourceError: memory or disk is exhausted; what was evaluated is kept.
        """
        search = self.config.search
        if not self.space.ends.are_equal:
            self.progress.note("Models differ in embeddings or head: recipes choose these, too.")
        self._look()
        self._has_begun = True
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
        with self.progress.step(lambda: self.progress.line(time.monotonic()), self._doing):
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
        if not self.others.is_alone:  # what they sent can't be replayed, so neither can the search
            self._arrived = self._take_known()
        self.evaluate(arms)
        self._check_scored(arms)
        nsga2 = NSGA2Search(
            self.space,
            len(self.config.objectives),
            search.population,
            self.others.seed(search.seed),
            [recipe for recipe in arms if self._objectives(recipe) is not None],
        )
        while self._num_left > 0:
            nsga2.welcome(self._migrants())
            asked = nsga2.ask()
            if not asked:
                self._note_complete()
                break
            new = [recipe for recipe in asked if recipe.hash not in self._counted]
            self.evaluate(new[: self._num_left])
            objectives = [self._objectives(recipe) for recipe in asked]
            if not nsga2.has_begun and all(values is None for values in objectives):
                self._check_scored([r for r in asked if (r.hash, "search") in self._done])
            nsga2.tell(objectives)

    def _search_asynchronously(self, arms: Sequence[Recipe]) -> None:
        search = self.config.search
        nsga2 = AsyncNSGA2(
            self.space,
            len(self.config.objectives),
            search.population,
            # a run that goes on does not repeat its first children
            [self.others.seed(search.seed), 3, len(self.evaluations("search"))],
            arms,
        )
        nsga2.tell([(recipe, None) for recipe in arms])  # they come first, and only once
        nsga2.tell([(e.recipe, self._objectives(e.recipe)) for e in self._take_known()])
        waiting, shared = list(arms), {recipe.hash for recipe in arms}

        def ask(n: int) -> list[Job]:
            self._look(at_once=any(recipe.hash in shared for recipe in waiting))
            nsga2.tell(self._migrants())
            waiting[:] = [recipe for recipe in waiting if recipe.hash not in self._counted]
            allowed = self._num_allowed
            mine = len([recipe for recipe in waiting if not self._is_elsewhere(recipe, "search")])
            is_end = allowed - mine <= self.executor.num_workers  # all: the longest goes first
            waiting.extend(nsga2.ask(allowed - mine if is_end else min(n, allowed) - mine))
            return self._longest(waiting, "search", min(n, allowed))

        def tell(finished: Sequence[Finished]) -> None:
            new = [e for e in self._record(finished) if e.recipe.hash not in self._counted]
            for evaluation in new:
                self._count(evaluation, True)
            nsga2.tell([(e.recipe, self._objectives(e.recipe)) for e in new])
            self._check_scored(arms)

        if self._num_left > 0:
            self._work(ask, tell, lambda: self._num_left <= 0)
            self._check_scored([e.recipe for e in self.evaluations("search")])
            if self._num_left > 0:
                self._note_complete()

    def holdout(self, recipes: Sequence[Recipe]) -> None:
        """Scores recipes on the tasks that the search has not seen, if there are any."""
        if self.config.evaluation.holdout is not None and recipes:
            self.progress.note(f"Scoring {len(recipes)} recipes on the holdout tasks.")
            before = self.num_gained

            def what() -> str:
                return f"Scoring on the holdout tasks, {self.num_gained - before} done"

            with self.progress.step(what, self._doing):
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
        waiting, is_begun = list(recipes), False

        def ask(n: int) -> list[Job]:
            nonlocal is_begun
            self._look(at_once=True)
            if not (is_begun and self.others.is_alone):  # else nothing becomes known but by `tell`
                known = [self._done.get((recipe.hash, documents)) for recipe in waiting]
                waiting[:] = [r for r, found in zip(waiting, known, strict=True) if found is None]
                for found in known:
                    if found is not None:
                        count(found, False)
            is_begun = True
            self._num_elsewhere = 0
            allowed = self._num_allowed if documents == "search" else n
            return self._longest(waiting, documents, min(n, allowed))

        def tell(finished: Sequence[Finished]) -> None:
            for evaluation in self._record(finished):
                count(evaluation, True)

        self._work(
            ask, tell, lambda: not waiting or (documents == "search" and self._num_left <= 0)
        )

    def _work(self, ask: Ask, tell: Tell, is_done: Callable[[], bool]) -> None:
        """The scheduler's work, until what other islands have begun is there, too, or is lost."""
        self.scheduler.run(ask, tell)
        while self._num_elsewhere and not is_done():
            self.others.wait()
            self.scheduler.run(ask, tell)

    def _look(self, *, at_once: bool = False) -> None:
        """Takes over what other islands evaluated; `at_once` where all go for the same recipes."""
        is_end = self._num_left <= 2 * (self.executor.num_workers + self._num_elsewhere)
        for evaluation in self.others.refresh(at_once=at_once or is_end):
            key = (evaluation.recipe.hash, evaluation.documents)
            if key not in self._done:
                self._done[key] = evaluation
                if evaluation.documents == "search":
                    self._count(evaluation, False, is_elsewhere=self._has_begun)
                    self._arrived.append(evaluation)

    def _migrants(self) -> list[tuple[Recipe, Sequence[float] | None]]:
        """What arrived since the last call, with objectives where it may enter the population."""
        arrived, self._arrived = self._arrived, []
        return self._migration.chosen([(e.recipe, self._objectives(e.recipe)) for e in arrived])

    def _take_known(self) -> list[Evaluation]:
        """Counts what was evaluated before this search began, or went on."""
        self._arrived = []
        known = self.evaluations("search")
        for evaluation in known:
            self._count(evaluation, False)
        return known

    def evaluations(self, documents: Documents) -> list[Evaluation]:
        """All that is known, of other islands, too, in the order in which they ended."""
        found = [e for e in self._done.values() if e.documents == documents]
        return sorted(found, key=lambda e: e.finished_at)

    @property
    def _num_allowed(self) -> int:
        """How many evaluations may begin now, so that all together keep to the budget."""
        self._num_elsewhere = self.others.num_under_way("search")
        return max(self._num_left - len(self.scheduler.running) - self._num_elsewhere, 0)

    def _is_elsewhere(self, recipe: Recipe, documents: Documents) -> bool:
        return self.others.is_under_way((recipe.hash, documents))

    def _longest(self, waiting: list[Recipe], documents: Documents, n: int) -> list[Job]:
        """Takes at most n recipes out of a list, those first that will take longest.

        With one worker the order makes no difference to the end, and stays as it is. What another
        island is at stays in the list.
        """
        if self.executor.num_workers > 1:
            most_first = self.scheduler.more_is_longer(documents)
            waiting.sort(key=lambda r: r.num_layers, reverse=most_first)
        if self.others.is_alone:
            taken, waiting[:] = waiting[: max(n, 0)], waiting[max(n, 0) :]
            return [EvaluationJob(recipe, documents) for recipe in taken]
        mine = [r for r in self.others.rotated(waiting) if not self._is_elsewhere(r, documents)]
        chosen = {recipe.hash: recipe for recipe in mine[: max(n, 0)]}
        waiting[:] = [recipe for recipe in waiting if recipe.hash not in chosen]
        self._num_elsewhere = max(self._num_elsewhere, len(waiting) - len(mine) + len(chosen))
        self.others.begin((digest, documents) for digest in chosen)
        return [EvaluationJob(recipe, documents) for recipe in chosen.values()]

    def _record(self, finished: Sequence[Finished]) -> list[Evaluation]:
        """Makes evaluations that ended durable, all at once."""
        rows, workers = [], []
        for f in finished:
            if isinstance(f.job, EvaluationJob) and isinstance(f.result, Outcome):
                parameters = count_parameters(f.job.recipe, self.family)
                rows.append((f.job.recipe, f.job.documents, parameters, f.result))
                workers.append(f.worker)
        evaluations = self.archive.record_all(rows)
        self._note_gain(len(evaluations))
        self.others.publish(evaluations)
        for worker, evaluation in zip(workers, evaluations, strict=True):
            self._done.setdefault((evaluation.recipe.hash, evaluation.documents), evaluation)
            if evaluation.outcome.status == "failed":
                last = evaluation.outcome.reason.strip().splitlines()[-1]
                self.failures.append((worker, evaluation.recipe.point, last))
                self.progress.note(f"The evaluation of {evaluation.recipe.point} failed: {last}")
        return evaluations

    def _doing(self) -> str:
        """What workers are at now, those first that are at it longest."""
        words = self.executor.words()
        running = sorted(dict(self.scheduler.running).items(), key=lambda item: item[1].began)
        texts = [
            f"{job_name(now.job)} ({words[worker]})" if worker in words else job_name(now.job)
            for worker, now in running
        ]
        more = f" and {len(texts) - 3} more" if len(texts) > 3 else ""
        return ", ".join(texts[:3]) + more

    def _note_gain(self, count: int) -> None:
        """Counts what is durable now, also for whoever would start this program again."""
        self.num_gained += count
        note_gain(count)

    def _count(self, evaluation: Evaluation, is_new: bool, *, is_elsewhere: bool = False) -> None:
        if evaluation.recipe.hash not in self._counted:
            self._counted.add(evaluation.recipe.hash)
            self.progress.update(evaluation, is_new=is_new, is_elsewhere=is_elsewhere)

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

    def _check_scored(self, recipes: Sequence[Recipe]) -> None:
        """Raises what ended the first of these recipes if all of them ended without a score.

        The others would end like them: to go on, or to begin again, would only cost time.
        """
        ended = [self._done.get((recipe.hash, "search")) for recipe in recipes]
        outcomes = [None if e is None else e.outcome for e in ended]
        first = next((o for o in outcomes if o is not None), None)
        if first is not None and all(o is not None and o.accuracy is None for o in outcomes):
            raise first.as_error()

    def _similarities(self) -> dict[str, Similarity]:
        """Of every candidate, measured once for a run and kept in the archive."""
        if not set(NEEDS_SIMILARITY) & set(self.config.search.seeds):
            return {}
        kept = json.loads(self.archive.get_meta("similarity") or "{}")
        missing = list(self.space.names)

        def ask(n: int) -> list[Job]:
            self._look(at_once=True)
            for model, similarity in self.others.similarities.items():
                kept.setdefault(model, similarity.to_dict())
            missing[:] = [model for model in missing if model not in kept and model not in begun]
            free = [m for m in missing if not self.others.is_under_way((m, "similarity"))]
            self._num_elsewhere = len(missing) - len(free)
            chosen = self.others.rotated(free)[:n]
            begun.update(chosen)
            self.others.begin((model, "similarity") for model in chosen)
            return [SimilarityJob(model) for model in chosen]

        def tell(finished: Sequence[Finished]) -> None:
            measured = [
                Measured(one.job.model, one.result)
                for one in finished
                if isinstance(one.job, SimilarityJob) and isinstance(one.result, Similarity)
            ]
            kept.update((one.model, one.similarity.to_dict()) for one in measured)
            self.archive.set_meta("similarity", json.dumps(kept))
            self._note_gain(len(measured))
            self.others.publish_similarities(measured)

        def what() -> str:
            done = sum(model in kept for model in self.space.names)
            return f"Measuring what layers do, {done} of {len(self.space.names)} candidates done"

        begun: set[str] = set()
        new = [model for model in missing if model not in kept]
        if new:
            self.progress.note(
                f"Measuring what the layers of {', '.join(new)} do, for the control arms."
            )
        with self.progress.step(what, self._doing):
            self._work(ask, tell, lambda: all(model in kept for model in self.space.names))
        self.archive.set_meta("similarity", json.dumps(kept))
        return {model: Similarity.from_dict(kept[model]) for model in self.space.names}


def _unique(recipes: Sequence[Recipe]) -> list[Recipe]:
    return list({recipe.hash: recipe for recipe in reversed(recipes)}.values())[::-1]
