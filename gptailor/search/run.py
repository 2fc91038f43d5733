"""A run: control arms, the search, the holdout; each evaluation is archived before it counts.

A killed run continues when it is run again: scores in the archive are not computed again. This
module connects the parts: the queue evaluates (`queue.py`), the recorder makes results durable
(`recorder.py`), a searcher chooses recipes (`algorithms.py`), and one of the loops asks it and
tells it (`loops.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from gptailor.config import REFIT, Config
from gptailor.evaluation.family import find_calibration
from gptailor.evaluation.outcome import Documents, Evaluation
from gptailor.evaluation.repair.settings import with_teachers
from gptailor.evaluation.similarity import Similarity
from gptailor.execution.executor import job_name
from gptailor.execution.stop import Stop
from gptailor.models.family import Family
from gptailor.recipe import Recipe, Repair
from gptailor.run.archive import Archive
from gptailor.search.algorithms import ALGORITHMS
from gptailor.search.arms import NEEDS_SIMILARITY, control_arms
from gptailor.search.budget import Budget
from gptailor.search.loops import AsynchronousLoop, GenerationalLoop
from gptailor.search.objectives import Objectives
from gptailor.search.peers import NoPeers, Peers
from gptailor.search.queue import EvaluationQueue
from gptailor.search.recorder import Recorder
from gptailor.search.scheduler import Scheduler
from gptailor.search.searcher import Searcher, Settings
from gptailor.search.similarities import measure_similarities
from gptailor.search.space import SearchSpace

if TYPE_CHECKING:
    from gptailor.execution.executor import Executor
    from gptailor.search.progress import Progress

MIN_ROUNDS = 4
"""If a generation has fewer evaluations per worker than this, `auto` is asynchronous."""


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
        peers: the other islands, if there are any.

    Attributes:
        space: the recipes that may be proposed.
        scheduler: gives jobs to the executor's workers.
        recorder: holds all known evaluations and failures.
        budget: how many evaluations are left.
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
        peers: Peers | None = None,
    ) -> None:
        self.config = config
        self.executor = executor
        self.progress = progress
        self.peers = peers or NoPeers()
        calibration = find_calibration(config, family)
        self.space = SearchSpace(
            config.space, config.models, config.base, family.num_layers, calibration, family.ends
        )
        self.scheduler = Scheduler(executor, stop or Stop(), lambda: tick(self))
        self.recorder = Recorder(archive, family, self.peers, progress)
        self.budget = Budget(config.search.evaluations, progress)
        self._queue = EvaluationQueue(
            executor, self.scheduler, self.recorder, self.budget, self.peers
        )
        self._objectives = Objectives(config.objectives, family.parameters())

    def search(self) -> None:
        """Evaluates the control arms, then what the searcher asks for until the budget is used.

        Raises:
            TaskError, ModelError, RuntimeError: every evaluation ended like the first one.
            StoppedEarly: a worker died, or the search was asked to stop.
            ResourceError: memory or disk is exhausted; what was evaluated is kept.
        """
        search = self.config.search
        if not self.space.ends.are_equal:
            self.progress.note("Models differ in embeddings or head: recipes choose those, too.")
        self._queue.begin()
        arms = control_arms(
            self.space, search.arms, search.arm_sizes, self._similarities(), search.seed
        )
        self._name_arms(arms)
        workload = self.executor.workload()
        if workload.why_no_repair:
            self.progress.note(f"Nothing is repaired: {workload.why_no_repair}")
        if workload.repair is not None:
            repaired = self._repaired_arms(arms, workload.repair)
            self._name_arms(repaired)
            arms += repaired
        recipes = _unique([recipe for _, recipe in arms])[: search.evaluations]
        with self.progress.step(lambda: self.progress.line(time.monotonic()), self._doing):
            kind = AsynchronousLoop if self.is_asynchronous else GenerationalLoop
            loop = kind(self._queue, self._objectives, self.progress.note)
            loop.run(recipes, self._make_searcher)

    @property
    def is_asynchronous(self) -> bool:
        """Whether recipes are chosen one by one: if configured, or if there are many workers.

        A generation ends with its slowest evaluation. While each worker has several evaluations per
        generation that costs little, and the search does not depend on which worker is faster.
        """
        search = self.config.search
        if search.schedule == "auto":
            return self.executor.num_workers * MIN_ROUNDS > search.population
        return search.schedule == "asynchronous"

    def repair_front(self, evaluations: Sequence[Evaluation]) -> None:
        """Evaluates the recipes that are repaired again, with a repair that reads more.

        A search's repairs read little, since there are many; what they read decides how good a deep
        cut becomes (docs/repair.md).
        """
        front = self.executor.workload().front_repair
        recipes = []
        for evaluation in evaluations:
            repair = evaluation.recipe.repair
            if front is None or repair is None:
                continue
            better = evaluation.recipe.with_repair(replace(front, teachers=repair.teachers))
            if better.hash == evaluation.recipe.hash:  # there was no more to read
                continue
            recipes.append(better)
            for arm in evaluation.arms:
                self.recorder.archive.add_arm(f"{arm}({front.calibration.documents})", better)
        if not recipes:
            return
        self.progress.note(f"Repairing {len(recipes)} recipes with more documents.")
        self._evaluate_more(recipes, "front", "Repairing with more documents")

    def holdout(self, recipes: Sequence[Recipe]) -> None:
        """Scores recipes on the tasks that the search has not seen, if there are any."""
        if self.config.evaluation.holdout is not None and recipes:
            self.progress.note(f"Scoring {len(recipes)} recipes on the holdout tasks.")
            self._evaluate_more(recipes, "holdout", "Scoring on the holdout tasks")

    def evaluations(self, documents: Documents) -> list[Evaluation]:
        """All known evaluations, also of other islands, in the order in which they ended."""
        return self.recorder.evaluations(documents)

    def _make_searcher(self, start: Sequence[Recipe]) -> Searcher:
        """Makes the searcher that the configuration names, starting from control arms."""
        search = self.config.search
        algorithm = ALGORITHMS[search.algorithm]
        kind = algorithm.generational
        seed: tuple[int, ...] = (self.peers.seed(search.seed),)
        if self.is_asynchronous:
            kind = algorithm.asynchronous
            # so that a resumed run does not repeat its first children
            seed = (*seed, 3, len(self.recorder.evaluations("search")))
        num_objectives = len(self.config.objectives)
        return kind(self.space, Settings(num_objectives, search.population, seed, tuple(start)))

    def _evaluate_more(self, recipes: Sequence[Recipe], documents: Documents, doing: str) -> None:
        """Evaluates recipes after the search, and shows how many are done."""
        before = self.recorder.num_gained

        def what() -> str:
            return f"{doing}, {self.recorder.num_gained - before} done"

        with self.progress.step(what, self._doing):
            self._queue.evaluate(_unique(recipes), documents)

    def _name_arms(self, arms: Sequence[tuple[str, Recipe]]) -> None:
        """Records which recipes are control arms; an evaluation knows those named before it."""
        for arm, recipe in arms:
            self.recorder.archive.add_arm(arm, recipe)

    def _repaired_arms(
        self, arms: Sequence[tuple[str, Recipe]], repair: Repair
    ) -> list[tuple[str, Recipe]]:
        """Chooses teachers by the scores of the dense candidates; from now on the space repairs.

        Returns:
            The control arms that have something to repair, repaired.
        """
        dense = [recipe for arm, recipe in arms if arm.startswith(("dense:", f"{REFIT}:"))]
        with self.progress.step(lambda: self.progress.line(time.monotonic()), self._doing):
            self._queue.evaluate(_unique(dense), "search")
        best = best_by_task([(r, self.recorder.find(r)) for r in dense])
        self.space.repair = with_teachers(repair, best, self.space.base)
        teachers = ", ".join(f"{model} for {task}" for task, model in best.items())
        self.progress.note(f"Recipes are repaired; teachers: {teachers}.")
        repaired = [
            (f"{arm}+repair", self.space.recipe(r.layers, r.embeddings, r.head)) for arm, r in arms
        ]
        return [(arm, recipe) for arm, recipe in repaired if recipe.repair is not None]

    def _similarities(self) -> dict[str, Similarity]:
        if not set(NEEDS_SIMILARITY) & set(self.config.search.arms):
            return {}
        return measure_similarities(self.space.names, self._queue, self.progress, self._doing)

    def _doing(self) -> str:
        """What workers are doing now, longest-running first."""
        words = self.executor.words()
        running = sorted(dict(self.scheduler.running).items(), key=lambda item: item[1].began)
        texts = [
            f"{job_name(now.job)} ({words[worker]})" if worker in words else job_name(now.job)
            for worker, now in running
        ]
        more = f" and {len(texts) - 3} more" if len(texts) > 3 else ""
        return ", ".join(texts[:3]) + more


def best_by_task(scored: Sequence[tuple[Recipe, Evaluation | None]]) -> dict[str, str]:
    """Task → the dense candidate with the best score; the first of several.

    Args:
        scored: dense candidates with their evaluations.
    """
    best: dict[str, tuple[float, str]] = {}
    for recipe, evaluation in scored:
        for score in evaluation.outcome.scores if evaluation is not None else ():
            if score.task not in best or score.value > best[score.task][0]:
                best[score.task] = score.value, recipe.layers[0].models[0]
    return {task: model for task, (_, model) in best.items()}


def _unique(recipes: Sequence[Recipe]) -> list[Recipe]:
    return list({recipe.hash: recipe for recipe in reversed(recipes)}.values())[::-1]
