"""Recipes that wait for a worker: who is next, what other islands are at, how many may begin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from gptailor.evaluation.outcome import Documents, Evaluation
from gptailor.execution.executor import EvaluationJob, Executor, Finished, Job
from gptailor.recipe import Recipe
from gptailor.search.budget import Budget
from gptailor.search.peers import Peers
from gptailor.search.recorder import Recorder

if TYPE_CHECKING:
    from gptailor.search.scheduler import Ask, Scheduler, Tell


class EvaluationQueue:
    """Evaluates recipes: here, or by waiting for an island that is at them already.

    Args:
        executor: evaluates.
        scheduler: gives jobs to its workers.
        recorder: what is known.
        budget: what may be evaluated on the search's documents.
        peers: the other islands.

    Attributes:
        num_elsewhere: evaluations that others are at and that are waited for here, as of the last
            time that jobs were asked for.
        arrived: what other islands evaluated on the search's documents and nobody took yet.
    """

    def __init__(
        self,
        executor: Executor,
        scheduler: Scheduler,
        recorder: Recorder,
        budget: Budget,
        peers: Peers,
    ) -> None:
        self.num_workers = executor.num_workers
        self.recorder = recorder
        self.budget = budget
        self.peers = peers
        self.num_elsewhere = 0
        self.arrived: list[Evaluation] = []
        self._scheduler = scheduler
        self._has_begun = False

    def look(self, *, at_once: bool = False) -> None:
        """Takes over what other islands evaluated.

        Args:
            at_once: look even if the last look was just now: where all go for the same recipes.
        """
        is_end = self.budget.left <= 2 * (self.num_workers + self.num_elsewhere)
        for evaluation in self.recorder.refresh(at_once=at_once or is_end):
            if evaluation.documents == "search":
                self.budget.count(evaluation, is_elsewhere=self._has_begun)
                self.arrived.append(evaluation)

    def begin(self) -> None:
        """Takes what others evaluated so far for old; what comes later was made meanwhile."""
        self.look()
        self._has_begun = True

    def take_arrived(self) -> list[Evaluation]:
        """What arrived since the last call."""
        arrived, self.arrived = self.arrived, []
        return arrived

    def take_known(self) -> list[Evaluation]:
        """Counts what was evaluated before this search began, or went on; returns it."""
        self.arrived = []
        known = self.recorder.evaluations("search")
        for evaluation in known:
            self.budget.count(evaluation)
        return known

    def ask_elsewhere(self) -> None:
        """Finds out how many evaluations on the search's documents others are at."""
        self.num_elsewhere = self.peers.num_under_way("search")

    @property
    def num_allowed(self) -> int:
        """How many evaluations may begin now, so that all islands together keep to the budget."""
        running = len(self._scheduler.running)
        return max(self.budget.left - running - self.num_elsewhere, 0)

    def is_elsewhere(self, recipe: Recipe, documents: Documents) -> bool:
        """True while another island evaluates the recipe."""
        return self.peers.is_under_way((recipe.hash, documents))

    def take(self, waiting: list[Recipe], documents: Documents, n: int) -> list[Job]:
        """Takes at most n recipes out of a list, those first that will take longest.

        With one worker the order makes no difference to the end, and stays as it is. What another
        island is at stays in the list.
        """
        if self.num_workers > 1:
            most_first = self._scheduler.more_is_longer(documents)
            waiting.sort(key=lambda r: r.num_layers, reverse=most_first)
        if self.peers.is_alone:
            taken, waiting[:] = waiting[: max(n, 0)], waiting[max(n, 0) :]
            return [EvaluationJob(recipe, documents) for recipe in taken]
        mine = [r for r in self.peers.rotated(waiting) if not self.is_elsewhere(r, documents)]
        chosen = {recipe.hash: recipe for recipe in mine[: max(n, 0)]}
        waiting[:] = [recipe for recipe in waiting if recipe.hash not in chosen]
        self.num_elsewhere = max(self.num_elsewhere, len(waiting) - len(mine) + len(chosen))
        self.peers.begin((digest, documents) for digest in chosen)
        return [EvaluationJob(recipe, documents) for recipe in chosen.values()]

    def run(self, ask: Ask, tell: Tell, is_done: Callable[[], bool]) -> None:
        """The scheduler's work, until what other islands have begun is there, too, or is lost.

        Args:
            ask, tell: as for `Scheduler.run`.
            is_done: True when nothing is worth waiting for any more.
        """
        self._scheduler.run(ask, tell)
        while self.num_elsewhere and not is_done():
            self.peers.wait()
            self._scheduler.run(ask, tell)

    def evaluate(self, recipes: Sequence[Recipe], documents: Documents) -> None:
        """Makes sure that the scores of these recipes are known, as far as the budget goes.

        The budget is that of the search's documents; on others everything is evaluated.
        """
        is_search = documents == "search"
        waiting, is_begun = list(recipes), False

        def count(evaluation: Evaluation, *, is_new: bool) -> None:
            if is_search:
                self.budget.count(evaluation, is_new=is_new)

        def ask(n: int) -> list[Job]:
            nonlocal is_begun
            self.look(at_once=True)
            if not (is_begun and self.peers.is_alone):  # else nothing becomes known but by `tell`
                known = [self.recorder.find(recipe, documents) for recipe in waiting]
                waiting[:] = [r for r, found in zip(waiting, known, strict=True) if found is None]
                for found in known:
                    if found is not None:
                        count(found, is_new=False)
            is_begun = True
            self.num_elsewhere = 0
            if is_search:
                self.ask_elsewhere()
                n = min(n, self.num_allowed)
            return self.take(waiting, documents, n)

        def tell(finished: Sequence[Finished]) -> None:
            for evaluation in self.recorder.record(finished):
                count(evaluation, is_new=True)

        def is_done() -> bool:
            return not waiting or (is_search and self.budget.left <= 0)

        self.run(ask, tell, is_done)
